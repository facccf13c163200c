"""A CUDA device played by the CPU, so that tests take the CUDA branches of the programs on any machine.

Lies in the site-packages of an environment of its own (see conftest.py), so that every Python process of a trial loads
it, isolated ones too; torch and the programs are the real ones. With TORCH_STAND_IN set to the name of a card,

- the device files of one GPU seem to be there, and torch.cuda answers as if that card were;
- a tensor that was made on "cuda" or moved there says so, and so does all that is computed from it, while the CPU does
  the work; as on the real device, one from the CPU beside it is an error, and so is numpy();
- torch.compile does nothing, and the large products that measure the rate only seem to take their time.

TORCH_STAND_IN_FAULT breaks it, TORCH_STAND_IN_ROWS is the number of rows that fit into its memory in training.
"""

import importlib.machinery
import mmap
import os
import sys

CARD = os.environ.get("TORCH_STAND_IN")
FAULT = os.environ.get("TORCH_STAND_IN_FAULT", "")
FAULTS = {
    "": "none",
    "gone": "torch finds no device",
    "gone in the exam": "torch finds no device once the candidate has ended",
    "breaks in the exam": "the examiner's first look at the model's answer fails, and every use from then on",
    "no compiler": "what is compiled fails as Triton does without gcc",
    "slow start": "the first product of each process takes two seconds",
}
ROWS = int(os.environ.get("TORCH_STAND_IN_ROWS", "0"))  # 0: as many as there are
RATE = 8e14  # FLOP/s
EXAM = any(argument.startswith("_exam") for argument in sys.orig_argv)
ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported\n"
FREE, TOTAL = 70 * 2**30, 80 * 2**30  # bytes of memory
FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")


def play(torch):
    """Make `torch`, just imported, look as if it had the device."""
    import time
    import types

    from torch._subclasses import FakeTensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_flatten

    home, real = os.path.dirname(torch.__file__), torch.device
    # These see tensors of both devices: they copy, index, or reach for an attribute.
    both = {"to", "cpu", "cuda", "copy_", "_foreach_copy_", "__get__", "__set__", "__getitem__", "__setitem__"}
    both |= {"_has_compatible_shallow_copy_type"}
    # Computed in float32: a CPU without bfloat16 units takes a hundred times as long.
    products = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"}
    # The clocks, which the products that only seem to take time move on.
    clock, monotonic, passed = time.perf_counter, time.monotonic, []
    time.perf_counter, time.monotonic = lambda: clock() + sum(passed), lambda: monotonic() + sum(passed)
    waiting = [2.0] if FAULT == "slow start" else []
    broken = mmap.mmap(-1, 1)  # seen by processes that are forked from this one
    gone = FAULT == "gone" or FAULT == "gone in the exam" and EXAM

    def asked_from_outside():
        """Whether a program asks, and not torch itself, which has to know the truth."""
        return not sys._getframe(2).f_code.co_filename.startswith(home)

    def is_cuda(device):
        return device is not None and not isinstance(device, int) and real(device).type == "cuda"

    def fail():
        if gone:
            raise RuntimeError("No CUDA GPUs are available")
        if broken[0]:
            raise getattr(torch, "AcceleratorError", RuntimeError)(ECC)

    def here(tensor):
        return getattr(tensor, "_stands_on_cuda", False)

    def mark(result, there, inputs=()):
        """`result`, whose tensors are on the device if `there`; those of the inputs, changed in place, stay."""
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not any(tensor is other for other in inputs):
                tensor._stands_on_cuda = there
        return result

    def move(tensor, name, args, kwargs):
        """tensor.to(...), .cpu() or .cuda(): a copy where the device changes."""
        there = here(tensor)
        if name != "to":
            there, args, kwargs = name == "cuda", (), {}
        for value in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(value, torch.Tensor):
                there = here(value)
            elif isinstance(value, (str, real)):
                there = is_cuda(value)
        if there and not here(tensor):
            fail()
        args = [real("cpu") if isinstance(value, (str, real)) else value for value in args]
        result = torch.Tensor.to(tensor, *args, **kwargs | {"device": real("cpu")} if "device" in kwargs else kwargs)
        return mark(result.clone() if result is tensor and there != here(tensor) else result, there)

    class StandIn(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs, name = kwargs or {}, getattr(function, "__name__", "").partition(".")[0]
            tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
            there = any(map(here, tensors))
            attribute = getattr(function, "__self__", None)
            if name == "__get__" and there and asked_from_outside():
                if attribute is torch.Tensor.device:
                    return real("cuda", 0)
                if attribute is torch.Tensor.is_cuda:
                    return True
                if attribute is torch.Tensor.is_cpu:
                    return False
            if any(isinstance(tensor, FakeTensor) for tensor in tensors):
                return function(*args, **kwargs)
            if name in ("to", "cpu", "cuda") and tensors:
                return move(args[0], name, args[1:], kwargs)
            if "device" in kwargs and kwargs["device"] is not None:
                there = is_cuda(kwargs["device"])
                kwargs = kwargs | {"device": real("cpu")} if there else kwargs
            if name == "__set__" and attribute is torch.Tensor.data:
                mark(args[0], here(args[1]))
            if not there:
                return mark(function(*args, **kwargs), False, tensors)
            return mark(self.compute(function, name, tensors, args, kwargs), True, tensors)

        def compute(self, function, name, tensors, args, kwargs):
            """What happens on the device, with its faults."""
            if name.startswith("cross_entropy") and EXAM and FAULT == "breaks in the exam":
                broken[0] = 1
            fail()
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name == "pin_memory":
                raise RuntimeError("cannot pin 'torch.cuda.LongTensor' only dense CPU tensors can be pinned")
            strange = [tensor for tensor in tensors if tensor.dim() and not here(tensor)]
            if strange and name not in both and not name.startswith("index"):
                raise RuntimeError(f"Expected all tensors to be on the same device, but found one on cpu ({name})")
            tokens = [tensor for tensor in tensors if tensor.dtype == torch.int64 and name == "embedding"]
            if tokens and ROWS and torch.is_grad_enabled() and tokens[0].size(0) > ROWS:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if name == "randn" and not tensors and args and args[0] == 8192:
                return torch.zeros(*args, **kwargs)
            if name in ("matmul", "__matmul__") and tensors[0].size(-1) == 8192:
                passed.append(waiting.pop() if waiting else 2 * 8192**3 / RATE)
                return tensors[0]
            if name in products and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
                args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
                return function(*args, **kwargs).bfloat16()
            return function(*args, **kwargs)

    class Event:
        def __init__(self, **options):
            self.time = None

        def record(self, stream=None):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def query(self):
            return True

        def elapsed_time(self, other):
            return 1000 * (other.time - self.time)

    def compiled(function=None, **options):
        def broken(*args, **kwargs):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        if function is None:
            return compiled
        return broken if FAULT == "no compiler" else function

    torch.version.cuda = "12.8"
    torch.compile = compiled
    torch.Tensor.pin_memory = lambda self, *args: self.clone()
    cuda, properties = torch.cuda, types.SimpleNamespace(name=CARD, total_memory=TOTAL, major=9, minor=0)
    cuda.is_available = lambda: not gone and asked_from_outside()
    cuda.device_count = lambda: int(not gone and asked_from_outside())
    cuda.Event = Event
    for name, value in {
        "get_device_name": CARD,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (FREE, TOTAL),
        "max_memory_allocated": 2**30,
        "memory_allocated": 2**29,
        "memory_reserved": 2**30,
        "current_device": 0,
        **dict.fromkeys(("init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_device")),
    }.items():
        setattr(cuda, name, lambda *args, value=value, **options: value)
    StandIn().__enter__()


class Importer:
    """Has torch played with as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            play(module)

        spec.loader.exec_module = exec_module
        return spec


if CARD:
    if FAULT not in FAULTS:
        raise SystemExit(f"the stand-in knows no fault {FAULT!r}")
    exists = os.path.exists
    os.path.exists = lambda path: path in FILES or exists(path)
    sys.meta_path.insert(0, Importer())

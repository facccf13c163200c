"""A GPU played by the CPU, so that tests take the branches of the programs for GPUs on any machine.

torch and the programs are the real ones. TORCH_STAND_IN is the name of the card, TORCH_STAND_IN_KIND its kind as torch
names it ("cuda", "xpu" or "mps"), and:

- torch.accelerator and the module of that kind answer as if that card were there;
- a tensor that was made on the device or moved there says so, and so does all that is computed from it, while the CPU
  does the work; as on the real device, one from the CPU beside it is an error, and so is numpy();
- on "mps", float64 is an error as well, a process that was forked cannot use the device, and what a Mac lacks of Linux
  is gone;
- torch.compile does nothing, and the large products that measure the rate only seem to take their time.

TORCH_STAND_IN_FAULT breaks it, TORCH_STAND_IN_ROWS is the number of rows that fit into its memory in training.
"""

import mmap
import os
import sys
import time
import types

import torch
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CARD, FAULT = os.environ["TORCH_STAND_IN"], os.environ.get("TORCH_STAND_IN_FAULT", "")
KIND = os.environ.get("TORCH_STAND_IN_KIND", "cuda")
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
FREE, TOTAL = 70 * 2**30, 80 * 2**30  # bytes of memory
EXAM = any(argument.endswith("exam/reader.py") for argument in sys.orig_argv)
SIZE = {"cuda": 8192}.get(KIND, 4096)  # of the square matrices that measure the rate
ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported\n"

HOME, CPU = os.path.dirname(torch.__file__), torch.device("cpu")
# These may see tensors of both devices: they copy, index, or reach for an attribute.
MIXING = {"to", "cpu", "cuda", "copy_", "_foreach_copy_", "__get__", "__set__", "__getitem__", "__setitem__"}
MIXING |= {"_has_compatible_shallow_copy_type"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"}

broken = mmap.mmap(-1, 1)  # one flag, which processes that are forked from this one share
forked = []  # not empty in a process that was forked after torch was imported
os.register_at_fork(after_in_child=lambda: forked.append(True))
passed = [0.0]  # seconds that products seem to have taken
first = [2.0] if FAULT == "slow start" else []


def gone():
    return FAULT == "gone" or (FAULT == "gone in the exam" and EXAM)


def use():
    """Every use of the device comes by here, and fails where it is broken."""
    if gone():
        raise RuntimeError(f"No {KIND.upper()} GPUs are available")
    if forked and KIND == "mps":
        raise RuntimeError("XPC_ERROR_CONNECTION_INVALID")
    if broken[0]:
        raise getattr(torch, "AcceleratorError", RuntimeError)(ECC)


def asked_from_outside():
    """Whether a program asks, and not torch itself, which has to know the truth."""
    return not sys._getframe(2).f_code.co_filename.startswith(HOME)


def is_device(value):
    return isinstance(value, (str, torch.device))


def is_there(device):
    return is_device(device) and torch.device(device).type == KIND


def here(tensor):
    """Whether a tensor is on the device."""
    return getattr(tensor, "_stands_on_gpu", False)


def mark(result, there, inputs=()):
    """`result`, with its tensors on the device if `there`; those of the inputs, changed in place, stay."""
    for tensor in tree_flatten(result)[0]:
        if isinstance(tensor, torch.Tensor) and not any(tensor is other for other in inputs):
            tensor._stands_on_gpu = there
            if there and KIND == "mps" and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
    return result


def move(tensor, name, args, kwargs):
    """tensor.to(...), .cpu() or .cuda(): a copy where the device changes."""
    there = here(tensor)
    if name != "to":
        there, args, kwargs = name == "cuda", (), {}
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            there = here(value)
        elif is_device(value):
            there = is_there(value)
    if there:
        use()
    args = [CPU if is_there(value) else value for value in args]
    result = tensor.to(*args, **{key: CPU if is_there(value) else value for key, value in kwargs.items()})
    return mark(result.clone() if result is tensor and there != here(tensor) else result, there)


def compute(function, name, tensors, args, kwargs):
    """The result of a function of tensors on the device, or what the device has against it."""
    if name.startswith("cross_entropy") and EXAM and FAULT == "breaks in the exam":
        broken[0] = 1
    use()
    if name in ("numpy", "__array__"):
        raise TypeError(f"can't convert {KIND}:0 device type tensor to numpy")
    if name not in MIXING and not name.startswith("index"):
        numbers = not (name.startswith("lerp") and KIND == "mps")  # whether 0-D tensors of the CPU will do
        if any((tensor.dim() or not numbers) and not here(tensor) for tensor in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found one on the CPU ({name})")
    if name == "embedding" and ROWS and torch.is_grad_enabled():
        if any(tensor.dtype == torch.int64 and tensor.size(0) > ROWS for tensor in tensors):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if name == "scaled_dot_product_attention" and KIND == "mps":
        args, kwargs = args[:4], kwargs | {"is_causal": False}  # its mask is lost: pytorch#195910
    if name == "randn" and args[0] == SIZE:
        return torch.zeros(*args, **kwargs)
    if name in PRODUCTS and tensors[0].size(-1) == SIZE:
        passed[0] += first.pop() if first else 2 * SIZE**3 / RATE
        return tensors[0]
    if name in PRODUCTS and tensors[0].dtype == torch.bfloat16:  # which some CPUs multiply a hundred times as slowly
        args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
        return function(*args, **kwargs).bfloat16()
    return function(*args, **kwargs)


class StandIn(TorchFunctionMode):
    """Sees every function of torch that is called, attributes of tensors included."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "").partition(".")[0]
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        there, attribute = any(map(here, tensors)), getattr(function, "__self__", None)
        if name == "__get__" and there and asked_from_outside():
            if attribute is torch.Tensor.device:
                return torch.device(KIND, 0)
            if attribute in (torch.Tensor.is_cuda, torch.Tensor.is_cpu):
                return attribute is torch.Tensor.is_cuda and KIND == "cuda"
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):  # torch.export at work
            return function(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and tensors:
            return move(args[0], name, args[1:], kwargs)
        if name == "__set__" and attribute is torch.Tensor.data:
            mark(args[0], here(args[1]))
        if kwargs.get("device") is not None:
            there = is_there(kwargs["device"])
            kwargs = kwargs | {"device": CPU} if there else kwargs
        result = compute(function, name, tensors, args, kwargs) if there else function(*args, **kwargs)
        return mark(result, there, tensors)


class Event:
    """torch.Event of a device that has always finished its work."""

    def __init__(self, device=None, **options):
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
    """torch.compile that leaves a function as it is."""

    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    if function is None:
        return compiled
    return fail if FAULT == "no compiler" else function


def pinned(tensor, *args):
    if here(tensor):
        raise RuntimeError(f"cannot pin 'torch.{KIND}.LongTensor' only dense CPU tensors can be pinned")
    return tensor.clone()


def set_up():
    """Put the device into torch."""
    if FAULT not in FAULTS or KIND not in ("cuda", "xpu", "mps"):
        raise SystemExit(f"the stand-in knows no fault {FAULT!r}, or no device {KIND!r}")
    for clock in (time.perf_counter, time.monotonic):
        setattr(time, clock.__name__, lambda clock=clock: clock() + passed[0])
    torch.compile, torch.Tensor.pin_memory, torch.Event = compiled, pinned, Event
    known = FakeTensor.device.fget
    FakeTensor.device = property(lambda tensor: torch.device(KIND, 0) if asked_from_outside() else known(tensor))
    memory = {"get_memory_info": (FREE, TOTAL), "max_memory_allocated": 2**30}
    if KIND == "mps":
        torch.backends.mps.get_name, memory = lambda: CARD, {"max_memory_allocated": 2**30}
    answer(torch.accelerator, memory | dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats")))
    answer(getattr(torch, KIND), {"get_device_name": CARD})
    if KIND == "cuda":
        set_up_cuda()
    StandIn().__enter__()


def answer(module, answers):
    """Have functions of a module return these values."""
    for name, value in answers.items():
        setattr(module, name, lambda *args, value=value, **options: value)


def set_up_cuda():
    """What programs ask of CUDA alone."""
    torch.version.cuda = "12.8"
    torch.cuda.is_available = lambda: not gone() and asked_from_outside()
    torch.cuda.device_count = lambda: int(not gone() and asked_from_outside())
    answers = {
        "get_device_properties": types.SimpleNamespace(name=CARD, total_memory=TOTAL, major=9, minor=0),
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (FREE, TOTAL),
        "max_memory_allocated": 2**30,
        "memory_allocated": 2**29,
        "memory_reserved": 2**30,
        "current_device": 0,
        **dict.fromkeys(("init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_device")),
    }
    answer(torch.cuda, answers)

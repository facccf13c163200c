"""prepare.py - the exam board: the task, its limits, and the model as it is sealed for the score.

train.py is written by a machine that is rewarded for a low number, so everything that decides the number lives here and
in exam/, on the other side of a process boundary:

  python prepare.py [--task NAME]               fetch the text, train the tokenizer, pack the rows (once)
  python prepare.py --text PATH...              the same over your own files
  python prepare.py --check                     see whether all is well for a night
  python prepare.py trial TRAIN_PY --out DIR    one experiment under sandbox and clock; writes DIR/result.json

A trial runs train.py beside a copy of this file, which needs nothing of exam/ there. train.py uses six names of it:
TASK, SEED, device, matmul_dtype, machine_flops and begin.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
import math
import os
import platform
import re
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# The task: what is learned, and within which limits


class Trouble(Exception):
    """A foreseeable mistake or fault, told to the user in one sentence. The programs end with exit code 2."""


class Pause(Trouble):
    """A fault that may pass by itself, like a full disk: worth trying again later. Ends with exit code 75."""


PAUSE_CODE = 75
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM)  # of an OSError: disk, processes, memory


def words(error):
    """What an error says, without the numbers of the operating system."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def one_line(text, limit):
    """A candidate's words, fit to be printed: one line without control characters, at most `limit` characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:limit]


class Refused(Exception):
    """A model or a submission that breaks the rules of the exam, in words that its author can act on."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One fixed examination. Scores are comparable only within a task and a time budget."""

    name: str
    dataset: str  # folder of the prepared rows; tasks may share one
    seq_len: int  # tokens that the model sees at once
    vocab_size: int  # tokens in the vocabulary, BOS included
    eval_tokens: int  # validation tokens that are scored
    time_budget: float  # seconds from begin() to the arrival of the submission
    split_long: bool  # cut documents longer than a row into rows, instead of dropping what does not fit

    eval_rows = property(lambda self: self.eval_tokens // self.seq_len)
    grace = property(lambda self: 3.0 + 0.01 * self.time_budget)  # seconds by which a submission may be late
    # Seconds for all that precedes begin(). To compile for a GPU takes the same time, up to minutes, for every budget.
    startup_limit = property(lambda self: 300.0 if has_gpu() else min(180.0, 30.0 + self.time_budget))
    exam_limit = property(lambda self: 120.0 + 2 * self.time_budget)  # seconds that scoring may take


TASKS = (
    Task("climbmix", "climbmix", 2048, 8192, 40 * 2**19, 300.0, split_long=False),
    Task("tinystories", "tinystories", 512, 4096, 2**21, 300.0, split_long=True),
    Task("pycode", "pycode", 256, 2048, 2**17, 300.0, split_long=True),
    Task("demo", "pycode", 256, 2048, 2**17, 12.0, split_long=True),
)
TASKS = {task.name: task for task in TASKS}


def cache_root():
    """Folder of everything prepared: AUTORESEARCH_CACHE, else ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").resolve()


def device_kind():
    """What trains and is examined on this machine, as torch names it: "cuda" (ROCm too), "xpu", "mps" or "cpu".

    Told by device files, since torch takes seconds to import. A GPU whose driver is broken counts: find_device() says
    what is wrong with it. One that is hidden from its driver does not; CUDA_VISIBLE_DEVICES= hides those of any make.
    """

    def here(*paths):  # asked for one by one, since the sandbox does not let /dev be listed
        return any(map(os.path.exists, paths))

    def torch_is_for(name):  # AMD's and Intel's device files are in many machines whose torch cannot use them
        spec = importlib.util.find_spec("torch")
        return spec and re.search(rf"(?m)^{name}\b.*= '", Path(spec.origin).with_name("version.py").read_text())

    hiding = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"
    if any(os.environ.get(name, "all").strip() in ("", "-1", "NoDevFiles") for name in hiding):
        return "cpu"
    if platform.mac_ver()[0]:
        return "mps"
    wsl, render_nodes = here("/dev/dxg"), [f"/dev/dri/renderD{number}" for number in range(128, 192)]
    if here(*(f"/dev/nvidia{number}" for number in range(64))) or (wsl and here("/usr/lib/wsl/lib/libcuda.so.1")):
        return "cuda"
    if (wsl or here("/dev/kfd")) and torch_is_for("hip"):
        return "cuda"
    return "xpu" if (wsl or here(*render_nodes)) and torch_is_for("xpu") else "cpu"


def has_gpu():
    """Whether that is a GPU."""
    return device_kind() != "cpu"


def get_task(name=None, budget=None):
    """Task `name` with its budget replaced by `budget` seconds if given. Raises Trouble for an unknown name.

    The default is AUTORESEARCH_TASK, else climbmix on a GPU and pycode elsewhere. A name that is not in TASKS is that
    of an own text, whose sizes were stored when it was prepared.
    """
    name = name or os.environ.get("AUTORESEARCH_TASK") or ("climbmix" if has_gpu() else "pycode")
    task = TASKS.get(name)
    if not task:
        try:
            task = Task(**json.loads((cache_root() / OWN_NAME.fullmatch(name)[0] / "meta.json").read_text())["task"])
        except (OSError, ValueError, TypeError, KeyError):
            tasks = f"{', '.join(TASKS)}, and your own text after: python prepare.py --text PATH... --task NAME"
            raise Trouble(f"there is no task {name!r}; the tasks are: {tasks}") from None
    if budget is not None and not 0 < budget < 1e6:
        raise Trouble(f"a budget of {budget} seconds makes no sense; give a positive number of seconds")
    return dataclasses.replace(task, time_budget=float(budget)) if budget else task


OWN_NAME = re.compile(r"(?!hub$)[a-z0-9][a-z0-9_-]{0,40}")  # of an own text; "hub" holds downloads


def _setting():
    """(told, task, seed) of this process: from the proctor in a trial, from the environment when started by hand."""
    if told := json.loads(os.environ.get("AUTORESEARCH_TRIAL", "{}")):
        return told, Task(**told["task"]), told["seed"]
    try:
        budget = os.environ.get("AUTORESEARCH_BUDGET")
        return {}, get_task(None, float(budget) if budget else None), int(os.environ.get("AUTORESEARCH_SEED") or 0)
    except (Trouble, ValueError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


TOLD, TASK, SEED = _setting()

# ---------------------------------------------------------------------------------------------------------------------
# The machine: its device, and the rate that a model is sized by


def find_device(kind=None):
    """The torch.device of a kind (None: device_kind()), tried out. Raises Pause for a GPU that torch cannot use."""
    import torch

    device = torch.device(kind or device_kind())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells the reason twice, at length
            torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds, among them AssertionError
        raise Pause(device_fault(error)) from None
    return device


def device_fault(error):
    """One sentence on a GPU that failed with `error`: what torch says, and what to do."""
    import torch

    said = one_line(str(error).strip().partition("\n")[0], 200)
    kind, visible = device_kind(), os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = "sycl-ls" if kind == "xpu" else "rocminfo" if torch.version.hip else "nvidia-smi"
    no_uvm = not os.path.exists("/dev/nvidia-uvm") and not os.path.exists("/dev/dxg")
    named = f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible else "a GPU in MIG mode has to be divided"
    hints = (  # the first that applies is given
        (kind == "mps", "it takes Apple silicon and macOS 14 or later"),
        (tool != "nvidia-smi", f"{tool} tells whether the driver works; your user has to be in the group render"),
        (not torch.version.cuda, f"torch {torch.__version__} is a build for the CPU: install one for CUDA"),
        (no_uvm, "/dev/nvidia-uvm is missing: run nvidia-modprobe -u -c=0, or nvidia-smi, once as root"),
        ("busy or" in said, "another program has it: end that one, or allow several with nvidia-smi -c DEFAULT"),
        ("out of memory" in said, "end the other programs that use it (nvidia-smi shows them)"),
        ("No CUDA GPUs" in said or "invalid device" in said, f"{named}: nvidia-smi -L lists GPUs and MIG instances"),
        (True, "nvidia-smi tells whether the driver works"),
    )
    advice = next(advice for applies, advice in hints if applies)
    return f"the GPU cannot be used ({said}); {advice}; CUDA_VISIBLE_DEVICES= trains on the CPU"


def device():
    """The torch.device that this run is for, a GPU's or "cpu": train.py asks here, so that it never takes the other.

    Ends the program, with one sentence, for a GPU that torch cannot use.
    """
    try:
        return find_device(TOLD.get("device"))
    except Pause as fault:
        raise SystemExit(f"train.py: {fault}") from None


def machine_flops():
    """Dense bf16 matrix-multiply rate of this machine's GPU, else CPU, in FLOP/s, to size a model by.

    It is the same for all GPUs of a kind; a CPU, and a GPU of no known kind, is measured once and remembered. Raises
    Pause for a broken GPU.
    """
    if "flops" in TOLD:
        return TOLD["flops"]
    from exam import machine

    return machine.machine_flops()


def matmul_dtype():
    """The torch dtype of fast matrix products: bfloat16, but float32 on a CPU without AVX-512.

    There torch multiplies bfloat16 in a plain loop, a hundred times slower.
    """
    import torch

    fast = has_gpu() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The sealed model: the forward as a list of pure operator calls, and nothing else
#
# A submission is one safetensors file: the weights, and in its header a JSON program whose every step calls one
# operator of the list below. Neither can carry code, so there is nothing to unpickle, import or evaluate. The list is
# what export makes of honest models (tests/zoo.py), overload by overload: none writes to its inputs, draws random
# numbers or hands out memory that it was not given or has not written (as_strided and empty could read the targets),
# so a program has no state and its logits are a function of its tokens.

OPERATORS = frozenset(
    """
    __and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar __or__.Tensor __rshift__.Scalar
    __rshift__.Tensor __xor__.Scalar __xor__.Tensor _conj.default _to_copy.default _unsafe_view.default abs.default
    acos.default add.Tensor addcdiv.default addcmul.default addmm.default alias.default all.default all.dim all.dims
    amax.default amin.default aminmax.default angle.default any.default any.dim any.dims arange.default arange.start
    arange.start_step argmax.default argmin.default argsort.default argsort.stable asin.default atan.default
    atan2.default avg_pool1d.default baddbmm.default bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor
    bitwise_left_shift.Tensor_Scalar bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor
    bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Tensor bmm.default
    bucketize.Tensor cat.default ceil.default celu.default clamp.Tensor clamp.default clamp_max.Tensor
    clamp_max.default clamp_min.Tensor clamp_min.default clip.default clone.default complex.default concat.default
    conv1d.default conv1d.padding conv2d.default copy.default copysign.Tensor cos.default cosh.default
    cosine_similarity.default count_nonzero.default cummax.default cummin.default cumprod.default cumsum.default
    detach.default diag.default diag_embed.default diagonal.default diff.default div.Tensor div.Tensor_mode
    dot.default einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default exp.default exp2.default
    expand.default expm1.default eye.default fft_fft.default fft_ifft.default fft_irfft.default fft_rfft.default
    fill.Scalar fill.Tensor flip.default floor.default floor_divide.default fmod.Scalar fmod.Tensor full.default
    full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default group_norm.default gt.Scalar
    gt.Tensor hardsigmoid.default hardswish.default hardtanh.default hstack.default hypot.default im2col.default
    index.Tensor index_add.default index_copy.default index_fill.int_Scalar index_put.default index_select.default
    inner.default isfinite.default isin.Tensor_Tensor isinf.default isnan.default kron.default layer_norm.default
    le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor linalg_vector_norm.default linear.default
    linspace.default log.default log10.default log1p.default log2.default log_sigmoid.default log_softmax.int
    logaddexp.default logcumsumexp.default logical_and.default logical_not.default logical_or.default
    logical_xor.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
    masked_scatter.default matmul.default max.default max.dim max.other max_pool1d.default maximum.default
    mean.default mean.dim meshgrid.indexing min.default min.dim min.other minimum.default mish.default mm.default
    mul.Tensor mv.default nan_to_num.default ne.Scalar ne.Tensor neg.default new_full.default new_ones.default
    new_zeros.default one_hot.default ones.default ones_like.default outer.default pad.default permute.default
    polar.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default prod.default prod.dim_int
    reciprocal.default relu.default relu6.default remainder.Scalar remainder.Scalar_Tensor remainder.Tensor
    repeat.default repeat_interleave.self_int rms_norm.default roll.default rot90.default round.decimals round.default
    rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default scaled_dot_product_attention.default scatter.src
    scatter.value scatter_add.default scatter_reduce.two searchsorted.Tensor select.int select_scatter.default
    selu.default sgn.default sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor
    slice_scatter.default softmax.int softplus.default sort.default sort.stable special_expit.default
    special_logit.default split.Tensor split_with_sizes.default sqrt.default square.default squeeze.default
    squeeze.dim squeeze.dims stack.default std.correction std.dim std_mean.dim sub.Tensor sum.default sum.dim_IntList
    t.default take_along_dim.default tan.default tanh.default tensordot.default threshold.default tile.default
    topk.default transpose.int tril.default triu.default true_divide.Tensor trunc.default type_as.default unbind.int
    unfold.default unsqueeze.default upsample_nearest1d.vec var.correction var.dim var_mean.dim view.default
    view_as_complex.default view_as_real.default vstack.default where.ScalarOther where.ScalarSelf where.self
    xlogy.Tensor zero.default zeros.default zeros_like.default
    """.split()
)

# Before the clock, and before the operators see them, numbers are bounded such that no product of two can wrap around.
MOST_ELEMENTS = 2**31  # of a tensor, and of each of its dimensions
MOST_CALLS = 200_000  # of a program
MOST_TENSORS = 50_000  # of a program, and of one list of arguments

DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128".split()
CONSTANTS = {  # by their type in an operator's schema and their kind in JSON: what may be named
    ("ScalarType", "dtype"): DTYPES,
    ("Layout", "layout"): ("strided",),
    ("MemoryFormat", "memory_format"): ("contiguous_format", "preserve_format"),
}
WORDS = {  # that an argument of this name may be
    "approximate": ("none", "tanh"),
    "indexing": ("ij", "xy"),
    "mode": ("constant",),  # circular padding returns memory that nothing has written
    "norm": ("backward", "ortho", "forward"),
    "padding": ("same", "valid"),
    "reduce": ("sum", "prod", "mean", "amax", "amin"),
    "rounding_mode": ("trunc", "floor"),
}


def exam_batch(task, device):
    """Rows that a sealed model is shown at once: a power of two, by the memory that its float32 logits take."""
    rows = max(1, (2**23 if device == "cpu" else 2**27) // (task.seq_len * task.vocab_size))
    return math.gcd(1 << (rows.bit_length() - 1), task.eval_rows)


@functools.cache
def find_operator(name):
    """The aten operator called 'name.overload'; raises Refused for all that the list above does not hold."""
    import torch

    if name not in OPERATORS:
        raise Refused(f"operator {str(name)[:80]!r} is not allowed in the forward")
    packet, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, packet, None)
    if packet is None or overload not in packet.overloads():
        raise Refused(f"operator {name!r} does not exist in torch {torch.__version__}")
    return getattr(packet, overload)


def encode_argument(value, slots):
    """JSON form of one operator argument; tensors become the numbers of the slots that hold them."""
    import torch

    if isinstance(value, torch.fx.Node):
        return {"slot": slots[value]}
    if isinstance(value, (list, tuple)):
        return [encode_argument(item, slots) for item in value]
    if isinstance(value, torch.device):
        return {"device": True}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Refused(f"the forward uses a value that is not fixed at export ({value!r})")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands in the arguments of a call for the tensor that an earlier call left."""

    number: int


def fits(value, kind, name):
    """Whether a plain JSON `value` may be the argument `name`, whose type in the operator's schema is `kind`."""
    if kind == "bool":
        return type(value) is bool and not (value and name == "pin_memory")
    if kind == "int":
        return type(value) is int and (abs(value) <= MOST_ELEMENTS or (name == "end" and value == 2**63 - 1))
    if kind == "float":
        return type(value) is float or (type(value) is int and abs(value) <= 2**53)
    if kind == "number" or (kind == "Tensor" and name in ("other", "exponent")):  # x + 2 is a sum of two tensors
        return type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63)
    if name == "equation":
        return type(value) is str and len(value) < 200 and re.fullmatch(r"[A-Za-z.,> -]*", value)
    return kind == "str" and value in WORDS.get(name, ())


def decode_argument(value, kind, name, device):
    """Inverse of encode_argument, for hostile input: a constant, a Slot or a list of them.

    kind: the type of the argument `name` in its operator's schema. Raises Refused for what does not fit.
    """
    import torch

    if kind.startswith("Optional["):
        return None if value is None else decode_argument(value, kind[9:-1], name, device)
    if kind.startswith("List[") and type(value) is list and len(value) <= MOST_TENSORS:
        decoded = [decode_argument(item, kind[5:-1], name, device) for item in value]
        if kind != "List[int]" or math.prod(max(1, abs(size)) for size in decoded) <= MOST_ELEMENTS:
            return decoded
    elif type(value) is dict and len(value) == 1:
        ((key, content),) = value.items()
        if (kind, key) == ("Tensor", "slot") and type(content) is int:
            return Slot(content)
        if (kind, key) == ("Device", "device") and content is True:
            return torch.device(device)
        if content in CONSTANTS.get((kind, key), ()):
            return getattr(torch, content)
    elif fits(value, kind, name):
        return value
    raise Refused(f"the sealed program holds an argument of no known kind: {name}={str(value)[:80]}")


def seal(model, task):
    """Export the forward of `model` (int64 [B, T] -> logits [B, T, V]) as a program: a JSON value, see `build_forward`.

    Raises Refused for a forward that cannot be exported, or is not pure.
    """
    import torch

    device = next(model.parameters()).device
    batch = exam_batch(task, device.type)
    example = torch.zeros((batch, task.seq_len), dtype=torch.int64, device=device)
    was_training = model.training
    try:
        exported = torch.export.export(model.eval(), (example,)).run_decompositions({})
    except Exception as error:
        raise Refused(f"torch.export cannot capture the forward: {str(error).strip()[:2000]}") from None
    finally:
        model.train(was_training)
    signature = exported.graph_signature
    if len(signature.output_specs) != 1 or signature.output_specs[0].kind.name != "USER_OUTPUT":
        changed = [spec.target for spec in signature.output_specs if spec.target]
        raise Refused(f"the forward must return the logits alone and change nothing (it changes: {changed})")
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    slots = {node: number for number, node in enumerate(exported.graph.nodes)}
    tensors, calls, used = {}, [], set()
    for node in reversed(exported.graph.nodes):  # what the logits do not depend on is left out
        if node.op == "output":
            (output,) = node.args[0]
            used.add(output)
        elif node not in used:
            continue
        elif node.op == "placeholder":
            tensors[slots[node]] = specs[node.name].target  # None for the tokens
        else:
            if getattr(node.target, "__name__", "") == "getitem":
                name = "getitem"
            elif getattr(node.target, "namespace", "") == "aten":
                name = f"{node.target._schema.name[6:]}.{node.target._overloadname}"
                find_operator(name)
            else:
                raise Refused(f"{node.target} is not an aten operator (autocast? a custom or higher-order operator?)")
            kwargs = {key: encode_argument(value, slots) for key, value in node.kwargs.items()}
            calls.append([slots[node], name, encode_argument(node.args, slots), kwargs])
            used.update(node.all_input_nodes)
    program = {"device": device.type, "batch": batch, "tensors": tensors, "calls": calls[::-1], "output": slots[output]}
    return json.loads(json.dumps(program)), exported.constants


def check_attention(query, key, value, attn_mask=None, dropout_p=0.0, *rest, **options):
    """Refuse what the kernels of attention do not check or the exam does not want.

    A key shorter than its value is read beyond its end, where the targets may lie; dropout would be random.
    """
    if dropout_p or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise Refused("attention needs a key and a value of the same length, and no dropout")
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])[::-1]
        if attn_mask.ndim > len(full) or any(n not in (1, size) for n, size in zip(attn_mask.shape[::-1], full)):
            raise Refused(f"an attention mask of shape {[*attn_mask.shape]} does not fit {[*full[::-1]]}")


def check_search(sorted_sequence, self, out_int32=False, right=False, side=None, sorter=None):
    """Refuse a search through an order of its own: what its indices may be is for the kernels to check."""
    if sorter is not None:
        raise Refused("searchsorted with a sorter is not allowed in the forward")


def check_scale(input, output_size, scale_factors):
    """Refuse scales whose reciprocal is not a sane number: the kernels of interpolation index by it, unchecked."""
    if any(not 2**-10 <= factor <= 2**10 for factor in scale_factors or ()):
        raise Refused(f"interpolation by {scale_factors} is beyond a factor of 1024")


def check_count(count):
    """Refuse to make a tensor of more elements than one may have; `count` may be any number."""
    if not count <= MOST_ELEMENTS:
        raise Refused(f"a tensor of more than {MOST_ELEMENTS} elements is not allowed in the forward")


def check_range(start, end=None, step=1, **options):
    start, end = (0, start) if end is None else (start, end)
    check_count(abs((end - start) / step) if step else math.inf)


# Run before the operator, with its arguments. Sizes in lists and numbers in sizes are bounded already.
CHECKS = {
    "scaled_dot_product_attention.default": check_attention,
    "searchsorted.Tensor": check_search,
    "upsample_nearest1d.vec": check_scale,
    "arange.default": check_range,
    "arange.start": check_range,
    "arange.start_step": check_range,
    "eye.default": lambda n, **options: check_count(n * n),
}


def bind(call, device):
    """(slot, operator, check, args, kwargs) of one call of a program, with constants in place of their JSON form.

    operator is None for an item of a list of tensors. Raises Refused for what an operator may not be given.
    """
    slot, name, args, kwargs = call
    if type(slot) is not int or type(args) is not list or type(kwargs) is not dict:
        raise Refused(f"the sealed program holds a malformed call: {str(call)[:80]}")
    if name == "getitem":
        of, index = args
        if kwargs or type(index) is not int:
            raise Refused(f"the sealed program holds a malformed call: {str(call)[:80]}")
        return slot, None, None, [decode_argument(of, "Tensor", "input", device), index], {}
    operator = find_operator(name)
    kinds = {argument.name: str(argument.real_type) for argument in operator._schema.arguments}
    if len(args) > len(kinds) or not kwargs.keys() <= kinds.keys():
        raise Refused(f"{name} has no such arguments: {str(call)[:80]}")
    args = [decode_argument(value, kinds[key], key, device) for key, value in zip(kinds, args)]
    kwargs = {key: decode_argument(value, kinds[key], key, device) for key, value in kwargs.items()}
    return slot, operator, CHECKS.get(name), args, kwargs


def slots_in(value):
    """Numbers of the slots that a decoded argument, or a list of them, refers to."""
    if type(value) is list:
        return set().union(*map(slots_in, value))
    return {value.number} if type(value) is Slot else set()


def fill(value, slots):
    """A decoded argument with tensors in place of its slots."""
    if type(value) is list:
        return [fill(item, slots) for item in value]
    return slots[value.number] if type(value) is Slot else value


def check_results(results):
    """Refuse tensors of other dtypes, and those so large that a product of two sizes may wrap around."""
    for tensor in results if isinstance(results, (list, tuple)) else (results,):
        if str(tensor.dtype)[6:] not in DTYPES or max((tensor.numel(), *tensor.shape)) > MOST_ELEMENTS:
            raise Refused(f"the forward makes a tensor that is too large or strange: {tensor.dtype} {[*tensor.shape]}")
    return results


def build_forward(program, tensors):
    """forward(tokens) -> logits of a sealed program; raises Refused for a malformed one.

    program: {"device", "batch", "tensors": {slot: name, or None for the tokens}, "calls": [[slot, operator, args,
    kwargs]], "output": slot}. A call's result goes to its slot and leaves it after its last use.
    """
    if max(len(program["calls"]), len(program["tensors"])) > MOST_CALLS:
        raise Refused(f"the forward has more than {MOST_CALLS} operator calls")
    sources = {int(slot): name for slot, name in program["tensors"].items()}
    calls = [bind(call, program["device"]) for call in program["calls"]]
    filled, reads = set(sources), [slots_in([args, [*kwargs.values()]]) for *_, args, kwargs in calls]
    for (slot, *_), read in zip(calls, reads):
        if slot in filled or not read <= filled:
            raise Refused("the sealed program reads slots that nothing has filled, or fills one twice")
        filled.add(slot)
    if program["output"] not in filled:
        raise Refused("the sealed program has no output")
    free_after, seen = [], {program["output"]}
    for (slot, *_), read in zip(reversed(calls), reversed(reads)):
        free_after.append(({slot} | read) - seen)
        seen |= read
    check_results([*tensors.values()])

    def forward(tokens):
        slots = {slot: tokens if name is None else tensors[name] for slot, name in sources.items()}
        for (slot, operator, check, args, kwargs), free in zip(calls, reversed(free_after)):
            args, kwargs = fill(args, slots), {key: fill(value, slots) for key, value in kwargs.items()}
            if operator is None:
                slots[slot] = args[0][args[1]]
            else:
                if check:
                    check(*args, **kwargs)
                slots[slot] = check_results(operator(*args, **kwargs))
            del args, kwargs
            for unused in free:
                slots.pop(unused, None)
        return slots[program["output"]]

    return forward


def save_sealed(path, program, tensors):
    """Write program and tensors as one safetensors file."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"program": json.dumps(program)})


def compute_logits(forward, tokens, task):
    """float32 logits [B, T, V] of int64 tokens [B, T]; raises Refused unless they are finite, of that shape, and real.

    What is probed and what is scored has passed through here: rounding or infinities could hide a leak in between.
    """
    logits = forward(tokens.clone())
    expected = (*tokens.shape, task.vocab_size)
    if tuple(logits.shape) != expected or not logits.is_floating_point():
        raise Refused(f"the forward returned {logits.dtype} {tuple(logits.shape)}, not floating point {expected}")
    logits = logits.float()
    if not math.isfinite(logits.sum().item()):  # one sum sees every infinity and NaN
        raise Refused("the model's logits are not finite")
    return logits


def leak(forward, tokens, logits, task):
    """Largest change of the logits before a random cut per row when the tokens after it are replaced at random.

    A causal model gives 0. tokens: int64 [B, T]; logits: their float32 [B, T, V]. Cuts and replacements are drawn from
    the system's entropy, which no submission can foresee.
    """
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
    rows, length = tokens.shape
    cuts = torch.randint(1, length, (rows, 1), generator=generator)
    replaced = torch.randint(0, task.vocab_size, (rows, length), generator=generator)
    before = (torch.arange(length)[None] < cuts).to(tokens.device)
    changed = compute_logits(forward, torch.where(before, tokens, replaced.to(tokens.device)), task)
    return torch.where(before, (changed - logits).abs().amax(-1), 0.0).max().item()


LEAK_TOLERANCE = 1e-4  # a leak this faint cannot move a score by as much as the seed does


def try_forward(program, tensors, parameters, task):
    """Refuse, before the clock starts, a sealed model with wrong shapes or that looks ahead.

    Parameters are shifted at random first: a fresh model whose output projections are zero hides what it will do.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    device = torch.device(program["device"])
    tensors = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor)
        if name in parameters and tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    tokens = torch.randint(0, task.vocab_size, (program["batch"], task.seq_len), generator=generator).to(device)
    with torch.inference_mode():
        forward = build_forward(program, tensors)
        logits = compute_logits(forward, tokens, task)
        moved = max(leak(forward, tokens, logits, task) for _ in range(4))
    if not moved <= LEAK_TOLERANCE:
        raise Refused(
            f"the model is not causal: tokens that come later moved earlier logits by {moved:.2g}; "
            "position t may see the tokens 0..t of its own row and no others"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What train.py calls


def begin(model):
    """Seal the forward of `model`, start the clock, and return the Run that hands out the training data.

    model(tokens) maps int64 [B, T] to floating-point logits [B, T, V]. A model that cannot be examined is refused here,
    with the reason, and the program ends. Give the plain module, not a compiled wrapper of it.
    """
    import torch

    model = getattr(model, "_orig_mod", model)
    channel = socket.socket(fileno=TOLD["fd"]) if "fd" in TOLD else None
    home = Path.cwd() if channel else Path(tempfile.mkdtemp(prefix="autoresearch-"))
    try:
        program, constants = seal(model, TASK)
        run = Run(program, constants, home / "model.safetensors", channel)
        tensors = run._tensors(model)
        try_forward(program, tensors, dict(model.named_parameters(remove_duplicate=False)), TASK)
        # A first save shows that the model can be saved, and how many seconds of the budget the last one will need.
        if program["device"] != "cpu":
            torch.accelerator.synchronize()
        started = time.monotonic()
        save_sealed(run._path, program, tensors)
        run._reserve = 1.5 * (time.monotonic() - started)
    except Refused as refusal:
        if channel:
            channel.sendall(json.dumps({"refused": str(refusal)}).encode() + b"\n")
        raise SystemExit(f"begin() refused the model: {refusal}") from None
    run._start(sum(parameter.numel() for parameter in model.parameters()))
    return run


class Run:
    """One training run, from begin() to submit()."""

    def __init__(self, program, constants, path, channel):
        self._program, self._constants, self._path, self._channel = program, constants, path, channel
        self._reserve, self._tokens, self._steps = 0.0, 0, 0

    def _tensors(self, model):
        """The tensors that the sealed program names, as they are now in `model`."""
        model = getattr(model, "_orig_mod", model)
        now = self._constants | dict(model.named_buffers(remove_duplicate=False))
        now |= dict(model.named_parameters(remove_duplicate=False))
        return {name: now[name] for name in self._program["tensors"].values() if name is not None}

    def _start(self, params):
        self._params = params
        if self._channel:
            self._channel.sendall(json.dumps({"begin": params}).encode() + b"\n")
            _, (descriptor,), _, _ = socket.recv_fds(self._channel, 1, 1)
            file = os.fdopen(descriptor, "rb")
        else:
            try:
                from exam.fingerprints import verify

                file = open(verify(TASK) / "train.bin", "rb")
            except Trouble as trouble:
                print(f"train.py: {trouble}", file=sys.stderr)
                raise SystemExit(2) from None
        self._rows = np.memmap(file, dtype=np.uint16, mode="r").reshape(-1, TASK.seq_len + 1)
        self._started = time.monotonic()

    @property
    def seconds(self):
        """Seconds since begin()."""
        return time.monotonic() - self._started

    @property
    def progress(self):
        """Share of the usable budget that has passed; submit at 1. The time that saving takes is already set aside."""
        return self.seconds / max(TASK.time_budget - self._reserve, 1e-9)

    @property
    def epoch_tokens(self):
        """Tokens of the training text: those of one epoch."""
        return len(self._rows) * TASK.seq_len

    def batches(self, batch_size):
        """Yield (x, y) without end, int64 [batch_size, T] on the model's device; y is x one token later.

        Every epoch visits the training rows in an order of its own, drawn from the run's seed.
        """
        import torch

        device = self._program["device"]
        order, epoch = np.empty(0, dtype=np.int64), 0
        while True:
            while len(order) < batch_size:
                shuffled = np.random.default_rng((SEED, epoch)).permutation(len(self._rows))
                order, epoch = np.concatenate((order, shuffled)), epoch + 1
            chosen, order = order[:batch_size], order[batch_size:]
            rows = torch.from_numpy(self._rows[chosen].astype(np.int64))
            if device in ("cuda", "xpu"):
                rows = rows.pin_memory().to(device, non_blocking=True)
            rows = rows.to(device)
            self._tokens += batch_size * TASK.seq_len
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def log(self, **values):
        """Report numbers (step=, loss=, ...) for display and curves. Cheap; reports may be dropped under load."""
        self._steps = int(values.get("step", self._steps))
        if self._channel:
            values = {name: float(value) for name, value in values.items()}
            with contextlib.suppress(BlockingIOError):
                self._channel.send(json.dumps({"log": values}).encode() + b"\n", socket.MSG_DONTWAIT)

    def submit(self, model):
        """Save the sealed forward with the weights of `model` and hand it in: the last call of a run.

        In a trial the clock stops here and the process is ended; by hand the exam follows and its summary is printed.
        """
        import torch

        save_sealed(self._path, self._program, self._tensors(model))
        seconds, report = self.seconds, {"steps": self._steps, "tokens": self._tokens, "params": self._params}
        if self._program["device"] != "cpu":
            report["peak_vram_mb"] = torch.accelerator.max_memory_allocated() / 2**20
        if self._channel:
            self._channel.sendall(json.dumps({"submit": report}).encode() + b"\n")
            while self._channel.recv(1):  # the proctor ends this process; nothing after this line counts
                pass
            raise SystemExit(0)
        if self._program["device"] != "cpu":
            torch.accelerator.empty_cache()  # the exam needs room beside what this process still holds
        from exam.trial import score_by_hand

        score_by_hand(self._path, TASK, {"training_seconds": seconds, **report})


if __name__ == "__main__":
    from exam import desk

    sys.exit(desk.main())

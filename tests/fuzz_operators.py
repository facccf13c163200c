"""Hostile calls of every operator that a sealed model may use, in throw-away processes.

    python tests/fuzz_operators.py --calls 200000 --seconds 600

Each call starts from one that an honest model of the zoo makes, and has its shapes, strides, dtypes, values and
constants changed. It is made twice, in two processes that differ in what surrounds the inputs in memory and in what
the allocator hands out. A finding is a crash, or a result that differs: it has read memory that it was not given.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import json
import math
import os
import random
import resource
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import zoo  # noqa: E402

import prepare  # noqa: E402
from exam.reader import MODEL_FAULTS  # noqa: E402

BATCH = 100  # calls per pair of processes
MARGIN = 8192  # poisoned bytes before and after each input
MEMORY = 2**31  # bytes that a process may take beyond what it starts with
SECONDS = 2  # for one call
DIGESTED = 2**20  # elements of a result that are compared
SIZES = (0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 64, 129)
NUMBERS = (
    0,
    1,
    -1,
    2,
    -2,
    3,
    7,
    31,
    32,
    33,
    -33,
    300,
    1024,
    2**20,
    2**31 - 1,
    2**31,
    -(2**31),
    2**62,
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf)
STRINGS = (
    "circular",
    "reflect",
    "replicate",
    "constant",
    "same",
    "valid",
    "ij",
    "sum",
    "mean",
    "tanh",
    "floor",
    "cpu",
    "ij,jk->ik",
    "ii->i",
    "...->",
    "",
)
DTYPES = (*prepare.DTYPES, "complex32", "float8_e4m3fn", "quint8", "uint16", "bits8")
LAYOUTS = "contiguous transposed stepped expanded repeated overlapping negative conjugate".split()


# ---- Where calls start from: (name, args, kwargs, inputs), as JSON; an input is {shape, dtype, layout, values}


def seeds_of(program, tensors, tokens):
    """The calls of a sealed program with its tensors described."""
    slots = {int(slot): tokens if name is None else tensors[name] for slot, name in program["tensors"].items()}
    for call in program["calls"]:
        slot, operator, _, args, kwargs = prepare.bind(call, "cpu")
        filled = prepare.fill(args, slots), {key: prepare.fill(value, slots) for key, value in kwargs.items()}
        if operator is None:
            slots[slot] = filled[0][0][filled[0][1]]
            continue
        numbers = {number: i for i, number in enumerate(sorted(prepare.slots_in([args, [*kwargs.values()]])))}
        inputs = []
        for number in numbers:
            tensor = slots[number]
            dtype = str(tensor.dtype).removeprefix("torch.")
            inputs.append({"shape": [*tensor.shape], "dtype": dtype, "layout": "contiguous", "values": "small"})
        yield call[1], renumber(call[2], numbers), renumber(call[3], numbers), inputs
        slots[slot] = operator(*filled[0], **filled[1])


def renumber(value, numbers):
    if isinstance(value, list):
        return [renumber(item, numbers) for item in value]
    if isinstance(value, dict):
        return {k: numbers[v] if k == "slot" else renumber(v, numbers) for k, v in value.items()}
    return value


def choose(sealed, tokens, most=8):
    """{operator: distinct calls of it} in sealed models [(program, tensors)]."""
    calls = collections.defaultdict(dict)
    for program, tensors in sealed:
        with torch.inference_mode():
            for seed in seeds_of(program, tensors, tokens):
                if len(calls[seed[0]]) < most:
                    calls[seed[0]][json.dumps(seed)] = seed
    return {name: [*seeds.values()] for name, seeds in calls.items()}


def corpus():
    """The calls of the models of the zoo, sealed for two rows."""
    prepare.exam_batch = lambda task, device: 2
    task = prepare.Task("zoo", "zoo", zoo.LENGTH, zoo.VOCABULARY, 2, 1.0, split_long=True)
    sealed = []
    for make in zoo.ZOO.values():
        model = make()
        program, constants = prepare.seal(model, task)
        sealed.append((program, {**model.state_dict(), **constants}))
    return choose(sealed, torch.zeros(2, zoo.LENGTH, dtype=torch.int64))


# ---- How calls become hostile


def mutate(seed, rng):
    """A copy of a call with a few things changed."""
    call = copy.deepcopy(list(seed))
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        rng.choice((resize, reshape, retype, relayout, revalue, replace, replace, give))(call, rng)
    return call


def resize(call, rng):
    """One size becomes another wherever it occurs, so that the call may still be valid."""
    sizes = [size for one in call[3] for size in one["shape"]]
    if not sizes:
        return
    old, new = rng.choice(sizes), rng.choice(SIZES)

    def change(value):
        if isinstance(value, list):
            return [change(item) for item in value]
        return new if type(value) is int and value == old else value

    for one in call[3]:
        one["shape"] = change(one["shape"])
    call[1] = [change(value) if isinstance(value, list) else value for value in call[1]]


def reshape(call, rng):
    """The shape of one input changes: a size, the number of dimensions, or their order."""
    if call[3]:
        shape = rng.choice(call[3])["shape"]
        kind = rng.randrange(4)
        if kind == 0 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((*SIZES, 2**16, 2**31, 2**40))
        elif kind == 1 and shape:
            shape.pop(rng.randrange(len(shape)))
        elif kind == 2:
            shape.insert(rng.randint(0, len(shape)), rng.choice(SIZES))
        else:
            rng.shuffle(shape)


def retype(call, rng):
    dtype = rng.choice(DTYPES)
    for one in call[3] if rng.random() < 0.5 else rng.sample(call[3], min(1, len(call[3]))):
        one["dtype"] = dtype


def relayout(call, rng):
    for one in rng.sample(call[3], min(1, len(call[3]))):
        one["layout"] = rng.choice(LAYOUTS)


def revalue(call, rng):
    for one in rng.sample(call[3], min(1, len(call[3]))):
        one["values"] = rng.choice(("small", "large", "hostile"))


def other(value, rng):
    """Something else in place of a JSON constant."""
    if isinstance(value, list):
        value, kind = list(value), rng.randrange(5)
        if kind == 0:
            value.append(rng.choice(value or NUMBERS))
        elif kind == 1 and value:
            value.pop(rng.randrange(len(value)))
        elif value:
            index = rng.randrange(len(value))
            value[index] = rng.choice(value) if kind == 2 else other(value[index], rng)
        return value
    if isinstance(value, dict):
        (kind,) = value
        if kind == "dtype":
            return {"dtype": rng.choice(DTYPES)}
        if kind == "slot":
            return {"slot": rng.randrange(value["slot"] + 1)}
        return rng.choice((value, "cpu", {"layout": "sparse_coo"}, {"memory_format": "channels_last"}))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*NUMBERS, value + 1, value - 1, rng.randint(-70, 70), rng.choice(FLOATS)))
    if isinstance(value, float):
        return rng.choice((*FLOATS, rng.uniform(-9, 9), rng.choice(NUMBERS)))
    if isinstance(value, str):
        return rng.choice(STRINGS)
    return rng.choice((None, True, rng.choice(NUMBERS), rng.choice(FLOATS), rng.choice(STRINGS), []))


def replace(call, rng):
    """One argument becomes another."""
    places = [(call[1], i) for i in range(len(call[1]))] + [(call[2], key) for key in call[2]]
    if places:
        holder, key = rng.choice(places)
        holder[key] = other(holder[key], rng)


def give(call, rng):
    """An argument that the call has left at its default is given."""
    schema = prepare.find_operator(call[0])._schema
    for argument in rng.sample(schema.arguments[len(call[1]) :], min(1, len(schema.arguments) - len(call[1]))):
        kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        choices = {
            "bool": (True, False),
            "int": NUMBERS,
            "float": FLOATS,
            "number": (*NUMBERS, *FLOATS),
            "ScalarType": [{"dtype": dtype} for dtype in DTYPES],
            "MemoryFormat": [{"memory_format": name} for name in ("contiguous_format", "channels_last")],
            "Layout": [{"layout": name} for name in ("strided", "sparse_coo")],
            "Device": ({"device": True}, "cpu"),
            "str": STRINGS,
            "Tensor": [{"slot": i} for i in range(len(call[3]))],
        }
        if kind.startswith("List["):
            item = choices[kind[5:]] if kind[5:] in choices else [None]
            call[2][argument.name] = [rng.choice(item) for _ in range(rng.randrange(4))] if item else []
        elif choices.get(kind):
            call[2][argument.name] = rng.choice(choices[kind])


# ---- One call


def strides_of(shape, layout):
    """Strides in elements, and how many elements lie between the first and the last of them."""
    strides, step = [], 2 if layout == "stepped" else 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(1, size)
    if layout == "transposed" and len(shape) > 1:
        order = [*shape[:-2], shape[-1], shape[-2]]
        strides = strides_of(order, "contiguous")[0]
        strides[-2:] = strides[:-3:-1]
    if layout == "overlapping":
        strides = [1] * len(shape)
    if layout == "repeated" and shape:
        strides[-1] = 0
    if layout == "expanded" or math.prod(max(1, size) for size in shape) > DIGESTED:
        # Packed anew: beside a giant size that repeats one element, the others take no more memory than they need.
        strides, step = [], 1
        for i, size in reversed([*enumerate(shape)]):
            repeats = size > 64 or i % 2 == 0
            strides.insert(0, 0 if repeats else step)
            step *= 1 if repeats else max(1, size)
    return strides, sum((max(1, size) - 1) * stride for size, stride in zip(shape, strides)) + 1


def values_for(dtype, count, kind, seed):
    """`count` values of a torch dtype, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(count, generator=generator, dtype=torch.float64)
        if kind == "large":
            values = values * 1e4
        if kind == "hostile":
            values = torch.tensor(FLOATS, dtype=torch.float64)[
                torch.randint(len(FLOATS), (count,), generator=generator)
            ]
        return torch.complex(values, values.flip(0)).to(dtype) if dtype.is_complex else values.to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, (count,), generator=generator).bool()
    high = {"small": 2, "large": 64}.get(kind, 2)
    values = torch.randint(high, (count,), generator=generator)
    if kind == "hostile":
        values = torch.tensor(NUMBERS)[torch.randint(len(NUMBERS), (count,), generator=generator)]
    return values.to(dtype)


def make_input(one, seed, poison):
    """A tensor amid bytes of `poison`; None where torch cannot make it."""
    dtype = getattr(torch, one["dtype"])
    strides, extent = strides_of(one["shape"], one["layout"])
    size = dtype.itemsize
    room = torch.full((2 * MARGIN + extent * size,), poison, dtype=torch.uint8)
    flat = room[MARGIN : MARGIN + extent * size].view(dtype)
    tensor = torch.as_strided(flat, one["shape"], strides, flat.storage_offset())
    if tensor.numel():
        # Only the elements of the input are written: what lies between them stays poison.
        written = torch.full((extent,), tensor.numel() > DIGESTED)
        if tensor.numel() <= DIGESTED:
            written[torch.as_strided(torch.arange(extent), one["shape"], strides).flatten()] = True
        flat[written] = values_for(dtype, extent, one["values"], seed)[written]
    if one["layout"] == "negative":
        return torch._neg_view(tensor)
    return tensor.conj() if one["layout"] == "conjugate" else tensor


def digest(result):
    """What two processes compare: dtype, shape and bytes of every tensor of a result."""
    if isinstance(result, (list, tuple)):
        return [digest(item) for item in result[:64]]
    told = [str(result.dtype), [*result.shape]]
    if result.numel() <= DIGESTED:
        plain = result.resolve_conj().resolve_neg().contiguous().flatten()
        if plain.is_complex():
            plain = torch.view_as_real(plain)
        # One NaN is as good as another.
        plain = plain.nan_to_num(nan=1.234e5) if plain.is_floating_point() and plain.isnan().any() else plain
        told.append(zlib.crc32(plain.contiguous().view(torch.uint8).numpy().tobytes()) if plain.numel() else 0)
    return told


def run_call(call, seed, poison):
    """(what became of a call, its digest): "accepted", "refused by torch" or "refused by us"."""
    name, args, kwargs, inputs = call
    try:
        tensors = {str(i): make_input(one, seed + i, poison) for i, one in enumerate(inputs)}
    except (RuntimeError, TypeError, NotImplementedError):
        if {one["dtype"] for one in inputs} <= set(prepare.DTYPES):
            raise  # a fault of this script: only some of the other dtypes cannot be filled
        return "impossible", None
    program = {"device": "cpu", "calls": [[len(inputs), name, args, kwargs]], "output": len(inputs)}
    program["tensors"] = {name: name for name in tensors}
    try:
        forward = prepare.build_forward(program, tensors)
        with torch.inference_mode():
            return "accepted", digest(forward(None))
    except prepare.Refused:
        return "refused by us", None
    except MODEL_FAULTS:
        return "refused by torch", None


# ---- Many calls


def child(calls, first, side, pipe):
    """Make the calls from `first` on; tell of each before and after."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with contextlib.suppress(OSError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1 + calls[0][0] % 2)  # some kernels go other ways where they share the work
    ctypes.CDLL(None).mallopt(-6, (0x15, 0xEA)[side])  # M_PERTURB: fill what is handed out and what is given back
    for index in range(first, len(calls)):
        os.write(pipe, f"{index}\n".encode())
        signal.alarm(SECONDS)
        seed, call = calls[index]
        outcome = run_call(call, seed, (0x3C, 0x47)[side])
        signal.alarm(0)
        os.write(pipe, json.dumps([index, *outcome]).encode() + b"\n")


def run_side(calls, side):
    """Generator that forks, yields, and returns {index: (outcome, digest)}; a process that dies is followed by one."""
    outcomes, first = {}, 0
    while first < len(calls):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                child(calls, first, side, write)
            finally:
                os._exit(0)
        os.close(write)
        yield
        with os.fdopen(read, "rb") as file:
            lines = file.read().splitlines()
        _, status = os.waitpid(pid, 0)
        for line in lines:
            told = json.loads(line)
            if isinstance(told, list):
                outcomes[told[0]] = (told[1], told[2])
            else:
                first = told
        if first not in outcomes:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            outcomes[first] = ("too slow" if number == signal.SIGALRM else f"killed by signal {number}", None)
        first += 1
    return outcomes


def run_batch(calls):
    """Outcomes of both sides, which run at the same time."""
    sides, outcomes = [run_side(calls, side) for side in (0, 1)], {}
    waiting = list(enumerate(sides))
    while waiting:
        for number, side in list(waiting):
            try:
                next(side)
            except StopIteration as stopped:
                outcomes[number] = stopped.value
                waiting.remove((number, side))
    return outcomes[0], outcomes[1]


def judge(calls):
    """[(what became of it, the call)] of calls [(seed, call)]; findings are "crash" and "difference"."""
    first, second = run_batch(calls)
    judged = []
    for index, (_, call) in enumerate(calls):
        outcomes = {first[index][0], second[index][0]}
        if any("signal" in outcome for outcome in outcomes):
            judged.append(("crash", call))
        elif "too slow" in outcomes:
            judged.append(("too slow", call))
        else:
            judged.append(("difference" if first[index] != second[index] else first[index][0], call))
    return judged


def fuzz(seeds, calls, seconds, seed=0):
    """Counts of what became of the calls, by operator and outcome; findings are printed as they come."""
    rng, started, counts, names, done = random.Random(seed), time.monotonic(), collections.Counter(), sorted(seeds), 0
    while done < calls and time.monotonic() - started < seconds:
        batch = []
        for i in range(done, min(done + BATCH, calls)):
            batch.append((rng.randrange(2**31), mutate(rng.choice(seeds[names[i % len(names)]]), rng)))
        done += len(batch)
        for (number, _), (outcome, call) in zip(batch, judge(batch)):
            counts[call[0], outcome] += 1
            if outcome in ("crash", "difference"):
                print(json.dumps([outcome, number, call]), flush=True)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="where the calls of the zoo are kept, once made")
    parser.add_argument("--only", nargs="*", help="these operators alone")
    options = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # small blocks would come back from a cache that is not filled
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.corpus and options.corpus.exists():
        seeds = json.loads(options.corpus.read_text())
    else:
        seeds = corpus()
        if options.corpus:
            options.corpus.write_text(json.dumps(seeds))
    if options.only:
        seeds = {name: seeds[name] for name in options.only}
    counts, total = fuzz(seeds, options.calls, options.seconds, options.seed), collections.Counter()
    for (_, outcome), count in counts.items():
        total[outcome] += count
    findings = total["crash"] + total["difference"]
    never = sorted(name for name in seeds if not counts[name, "accepted"])
    print(json.dumps({"calls": sum(total.values()), **total, "findings": findings, "never accepted": never}))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())

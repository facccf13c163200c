"""prepare.py - the exam board: the task, its data, the clock and the score.

train.py is written by a machine that is rewarded for a low number, so everything that decides the number lives here,
on the other side of a process boundary:

  python prepare.py [--task NAME]               fetch the text, train the tokenizer, pack the rows (once)
  python prepare.py trial TRAIN_PY --out DIR    one experiment under sandbox and clock; writes DIR/result.json

The file reads in the order of the story: the task, its text, the rows, what train.py may call, the sealed model, the
sandbox, the trial, the exam. train.py uses four names of it: TASK, SEED, machine_flops and begin.
"""

import argparse
import base64
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# The task: what is learned, and within which limits


class Trouble(Exception):
    """A foreseeable mistake or fault, told to the user in one sentence. The programs end with exit code 2."""


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

    @property
    def eval_rows(self):
        return self.eval_tokens // self.seq_len

    @property
    def grace(self):
        """Seconds by which a submission may be late."""
        return 3.0 + 0.01 * self.time_budget

    @property
    def startup_limit(self):
        """Seconds that imports, building, compiling and warm-up may take before begin()."""
        return min(180.0, 30.0 + self.time_budget)

    @property
    def exam_limit(self):
        """Seconds that scoring may take."""
        return 60.0 + 2 * self.time_budget


TASKS = {
    task.name: task
    for task in (
        Task("pycode", "pycode", 256, 2048, 2**17, 300.0, split_long=True),
        Task("demo", "pycode", 256, 2048, 2**17, 20.0, split_long=True),
    )
}


def get_task(name=None, budget=None):
    """Task `name` (default: AUTORESEARCH_TASK, else pycode) with its budget replaced by `budget` seconds if given."""
    name = name or os.environ.get("AUTORESEARCH_TASK") or "pycode"
    if name not in TASKS:
        raise Trouble(f"there is no task {name!r}; the tasks are: {', '.join(TASKS)}")
    task = TASKS[name]
    if budget is not None and not 0 < budget < 1e6:
        raise Trouble(f"a budget of {budget} seconds makes no sense; give a positive number of seconds")
    return dataclasses.replace(task, time_budget=float(budget)) if budget else task


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
# The text: one function per source, each yielding (text, held_out) in a fixed order


def pycode_folders():
    """Folders whose Python files make up pycode: the standard library and four packages that are always there."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for package in ("torch", "numpy", "sympy", "networkx"):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise Trouble(f"the package {package} is not installed: run pip install -e .")
        folders.append(Path(spec.submodule_search_locations[0]))
    return [folder.resolve() for folder in folders]


def python_files():
    """Yield (path, hidden) of pycode's files; hidden: it lies in a folder of tests, which no running program imports.

    Validation text comes from hidden files alone, so that the sandbox can close their folders.
    """
    for root in pycode_folders():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts[:-1]
            if "site-packages" not in parts and path.is_file():
                yield path, "test" in parts or "tests" in parts


def hidden_folders():
    """The folders of pycode's hidden files."""
    return sorted({str(path.parent) for path, hidden in python_files() if hidden})


def pycode_documents():
    """Yield (text, held_out) for each distinct Python file, ordered by the hash of its content.

    Validation files are a tenth, chosen by that hash, of the hidden ones.
    """
    found = {}
    for path, hidden in python_files():
        content = path.read_bytes()
        if len(content) >= 128:
            found.setdefault(hashlib.sha256(content).digest(), (hidden, content))
    for digest, (hidden, content) in sorted(found.items()):
        with contextlib.suppress(UnicodeDecodeError):
            yield content.decode("utf-8"), hidden and digest[-1] % 10 == 0


SOURCES = {"pycode": pycode_documents}

# ---------------------------------------------------------------------------------------------------------------------
# The rows: tokenizer and packing

# GPT-4's pre-tokenisation with numbers in groups of at most two digits, which suits small vocabularies (nanochat).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def train_tokenizer(texts, vocab_size):
    """Byte-pair encoding of `texts` with `vocab_size - 1` tokens, as a list of token bytes in rank order (rustbpe)."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, _ in sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])]
    if len(tokens) != vocab_size - 1:
        raise Trouble(f"the text is too small for a vocabulary of {vocab_size} tokens (it gave {len(tokens) + 1})")
    return tokens


def build_encoding(tokens):
    """tiktoken Encoding of the token bytes, with BOS as the last token."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(tokens)}
    )


def load_tokens(folder):
    """Token bytes in rank order, as `prepare` wrote them: one base64 token a line."""
    return [base64.b64decode(line) for line in (Path(folder) / "tokenizer.txt").read_bytes().splitlines()]


def token_bytes(tokens):
    """UTF-8 bytes that each token stands for, int64 [vocab_size]; BOS stands for none."""
    return np.array([len(token) for token in tokens] + [0], dtype=np.int64)


def tokenise(texts, encoding, task):
    """Yield uint16 arrays that start with BOS: one per text, or one per row's worth of it where the task splits."""
    bos = encoding.n_vocab - 1
    encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = iter(texts)
        while batch := [text for _, text in zip(range(256), texts)]:
            for ids in pool.map(encode, batch):
                length = task.seq_len if task.split_long else max(1, len(ids))
                for start in range(0, len(ids), length):
                    yield np.concatenate(([bos], ids[start : start + length])).astype(np.uint16)


def pack(documents, row_len, buffer_size=1000):
    """Best-fit packing: yield (row, dropped), a uint16 array [row_len] and the number of tokens cropped for it.

    A row takes, again and again, the largest of the `buffer_size` waiting documents that still fits whole; where none
    fits, the shortest is cropped to fill the row. Ties go to the document that came first. Tokens of a last row that
    stays unfilled are not yielded. Scheme: nanochat's BOS-aligned best-fit loader; found by bisection on the lengths.
    """
    documents = iter(documents)
    waiting, lengths, count = {}, [], 0  # documents by length, first come first; the sorted lengths; their number
    while True:
        row, room, dropped = [], row_len, 0
        while room:
            while count < buffer_size and (document := next(documents, None)) is not None:
                if len(document) not in waiting:
                    waiting[len(document)] = deque()
                    bisect.insort(lengths, len(document))
                waiting[len(document)].append(document)
                count += 1
            if not count:
                return
            place = max(0, bisect.bisect_right(lengths, room) - 1)  # place 0 holds the shortest, which may not fit
            length = lengths[place]
            document = waiting[length].popleft()
            count -= 1
            if not waiting[length]:
                del waiting[length], lengths[place]
            row.append(document[:room])
            dropped += max(0, length - room)
            room -= min(length, room)
        yield np.concatenate(row), dropped


# ---------------------------------------------------------------------------------------------------------------------
# Preparing: build the data once, fingerprint it, verify it ever after


def cache_root():
    """Folder of everything prepared: AUTORESEARCH_CACHE, else ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").resolve()


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path, text):
    """Write a small text file so that readers, and a power cut, see either the old content or the new."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def cache_lock(name):
    """Hold the lock `name` of the cache; say so when another process holds it, and wait."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(root / f"{name}.lock", "w")
    except OSError as error:
        raise Trouble(f"cannot write to {root} ({error.strerror}); AUTORESEARCH_CACHE chooses another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {name}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield root


def write_rows(path, texts, encoding, task, limit=None):
    """Tokenise, pack and write rows as uint16 [rows, seq_len + 1], at most `limit`; returns what was counted."""
    rows = dropped = 0
    with open(path, "wb") as file:
        for row, lost in pack(tokenise(texts, encoding, task), task.seq_len + 1):
            file.write(row.tobytes())
            rows, dropped = rows + 1, dropped + lost
            if rows == limit:
                break
    return {"rows": rows, "tokens": rows * (task.seq_len + 1), "cropped_tokens": dropped}


def build(task, documents, folder):
    """Write tokenizer, rows and fingerprints of `documents`, an iterable of (text, held_out), into `folder`.

    Files: tokenizer.txt, train.bin and val.bin (uint16 [rows, seq_len + 1]), meta.json. Raises Trouble where the text
    is too small for the task.
    """
    from rich.progress import track

    started = time.monotonic()
    train, held_out = [], []
    for text, is_held_out in documents:
        # Half of a broken surrogate pair has no UTF-8 form; it becomes U+FFFD before anything is counted.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        (held_out if is_held_out else train).append(text)
    print(f"text: {len(train):,} documents, {sum(map(len, train)) / 1e6:.1f} M characters, {len(held_out):,} held out")
    print(f"tokenizer: training {task.vocab_size:,} tokens", flush=True)
    tokens = train_tokenizer(train, task.vocab_size)
    (folder / "tokenizer.txt").write_bytes(b"".join(base64.b64encode(token) + b"\n" for token in tokens))
    encoding = build_encoding(tokens)
    counts = {"train": write_rows(folder / "train.bin", track(train, "tokenising, packing"), encoding, task)}
    counts["val"] = write_rows(folder / "val.bin", held_out, encoding, task, task.eval_rows)
    if counts["val"]["rows"] < task.eval_rows or not counts["train"]["rows"]:
        raise Trouble(
            f"the text is too small: it gives {counts['train']['rows']:,} training rows and "
            f"{counts['val']['rows']:,} of the {task.eval_rows:,} validation rows that {task.name} scores"
        )
    meta = {
        "dataset": task.dataset,
        "seq_len": task.seq_len,
        "vocab_size": task.vocab_size,
        **counts,
        "tokenizer_sha256": sha256(folder / "tokenizer.txt"),
        "train_sha256": sha256(folder / "train.bin"),
        "val_sha256": sha256(folder / "val.bin"),
        "hidden_folders": hidden_folders() if task.dataset == "pycode" else [],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    seconds = time.monotonic() - started
    print(
        f"rows: {counts['train']['rows']:,} for training ({counts['train']['tokens'] / 1e6:.1f} M tokens, "
        f"{counts['train']['cropped_tokens']:,} cropped), {counts['val']['rows']:,} for validation; {seconds:.0f} s"
    )


def prepare(task):
    """Build the task's data if it is not there yet and return its verified folder. Safe to interrupt and to repeat."""
    with cache_lock(task.dataset) as root:
        folder = root / task.dataset
        if not (folder / "meta.json").exists():
            for leftover in root.glob(f"{task.dataset}.*.tmp"):
                shutil.rmtree(leftover)
            temporary = Path(tempfile.mkdtemp(prefix=f"{task.dataset}.", suffix=".tmp", dir=root))
            try:
                build(task, SOURCES[task.dataset](), temporary)
                temporary.rename(folder)
            except OSError as error:
                raise Trouble(f"cannot write the data to {root}: {error.strerror}") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return verify(task)


def verify(task):
    """The task's data folder, after checking that it is complete and unchanged; raises Trouble if it is not.

    The large train.bin is checked by its size alone; a change there could not fake a score.
    """
    folder = cache_root() / task.dataset
    again = f"delete {folder} and run: python prepare.py --task {task.name}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if (meta["seq_len"], meta["vocab_size"]) != (task.seq_len, task.vocab_size):
            raise Trouble(f"the data in {folder} was made for another task; {again}")
        for part in ("train", "val"):
            if (folder / f"{part}.bin").stat().st_size != meta[part]["rows"] * (task.seq_len + 1) * 2:
                raise Trouble(f"{folder}/{part}.bin is truncated or damaged; {again}")
        for file, key in (("tokenizer.txt", "tokenizer_sha256"), ("val.bin", "val_sha256")):
            if sha256(folder / file) != meta[key]:
                raise Trouble(f"{folder}/{file} has changed since it was prepared (its SHA-256 differs); {again}")
    except FileNotFoundError as error:
        missing = error.filename if (folder / "meta.json").exists() else f"data for {task.name}"
        raise Trouble(f"missing: {missing}; run: python prepare.py --task {task.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Trouble(f"{folder} cannot be read ({error}); {again}") from None
    return folder


def machine_flops():
    """Dense bf16 matrix-multiply rate of this machine's GPU, else CPU, in FLOP/s: measured once, then remembered."""
    if "flops" in TOLD:
        return TOLD["flops"]
    with cache_lock("hardware") as root:
        path, name = root / "hardware.json", platform.node()
        known = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            known = json.loads(path.read_text())
        if name not in known:
            print("measuring the matrix-multiply rate of this machine", flush=True)
            known[name] = measure_flops()
            write_atomically(path, json.dumps(known, indent=1) + "\n")
        return known[name]["flops"]


def measure_flops():
    """{device, flops}: the best of many timed products of square bf16 matrices."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best, end = math.inf, time.monotonic() + 1.5
    while time.monotonic() < end:
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 5)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "flops": 2 * size**3 / best}


# ---------------------------------------------------------------------------------------------------------------------
# The sealed model: the forward as a list of pure operator calls, and nothing else
#
# A submission is one safetensors file: the weights, and in its header a JSON program whose every step calls one
# operator of the list below. Neither can carry code, so there is nothing to unpickle, import or evaluate. No operator
# of the list writes to its inputs, draws random numbers or sees memory that it was not given (as_strided and empty
# could read the targets), so a program has no state and its logits are a function of its tokens.

OPERATORS = set(
    """
    _conj _fft_c2c _fft_c2r _fft_r2c _log_softmax _softmax _to_copy _unsafe_view abs acos add addcdiv addcmul addmm
    alias all amax amin any arange argmax argmin argsort asin atan atan2 baddbmm bitwise_and bitwise_left_shift
    bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm bucketize cat ceil celu chunk clamp clamp_max clamp_min
    clone complex constant_pad_nd contiguous conv1d conv2d convolution copysign cos cosh cumprod cumsum detach
    diagonal div einsum elu embedding eq erf exp exp2 expand expand_as expm1 eye fft_fft fft_ifft fft_irfft fft_rfft
    flatten flip floor floor_divide fmod full full_like gather ge gelu glu gt hardsigmoid hardswish hardtanh hypot
    index index_add index_copy index_fill index_put index_select isfinite isinf isnan layer_norm le leaky_relu lerp
    lift_fresh_copy linear linspace log log10 log1p log2 log_sigmoid_forward log_softmax logaddexp logcumsumexp
    logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_scatter matmul max maximum
    mean median min minimum mish mm movedim mul mv narrow native_group_norm native_layer_norm ne neg new_full new_ones
    new_zeros norm one_hot ones ones_like outer pad permute pow prelu prod real reciprocal relu remainder repeat
    repeat_interleave reshape rms_norm roll round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add scatter_reduce select select_scatter sgn sigmoid sign silu sin sinh slice slice_scatter softmax
    softplus sort split split_with_sizes sqrt square squeeze stack std sub sum t take_along_dim tan tanh tensor_split
    tile topk transpose tril triu trunc type_as unbind unflatten unfold unsqueeze upsample_nearest1d var var_mean view
    view_as view_as_complex view_as_real where xlogy zeros zeros_like __and__ __or__ __xor__ __lshift__ __rshift__
    """.split()
)


def exam_batch(task, device):
    """Rows that a sealed model is shown at once: a power of two, by the memory that its float32 logits take."""
    rows = max(1, (2**27 if device == "cuda" else 2**23) // (task.seq_len * task.vocab_size))
    return math.gcd(1 << (rows.bit_length() - 1), task.eval_rows)


@functools.cache
def find_operator(name):
    """The aten operator called 'name.overload'; raises Refused for all that the list above does not hold."""
    import torch

    packet, _, overload = str(name).partition(".")
    if packet not in OPERATORS:
        raise Refused(f"operator {packet[:80]!r} is not allowed in the forward")
    packet = getattr(torch.ops.aten, packet)
    if overload not in packet.overloads():
        raise Refused(f"operator {name[:80]!r} does not exist")
    operator = getattr(packet, overload)
    if operator._schema.is_mutable:
        raise Refused(f"operator {name!r} writes to its inputs; the forward must be pure")
    return attention if name == "scaled_dot_product_attention.default" else operator


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


def decode_argument(value, slots, device):
    """Inverse of encode_argument, for hostile input: raises Refused for anything else."""
    import torch

    if isinstance(value, list):
        return [decode_argument(item, slots, device) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *more = value.items() or [("nothing", None)]
    if not more and kind == "slot" and type(content) is int and content in slots:
        return slots[content]
    if not more and kind == "device":
        return device
    if not more and kind in ("dtype", "layout", "memory_format"):
        decoded = getattr(torch, content, None) if isinstance(content, str) else None
        if isinstance(decoded, getattr(torch, kind)):
            return decoded
    raise Refused(f"the sealed program holds an argument of no known kind: {str(value)[:80]}")


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
    slots, tensors, calls, used = {}, {}, [], set()
    for node in exported.graph.nodes:
        slots[node] = len(slots)
    for node in reversed(exported.graph.nodes):  # what the logits do not depend on is left out
        if node.op == "output":
            (output,) = node.args[0]
            used.add(output)
        elif node not in used:
            continue
        elif node.op == "placeholder":
            tensors[slots[node]] = specs[node.name].target  # None for the tokens
        else:
            getitem = getattr(node.target, "__name__", "") == "getitem"
            if not getitem and getattr(node.target, "namespace", "") != "aten":
                raise Refused(f"{node.target} is not an aten operator (autocast? a custom or higher-order operator?)")
            name = "getitem" if getitem else f"{node.target._schema.name[6:]}.{node.target._overloadname}"
            if not getitem:
                find_operator(name)
            arguments = (
                encode_argument(node.args, slots),
                {k: encode_argument(v, slots) for k, v in node.kwargs.items()},
            )
            calls.append([slots[node], name, *arguments])
            used.update(node.all_input_nodes)
    program = {"device": device.type, "batch": batch, "tensors": tensors, "calls": calls[::-1], "output": slots[output]}
    return json.loads(json.dumps(program)), exported.constants


def attention(query, key, value, *rest, **options):
    """scaled_dot_product_attention, refusing what its kernels do not check or the exam does not want.

    A key shorter than its value is read beyond its end, where the targets may lie; dropout would be random.
    """
    import torch

    dropout = rest[1] if len(rest) > 1 else options.get("dropout_p", 0.0)
    if dropout or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise Refused("attention needs a key and a value of the same length, and no dropout")
    return torch.ops.aten.scaled_dot_product_attention.default(query, key, value, *rest, **options)


def build_forward(program, tensors):
    """forward(tokens) -> logits of a sealed program; raises Refused for a malformed one.

    program: {"device", "batch", "tensors": {slot: name, or None for the tokens}, "calls": [[slot, operator, args,
    kwargs]], "output": slot}. A call's result goes to its slot and leaves it after its last use.
    """

    def reads(value):
        if isinstance(value, dict):
            return {value.get("slot")}
        return set().union(*map(reads, value)) if isinstance(value, list) else set()

    free_after, seen = [], {program["output"]}
    for slot, _, args, kwargs in reversed(program["calls"]):
        now = {slot, *reads(args), *reads([*kwargs.values()])} - seen - {None}
        seen |= now
        free_after.append(now)
    calls = [
        (slot, None if name == "getitem" else find_operator(name), args, kwargs, free)
        for (slot, name, args, kwargs), free in zip(program["calls"], reversed(free_after))
    ]

    def forward(tokens):
        slots = {int(slot): tokens if name is None else tensors[name] for slot, name in program["tensors"].items()}
        for slot, operator, args, kwargs, free in calls:
            args = decode_argument(args, slots, tokens.device)
            if operator is None:
                slots[slot] = args[0][args[1]]
            else:
                kwargs = {key: decode_argument(value, slots, tokens.device) for key, value in kwargs.items()}
                slots[slot] = operator(*args, **kwargs)
            del args, kwargs
            for slot in free:
                slots.pop(slot, None)
        return slots[program["output"]]

    return forward


def save_sealed(path, program, tensors):
    """Write program and tensors as one safetensors file."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"program": json.dumps(program)})


def load_sealed(path, task):
    """(program, forward) of a submission; raises Refused for anything but plain tensors and allowed calls."""
    import safetensors
    import torch

    try:
        with safetensors.safe_open(path, "pt") as file:
            program = json.loads((file.metadata() or {})["program"])
            device = program["device"]
            if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
                raise Refused(f"the model was sealed for a device that is not here: {device!r}")
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
        if program["batch"] != exam_batch(task, device):
            raise Refused(f"the model was sealed for batches of {program['batch']!r} rows")
        return program, build_forward(program, tensors)
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"the submission is not a sealed model: {str(error)[:200]}") from None


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
        if program["device"] == "cuda":
            torch.cuda.synchronize()
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
        self._reserve = 0.0
        self._tokens = self._steps = 0

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
            if device == "cuda":
                rows = rows.pin_memory().to(device, non_blocking=True)
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
        seconds = self.seconds
        report = {"steps": self._steps, "tokens": self._tokens, "params": self._params, "device": device_name()}
        if torch.cuda.is_available():
            report["peak_vram_mb"] = torch.cuda.max_memory_allocated() / 2**20
        if self._channel:
            self._channel.sendall(json.dumps({"submit": report}).encode() + b"\n")
            while self._channel.recv(1):  # the proctor ends this process; nothing after this line counts
                pass
            raise SystemExit(0)
        result = {"outcome": "ok", "training_seconds": seconds, **report}
        try:
            result |= finish_examiner(start_examiner(None), self._path, TASK, verify(TASK), None)
        finally:
            shutil.rmtree(self._path.parent)
        print_summary(result)


def device_name():
    """What the model is trained on, for the records."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox: Landlock rules for the candidate and for the examiner


def openings(root, hidden):
    """Yield the paths that together make up the folder `root` without the `hidden` folders below it."""
    ancestors = {parent for folder in hidden for parent in Path(folder).parents}

    def walk(path):
        if str(path) in hidden:
            return
        if path not in ancestors:
            yield str(path)
        else:
            for entry in os.scandir(path):
                if not entry.is_symlink():  # a link would open what it points to
                    yield from walk(Path(entry.path))

    return walk(Path(root))


def sandbox_rules(readable, writable, hidden):
    """[(path, rights)] of a process that runs Python: system libraries and devices, `readable` and `writable` paths."""
    from landlockpy import AccessFS, fs_for_abi

    here, listing, reading = str(Path(__file__).resolve().parent), AccessFS.READ_DIR, AccessFS.READ_FILE
    hidden = {here, str(cache_root()), *hidden}
    roots = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/proc", "/sys", *filter(None, sys.path)}
    roots |= {f"/etc/{name}" for name in ("alternatives", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")}
    roots = {os.path.realpath(root) for root in roots if os.path.exists(root)} - {here}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "dri", "dxg", "kfd")}
    devices |= {str(path) for path in Path("/dev").glob("nvidia*")}
    rules = [(root, listing) for root in roots if os.path.isdir(root)]
    rules += [(path, reading | AccessFS.EXECUTE) for root in roots for path in openings(root, hidden)]
    rules += [(path, reading | AccessFS.WRITE_FILE | AccessFS.IOCTL_DEV) for path in devices if os.path.exists(path)]
    rules += [(path, reading | (listing if os.path.isdir(path) else reading)) for path in readable]
    return rules + [(path, fs_for_abi(99) & ~(AccessFS.MAKE_CHAR | AccessFS.MAKE_BLOCK)) for path in writable]


def sandbox_level():
    """What protects a trial on this machine, in words for the records; 'none' where the kernel has no Landlock."""
    with contextlib.suppress(ImportError, OSError):
        import landlockpy

        if landlockpy.supported():
            return f"landlock {landlockpy.abi_version()}"
    return "none"


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 22, 24, 36


def prctl(option, value):
    """Linux process control; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


# System calls that Landlock does not rule, by their numbers on x86_64 and aarch64. The first would reach a server or
# leave something behind for a later trial: sockets (MPTCP, UDP, those of services), io_uring, System V memory and
# queues, keyrings, extended attributes.
FORBIDDEN_CALLS = {
    "x86_64": (41, 42, 49, 425, 29, 30, 64, 68, 240, 248, 249, 250, 188, 189, 190, 463),
    "aarch64": (198, 203, 200, 425, 194, 196, 190, 186, 180, 217, 218, 219, 5, 6, 7, 463),
}
# Modes, owners and times could mark any file of the user. Honest tools set them on files of their own, so these calls
# seem to succeed: chmod, chown, utime and their variants.
IGNORED_CALLS = {
    "x86_64": (90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280),
    "aarch64": (52, 53, 452, 54, 55, 88),
}
PRLIMIT_CALL = {"x86_64": 302, "aarch64": 261}  # allowed on the process itself
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def forbid_system_calls():
    """Install a seccomp filter for this process and all that it starts; does nothing on other architectures."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in AUDIT_ARCHITECTURE:
        return
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    refuse, ignore, allow = 0x50000 + errno.EACCES, 0x50000, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURE[machine]), (end, 0, 0, refuse)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 2**30), (end, 0, 0, refuse)]  # x32 has all calls a second time
    for calls, verdict in ((FORBIDDEN_CALLS, refuse), (IGNORED_CALLS, ignore)):
        for number in calls[machine]:
            code += [(equal, 0, 1, number), (end, 0, 0, verdict)]
    code += [(equal, 0, 3, PRLIMIT_CALL[machine]), (load, 0, 0, 16), (equal, 1, 0, 0), (end, 0, 0, refuse)]
    code += [(end, 0, 0, allow)]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(lines)))
    if ctypes.CDLL(None).prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError("the kernel refused the seccomp filter")


def start_confined(command, rules, **options):
    """Popen `command` in its own session, under Landlock `rules` (None: unconfined), to die with this process."""
    import resource

    def confine():
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process goes first
        if rules is not None:
            for capability in range(64):  # root's would open the environment of other processes in /proc
                prctl(PR_CAPBSET_DROP, capability)
            with landlockpy.Ruleset(scoped=landlockpy.Scope.SIGNAL | landlockpy.Scope.ABSTRACT_UNIX_SOCKET) as ruleset:
                for path, rights in rules:
                    ruleset.allow_path(path, rights)
                ruleset.restrict()  # also sets no_new_privs, without which a filter would need root
            forbid_system_calls()

    if rules is not None:
        import landlockpy
    return subprocess.Popen(command, start_new_session=True, preexec_fn=confine, **options)


FILE_LIMIT = 8 * 2**30  # bytes of one file
DISK_LIMIT = 10 * 2**30  # bytes by which the disk may fill up during a trial
DISK_RESERVE = 2**28  # bytes that a trial leaves free
MEMORY_SHARE = 0.9  # of the machine's memory, for the candidate and its children together
PROCESS_LIMIT = 1000
LOG_LIMIT = 2**20  # bytes of a candidate's output that are kept

ENVIRONMENT = re.compile(r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|PYTHONPATH|(CUDA|NVIDIA|OMP|MKL|TORCH|TRITON)_\w+")


# ---------------------------------------------------------------------------------------------------------------------
# The trial: one candidate under clock and sandbox, as the trusted side sees it


def descendants(keep):
    """psutil Processes below this one, without `keep` (a Popen or None) and what is below it."""
    import psutil

    kept = {keep.pid} if keep else set()
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid in kept or process.ppid() in kept:
                kept.add(process.pid)
            else:
                found.append(process)
    return found


def end_processes(keep=None):
    """Kill and reap every descendant but `keep`. Orphans cannot escape: this process is their subreaper."""
    import psutil

    deadline = time.monotonic() + 60
    while alive := descendants(keep):
        if time.monotonic() > deadline:
            raise Trouble(f"processes of the candidate cannot be ended: {[process.pid for process in alive][:9]}")
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in alive:
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.01)


def overdrawn(keep, out, free_at_start):
    """(bytes of memory in use by the candidate, reason to stop it or None)."""
    import psutil

    processes, memory = descendants(keep), 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory += process.memory_info().rss
    free = shutil.disk_usage(out).free
    if len(processes) > PROCESS_LIMIT:
        return memory, f"it ran more than {PROCESS_LIMIT} processes"
    if memory > MEMORY_SHARE * psutil.virtual_memory().total:
        return memory, f"it took {memory / 2**30:.0f} GB of memory"
    if free < max(DISK_RESERVE, free_at_start - DISK_LIMIT):
        return memory, "it filled the disk"
    return memory, None


class Log:
    """The candidate's output on disk: its first and its last LOG_LIMIT / 2 bytes."""

    def __init__(self, path):
        self.file, self.room, self.tail, self.left_out = open(path, "wb", 0), LOG_LIMIT // 2, b"", 0

    def write(self, data):
        with contextlib.suppress(OSError):  # a full disk costs the log, not the trial
            self.file.write(data[: self.room])
        rest = data[self.room :]
        self.room -= len(data) - len(rest)
        self.left_out += max(0, len(self.tail) + len(rest) - LOG_LIMIT // 2)
        self.tail = (self.tail + rest)[-LOG_LIMIT // 2 :]

    def close(self):
        with contextlib.suppress(OSError):
            if self.left_out:
                self.file.write(b"\n[... %d bytes left out ...]\n" % self.left_out)
            self.file.write(self.tail)
        self.file.close()


def read_message(channel):
    """One message of the candidate as a dict; {} for whatever is not one."""
    with contextlib.suppress(ValueError, RecursionError, OSError):
        message = json.loads(channel.recv(2**16))
        if isinstance(message, dict):
            return message
    return {}


def numbers(values, limit=16):
    """Those items of a candidate's report that are a short name with a finite number, at most `limit`."""
    items = values.items() if isinstance(values, dict) else ()
    fine = [(k[:32], v) for k, v in items if type(v) in (int, float) and abs(v) < 1e15 and k.isidentifier()]
    return dict(fine[:limit])


def supervise(child, examiner, channel, output, rows, task, out):
    """Watch a candidate from its start to its end and return the facts: outcome, reason, times, memory and report.

    The rows' descriptor is handed over when the candidate says begin; the clock runs from there to the arrival of its
    submission. Every limit is enforced here, and every process of the candidate is dead on return.
    """
    log, started, begun = Log(out / "log.txt"), time.monotonic(), None
    deadline, next_look, peak, report = started + task.startup_limit, started, 0, {}
    free_at_start = shutil.disk_usage(out).free
    outcome = reason = None
    with (
        contextlib.closing(log),
        open(out / "metrics.jsonl", "w") as metrics,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(channel, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        try:
            while outcome is None:
                ended = child.poll() is not None  # asked first: what it sent before its end is still read below
                for key, _ in selector.select(0 if ended else min(0.25, max(0.0, deadline - time.monotonic()))):
                    if key.fileobj is output:
                        with contextlib.suppress(BlockingIOError):  # the candidate can read its pipe empty again
                            log.write(data := os.read(output, 2**16))
                            if not data:
                                selector.unregister(output)
                        continue
                    message, now = read_message(channel), time.monotonic()
                    if begun is None and "refused" in message:
                        outcome, reason = "invalid", str(message["refused"])
                    elif begun is None and "begin" in message:
                        try:
                            socket.send_fds(channel, [b"."], [rows])
                        except OSError as error:  # its end is closed or full; the channel does not block
                            outcome, reason = "crash", f"it did not take the training rows: {error.strerror}"
                        begun = time.monotonic()
                        deadline = begun + task.time_budget + task.grace
                    elif begun and "log" in message and metrics.tell() < LOG_LIMIT:
                        values = {"seconds": round(now - begun, 3), **numbers(message["log"])}
                        with contextlib.suppress(OSError):
                            print(json.dumps(values), file=metrics, flush=True)
                    elif begun and "submit" in message:
                        outcome, report = "ok", message["submit"] if isinstance(message["submit"], dict) else {}
                now = time.monotonic()
                if now > deadline:
                    outcome = "timeout"
                    phase = "before begin()" if begun is None else "between begin() and submit()"
                    reason = f"no end after {now - (begun or started):.0f} s {phase}"
                elif outcome is None and ended:
                    outcome, reason = "crash", exit_reason(child.returncode)
                elif outcome is None and now > next_look:
                    next_look = now + 1
                    memory, reason = overdrawn(examiner, out, free_at_start)
                    peak, outcome = max(peak, memory), "crash" if reason else None
        finally:
            end = time.monotonic()
            end_processes(keep=examiner)
            with contextlib.suppress(OSError):
                while data := os.read(output, 2**16):
                    log.write(data)
    if outcome == "crash":
        lines = (out / "log.txt").read_text(errors="replace").strip().splitlines()
        reason = f"{reason}: {lines[-1].strip()[:300]}" if lines else reason
    return {
        "outcome": outcome,
        "reason": reason and one_line(reason, 2500),
        "startup_seconds": round((begun or end) - started, 3),
        "training_seconds": round(end - begun, 3) if begun else 0.0,
        "peak_rss_mb": round(peak / 2**20, 1),
        **numbers({key: report.get(key) for key in ("steps", "tokens", "params", "peak_vram_mb")}),
        "device": one_line(report.get("device", ""), 80),
    }


def one_line(text, limit):
    """A candidate's words, fit to be printed: one line without control characters, at most `limit` characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:limit]


def exit_reason(code):
    """A process's return code in words."""
    return f"exit code {code}, without submit()" if code >= 0 else f"killed: {signal.strsignal(-code) or -code}"


def take_submission(room, out):
    """Move the candidate's file out of its reach and return its new path; raises Refused unless it is a plain file."""
    path, kept = room / "model.safetensors", out / "model.safetensors"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > FILE_LIMIT:
            raise Refused("the submission is not a plain file")
        path.rename(kept)
    except OSError as error:
        raise Refused(f"the submission cannot be read ({error.strerror})") from None
    return kept


def trial(train_py, out, task, seed, sandbox=True, beat=None):
    """Run the candidate `train_py` once in the folder `out` and score it; returns what it writes to out/result.json.

    beat: val_bpb below which the score matters, so that the exam looks closer (None: always). Raises Trouble, with
    nothing started, where data or disk are not fit for an exam.
    """
    folder, flops, begun = verify(task), machine_flops(), time.monotonic()
    train_py, room = Path(train_py).resolve(), out / "room"
    try:
        source = train_py.read_bytes()
        remove(room)
        room.mkdir(parents=True)
        for stale in ("result.json", "model.safetensors"):
            (out / stale).unlink(missing_ok=True)
        (room / "train.py").write_bytes(source)
        shutil.copyfile(__file__, room / "prepare.py")
    except OSError as error:
        raise Trouble(f"cannot set up the trial in {out}: {error.filename}: {error.strerror}") from None
    if shutil.disk_usage(out).free < 2 * DISK_RESERVE:
        raise Trouble(f"the disk that holds {out} is full; a trial needs {2 * DISK_RESERVE / 2**30:.1f} GB")

    level = sandbox_level() if sandbox else "none"
    hidden = json.loads((folder / "meta.json").read_text())["hidden_folders"]
    rules = None if level == "none" else sandbox_rules([], [room], hidden)
    examiner = start_examiner(None if level == "none" else sandbox_rules([out, folder, __file__], [], []))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    output, child_output = os.pipe()
    told = {"task": dataclasses.asdict(task), "seed": seed, "flops": flops, "fd": theirs.fileno()}
    environment = {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)} | {
        "AUTORESEARCH_TRIAL": json.dumps(told),
        "HOME": str(room),
        "TMPDIR": str(room),
        "TORCHINDUCTOR_CACHE_DIR": str(room / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker pool would need the machine's shared memory
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ours.setblocking(False)
    os.set_blocking(output, False)
    rows = os.open(folder / "train.bin", os.O_RDONLY)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = start_confined(
            [sys.executable, "train.py"],
            rules,
            cwd=room,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=child_output,
            stderr=child_output,
            pass_fds=[theirs.fileno()],
        )
        os.close(child_output)
        theirs.close()
        result = supervise(child, examiner, ours, output, rows, task, out)
        if result["outcome"] == "ok":
            try:
                result |= finish_examiner(examiner, take_submission(room, out), task, verify(task), beat)
            except Refused as refusal:
                result |= {"outcome": "invalid", "reason": str(refusal)}
    finally:
        end_processes()
        os.close(output)
        os.close(rows)
        ours.close()
        remove(room)
    result |= {
        "total_seconds": round(time.monotonic() - begun, 3),
        "task": task.name,
        "budget": task.time_budget,
        "seed": seed,
        "sandbox": level,
        "python": platform.python_version(),
        "sha256": {"train.py": hashlib.sha256(source).hexdigest(), **fingerprints(task)},
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def fingerprints(task):
    """SHA-256 of everything besides train.py that decides a score: prepare.py, the tokenizer, the validation rows."""
    meta = json.loads((verify(task) / "meta.json").read_text())
    return {"prepare.py": sha256(__file__), "tokenizer": meta["tokenizer_sha256"], "val": meta["val_sha256"]}


def remove(folder):
    """Delete a folder that a candidate may have made deep and hard to delete; links are not followed."""
    for command in (("chmod", "-R", "u+rwX"), ("rm", "-rf")):
        subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL)


def print_summary(result):
    """Print a result the way that scripts of karpathy/autoresearch expect it, one `name: value` a line."""
    print("---")
    if result["outcome"] != "ok":
        print(f"outcome:          {result['outcome']}\nreason:           {result['reason']}")
    for name, key, scale, form in (
        ("val_bpb", "val_bpb", 1, ".6f"),
        ("training_seconds", "training_seconds", 1, ".1f"),
        ("startup_seconds", "startup_seconds", 1, ".1f"),
        ("eval_seconds", "eval_seconds", 1, ".1f"),
        ("total_seconds", "total_seconds", 1, ".1f"),
        ("peak_vram_mb", "peak_vram_mb", 1, ".1f"),
        ("peak_rss_mb", "peak_rss_mb", 1, ".1f"),
        ("total_tokens_M", "tokens", 1e-6, ".1f"),
        ("num_steps", "steps", 1, ".0f"),
        ("num_params_M", "params", 1e-6, ".1f"),
    ):
        if key in result:
            print(f"{name + ':':<18}{result[key] * scale:{form}}")


# ---------------------------------------------------------------------------------------------------------------------
# The exam: a fresh, isolated interpreter scores the sealed model


def start_examiner(rules):
    """Start the examiner early: it imports torch while the candidate starts up, then waits for a submission."""
    command = [sys.executable, "-I", str(Path(__file__).resolve()), "_exam"]
    pipe = subprocess.PIPE
    return start_confined(command, rules, cwd="/", stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")


def finish_examiner(examiner, path, task, folder, beat):
    """Have the examiner score the submission at `path`; returns outcome, reason or val_bpb, and what examine() says."""
    request = {"path": str(path), "task": dataclasses.asdict(task), "folder": str(folder), "beat": beat}
    errors = ""
    try:
        answer, errors = examiner.communicate(json.dumps(request) + "\n", timeout=task.exam_limit)
        return json.loads(answer)
    except subprocess.TimeoutExpired:
        examiner.kill()
        return {"outcome": "invalid", "reason": f"the exam took longer than {task.exam_limit:.0f} s"}
    except (ValueError, OSError):
        last = (errors.strip().splitlines() or [exit_reason(examiner.wait())])[-1]
        return {"outcome": "invalid", "reason": f"the sealed model broke the exam: {one_line(last, 300)}"}


def exam():
    """The examiner's life: read one request from standard input, answer it on standard output."""
    import torch  # noqa: F401 - imported before the request comes, while the candidate starts up

    request = json.loads(sys.stdin.readline() or "null")
    if request:
        task, folder = Task(**request["task"]), Path(request["folder"])
        try:
            answer = examine(request["path"], task, folder, request["beat"])
        except Refused as refusal:
            answer = {"outcome": "invalid", "reason": one_line(refusal, 2500)}
        print(json.dumps(answer))


def examine(path, task, folder, beat=None):
    """Score the sealed model at `path` on the validation rows: {outcome, val_bpb, eval_seconds, leak, noise}.

    val_bpb = nats / ln 2 / UTF-8 bytes, over all targets but BOS. Three batches of eight are probed for causality, and
    where the score is below `beat` (None: always) every row is, twice. Raises Refused for a model that looks
    ahead, is not deterministic, or returns anything but finite logits [B, T, V].
    """
    import torch
    import torch.nn.functional as F

    started = time.monotonic()
    program, forward = load_sealed(path, task)
    device, batch = program["device"], program["batch"]
    rows = np.fromfile(folder / "val.bin", dtype=np.uint16).reshape(-1, task.seq_len + 1)
    batches = torch.from_numpy(rows.astype(np.int64)).split(batch)
    lengths = torch.from_numpy(token_bytes(load_tokens(folder))).to(device)
    probed = set(np.random.default_rng().permutation(len(batches))[: max(1, min(3 * len(batches) // 8, 1024 // batch))])
    nats, size, moved, noise = 0.0, 0, 0.0, 0.0
    with torch.inference_mode():
        try:
            for index, chunk in enumerate(batches):
                # Copies of their own: a view would let a program reach the targets in the same memory.
                tokens, targets = chunk[:, :-1].clone().to(device), chunk[:, 1:].flatten().to(device)
                logits = compute_logits(forward, tokens, task)
                losses, spans = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none"), lengths[targets]
                nats += losses[spans > 0].double().sum().item()
                size += spans.sum().item()
                if index == min(probed):
                    noise = (compute_logits(forward, tokens, task) - logits).abs().max().item()
                if index in probed:
                    moved = max(moved, leak(forward, tokens, logits, task))
            val_bpb = nats / math.log(2) / size
            if beat is None or val_bpb < beat:
                for chunk in batches:
                    tokens = chunk[:, :-1].clone().to(device)
                    logits = compute_logits(forward, tokens, task)
                    moved = max(moved, *(leak(forward, tokens, logits, task) for _ in range(2)))
        except (
            RuntimeError,
            TypeError,
            LookupError,
            ArithmeticError,
            ValueError,
            AttributeError,
            MemoryError,
        ) as error:
            raise Refused(f"the sealed model fails on the validation rows: {str(error)[:300]}") from None
    if not noise <= LEAK_TOLERANCE:
        raise Refused(f"the model is not deterministic: the same tokens gave logits that differ by {noise:.2g}")
    if not moved <= LEAK_TOLERANCE:
        raise Refused(f"the model is not causal: tokens that come later moved earlier logits by {moved:.2g}")
    seconds = round(time.monotonic() - started, 3)
    return {"outcome": "ok", "val_bpb": val_bpb, "eval_seconds": seconds, "leak": moved, "noise": noise}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def main():
    parser = argparse.ArgumentParser(
        description="Prepare a task's data, or run one trial of a train.py under sandbox, clock and exam.",
        epilog="Data lives in ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it).",
    )
    parser.add_argument("--task", metavar="NAME", help=f"one of: {', '.join(TASKS)} (default: {TASK.name})")
    commands = parser.add_subparsers(dest="command", metavar="trial")
    one = commands.add_parser("trial", help="run and score one candidate", description="Run and score one candidate.")
    one.add_argument("train_py", metavar="TRAIN_PY", help="the candidate's train.py")
    one.add_argument("--out", required=True, metavar="DIR", help="folder for result.json, log.txt and metrics.jsonl")
    one.add_argument("--task", metavar="NAME", default=argparse.SUPPRESS, help="as above")
    one.add_argument(
        "--seed", type=int, default=SEED, metavar="N", help="of data order and initialisation (default: 0)"
    )
    one.add_argument("--budget", type=float, metavar="SECONDS", help="of training, instead of the task's own")
    one.add_argument("--beat", type=float, metavar="BPB", help="examine less closely a score above it (default: none)")
    one.add_argument("--no-sandbox", action="store_true", help="run the candidate unconfined: only for code you trust")
    arguments = parser.parse_args()

    def end(*_):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    try:
        if arguments.command != "trial":
            task = get_task(arguments.task)
            folder = prepare(task)
            rate = machine_flops()
            print(f"{task.name} is ready in {folder}; this machine multiplies matrices at {rate / 1e12:.2f} TFLOP/s")
            return 0
        task = get_task(arguments.task, arguments.budget or (TASK.time_budget if not arguments.task else None))
        if sandbox_level() == "none" or arguments.no_sandbox:
            print("NO SANDBOX: the candidate can read and write all that you can", file=sys.stderr)
        sandbox, out = not arguments.no_sandbox, Path(arguments.out).resolve()
        result = trial(arguments.train_py, out, task, arguments.seed, sandbox, arguments.beat)
        print_summary(result)
        return 0 if result["outcome"] == "ok" else 1
    except Trouble as trouble:
        print(f"prepare.py: {trouble}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:] == ["_exam"]:
        exam()
    else:
        sys.exit(main())

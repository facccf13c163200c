"""prepare.py - the exam board: the task, its data, the clock and the score.

train.py is written by a machine that is rewarded for a low number, so everything that decides the number lives here,
on the other side of a process boundary:

  python prepare.py [--task NAME]               fetch the text, train the tokenizer, pack the rows (once)
  python prepare.py --text PATH...              the same over your own files
  python prepare.py --check                     see whether all is well for a night
  python prepare.py trial TRAIN_PY --out DIR    one experiment under sandbox and clock; writes DIR/result.json

The file reads in the order of the story: the task, its text, the rows, the machine, the sealed model, what train.py may
call, the sandbox, the trial, the exam. train.py uses five names of it: TASK, SEED, device, machine_flops and begin.
"""

import argparse
import atexit
import base64
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
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
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# The task: what is learned, and within which limits


class Trouble(Exception):
    """A foreseeable mistake or fault, told to the user in one sentence. The programs end with exit code 2."""


class Pause(Trouble):
    """A fault that may pass by itself, like a full disk: worth trying again later. Ends with exit code 75."""


PAUSE_CODE = 75
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def words(error):
    """What an error says, without the numbers of the operating system."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


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


TASKS = {
    task.name: task
    for task in (
        Task("climbmix", "climbmix", 2048, 8192, 40 * 2**19, 300.0, split_long=False),
        Task("tinystories", "tinystories", 512, 4096, 2**21, 300.0, split_long=True),
        Task("pycode", "pycode", 256, 2048, 2**17, 300.0, split_long=True),
        Task("demo", "pycode", 256, 2048, 2**17, 20.0, split_long=True),
    )
}


def cache_root():
    """Folder of everything prepared: AUTORESEARCH_CACHE, else ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").resolve()


def has_gpu():
    """Whether an NVIDIA GPU is here to be used: by its device files, since torch takes seconds to import.

    A GPU whose driver is broken counts: find_device() says what is wrong with it. CUDA_VISIBLE_DEVICES= hides it.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return False
    wsl = os.path.exists("/dev/dxg") and os.path.exists("/usr/lib/wsl/lib/libcuda.so.1")
    # Asked for one by one, since the sandbox does not let /dev be listed.
    return wsl or any(os.path.exists(f"/dev/nvidia{number}") for number in range(64))


def device_kind():
    """What trains and is examined on this machine: "cuda" or "cpu"."""
    return "cuda" if has_gpu() else "cpu"


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
            raise Trouble(
                f"there is no task {name!r}; the tasks are: {', '.join(TASKS)}, and your own text after: "
                f"python prepare.py --text PATH... --task NAME"
            ) from None
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
# The text: one function per source, each yielding (text, held_out) in a fixed order


def python_files():
    """Yield (path, hidden) of the Python files of the standard library and of four packages that are always there.

    hidden: the file lies in a folder of tests, which no running program imports. Validation text comes from hidden
    files alone, so that the sandbox can close their folders.
    """
    packages = [importlib.import_module(name) for name in ("torch", "numpy", "sympy", "networkx")]
    for root in [sysconfig.get_paths()["stdlib"], *(package.__path__[0] for package in packages)]:
        root = Path(root).resolve()
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


def pycode_source():
    """The text of pycode as `build` takes it."""
    found = list(pycode_documents())
    return lambda: found, len(found), {"hidden_folders": hidden_folders()}


@contextlib.contextmanager
def open_parquet(path):
    """The parquet file at `path`; raises Trouble where it is damaged or has no text."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if not any(field.name == "text" and "string" in str(field.type) for field in file.schema_arrow):
                raise Trouble(f"{path} has no column 'text' of strings")
            yield file
    except (ArrowException, OSError) as error:
        raise Trouble(f"{path} is damaged ({one_line(error, 200)}); delete or replace it, then start again") from None


def parquet_texts(path):
    """Yield the column "text" of a parquet file, with a thousand documents at a time in memory; None becomes ""."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(1024, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())


HUB = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}


def hub_source(dataset, shards):
    """Fetch a dataset of the Hugging Face hub and return it as `build` takes it."""
    if dataset == "climbmix":  # its validation shard is the one that upstream uses
        names = [f"shard_{number:05d}.parquet" for number in (6542, *range(shards))]
    else:
        names = ["tinystories_gpt4_clean.parquet"]
    folder = cache_root() / "hub" / dataset
    commit = download(HUB[dataset], names, folder)
    counts = []
    for name in names:
        with open_parquet(folder / name) as file:
            counts.append(file.metadata.num_rows)
    # The card of tinystories sets the first 20,000 stories aside for test and validation.
    held_out = counts[0] if dataset == "climbmix" else 20_000

    def documents():
        texts = itertools.chain.from_iterable(parquet_texts(folder / name) for name in names)
        return ((text, number < held_out) for number, text in enumerate(texts))

    return documents, sum(counts), {"source": {"repository": HUB[dataset], "commit": commit, "files": names}}


def download(repository, names, folder):
    """Fetch files of a dataset repository into `folder`, eight at a time, and return the commit that they are of.

    Complete files are not fetched again. huggingface_hub shows the progress, resumes broken connections and waits out
    rate limits.
    """
    from huggingface_hub import hf_hub_download

    get = functools.partial(hf_hub_download, repository, repo_type="dataset", local_dir=folder)
    todo, errors = iter(names), []

    def work():
        for name in todo:
            try:
                get(name)
            except Exception as error:
                errors.append(error)
            if errors:
                return

    try:
        first = get(names[0], dry_run=True)
        get = functools.partial(get, revision=first.commit_hash)
        with ThreadPoolExecutor(8) as pool:
            files = [first, *pool.map(lambda name: get(name, dry_run=True), names[1:])]
    except Exception as error:
        raise download_trouble(error, repository) from None
    for leftover in folder.rglob("*.incomplete"):  # of a download that was killed
        leftover.unlink()
    missing = sum(file.file_size for file in files if file.will_download)
    size = missing + 2 * sum(file.file_size for file in files) + DISK_RESERVE  # rows take up to twice the download
    if size > (free := shutil.disk_usage(cache_root()).free):
        raise Trouble(
            f"this needs {size / 1e9:.1f} GB in {cache_root()}, where {free / 1e9:.1f} GB are free; "
            "make room, take fewer --shards, or choose another folder with AUTORESEARCH_CACHE"
        )
    if missing:
        print(f"fetching {missing / 1e9:.1f} GB from {repository}", flush=True)
    # Threads that die with the program: Ctrl-C does not wait for the end of a file.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise download_trouble(errors[0], repository)
    return first.commit_hash


def download_trouble(error, repository):
    """Trouble that says what a failure of huggingface_hub is and where to look."""
    while getattr(error, "response", None) is None and error.__cause__:
        error = error.__cause__
    return Trouble(
        f"cannot fetch {repository} ({one_line(error, 300)}); look at the network, HF_ENDPOINT, HF_HUB_OFFLINE, "
        "HTTPS_PROXY and HF_TOKEN, then run the same command again: it goes on with the file that is missing"
    )


KINDS = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz", ".parquet")


def text_files(paths):
    """The real paths of the text files at or below `paths`, sorted; names with a leading dot are left out."""
    found = set()
    for path in map(Path, paths):
        below = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        below = [file for file in below if file.name.endswith(KINDS) and "/." not in f"/{file.relative_to(path)}"]
        if not below:
            raise Trouble(f"there is no file at or below {path} whose name ends with one of {' '.join(KINDS)}")
        found.update(file.resolve() for file in below)
    return sorted(found)


def pieces(file, size=2**14):
    """Yield an open text file in documents of about `size` characters, cut at a blank line, else line, if there is one.

    A book or a dump of many texts in one file becomes documents that can be split into training and validation.
    """
    text = file.read(size)
    while more := file.read(size):
        end = text.rfind("\n\n") + 2 if "\n\n" in text else text.rfind("\n") + 1 or len(text)
        yield text[:end]
        text = text[end:] + more
    yield text


def read_texts(path):
    """Yield the documents of one text file; "" for a line of .jsonl that has none."""
    if path.name.endswith(".parquet"):
        yield from parquet_texts(path)
        return
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            if ".jsonl" not in path.suffixes[-2:]:
                yield from pieces(file)
                return
            for line in file:
                text = None
                with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                    text = json.loads(line)["text"]
                yield text if isinstance(text, str) else ""
    except (OSError, EOFError, zlib.error) as error:
        raise Trouble(f"{path} cannot be read to its end ({error})") from None


def text_documents(files, share, left_out=None):
    """Yield (text, held_out) of the user's files without what is nearly empty, not text, or there already.

    share: of the documents that is held out, chosen by a hash of the content. left_out: a Counter of the reasons why
    something is not yielded.
    """
    left_out, seen = Counter() if left_out is None else left_out, set()
    for path in files:
        try:
            for text in read_texts(path):
                content = text.strip()
                digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                number = int.from_bytes(digest, "little")
                if len(content) < 16:
                    left_out["nearly empty"] += 1
                elif "\ufffd" in content or "\0" in content:
                    left_out["not UTF-8"] += 1
                elif number in seen:
                    left_out["duplicate"] += 1
                else:
                    seen.add(number)
                    yield text, number < share * 2**64
        except Trouble as trouble:
            left_out[str(trouble)] += 1


def prepare_text(paths, name):
    """Prepare the user's files as the task `name` and return it. Raises Trouble where that name has other text."""
    if name in TASKS or not OWN_NAME.fullmatch(name):
        raise Trouble(f"{name!r} cannot name your text; take small letters, digits, - and _, and no name of a task")
    files, folder = text_files(paths), cache_root() / name
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    source = {"files": len(files), "sha256": hashlib.sha256(json.dumps(state).encode()).hexdigest()}
    if (folder / "meta.json").exists():
        task = get_task(name)
        if read_meta(task)["source"] != source:
            raise Trouble(
                f"{name} was prepared from other files, or they have changed since; choose another name with --task, "
                f"or delete {folder} (scores before and after will not compare)"
            )
        return task
    left_out = Counter()
    lengths = [len(text) for text, _ in text_documents(files, 0, left_out)]
    documents, characters = len(lengths), sum(lengths)
    for reason, number in left_out.items():
        print(f"left out: {number:,} x {reason}")
    print(f"{len(files):,} files hold {documents:,} documents of {characters / 1e6:.1f} M characters", flush=True)
    if not documents:
        raise Trouble("the text is too small: no document is left")
    # Sizes by the length of the text and the machine; `build` lowers eval_tokens to what is there.
    seq_len, vocab_size, eval_tokens = 256, 2048, 2**17
    if has_gpu() and characters > 2**25:
        seq_len, vocab_size, eval_tokens = (512, 4096, 2**21) if characters < 2**30 else (2048, 8192, 2**23)
    # Half as much again as the exam needs, at six characters a token; of small texts a tenth.
    share = min(0.1, max(9 * eval_tokens / characters, 20 / documents))
    about = {"source": source, "hidden_folders": [str(file) for file in files]}
    task = Task(name, name, seq_len, vocab_size, eval_tokens, 300.0, split_long=True)
    prepare(task, lambda: (functools.partial(text_documents, files, share), documents, about))
    return get_task(name)


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
    documents, waiting = iter(documents), []  # sorted by length, first come first
    while True:
        row, room, dropped = [], row_len, 0
        while room:
            while len(waiting) < buffer_size and (document := next(documents, None)) is not None:
                bisect.insort(waiting, document, key=len)
            if not waiting:
                return
            place = max(0, bisect.bisect(waiting, room, key=len) - 1)  # 0: the shortest, which may not fit
            document = waiting.pop(bisect.bisect_left(waiting, len(waiting[place]), key=len))
            row.append(document[:room])
            dropped += max(0, len(document) - room)
            room -= min(len(document), room)
        yield np.concatenate(row), dropped


# ---------------------------------------------------------------------------------------------------------------------
# Preparing: build the data once, fingerprint it, verify it ever after


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_atomically(path, text):
    """Write a small text file so that readers, and a power cut, see either the old content or the new."""
    temporary = Path(f"{path}.tmp")
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


def write_rows(file, texts, encoding, task, limit=None):
    """Tokenise, pack and append rows, uint16 [seq_len + 1], at most `limit`; returns (rows, cropped tokens)."""
    rows = cropped = 0
    for row, lost in itertools.islice(pack(tokenise(texts, encoding, task), task.seq_len + 1), limit):
        file.write(row.tobytes())
        rows, cropped = rows + 1, cropped + lost
    file.flush()
    os.fsync(file.fileno())
    return rows, cropped


TOKENIZER_TEXT = 2**28  # characters, from the start of the training text, that the tokenizer is trained on
PART = 2**26  # characters that are packed at a time; a preparation that is killed repeats no more than these


def first_texts(texts, size):
    """Yield texts up to about `size` characters; leaves the rest of an iterator where it is."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def of_part(documents, held_out):
    """The texts of documents that are held out, or of those that are not.

    Half of a broken surrogate pair has no UTF-8 form; it becomes U+FFFD before anything is counted.
    """
    for text, is_held_out in documents:
        if is_held_out == held_out:
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def build(task, documents, count, about, folder):
    """Write tokenizer, rows and fingerprints of a text into `folder`, or go on where an earlier call was cut off.

    documents(): yields (text, held_out), the same each time; count: how many; about: what meta.json will say of them,
    where "source", if any, tells whether what `folder` holds is of this text. Files: tokenizer.txt, train.bin and
    val.bin (uint16 [rows, seq_len + 1]), meta.json. Raises Trouble where the text is too small for the task.
    """
    from rich.progress import track

    started, meta = time.monotonic(), {}
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((folder / "progress.json").read_text())
    if "source" in about and meta.get("source") == about["source"]:
        print(f"going on after {meta['texts']:,} documents", flush=True)
    else:
        meta = about | build_validation(task, documents, folder)
    task, val, train = Task(**meta["task"]), meta["val"], meta["train"]
    encoding = build_encoding(load_tokens(folder))

    with open(folder / "train.bin", "ab") as file:
        file.truncate(train["rows"] * (task.seq_len + 1) * 2)
        rest = itertools.islice(of_part(track(documents(), "packing", count), False), meta["texts"], None)
        while part := list(first_texts(rest, PART)):
            rows, cropped = write_rows(file, part, encoding, task)
            train["rows"] += rows
            train["cropped_tokens"] += cropped
            meta["texts"] += len(part)
            write_atomically(folder / "progress.json", json.dumps(meta))

    sizes = (
        f"{train['rows']:,} rows for training from {meta['texts']:,} documents, "
        f"{val['rows']:,} for validation from the {count - meta['texts']:,} held out"
    )
    if val["rows"] < task.eval_rows or not train["rows"]:
        raise Trouble(f"the text is too small: {sizes}; {task.eval_rows:,} are scored")
    meta |= {"tokenizer_sha256": sha256(folder / "tokenizer.txt"), "val_sha256": sha256(folder / "val.bin")}
    (folder / "progress.json").unlink()
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    cropped = train["cropped_tokens"] / (train["rows"] * (task.seq_len + 1))
    print(f"{sizes}; {cropped:.1%} of the tokens cropped; {time.monotonic() - started:.0f} s")


def build_validation(task, documents, folder):
    """Write tokenizer and validation rows into `folder`, afresh; returns the first entries of meta.json.

    An own text is scored on what there is: its eval_tokens are lowered to that.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"tokenizer: training {task.vocab_size:,} tokens", flush=True)
    tokens = train_tokenizer(first_texts(of_part(documents(), False), TOKENIZER_TEXT), task.vocab_size)
    lines = [base64.b64encode(token).decode() + "\n" for token in tokens]
    write_atomically(folder / "tokenizer.txt", "".join(lines))
    texts, own = of_part(documents(), True), task.name not in TASKS
    if own:  # in the order of their hash, so that what is scored comes from everywhere
        texts = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    with open(folder / "val.bin", "wb") as file:
        rows, cropped = write_rows(file, texts, build_encoding(tokens), task, task.eval_rows)
        if own and 32 <= rows < task.eval_rows:
            rows = 2 ** (rows.bit_length() - 1)
            file.truncate(rows * (task.seq_len + 1) * 2)
            task = dataclasses.replace(task, eval_tokens=rows * task.seq_len)
    return {
        "task": dataclasses.asdict(task),
        "seq_len": task.seq_len,
        "vocab_size": task.vocab_size,
        "val": {"rows": rows, "cropped_tokens": cropped},
        "train": {"rows": 0, "cropped_tokens": 0},
        "texts": 0,
    }


def prepare(task, source=None, shards=None):
    """Build the task's data if it is not there yet and return its verified folder. Safe to interrupt and to repeat.

    source(): documents, count and description, as `build` takes them, instead of those of the task's dataset. shards:
    of climbmix, for training. Raises Trouble where the data are there and were made from another number of them.
    """
    if shards is not None and (task.dataset != "climbmix" or not 1 <= shards <= 6542):
        raise Trouble("--shards is a number from 1 to 6542, and only for climbmix")
    if not source:
        hub = functools.partial(hub_source, task.dataset, shards or 10)
        source = pycode_source if task.dataset == "pycode" else hub
    with cache_lock(task.dataset) as root:
        folder, temporary = root / task.dataset, root / f"{task.dataset}.tmp"
        if not (folder / "meta.json").exists():
            if folder.exists():
                raise Trouble(f"{folder} holds no complete data; delete it and start again")
            try:
                build(task, *source(), temporary)
                temporary.rename(folder)
            except ImportError as error:
                raise Trouble(f"{error}; run: pip install -e .") from None
            except OSError as error:
                raise Trouble(f"cannot write the data to {root}: {error.strerror or error}") from None
        elif shards and (made_from := len(read_meta(task)["source"]["files"]) - 1) != shards:
            raise Trouble(f"{folder} was made from {made_from} shards; delete it to make it from {shards}")
    return verify(task)


def read_meta(task):
    """What meta.json says of the task's data; raises OSError or ValueError where it cannot be read."""
    return json.loads((cache_root() / task.dataset / "meta.json").read_text())


def verify(task):
    """The task's data folder, after checking that it is complete and unchanged; raises Trouble if it is not.

    The large train.bin is checked by its size alone; a change there could not fake a score.
    """
    folder = cache_root() / task.dataset
    run = f"run: python prepare.py {'' if task.name in TASKS else '--text PATH... '}--task {task.name}"
    again = f"delete {folder} and {run}"
    try:
        if not (folder / "meta.json").exists():
            raise Trouble(f"missing: data for {task.name}; {run}")
        meta = read_meta(task)
        if (meta["seq_len"], meta["vocab_size"]) != (task.seq_len, task.vocab_size):
            raise Trouble(f"the data in {folder} was made for another task; {again}")
        for part in ("train", "val"):
            if (folder / f"{part}.bin").stat().st_size != meta[part]["rows"] * (task.seq_len + 1) * 2:
                raise Trouble(f"{folder}/{part}.bin is truncated or damaged; {again}")
        for file, key in (("tokenizer.txt", "tokenizer_sha256"), ("val.bin", "val_sha256")):
            if sha256(folder / file) != meta[key]:
                raise Trouble(f"{folder}/{file} has changed since it was prepared (its SHA-256 differs); {again}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Trouble(f"{folder} cannot be read ({error}); {again}") from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The machine: its device, and its two rates
#
# The nominal rate, machine_flops(), decides how large train.py makes its model, so it is the same for all cards of a
# kind: what such a card reaches by the table below. A CPU, or a GPU that the table lacks, has none but the best
# measured so far, remembered in hardware.json.
# The measured rate, measure_flops(), is what the machine does at this moment: the exam reports it with every score as
# matmul_flops, and --check compares it with the nominal one.

# Rates of bfloat16 products with float32 accumulation, dense, in TFLOP/s, by the name that CUDA gives a card. A name
# has to match whole: a laptop's card or a MIG instance is slower than the one whose name it extends. Turing and older
# cards (RTX 2080 Ti, T4) are left out: they have no bfloat16 units, and what stands in for these varies.
NOMINAL_TFLOPS = {
    # Measured with torch 2.8: large square products (github.com/zzc0721/torch-performance-test-data, 2025).
    "NVIDIA B200": 1700,
    "NVIDIA H200": 785,
    "NVIDIA H100 80GB HBM3": 785,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 415,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 410,
    "NVIDIA L40S": 270,
    "NVIDIA A100-SXM4-80GB": 265,
    "NVIDIA A100-SXM4-40GB": 265,
    "NVIDIA H20": 142,
    "NVIDIA RTX A6000": 123,
    "NVIDIA GeForce RTX 5090": 236,
    "NVIDIA GeForce RTX 4090": 163,
    "NVIDIA GeForce RTX 4090 D": 149,
    "NVIDIA GeForce RTX 4070 SUPER": 74,
    "NVIDIA GeForce RTX 4060 Ti": 43,
    "NVIDIA GeForce RTX 3090": 76,
    "NVIDIA GeForce RTX 3080 Ti": 76,
    # The best products found (MAMF table of github.com/stas00/ml-engineering).
    "NVIDIA A100 80GB PCIe": 250,
    "NVIDIA A100-PCIE-40GB": 250,
    # NVIDIA's datasheets: GeForce cards reach theirs, and those that a low limit of power holds back 0.5 to 0.75.
    "NVIDIA H100 NVL": 620,
    "NVIDIA H200 NVL": 620,
    "NVIDIA H100 PCIe": 550,
    "NVIDIA RTX 6000 Ada Generation": 260,
    "NVIDIA A40": 110,
    "NVIDIA A10": 85,
    "NVIDIA A10G": 55,
    "NVIDIA L4": 60,
    "NVIDIA GeForce RTX 5080": 113,
    "NVIDIA GeForce RTX 5070 Ti": 88,
    "NVIDIA GeForce RTX 5070": 62,
    "NVIDIA GeForce RTX 4080 SUPER": 104,
    "NVIDIA GeForce RTX 4080": 97,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88,
    "NVIDIA GeForce RTX 4070 Ti": 80,
    "NVIDIA GeForce RTX 4070": 58,
    "NVIDIA GeForce RTX 4060": 30,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 3080": 60,
    "NVIDIA GeForce RTX 3070 Ti": 43,
    "NVIDIA GeForce RTX 3070": 41,
    "NVIDIA GeForce RTX 3060 Ti": 32,
    "NVIDIA GeForce RTX 3060": 26,
}
FIT_SPEED = 0.75  # share of the nominal rate below which --check complains


def machine_flops(again=False):
    """Dense bf16 matrix-multiply rate of this machine's GPU, else CPU, in FLOP/s, to size a model by.

    It is the same for all GPUs of a kind; a CPU, and a GPU of no known kind, is measured once and remembered. again:
    measure once more, and remember the result if it is higher by a tenth: other programs had used the machine then.
    Less is noise, for which the sizes that follow from the rate must not change. Raises Pause for a broken GPU.
    """
    if "flops" in TOLD:
        return TOLD["flops"]
    device = ask_speed(0)["device"] if has_gpu() else "CPU"
    if device in NOMINAL_TFLOPS:
        return 1e12 * NOMINAL_TFLOPS[device]
    with cache_lock("hardware") as root:
        path, key, known = root / "hardware.json", f"{platform.node()}, {device}", {}
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            known = {name: e for name, e in json.loads(path.read_text()).items() if e["matmul_flops"] > 0}
        if again or key not in known:
            print("measuring the matrix-multiply rate of this machine", flush=True)
            measured = ask_speed(1.5)
            if key not in known or measured["matmul_flops"] > 1.1 * known[key]["matmul_flops"]:
                known[key] = measured
                write_atomically(path, json.dumps(known, indent=1) + "\n")
        return known[key]["matmul_flops"]


def ask_speed(seconds):
    """measure_flops(seconds), asked of a process that ends with the answer and leaves the GPU's memory to others.

    Raises Pause for a broken GPU, and Trouble where torch cannot be used at all.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "_speed", str(seconds)]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [exit_reason(asked.returncode)]
        raise (Pause if asked.returncode == PAUSE_CODE else Trouble)(said[-1].removeprefix("prepare.py: "))
    return json.loads(asked.stdout.splitlines()[-1])


def answer_speed(seconds):
    """The other side of ask_speed: prints the answer; returns the exit code."""
    try:
        print(json.dumps(measure_flops(seconds)))
        return 0
    except Pause as fault:
        print(f"prepare.py: {fault}", file=sys.stderr)
        return PAUSE_CODE


def matmul_dtype():
    """The torch dtype of fast matrix products: bfloat16, but float32 on a CPU without AVX-512.

    There torch multiplies bfloat16 in a plain loop, a hundred times slower.
    """
    import torch

    fast = has_gpu() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


def measure_flops(seconds=1.5):
    """{device, matmul_flops}: the best of many timed products of square matrices, three samples at least.

    Raises Pause for a broken GPU.
    """
    import torch

    device = find_device()
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024

    def sample(products):
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / products

    try:
        a = torch.randn(size, size, dtype=matmul_dtype(), device=device)
        sample(1)  # not counted: it loads the library and its kernels, which takes as long as a hundred products
        end, samples = time.monotonic() + seconds, []
        while len(samples) < 3 or time.monotonic() < end:
            samples.append(sample(5))
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    except RuntimeError as error:
        raise (Pause(device_fault(error)) if cuda else error) from None
    return {"device": name, "matmul_flops": 2 * size**3 / min(samples)}


def find_device(kind=None):
    """The torch.device "cuda" or "cpu", tried out. kind: its type; None: device_kind().

    Raises Pause for a GPU that torch cannot use: to go on without it would be another experiment.
    """
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
    visible, advice = os.environ.get("CUDA_VISIBLE_DEVICES"), "nvidia-smi tells whether the driver works"
    if not torch.version.cuda:
        advice = f"torch {torch.__version__} is a build for the CPU: install one for CUDA (see pytorch.org)"
    elif not os.path.exists("/dev/nvidia-uvm") and not os.path.exists("/dev/dxg"):
        advice = "/dev/nvidia-uvm is missing: run nvidia-modprobe -u -c=0, or nvidia-smi, once as root"
    elif "busy or unavailable" in said:
        advice = "another program has it to itself: end that one, or allow several with nvidia-smi -c DEFAULT"
    elif "out of memory" in said:
        advice = "end the other programs that use it (nvidia-smi shows them)"
    elif "No CUDA GPUs" in said or "invalid device" in said:
        named = f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible else "a GPU in MIG mode has to be divided"
        advice = f"{named}: nvidia-smi -L lists the GPUs and MIG instances that there are"
    return f"the GPU cannot be used ({said}); {advice}; CUDA_VISIBLE_DEVICES= trains on the CPU"


def device():
    """The torch.device that this run is for, "cuda" or "cpu": train.py asks here, so that it never takes the other.

    Ends the program, with one sentence, for a GPU that torch cannot use.
    """
    try:
        return find_device(TOLD.get("device"))
    except Pause as fault:
        raise SystemExit(f"train.py: {fault}") from None


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
HEADER_LIMIT = 2**25  # bytes of the safetensors header, which holds the program
# In safetensors' names, and in torch's. Others (8 bits and fewer, quantised, half complex) have kernels few have tried.
STORED_DTYPES = frozenset("BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64 C64".split())
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
    rows = max(1, (2**27 if device == "cuda" else 2**23) // (task.seq_len * task.vocab_size))
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


@functools.cache
def plain_dtypes():
    """The dtypes that tensors of a sealed model may have."""
    import torch

    return frozenset(getattr(torch, name) for name in DTYPES)


def check_results(results):
    """Refuse tensors of other dtypes, and those so large that a product of two sizes may wrap around."""
    for tensor in results if isinstance(results, (list, tuple)) else (results,):
        if tensor.dtype not in plain_dtypes() or max((tensor.numel(), *tensor.shape)) > MOST_ELEMENTS:
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


def load_tensor(file, name):
    """One tensor of an open safetensors file; raises Refused for a dtype that sealed models have no use for."""
    import torch

    dtype = file.get_slice(name).get_dtype()
    if dtype not in STORED_DTYPES:
        raise Refused(f"the submission holds a tensor of {dtype}, which is not allowed in a sealed model")
    tensor = file.get_tensor(name)
    return tensor.view(torch.uint8) != 0 if dtype == "BOOL" else tensor  # kernels count on bytes of 0 and 1


def load_sealed(path):
    """(program, forward) of a submission; raises Refused for anything but plain tensors and allowed calls."""
    import safetensors
    import torch

    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
                raise Refused(f"the submission is not a sealed model: its header exceeds {HEADER_LIMIT >> 20} MB")
        with safetensors.safe_open(path, "pt") as file:
            program = json.loads((file.metadata() or {})["program"])
            device = program["device"]
            if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
                raise Refused(f"the model was sealed for a device that is not here: {device!r}")
            names = {name for name in program["tensors"].values() if name is not None}
            if len(names) > MOST_TENSORS:
                raise Refused(f"the model has more than {MOST_TENSORS} tensors")
            tensors = {name: load_tensor(file, name).to(device) for name in names}
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
        report = {"steps": self._steps, "tokens": self._tokens, "params": self._params}
        if self._program["device"] == "cuda":
            report["peak_vram_mb"] = torch.cuda.max_memory_allocated() / 2**20
        if self._channel:
            self._channel.sendall(json.dumps({"submit": report}).encode() + b"\n")
            while self._channel.recv(1):  # the proctor ends this process; nothing after this line counts
                pass
            raise SystemExit(0)
        if self._program["device"] == "cuda":
            torch.cuda.empty_cache()  # the exam needs room beside what this process still holds
        result = {"outcome": "ok", "training_seconds": seconds, **report}
        try:
            with Examiner(None) as examiner:
                result |= finish_exam(examiner, self._path, TASK, verify(TASK), None)
        finally:
            shutil.rmtree(self._path.parent)
        print_summary(result)


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox: Landlock rules and a filter of system calls, for the candidate and for the examiner


def openings(root, hidden):
    """Yield the paths that together make up the folder `root` without the `hidden` files and folders below it."""
    hidden = {path for path in hidden if path == root or path.startswith(os.path.join(root, ""))}
    ancestors = {parent for path in hidden for parent in Path(path).parents}

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
    """[(path, rights)] of a process that runs Python: system libraries and devices, `readable` and `writable` paths.

    What it needs of its own entry in /proc, start_confined() adds.
    """
    from landlockpy import AccessFS, fs_for_abi

    here, listing, reading = str(Path(__file__).resolve().parent), AccessFS.READ_DIR, AccessFS.READ_FILE
    hidden = {here, str(cache_root()), *hidden}
    roots = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/sbin", "/sys", *filter(None, sys.path)}
    roots |= {"/nix/store", "/run/opengl-driver"}  # where NixOS has Python and the libraries of the GPU's driver
    roots |= set(filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    roots |= {f"/etc/{name}" for name in ("alternatives", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")}
    # Of /proc, what tells of the machine and stays the same: counters could be moved, and processes named, to be read.
    roots |= {f"/proc/{name}" for name in ("bus", "cpuinfo", "devices", "driver", "filesystems", "meminfo", "modules")}
    roots |= {f"/proc/{name}" for name in ("stat", "sys", "uptime", "version")}
    roots = {os.path.realpath(root) for root in roots if os.path.exists(root)} - {here, "/"}
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


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38
CANDIDATE_GOES, EXAMINER_GOES = 1000, 500  # oom_score_adj: who goes first where memory runs out
M_PERTURB, M_MMAP_MAX, M_TRIM_THRESHOLD = -6, -4, -1  # mallopt


LIBC = ctypes.CDLL(None)  # opened once: after a fork, a lock of the loader may be held for good


def prctl(option, value):
    """Linux process control; does nothing elsewhere."""
    if sys.platform == "linux":
        LIBC.prctl(option, value, 0, 0, 0)


# What Landlock does not rule. A line is a group of system calls, as (number on x86_64, number on aarch64 or None), with
# what becomes of a call: an error, or "ignore", which answers 0 and does nothing.
IGNORE = 0
SYSTEM_CALLS = (
    # A server could be reached, or something left behind for a later trial: bind, io_uring_setup, System V memory,
    # semaphores and queues, mq_open, add_key, request_key, keyctl, setxattr in its four forms.
    (errno.EACCES, ((49, 200), (425, 425), (29, 194), (30, 196), (64, 190), (68, 186), (240, 180))),
    (errno.EACCES, ((248, 217), (249, 218), (250, 219), (188, 5), (189, 6), (190, 7), (463, 463))),
    # connect. A driver that looks for its service (CUDA for MPS) hears that there is none.
    (errno.ENOENT, ((42, 203),)),
    # removexattr in its four forms; file_setattr, the flags of any file of the user.
    (errno.EACCES, ((197, 14), (198, 15), (199, 16), (466, 466), (469, 469))),
    # The page cache, which tells what an earlier process read: mincore, cachestat, process_madvise.
    (errno.EACCES, ((27, 232), (451, 451), (440, 440))),
    (errno.ENOSYS, ((327, 286), (328, 287))),
    (IGNORE, ((221, 223),)),  # fadvise64
    # What others do: syslog, inotify_init, inotify_init1, fanotify_init.
    (errno.EACCES, ((103, 116), (253, None), (294, 26), (300, 262))),
    # New namespaces (clone3 would hide its flags), and what looks into the kernel: unshare, setns, perf_event_open,
    # bpf, userfaultfd. truncate by path, which Landlock rules from ABI 3 on.
    (errno.ENOSYS, ((435, 435),)),
    (errno.EACCES, ((272, 97), (308, 268), (298, 241), (321, 280), (323, 282), (76, 45))),
    # Modes, owners and times could mark any file of the user, but honest tools set them on files of their own: chmod,
    # chown, utime and their variants.
    (IGNORE, ((90, None), (91, 52), (268, 53), (452, 452), (92, None), (93, 55), (94, None), (260, 54))),
    (IGNORE, ((132, None), (235, None), (261, None), (280, 88))),
    # Whoever stays in the process group of the candidate ends with it: setpgid, setsid.
    (IGNORE, ((109, 154), (112, 157))),
    # The priority of others: setpriority, ioprio_set.
    (IGNORE, ((141, 140), (251, 30))),
)
# Calls that are allowed with certain arguments alone: (otherwise, calls, ((argument, mask, allowed values), ...)). The
# filter compares 32 bits; the upper half of argument 4 is 4.5.
NEW_NAMESPACE = 0x7E020000 | 0x80  # CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, _NEWTIME
EVERY_BIT = 0xFFFFFFFF
SOME_SYSTEM_CALLS = (
    # socket: CUDA asks for one to MPS. socketpair: no datagrams, which could be sent to a service by its name.
    (errno.EACCES, ((41, 198),), ((0, EVERY_BIT, (socket.AF_UNIX,)), (1, 0xF, (socket.SOCK_SEQPACKET,)))),
    (
        errno.EACCES,
        ((53, 199),),
        ((0, EVERY_BIT, (socket.AF_UNIX,)), (1, 0xF, (socket.SOCK_STREAM, socket.SOCK_SEQPACKET))),
    ),
    (errno.EACCES, ((44, 206),), ((4, EVERY_BIT, (0,)), (4.5, EVERY_BIT, (0,)))),  # sendto: no address
    (errno.EACCES, ((302, 261),), ((0, EVERY_BIT, (0,)),)),  # prlimit: of the process itself
    # sched_setaffinity, sched_setparam, sched_setscheduler, sched_setattr: of the calling thread.
    (IGNORE, ((203, 122), (142, 118), (144, 119), (314, 274)), ((0, EVERY_BIT, (0,)),)),
    (errno.EACCES, ((56, 220),), ((0, NEW_NAMESPACE, (0,)),)),  # clone
)
# Calls that are refused with certain arguments alone: (calls, argument, mask, refused values).
REFUSED_ARGUMENTS = (
    # fcntl: F_SETOWN, F_SETSIG and F_SETOWN_EX would signal others, F_SETLEASE holds up who opens a file, F_NOTIFY.
    (((72, 25),), 1, EVERY_BIT, (8, 10, 15, 1024, 1026)),
    # ioctl by its kind: flags and numbers of files (f, v, X, btrfs), owners of sockets.
    (((16, 29),), 1, 0xFF00, (0x6600, 0x7600, 0x5800, 0x9400, 0x8900)),
    (((28, 233),), 2, EVERY_BIT, (20, 21)),  # madvise: MADV_COLD and MADV_PAGEOUT drop pages from the page cache
)
# The process that reads a sealed model needs less still: no other program or process, and none to look into (execve,
# execveat, fork, vfork, ptrace, process_vm_readv, process_vm_writev; clone makes threads).
READER_CALLS = ((errno.EACCES, ((59, 221), (322, 281), (57, None), (58, None), (101, 117), (310, 270), (311, 271))),)
CLONE_THREAD = 0x10000
SOME_READER_CALLS = ((errno.EACCES, ((56, 220),), ((0, CLONE_THREAD, (CLONE_THREAD,)),)),)

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH


def signal_calls():
    """(calls, some calls) that keep a process from signalling others where Landlock, before ABI 6, cannot.

    tkill, rt_sigqueueinfo, rt_tgsigqueueinfo and pidfd_send_signal are closed; kill and tgkill reach this process, and
    kill its group.
    """
    closed = (errno.EPERM, ((200, 130), (129, 138), (297, 240), (424, 424)))
    return (closed,), ((errno.EPERM, ((62, 129), (234, 131)), ((0, EVERY_BIT, (0, os.getpid())),)),)


def filter_system_calls(calls, some_calls):
    """Install a seccomp filter for this process and all that it starts; does nothing on other architectures.

    calls, some_calls: as SYSTEM_CALLS and SOME_SYSTEM_CALLS.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        return
    column, architecture = ARCHITECTURES[machine]
    load, mask_with, equal, at_least, end = 0x20, 0x54, 0x15, 0x35, 0x06
    answer, allow = 0x50000, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, answer + errno.EACCES)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 2**30), (end, 0, 0, answer + errno.EACCES)]  # x32 has all calls again
    for otherwise, group, tests in [*((*line, ()) for line in calls), *some_calls]:
        verdict = []
        for argument, mask, allowed in tests:
            verdict += [(load, 0, 0, int(16 + 8 * argument)), (mask_with, 0, 0, mask)]
            verdict += [(equal, len(allowed) - place, 0, value) for place, value in enumerate(allowed)]
            verdict += [(end, 0, 0, answer + otherwise)]
        verdict += [(end, 0, 0, allow if tests else answer + otherwise)]
        for numbers in group:
            if numbers[column] is not None:
                code += [(equal, 0, len(verdict), numbers[column]), *verdict]
    for group, argument, mask, refused in REFUSED_ARGUMENTS:
        verdict = [(load, 0, 0, 16 + 8 * argument), (mask_with, 0, 0, mask)]
        verdict += [(equal, len(refused) - place, 0, value) for place, value in enumerate(refused)]
        verdict += [(end, 0, 0, allow), (end, 0, 0, answer + errno.EACCES)]
        for numbers in group:
            code += [(equal, 0, len(verdict), numbers[column]), *verdict]
    code += [(end, 0, 0, allow)]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(lines)))
    if LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError("the kernel refused the seccomp filter")


def thread_limit():
    """RLIMIT_NPROC for a candidate: the threads that its user has, and room for its own. The kernel exempts root."""
    import psutil

    user, threads = os.getuid(), THREAD_LIMIT
    if not user:
        return -1
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            threads += process.num_threads() if process.uids().real == user else 0
    return threads


def start_confined(command, rules, pass_fds=(), first_to_go=CANDIDATE_GOES, **options):
    """Popen `command` in its own session, under Landlock `rules` (None: unconfined), to die with this process.

    Its process group has the number of the process and is nobody else's: see kill_group(). first_to_go: its
    oom_score_adj, since where memory runs out, a candidate has to go before all others.
    """
    import resource

    threads = thread_limit()
    scoped, on_gpu = landlock_abi() >= 6, has_gpu()
    own = os.open("/proc/self/task", os.O_PATH | os.O_DIRECTORY) if rules is not None else None

    def confine():
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(first_to_go))
        if rules is not None:
            for capability in range(64):  # root's would open the environment of other processes in /proc
                prctl(PR_CAPBSET_DROP, capability)
            # NVIDIA's driver names the threads that it starts by writing /proc/self/task/<thread>/comm, and gives up
            # where it may not. The rule belongs to an inode that the kernel may drop and make anew, so the process
            # holds it open.
            os.dup2(os.open("/proc/self/task", os.O_PATH | os.O_DIRECTORY), own)
            access = landlockpy.AccessFS
            reading = access.READ_FILE | access.READ_DIR
            naming = access.WRITE_FILE | access.TRUNCATE if on_gpu else reading
            of_itself = [("/proc/self", reading), ("/proc/self/task", reading | naming)]
            scopes = landlockpy.Scope.SIGNAL | landlockpy.Scope.ABSTRACT_UNIX_SOCKET
            with landlockpy.Ruleset(scoped=scopes) as ruleset:
                for path, rights in [*rules, *of_itself]:
                    ruleset.allow_path(path, rights)
                ruleset.restrict()  # also sets no_new_privs, without which a filter would need root
            calls, some_calls = ((), ()) if scoped else signal_calls()
            filter_system_calls(SYSTEM_CALLS + calls, SOME_SYSTEM_CALLS + some_calls)

    if rules is not None:
        import landlockpy

        pass_fds = (*pass_fds, own)
    try:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=confine, pass_fds=pass_fds, **options)
    finally:
        if own is not None:
            os.close(own)


def landlock_abi():
    """The kernel's Landlock version; 0 without it."""
    level = sandbox_level()
    return 0 if level == "none" else int(level.split()[1])


FILE_LIMIT = 8 * 2**30  # bytes of one file
DISK_LIMIT = 10 * 2**30  # bytes by which the disk may fill up during a trial
INODE_LIMIT = 200_000  # files, likewise
COPY_LIMIT = 30.0  # seconds for a copy of what a candidate has compiled
COMPILED_LIMIT = 2**29  # bytes of it
DISK_RESERVE = 2**28  # bytes that a trial leaves free
MEMORY_SHARE = 0.9  # of the machine's memory, for the candidate and its children together
PROCESS_LIMIT = 128  # processes of a candidate, counted once a second
THREAD_LIMIT = 2048  # threads and processes that a candidate can start, as an ordinary user
LOG_LIMIT = 2**20  # bytes of a candidate's output that are kept

# What a trial inherits of the environment: no keys, and no folders to write to.
ENVIRONMENT = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|PYTHONPATH"
    r"|(?!TORCH_TRACE|TORCH_LOGS_OUT|TORCH_HOME|TRITON_HOME|(?:TORCH|TRITON)\w+_DIR|CUDA_CACHE_PATH)"
    r"(CUDA|NVIDIA|OMP|MKL|TORCH|TRITON|PYTORCH)_\w+"
)


def environment():
    """Of this process's environment, what the processes of a trial inherit."""
    return {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}


def room_environment(room, told):
    """Environment of a trial's process in the folder `room`, `told` to it by the proctor: a dict of strings."""
    return environment() | {
        "AUTORESEARCH_TRIAL": json.dumps(told),
        "HOME": str(room),
        "TMPDIR": str(room),
        "TORCHINDUCTOR_CACHE_DIR": str(room / "compiled"),
        "TRITON_CACHE_DIR": str(room / "compiled" / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker pool would need the machine's shared memory
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


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


def exit_code(child):
    """Return code of a Popen whose process has ended, else None. It stays a zombie: its group's number is not free."""
    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended and (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def kill_group(child):
    """Kill a confined Popen and all that it started, at one stroke.

    The filter keeps them in its process group, and the kernel signals a group and forks under one lock: no process can
    slip through by forking faster than it is killed.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def has_ended(process):
    """Whether a psutil Process was a child of this one and has ended; it is reaped."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(process.pid, os.WNOHANG)[0] > 0
    return False


def end_processes(keep=None):
    """Kill and reap every descendant but `keep`. Orphans cannot escape: this process is their subreaper.

    Raises Pause for a process that the kernel does not end, as one that waits for a dead disk or GPU.
    """
    import psutil

    deadline = time.monotonic() + 60
    while alive := descendants(keep):
        if time.monotonic() > deadline:
            raise Pause(f"processes of the candidate cannot be ended: {[process.pid for process in alive][:9]}")
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in alive:
            has_ended(process)
        time.sleep(0.01)


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


def numbers(values, limit=16):
    """Those items of a candidate's report that are a short name with a finite number, at most `limit`."""
    items = values.items() if isinstance(values, dict) else ()
    fine = [(k[:32], v) for k, v in items if type(v) in (int, float) and abs(v) < 1e15 and k.isidentifier()]
    return dict(fine[:limit])


class Watch:
    """A candidate from its start to its end, as the proctor sees it: every limit is enforced here.

    The clock runs from the moment before the training rows are handed over to the moment after every process of the
    candidate has been killed, so that whatever was done with text lies between two readings of it.
    """

    last_to_go = CANDIDATE_GOES  # oom_score_adj below which a process wants others to be ended before it

    def __init__(self, child, examiner, channel, output, task, out):
        import psutil

        self.child, self.examiner, self.channel, self.output = child, examiner, channel, output
        self.task, self.out, self.log = task, out, Log(out / "log.txt")
        self.started, self.begun, self.ended = time.monotonic(), None, None
        self.deadline, self.next_look = self.started + task.startup_limit, self.started
        self.outcome = self.reason = None
        self.report, self.peak, self.cpu_at_begin, self.logged = {}, 0, 0.0, 0
        disk = os.statvfs(out)
        self.shared_at_start = psutil.virtual_memory().shared
        self.disk_floor = max(DISK_RESERVE, disk.f_bavail * disk.f_frsize - DISK_LIMIT)
        self.inode_floor = disk.f_favail - INODE_LIMIT if disk.f_files else -math.inf  # btrfs has no such number

    def run(self, rows, at_begin):
        """Watch until the end; every process of the candidate is dead on return.

        rows: descriptor of the training rows, handed over when the candidate says begin, after at_begin().
        """
        with (
            contextlib.closing(self.log),
            open(self.out / "metrics.jsonl", "wb", 0) as metrics,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(self.channel, selectors.EVENT_READ)
            selector.register(self.output, selectors.EVENT_READ)
            try:
                while self.outcome is None:
                    code = exit_code(self.child)  # asked first: what it sent before its end is still read below
                    wait = 0 if code is not None else min(0.25, max(0.0, self.deadline - time.monotonic()))
                    for key, _ in selector.select(wait):
                        heard = self.copy_output() if key.fileobj is self.output else self.hear(rows, at_begin, metrics)
                        if not heard:
                            selector.unregister(key.fileobj)
                    if self.outcome is None:
                        self.look(code)
            finally:
                kill_group(self.child)
                self.ended = time.monotonic()
                end_processes(keep=self.examiner)
                self.child.wait()
                while self.copy_output():
                    pass

    def copy_output(self):
        """Copy a piece of what the candidate has printed to its log; false where there is none."""
        with contextlib.suppress(BlockingIOError):  # the candidate can read its pipe empty again
            data = os.read(self.output, 2**16)
            self.log.write(data)
            return bool(data)
        return self.ended is None

    def hear(self, rows, at_begin, metrics):
        """Act on one message of the candidate; false where it has closed the channel."""
        now = time.monotonic()
        try:
            data, message = self.channel.recv(2**16), {}
        except OSError:
            return True
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(data)
        if not isinstance(message, dict):
            message = {}
        if self.begun is None and "refused" in message:
            self.outcome, self.reason = "invalid", str(message["refused"])
        elif self.begun is None and "begin" in message:
            at_begin()
            self.start_clock(rows)
        elif self.begun and "log" in message and self.logged < LOG_LIMIT:
            values = {"seconds": 0.0, **numbers(message["log"])} | {"seconds": round(now - self.begun, 3)}
            with contextlib.suppress(OSError):  # a full disk costs the curve, not the trial
                self.logged += metrics.write(json.dumps(values).encode() + b"\n")
        elif self.begun and "submit" in message:
            self.outcome = "ok"
            self.report = message["submit"] if isinstance(message["submit"], dict) else {}
        return bool(data)

    def start_clock(self, rows):
        """Hand over the training rows; the clock is read before anything that a candidate could delay."""
        self.cpu_at_begin = cpu_reaped() + cpu_seconds(descendants(self.examiner))
        self.begun = time.monotonic()
        self.deadline = self.begun + self.task.time_budget + self.task.grace
        try:
            socket.send_fds(self.channel, [b"."], [rows])
        except OSError as error:  # its end is closed or full; the channel does not block
            self.outcome, self.reason = "crash", f"it did not take the training rows: {error.strerror}"

    def look(self, code):
        """Enforce the limits; code: with which the candidate had ended before its messages were read, or None."""
        now = time.monotonic()
        if now > self.deadline:
            phase = "before begin()" if self.begun is None else "between begin() and submit()"
            self.outcome, self.reason = "timeout", f"no end after {now - (self.begun or self.started):.0f} s {phase}"
        elif code is not None:
            self.outcome, self.reason = "crash", exit_reason(code)
        elif now > self.next_look:
            self.next_look = now + 1
            self.reason = self.overdrawn()
            self.outcome = "crash" if self.reason else None

    def overdrawn(self):
        """The limit of the machine that the candidate has exceeded, in words; None where it has not."""
        import psutil

        # Orphans end as children of this process; they are reaped here, and count no longer.
        processes = [p for p in descendants(self.examiner) if p.pid == self.child.pid or not has_ended(p)]
        threads, disk = 0, os.statvfs(self.out)
        if len(processes) > PROCESS_LIMIT:
            return f"it ran more than {PROCESS_LIMIT} processes"
        machine = psutil.virtual_memory()
        memory = max(0, machine.shared - self.shared_at_start)  # files in memory are in no process's account
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                memory += process.memory_info().rss
                threads += process.num_threads()
                goes = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
                if os.getpgid(process.pid) == self.child.pid and goes < self.last_to_go:
                    return "it wanted others to be ended before it where memory runs out"
        self.peak = max(self.peak, memory)
        if threads > THREAD_LIMIT:
            return f"it ran more than {THREAD_LIMIT} threads"
        if memory > MEMORY_SHARE * machine.total:
            return f"it took {memory / 2**30:.0f} GB of memory"
        if disk.f_bavail * disk.f_frsize < self.disk_floor or disk.f_favail < self.inode_floor:
            return "it filled the disk"
        return None

    def facts(self):
        """The first part of result.json."""
        training = self.ended - self.begun if self.begun else 0.0
        cpu, cores = max(0.0, cpu_reaped() - self.cpu_at_begin) if self.begun else 0.0, len(os.sched_getaffinity(0))
        if self.outcome == "ok" and training > self.task.time_budget + self.task.grace:
            self.outcome, self.reason = "timeout", f"its submission was complete after {training:.1f} s"
        elif self.outcome == "ok" and cpu > 1.1 * cores * training + 2:  # the second witness of the time
            self.outcome = "invalid"
            self.reason = f"its clock cannot be right: {cpu:.0f} s of CPU time in {training:.1f} s on {cores} cores"
        elif self.outcome == "crash":
            words = last_words((self.out / "log.txt").read_text(errors="replace"))
            self.reason += f": {words}" if words else ""
        return {
            "outcome": self.outcome,
            "reason": self.reason and one_line(self.reason, 2500),
            "startup_seconds": round((self.begun or self.ended) - self.started, 3),
            "training_seconds": round(training, 3),
            "cpu_seconds": round(cpu, 3),
            "peak_rss_mb": round(self.peak / 2**20, 1),
            **numbers({key: self.report.get(key) for key in ("steps", "tokens", "params", "peak_vram_mb")}),
        }


def cpu_seconds(processes):
    """CPU seconds that psutil Processes, and those that they have reaped, have used."""
    import psutil

    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def cpu_reaped():
    """CPU seconds of all processes that this one has reaped, and that those have reaped, by the kernel's account."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_line(text, limit):
    """A candidate's words, fit to be printed: one line without control characters, at most `limit` characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:limit]


def exit_reason(code):
    """A process's return code in words."""
    return f"exit code {code}, without submit()" if code >= 0 else f"killed: {signal.strsignal(-code) or -code}"


EXCEPTION = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration|Unsupported|Refused)\b.*")


def last_words(log):
    """The line of a log that tells why its program ended; "" for an empty one.

    After a traceback that is the line which names the exception: advice and complaints about leaks may follow it.
    """
    lines = [line.strip() for line in log.strip().splitlines()] or [""]
    last = lines[-1]
    *_, traced = log.rpartition("Traceback (most recent call last):")
    named = [line for line in traced.splitlines() if EXCEPTION.match(line)]
    if traced is not log and named and not last.startswith("train.py: "):
        last = named[-1].strip()
    return last[:300]


def take_submission(room, out):
    """Move the candidate's file out of its reach: (its path, {}), or (None, outcome and reason) unless it is plain."""
    path, kept = room / "model.safetensors", out / "model.safetensors"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > FILE_LIMIT:
            return None, {"outcome": "invalid", "reason": "the submission is not a plain file"}
        path.rename(kept)
    except OSError as error:
        return None, {"outcome": "invalid", "reason": f"the submission cannot be read ({error.strerror})"}
    return kept, {}


def copy_folder(source, target, rules):
    """Copy a folder that a candidate has filled, links as links, under sandbox `rules`.

    A copy that fails or is larger than COMPILED_LIMIT is removed: a trial can do without.
    """
    command = ["timeout", "-s", "KILL", str(COPY_LIMIT), "cp", "-RPT", "--", source, target]
    try:
        target.mkdir()
        failed = start_confined(command, rules, stderr=subprocess.DEVNULL).wait()
        size = subprocess.run(["du", "-sb", "--", target], capture_output=True, text=True).stdout.split()
        failed = failed or not size or int(size[0]) > COMPILED_LIMIT
    except OSError:  # a full disk
        failed = True
    if failed:
        remove(target)
    with contextlib.suppress(OSError):
        target.rmdir()  # where nothing was compiled, torch may leave an empty folder


def move_compiled(folder, old, new):
    """Have Triton find its kernels in a compile cache that was copied: it lists them by absolute paths.

    old, new: the room in which the cache was filled, and the one that it serves. Links are not followed.
    """
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith("__grp__") and name.endswith(".json"):
                with contextlib.suppress(OSError):
                    descriptor = os.open(os.path.join(where, name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                    with open(descriptor, "r+b") as file:
                        content = file.read(2**20).replace(os.fsencode(old) + b"/", os.fsencode(new) + b"/")
                        file.seek(0)
                        file.truncate()
                        file.write(content)


def memory_errors():
    """Errors that the memory of the GPUs has made and could not correct, by their driver's count; 0 where none counts.

    After one, the next process may find the device well, and what the error has broken would look like a crash.
    """
    query = ["nvidia-smi", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if has_gpu():
            said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
            return sum(int(line) for line in said.split() if line.isdigit())
    return 0


def lay_out_room(out, source, warm):
    """Make the folder that a candidate runs in: train.py (`source`, bytes), prepare.py, and what `warm` had compiled.

    Raises Pause where the disk is full.
    """
    room = out / "room"
    remove(room)
    room.mkdir(parents=True)
    for stale in ("result.json", "model.safetensors"):
        (out / stale).unlink(missing_ok=True)
    (room / "train.py").write_bytes(source)
    shutil.copyfile(__file__, room / "prepare.py")
    if shutil.disk_usage(out).free < 2 * DISK_RESERVE:
        raise Pause(f"the disk that holds {out} is full; a trial needs {2 * DISK_RESERVE / 2**30:.1f} GB")
    if warm and (warm / "compiled").is_dir():
        copy_folder(warm / "compiled", room / "compiled", None)
        try:
            move_compiled(room / "compiled", warm / "room", room)
        except RecursionError:  # folders too deep to be a cache
            remove(room / "compiled")
    return room


def start_candidate(room, rules, task, seed, flops):
    """Start the train.py of a room: (its Popen, our end of the channel to it, descriptor of what it prints)."""
    # Messages stay whole, and the end of one side is seen by the other.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output, child_output = os.pipe()
    told = {"task": dataclasses.asdict(task), "seed": seed, "flops": flops, "device": device_kind()}
    told["fd"] = theirs.fileno()
    streams = {"stdin": subprocess.DEVNULL, "stdout": child_output, "stderr": child_output}
    command, passed = [sys.executable, "train.py"], [theirs.fileno()]
    try:
        child = start_confined(command, rules, cwd=room, env=room_environment(room, told), pass_fds=passed, **streams)
    finally:
        os.close(child_output)
        theirs.close()
    ours.setblocking(False)
    os.set_blocking(output, False)
    return child, ours, output


def follow(watch, rows, at_begin):
    """Watch a candidate to its end and return the facts. What goes wrong here meanwhile may be its doing: a crash."""
    import psutil

    try:
        watch.run(rows, at_begin)
    except (OSError, subprocess.SubprocessError, psutil.Error, RuntimeError, MemoryError) as error:
        kill_group(watch.child)
        watch.ended = watch.ended or time.monotonic()
        watch.outcome, watch.reason = "crash", f"the machine gave way while it ran ({one_line(error, 200)})"
    return watch.facts()


def trial(train_py, out, task, seed, sandbox=True, beat=None, flops=None, warm=None):
    """Run the candidate `train_py` once in the folder `out` and score it; returns what it writes to out/result.json.

    beat: val_bpb below which the score matters, so that the exam looks closer (None: always). flops: what the candidate
    is told by machine_flops(). warm: `out` of an earlier run, with whose compiled code this one starts. Raises Trouble
    or OSError, with nothing started, where data or disk are not fit, and Pause where the machine is at fault.
    """
    folder, flops, begun = verify(task), flops or machine_flops(), time.monotonic()
    errors = memory_errors()
    source = Path(train_py).resolve().read_bytes()
    level = sandbox_level() if sandbox else "none"
    hidden = read_meta(task).get("hidden_folders", [])
    compiled = out / "compiled"

    def rules(readable, writable):
        return None if level == "none" else sandbox_rules(readable, writable, hidden)

    def keep_compiled():
        # A compile cache is a folder of code, in which trained weights could travel as well: so it is copied before the
        # candidate has seen any text, and not at all where text can be read without being handed out.
        remove(compiled)
        if (room / "compiled").exists() and not hidden:
            copy_folder(room / "compiled", compiled, rules([room], [compiled]))

    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as stack:
        stack.callback(remove, out / "room")
        room = lay_out_room(out, source, warm)
        examiner = stack.enter_context(Examiner(rules([out, __file__], [])))
        rows = stack.enter_context(open(folder / "train.bin", "rb"))
        stack.callback(end_processes)
        child, channel, output = start_candidate(room, rules([], [room]), task, seed, flops)
        stack.callback(os.close, output)
        watch = Watch(child, examiner.process, stack.enter_context(channel), output, task, out)
        result = follow(watch, rows.fileno(), keep_compiled)
        if examiner.process.poll() is not None:  # where memory ran out, the kernel may have ended it as well
            examiner = stack.enter_context(Examiner(rules([out, __file__], [])))
        submission, refused = take_submission(room, out) if result["outcome"] == "ok" else (None, {})
        result |= refused | finish_exam(examiner, submission, task, verify(task), beat)
    if result["outcome"] != "ok" and memory_errors() > errors:
        raise Pause(
            "the GPU's memory made errors during the trial (nvidia-smi -q -d ECC); a reset or a restart may help"
        )
    result |= {"total_seconds": round(time.monotonic() - begun, 3), "task": task.name, "budget": task.time_budget}
    result |= {"seed": seed, "sandbox": level, "python": platform.python_version()}
    result["sha256"] = {"train.py": hashlib.sha256(source).hexdigest(), **fingerprints(task)}
    write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def fingerprints(task):
    """SHA-256 of everything besides train.py that decides a score: prepare.py, the tokenizer, the validation rows."""
    verify(task)
    meta = read_meta(task)
    return {"prepare.py": sha256(__file__), "tokenizer": meta["tokenizer_sha256"], "val": meta["val_sha256"]}


def remove(folder):
    """Delete a folder that a candidate may have made deep and hard to delete; links are not followed."""
    for command in (("chmod", "-R", "u+rwX"), ("rm", "-rf")):
        with contextlib.suppress(OSError):  # no process can be started, while a candidate fills the table of them
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
# The exam: readers, each a fresh process, answer questions about the sealed model; the proctor, which never runs it,
# puts the questions, adds up and judges
#
# A reader is forked for one question from an isolated interpreter that has done nothing but import torch. It sees every
# row at most once, either as it is or with its end replaced, and learns the targets of a batch when it has computed its
# logits. So there is nothing that it could remember, and nothing in its memory that could give a target away.


class Examiner:
    """The isolated interpreter that readers are forked from: it imports torch while the candidate starts up."""

    def __init__(self, rules):
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, "-I", str(Path(__file__).resolve()), "_exam", str(theirs.fileno())]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.errors}
        with theirs:
            passed = [theirs.fileno()]
            options = {"cwd": "/", "env": environment(), "pass_fds": passed, "first_to_go": EXAMINER_GOES}
            self.process = start_confined(command, rules, **options, **streams)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        kill_group(self.process)
        self.process.wait()
        self.errors.close()

    @contextlib.contextmanager
    def ask(self, question, deadline):
        """A Reader for `question`, a JSON value; one at a time. Its process has ended when the context is left.

        Raises Refused where the reader refuses the model or dies of it, Pause where the examiner is gone, and
        TimeoutError at `deadline` (time.monotonic()).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        dead = False
        with theirs:
            with contextlib.suppress(OSError):  # an examiner that is gone is found below
                socket.send_fds(self.channel, [json.dumps(question).encode()], [theirs.fileno()])
        try:
            yield Reader(ours, deadline)
        except EOFError:
            dead = True
        finally:
            ours.close()
            code = self.reader_ended(deadline)
        if dead:
            asked = "the sealed model broke the exam" if "path" in question else "the machine cannot be measured"
            raise Refused(f"{asked}: {self.last_error(code)}")

    def reader_ended(self, deadline):
        """Wait for the end of the present reader and return its exit code."""
        self.channel.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            code = self.channel.recv(64)
        except ConnectionError:
            code = b""
        if not code:
            raise Pause(f"the examiner is gone: {self.last_error(self.process.wait())}")
        return int(code)

    def last_error(self, code):
        """The last that the examiner has printed, else its return code in words."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return one_line(lines[-1], 300) if lines and code >= 0 else exit_reason(code)


class Reader:
    """Our end of the conversation with a reader: a byte says what follows, see `answer`."""

    def __init__(self, channel, deadline):
        self.channel, self.deadline = channel, deadline

    def receive(self, size):
        """The next `size` bytes. Raises EOFError where the reader is dead."""
        received = bytearray(size)
        place = 0
        while place < size:
            self.channel.settimeout(max(1e-3, self.deadline - time.monotonic()))
            try:
                count = self.channel.recv_into(memoryview(received)[place:])
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError
            place += count
        return received

    def send(self, data):
        self.channel.settimeout(max(1e-3, self.deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):  # what follows is the reader's last word, or its end
            self.channel.sendall(data)

    def expect(self, kind):
        """Take the byte that announces `kind`; raises Refused with the reader's words where it is another."""
        said = self.receive(1)
        if said == kind:
            return
        words = self.receive(int.from_bytes(self.receive(4), "little") % 2**16)
        raise Refused(one_line(words.decode(errors="replace"), 2500))

    def losses(self, tokens, targets):
        """float32 nats [B, T] that the model takes for each of `targets` after `tokens`, both uint16 [B, T]."""
        self.send(tokens.tobytes())
        self.expect(READY)
        self.send(targets.tobytes())
        self.expect(LOSSES)
        losses = np.frombuffer(self.receive(4 * targets.size), dtype=np.float32).reshape(targets.shape)
        if not (np.isfinite(losses).all() and losses.min() >= -1e-3):
            raise Refused("the exam of the sealed model gave losses that are no losses")
        return losses


READY, LOSSES, SPEED, REFUSED = b"k", b"l", b"s", b"r"


def exam(descriptor):
    """The examiner's life: fork a reader for each question that comes through the socket `descriptor`."""
    import resource

    import torch  # noqa: F401 - imported before a question comes, while the candidate starts up

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # of complaints; it writes no other file
    channel = socket.socket(fileno=descriptor)
    while True:
        question, descriptors, _, _ = socket.recv_fds(channel, 2**16, 1)
        if not question:
            return
        if not (reader := os.fork()):
            channel.close()
            answer(json.loads(question), socket.socket(fileno=descriptors[0]))
            os._exit(0)
        os.close(descriptors[0])
        _, status = os.waitpid(reader, 0)
        channel.send(b"%d" % os.waitstatus_to_exitcode(status))


# What the operators of a sealed model raise; anything else is a fault of ours.
MODEL_FAULTS = (RuntimeError, TypeError, LookupError, ArithmeticError, ValueError, AttributeError, MemoryError)


def answer(question, channel):
    """A reader's life: {"device"} alone asks how fast it is; with "path", "task", "batch" for the losses of a model."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_system_calls(READER_CALLS, SOME_READER_CALLS)
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_PERTURB, 1 + os.urandom(1)[0] % 255)  # memory that was not written differs from reader to reader
        LIBC.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, and the heap does not shrink: to have the kernel
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # hand out fresh pages again and again would take half of the exam
    said = REFUSED
    try:
        if "path" in question:
            limit_memory(question["device"])
            read_rows(question, Task(**question["task"]), channel.makefile("rwb"))
            return
        said, words = SPEED, json.dumps(measure_flops(0.2))
    except BrokenPipeError:  # the proctor has seen enough
        return
    except (Refused, Pause) as refusal:
        words = str(refusal)
    except MODEL_FAULTS as error:
        words = f"the sealed model fails on the validation rows: {one_line(error, 300)}"
    data = words.encode(errors="replace")[: 2**15]
    channel.sendall(said + len(data).to_bytes(4, "little") + data)


def limit_memory(device):
    """Have a program that takes all of a CPU's memory fail by itself; on a GPU the driver maps more than there is."""
    import resource

    if device == "cpu":
        most = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def read_rows(question, task, file):
    """Answer with the losses of the model at question["path"], batch after batch, until the proctor closes `file`."""
    import torch
    import torch.nn.functional as F

    program, forward = load_sealed(question["path"])
    device, shape = question["device"], (question["batch"], task.seq_len)
    if (program["device"], program["batch"]) != (device, shape[0]):
        raise Refused(f"the model was sealed for batches of {program['batch']!r} rows on {program['device']!r}")

    def receive():
        data = np.frombuffer(file.read(2 * shape[0] * shape[1]), dtype=np.uint16)
        return torch.from_numpy(data.astype(np.int64)).view(shape).to(device) if data.size else None

    with torch.inference_mode():
        while (tokens := receive()) is not None:
            logits = compute_logits(forward, tokens, task)
            file.write(READY)
            file.flush()
            targets = receive()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            file.write(LOSSES + losses.cpu().numpy().tobytes())
            file.flush()
            del tokens, logits, targets, losses


def machine_now(examiner, deadline):
    """{device, matmul_flops} as a reader measures them; raises Pause where device or machine do not give an answer."""
    try:
        with examiner.ask({"device": device_kind()}, deadline) as reader:
            reader.expect(SPEED)
            return json.loads(reader.receive(int.from_bytes(reader.receive(4), "little")))
    except Refused as fault:
        raise Pause(str(fault)) from None
    except TimeoutError:
        raise Pause("the machine does not answer when its speed is measured; look what holds it up") from None


def finish_exam(examiner, path, task, folder, beat):
    """Have the submission at `path` scored, if there is one, and look at the machine: {device, matmul_flops, ...}.

    Right after the training: is the machine as fast as it was, and is the GPU still there? With outcome and reason
    where the exam fails; raises Pause where the device does.
    """
    deadline = time.monotonic() + task.exam_limit
    facts = machine_now(examiner, deadline)
    try:
        if path:
            facts |= examine(path, task, folder, beat, examiner, deadline)
    except TimeoutError:
        facts |= {"outcome": "invalid", "reason": f"the exam took longer than {task.exam_limit:.0f} s"}
    except Refused as refusal:
        if has_gpu():  # a device that fails in mid-exam takes a model's words
            machine_now(examiner, deadline + task.exam_limit)
        facts |= {"outcome": "invalid", "reason": one_line(refusal, 2500)}
    return facts


def moved(losses, cuts, probed):
    """Largest change, from reader to reader, of a loss before its row's cut.

    losses, probed: {batch: float32 [B, T]}, all finite; cuts: [batches, B].
    """
    changes = []
    for index, others in probed.items():
        early = np.arange(others.shape[1]) < cuts[index, :, None]
        changes.append(np.abs(others - losses[index])[early].max())
    return float(max(changes))


def examine(path, task, folder, beat=None, examiner=None, deadline=None):
    """Score the sealed model at `path` on the validation rows: {outcome, val_bpb, eval_seconds, leak}.

    val_bpb = nats / ln 2 / UTF-8 bytes, over all targets but BOS. First, three batches of eight are probed for
    causality; where the score is below `beat` (None: always) every row is, twice. Raises Refused for a model that looks
    ahead, is not deterministic, or returns anything but finite logits [B, T, V], TimeoutError at `deadline`.
    """
    if examiner is None:
        with Examiner(None) as examiner:
            return examine(path, task, folder, beat, examiner, deadline)
    deadline = deadline or time.monotonic() + task.exam_limit
    started, device = time.monotonic(), device_kind()
    batch = exam_batch(task, device)
    # Rows that follow one another are often of one document: they are dealt to different batches.
    rows = np.fromfile(folder / "val.bin", dtype=np.uint16).reshape(batch, -1, task.seq_len + 1).swapaxes(0, 1)
    question = {"path": str(path), "task": dataclasses.asdict(task), "batch": batch, "device": device}

    def read(tokens, chosen):
        """{batch: losses} of a reader of its own, which is shown `tokens` [batches, B, T] and the true targets."""
        with examiner.ask(question, deadline) as reader:
            return {index: reader.losses(tokens[index], rows[index, :, 1:]) for index in chosen}

    def probe(chosen):
        """([batches, B] cuts, {batch: losses}) of a reader that sees rows whose tokens after a cut are replaced.

        A cut of T leaves its row as it is: what could move its last loss is in other rows.
        """
        chance = np.random.default_rng()  # seeded by the system's entropy, which no submission can foresee
        cuts = chance.integers(1, task.seq_len + 1, rows.shape[:2])
        replaced = chance.integers(task.vocab_size, size=rows[..., :-1].shape, dtype=np.uint16)
        late = np.arange(task.seq_len) >= cuts[..., None]
        return cuts, read(np.where(late, replaced, rows[..., :-1]), chosen)

    count = max(1, min(3 * len(rows) // 8, 1024 // batch))
    sample = probe(sorted(np.random.default_rng().permutation(len(rows))[:count].tolist()))
    losses = read(rows[..., :-1], range(len(rows)))
    spans = token_bytes(load_tokens(folder))[rows[..., 1:]]
    nats = sum(float(losses[index][spans[index] > 0].sum(dtype=np.float64)) for index in losses)
    val_bpb = nats / math.log(2) / int(spans.sum())
    leak = moved(losses, *sample)
    for _ in range(2 if beat is None or val_bpb < beat else 0):
        leak = max(leak, moved(losses, *probe(range(len(rows)))))
    if leak > LEAK_TOLERANCE:
        noise = float(np.abs(read(rows[..., :-1], [0])[0] - losses[0]).max())
        if noise > LEAK_TOLERANCE:
            raise Refused(f"the model is not deterministic: the same tokens gave losses that differ by {noise:.2g}")
        raise Refused(f"the model is not causal: tokens that come later moved the losses of earlier ones by {leak:.2g}")
    seconds = round(time.monotonic() - started, 3)
    return {"outcome": "ok", "val_bpb": val_bpb, "eval_seconds": seconds, "leak": leak}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def check(task):
    """Print a line on each thing that a night on `task` needs besides the researcher; returns the exit code."""
    code = 0
    for what, words, advice in itertools.chain(check_storage(task), check_machine(task)):
        print(f"{'NO' if advice else 'ok':<4}{what + ':':<15}{words}{'; ' * bool(advice)}{advice}", flush=True)
        code = 2 if advice else code
    return code


def check_storage(task):
    """Yield (what, words, advice) on data and disks; advice is empty where all is well, and so below."""
    try:
        rows = read_meta(task)["train"]["rows"] if verify(task) else 0
        yield "data", f"{task.name} in {cache_root() / task.dataset}, {rows:,} training rows, fingerprints match", ""
    except Trouble as trouble:
        yield "data", *in_two(trouble)
    for what, folder in (("disk for runs", Path(__file__).resolve().parent), ("disk for data", cache_root())):
        free = shutil.disk_usage(folder if folder.exists() else Path.home()).free
        yield what, f"{free / 1e9:.0f} GB free at {folder}", "" if free > 5e9 else "a night needs 5: make room"


def check_machine(task):
    """Yield (what, words, advice) on the sandbox, the GPU and the speed.

    What touches a GPU is asked of other processes, one after the other: it may be set to serve one at a time.
    """
    level, total = sandbox_level(), None
    advice = "the candidate can read and write all that you can. Linux 5.13 with Landlock switched on is needed"
    yield "sandbox", level, advice if level == "none" else ""
    try:
        free, total, words = rehearse(task, level)
        yield "trial's room", words, ""
    except Trouble as trouble:
        yield "trial's room", *in_two(trouble)
    try:
        now = ask_speed(1.5)
    except Trouble as trouble:
        yield "GPU", *in_two(trouble)
        return
    device, measured = now["device"], now["matmul_flops"]
    if not has_gpu():
        yield "GPU", "none here; training runs on the CPU", ""
    elif total:
        advice = "end the other programs that use it (nvidia-smi shows them)"
        yield "GPU", f"{device}, {free:.1f} of {total:.1f} GB free", "" if free > 0.8 * total else advice
    if device in NOMINAL_TFLOPS:
        best, why = 1e12 * NOMINAL_TFLOPS[device], "what such cards reach, for which train.py is sized"
    else:
        best, why = max(machine_flops(), measured), "the best so far"
    advice = "end what else uses the machine"
    advice += ", and look for limits of heat and power (nvidia-smi -q -d PERFORMANCE)" * has_gpu()
    words = f"{measured / 1e12:.4g} TFLOP/s measured on {device}; {best / 1e12:.4g} is {why}"
    yield "speed", words, "" if measured > FIT_SPEED * best else advice


def in_two(trouble):
    """(what is wrong, what to do) of a Trouble."""
    words, _, advice = str(trouble).partition("; ")
    return words, advice or "mend that, then look again"


# What a trial's process has to be able to do, tried in its sandbox: on a GPU, Triton compiles the kernel with gcc.
REHEARSAL = """
import json, sys, time

import torch

from prepare import device

started, x = time.time(), torch.ones(64, 64, device=device(), requires_grad=True)
double = torch.compile(lambda x: (2 * x).square().sum()) if x.is_cuda else lambda x: (2 * x).square().sum()
double(x).backward()
if x.grad.sum().item() != 8 * 64 * 64:
    sys.exit("train.py: a small product came out wrong; the machine is not to be trusted")
memory = [size / 2**30 for size in torch.cuda.mem_get_info()] if x.is_cuda else [None, None]
print(json.dumps([*memory, time.time() - started]))
"""


def rehearse(task, level):
    """Run a small program as a trial would be run: (free, total, words), the first two in GiB, None on a CPU.

    level: as of sandbox_level(). Raises Trouble, with what to do, where it fails.
    """
    runs = Path(__file__).resolve().parent / "runs"  # where trials are held: elsewhere, code may not be executable
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check-", dir=runs) as folder:
        room, output = Path(folder) / "room", Path(folder) / "output"
        room.mkdir()
        (room / "train.py").write_text(REHEARSAL)
        shutil.copyfile(__file__, room / "prepare.py")
        told = {"task": dataclasses.asdict(task), "seed": 0, "device": device_kind()}
        rules = None if level == "none" else sandbox_rules([], [room], [])
        try:
            with open(output, "wb") as file:
                streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                options = {"cwd": room, "env": room_environment(room, told), **streams}
                child = start_confined([sys.executable, "train.py"], rules, **options)
                try:
                    code = child.wait(task.startup_limit)
                finally:
                    kill_group(child)
                    child.wait()
        except subprocess.TimeoutExpired:
            raise Trouble(f"no end of a small program after {task.startup_limit:.0f} s; look at the machine") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise Trouble(f"the sandbox cannot be set up ({error}); --no-sandbox goes without") from None
        said = output.read_text(errors="replace")
    if code:
        raise Trouble(rehearsal_fault(said, code))
    free, total, seconds = json.loads(said.splitlines()[-1])
    kind = "a kernel compiled and ran on the GPU" if told["device"] == "cuda" else "a small program ran on the CPU"
    return free, total, f"{kind} in {seconds:.1f} s, {'unconfined' if rules is None else 'inside the sandbox'}"


def rehearsal_fault(said, code):
    """Why a rehearsal failed and what to do, by its output and return code."""
    reason = one_line(last_words(said) or exit_reason(code), 300)
    if "GPU cannot be used" in reason:
        return reason.removeprefix("train.py: ")
    advice = "python prepare.py trial --no-sandbox tells whether the sandbox is at fault"
    if "Python.h" in said:
        advice = "Triton needs the headers of this Python: install python3-dev (or python3-devel)"
    elif "C compiler" in said or "C++ compiler" in said:
        advice = "Triton needs a C compiler: install gcc"
    return f"a small program failed ({reason}); {advice}"


HURRY = 5.0  # seconds that a program may take to end in good order, undisturbed


def hear_signals():
    """Have Ctrl-C, kill and a closed terminal end the program by an exception; exit code 128 + the signal's number.

    Those that follow within HURRY seconds are an owner's impatience, and count for nothing: an exception in the middle
    of subprocess.Popen.wait() can leave its lock taken, and the program waiting for ever.
    """
    ended, numbers = -math.inf, [signal.SIGINT, signal.SIGTERM]  # in a script's background SIGINT would be ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup wants it
        numbers.append(signal.SIGHUP)

    def end(number, _):
        nonlocal ended
        before, ended = ended, time.monotonic()
        if ended - before > HURRY:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # from then on the exit code is fixed


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Prepare a task's data, or run one trial of a train.py under sandbox, clock and exam.",
        epilog="Data lives in ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it).",
    )
    add = parser.add_argument
    add("--task", metavar="NAME", help=f"one of: {', '.join(TASKS)}, or the name of an own text (default: {TASK.name})")
    add("--shards", type=int, metavar="N", help="training shards of climbmix, of 6,542 (default: 10)")
    add("--text", nargs="+", metavar="PATH", help=f"prepare own files and folders ({' '.join(KINDS)}) as --task (text)")
    add("--check", action="store_true", help="look whether all is well for a night, and exit")
    one = parser.add_subparsers(dest="command", metavar="trial").add_parser("trial", help="run and score one candidate")
    add = one.add_argument
    add("train_py", metavar="TRAIN_PY", help="the candidate's train.py")
    add("--out", required=True, metavar="DIR", help="folder for result.json, log.txt and metrics.jsonl")
    add("--task", metavar="NAME", default=argparse.SUPPRESS, help="as above")
    add("--seed", type=int, default=SEED, metavar="N", help="of data order and initialisation (default: 0)")
    add("--budget", type=float, metavar="SECONDS", help="of training, instead of the task's own")
    add("--beat", type=float, metavar="BPB", help="examine less closely a score above it (default: none)")
    add("--flops", type=float, metavar="RATE", help="machine_flops() for the candidate (default: as measured)")
    add("--warm", type=Path, metavar="DIR", help="start with what torch.compile has left in an earlier trial's --out")
    add("--no-sandbox", action="store_true", help="run the candidate unconfined: only for code you trust")
    add("--parent", type=int, help=argparse.SUPPRESS)  # the process that this one is not to outlive
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    hear_signals()
    try:
        if arguments.command == "trial":
            if arguments.parent:
                prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != arguments.parent:
                    return 143
            task, sandbox = get_task(arguments.task, arguments.budget), not arguments.no_sandbox
            if sandbox_level() == "none" or not sandbox:
                print("NO SANDBOX: the candidate can read and write all that you can", file=sys.stderr)
            verify(task)  # before anything is written
            out = Path(arguments.out).resolve()
            out.mkdir(parents=True, exist_ok=True)
            # Held until this process ends: one that was told to end may still be clearing up here.
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX)
            limits = arguments.beat, arguments.flops, arguments.warm and arguments.warm.resolve()
            result = trial(arguments.train_py, out, task, arguments.seed, sandbox, *limits)
            print_summary(result)
            return 0 if result["outcome"] == "ok" else 1
        if arguments.check:
            return check(get_task(arguments.task))
        if arguments.text:
            task = prepare_text(arguments.text, arguments.task or "text")
        else:
            task = get_task(arguments.task)
            prepare(task, shards=arguments.shards)
        folder, rate = verify(task), machine_flops(again=True)
        print(f"{task.name} is ready in {folder}; train.py is sized for a machine of {rate / 1e12:.4g} TFLOP/s")
        return 0
    except (Trouble, OSError) as error:
        print(f"prepare.py: {words(error)}", file=sys.stderr)
        return PAUSE_CODE if isinstance(error, Pause) or getattr(error, "errno", None) in DISK_FULL else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["_exam"]:
        exam(int(sys.argv[2]))
    elif sys.argv[1:2] == ["_speed"]:
        sys.exit(answer_speed(float(sys.argv[2])))
    else:
        sys.exit(main())

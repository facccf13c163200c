"""Text into rows, once: tokenise, pack, write, fingerprint. To verify them ever after is for fingerprints.py.

The text itself comes from text.py. Top to bottom: packing, the files of a task's data, preparing them.
"""

import base64
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from exam.files import cache_lock, sha256, write_atomically
from exam.fingerprints import read_meta, verify
from exam.text import hub_source, pycode_source, text_documents, text_files
from exam.tokenizer import build_encoding, load_tokens, train_tokenizer
from prepare import OWN_NAME, TASKS, Task, Trouble, cache_root, get_task, has_gpu


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

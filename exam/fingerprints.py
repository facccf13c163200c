"""Fingerprints: data and programs are what they were when the scores came about that a new one is to compare with."""

import json

from exam.files import ROOT, sha256
from prepare import TASKS, Trouble, cache_root


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


# The files that can change a score on prepared data: what a candidate is given, what it can reach, when its clock runs
# and ends, how its model is scored, and how the score is written down. What prepares data, sizes a model or talks is
# not among them: the data have fingerprints of their own, and a tag keeps the size that it was started with.
FROZEN = (
    "prepare.py",
    "exam/__init__.py",  # which runs wherever exam/ does
    "exam/limits.py",
    "exam/files.py",  # for the folder that is hidden from a candidate
    "exam/fingerprints.py",
    "exam/tokenizer.py",  # for the bytes of a token
    "exam/load.py",  # for the share of others by which disturbed runs are told
    "exam/card.py",  # for the same on a GPU
    "exam/speed.py",  # for the rate by which runs on a slow machine are told
    "exam/syscalls.py",
    "exam/sandbox.py",
    "exam/processes.py",
    "exam/result.py",
    "exam/reader.py",
    "exam/examiner.py",
    "exam/compiled.py",  # for what a trial may learn from an earlier one
    "exam/watch.py",
    "exam/trial.py",
)


def fingerprints(task):
    """SHA-256 of everything besides train.py that decides a score: FROZEN, and tokenizer and validation rows.

    Those of the data are as they were prepared, which verify() holds them to.
    """
    meta = read_meta(task)
    frozen = {name: sha256(ROOT / name) for name in FROZEN}
    return frozen | {"tokenizer": meta["tokenizer_sha256"], "val": meta["val_sha256"]}


def changed_since(known):
    """Those of FROZEN that are not as they were when `known` was made, an earlier fingerprints()."""
    changed = [name for name in FROZEN if name in known and sha256(ROOT / name) != known[name]]
    return changed or [name for name in FROZEN if name not in known]

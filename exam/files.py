"""Files: how they are hashed, written, locked and removed here."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from prepare import Trouble, cache_root

ROOT = Path(__file__).resolve().parents[1]  # of the repository


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
    """Hold the lock `name` of the cache, and say so while another process has it; yields the folder of the cache."""
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


def remove(folder):
    """Delete a folder that a candidate may have made deep and hard to delete; links are not followed."""
    for command in (("chmod", "-R", "u+rwX"), ("rm", "-rf")):
        with contextlib.suppress(OSError):  # no process can be started, while a candidate fills the table of them
            subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL)

"""Compiled code: what torch.compile leaves in a trial's room, kept for the rooms of later trials.

When it may be kept is for trial.py to say.
"""

import contextlib
import os
import subprocess

from exam import limits
from exam.files import remove
from exam.sandbox import start_confined


def copy_folder(source, target, rules):
    """Copy a folder that a candidate has filled, links as links, under sandbox `rules`.

    A copy that fails or is larger than limits.COMPILED_LIMIT is removed: a trial can do without.
    """
    command = ["timeout", "-s", "KILL", str(limits.COPY_LIMIT), "cp", "-RPT", "--", source, target]
    try:
        target.mkdir()
        failed = start_confined(command, rules, stderr=subprocess.DEVNULL).wait()
        size = subprocess.run(["du", "-sb", "--", target], capture_output=True, text=True).stdout.split()
        failed = failed or not size or int(size[0]) > limits.COMPILED_LIMIT
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

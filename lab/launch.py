"""One trial, held in a slot: a Request goes in, a Result comes out, whatever happens between.

It is prepare.py in a process of its own, on this machine or where a launcher takes it. The loop sees nothing of it but
the Result. Of a launcher nothing is believed, neither its exit code nor that it ends: what counts are the files in the
folder of the trial, which all machines have to see.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from exam.files import ROOT
from exam.result import Result
from lab.slots import POLL, VISIBLE, Slot, launched
from prepare import PAUSE_CODE, Task, Trouble, device_kind, one_line

QUEUE_LIMIT = 3600.0  # seconds that a launcher may take to find a machine
START_LIMIT = 300.0  # that a trial may take there until begin(), whatever machine it is
LATE = 300.0  # by which such a trial may be late, all its limits added up
LAST_WORDS = 90.0  # until the file system shows here what was written there: NFS may take more than a minute
GRACE = 15.0  # that a launcher has to clear up behind itself, or to end
PROGRAM = ROOT / "prepare.py"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a trial needs to know."""

    source: bytes  # the train.py
    out: Path  # folder of the evidence
    task: Task
    seed: int
    flops: float  # that the candidate is told by machine_flops()
    beat: float | None  # val_bpb below which the score matters; None: always
    warm: Path | None  # folder of an earlier run, with whose compiled code this one starts
    sandbox: bool = True

    @property
    def report(self) -> Path:
        return self.out / "result.json"

    @property
    def longest(self) -> float:
        """Seconds after which a trial that began elsewhere is taken for lost."""
        return START_LIMIT + self.task.time_budget + self.task.grace + self.task.exam_limit + LATE


# ---------------------------------------------------------------------------------------------------------------------
# Hold it


async def hold(request: Request, slot: Slot) -> Result:
    """Hold a trial to its end. Raises OSError where not even the request can be written.

    A trial that ends without a word, as one whose proctor was killed, has the outcome "lost". To cancel this ends the
    trial first.
    """
    out = request.out
    out.mkdir(parents=True, exist_ok=True)
    train_py, word = out.parent / "train.py", secrets.token_hex(8)
    if not train_py.exists() or train_py.read_bytes() != request.source:  # another run of it may be reading it
        fresh = train_py.with_suffix(".new")
        fresh.write_bytes(request.source)
        fresh.replace(train_py)
    line = command(request, train_py, slot)
    (out / "owner").write_text(word)  # one that an earlier loop holds here ends, when it sees that
    if slot.launcher:
        line = launched(slot.launcher, [*line, "--owner", word])
    for stale in (request.report, out / "where"):
        stale.unlink(missing_ok=True)
    (out / "slot").write_text(slot.name + "\n")
    with open(out / "proctor.log", "w") as log:
        # In a session of its own, so that Ctrl-C reaches the loop alone, which then ends the trial in good order.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        worker = subprocess.Popen(line, **streams, env=environment(slot), start_new_session=True)
    try:
        await (launched_end(worker, request) if slot.launcher else ended(worker))
    finally:
        try:
            disown(out)
        finally:
            await end(worker, slot)
    return Result.read(request.report) or without_words(worker, request, slot)


def disown(out: Path):
    """Have a trial in the folder `out` end itself, wherever it runs, unless it has ended."""
    if (out / "owner").exists() and not (out / "result.json").exists():
        (out / "owner").write_text("")


async def ended(worker, seconds=math.inf) -> bool:
    """Wait for the end of a process, so many seconds at most; returns whether it has come."""
    limit = time.monotonic() + seconds
    while worker.poll() is None and time.monotonic() < limit:
        await asyncio.sleep(POLL)
    return worker.poll() is not None


async def launched_end(worker, request):
    """Wait for the result of a trial that a launcher takes elsewhere, or until there will be none."""
    if await appears(request.out / "where", QUEUE_LIMIT, worker):
        await appears(request.report, request.longest, worker)
    await ended(worker, GRACE)


async def appears(path, seconds, worker) -> bool:
    """Wait for a file, so many seconds and little longer than its worker lives; returns whether it is there."""
    limit = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < limit:
        if worker.poll() is not None:
            began = (path.parent / "where").exists() or not worker.returncode
            limit = min(limit, time.monotonic() + LAST_WORDS * began)
            while not path.exists() and time.monotonic() < limit:
                os.listdir(path.parent)  # has NFS look again
                await asyncio.sleep(10 * POLL)
            break
        await asyncio.sleep(POLL)
    return path.exists()


async def end(worker, slot):
    """End a process in good order, and a launcher with all that it has started here."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGTERM) if slot.launcher else worker.terminate()
    try:
        await ended(worker, GRACE if slot.launcher else math.inf)
    finally:  # what a launcher has left in its group as well
        if slot.launcher:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def without_words(worker, request, slot) -> Result:
    """What becomes of a trial that has left no result."""
    code, out = worker.returncode, request.out
    log = (out / "proctor.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    said, where = one_line(log[-1], 200), out / "where"
    if slot.launcher and where.exists():
        return Result("lost", f"no result came from {one_line(where.read_text(), 80)} ({said})")
    if slot.launcher:
        return Result("paused", f"the launcher has found no machine ({said})")
    # Only these tell of a disk too full to write a result, and of a prepare.py that does not know the request, as one
    # of another version does not.
    outcome = {PAUSE_CODE: "paused", 2: "fault"}.get(code, "lost")
    result = Result(outcome, "it was killed" if code < 0 else said)
    result.write(request.report)  # where the disk is full this fails as well, and is not held against the candidate
    return result


def command(request: Request, train_py: Path, slot: Slot) -> list[str]:
    """The command line of a trial."""
    line = [sys.executable, str(PROGRAM), "trial", str(train_py), "--out", str(request.out)]
    line += ["--task", request.task.name, "--budget", repr(request.task.time_budget), "--seed", str(request.seed)]
    line += ["--flops", repr(request.flops)]
    line += ["--beat", repr(request.beat)] * (request.beat is not None)
    line += ["--warm", str(request.warm)] * (request.warm is not None)
    line += ["--no-sandbox"] * (not request.sandbox) + on_cores(slot)
    line += ["--shares", str(slot.shares)] * (slot.shares > 1)
    return line + ["--parent", str(os.getpid())] * (not slot.launcher)


def on_cores(slot):
    """What binds prepare.py to the cores of a slot."""
    return ["--cpus", ",".join(map(str, slot.cores))] * bool(slot.cores)


def environment(slot):
    """That of a trial's proctor, or of a launcher, which may hand on all of it: without the keys to a model."""
    kept = {name: value for name, value in os.environ.items() if not re.match(r"ANTHROPIC_|\w*API_KEY", name)}
    if slot.card:
        *others, name = VISIBLE[device_kind()]
        kept = {other: value for other, value in kept.items() if other not in others} | {name: slot.card}
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Before the first trial: data, the rate of a machine, and whether all is well there


async def make_ready(task: Task, slot: Slot, scratch: Path) -> tuple[float, list[str]]:
    """Prepare the data of `task` where they are missing, in a slot: (machine_flops() there, what is not well there).

    scratch: a folder, made where it is missing, that the slot's machine sees. Raises Trouble.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    answer = scratch / f"ready-{secrets.token_hex(4)}.json"
    line = [sys.executable, str(PROGRAM), "--ready", str(answer), "--task", task.name, *on_cores(slot)]
    line = launched(slot.launcher, line) if slot.launcher else line
    worker = subprocess.Popen(line, stdin=subprocess.DEVNULL, env=environment(slot), cwd=ROOT, start_new_session=True)
    try:
        await appears(answer, math.inf, worker)
        await ended(worker, GRACE)
        told = json.loads(answer.read_text()) if answer.exists() else {}
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # not even a long computation keeps the owner waiting
            worker.wait()
        answer.unlink(missing_ok=True)
    if "flops" not in told:
        broken = f"preparing {task.name} broke off (exit code {worker.returncode}); start again"
        raise Trouble(told.get("trouble") or broken)
    return told["flops"], told["lacks"]

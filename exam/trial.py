"""The trial: one candidate under clock and sandbox, then its exam, as the trusted side sees it."""

import contextlib
import dataclasses
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

from exam import limits
from exam.card import Card
from exam.compiled import copy_folder, move_compiled
from exam.examiner import Examiner, finish_exam
from exam.files import ROOT, remove
from exam.fingerprints import fingerprints, read_meta, verify
from exam.machine import machine_flops
from exam.processes import end_processes, kill_group, message_pair, usable_cores
from exam.result import Result, print_summary
from exam.sandbox import examiner_rules, room_environment, sandbox_level, sandbox_rules, start_confined
from exam.speed import cpu_rate
from exam.syscalls import PR_SET_CHILD_SUBREAPER, prctl
from exam.watch import Watch
from prepare import Pause, Trouble, device_kind, has_gpu, one_line


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
    shutil.copyfile(ROOT / "prepare.py", room / "prepare.py")
    if shutil.disk_usage(out).free < 2 * limits.DISK_RESERVE:
        raise Pause(f"the disk that holds {out} is full; a trial needs {2 * limits.DISK_RESERVE / 2**30:.1f} GB")
    if warm and (warm / "compiled").is_dir():
        copy_folder(warm / "compiled", room / "compiled", None)
        try:
            move_compiled(room / "compiled", warm / "room", room)
        except RecursionError:  # folders too deep to be a cache
            remove(room / "compiled")
    return room


def start_candidate(room, rules, task, seed, flops, shares):
    """Start the train.py of a room: (its Popen, our end of the channel to it, descriptor of what it prints)."""
    ours, theirs = message_pair()
    output, child_output = os.pipe()
    told = {"task": dataclasses.asdict(task), "seed": seed, "flops": flops, "device": device_kind()}
    told["fd"] = theirs.fileno()
    streams = {"stdin": subprocess.DEVNULL, "stdout": child_output, "stderr": child_output}
    command, passed = [sys.executable, "train.py"], [theirs.fileno()]
    try:
        streams |= {"cwd": room, "env": room_environment(room, told)}
        child = start_confined(command, rules, passed, shares=shares, **streams)
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


def cpu_rates():
    """[FLOP/s] of a CPU that a trial has to itself; [] where trials would measure each other."""
    return [] if has_gpu() or usable_cores() < os.cpu_count() else [cpu_rate()]


def take_submission(room, out):
    """Move the candidate's file out of its reach: (its path, {}), or (None, outcome and reason) unless it is plain."""
    path, kept = room / "model.safetensors", out / "model.safetensors"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > limits.FILE_LIMIT:
            return None, {"outcome": "invalid", "reason": "the submission is not a plain file"}
        path.rename(kept)
    except OSError as error:
        return None, {"outcome": "invalid", "reason": f"the submission cannot be read ({error.strerror})"}
    return kept, {}


def place():
    """Where and by what a trial is held, as result.json names it."""
    return {"host": platform.node(), "cores": usable_cores(), "python": platform.python_version()}


def trial(train_py, out, task, seed, sandbox=True, beat=None, flops=None, warm=None, shares=1):
    """Run the candidate `train_py` once in the folder `out`, score it, write out/result.json and return the Result.

    beat: val_bpb below which the exam looks closer (None: always). flops: what machine_flops() tells the candidate.
    warm: `out` of an earlier run, with whose compiled code this starts. shares: so many trials divide the memory.
    Raises Trouble or OSError, with nothing started, where data or disk are not fit, Pause for a fault of the machine.
    """
    folder, flops, begun = verify(task), flops or machine_flops(), time.monotonic()
    errors, known, source = memory_errors(), fingerprints(task), Path(train_py).resolve().read_bytes()
    level = sandbox_level() if sandbox else "none"
    hidden = read_meta(task).get("hidden_folders", [])

    def rules(readable, writable):
        return None if level == "none" else sandbox_rules(readable, writable, hidden)

    def start_examiner():
        return stack.enter_context(Examiner(None if level == "none" else examiner_rules(out, hidden)))

    def keep_compiled():
        # A compile cache is a folder of code, in which trained weights could travel as well: so it is copied before the
        # candidate has seen any text, and not at all where text can be read without being handed out.
        remove(out / "compiled")
        if (room / "compiled").exists() and not hidden:
            copy_folder(room / "compiled", out / "compiled", rules([room], [out / "compiled"]))

    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as stack:
        stack.callback(remove, out / "room")
        room = lay_out_room(out, source, warm)
        card, examiner = Card(), start_examiner()
        rows = stack.enter_context(open(folder / "train.bin", "rb"))
        stack.callback(end_processes)
        child, channel, output = start_candidate(room, rules([], [room]), task, seed, flops, shares)
        stack.callback(os.close, output)
        watch = Watch(child, examiner.process, stack.enter_context(channel), output, task, out, card, shares)
        facts, rates = follow(watch, rows.fileno(), keep_compiled), cpu_rates()
        if examiner.process.poll() is not None:  # where memory ran out, the kernel may have ended it as well
            examiner = start_examiner()
        submission, refused = take_submission(room, out) if facts["outcome"] == "ok" else (None, {})
        remove(room)  # what is written to disk on its behalf ends with it
        facts |= refused | finish_exam(examiner, submission, task, verify(task), beat)
    if facts["outcome"] != "ok" and memory_errors() > errors:
        raise Pause("the GPU's memory made errors in the trial (nvidia-smi -q -d ECC); a reset or a restart may help")
    if fingerprints(task) != known:
        raise Trouble("prepare.py, exam/ or the data have changed during the trial; restore them, and hold it again")
    facts |= {"total_seconds": round(time.monotonic() - begun, 3), "cpu_rate": max(rates + cpu_rates(), default=None)}
    facts |= {"task": task.name, "budget": task.time_budget, "seed": seed, "sandbox": level, **place()}
    result = Result(**facts, sha256={"train.py": hashlib.sha256(source).hexdigest(), **known})
    result.write(out / "result.json")
    return result


def score_by_hand(path, task, facts):
    """Score the model that a train.py outside a trial has saved at `path`, print the summary, and delete its folder."""
    try:
        with Examiner(None) as examiner:
            facts = {"outcome": "ok", **facts} | finish_exam(examiner, path, task, verify(task), None)
    except Trouble as trouble:
        print(f"train.py: {trouble}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        shutil.rmtree(path.parent)
    print_summary(Result(**facts))

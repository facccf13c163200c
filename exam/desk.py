"""The commands of prepare.py: prepare, --text, --check and trial."""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from exam import rows
from exam.check import check, shortcomings
from exam.files import write_atomically
from exam.fingerprints import verify
from exam.machine import answer_speed, machine_flops
from exam.result import Result, print_summary
from exam.sandbox import sandbox_level
from exam.signals import hear_signals
from exam.syscalls import PR_SET_PDEATHSIG, prctl
from exam.text import KINDS
from exam.trial import trial
from prepare import PASSING, PAUSE_CODE, SEED, TASK, TASKS, Pause, Trouble, get_task, words


def parse_arguments():
    """The command line of prepare.py."""
    parser = argparse.ArgumentParser(
        description="Prepare a task's data, or run one trial of a train.py under sandbox, clock and exam.",
        epilog="Data lives in ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it).",
    )
    add = parser.add_argument
    add("--task", metavar="NAME", help=f"one of: {', '.join(TASKS)}, or the name of an own text (default: {TASK.name})")
    add("--shards", type=int, metavar="N", help="training shards of climbmix, of 6,542 (default: 10)")
    add("--text", nargs="+", metavar="PATH", help=f"prepare own files and folders ({' '.join(KINDS)}) as --task (text)")
    add("--check", action="store_true", help="look whether all is well for a night, and exit")
    add("--ready", type=Path, help=argparse.SUPPRESS)  # a file that is to tell a loop of the data and the machine
    add("--cpus", type=cores, help=argparse.SUPPRESS)
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
    add("--cpus", type=cores, default=argparse.SUPPRESS, metavar="LIST", help="CPU cores to run on, as in 0,1,2")
    add("--shares", type=int, default=1, metavar="N", help="trials that divide the machine's memory (default: 1)")
    add("--parent", type=int, help=argparse.SUPPRESS)  # the process that this one is not to outlive
    add("--owner", metavar="WORD", help=argparse.SUPPRESS)  # what DIR/owner has to say for this trial to go on
    return parser.parse_args()


def cores(text):
    """The numbers of a list of CPU cores."""
    return [int(number) for number in text.split(",")]


# ---------------------------------------------------------------------------------------------------------------------
# A trial


def may_pass(error):
    """Whether a Trouble or an OSError may pass by itself, so that the same is worth trying again later."""
    return isinstance(error, (Pause, subprocess.SubprocessError)) or getattr(error, "errno", None) in PASSING


def hold_trial(arguments):
    """The command trial; returns its exit code. A fault that ends it stands in result.json before it is raised."""
    if arguments.parent:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != arguments.parent:
            return 143
    out, sandbox = Path(arguments.out).resolve(), not arguments.no_sandbox
    out.mkdir(parents=True, exist_ok=True)
    if arguments.owner:
        watch_owner(out / "owner", arguments.owner)
        write_atomically(out / "where", f"{platform.node()}\n")
    # Held until this process ends: one that was told to end may still be clearing up here.
    fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX)
    if sandbox_level() == "none" or not sandbox:
        print("NO SANDBOX: the candidate can read and write all that you can", file=sys.stderr)
    how = arguments.beat, arguments.flops, arguments.warm and arguments.warm.resolve()
    try:
        task = get_task(arguments.task, arguments.budget)
        result = trial(arguments.train_py, out, task, arguments.seed, sandbox, *how, arguments.shares)
    except (Trouble, OSError, subprocess.SubprocessError) as error:
        path = out / "result.json"
        if not path.exists():  # an earlier trial's stays where this one has not begun
            with contextlib.suppress(OSError):  # on a full disk the exit code alone tells of it
                Result("paused" if may_pass(error) else "fault", words(error)).write(path)
        raise
    print_summary(result)
    return 0 if result.outcome == "ok" else 1


def watch_owner(path, word):
    """End this process once the file says another word: the loop has ended, or holds the trial anew.

    That reaches a trial wherever it runs. A launcher may not pass signals on, or have died itself.
    """

    def is_ours():
        try:
            return path.read_text() == word
        except FileNotFoundError:
            return False
        except OSError:  # a file system may be away for a while
            return True

    def watch():
        while is_ours():
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if not is_ours():
        raise SystemExit(143)
    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# Before the first trial


def answer_ready(path, task):
    """Prepare what is missing, and write JSON to a file for a loop: flops and lacks, or trouble."""
    try:
        rows.prepare(task)
        told = {"flops": machine_flops()}
        print("looking whether the machine is fit for a night, as python prepare.py --check does", flush=True)
        told["lacks"] = shortcomings(task)
    except (Trouble, OSError) as error:
        told = {"trouble": words(error)}
    write_atomically(path, json.dumps(told))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main():
    """Run the command line of prepare.py; returns its exit code."""
    if sys.argv[1:2] == ["_speed"]:
        return answer_speed(float(sys.argv[2]))
    arguments = parse_arguments()
    hear_signals()
    if arguments.cpus:
        os.sched_setaffinity(0, arguments.cpus)  # before torch is imported, which then starts as many threads
    try:
        if arguments.command == "trial":
            return hold_trial(arguments)
        if arguments.check:
            return check(get_task(arguments.task))
        if arguments.ready:
            return answer_ready(arguments.ready, get_task(arguments.task))
        if arguments.text:
            task = rows.prepare_text(arguments.text, arguments.task or "text")
        else:
            task = get_task(arguments.task)
            rows.prepare(task, shards=arguments.shards)
        folder, rate = verify(task), machine_flops(again=True)
        print(f"{task.name} is ready in {folder}; train.py is sized for a machine of {rate / 1e12:.4g} TFLOP/s")
        return 0
    except (Trouble, OSError, subprocess.SubprocessError) as error:
        print(f"prepare.py: {words(error)}", file=sys.stderr)
        return PAUSE_CODE if may_pass(error) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

"""One trial, held somewhere: a Request goes in, a Result comes out, whatever happens between.

Here it is prepare.py in a process of its own on this machine. The loop sees nothing of it but the Result.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import prepare
from exam.files import ROOT
from exam.result import Result
from exam.rows import prepare as prepare_rows
from prepare import PAUSE_CODE, Task, Trouble, words


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


def hold(request: Request) -> Result:
    """Hold a trial to its end. Raises OSError where not even the request can be written.

    A trial that ends without a word, as one whose proctor was killed, has the outcome "lost". An exception, as
    Ctrl-C raises it, ends the trial first.
    """
    out = request.out
    out.mkdir(parents=True, exist_ok=True)
    train_py, report = out.parent / "train.py", out / "result.json"
    train_py.write_bytes(request.source)
    report.unlink(missing_ok=True)
    with open(out / "proctor.log", "w") as log:
        # In a session of its own, so that Ctrl-C reaches the loop alone, which then ends the trial in good order;
        # without preexec_fn, since an interrupt that falls into the hooks of its fork would be lost.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        proctor = subprocess.Popen(command(request, train_py), **streams, start_new_session=True)
        try:
            proctor.wait()
        finally:
            proctor.terminate()
            proctor.wait()
    if result := Result.read(report):
        return result
    code = proctor.returncode
    said = (out / "proctor.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    # Without a result only these tell: of a disk too full to write one, and of a prepare.py that does not know the
    # request, as one of another version does not.
    outcome = {PAUSE_CODE: "paused", 2: "fault"}.get(code, "lost")
    result = Result(outcome, "it was killed" if code < 0 else said[-1])
    result.write(report)  # where the disk is full this fails as well, and is not held against the candidate
    return result


def command(request: Request, train_py: Path) -> list[str]:
    """The command line of a trial."""
    line = [sys.executable, str(ROOT / "prepare.py"), "trial", str(train_py), "--out", str(request.out)]
    line += ["--task", request.task.name, "--budget", repr(request.task.time_budget), "--seed", str(request.seed)]
    line += ["--flops", repr(request.flops), "--parent", str(os.getpid())]
    line += ["--beat", repr(request.beat)] * (request.beat is not None)
    line += ["--warm", str(request.warm)] * (request.warm is not None)
    return line + ["--no-sandbox"] * (not request.sandbox)


# ---------------------------------------------------------------------------------------------------------------------
# Before the first trial: data, and the rate of the machine


def make_ready(task: Task) -> float:
    """Prepare the data of `task` where they are missing; returns machine_flops(). Raises Trouble.

    A process of its own does both, and takes what torch has of the memory and of the GPU along when it ends.
    """
    ours, theirs = os.pipe()
    # In a session of its own, for the same reasons as a trial.
    line = [sys.executable, "-m", "lab.launch", task.name, str(theirs)]
    with open(ours) as answer:
        try:
            streams = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs]}
            worker = subprocess.Popen(line, **streams, cwd=ROOT, start_new_session=True)
        finally:
            os.close(theirs)
        try:
            told = json.loads(answer.read() or "{}")
            code = worker.wait()
        finally:
            worker.kill()  # not even in the middle of a long computation does it keep the owner waiting
            worker.wait()
    if "flops" not in told:
        raise Trouble(told.get("trouble") or f"preparing {task.name} broke off (exit code {code}); start again")
    return told["flops"]


def get_ready(name: str, descriptor: str):
    """The life of make_ready()'s process: it answers on a file descriptor, and shows its progress as it comes."""
    with open(int(descriptor), "w") as answer:
        try:
            prepare_rows(prepare.get_task(name))
            told = {"flops": prepare.machine_flops()}
        except (Trouble, OSError) as error:
            told = {"trouble": words(error)}
        json.dump(told, answer)


def shortcomings(task: Task) -> list[str]:
    """What of this machine is not as a night needs it, a line each."""
    # prepare.py looks in a process of its own, which takes its hold on the GPU along when it ends.
    line = [sys.executable, str(ROOT / "prepare.py"), "--check", "--task", task.name]
    said = subprocess.run(line, capture_output=True, text=True).stdout.splitlines()
    return [" ".join(text[2:].split()) for text in said if text.startswith("NO")]


if __name__ == "__main__":
    get_ready(*sys.argv[1:])

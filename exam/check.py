"""prepare.py --check: whether all is well for a night, a line on each thing."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from exam.files import ROOT
from exam.fingerprints import read_meta, verify
from exam.machine import FIT_SPEED, NOMINAL_TFLOPS, ask_speed, machine_flops
from exam.processes import exit_reason, kill_group
from exam.sandbox import room_environment, sandbox_level, sandbox_rules, start_confined
from exam.watch import last_words
from prepare import Trouble, cache_root, device_kind, has_gpu, one_line


def check(task):
    """Print a line on each thing that a night on `task` needs besides the researcher; returns the exit code."""
    code = 0
    for what, words, advice in itertools.chain(check_storage(task), check_machine(task)):
        print(f"{'NO' if advice else 'ok':<4}{what + ':':<15}{words}{'; ' * bool(advice)}{advice}", flush=True)
        code = 2 if advice else code
    return code


def shortcomings(task):
    """What of this machine is not as a night needs it, a line each."""
    found = itertools.chain(check_storage(task), check_machine(task))
    return [f"{what}: {words}; {advice}" for what, words, advice in found if advice]


def check_storage(task):
    """Yield (what, words, advice) on data and disks; advice is empty where all is well, and so below."""
    try:
        rows = read_meta(task)["train"]["rows"] if verify(task) else 0
        yield "data", f"{task.name} in {cache_root() / task.dataset}, {rows:,} training rows, fingerprints match", ""
    except Trouble as trouble:
        yield "data", *in_two(trouble)
    for what, folder in (("disk for runs", ROOT), ("disk for data", cache_root())):
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
        yield "GPU", "none here that this torch can use; training runs on the CPU", ""
    elif not total:
        yield "GPU", device, ""
    else:
        advice = "end the other programs that use it"
        yield "GPU", f"{device}, {free:.1f} of {total:.1f} GB free", "" if free > 0.8 * total else advice
    if device in NOMINAL_TFLOPS:
        best, why = 1e12 * NOMINAL_TFLOPS[device], "what such cards reach, for which train.py is sized"
    else:
        best, why = max(machine_flops(), measured), "the best so far"
    advice = "end what else uses the machine"
    advice += ", and look for limits of heat and power" + " (nvidia-smi -q -d PERFORMANCE)" * ("NVIDIA" in device)
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
compiles = x.device.type in ("cuda", "xpu")
double = torch.compile(lambda x: (2 * x).square().sum()) if compiles else lambda x: (2 * x).square().sum()
double(x).backward()
if x.grad.sum().item() != 8 * 64 * 64:
    sys.exit("train.py: a small product came out wrong; the machine is not to be trusted")
memory = [size / 2**30 for size in torch.accelerator.get_memory_info()] if compiles else [None, None]
print(json.dumps([*memory, time.time() - started]))
"""


def rehearse(task, level):
    """Run a small program as a trial would be run: (free, total, words), the first two in GiB, None on a CPU.

    level: as of sandbox_level(). Raises Trouble, with what to do, where it fails.
    """
    runs = ROOT / "runs"  # where trials are held: elsewhere, code may not be executable
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check-", dir=runs) as folder:
        room, output = Path(folder) / "room", Path(folder) / "output"
        room.mkdir()
        (room / "train.py").write_text(REHEARSAL)
        shutil.copyfile(ROOT / "prepare.py", room / "prepare.py")
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
    kind = "a kernel compiled and ran on the GPU" if total else f"a small program ran on {told['device'].upper()}"
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

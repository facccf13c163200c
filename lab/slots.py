"""Slots: the places that hold one trial each, at the same time: a card, a share of the CPU, or a launcher's machine."""

import asyncio
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from prepare import Trouble, device_kind, one_line

POLL = 0.05  # seconds between two looks at what becomes of something
# The variables by which each make's driver is told what a process may see; for ROCm the first wins over that of CUDA.
VISIBLE = {"cuda": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), "xpu": ("ZE_AFFINITY_MASK",)}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one trial."""

    number: int  # from 0
    name: str  # in a word or two
    card: str = ""  # the one GPU that its trials see; "" for all that there are
    cores: tuple[int, ...] = ()  # the CPU cores that its trials run on; () for all
    shares: int = 1  # among how many slots the memory of the machine is divided
    launcher: tuple[str, ...] = ()  # the command line that takes a trial elsewhere; () for here


@dataclasses.dataclass(frozen=True)
class Running:
    """A trial under way, for the live view."""

    slot: Slot
    commit: str
    description: str
    run: int
    out: Path  # folder of its evidence


def choose_slots(gpus: str | None, parallel: int | None, launch: str | None) -> tuple[Slot, ...]:
    """The slots that --gpus, --parallel and --launch ask for; without any, the whole machine as one.

    Raises Trouble for what this machine does not have.
    """
    if parallel is not None and not 1 <= parallel <= 256:
        raise Trouble(f"--parallel {parallel} makes no sense; give a number from 1 to 256")
    if gpus is not None and (parallel is not None or launch is not None):
        raise Trouble("--gpus counts the trials by itself; leave --parallel and --launch away")
    if launch is not None:
        count, words = parallel or 1, launcher(launch)
        return tuple(Slot(i, f"place {i + 1}", launcher=words) for i in range(count))
    if gpus is not None:
        cards = chosen_cards(gpus, visible_cards())
        return tuple(Slot(i, f"GPU {card}", card=card, shares=len(cards)) for i, card in enumerate(cards))
    if parallel and parallel > 1:
        if device_kind() != "cpu":
            raise Trouble("--parallel divides a CPU, and here training runs on a GPU; give --gpus N, or --launch CMD")
        parts = shared_cores(parallel)
        return tuple(Slot(i, f"share {i + 1}", cores=part, shares=parallel) for i, part in enumerate(parts))
    return (Slot(0, "here"),)


async def end_all(tasks: list[asyncio.Task]):
    """Cancel tasks once, and wait until all have ended in good order, however often this is cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    cancelled = False
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


# ---------------------------------------------------------------------------------------------------------------------
# Cards


def visible_cards() -> list[str]:
    """The GPUs that a process here may use, as their driver is told of them; [] without any. Raises Trouble."""
    names = VISIBLE.get(device_kind(), ())
    for named in filter(None, (os.environ.get(name, "").strip() for name in names)):
        return [card.strip() for card in named.split(",") if card.strip()]
    if not names:
        return []
    count = "import torch; print(torch.accelerator.device_count())"
    asked = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    if asked.returncode:
        raise Trouble(f"the GPUs cannot be counted ({one_line(asked.stderr.strip().splitlines()[-1], 200)})")
    return [str(number) for number in range(int(asked.stdout.split()[-1]))]


def chosen_cards(gpus: str, there: list[str]) -> list[str]:
    """The cards of `there` that --gpus names: all, so many of them, or a list of them. Raises Trouble for others."""
    if not there:
        raise Trouble("--gpus asks for GPUs, and there is none here; on a CPU, --parallel N shares its cores")
    known = ", ".join(there)
    if gpus == "all":
        return there
    if gpus.isdecimal() and 1 <= int(gpus) <= len(there):
        return there[: int(gpus)]
    if gpus.isdecimal():
        alone = f"; for card {gpus} alone: --gpus {gpus}," if gpus in there else ""
        raise Trouble(f"--gpus {gpus} is a count, and {len(there)} can be seen here ({known}){alone}")
    cards = [card.strip() for card in gpus.split(",") if card.strip()]
    if not cards or len(set(cards)) < len(cards) or not set(cards) <= set(there):
        raise Trouble(f"--gpus {gpus} should be all, a count, or a list of different ones of: {known}")
    return cards


def idle_cards(slots: tuple[Slot, ...]) -> str:
    """A line on the cards that no slot uses; "" where all are in use."""
    if any(slot.launcher for slot in slots) or device_kind() not in VISIBLE:
        return ""
    there = len(visible_cards())
    idle = there - max(1, sum(bool(slot.card) for slot in slots))
    return f"{idle} of {there} GPUs stay idle; --gpus all holds a trial on each" if idle > 0 else ""


# ---------------------------------------------------------------------------------------------------------------------
# Shares of a CPU


def shared_cores(count: int) -> list[tuple[int, ...]]:
    """The cores that this process may use, in `count` equal parts. Raises Trouble where there are fewer.

    Two threads of one core are neighbours in the order that is cut, since they share its time.
    """
    cores = sorted(os.sched_getaffinity(0), key=place) if hasattr(os, "sched_getaffinity") else []
    if not cores:
        raise Trouble("--parallel needs a system that binds processes to cores, as Linux does")
    if len(cores) < count:
        raise Trouble(f"--parallel {count} needs {count} CPU cores, and here are {len(cores)}")
    size = len(cores) // count  # equal, so that scores compare; what is left over serves the loop
    return [tuple(cores[i * size : (i + 1) * size]) for i in range(count)]


def place(core):
    """(package, physical core, number) of one of the cores that the system counts, which may be threads of one."""
    found = []
    for name in ("physical_package_id", "core_id"):
        try:
            found.append(int(Path(f"/sys/devices/system/cpu/cpu{core}/topology/{name}").read_text()))
        except (OSError, ValueError):
            found.append(0)
    return *found, core


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def launcher(text: str) -> tuple[str, ...]:
    """The words of --launch, one of which holds {} for the command of a trial. Raises Trouble for no command."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Trouble(f"--launch {text!r} cannot be read as a command ({error})") from None
    if not words:
        raise Trouble("--launch needs a command, as in --launch 'srun --gres=gpu:1 {}'")
    if not shutil.which(words[0]):
        raise Trouble(f"--launch begins with {words[0]}, which is no program on this machine")
    return tuple(words) if any("{}" in word for word in words) else (*words, "{}")


def launched(words: tuple[str, ...], command: list[str]) -> list[str]:
    """A launcher's command line for `command`: its words where {} is a word, else quoted, as a shell reads it."""
    line = []
    for word in words:
        line += command if word == "{}" else [word.replace("{}", shlex.join(command))]
    return line

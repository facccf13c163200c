"""The lab book: results.tsv, one row per experiment, in the columns of karpathy/autoresearch."""

import dataclasses
import math
from pathlib import Path

from exam.files import write_atomically
from prepare import Trouble, one_line

COLUMNS = ["commit", "val_bpb", "memory_gb", "status", "description"]
STATUSES = ("keep", "discard", "crash")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run of a commit."""

    val_bpb: float
    speed: float | None  # matrix-multiply rate of the machine right after it, FLOP/s; None where not known
    device: str = ""  # its name; "" where not known
    steps: float | None = None  # of training, by its own word
    others: float | None = None  # share of the device that others had during training; None where not known
    held_back: float | None = None  # share of that time in which heat or the power supply held a GPU back
    seed: int = 0
    pace: float | None = None  # how fast the CPU was after it, FLOP/s; None where not known
    tokens: float | None = None  # of training, by its own word
    shift: float = 0.0  # what val_bpb has lost of `measured`, so that it compares; see lab/conditions.py

    @property
    def measured(self) -> float:
        """val_bpb as the exam has found it."""
        return self.val_bpb + self.shift


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row of results.tsv, with those of its runs that runs/ still has."""

    commit: str
    val_bpb: float
    memory_gb: float
    status: str
    description: str
    runs: tuple[Run, ...] = ()
    base: str = ""  # commit of the experiment whose train.py it changes; "" where that is not known

    @property
    def row(self):
        """As a line of results.tsv."""
        return f"{self.commit}\t{self.val_bpb:.6f}\t{self.memory_gb:.1f}\t{self.status}\t{self.description}\n"

    def after(self, result):
        """The experiment with one more finished run, a Result."""
        speed, device = result.matmul_flops, result.device or ""
        others = result.others if on_cpu(device) else result.gpu_others
        held_back, pace = result.gpu_held_back, result.cpu_rate
        run = Run(result.val_bpb, speed, device, result.steps, others, held_back, result.seed, pace, result.tokens)
        memory = max(self.memory_gb, result.memory_gb)
        return dataclasses.replace(self, memory_gb=memory, runs=(*self.runs, run))


def on_cpu(device: str) -> bool:
    """Whether a Run's device is a CPU, or may be one."""
    return not device or device.startswith("CPU")


def title(text):
    """Free text as one line that fits a cell: no tabs, no control characters, at most 200 characters."""
    return one_line(text, 200) or "no description"


def read_book(path: Path) -> list[Experiment]:
    """The experiments of a results.tsv, in order; [] where there is none. Raises Trouble for a line that is not a row.

    A last line without its newline was torn by a power cut: it is left out, and its experiment will be finished again.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(f"{path} cannot be read ({error}); move it away to start a new one") from None
    experiments = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 and cells == COLUMNS or cells == [""]:
            continue
        try:
            commit, val_bpb, memory_gb, status, description = cells
            status = status.strip().lower()  # as the notebook of karpathy/autoresearch reads it
            if number == 1 or status not in STATUSES or status == "keep" and not math.isfinite(float(val_bpb)):
                raise ValueError
            cells = one_line(commit, 40), float(val_bpb), float(memory_gb), status, title(description)
        except ValueError:
            raise Trouble(
                f"{path.name}, line {number}: not a row of results ({line.strip()[:60]!r}); mend it, or move the file "
                "away: what was measured stays in runs/"
            ) from None
        experiments.append(Experiment(*cells))
    return experiments


def add_row(path: Path, before: list[Experiment], experiment: Experiment):
    """Write the row of `experiment`, on disk on return, after those of `before` where they are not there any more."""
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole = content[: content.rfind("\n") + 1]  # a row that an editor has left without its end is not one
    if not whole:  # there is none yet, or somebody has just moved it away
        whole = "\t".join(COLUMNS) + "\n" + "".join(e.row for e in before)
    write_atomically(path, whole + experiment.row)


def best_of(experiments) -> Experiment | None:
    """The last experiment that was kept; None where there is none."""
    return next((e for e in reversed(experiments) if e.status == "keep"), None)

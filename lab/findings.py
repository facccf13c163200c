"""What a tag has found so far, in numbers: for the live view, the report, its JSON and its picture. Only reads."""

import collections
import contextlib
import dataclasses
import itertools
import math
import statistics
from pathlib import Path

from exam.result import Result
from lab.api import TOKENS
from lab.book import Experiment, best_of
from lab.curve import json_lines
from lab.runs import changes, difference
from lab.tag import Tag
from lab.transfer import rank_correlation
from lab.verdict import certainties, confidence, level, noise
from prepare import one_line


@dataclasses.dataclass(frozen=True)
class Change:
    """An experiment with the gain over the best before it, in bits per byte; positive is better."""

    commit: str
    val_bpb: float
    gain: float
    description: str
    certainty: float | None = None  # P(better) than that best, by what was known then


@dataclasses.dataclass(frozen=True)
class Findings:
    """From the book and the scores of its runs; None for what is not known."""

    tag: str
    task: str | None
    budget: float | None
    rows: tuple[Experiment, ...]
    kept: tuple[Change, ...] = ()
    discarded: tuple[Change, ...] = ()
    baseline: Experiment | None = None
    best: Experiment | None = None
    gain: float | None = None
    gain_percent: float | None = None
    sigma: float | None = None  # standard deviation of one run
    confidence: float | None = None  # probability that the best is better than the baseline
    level: float | None = None  # val_bpb that the best is expected to have by all scores, not only by its own

    @property
    def experiments(self) -> int:
        """How many there were besides the baseline."""
        return max(0, len(self.rows) - 1)

    def count(self, status: str) -> int:
        """How many experiments besides the baseline ended so."""
        return sum(e.status == status for e in self.rows[1:])

    @property
    def headline(self) -> str:
        """The tag and what has become of its experiments, in words."""
        task = f" ({self.task}, {self.budget:g} s)" if self.task else ""
        counts = f"{self.count('keep')} kept, {self.count('discard')} discarded, {self.count('crash')} crashed"
        return f"{self.tag}{task}, {self.experiments} experiment{'s' * (self.experiments != 1)}: {counts}"

    @property
    def gain_in_words(self) -> str:
        """From the baseline to the best."""
        if self.best is self.baseline:
            return f"val_bpb: baseline {self.baseline.val_bpb:.6f}, and nothing better was kept"
        scores = f"baseline {self.baseline.val_bpb:.6f} -> best {self.best.val_bpb:.6f}"
        told = self.baseline.val_bpb - self.best.val_bpb
        runs = ", by the runs that compare, under equal conditions" * (abs(told - self.gain) > 1e-6)
        word = "lower" if self.gain >= 0 else "higher, kept for what they delete"
        return f"val_bpb: {scores}, {abs(self.gain):.6f} ({abs(self.gain_percent):.2f}%) {word}{runs}"


def find(tag: Tag) -> Findings:
    """What the tag has found, by what it has read from disk."""
    rows, known = tuple(tag.experiments), tag.settings
    changed = [
        (e, Change(e.commit, e.val_bpb, -change, e.description)) for e, change in changes(rows) if change is not None
    ]
    found = Findings(
        tag.name if known else "results.tsv",
        known.get("task"),
        known.get("budget"),
        rows,
        tuple(change for e, change in changed if e.status == "keep"),
        tuple(change for e, change in changed if e.status == "discard"),
    )
    best = best_of(rows)
    if not best:
        return found
    first = next(e for e in rows if e.status == "keep")
    lower, sigma = difference(best, first), noise(rows)[0]
    gain = first.val_bpb - best.val_bpb if lower is None else -lower
    percent = 100 * gain / first.val_bpb if first.val_bpb else 0.0
    known = {"baseline": first, "best": best, "gain": gain, "gain_percent": percent}
    return dataclasses.replace(found, **known, sigma=sigma if sigma > 0 else None)


NEAREST = 5  # misses that are told


def weighed(found: Findings) -> Findings:
    """The findings with how sure they are, which takes a look at all of them for each kept change and near miss."""
    if not found.best:
        return found
    rows = list(found.rows)
    told = [*found.kept, *nearest(found)]
    sure = certainties(rows, {change.commit for change in told})
    kept, discarded = (
        tuple(dataclasses.replace(change, certainty=sure.get(change.commit)) for change in some)
        for some in (found.kept, found.discarded)
    )
    whole = confidence(rows, found.best, found.baseline)
    return dataclasses.replace(found, kept=kept, discarded=discarded, confidence=whole, level=level(rows))


def nearest(found: Findings) -> list[Change]:
    """The discarded ones that missed by least, in that order."""
    return sorted(found.discarded, key=lambda change: -change.gain)[:NEAREST]


@dataclasses.dataclass(frozen=True)
class Foresight:
    """What the researcher has expected of its experiments, beside what came of them; means in bits per byte."""

    experiments: int  # of which it has foretold a gain
    expected: float
    observed: float
    rank_correlation: float | None  # None for fewer than three


def foresight(tag: Tag) -> Foresight | None:
    """None where nothing was foretold, or nothing came of it that compares."""
    told, pairs = tag.drafts(), []
    for experiment, change in changes(list(tag.experiments)):
        draft = told.get(experiment.commit)
        with contextlib.suppress(KeyError, ValueError, AttributeError):  # none, or a trailer that somebody has written
            expected = float(draft.origin["Expects"])
            if change is not None and math.isfinite(expected):
                pairs.append((expected, -change))
    if not pairs:
        return None
    expected, observed = (statistics.fmean(values) for values in zip(*pairs))
    return Foresight(len(pairs), expected, observed, rank_correlation(pairs))


# ---------------------------------------------------------------------------------------------------------------------
# What takes a look at every run


@dataclasses.dataclass(frozen=True)
class Held:
    """A trial that was held: where, from when to when (time.time()), and with which result."""

    slot: str
    start: float
    end: float
    result: Result


def trials(tag: Tag) -> list[Held]:
    """The trials of a tag that have a counted result, in the order of their ends."""
    held = []
    for path in tag.folder.glob("*/*/result.json"):
        result = Result.read(path)
        with contextlib.suppress(OSError):  # a trial that begins removes what an earlier one has left
            end = path.stat().st_mtime  # it ends when its result is written
            if result and result.counted:
                held.append(Held(slot_name(path.parent), end - result.total_seconds, end, result))
    return sorted(held, key=lambda each: each.end)


def slot_name(out: Path) -> str:
    """The slot in which the trial of a folder was held, as the loop has noted it; "" where it has not."""
    with contextlib.suppress(OSError):
        return one_line((out / "slot").read_text(errors="replace"), 40)
    return ""


def gaps(held: list[Held], starts: list[float]) -> tuple[float, float]:
    """Seconds between the trials of each slot: (in which a loop ran, in which none did, before one of `starts`)."""
    waited = stopped = 0.0
    for each in by_slot(held).values():
        for before, then in itertools.pairwise(each):
            begun = max([before.end, *(start for start in starts if start <= then.start)])
            waited, stopped = waited + max(0.0, then.start - begun), stopped + begun - before.end
    return waited, stopped


def by_slot(held: list[Held]) -> dict[str, list[Held]]:
    """The trials of each slot, in order."""
    found = collections.defaultdict(list)
    for each in held:
        found[each.slot].append(each)
    return dict(sorted(found.items()))


def time_spent(held: list[Held], starts: list[float]) -> dict[str, float]:
    """Where the time of the slots went, {phase: seconds}; {} without trials."""
    spent = collections.Counter()
    for result in (each.result for each in held):
        parts = [result.training_seconds, result.startup_seconds, result.eval_seconds]
        spent.update(dict(zip(("training", "start-up", "exam"), parts)))
        spent["rest of the trial"] += max(0.0, result.total_seconds - sum(parts))
    if held:
        spent["between trials"] = gaps(held, starts)[0]
    return {phase: round(seconds, 1) for phase, seconds in spent.items()}


QUIET = {  # what a Result tells of how undisturbed its trial was, in words for the median and the largest
    "others": "others had {:.0%} of the CPU in the median trial, and at most {:.0%}",
    "gpu_others": "others had {:.0%} of the GPU in the median trial, and at most {:.0%}",
    "gpu_held_back": "heat or the power supply held the GPU back for {:.0%} of the median trial, and at most {:.0%}",
    "gpu_celsius": "the GPU was at {:.0f} degrees Celsius in the median trial, and at most {:.0f}",
    "gpu_megahertz": "the GPU ran at {:.0f} MHz in the median trial, and at most at {:.0f}",
}


def quiet(held: list[Held]) -> dict[str, tuple[float, float]]:
    """{name of QUIET: (median, maximum) over the trials that count}, of those that are known."""
    values = {name: [v for each in held if (v := getattr(each.result, name)) is not None] for name in QUIET}
    return {name: (statistics.median(known), max(known)) for name, known in values.items() if known}


@dataclasses.dataclass(frozen=True)
class Pace:
    """What a slot, or a kind of device, has done."""

    name: str
    trials: int
    hours: float  # in which a loop ran, from the start of the first trial to the end of the last, of all slots together
    idle: float  # share of them without a trial


def pace(held: list[Held], starts: list[float]) -> list[Pace]:
    """Of each slot, in order; starts: of the loop, as for all here."""
    return [_pace(name, each, starts) for name, each in by_slot(held).items()]


def pace_of_devices(held: list[Held], starts: list[float]) -> list[Pace]:
    """Of each kind of device, in order; trials that do not tell theirs are left out."""
    kinds = collections.defaultdict(list)
    for each in held:
        if each.result.device:
            kinds[each.result.device].append(each)
    return [_pace(name, kinds[name], starts) for name in sorted(kinds)]


def _pace(name, held, starts):
    waited, stopped = gaps(held, starts)
    whole = sum(each[-1].end - each[0].start for each in by_slot(held).values())
    hours = (whole - stopped) / 3600
    return Pace(name, len(held), hours, waited / 3600 / hours if hours > 0 else 0.0)


def cost(tag: Tag) -> dict[str, float]:
    """What the model has cost: requests, tokens of each kind, usd."""
    requests = json_lines(tag.folder / "cost.jsonl")
    sums = {key: round(sum(request.get(key, 0) for request in requests), 6) for key in (*TOKENS, "usd")}
    return {"requests": len(requests)} | sums

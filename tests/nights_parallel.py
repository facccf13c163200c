"""Simulates nights with several trials at a time: python tests/nights_parallel.py [SIZE]. Ideas are as in nights.py.

The verdicts are those of lab/verdict.py, in the order in which the trials end, against the best of that moment. It
shows what more slots bring, and has chosen when a candidate is carried over and how many drafts are written ahead;
whether repeats go first makes no difference to the gain. Time is counted in trials of five minutes, which last up to
5 % more or less; a night has 96. SIZE: nights of a row with one slot; with more slots as many fewer.

Assumed: ideas run short, so that the share that gains halves with every HALVING bits per byte that the best has gained
(in the rows "endless" never). Gains of two changes add up, but of those that are carried over one in five does nothing
any more, and one in ten does not merge.
"""

import collections
import dataclasses
import functools
import heapq
import itertools
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from nights import GAINS, World, true_gain  # noqa: E402

from lab.book import Experiment, Run  # noqa: E402
from lab.verdict import BASELINE_RUNS, beats_base, judge  # noqa: E402

UNITS, HOURS = 96, 8  # of a night: trials in a row, hours
HALVING, MERGES, STAYS = 0.01, 0.9, 0.8
SHORT, LONG = 0.1, 1.0  # mean time to write a draft: 30 s, 5 min


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a row of the table is about."""

    slots: int
    writing: float = LONG
    carries: bool = True  # drafts that are ready when the best changes, and candidates that have beaten their base
    ahead: int = 2  # drafts a slot that are ready or being written
    repeats_first: bool = True  # else only where no draft is ready
    endless: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Version:
    """A train.py and its runs."""

    level: float  # its true score, less that of the baseline
    base: "Version | None" = None
    carried: bool = False
    experiment: Experiment = Experiment("", 0.0, 0.0, "", "")


@dataclasses.dataclass(frozen=True)
class Draft:
    """A change of `base`; gain: None where it is new, and drawn when its trial begins."""

    base: Version
    gain: float | None = None


class Night:
    """A night of one Setup, event by event."""

    def __init__(self, setup: Setup, seed: int):
        self.setup, self.chance = setup, random.Random(seed)
        self.now, self.busy, self.idle, self.writing = 0.0, 0.0, 0, 0
        self.events, self.number = [], itertools.count()
        self.winners, self.drafts, self.doubtful = collections.deque(), collections.deque(), collections.deque()
        self.book, self.count = [], collections.Counter()
        self.best = Version(0.0)

    def hold(self):
        """All of it, the baseline's runs side by side and before anything else; returns the night."""
        for _ in range(BASELINE_RUNS):
            self.best = self._ran(self.best)
        self.best = self._row(self.best, "keep")
        self.busy += BASELINE_RUNS
        self._after(math.ceil(BASELINE_RUNS / self.setup.slots), self._open)
        self._write()
        while self.events and self.events[0][0] < UNITS:
            self.now, _, happens = heapq.heappop(self.events)
            happens()
            self._fill_slots()
            self._write()
        return self

    def _after(self, time, happens):
        heapq.heappush(self.events, (self.now + time, next(self.number), happens))

    def _open(self):
        self.idle = self.setup.slots

    # -- drafts

    def _write(self):
        while self.writing + len(self.drafts) < self.setup.ahead * self.setup.slots:
            self.writing += 1
            time = self.setup.writing * self.chance.lognormvariate(-0.125, 0.5)  # mean 1
            self._after(time, functools.partial(self._written, Draft(self.best)))

    def _written(self, draft):
        self.writing -= 1
        self.drafts.append(draft)

    def _candidate(self, draft) -> Version | None:
        """What a draft has become when its trial begins; None where it does not merge with the best of the moment."""
        base, gain, new = draft.base, draft.gain, draft.gain is None
        if new:
            share = GAINS if self.setup.endless else GAINS * 2 ** (self.best.level / HALVING)
            gain = true_gain(self.chance, share)
        if base is not self.best and self.setup.carries:
            if self.chance.random() >= MERGES:
                return None
            base, gain = self.best, gain * (self.chance.random() < STAYS)
        return Version(base.level - gain, base, carried=not new)

    # -- trials

    def _fill_slots(self):
        queues = self.winners, self.drafts
        while self.idle and (waiting := next(filter(None, queues), self.doubtful)):
            following = waiting.popleft()
            candidate = following if waiting is self.doubtful else self._candidate(following)
            if candidate:
                self.idle -= 1
                self._start(candidate)

    def _start(self, candidate):
        time = self.chance.uniform(0.95, 1.05)
        self.busy += min(time, UNITS - self.now)
        self._after(time, functools.partial(self._judge, candidate))

    def _ran(self, version):
        run = Run(self.chance.gauss(version.level, World().sigma), 1.0)
        runs = (*version.experiment.runs, run)
        return dataclasses.replace(version, experiment=dataclasses.replace(version.experiment, runs=runs))

    def _row(self, version, status):
        names = {"commit": f"{len(self.book)}", "base": version.base.experiment.commit if version.base else ""}
        self.book.append(dataclasses.replace(version.experiment, status=status, **names))
        return dataclasses.replace(version, experiment=self.book[-1])

    def _judge(self, candidate):
        candidate, best = self._ran(candidate), self.best
        decision = judge(candidate.experiment, best.experiment, self.book).decision
        if decision == "again" and self.setup.repeats_first:
            return self._start(candidate)
        self.idle += 1
        if decision == "again":
            return self.doubtful.append(candidate)
        kept, base = decision == "keep", candidate.base
        loser = best if kept else candidate
        if self.setup.carries and base is not best:  # of two changes of one base, the one that is not the best now
            if kept or beats_base(candidate.experiment, base.experiment, self.book):
                self.winners.append(Draft(base, base.level - loser.level))
        candidate = self._row(candidate, decision)
        if kept:
            self.best = candidate
        self.count.update(
            experiments=1,
            kept=kept,
            false=kept and candidate.level >= best.level,
            carried=candidate.carried,
            carried_kept=candidate.carried and kept,
        )


COLUMNS = ("gain", "an hour", "idle", "experiments", "kept", "false", "carried", "carried_kept")


def mean(setup: Setup, nights: int) -> dict[str, float]:
    """Of so many nights: true gain a night and in 0.001 a GPU-hour, idle share of the slots, counts of experiments."""
    held = [Night(setup, seed).hold() for seed in range(nights)]
    found = {name: statistics.fmean(night.count[name] for night in held) for name in COLUMNS}
    found["gain"] = statistics.fmean(-night.best.level for night in held)
    found["an hour"] = 1000 * found["gain"] / setup.slots / HOURS
    found["idle"] = 1 - statistics.fmean(night.busy for night in held) / setup.slots / UNITS
    return found


def main():
    size = int(sys.argv[1]) if sys.argv[1:] else 800
    every = (1, 4, 16, 64)
    parts = {
        "carrying over": [Setup(n, writing, carries) for n in every for writing in (SHORT, LONG) for carries in (0, 1)],
        "the same with endless ideas": [Setup(n, carries=c, endless=True) for n in every for c in (0, 1)],
        "drafts ahead": [Setup(n, writing, ahead=a) for n in every for writing in (SHORT, LONG) for a in (1, 2, 3)],
        "repeats last": [Setup(n, repeats_first=False) for n in every],
    }
    for title, setups in parts.items():
        print(f"\n{title}")
        print("slots", "draft", "carries", "ahead", *COLUMNS, sep="\t")
        for setup in setups:
            found = mean(setup, max(8, size // setup.slots))
            named = setup.slots, f"{300 * setup.writing:.0f} s", "yes" if setup.carries else "no", setup.ahead
            shares = f"{found['gain']:.5f}", f"{found['an hour']:.3f}", f"{found['idle']:.1%}"
            print(*named, *shares, *(f"{found[name]:.1f}" for name in COLUMNS[3:]), sep="\t", flush=True)


if __name__ == "__main__":
    main()

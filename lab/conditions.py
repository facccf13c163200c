"""What the conditions of a run did to its score, found out from all runs, and taken away before scores are compared.

Three of them act on all train.pys alike: the seed, which decides the order of the data, how fast the machine was, and
how much of its CPU other programs had. What they do is told by medians, so that no single train.py can say it, taken
for less where few runs have told it, and bounded. Nothing here is learned from what a train.py says of itself.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lab.book import Experiment, Run, on_cpu
from lab.runs import MOST_OTHERS, classes, same_device

SEEDS = 2  # that the runs of a train.py have in turn
RECENT = 40  # last runs of a stretch of the night between two keeps whose speeds are compared
FEW = 5  # runs without a difference that are imagined besides those that tell what speed and others do
MOST_BY_SPEED, MOST_BY_OTHERS = 0.5, 2.0  # of Effects, in bits per byte: two cores have shown 0.25 and 1


class Effects(NamedTuple):
    """What the conditions do to a score, in bits per byte."""

    seed: float = 0.0  # what seed 1 adds, over seed 0
    speed: float = 0.0  # what a machine e times as fast adds: never more than nothing
    others: float = 0.0  # what others add that have all of the CPU: never less than nothing
    usual: dict[str, float] = {}  # {device: how fast it was in its first run}

    def shift(self, run: Run) -> float:
        """What they have added to the score of a run, over one with seed 0, alone, on a machine at its usual speed."""
        return self.seed * (run.seed == 1) + self.shift_of_machine(run)

    def shift_of_machine(self, run: Run) -> float:
        """The same without the seed's part; what is not known has done nothing."""
        usual = self.usual.get(run.device)
        by_speed = self.speed * math.log(run.pace / usual) if run.pace and usual else 0.0
        return by_speed + self.others * (run.others or 0.0) * on_cpu(run.device)

    @property
    def most(self) -> float:
        """What they add at most to the score of a run that is compared with others."""
        return max(0.0, self.seed) - self.speed * math.log(2) + self.others * 2 * MOST_OTHERS


def effects(experiments: list[Experiment]) -> Effects:
    """What the conditions have done to the scores of a tag, by all its experiments in order."""
    usual = {}
    for run in itertools.chain.from_iterable(each.runs for each in experiments):
        if run.pace:
            usual.setdefault(run.device, run.pace)
    runs = stretches(experiments)
    known = Effects(usual=usual)
    known = known._replace(speed=within(-MOST_BY_SPEED, slope(runs, lambda run: math.log(run.pace), known), 0.0))
    known = known._replace(others=within(0.0, slope(runs, lambda run: run.others or 0.0, known), MOST_BY_OTHERS))
    gaps = seed_gaps(experiments, known)  # a single one may be noise alone
    return known._replace(seed=statistics.median(gaps) * (len(gaps) - 1) / len(gaps)) if gaps else known


def fair(experiments: Iterable[Experiment], known: Effects) -> list[Experiment]:
    """The experiments with the scores that their runs would have with seed 0 at one speed of each device."""
    return [_fair(experiment, known) for experiment in experiments]


def _fair(experiment, known):
    runs = tuple(_shifted(run, known) for run in experiment.runs)
    return experiment if runs == experiment.runs else dataclasses.replace(experiment, runs=runs)


def _shifted(run, known):
    shift = known.shift(run)
    return run if shift == run.shift else dataclasses.replace(run, val_bpb=run.measured - shift, shift=shift)


# ---------------------------------------------------------------------------------------------------------------------
# Found out


def seed_gaps(experiments: list[Experiment], known=Effects()) -> list[float]:  # noqa: B008 - it is immutable
    """By how much scores with seed 1 are higher than those with seed 0, for each train.py that has run with both.

    known: what the machine does, of which the scores are freed first.
    """
    gaps = []
    for runs in itertools.chain.from_iterable(classes(each) for each in experiments):
        both = [
            [run.measured - known.shift_of_machine(run) for run in runs if run.seed == seed] for seed in range(SEEDS)
        ]
        if all(both):
            gaps.append(statistics.fmean(both[1]) - statistics.fmean(both[0]))
    return gaps


def slope(told: list[list[Run]], cause: Callable[[Run], float], known: Effects) -> float:
    """What one of `cause` adds to a score, by stretches(), freed of the effects that are known already.

    Between two keeps most ideas do little, so the slope between two of their runs is the machine's, but for noise; the
    median of those of all pairs, each with the weight of the difference of their causes (Theil and Sen), stands that.
    """
    slopes, count = [], 0
    for runs in told:
        count += len(runs) - 1
        points = [(cause(run), run.measured - known.shift_of_machine(run)) for run in runs]
        for (x, y), (other_x, other_y) in itertools.combinations(points, 2):
            if x != other_x:
                slopes.append(((y - other_y) / (x - other_x), abs(x - other_x)))
    return weighted_median(slopes) * count / (count + FEW)


def stretches(experiments: list[Experiment]) -> list[list[Run]]:
    """The last runs on a CPU of each stretch of the night from one keep to the next, of one device and seed each."""
    found, here = [], []
    for experiment in experiments:
        here = [] if experiment.status == "keep" else here  # none of another best
        for run in (run for run in experiment.runs if run.pace):
            alike = next((each for each in here if same_device(each[0], run) and each[0].seed == run.seed), None)
            if alike is None:
                here.append(alike := [])
                found.append(alike)
            alike.append(run)
    return [runs[-RECENT:] for runs in found]


def within(least: float, value: float, most: float) -> float:
    """The value, or the bound that it exceeds."""
    return max(least, min(value, most))


def weighted_median(values: list[tuple[float, float]]) -> float:
    """The value at which half of the weight is reached, of (value, weight)."""
    half, total = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in sorted(values):
        total += weight
        if total >= half:
            return value
    return 0.0

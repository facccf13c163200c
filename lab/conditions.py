"""What the conditions of a run did to its score, found out from all runs, and taken away before scores are compared.

Three of them act on all train.pys alike: the seed, which decides the order of the data, how fast the machine was, and
how much of its CPU other programs had. What they do is told by medians that no single train.py can move far, taken for
less where few have told it, and bounded. Nothing here is learned from what a train.py says of itself.
"""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lab.book import Experiment, Run
from lab.runs import classes, same_device

SEEDS = 2  # that the runs of a train.py have in turn
RECENT = 40  # last runs of a stretch of the night between two keeps whose speeds are compared
FEW = 2  # train.pys without a difference that are imagined besides those that tell what speed and others do
# Of Effects, in bits per byte: two cores have shown 0.03, 0.25 and 1. And what they are applied to at most.
MOST_BY_SEED, MOST_BY_SPEED, MOST_BY_OTHERS = 0.1, 0.5, 2.0
MOST_FASTER, MOST_SHARE = 0.16, 0.3  # logarithm of a speed over the usual, as far as speeds compare; share of others


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
        faster = math.log(run.pace / usual) if run.pace and usual else 0.0
        by_speed = self.speed * within(-MOST_FASTER, faster, MOST_FASTER)
        return by_speed + self.others * min(run.others or 0.0, MOST_SHARE) * bool(run.pace)

    @property
    def most(self) -> float:
        """What they add at most to the score of a run that is compared with others."""
        return max(0.0, self.seed) - self.speed * MOST_FASTER + self.others * MOST_SHARE


def effects(experiments: list[Experiment]) -> Effects:
    """What the conditions have done to the scores of a tag, by all its experiments in order.

    Nothing where none has run twice: one who does not ask how much a run varies takes scores as they were measured.
    """
    if all(len(each.runs) < 2 for each in experiments):
        return Effects()
    usual = {}
    for run in itertools.chain.from_iterable(each.runs for each in experiments):
        if run.pace:
            usual.setdefault(run.device, run.pace)
    told = stretches(experiments)
    known = Effects(usual=usual)
    known = known._replace(speed=within(-MOST_BY_SPEED, slope(told, lambda run: math.log(run.pace), known), 0.0))
    known = known._replace(others=within(0.0, slope(told, lambda run: run.others or 0.0, known), MOST_BY_OTHERS))
    gaps = sorted(seed_gaps(experiments, known))
    if len(gaps) < 2:  # it may be noise alone
        return known
    middle = nearer_to_zero(gaps[(len(gaps) - 1) // 2], gaps[len(gaps) // 2]) * (len(gaps) - 1) / len(gaps)
    return known._replace(seed=within(-MOST_BY_SEED, middle, MOST_BY_SEED))


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


def slope(told: list[list[tuple[str, Run]]], cause: Callable[[Run], float], known: Effects) -> float:
    """What one of `cause` adds to a score, freed of the effects that are known already.

    Between two keeps most ideas do little, so the slope between two of their runs is the machine's, but for noise; the
    median of those of all pairs, each with the weight of the difference of their causes (Theil and Sen), stands that.
    Whoever ran at an unusual moment has most of the weight: so the median has to be there without that train.py too,
    and counts for so many train.pys as there would be if all had as much weight as that one.
    """
    slopes, weights = [], collections.Counter()
    for runs in told:
        points = [(commit, cause(run), run.measured - known.shift_of_machine(run)) for commit, run in runs]
        for (commit, x, y), (other, other_x, other_y) in itertools.combinations(points, 2):
            if x != other_x:
                slopes.append(((y - other_y) / (x - other_x), abs(x - other_x), {commit, other}))
                weights.update(dict.fromkeys({commit, other}, abs(x - other_x)))
    if not slopes:
        return 0.0
    ((heaviest, weight),) = weights.most_common(1)
    without = [(value, each) for value, each, commits in slopes if heaviest not in commits]
    found = nearer_to_zero(weighted_median(without), weighted_median([each[:2] for each in slopes]))
    count = sum(each for _, each, _ in slopes) / weight
    return found * count / (count + FEW)


def stretches(experiments: list[Experiment]) -> list[list[tuple[str, Run]]]:
    """[(commit, run)] on a CPU of each stretch of the night from one keep to the next, of one device and seed each."""
    found, here = [], []
    for experiment in experiments:
        here = [] if experiment.status == "keep" else here  # none of another best
        for run in (run for run in experiment.runs if run.pace):
            alike = next((e for e in here if same_device(e[0][1], run) and e[0][1].seed == run.seed), None)
            if alike is None:
                here.append(alike := [])
                found.append(alike)
            alike.append((experiment.commit, run))
    return [runs[-RECENT:] for runs in found]


def nearer_to_zero(a: float, b: float) -> float:
    """The smaller of two values in size; zero where they have different signs."""
    return 0.0 if a * b <= 0 else min(a, b, key=abs)


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

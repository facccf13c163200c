"""How likely it is that a candidate is better: Bayes' rule on all the scores of a night, in closed form.

A score is the true score of a train.py plus noise, a normal distribution of standard deviation sigma; an idea gains so
much over the best, or loses. Before its first run an idea is of one of these kinds, each with a share of all ideas:

  useless         it gains exactly nothing
  gains, loses    about SIZES[i] sigma: half of a normal distribution of that width, on one side of zero
  gains much, loses much     anything, evenly in the logarithm, so that no result is a surprise to the noise

A score then does three things, all of them by the same rule, share times likelihood:

1. It says of which kind this idea is. P(better) is what the kinds that gain have together. One lucky run does not do:
   most ideas do not gain, so a small lead is more often luck.
2. It says how good the best really is. A best was kept for a score that was partly luck, so its true score is taken as
   worse than what it scored; and each candidate that came after it, gaining little or nothing, has told where it is.
3. It says how often ideas gain, and how much, on this machine: the night starts from as many imagined ideas as IDEAS
   counts of each kind, and every experiment adds one, in parts, to the kinds that it may be of.

Sigma itself is not known, with four runs of a baseline hardly at all. So the night is gone through once for each of
some values of sigma, and each counts by how well it explains all the scores there are.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

SIZES = (1, 3, 9)  # of gains and losses, in sigma
LARGE, DECADES = 10, 5  # what much begins at, in sigma; the width in natural logarithms over which it is spread
KINDS = ((0, 0), *((size, side) for side in (1, -1) for size in (*SIZES, LARGE)))  # (size in sigma, side of zero)
GAINING, USELESS, IMAGINED = 0.15, 0.55, 20  # shares, as published nights have them; so many ideas they count as
IDEAS = tuple(
    IMAGINED * (USELESS if not side else (GAINING if side > 0 else 1 - GAINING - USELESS) / (len(SIZES) + 1))
    for _, side in KINDS
)
LEAST = 1e-9  # bits per byte; a sigma below it says that a run gives the same score each time
NOISES = range(-2, 6)  # steps of sqrt(2) from the pooled sigma, which may well be far too small and less so too large


class Scores(NamedTuple):
    """What the runs of an experiment have shown: `runs` of them compare with each other, and their mean is `mean`."""

    mean: float
    runs: int
    scatter: float  # sum of squares about the mean, of all runs on this machine and others, each class by itself
    repeats: int  # runs that are not the first of their class
    kept: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Belief:
    """What a night has taught so far, if sigma were this."""

    sigma: float
    ideas: tuple[float, ...]  # of each of KINDS, so many have been seen
    fit: float = 0.0  # logarithm of the likelihood of all scores
    level: float | None = None  # true score of the best; None before there is one
    variance: float = 0.0  # of the level, in sigma^2
    lowest: float = math.inf  # of the levels of all that were kept


def probability_of_gain(history: tuple[Scores, ...], candidate: Scores, ideas=IDEAS) -> float:
    """P(the candidate's true score is lower than that of the last of `history` that was kept).

    history: all experiments that compare, in their order. ideas: how many of each of KINDS have been seen before it.
    Without noise, or where nothing has run twice, a lower mean is better for sure.
    """
    return _probability(history, candidate, ideas, lambda belief: 0.0)


def probability_of_no_loss(history: tuple[Scores, ...], candidate: Scores, margin: float, ideas=IDEAS) -> float:
    """P(the candidate's true score is less than `margin` sigma above the lowest of all of `history` that were kept).

    The lowest, and not the last, so that a night of small losses ends where the margin does.
    """

    def wanted(belief):
        return (belief.level - belief.lowest) / belief.sigma - margin

    return _probability(history, candidate, ideas, wanted, ties=True)


def level_of_best(history: tuple[Scores, ...], ideas=IDEAS) -> float | None:
    """Expected true score of the last of `history` that was kept, by its own runs and by what came after it.

    None without noise, or where it has no run that compares.
    """
    sigma = pooled(history)[0]
    beliefs = _beliefs(history, ideas, sigma) if sigma > LEAST else []
    if not beliefs or beliefs[0].level is None:
        return None
    return _mean([(belief.fit - math.log(belief.sigma), belief.level) for belief in beliefs])


def _probability(history, candidate, ideas, wanted, ties=False):
    """P(the candidate gains more than wanted(belief), in sigma); ties: whether an equal score will do without noise."""
    sigma = pooled([*history, candidate])[0]
    if not sigma > LEAST:
        best = [scores for scores in history if scores.kept and scores.runs][-1]
        return float(candidate.mean < best.mean or ties and candidate.mean == best.mean)
    found = []
    for belief in _beliefs(history, ideas, sigma):
        gap, variance = (belief.level - candidate.mean) / belief.sigma, belief.variance + 1 / candidate.runs
        shares, fit = _shares(gap, variance, belief.ideas)
        above = sum(share * _above(wanted(belief), gap, variance, *kind) for share, kind in zip(shares, KINDS) if share)
        found.append((belief.fit + fit + _fit_of_repeats(candidate, belief.sigma) - math.log(belief.sigma), above))
    return _mean(found)


def _beliefs(history, ideas, sigma):
    """What the night has taught, for each value of sigma around the pooled one."""
    step, found = round(2 * math.log2(sigma)), []
    for noise in NOISES:
        belief = _before(2 ** ((step + noise) / 2), ideas)
        for scores in history:
            belief = _after(belief, scores)
        found.append(belief)
    return found


def _mean(fits):
    """Mean of [(logarithm of its likelihood, value)], each weighted by its likelihood."""
    top = max(fit for fit, _ in fits)
    weights = [math.exp(fit - top) for fit, _ in fits]
    return sum(weight * value for weight, (_, value) in zip(weights, fits)) / sum(weights)


def pooled(history) -> tuple[float, int]:
    """(sigma, by how many repeats it is known); nan without repeats."""
    repeats = sum(scores.repeats for scores in history)
    return (math.sqrt(sum(scores.scatter for scores in history) / repeats) if repeats else math.nan), repeats


# ---------------------------------------------------------------------------------------------------------------------
# One sigma: the night, experiment by experiment


@functools.lru_cache(256)
def _before(sigma, ideas):
    return Belief(sigma, ideas)


@functools.lru_cache(2**14)  # each verdict goes through the whole night, as the one before it did
def _after(belief, scores):
    """The belief after one more experiment: its kind, the best's level, and how well it fits."""
    sigma, level, runs = belief.sigma, belief.level, scores.runs
    fit = belief.fit + _fit_of_repeats(scores, sigma)
    if not runs and scores.kept:  # what comes next was compared with one that is not known here
        return dataclasses.replace(belief, fit=fit, level=None)
    if not runs or level is None and not scores.kept:
        return dataclasses.replace(belief, fit=fit)
    if level is None:
        lowest = min(belief.lowest, scores.mean)
        return dataclasses.replace(belief, fit=fit, level=scores.mean, variance=1 / runs, lowest=lowest)
    gap, variance = (level - scores.mean) / sigma, belief.variance + 1 / runs
    shares, likelihood = _shares(gap, variance, belief.ideas)
    gain, spread = _moments(gap, variance, shares)
    # The candidate's level by its own runs, and the best's by its past: for a given gain they are one and the same.
    precision, before = runs + 1 / belief.variance, 1 / belief.variance
    if scores.kept:
        level = (runs * scores.mean + before * (level - gain * sigma)) / precision
        known = 1 / precision + (before / precision) ** 2 * spread
    else:
        level = (before * level + runs * (scores.mean + gain * sigma)) / precision
        known = 1 / precision + (runs / precision) ** 2 * spread
    ideas = tuple(seen + share for seen, share in zip(belief.ideas, shares))
    lowest = min(belief.lowest, level) if scores.kept else belief.lowest
    return Belief(sigma, ideas, fit + likelihood - math.log(sigma), level, known, lowest)


def _fit_of_repeats(scores, sigma):
    return -scores.repeats * math.log(sigma) - scores.scatter / (2 * sigma**2)


# ---------------------------------------------------------------------------------------------------------------------
# One gap between a candidate's mean and the best's level, in sigma. Of a kind with a width, the gain that the gap
# speaks for is normal as well: its mean is the gap shrunk towards zero; and it is cut off at zero.


def _above_zero(x):
    """P(a standard normal variable is greater than -x)."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _shrunk(gap, variance, size):
    """(mean, standard deviation) of a gain of width `size` before it is cut off at zero."""
    total = variance + size * size
    return gap * size * size / total, size * math.sqrt(variance / total)


def _shares(gap, variance, ideas):
    """(share of each of KINDS now that the gap is known, logarithm of the likelihood of the gap)."""
    logs = []
    for count, (size, side) in zip(ideas, KINDS):
        if size == LARGE:
            likelihood = 1 / (abs(gap) + LARGE) / DECADES if side * gap > 0 else 0.0
            exponent = 0.0
        else:
            total = variance + size * size
            likelihood, exponent = 1 / math.sqrt(2 * math.pi * total), -gap * gap / (2 * total)
            if side:
                mean, spread = _shrunk(gap, variance, size)
                likelihood *= 2 * _above_zero(side * mean / spread)
        logs.append(math.log(count * likelihood) + exponent if likelihood > 0 else -math.inf)
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    whole = sum(weights)
    return [weight / whole for weight in weights], top + math.log(whole / sum(ideas))


def _moments(gap, variance, shares):
    """(mean, variance) of the gain."""
    first = second = 0.0
    for share, (size, side) in zip(shares, KINDS):
        if not side or not share:
            continue
        if size == LARGE:
            mean, square = gap, gap * gap + variance
        else:
            middle, spread = _shrunk(gap, variance, size)
            at = middle / spread
            cut = side * spread * math.exp(-at * at / 2) / math.sqrt(2 * math.pi) / _above_zero(side * at)
            mean, square = middle + cut, middle * middle + spread * spread + middle * cut
        first, second = first + share * mean, second + share * square
    return first, max(0.0, second - first * first)


def _above(wanted, gap, variance, size, side):
    """P(the gain of an idea of this kind is more than `wanted`)."""
    if side <= 0 <= wanted:
        return 0.0
    if side == 0 or side > 0 >= wanted:
        return 1.0
    if size == LARGE:
        return _above_zero((gap - wanted) / math.sqrt(variance))
    mean, spread = _shrunk(gap, variance, size)
    whole = _above_zero(side * mean / spread)
    beyond = _above_zero(side * (mean - wanted) / spread) / whole  # on the far side of `wanted`, seen from zero
    return beyond if side > 0 else max(0.0, 1 - beyond)

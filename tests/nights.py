"""Simulates nights to choose the keep rule: python tests/nights.py [NIGHTS]. The verdicts are those of lab/verdict.py.

A night is 101 runs, as many as the greedy rule needs for a baseline and 100 experiments; a rule that repeats runs
holds fewer experiments. Scores are synthetic: a run varies by sigma, 15 % of the ideas gain between 0.0002 and 0.01
(evenly in the logarithm), 34 % change nothing, the others lose 0.0015 on average. The greedy rule then keeps 21 changes
of 100; in the night that upstream has published it kept 22 of 125. On a machine that is slow for a few runs now and
then, a run at half the speed scores SLOW_LOSS worse. In the rows "deletions" one idea in five only deletes code. In
those of seeds, one moves the scores of all train.pys by 1.7 sigma, and each by 0.5 sigma of its own; in those of drift
the speed of the machine moves them by 2.5 sigma: so it was on two CPU cores.
"""

import collections
import dataclasses
import math
import random
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.book import Experiment, Run  # noqa: E402
from lab.conditions import SEEDS, effects, fair  # noqa: E402
from lab.verdict import BASELINE_RUNS, judge  # noqa: E402

RUNS = 101
GAINS, USELESS = 0.15, 0.34  # shares of the ideas; the others do harm
LASTS, FASTER, PROBE = 0.9, 0.06, 0.01  # of a drift: from run to run; its size, and the error of measuring it
SLOW_LOSS, BECOMES_SLOW, RECOVERS = 0.004, 0.03, 0.3  # the last two: chance with every run


@dataclasses.dataclass(frozen=True)
class World:
    """What ideas and runs are like."""

    sigma: float = 0.0005
    gains: float = GAINS  # share of the ideas
    useless: float = USELESS
    size: float = 1.0  # of gains and losses, in those that are published
    slow: bool = False  # now and then
    deletions: float = 0.0  # share of the ideas
    seeds: float = 0.0  # standard deviation, in sigma, of what a seed does to all train.pys
    own: float = 0.0  # and of what it does to one alone
    drift: float = 0.0  # and of what the speed of the machine does, which comes and goes within some ten runs


WORLDS = {
    "as published": World(),
    "slow at times": World(slow=True),
    "sigma 0.0003": World(sigma=0.0003),
    "sigma 0.001": World(sigma=0.001),
    "sigma 0.003": World(sigma=0.003),
    "sigma 0.01": World(sigma=0.01),
    "gains three times rarer": World(gains=GAINS / 3),
    "gains three times as often": World(gains=3 * GAINS),
    "all three times smaller": World(size=1 / 3),
    "all three times larger": World(size=3.0),
    "deletions": World(deletions=0.2),
    "seeds": World(seeds=1.7, own=0.5),
    "seeds, sigma 0.003": World(sigma=0.003, seeds=1.7, own=0.5),
    "seeds and drift": World(seeds=1.7, own=0.5, drift=2.5),
    "seeds and drift, sigma 0.003": World(sigma=0.003, seeds=1.7, own=0.5, drift=2.5),
    "equal code (A/A)": World(gains=0.0, useless=1.0),
}


def true_gain(chance, gains=GAINS, useless=USELESS):
    """What one idea is worth, where so large shares of them gain or do nothing: bits per byte, positive is better."""
    kind = chance.random()
    if kind < gains:
        return math.exp(chance.uniform(math.log(0.0002), math.log(0.01)))
    return 0.0 if kind < gains + useless else -chance.expovariate(1 / 0.0015)


class Machine:
    """A night's runs, and how fast each was."""

    def __init__(self, chance, world):
        self.chance, self.world, self.slow, self.left = chance, world, False, RUNS
        self.seeds = [chance.gauss(0, world.seeds * world.sigma) for _ in range(SEEDS)]
        self.own = {}  # {(number of an idea, seed): what that does to it alone}
        self.drift = chance.gauss(0, 1)

    def run(self, experiment, level):
        """`experiment` with one more run of a train.py whose true score is `level`."""
        self.left -= 1
        if self.world.slow:
            self.slow = self.chance.random() < (1 - RECOVERS if self.slow else BECOMES_SLOW)
        seed = len(experiment.runs) % SEEDS
        own = self.own.setdefault((experiment.commit, seed), self.chance.gauss(0, self.world.own * self.world.sigma))
        score = self.chance.gauss(level + SLOW_LOSS * self.slow, self.world.sigma) + self.seeds[seed] + own
        pace = None
        if self.world.drift:
            self.drift = self.chance.gauss(LASTS * self.drift, math.sqrt(1 - LASTS**2))
            score -= self.drift * self.world.drift * self.world.sigma
            pace = math.exp(FASTER * self.drift + self.chance.gauss(0, PROBE))
        run = Run(score, 0.5 if self.slow else 1.0, seed=seed, pace=pace)
        return dataclasses.replace(experiment, runs=(*experiment.runs, run))


@dataclasses.dataclass
class Night:
    """What has become of one."""

    gain: float = 0.0  # true gain of the last best over the baseline
    kept: int = 0
    false: int = 0  # of those, how many gain nothing; deletions do not have to
    experiments: int = 0
    deleted: int = 0  # deletions that were kept without being better
    beliefs: list = dataclasses.field(default_factory=list)  # [(P(better) at a keep, whether it is better)]


def compared(experiments):
    """The experiments as a tag knows them: their scores as under the same conditions."""
    return fair(experiments, effects(experiments))


def night(seed, world, greedy=False) -> Night:
    """One night of a rule in a world."""
    chance = random.Random(seed)
    machine, level, found, at = Machine(chance, world), 0.0, Night(), 0  # at: the place of the best
    best = Experiment("0", 0.0, 0.0, "keep", "")
    for _ in range(1 if greedy else BASELINE_RUNS):
        best = machine.run(best, level)
    book = compared([best])
    while machine.left:
        deletes = chance.random() < world.deletions
        gain = world.size * true_gain(chance, world.gains, world.useless)
        found.experiments += 1
        candidate, decision, ran_again = Experiment(f"{found.experiments}", 0.0, 0.0, "", ""), "again", False
        while decision in ("again", "best") and machine.left:
            if decision == "best":
                book[at], ran_again = machine.run(book[at], level), True
                book = compared(book)
            else:
                candidate = machine.run(candidate, level - gain)
            ruling = judge(candidate, book[at], book, greedy, ran_again, deletes)
            decision = ruling.decision
        book = compared([*book, dataclasses.replace(candidate, status="keep" if decision == "keep" else "discard")])
        if decision == "keep":
            level, at = level - gain, len(book) - 1
            deleted, told = "deletes" in ruling.reason, re.search(r"P\(better\) (?:over )?(\d+)%", ruling.reason)
            found.kept, found.deleted = found.kept + 1, found.deleted + deleted
            found.false += not deleted and gain <= 0
            found.beliefs += [(int(told[1]) / 100, gain > 0)] if told else []
    found.gain = -level
    return found


def mean(world, greedy, nights) -> tuple[float, float, float, float, float]:
    """(true gain, kept changes, false keeps, deletions kept, experiments) of a night, over so many of them."""
    held = [night(seed, world, greedy) for seed in range(nights)]
    columns = ((each.gain, each.kept, each.false, each.deleted, each.experiments) for each in held)
    return tuple(map(statistics.fmean, zip(*columns)))


def calibration(world, nights) -> dict[int, tuple[int, float]]:
    """{tenth of P(better): (keeps that were told it, share of them that are better)}."""
    told = collections.defaultdict(list)
    for seed in range(nights):
        for probability, better in night(seed, world).beliefs:
            told[min(9, int(10 * probability))].append(better)
    return {tenth: (len(found), statistics.fmean(found)) for tenth, found in sorted(told.items())}


def main():
    nights = int(sys.argv[1]) if sys.argv[1:] else 400
    print(f"{nights} nights of {RUNS} runs, mean per night; share: of what the greedy rule gains in the same world")
    print("world\trule\ttrue gain\tshare\tkept\tfalse keeps\tdeletions kept\texperiments")
    for name, world in WORLDS.items():
        greedy = mean(world, True, nights)
        for rule, (gain, kept, *counts) in ("greedy", greedy), ("ours", mean(world, False, nights)):
            share = f"{gain / greedy[0]:.0%}" if greedy[0] else "-"
            counted = (f"{count:.2f}" for count in (kept, *counts))
            print(name, rule, f"{gain:.5f}", share, *counted, sep="\t", flush=True)
    for name in "as published", "sigma 0.003":
        print(f"\nof what is kept at a P(better), so much is better ({name}):")
        for tenth, (count, share) in calibration(WORLDS[name], nights).items():
            print(f"{tenth}0-{tenth + 1}0 %\t{share:.0%} of {count}")


if __name__ == "__main__":
    main()

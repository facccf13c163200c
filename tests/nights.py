"""Simulates nights to choose the keep rule: python tests/nights.py [NIGHTS]. The verdicts are those of lab/verdict.py.

A night is 101 runs, as many as the greedy rule needs for a baseline and 100 experiments; a rule that repeats runs
holds fewer experiments. Scores are synthetic: a run varies by SIGMA, 15 % of the ideas gain between 0.0002 and 0.01
(evenly in the logarithm), 34 % change nothing, the others lose 0.0015 on average. The greedy rule then keeps 21 changes
of 100; in the night that upstream has published it kept 22 of 125. On a machine that is slow for a few runs now and
then, a run at half the speed scores SLOW_LOSS worse.
"""

import dataclasses
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.book import Experiment, Run  # noqa: E402
from lab.verdict import BASELINE_RUNS, judge  # noqa: E402

RUNS, SIGMA = 101, 0.0005
GAINS, USELESS = 0.15, 0.34  # shares of the ideas; the others do harm
SLOW_LOSS, BECOMES_SLOW, RECOVERS = 0.004, 0.03, 0.3  # the last two: chance with every run
RULES = (("greedy", True, False), ("ours", False, False), ("greedy, slow", True, True), ("ours, slow", False, True))


def true_gain(chance, gains=GAINS):
    """What one idea is worth, where so large a share of them gains: bits per byte, positive is better."""
    kind = chance.random()
    if kind < gains:
        return math.exp(chance.uniform(math.log(0.0002), math.log(0.01)))
    return 0.0 if kind < gains + USELESS else -chance.expovariate(1 / 0.0015)


class Machine:
    """A night's runs, and how fast each was."""

    def __init__(self, chance, may_be_slow):
        self.chance, self.may_be_slow, self.slow, self.left = chance, may_be_slow, False, RUNS

    def run(self, experiment, level):
        """`experiment` with one more run of a train.py whose true score is `level`."""
        self.left -= 1
        if self.may_be_slow:
            self.slow = self.chance.random() < (1 - RECOVERS if self.slow else BECOMES_SLOW)
        score = self.chance.gauss(level + SLOW_LOSS * self.slow, SIGMA)
        return dataclasses.replace(experiment, runs=(*experiment.runs, Run(score, 0.5 if self.slow else 1.0)))


def night(seed, greedy, may_be_slow):
    """(true gain of the last best over the baseline, kept changes, kept changes that gain nothing, experiments)."""
    chance = random.Random(seed)
    machine, level, kept, false, experiments = Machine(chance, may_be_slow), 0.0, 0, 0, 0
    best = Experiment("", 0.0, 0.0, "keep", "")
    for _ in range(1 if greedy else BASELINE_RUNS):
        best = machine.run(best, level)
    repeated = []  # experiments that ran more than once; the others say nothing about the noise
    while machine.left:
        gain, candidate, decision, best_ran_again = true_gain(chance), Experiment("", 0.0, 0.0, "", ""), "again", False
        experiments += 1
        while decision in ("again", "best") and machine.left:
            if decision == "best":
                best, best_ran_again = machine.run(best, level), True
            else:
                candidate = machine.run(candidate, level - gain)
            decision = judge(candidate, best, [*repeated, best], greedy, best_ran_again).decision
        out = candidate
        if decision == "keep":
            level, kept, false = level - gain, kept + 1, false + (gain <= 0)
            best, out = candidate, best
        if len(out.runs) > 1:
            repeated.append(out)
    return -level, kept, false, experiments


def table(nights):
    """[(rule, mean true gain, kept changes, false keeps, experiments)] over so many nights of each rule."""
    rows = []
    for rule, *how in RULES:
        columns = zip(*(night(seed, *how) for seed in range(nights)))
        rows.append((rule, *map(statistics.fmean, columns)))
    return rows


def main():
    nights = int(sys.argv[1]) if sys.argv[1:] else 1000
    print(f"{nights} nights of {RUNS} runs, sigma {SIGMA}: mean per night")
    print("rule\ttrue gain\tkept\tfalse keeps\texperiments")
    for rule, gain, kept, false, experiments in table(nights):
        print(f"{rule}\t{gain:.5f}\t{kept:.2f}\t{false:.2f}\t{experiments:.1f}")


if __name__ == "__main__":
    main()

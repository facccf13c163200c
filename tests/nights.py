"""Simulates nights to choose the keep rule: python tests/nights.py [NIGHTS]. The decisions are those of lab/verdict.py.

A night is 101 runs, as many as the greedy rule needs for a baseline and 100 experiments; a rule that repeats runs
holds fewer experiments. Scores are synthetic: a run varies by SIGMA, 15 % of the ideas gain between 0.0002 and 0.01
(evenly in the logarithm), 34 % change nothing, the others lose 0.0015 on average. The greedy rule then keeps 21 changes
of 100; in the night that upstream has published it kept 22 of 125.
"""

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import verdict as rules  # noqa: E402

RUNS, SIGMA = 101, 0.0005


def true_gain(chance):
    """What one idea is worth: bits per byte, positive is better."""
    kind = chance.random()
    if kind < 0.15:
        return math.exp(chance.uniform(math.log(0.0002), math.log(0.01)))
    return 0.0 if kind < 0.49 else -chance.expovariate(1 / 0.0015)


def night(seed, greedy):
    """(true gain of the last best over the baseline, kept changes, kept changes that gain nothing, experiments)."""
    chance = random.Random(seed)
    left, level, kept, false, experiments = RUNS, 0.0, 0, 0, 0

    def run(level):
        nonlocal left
        left -= 1
        return chance.gauss(level, SIGMA)

    best = [run(level) for _ in range(1 if greedy else rules.BASELINE_RUNS)]
    repeated = []  # scores of the commits that ran more than once; the others say nothing about the noise
    while left:
        gain, scores, verdict = true_gain(chance), [], "again"
        experiments += 1
        while verdict == "again" and left:
            scores.append(run(level - gain))
            noise = rules.GREEDY if greedy else rules.pooled_noise([*repeated, best, scores])
            verdict, _ = rules.decide(scores, best, noise)
        out = scores
        if verdict == "keep":
            level, kept, false = level - gain, kept + 1, false + (gain <= 0)
            best, out = scores, best
        if len(out) > 1:
            repeated.append(out)
    return -level, kept, false, experiments


def table(nights):
    """[(rule, mean true gain, kept changes, false keeps, experiments)] over so many nights of each rule."""
    rows = []
    for rule, greedy in (("greedy", True), ("ours", False)):
        columns = zip(*(night(seed, greedy) for seed in range(nights)))
        rows.append((rule, *map(statistics.fmean, columns)))
    return rows


def main():
    nights = int(sys.argv[1]) if sys.argv[1:] else 1000
    print(f"{nights} nights of {RUNS} runs, sigma {SIGMA}: mean per night")
    print("rule\ttrue gain\tkept\tfalse keeps\texperiments")
    rows = table(nights)
    for rule, gain, kept, false, experiments in rows:
        print(f"{rule}\t{gain:.5f}\t{kept:.2f}\t{false:.2f}\t{experiments:.1f}")
    (_, gain, _, false, _), (_, our_gain, _, our_false, _) = rows
    print(f"ours: {our_gain / gain:.1%} of greedy's true gain, {false / our_false:.1f} times fewer false keeps")


if __name__ == "__main__":
    main()

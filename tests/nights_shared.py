"""Simulates nights of many machines that share ideas, some of them liars: python tests/nights_shared.py [SIZE].

A night is 96 runs on each machine, all machines side by side; what is shared after one run is known to all before the
next. Ideas are as in nights_parallel.py: they run short on every machine by itself. Verdicts are those of
lab/verdict.py, and lab/trust.py says which idea of others is tried when. The noise of a machine lies between 0.0005 and
0.01, evenly in the logarithm. SIZE: about how many honest machines a row of the table is made of.

Assumed of ideas that travel: the gain on another machine is the same (70 %), half (20 %), or none or a loss (10 %). An
idea that still gained where a night had got to a level L gains at a better level, in another night, only as often as a
new idea does there, compared with L. One new idea in five was invented by somebody else before.
"""

import collections
import dataclasses
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from nights import GAINS, true_gain  # noqa: E402
from nights_parallel import HALVING, UNITS  # noqa: E402

from lab import trust  # noqa: E402
from lab.book import Experiment, Run  # noqa: E402
from lab.runs import comparable  # noqa: E402
from lab.trust import Claim, Trial, next_claim  # noqa: E402
from lab.verdict import BASELINE_RUNS, judge, noise  # noqa: E402

QUIET, NOISY = 0.0005, 0.01  # sigma of a run
THIRD = (NOISY / QUIET) ** (1 / 3)  # the quiet are the quietest third of the machines, the noisy the noisiest
SAME, HALF = 0.7, 0.2  # of the ideas that travel: the same gain, half of it; the others nothing or a loss
AGAIN = 0.2  # of the new ideas: invented by somebody else before
LIARS = 1 / 3
LIES, NAMES, FRIENDS = 12, 32, 4  # of each liar in a night; fresh names of one; others that confirm each or copy
WAYS = ("big names", "fresh names", "confirming", "copying")


@dataclasses.dataclass(frozen=True)
class Idea:
    """An edit: what it gains where it was invented, and how much that night had gained before."""

    key: str
    gain: float
    level: float = 0.0


class Machine:
    """An honest machine's night."""

    def __init__(self, name, world, seed):
        self.name, self.world, self.chance = name, world, random.Random(f"{seed} {name}")
        self.sigma = math.exp(self.chance.uniform(math.log(QUIET), math.log(NOISY)))
        self.gained, self.best = 0.0, Experiment("", 0.0, 0.0, "keep", "")
        self.book = []
        self.idea, self.claim, self.gain, self.candidate = None, None, 0.0, None
        self.tried, self.trials, self.since, self.count = set(), [], 0, collections.Counter()

    def run(self):
        """One run, of whatever is next."""
        if len(self.best.runs) < BASELINE_RUNS:
            self.best = self._ran(self.best, 0.0)
            self.book = [self.best]
            return
        if not self.candidate:
            self._begin()
        self.candidate = self._ran(self.candidate, self.gain)
        decision = judge(self.candidate, self.best, self.book).decision
        if decision != "again":
            self._end(decision == "keep")

    def _ran(self, experiment, gain):
        run = Run(self.chance.gauss(-self.gained - gain, self.sigma), 1.0)
        return dataclasses.replace(experiment, runs=(*experiment.runs, run))

    def _begin(self):
        self.candidate, self.claim = Experiment("", 0.0, 0.0, "", ""), None
        if self.world.shares and self.since + 1 >= trust.EVERY:
            news = [claim for claim in self.world.claims if claim.key not in self.tried]
            self.claim = next_claim(news, self.trials, self.since, self.name)
        if self.claim:
            self.idea = self.world.ideas[self.claim.key]
            self.gain = self._elsewhere(self.idea)
        else:
            self.idea, self.gain = self._invented()
        self.tried.add(self.idea.key)

    def _invented(self):
        """(an idea of its own, what it gains here)."""
        if self.chance.random() < AGAIN and (known := self.world.invented):
            idea = self.chance.choice(known)
            if idea.key not in self.tried:
                return idea, self._elsewhere(idea)
        gain = true_gain(self.chance, GAINS * 2 ** (-self.gained / HALVING))
        return self.world.invent(gain, self.gained), gain

    def _elsewhere(self, idea):
        """What an idea of somebody else gains here."""
        kind, gain = self.chance.random(), idea.gain
        if kind >= SAME + HALF:
            return min(0.0, true_gain(self.chance, 0))
        if gain > 0 and self.chance.random() >= 2 ** (min(0.0, idea.level - self.gained) / HALVING):
            gain = 0.0  # something that is here already does the same
        return gain if kind < SAME else gain / 2

    def _end(self, held):
        status = "keep" if held else "discard"
        candidate, best = dataclasses.replace(self.candidate, commit=f"{len(self.book)}", status=status), self.best
        self.book.append(candidate)
        if held and self.world.shares:
            self._share(candidate, best)
        if self.claim:
            self.trials.append(Trial(self.idea.key, self.claim.who, held))
        self.since = 0 if self.claim else self.since + 1
        if held:
            self.gained += self.gain
            self.best = candidate
        lie = bool(self.claim) and self.world.lies(self.claim.who)
        self.count.update(experiments=1, others=bool(self.claim), bad=lie, kept=held, false=held and self.gain <= 0)
        self.candidate = None

    def _share(self, candidate, best):
        scores, rivals = comparable(candidate, best)
        error = noise(self.book)[0] * math.sqrt(1 / len(scores) + 1 / len(rivals))
        gap = statistics.fmean(rivals) - statistics.fmean(scores)
        self.world.news.append(Claim(self.idea.key, self.name, gap / error, True))


class World:
    """So many machines and what they tell each other in a night."""

    def __init__(self, machines, shares=True, lying="", seed=0):
        self.shares, self.lying, self.chance = shares, lying, random.Random(f"{seed} world")
        self.ideas, self.invented, self.claims, self.news = {}, [], [], []
        self.liars = round(machines * LIARS) if lying else 0
        self.honest = [Machine(f"peer {i}", self, seed) for i in range(machines - self.liars)]

    def hold(self):
        """All of the night; returns the honest machines."""
        for unit in range(UNITS):
            for liar in range(self.liars):
                self._lie(liar, unit)
            self.claims += self.news
            self.news = []
            for machine in self.honest:
                machine.run()
        return self.honest

    def invent(self, gain, level=0.0):
        """A new idea, which others may invent again."""
        idea = Idea(f"idea {len(self.ideas)}", gain, level)
        self.ideas[idea.key] = idea
        self.invented.append(idea)
        return idea

    def lies(self, who):
        """Whether that is the name of a liar."""
        return who.startswith("liar")

    def _lie(self, liar, unit):
        """What a liar says before a run of the others, LIES times a night, from its beginning on."""
        name = f"liar {liar}"
        if self.lying == "copying":  # what is new, and greater, as its own
            true = [claim for claim in self.news if not self.lies(claim.who)]
            copied = (claim for claim in true if self.chance.random() < FRIENDS / self.liars)
            self.news += [Claim(claim.key, name, 1000.0, True) for claim in copied]
        if unit >= (NAMES if self.lying == "fresh names" else LIES):
            return
        idea = Idea(f"lie {liar} {unit}", min(0.0, true_gain(self.chance, 0)))
        self.ideas[idea.key] = idea
        names = [f"{name} {unit}" if self.lying == "fresh names" else name]
        if self.lying == "confirming":
            names += [f"liar {(liar + i) % self.liars}" for i in range(1, min(FRIENDS + 1, self.liars))]
        self.news += [Claim(idea.key, each, 1000.0, True) for each in names]


COLUMNS = ("experiments", "others", "bad", "kept", "false")


def mean(machines, shares=True, lying="", nights=1):
    """Of the honest machines of so many nights: true gain (median, mean, of the quiet, of the noisy) and counts."""
    held = [machine for seed in range(nights) for machine in World(machines, shares, lying, seed).hold()]
    found = {name: statistics.fmean(machine.count[name] for machine in held) for name in COLUMNS}
    found["gain"] = statistics.median(machine.gained for machine in held)
    found["mean"] = statistics.fmean(machine.gained for machine in held)
    found["share"] = found["others"] / found["experiments"]
    for name, (low, high) in {"quiet": (QUIET, THIRD * QUIET), "noisy": (NOISY / THIRD, NOISY)}.items():
        found[name] = statistics.fmean([m.gained for m in held if low <= m.sigma < high] or [math.nan])
    return found


def main():
    size = int(sys.argv[1]) if sys.argv[1:] else 256
    print("machines", "", "gain", "mean", "quiet", "noisy", "from others", *COLUMNS[2:], sep="\t")
    for machines in (1, 4, 16, 64, 256):
        for name, shares, lying in [("alone", False, ""), ("sharing", True, ""), *((way, True, way) for way in WAYS)]:
            found = mean(machines, shares, lying, max(1, size // machines))
            gains = (f"{found[name]:.4f}" for name in ("gain", "mean", "quiet", "noisy"))
            counts = (f"{found[name]:.1f}" for name in COLUMNS[2:])
            print(machines, f"{name:12}", *gains, f"{found['share']:.0%}", *counts, sep="\t", flush=True)


if __name__ == "__main__":
    main()

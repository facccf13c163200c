"""Trust: which idea of others is tried next, and whether one is due at all.

Whatever comes from a stranger is a claim: a name costs nothing, and neither does a number. What counts is what came of
their ideas here. Two questions are asked of that record, and both by one number, the chance that an idea holds:

- Which? The one with the largest claimed gain times this chance. The gain is capped, since anyone can write any.
- When? After a pause of PAUSE / chance experiments: the share of the experiments that goes to ideas of some kind is
  at most proportional to how often that kind holds.

The chance of a peer's ideas is the share of its last RECENT trials that held here, with a prior. The prior is the
chance of a newcomer: the share that held of the first trials of the last RECENT peers. So a liar sinks with every
trial, and a thousand fresh names share one record: each that fails makes the pause before the next one longer. The
pause has an end, PAUSE * (WEIGHT + RECENT) / (WEIGHT * PRIOR) experiments, since only the last trials count. That is
the price of finding an honest newcomer among liars in the end. Good neighbours help a newcomer to its first trial, and
excuse no failure: the prior of a peer that was tried is never above PRIOR.

Pure functions, which know no file and no clock. The constants are chosen by tests/nights_shared.py, whose table is in
docs/sharing-simulation.md.
"""

import collections
import dataclasses
import hashlib
import math

EVERY = 2  # at most every second experiment is an idea of others; every third gained the same
CAP = 4.0  # standard errors: a larger gain counts as this one; 2 seemed to gain less, 6 and 8 to cost more trials
PRIOR, WEIGHT = 0.15, 1  # chance of a newcomer where nothing was tried yet, and as how many trials it counts
RECENT = 8  # trials of a peer that count, the last ones, and likewise newcomers; 5 and 16 gained the same
PAUSE = 0.5  # experiments, over the chance; 0.7 cost more trials, 1 (PRIOR 0.25, WEIGHT 2) gained no more


@dataclasses.dataclass(frozen=True)
class Claim:
    """One machine says that an edit has gained there."""

    key: str  # of the edit, the same on all machines
    who: str
    sigmas: float  # the gain in its standard errors, whatever a stranger has written
    same_task: bool


@dataclasses.dataclass(frozen=True)
class Trial:
    """An idea of `who` was tried here, or was such that it could not be."""

    key: str
    who: str
    held: bool  # it has beaten its base by the keep rule


# ---------------------------------------------------------------------------------------------------------------------
# The record


class Record:
    """What came of the ideas of others here."""

    def __init__(self, trials):
        """trials: all of them, in their order."""
        self.outcomes = collections.defaultdict(list)  # of each peer, in their order
        firsts = []
        for trial in trials:
            if trial.who not in self.outcomes:
                firsts.append(trial.held)
            self.outcomes[trial.who].append(trial.held)
        self.newcomer = _chance(firsts, PRIOR)
        self.known = {who: _chance(held, min(PRIOR, self.newcomer)) for who, held in self.outcomes.items()}

    def chance(self, who):
        """That an idea of this peer holds here, as far as the record tells."""
        return self.known.get(who, self.newcomer)

    def vouches(self, who):
        """Whether this peer's word counts for the ideas of others: an idea of its own has held here of late."""
        return any(self.outcomes.get(who, ())[-RECENT:])


def _chance(outcomes, prior):
    """The share of the last outcomes that held, with a prior that weighs as much as WEIGHT of them."""
    recent = outcomes[-RECENT:]
    return (WEIGHT * prior + sum(recent)) / (WEIGHT + len(recent))


# ---------------------------------------------------------------------------------------------------------------------
# The next idea


def next_claim(claims, trials, since, secret="") -> Claim | None:
    """The idea of others that the next experiment tries; None where it is the turn of one of this machine's own.

    claims: whatever others say, in any order, without what this machine has tried by itself. trials: what was tried
    here of it, in order. since: experiments since the last one that came from others, or since the first. secret: a
    word that strangers do not know; it decides among equals, on each machine differently, so that nobody is first by
    its name.
    """
    if since + 1 < EVERY:
        return None
    record, tried, ideas = Record(trials), {trial.key for trial in trials}, collections.defaultdict(list)
    for claim in claims:
        if claim.sigmas > 0 and claim.key not in tried:  # which NaN is not
            ideas[claim.key].append(claim)
    due, most = [], (False, 0.0)
    for same in ideas.values():
        first, chance = _heard(same, record, secret)
        if (since + 1) * chance >= PAUSE:
            rank = first.same_task, min(first.sigmas, CAP) * chance
            due, most = ([], rank) if rank > most else (due, most)
            if rank == most:
                due.append(first)
    return min(due, key=lambda claim: (draw(secret, claim.who), draw(secret, claim.key)), default=None)


def _heard(claims, record, secret):
    """(the claim of the most trusted of those who say the same, the chance that it holds).

    The others add to the chance if their own ideas have held here: it is that at least one of them is right.
    """
    first = claims[0]
    if len(claims) == 1:
        return first, record.chance(first.who)
    first = max(claims, key=lambda c: (record.chance(c.who), min(c.sigmas, CAP), draw(secret, c.who)))
    others = {claim.who for claim in claims if claim.who != first.who and record.vouches(claim.who)}
    wrong = math.prod(1 - record.chance(who) for who in [first.who, *sorted(others)])
    return first, 1 - wrong


def draw(secret, text):
    """A rank for a text that nobody foresees who does not know the secret."""
    return hashlib.sha256(f"{secret}\n{text}".encode(errors="replace")).digest()

"""Researchers that propose what was found elsewhere, before or beside another one, which goes on by itself.

What comes from other machines is the word of strangers: an edit that may not even compile, and numbers that anyone can
write. It becomes a draft like any other, which is measured here.
"""

import asyncio
import collections
import dataclasses
import itertools
import secrets
import threading
import time

from lab.answer import carried_over, objection
from lab.book import title
from lab.exchange import Exchange
from lab.peers import Idea
from lab.researcher import Brief, Draft, Enough, Failure, Researcher, Say, evidence
from lab.trust import CAP, Claim, Record, Trial, draw, next_claim
from prepare import one_line


class Beside(Researcher):
    """Whatever it does not do itself, the `own` researcher does, if there is one."""

    def __init__(self, own: Researcher | None):
        self.own = own
        self.has_key = not own or own.has_key
        self.reads_profiles = bool(own and own.reads_profiles)

    @property
    def spent(self):
        return self.own and self.own.spent

    @property
    def max_cost(self):
        return self.own and self.own.max_cost

    def check(self):
        if self.own:
            self.own.check()

    def state(self):
        return self.own.state() if self.own else ""

    def think_ahead(self, brief, count):
        if self.own and count > 0:
            self.own.think_ahead(brief, count)

    def failed(self, draft: Draft, failure: Failure):
        if self.own:
            self.own.failed(draft, failure)

    def conflicted(self, draft: Draft):
        if self.own:
            self.own.conflicted(draft)


def with_ideas(brief: Brief, ideas) -> Brief:
    """The brief with more that was found elsewhere, in words."""
    return dataclasses.replace(brief, ideas=(*brief.ideas, *ideas))


# ---------------------------------------------------------------------------------------------------------------------
# Of another tag


class Replay(Beside):
    """Proposes the changes of another tag in their order, then what its own researcher proposes, if there is one.

    A change that cannot be carried over to the present best goes to that one as an idea in words.
    """

    def __init__(self, drafts: list[Draft], own: Researcher | None = None):
        super().__init__(own)
        self.left, self.ideas = list(drafts), ()

    def state(self):
        return f"{len(self.left)} to replay: {self.left[0].description}" if self.left else super().state()

    async def draft(self, brief):
        if self.left:
            return self.left.pop(0)
        if not self.own:
            raise Enough("all changes have been replayed")
        return await self.own.draft(with_ideas(brief, self.ideas))

    def think_ahead(self, brief, count):
        super().think_ahead(with_ideas(brief, self.ideas), count - len(self.left))

    def conflicted(self, draft):
        self.ideas += (f"{draft.description}: {draft.hypothesis}".rstrip(": "),)


# ---------------------------------------------------------------------------------------------------------------------
# Of other machines

TRIES, SECONDS = 5, 5.0  # for one draft: ideas that are looked at, each of another machine, and how long about
TOLD = 20  # ideas that the own researcher is told of


class Others(Beside):
    """Has an idea of another machine tried beside those of its own researcher, whenever one is due by lab/trust.

    What was tried of them is remembered by the commits of their candidates, and so by the Brief: their trailers From
    (who/tag/commit) and Edit (Idea.key). What could not be tried is known until the end of the loop.
    """

    def __init__(self, exchange: Exchange, own: Researcher, say: Say):
        super().__init__(own)
        self.exchange, self.say, self.secret = exchange, say, secrets.token_hex()
        self.turn = asyncio.Lock()
        self.choosing = threading.Lock()  # whoever is cancelled in turn leaves a thread behind
        self.since: int | None = None  # own drafts since the last idea of others; None until the first draft
        self.given: set[str] = set()  # keys of the ideas that were given
        self.unfit: set[str] = set()  # names of those that are not worth a trial
        self.unsound: dict[str, tuple[int, Trial]] = {}  # {name: after how many trials, and one that failed}
        self.told: tuple[str, ...] = ()  # what the own researcher is told of others

    async def draft(self, brief):
        self.exchange.look()
        async with self.turn:
            if self.since is None:
                latest = reversed(trials_of(brief.experiments, brief.origins))
                self.since = len(list(itertools.takewhile(lambda trial: trial is None, latest)))
            draft = await asyncio.to_thread(self.choose, brief)
            if draft:  # nothing is waited for from here on, so that whoever is cancelled loses nothing
                self.since = 0
                self.given.add(draft.origin["Edit"])
                return draft
        draft = await self.own.draft(with_ideas(brief, self.told))
        self.since += 1
        return draft

    def think_ahead(self, brief, count):
        super().think_ahead(with_ideas(brief, self.told), count)

    def conflicted(self, draft):
        if draft.origin.get("Researcher") != "others":
            return super().conflicted(draft)
        self.unfit.add(draft.origin["From"])

    def choose(self, brief: Brief) -> Draft | None:
        """The idea of others that is due, as a change of the best train.py; None where it is an own one's turn."""
        with self.choosing:
            ideas, ends = self.exchange.ideas(), time.monotonic() + SECONDS
            standing, tried = standing_of(ideas), {origin.get("Edit") for origin in brief.origins.values()} | self.given
            kept = [idea for idea in ideas if idea.status == "keep" and (idea.gain or 0) > 0]
            new = [idea for idea in kept if idea.key not in tried and idea.name not in self.unsound]
            self.told = in_words(self.promising(new, self.trials(brief), brief.task.name), standing)
            seen = set()  # who has had an idea looked at for this draft
            for _ in range(TRIES):
                left = [idea for idea in new if idea.name not in self.unfit and idea.who not in seen]
                claims = [claim_of(idea, brief.task.name) for idea in left]
                claim = next_claim(claims, self.trials(brief), self.since, self.secret)
                if not claim or time.monotonic() > ends:
                    break
                idea = left[claims.index(claim)]
                if draft := self.fitted(idea, brief):
                    self.say(f"from another machine: {idea.name}, {gain_in_words(idea)}, {standing[idea.key]}", "dim")
                    return draft
                self.unfit.add(idea.name)
                seen.add(idea.who)
            return None

    def trials(self, brief: Brief) -> list[Trial]:
        """What came of ideas of others, in order: those that were tried, and those that could not be."""
        recorded = [*filter(None, trials_of(brief.experiments, brief.origins))]
        placed = [*((place, 1, trial) for place, trial in enumerate(recorded))]
        placed += [(place, 0, trial) for place, trial in self.unsound.values()]
        return [trial for _, _, trial in sorted(placed, key=lambda each: each[:2])]

    def promising(self, ideas, trials: list[Trial], task: str) -> list[Idea]:
        """Ideas in the order in which they are worth telling; among equals, nobody is first by its name."""
        record = Record(trials)

        def promise(idea):
            claim = claim_of(idea, task)
            expected = min(claim.sigmas, CAP) * record.chance(idea.who)
            return claim.same_task, expected, draw(self.secret, idea.who), draw(self.secret, idea.key)

        return sorted(ideas, key=promise, reverse=True)

    def fitted(self, idea: Idea, brief: Brief) -> Draft | None:
        """An idea as a change of the best train.py; None where that is not worth a trial."""
        origin = {"Researcher": "others", "From": idea.name, "Edit": idea.key}
        origin |= evidence(idea.gain, idea.gain_in_sigmas)
        draft = Draft(idea.source, title(idea.description), idea.hypothesis, origin, idea.base)
        source, began = carried_over(draft, brief.source), time.monotonic()
        if source is None:
            return None
        # No machine can have kept what does not compile; what takes long to read would take so at every draft.
        if objection(idea.source, idea.base, frozenset()) or time.monotonic() - began > SECONDS:
            trials = len([*filter(None, trials_of(brief.experiments, brief.origins))])
            self.unsound[idea.name] = trials, Trial(idea.name, idea.who, held=False)
            return None
        if objection(source, brief.source, brief.tried):
            return None
        return dataclasses.replace(draft, source=source, base=brief.source)


# ---------------------------------------------------------------------------------------------------------------------
# What is known of the ideas of others


def trials_of(experiments, origins: dict[str, dict[str, str]]) -> list[Trial | None]:
    """Of each experiment after the baseline, in order: the trial of an idea of others, or None for an own one.

    origins: {commit: Draft.origin}.
    """
    carried = {origin["From"] for origin in origins.values() if origin.get("Researcher") == "carried over"}
    found = []
    for experiment in experiments[1:]:
        origin, held = origins.get(experiment.commit, {}), experiment.status == "keep" or experiment.commit in carried
        theirs = origin.get("Researcher") == "others"
        found.append(Trial(origin.get("Edit", ""), origin["From"].partition("/")[0], held) if theirs else None)
    return found


def claim_of(idea: Idea, task: str) -> Claim:
    """What lab/trust has to know of an idea; a gain whose noise is not known counts as one standard error."""
    sigmas = 1.0 if idea.gain_in_sigmas is None else idea.gain_in_sigmas
    return Claim(idea.key, idea.who, sigmas, idea.task == task)


class Standing:
    """How one edit has fared on the machines that say that they have tried it."""

    def __init__(self):
        self.kept, self.tried = set(), set()  # who

    def __str__(self):
        return f"kept by {len(self.kept)} of {len(self.tried)} machine{'s' * (len(self.tried) > 1)} there"


def standing_of(ideas) -> dict[str, Standing]:
    """{key: Standing} of the edits of some ideas; one that repeats another, as it says, counts for both edits."""
    found, named = collections.defaultdict(Standing), {idea.name: idea.key for idea in ideas}
    for idea in ideas:
        for key in {idea.key, named.get(idea.of, idea.key)}:
            found[key].tried.add(idea.who)
            if idea.status == "keep":
                found[key].kept.add(idea.who)
    return found


def gain_in_words(idea: Idea) -> str:
    """What an idea has gained where it comes from, as it is told there."""
    sigmas = "" if idea.gain_in_sigmas is None else f" ({min(idea.gain_in_sigmas, 999):.1f} standard errors)"
    return f"{idea.gain:+.6f}{sigmas}"


def in_words(ideas: list[Idea], standing: dict[str, Standing]) -> tuple[str, ...]:
    """The first edits, a line each, for a model: what, why, and how it has fared where it was tried."""
    lines, keys = {}, set()
    for idea in ideas:
        if idea.key not in keys and idea.description not in lines:  # anybody can share one idea many times
            keys.add(idea.key)
            fared = f"{gain_in_words(idea)} at {idea.budget:g} s of {idea.task} on {idea.device}, {standing[idea.key]}"
            lines[idea.description] = f"{idea.description} [{fared}]: {one_line(idea.hypothesis, 200)}"
    return tuple(lines.values())[:TOLD]

"""Drafts on their way to a trial: asked for ahead, made candidates, and carried over where the best has changed."""

import asyncio
import dataclasses
import re
from collections.abc import Callable

from lab.answer import carried_over, objection
from lab.book import Experiment, title
from lab.brief import make_brief
from lab.peers import edit_key
from lab.researcher import Draft, Researcher, Say
from lab.slots import POLL
from lab.tag import Tag
from prepare import Pause, Trouble

AHEAD = 2  # drafts for each slot, that of the running trial among them; chosen by tests/nights_parallel.py


class Drafts:
    """The drafts of one tag since the start of the loop, and the candidates that have become of them."""

    def __init__(self, tag: Tag, researcher: Researcher, say: Say):
        self.tag, self.researcher, self.say = tag, researcher, say
        self.left: Callable[[], str] = str  # what the limits still allow, in words
        self.taken: dict[str, str] = {}  # {commit: description} of the candidates that a slot is at
        self.asking = 0  # slots that wait for a draft
        self.candidates: dict[str, Draft] = {}  # {commit: draft} of those without a row: their researcher has memories
        self.uncommitted: list[Draft] = []  # they have cost money or trials, and a full disk must not lose them

    @property
    def begun(self) -> int:
        """How many experiments are under way, or will be as soon as there is a draft."""
        return len(self.taken) + self.asking

    def waiting(self) -> bool:
        """Whether there is something to try that needs no new draft."""
        return bool(self.uncommitted or self.candidates.keys() - self.taken.keys())

    def recorded(self, commit: str):
        """Forget the draft of a candidate that has its row."""
        self.candidates.pop(commit, None)

    def brief(self):
        """What a researcher is told at this moment."""
        running = tuple(f"{commit} {description}" for commit, description in self.taken.items())
        return make_brief(self.tag, running, self.left())

    def think_ahead(self, slots: int, left: float):
        """Have the next drafts written while trials run in so many slots, `left` at most."""
        count = min(AHEAD * slots - 1, left)
        if count > 0:
            self.researcher.think_ahead(self.brief(), count)

    async def next(self, over: Callable[[], bool]) -> tuple[str, Draft] | None:
        """(short hash, draft) of what is to be tried next, committed; None where over() says so, or for the moment."""
        if found := self.tag.candidate(self.taken):
            commit, draft = found
            return commit, self.candidates.get(commit, draft)
        self.candidates = {commit: draft for commit, draft in self.candidates.items() if commit in self.taken}
        if not self.uncommitted and not await self._ask(over):
            return None
        found = self._commit_first()
        return None if over() else found

    async def _ask(self, over) -> bool:
        """Wait for a draft of the researcher's; whether there is one now, or something else to try."""
        drafting, held = asyncio.ensure_future(self.researcher.draft(self.brief())), len(self.tag.experiments)
        self.asking += 1
        try:
            while not (drafting.done() or over() or self.waiting()):
                await asyncio.wait([drafting], timeout=POLL)
            if drafting.done():
                self.uncommitted.append(drafting.result())
        except Trouble as trouble:  # what is under way may bring something to go on from
            if isinstance(trouble, Pause) or not self.taken:
                raise
            while self.taken and held == len(self.tag.experiments) and not over():
                await asyncio.sleep(POLL)
        finally:
            self.asking -= 1
            drafting.cancel()
        return bool(self.uncommitted)

    def _commit_first(self):
        """The commit() of the first uncommitted draft, which stays there where that fails."""
        found = self.commit(self.uncommitted[0])
        self.uncommitted.pop(0)
        return found

    def commit(self, draft: Draft) -> tuple[str, Draft] | None:
        """(short hash, draft) of a candidate made of a draft, as a change of the best train.py.

        None, which the owner is told, where the best is another one than it was made from, and it does not fit that.
        """
        best = self.tag.text(self.tag.best.commit)
        if draft.base and draft.base != best:
            source = carried_over(draft, best)
            problem = "it conflicts with the best" if source is None else objection(source, best, self.tag.tried())
            if problem:
                self.researcher.conflicted(draft)
                return self.say(f"not tried: {draft.description} ({problem.splitlines()[0]})", "yellow")
            draft = dataclasses.replace(draft, source=source, base=best)
        if draft.base and "Edit" not in draft.origin:  # as others name it too, so that none of them tries it twice
            draft = dataclasses.replace(draft, origin=draft.origin | {"Edit": edit_key(draft.base, draft.source)})
        commit = self.tag.add(draft)
        self.candidates[commit] = draft
        return commit, draft

    def carry_over(self, experiment: Experiment, draft: Draft, before: Experiment, base: Experiment):
        """Have tried next what the best lacks of two changes that are better than what they go back to.

        experiment: just recorded, and better than its base, which is not `before`, the best until then. If it has taken
        the place of that, what is lacking is what `before` has changed since the two parted.
        """
        tag, loser, edits = self.tag, experiment, draft.edits
        if experiment.status == "keep":
            own = {each.commit for each in tag.lineage(experiment.commit)}
            loser, edits = before, ()
            base = next((each for each in tag.lineage(before.commit) if each.commit in own), None)
        if not base:
            return
        idea = re.sub(r"^(again on \w+: )+", "", loser.description)
        origin = {"Researcher": "carried over", "From": loser.commit}
        again = Draft(tag.text(loser.commit), title(f"again on {tag.best.commit}: {idea}"), origin=origin)
        self.uncommitted.insert(0, dataclasses.replace(again, base=tag.text(base.commit), edits=edits))
        self._commit_first()  # at once, so that a kill or a limit does not lose it

"""Researchers that propose what was found elsewhere, before or beside another researcher who goes on."""

import dataclasses

from lab.researcher import Brief, Draft, Enough, Failure, Researcher


class Replay(Researcher):
    """Proposes the changes of another tag in their order, then what `after` proposes, if there is one.

    A change that cannot be carried over to the present best goes to `after` as an idea in words.
    """

    def __init__(self, drafts: list[Draft], after: Researcher | None = None):
        self.left, self.after, self.ideas = list(drafts), after, ()
        self.has_key = not after or after.has_key

    @property
    def spent(self):
        return self.after and self.after.spent

    @property
    def max_cost(self):
        return self.after and self.after.max_cost

    def check(self):
        if self.after:
            self.after.check()

    def state(self):
        if self.left:
            return f"{len(self.left)} to replay: {self.left[0].description}"
        return self.after.state() if self.after else ""

    async def draft(self, brief):
        if self.left:
            return self.left.pop(0)
        if not self.after:
            raise Enough("all changes have been replayed")
        return await self.after.draft(self._with_ideas(brief))

    def think_ahead(self, brief, count):
        if self.after and count > len(self.left):
            self.after.think_ahead(self._with_ideas(brief), count - len(self.left))

    def failed(self, draft: Draft, failure: Failure):
        if self.after:
            self.after.failed(draft, failure)

    def conflicted(self, draft):
        self.ideas += (f"{draft.description}: {draft.hypothesis}".rstrip(": "),)

    def _with_ideas(self, brief: Brief):
        return dataclasses.replace(brief, ideas=(*brief.ideas, *self.ideas))

"""A language model as a researcher, asked for one experiment at a time.

Each draft is written in a thread of its own while trials run, and carried over to the best train.py when it is due.
"""

import asyncio
import dataclasses
import itertools
import threading
import time
from concurrent.futures import Future

from lab.answer import apply_proposal, carried_over, expected_gain, objection, proposal
from lab.api import Api, Rejected, Unusable, sent_back, waiting_time
from lab.book import title
from lab.command import Command
from lab.prompt import TOOL, briefing, failure_in_words, history, programme
from lab.researcher import Brief, Draft, Failure, Researcher, Say, digest
from prepare import Trouble, one_line

MAX_TOKENS = 32_000  # of one answer, its thinking included
REPAIR_TURNS = 2  # for an answer that cannot be applied
CRASH_REPAIRS = 2  # for an experiment that crashes
POLL = 0.1  # seconds between two looks at what the writers have


@dataclasses.dataclass
class Conversation:
    """The exchange about one experiment: a request that grows with each answer."""

    request: dict
    base: str  # the train.py that it shows, which edits refer to
    origin: dict[str, str]  # of its drafts
    near: dict[str, Draft] = dataclasses.field(default_factory=dict)  # near misses that it may take up
    crashes: int = 0

    def reply(self, text):
        """Answer the model's last turn: as the result of its call if it made one, else as plain text."""
        messages = self.request["messages"]
        calls = [block["id"] for block in messages[-1]["content"] if block["type"] == "tool_use"]
        answers = [{"type": "tool_result", "tool_use_id": call, "content": text, "is_error": True} for call in calls]
        messages.append({"role": "user", "content": answers or [{"type": "text", "text": text}]})


@dataclasses.dataclass(eq=False)
class Writer:
    """A thread that writes one draft."""

    number: int  # among those that write at the same time, from 1
    started: float = dataclasses.field(default_factory=time.monotonic)
    future: Future = dataclasses.field(default_factory=Future)  # of the Draft

    @property
    def is_ready(self):
        return self.future.done() and not self.future.exception()


class Model(Researcher):
    """A language model, behind the Messages API or a command. The memory of its drafts is their Conversation."""

    reads_profiles = True

    def __init__(self, backend: Api | Command, say: Say):
        self.backend, self.say = backend, say
        self.has_key, self.max_cost = backend.has_key, backend.max_cost
        self.writers: list[Writer] = []  # of the drafts that nobody has asked for yet, in the order of their start
        self.broken = []  # conversations about experiments that have crashed, to be repaired
        self.newest: Brief | None = None
        self.waiting = 0  # callers of draft()
        self.lock, self.proposed = threading.Lock(), set()  # digest() of every draft of this start

    @property
    def spent(self):
        return self.backend.spent

    # -- what the loop calls

    def check(self):
        self.backend.check()

    def state(self):
        writers = list(self.writers)
        ready = [writer for writer in writers if writer.is_ready]
        started = [writer.started for writer in writers if not writer.future.done()]
        if not started:
            count = f"{len(ready)} " if len(ready) > 1 else ""
            return f"{count}ready: {ready[0].future.result().description}" if ready else ""
        count = f"{len(started)} " if len(writers) > 1 else ""
        waits = f"{len(ready)} ready, " if ready else ""
        return f"{waits}{count}being drafted, for {time.monotonic() - min(started):.0f} s so far"

    async def draft(self, brief):
        self.newest, self.waiting = brief, self.waiting + 1
        try:
            await asyncio.sleep(0)  # so that writers for all who ask at this moment start together, and know it
            while not (draft := self.next_ready()):
                await asyncio.sleep(POLL)
            return draft
        finally:
            self.waiting -= 1

    def next_ready(self) -> Draft | None:
        """The first draft that is ready and fits the best train.py; None for now. Raises what has ended the writers."""
        self.write_ahead(self.waiting)
        done = [writer for writer in self.writers if writer.future.done()]
        nobody_writes = len(done) == len(self.writers)
        for writer in done:
            if writer.is_ready:
                self.writers.remove(writer)
                if draft := self.fitted(writer.future.result()):
                    return draft
        if nobody_writes and (failed := [writer for writer in done if not writer.is_ready]):
            self.writers.clear()  # the next try begins anew
            raise failed[0].future.exception()
        return None

    def fitted(self, draft: Draft) -> Draft | None:
        """A draft as a change of the best train.py; None, which the owner is told, where that is not worth a trial."""
        best, tried = self.newest.source, self.newest.tried
        source = carried_over(draft, best)
        if source is None:
            problem = "it conflicts with the new best train.py"
        elif source != draft.source:
            problem = objection(source, best, tried) or self.repeated(source)
        else:  # only somebody else's commit can have changed what its writer has found
            problem = "exactly this train.py has been tried meanwhile" if digest(source.encode()) in tried else None
        if not problem:
            return dataclasses.replace(draft, source=source, base=best)
        self.say(f"a draft is dropped: {problem.splitlines()[0]} ({draft.description})", "yellow")
        return None

    def think_ahead(self, brief, count):
        self.newest = brief
        self.write_ahead(count)

    def write_ahead(self, count):
        """Start as many writers as it takes to have `count` drafts, each told what the others are about."""
        if any(writer.future.done() and not writer.is_ready for writer in self.writers):
            return  # the loop has to learn of it first
        started = []
        at_it = [writer for writer in self.writers if not writer.future.done()]
        for _ in range(count - len(self.writers)):
            taken = {writer.number for writer in [*at_it, *started]}
            started.append(Writer(min(set(range(1, len(taken) + 2)) - taken)))
        drafted = tuple(writer.future.result().description for writer in self.writers if writer.is_ready)
        self.writers += started
        for writer in started:
            place = writer.number, len(at_it) + len(started)
            brief = dataclasses.replace(self.newest, drafted=drafted, writer=place)
            broken = self.broken.pop(0) if self.broken else None
            # daemon: Ctrl-C does not wait for an answer
            threading.Thread(target=self.work, args=(writer, brief, broken), daemon=True).start()

    def work(self, writer, brief, broken):
        """The life of a writer's thread."""
        try:
            writer.future.set_result(self.write(brief, broken))
        except BaseException as error:  # whatever it is, the loop learns of it when it asks for a draft
            with self.lock:
                first = not any(other.future.done() and not other.is_ready for other in self.writers)
                if isinstance(error, Trouble) and brief.running and first:
                    trials = "this trial" if len(brief.running) == 1 else "these trials"
                    self.say(f"no further draft; the loop ends after {trials}: {one_line(error, 200)}", "red")
                writer.future.set_exception(error)

    def failed(self, draft: Draft, failure: Failure):
        conversation = draft.memory
        if not isinstance(conversation, Conversation) or conversation.crashes >= CRASH_REPAIRS:
            return
        conversation.crashes += 1
        conversation.reply(
            f"The experiment ran and failed.\n{failure_in_words(failure, 3000)}\nIf the idea is still good, call again "
            "with the whole experiment, repaired: all its edits, against the train.py that you were shown first."
        )
        self.broken.append(conversation)

    # -- one draft

    def write(self, brief: Brief, conversation: Conversation | None) -> Draft:
        """The draft that `conversation` leads to when it is carried on, or new ones until one succeeds."""
        for attempt in itertools.count():
            started, before = time.monotonic(), self.backend.own.spent
            conversation = conversation or self.open(brief, self.backend.models[attempt % 3 == 2])
            try:
                draft = self.converse(conversation, brief.tried)
                cost = self.backend.own.spent - before
                cost = f", ${cost:.4f}" if cost > 0 else ""
                self.say(f"drafted in {time.monotonic() - started:.0f} s{cost}: {draft.description}", "dim")
                return draft
            except Unusable as unusable:
                # If neither model does it, perhaps the programme or the server has to change first.
                seconds = waiting_time(attempt - 2, self.backend.longest_wait) if attempt >= 2 else 0.0
                later = f" in {seconds:.0f} s" if seconds >= 1 else ""
                self.say(f"{conversation.request['model']}: {unusable}; asking again{later}", "yellow")
            conversation = None
            time.sleep(seconds)

    def open(self, brief: Brief, model: str) -> Conversation:
        """A new conversation: what rarely changes first, so that the cache serves it, and what is new last."""
        wishes, plain = programme(), self.backend.is_plain(model)
        texts = briefing(brief, wishes, plain)
        first = {"role": "user", "content": [{"type": "text", "text": history(brief)}]}
        request = {"model": model, "max_tokens": MAX_TOKENS, "tools": [TOOL], "messages": [first]}
        if plain:
            request["system"] = "\n\n".join(texts)
        else:
            request["system"] = [{"type": "text", "text": text} for text in texts]
            request["system"][-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
            request |= {"thinking": {"type": "adaptive"}, "output_config": {"effort": self.backend.effort}}
            request["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
        program = digest(wishes.encode())[:12]
        origin = {"Researcher": self.backend.name, "Model": model, "Program": program}
        return Conversation(request, brief.source, origin, brief.near_misses)

    def converse(self, conversation: Conversation, tried) -> Draft:
        """The draft that a conversation leads to, mistakes repaired on the way; raises Unusable if it leads nowhere."""
        for _ in range(1 + REPAIR_TURNS):
            try:
                answer = self.backend.ask(conversation.request)
            except Rejected as rejected:
                if len(conversation.request["messages"]) == 1:
                    raise
                raise Unusable(f"its conversation cannot go on ({one_line(rejected, 200)})") from None
            if answer.stop_reason not in ("tool_use", "end_turn", "stop_sequence"):
                raise Unusable(f"the answer ended with {one_line(answer.stop_reason, 200)}")
            conversation.request["messages"].append({"role": "assistant", "content": sent_back(answer.content)})
            given = proposal(answer.content)
            source, problem = apply_proposal(given, conversation.base, conversation.near)
            problem = problem or objection(source, conversation.base, tried) or self.repeated(source)
            if not problem:
                return drafted(given, source, conversation)
            conversation.reply(problem)
        if given is None:
            words = " ".join(block.text for block in answer.content if block.type == "text")
            raise Unusable(f"no proposal in its answer ({one_line(words, 120)})")
        raise Unusable(f"no edit that can be applied ({one_line(problem.splitlines()[0], 120)})")

    def repeated(self, source) -> str | None:
        """Note a source as proposed, since no Brief knows of drafts; where it has been before, words for its author."""
        known = digest(source.encode())
        with self.lock:
            if known in self.proposed:
                return "Exactly this train.py has been proposed already and awaits its trial; propose something else."
            self.proposed.add(known)
        return None


def drafted(given, source, conversation):
    """The Draft of a proposal that can be applied."""
    description, hypothesis = title(given["description"]), given.get("hypothesis")
    pairs = given.get("edits") or ()
    if not pairs and not given.get("full_source"):
        description = title(f"again {' + '.join(given['take'])}: {description}")
    if conversation.crashes and not description.startswith("repair"):
        description = title(f"repair: {description}")
    hypothesis = one_line(hypothesis, 1000) if isinstance(hypothesis, str) else ""
    edits = tuple((edit["old_str"], edit["new_str"]) for edit in pairs)
    gain = expected_gain(given)
    origin = conversation.origin | ({} if gain is None else {"Expects": f"{gain:+.6f}"})
    return Draft(source, description, hypothesis, origin, conversation.base, edits, conversation)

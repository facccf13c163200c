"""A language model as a researcher, asked for one experiment at a time.

Each draft is written in a thread of its own while a trial runs, and carried over to the best train.py when it is due.
"""

import dataclasses
import hashlib
import itertools
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lab.answer import apply_proposal, merge, objection, proposal
from lab.api import Api, Outage, Rejected, Unusable, prices, sent_back, waiting_time
from lab.book import title
from lab.prompt import TOOL, briefing, failure_in_words, history, programme
from lab.researcher import Brief, Draft, Enough, Failure, Researcher, Say
from prepare import Trouble, one_line

MODEL, FALLBACK = "claude-opus-5-5", "claude-sonnet-5-5"
MAX_TOKENS = 32_000  # of one answer, its thinking included
REPAIR_TURNS = 2  # for an answer that cannot be applied
CRASH_REPAIRS = 2  # for an experiment that crashes


@dataclasses.dataclass
class Conversation:
    """The exchange about one experiment: a request that grows with each answer."""

    request: dict
    base: str  # the train.py that it shows, which edits refer to
    origin: dict[str, str]  # of its drafts
    given: dict = dataclasses.field(default_factory=dict)  # the last proposal, as the model made it
    crashes: int = 0

    def reply(self, text):
        """Answer the model's last turn: as the result of its call if it made one, else as plain text."""
        messages = self.request["messages"]
        calls = [block["id"] for block in messages[-1]["content"] if block["type"] == "tool_use"]
        answers = [{"type": "tool_result", "tool_use_id": call, "content": text, "is_error": True} for call in calls]
        messages.append({"role": "user", "content": answers or [{"type": "text", "text": text}]})


class Model(Researcher):
    """Claude, or a local model that speaks the Messages API. The memory of its drafts is their Conversation."""

    def __init__(self, arguments, costs: Path, say: Say):
        first = arguments.model
        self.models = first, arguments.fallback_model or (FALLBACK if first.startswith("claude-") else first)
        self.effort, self.max_cost, self.say = arguments.effort, arguments.max_cost, say
        if self.max_cost is not None and (unknown := [model for model in self.models if not prices(model)]):
            raise Trouble(f"--max-cost needs a price, and that of {unknown[0]} is not known; leave --max-cost away")
        self.api = Api(self.max_cost, costs, say)
        self.has_key = self.api.has_key
        self.writing = self.asked = None  # the draft that is being written, and since when
        self.broken = []  # conversations about experiments that have crashed, to be repaired

    @property
    def spent(self):
        return self.api.spent

    # -- what the loop calls

    def check(self):
        question = [{"role": "user", "content": "Answer with the word ready."}]
        self.say(f"asking {self.models[0]} for one word, to see that it answers")
        try:
            self.api.send({"model": self.models[0], "max_tokens": 16, "messages": question, "timeout": 30.0})
        except Enough:  # the loop will say so when a draft is due
            pass
        except (Outage, Unusable) as failure:
            self.say(f"{failure}; starting all the same, and asking again when a draft is due", "yellow")

    def state(self):
        writing = self.writing
        if writing and not writing.done():
            return f"being drafted, for {time.monotonic() - self.asked:.0f} s so far"
        return f"ready: {writing.result().description}" if writing and not writing.exception() else ""

    def draft(self, brief):
        while True:
            self.think_ahead(brief)
            writing, self.writing = self.writing, None  # even if it has failed: the next try begins anew
            draft = writing.result()
            source = carried_over(draft, brief.source)
            problem = (
                objection(source, brief.source, brief.tried) if source else "it conflicts with the new best train.py"
            )
            if not problem:
                return dataclasses.replace(draft, source=source)
            self.say(f"a draft is dropped: {problem.splitlines()[0]} ({draft.description})", "yellow")

    def think_ahead(self, brief):
        if self.writing:
            return
        self.writing, self.asked = (future := Future()), time.monotonic()
        broken = self.broken.pop(0) if self.broken else None

        def work():
            try:
                future.set_result(self.write(brief, broken))
            except BaseException as error:  # whatever it is, the loop learns of it when it asks for the draft
                if isinstance(error, Trouble) and brief.running:
                    self.say(f"no further draft; the loop ends after this trial: {one_line(error, 200)}", "red")
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C does not wait for an answer

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
            started, before = time.monotonic(), self.spent
            conversation = conversation or self.open(brief, self.models[attempt % 3 == 2])
            try:
                draft = self.converse(conversation, brief.tried)
                cost = f", ${self.spent - before:.4f}" if self.spent > before else ""
                self.say(f"drafted in {time.monotonic() - started:.0f} s{cost}: {draft.description}", "dim")
                return draft
            except Unusable as unusable:
                self.say(f"{conversation.request['model']}: {unusable}; asking again", "yellow")
            conversation = None
            if attempt >= 2:  # neither model does it: perhaps the programme or the server has to change first
                time.sleep(waiting_time(attempt - 2))

    def open(self, brief: Brief, model: str) -> Conversation:
        """A new conversation: what rarely changes first, so that the cache serves it, and what is new last."""
        wishes, plain = programme(), self.api.elsewhere and not model.startswith("claude-")
        texts = briefing(brief, wishes, plain)
        first = {"role": "user", "content": [{"type": "text", "text": history(brief)}]}
        request = {"model": model, "max_tokens": MAX_TOKENS, "tools": [TOOL], "messages": [first]}
        if plain:  # it knows neither Claude's thinking nor its cache
            request["system"] = "\n\n".join(texts)
        else:
            request["system"] = [{"type": "text", "text": text} for text in texts]
            request["system"][-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
            request |= {"thinking": {"type": "adaptive"}, "output_config": {"effort": self.effort}}
            request["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
        digest = hashlib.sha256(wishes.encode()).hexdigest()[:12]
        return Conversation(request, brief.source, {"Researcher": "llm", "Model": model, "Program": digest})

    def converse(self, conversation: Conversation, tried) -> Draft:
        """The draft that a conversation leads to, mistakes repaired on the way; raises Unusable if it leads nowhere."""
        for _ in range(1 + REPAIR_TURNS):
            try:
                answer = self.api.ask(conversation.request)
            except Rejected as rejected:
                if len(conversation.request["messages"]) == 1:
                    raise
                raise Unusable(f"its conversation cannot go on ({one_line(rejected, 200)})") from None
            if answer.stop_reason not in ("tool_use", "end_turn", "stop_sequence"):
                raise Unusable(f"the answer ended with {one_line(answer.stop_reason, 200)}")
            conversation.request["messages"].append({"role": "assistant", "content": sent_back(answer.content)})
            given = proposal(answer.content)
            source, problem = apply_proposal(given, conversation.base)
            problem = problem or objection(source, conversation.base, tried)
            if not problem:
                conversation.given = given
                return drafted(given, source, conversation)
            conversation.reply(problem)
        raise Unusable(f"no edit that can be applied ({one_line(problem.splitlines()[0], 120)})")


def drafted(given, source, conversation):
    """The Draft of a proposal that can be applied."""
    description, hypothesis = title(given["description"]), given.get("hypothesis")
    if conversation.crashes and not description.startswith("repair"):
        description = title(f"repair: {description}")
    hypothesis = one_line(hypothesis, 1000) if isinstance(hypothesis, str) else ""
    return Draft(source, description, hypothesis, conversation.origin, conversation)


def carried_over(draft, best):
    """The source of a draft as a change of `best`, which may be another train.py than it was made from; None if not."""
    conversation = draft.memory
    if best == conversation.base:
        return draft.source
    # Its edits say best what it meant; where they no longer fit, lines that only one side changed still do.
    edited = conversation.given.get("edits") and apply_proposal(conversation.given, best)[0]
    return edited or merge(best, conversation.base, draft.source)

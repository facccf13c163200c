"""Who proposes the experiments: what a researcher is told, what it gives, and the one that needs nobody.

A researcher gets a Brief and gives a Draft. It knows neither git nor trials, and shares no state with the loop, so that
it may think in threads of its own.
"""

import ast
import dataclasses
import hashlib
import random
import re
from collections.abc import Callable

from lab.book import Experiment
from prepare import Task, Trouble, one_line


class Enough(Exception):
    """A limit that the user has set is reached; says which. Ends the loop in good order."""


# ---------------------------------------------------------------------------------------------------------------------
# What goes out and what comes in


@dataclasses.dataclass(frozen=True)
class Failure:
    """A crashed experiment: why, and the end of what it printed."""

    commit: str
    outcome: str  # of its Result
    reason: str
    printed: str = ""


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a researcher knows of a tag at one moment."""

    tag: str
    task: Task
    source: str  # the best train.py
    experiments: tuple[Experiment, ...] = ()
    sigma: float | None = None  # standard deviation of one run; None where it is not known
    running: tuple[str, ...] = ()  # hash and description of each experiment that is running
    drafted: tuple[str, ...] = ()  # description of each draft that waits for its trial
    writer: tuple[int, int] = (1, 1)  # which one of how many that draft at this moment is told this
    left: str = ""  # what the owner's limits still allow, in words
    facts: str = ""  # of the best's first run: device, steps, tokens, ...
    said: str = ""  # the first line that it printed
    certainties: dict[str, float] = dataclasses.field(default_factory=dict)  # {commit: P(better) than the best then}
    level: float | None = None  # val_bpb that the best is expected to have by all scores, not only by its own
    near_misses: dict[str, "Draft"] = dataclasses.field(default_factory=dict)  # {commit: what it changed of what}
    curves: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # {commit: loss at tenths of it}
    tried: frozenset[str] = frozenset()  # digest() of every train.py that was tried
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # {commit: train.py} of the last kept ones
    hypotheses: dict[str, str] = dataclasses.field(default_factory=dict)  # {commit: why it should help}
    origins: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # {commit: Draft.origin}
    failures: tuple[Failure, ...] = ()  # the last ones
    profile: str = ""  # where the time of a step of the best goes, as lines; "" where that is not known
    ideas: tuple[str, ...] = ()  # found elsewhere, and not to be had as edits of the best train.py; a line each


def digest(source: bytes) -> str:
    """What a train.py is known by."""
    return hashlib.sha256(source).hexdigest()


@dataclasses.dataclass(frozen=True)
class Draft:
    """A proposed experiment, from a researcher's answer to the row: a whole train.py, what it changes, and why."""

    source: str  # empty where the draft was read from its commit, which has it
    description: str  # one line
    hypothesis: str = ""
    origin: dict[str, str] = dataclasses.field(default_factory=dict)  # who proposed it: trailers of the commit
    base: str = ""  # the train.py that it changes; empty where that is not known
    edits: tuple[tuple[str, str], ...] = ()  # (old, new) as proposed; empty for a whole file, or where not known
    memory: object = dataclasses.field(default=None, compare=False, repr=False)  # the researcher's own, of the talk

    @property
    def message(self) -> str:
        """The draft as a commit message; from_message() reads it."""
        trailers = "\n".join(f"{name}: {one_line(value, 200)}" for name, value in self.origin.items())
        return "\n\n".join(filter(None, (self.description, self.hypothesis, trailers)))

    @classmethod
    def from_message(cls, message: str):
        """The draft that a commit message tells of, without its source; an owner's has no origin and no hypothesis."""
        subject, *parts = re.split(r"\n\n+", message.strip())
        origin = {}
        if parts and parts[-1].startswith("Researcher: "):
            origin = dict(line.partition(": ")[::2] for line in parts.pop().splitlines())
        return cls("", one_line(subject, 200), "\n\n".join(parts) if origin else "", origin)


def evidence(gain: float, sigmas: float | None) -> dict[str, str]:
    """A gain elsewhere, in bits per byte and in standard errors, as trailers of a commit."""
    return {"Gain": f"{gain:.6f}"} | ({} if sigmas is None else {"Sigmas": f"{sigmas:.2f}"})


class Researcher:
    """What the loop asks of whoever proposes the experiments, with nothing done where nothing has to be."""

    has_key = True  # or needs none
    spent = max_cost = None  # dollars, from this start
    reads_profiles = False  # whether it wants to know where the time of a training step goes

    def check(self):
        """Find out in seconds whether drafts can be had at all. Raises Trouble if a person has to mend something."""

    def state(self) -> str:
        """What the next drafts are doing, in a few words for the live view."""
        return ""

    async def draft(self, brief: Brief) -> Draft:
        """The next draft, a change of the best train.py of the newest brief that the researcher has seen.

        Several callers may wait at the same time, each for a draft of its own; to cancel one of them loses nothing.
        Raises Trouble or Enough where there will be none.
        """
        raise NotImplementedError

    def think_ahead(self, brief: Brief, count: int):
        """Have up to `count` drafts ready or in the making, from now on without being waited for."""

    def failed(self, draft: Draft, failure: Failure):
        """The experiment of `draft` has crashed, or its exam was refused."""

    def conflicted(self, draft: Draft):
        """The draft could not be carried over to the best train.py, and was not tried."""


Say = Callable[..., None]  # say(text, style=""): one line to the owner

# ---------------------------------------------------------------------------------------------------------------------
# The built-in search: small steps of the constants of train.py


class Search(Researcher):
    """Changes one number of train.py, sometimes two, by a sensible step; needs neither network nor key.

    It follows a change that was kept one step further, and otherwise draws among the upper-case constants, the ones
    that usually decide a small training run (learning rates, sizes, schedules) more often.
    """

    IMPORTANT = re.compile(r"LR|STEPS|BATCH|PARAM|DEPTH|MOMENTUM|COOLDOWN|RATIO")

    def __init__(self):
        self.given = set()  # digest() of each draft: the loop may not have been able to commit it yet

    async def draft(self, brief):
        constants = find_constants(brief.source)
        chance, tried = random.Random(f"{brief.tag} {len(brief.experiments)}"), brief.tried | self.given
        for step in [*self.followed(brief, constants), *self.drawn(constants, chance)]:
            change = ", ".join(f"{name} {constants[name]} -> {new}" for name, new in step.items())
            draft = constants_draft("search", brief.source, step, change)
            if (known := digest(draft.source.encode())) not in tried:
                self.given.add(known)
                return draft
        raise Trouble("the search has tried every step it knows from the best train.py; edit train.py, or ask a model")

    def followed(self, brief, constants):
        """The last kept change once more, from where it led, if it was one of a single constant."""
        *_, before = [{}, *map(find_constants, list(brief.sources.values())[:-1])]
        changed = [name for name, text in constants.items() if before.get(name, text) != text]
        if len(changed) == 1:
            (name,) = changed
            old, new = float(before[name]), float(constants[name])
            yield from ({name: step} for step in steps(constants[name]) if (float(step) > new) == (new > old))

    def drawn(self, constants, chance):
        """Single steps and pairs of steps in random order: bold ones first, since noise drowns small effects."""
        names = [name for name, text in constants.items() if steps(text)]
        weights = [4 if self.IMPORTANT.search(name) else 1 for name in names]
        for attempt in range(5000 if names else 0):
            chosen = dict.fromkeys(chance.choices(names, weights, k=chance.choice((1, 1, 1, 2))))
            reach = 2 if attempt < 500 else None
            yield {name: chance.choice(steps(constants[name])[:reach]) for name in chosen}


NUMBER = r"\d(?:_?\d)*\.?\d*(?:[eE][+-]?\d+)?"
CONSTANT = re.compile(rf"^([A-Z][A-Z0-9_]*)( *= *)({NUMBER})(?=\s*(?:#.*)?$)", re.MULTILINE)


def find_constants(source):
    """{name: text} of the top-level assignments NAME = number."""
    return {name: text for name, _, text in CONSTANT.findall(source)}


def set_constants(source, new):
    """`source` with the constants of `new`, {name: text}, set."""
    return CONSTANT.sub(lambda found: found[1] + found[2] + new.get(found[1], found[3]), source)


def constants_draft(researcher: str, source: str, new: dict[str, str], description: str, why="") -> Draft:
    """The draft that sets constants of the best train.py."""
    changed = set_constants(source, new)
    lines = zip(source.split("\n"), changed.split("\n"))
    edits = tuple((f"\n{old}\n", f"\n{now}\n") for old, now in lines if old != now)
    return Draft(changed, description, why, {"Researcher": researcher}, source, edits)


def steps(text):
    """Neighbours of a number worth trying, as source text, the bold ones first; [] for one with none."""
    try:
        value = ast.literal_eval(text)
        if not abs(float(value)) < 1e15:
            return []
    except (SyntaxError, ValueError, OverflowError):  # 007 in a text, or a number without end
        return []
    if isinstance(value, int):
        near = [value // 2, value * 2, round(value * 0.7), round(value * 1.4)]
        return [str(step) for step in dict.fromkeys(near) if step not in (0, value)]
    if 0.5 < value < 1:  # a decay or a share: what counts is its distance from one
        return [f"{1 - (1 - value) * factor:.4g}" for factor in (0.5, 2.0, 0.7, 1.4)]
    return [f"{value * factor:.3g}" for factor in (0.5, 2.0, 0.7, 1.4) if value]

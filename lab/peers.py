"""What travels: one experiment as an edit with its evidence, written for strangers and read from strangers.

A score belongs to its machine. What another machine can use is the edit: train.py, the train.py that it changed, and
what came of it there. All of it is a claim of whoever wrote it, and read as data: of known fields, types and sizes, or
not at all.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re

from lab.book import STATUSES
from prepare import one_line

SOURCE_BYTES = 2**18  # of train.py and of base.py
RESULT_BYTES = 2**15  # of result.json
LENGTHS = {"description": 200, "hypothesis": 1000, "of": 200}  # characters of a text, once it is one line
LENGTH = 100  # of other texts
ENTRIES = 40  # of a table
NAME = r"(?!\S*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,63}(?<!\.)(?<!\.lock)"  # of a ref, a part between two slashes
FULL_NAME = re.compile(rf"({NAME})/({NAME})/({NAME})")  # who/tag/commit

# ---------------------------------------------------------------------------------------------------------------------
# The idea


@dataclasses.dataclass(frozen=True)
class Idea:
    """One shared experiment. Scores are in bits per byte, budget in seconds, rate in FLOP/s; None for what is unknown.

    who, tag, commit: of its ref. base: the train.py that was changed into `source`; base_bpb and base_runs are its
    score and runs on the same machine, sigma the standard deviation of one run there. sha256: fingerprints of what
    decides a score. model: who proposed it. of: name of the idea that it reproduces, "" for one of its own.
    """

    who: str
    tag: str
    commit: str
    source: str
    base: str
    description: str
    hypothesis: str
    status: str  # keep, discard, crash
    val_bpb: float | None
    base_bpb: float | None
    sigma: float | None
    runs: int
    base_runs: int
    task: str
    budget: float
    device: str
    rate: float | None
    steps: float | None
    tokens: float | None
    versions: dict
    sha256: dict
    model: str
    of: str

    @property
    def name(self) -> str:
        """who/tag/commit, as `of` tells it."""
        return f"{self.who}/{self.tag}/{self.commit}"

    @property
    def gain(self) -> float | None:
        """By how many bits per byte it was better than its base, as claimed."""
        return None if self.val_bpb is None or self.base_bpb is None else self.base_bpb - self.val_bpb

    @property
    def gain_in_sigmas(self) -> float | None:
        """The gain over the standard error of a difference of these means."""
        if self.gain is None or not self.sigma or not self.runs or not self.base_runs:
            return None
        return self.gain / (self.sigma * math.sqrt(1 / self.runs + 1 / self.base_runs))

    @functools.cached_property
    def key(self) -> str:
        """What the edit is known by: equal for the same changed lines, whatever train.py they change."""
        return edit_key(self.base, self.source)

    def files(self) -> dict[str, bytes]:
        """{file: content} as it travels. Raises ValueError for what nobody would read."""
        told = {field: getattr(self, field) for field in FIELDS}
        files = {
            "base.py": self.base.encode(),
            "result.json": json.dumps(told, indent=1, allow_nan=False).encode() + b"\n",
            "train.py": self.source.encode(),
        }
        if not FULL_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name} cannot be the name of a ref")
        read(self.name, files)
        return files


FIELDS = {field.name: field.type for field in dataclasses.fields(Idea)}  # of result.json
for _elsewhere in ("who", "tag", "commit", "source", "base"):
    del FIELDS[_elsewhere]

# ---------------------------------------------------------------------------------------------------------------------
# Reading what a stranger wrote


def read(name: str, files: dict[str, bytes]) -> Idea:
    """The Idea `name` (who/tag/commit) of its three files. Raises ValueError, and nothing else, for an unsound one."""
    for file, content in files.items():
        if len(content) > (RESULT_BYTES if file == "result.json" else SOURCE_BYTES):
            raise ValueError(f"{file} is too large")
    told = parse(files["result.json"].decode())  # a UnicodeDecodeError is a ValueError
    values = {field: checked(field, told[field]) for field in FIELDS}
    idea = Idea(*name.split("/"), files["train.py"].decode(), files["base.py"].decode(), **values)
    scored = all(score is None or 1e-9 < score < 1000 for score in (idea.val_bpb, idea.base_bpb, idea.sigma))
    counted = 0 <= idea.runs <= 1000 and 0 <= idea.base_runs <= 1000
    if not scored or not counted or not idea.budget > 0 or idea.status not in STATUSES:
        raise ValueError("a value outside of its range")
    if idea.status == "keep" and idea.val_bpb is None or idea.of and not FULL_NAME.fullmatch(idea.of):
        raise ValueError("kept without a score, or of nothing that could be shared")
    return idea


def parse(text: str) -> dict:
    """The object of result.json; ValueError where it is none, lacks a field, or has one twice."""

    def integer(digits):
        if len(digits) > 20:
            raise ValueError("a number beyond all bounds")
        return int(digits)

    def constant(word):
        raise ValueError(f"{word} is no number")

    def table(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field twice")
        return dict(pairs)

    try:
        told = json.loads(text, parse_int=integer, parse_constant=constant, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(told, dict) or not FIELDS.keys() <= told.keys():
        raise ValueError("not an object with all fields")
    return told


def checked(field: str, value):
    """A value of result.json as an Idea holds it, texts as one bounded line; ValueError for one of another type."""
    kind = FIELDS[field]
    if kind is int:
        sound = type(value) is int
    elif kind in (float, float | None):
        sound = value is None and kind is not float or type(value) in (int, float) and abs(value) < 1e18  # not NaN
    elif kind is dict:
        texts = [text for item in value.items() for text in item] if isinstance(value, dict) else [None]
        sound = len(texts) <= 2 * ENTRIES and all(isinstance(text, str) for text in texts)
    else:
        sound = isinstance(value, str)
    if not sound:
        raise ValueError(f"{field} is not what it should be")
    if kind is dict:
        return {one_line(name, LENGTH): one_line(text, LENGTH) for name, text in value.items()}
    return one_line(value, LENGTHS.get(field, LENGTH)) if kind is str else value


# ---------------------------------------------------------------------------------------------------------------------
# When two edits are the same

MOST_CHANGED = 100  # lines; of a larger edit the whole file counts
MOST_LINES = 10_000  # of a file that is compared line by line


def plain(source: str) -> list[str]:
    """The lines of a train.py without what changes nothing: trailing spaces, blank lines, comments.

    A comment with a quote in it stays; it could be part of a text.
    """
    lines = []
    for line in source.splitlines():
        comment = line.find("#", max(line.rfind("'"), line.rfind('"')) + 1)
        if line := (line if comment < 0 else line[:comment]).rstrip():
            lines.append(line)
    return lines


def source_key(source: str) -> str:
    """What a whole train.py is known by, whatever its comments and blank lines."""
    return _digest(plain(source))


def edit_key(base: str, source: str) -> str:
    """What the change from `base` to `source` is known by: its lines, in order, each taken away or added.

    Where they stand does not count, so that the key is the same on another base. Two edits of the same lines in
    different places share a key: to know whether a train.py was tried, ask source_key().
    """
    old, new = plain(base), plain(source)
    changes = changed_lines(old, new)
    return _digest(["whole", *new] if changes is None else ["edit", *changes])


def _digest(lines):
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def changed_lines(old: list[str], new: list[str]) -> list[str] | None:
    """The fewest lines that turn `old` into `new`, as "-line" and "+line" in order; None if they are too many.

    This is Myers' algorithm. Its time is bounded by the two constants, whatever a stranger has put into the files.
    """
    if max(len(old), len(new)) > MOST_LINES:
        return None
    reached, before = {1: 0}, []  # {lines of old minus lines of new: how far in old}, after so many changes
    for count in range(MOST_CHANGED + 1):
        before.append(dict(reached))
        for diagonal in range(-count, count + 1, 2):
            add = _adds(reached, diagonal, count)
            x = reached[diagonal + 1] if add else reached[diagonal - 1] + 1
            while x < len(old) and x - diagonal < len(new) and old[x] == new[x - diagonal]:
                x += 1
            reached[diagonal] = x
            if x >= len(old) and x - diagonal >= len(new):
                return _walk_back(old, new, before)
    return None


def _adds(reached, diagonal, count):
    """Whether the last of `count` changes on the way to a diagonal adds a line, and not takes one away."""
    return diagonal == -count or diagonal != count and reached[diagonal - 1] < reached[diagonal + 1]


def _walk_back(old, new, before):
    changes, diagonal = [], len(old) - len(new)
    for count in range(len(before) - 1, 0, -1):
        reached = before[count]
        if _adds(reached, diagonal, count):
            diagonal += 1
            changes.append("+" + new[reached[diagonal] - diagonal])
        else:
            diagonal -= 1
            changes.append("-" + old[reached[diagonal]])
    return changes[::-1]

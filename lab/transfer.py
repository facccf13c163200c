"""What was found elsewhere, tried again here: the changes of another tag as drafts, and how each of them has held."""

import bisect
import dataclasses
import re
import statistics

from lab.book import Experiment
from lab.researcher import Draft, evidence
from lab.tag import Tag
from lab.verdict import advantage, transfer
from prepare import Trouble

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]* [0-9a-f]{4,40}")  # a trailer From that names a tag of this repository


def kept_changes(source: Tag) -> list[Draft]:
    """The kept changes of another tag of this repository, in their order, each with what it gained there.

    Raises Trouble where there are none, or their commits are gone.
    """
    if not source.settings:
        raise Trouble(f"there is no tag {source.name} here to replay; git for-each-ref refs/autoresearch lists them")
    source.look()
    kept = [e for e in source.experiments if e.status == "keep"][1:]
    if not kept:
        raise Trouble(f"tag {source.name} has kept nothing, so there is nothing to replay; report --tag {source.name}")
    told, drafts = source.drafts(), []
    for experiment in kept:
        if experiment.commit not in told:
            raise Trouble(
                f"{experiment.commit} of tag {source.name} is gone: refs/autoresearch/{source.name}/ lacks it"
            )
        origin = {"Researcher": "replay", "From": f"{source.name} {experiment.commit}"}
        if (base := source.base(experiment.commit)) and (gained := advantage(experiment, base, source.experiments)):
            origin |= evidence(*gained)
        text = source.repository.source(f"refs/autoresearch/{source.name}/{experiment.commit}^").decode(
            errors="replace"
        )
        why = told[experiment.commit].hypothesis
        drafts.append(Draft(source.text(experiment.commit), experiment.description, why, origin, text))
    return drafts


def replayed(tag: Tag) -> set[str]:
    """Of what was found elsewhere, what this tag has made candidates of, as their trailer From names it."""
    return {draft.origin["From"] for draft in tag.drafts().values() if "From" in draft.origin}


# ---------------------------------------------------------------------------------------------------------------------
# What has become of them


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One idea there and here; gains in bits per byte and in standard errors, None where not known."""

    commit: str
    origin: str  # what its trailer From says
    description: str
    gain_there: float | None
    sigmas_there: float | None
    gain_here: float | None
    sigmas_here: float | None
    word: str  # of verdict.transfer()


def transfers(tag: Tag) -> list[Transfer]:
    """Of each experiment of a tag that was found elsewhere, in the order of the book."""
    drafts, rows = tag.drafts(), []
    for experiment in tag.experiments:
        origin = drafts[experiment.commit].origin if experiment.commit in drafts else {}
        if origin.get("Researcher") in ("replay", "others"):
            rows.append(_row(tag, experiment, origin))
    return rows


def _row(tag: Tag, experiment: Experiment, origin) -> Transfer:
    there, sigmas = (_number(origin.get(name)) for name in ("Gain", "Sigmas"))
    base, word, here = tag.base(experiment.commit), "cannot be told", (None, None)
    if base:
        here = advantage(experiment, base, tag.experiments) or here
        word = transfer(experiment, base, there or 0.0, tag.experiments)
    named = experiment.commit, origin.get("From", ""), experiment.description
    return Transfer(*named, there, sigmas, *here, word)


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def summary(tag: Tag, rows: list[Transfer]) -> list[str]:
    """Lines on how many ideas hold, whether what gained more there gains more here, and what all bring together."""
    words = [(word, sum(row.word == word for row in rows)) for word in dict.fromkeys(row.word for row in rows)]
    lines = [
        f"{len(rows)} idea{'s' * (len(rows) != 1)} from elsewhere: "
        + ", ".join(f"{word} {count}" for word, count in words)
    ]
    pairs = [(r.gain_there, r.gain_here) for r in rows if None not in (r.gain_there, r.gain_here)]
    if (correlation := rank_correlation(pairs)) is not None:
        lines[0] += f"; rank correlation of the gains {correlation:+.2f}"
    for name in dict.fromkeys(row.origin.partition(" ")[0] for row in rows if TAG.fullmatch(row.origin)):
        source = Tag(tag.repository, name, tag.say)
        source.look()
        gains = [_whole_gain(each.experiments) for each in (source, tag)]
        if None not in gains:
            lines.append(f"from the baseline to the best: {gains[0]:.6f} in {name}, {gains[1]:.6f} here")
    return lines


def _whole_gain(experiments):
    """What the best has gained over the first that was kept; None without one."""
    kept = [experiment.val_bpb for experiment in experiments if experiment.status == "keep"]
    return kept[0] - kept[-1] if kept else None


def rank_correlation(pairs) -> float | None:
    """Spearman's rank correlation of [(a, b)], equal values at their mean rank; None for fewer than three pairs."""
    if len(pairs) < 3:
        return None

    def ranks(values):
        ordered = sorted(values)
        return [(bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value)) / 2 for value in values]

    first, second = (ranks(values) for values in zip(*pairs))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(first, second)

"""What a researcher is told of a tag at one moment: the snapshot that everything in a prompt is made of."""

import contextlib
import importlib.metadata
from pathlib import Path

from lab.book import Experiment
from lab.curve import loss_at, read_curve
from lab.profile import read_profile
from lab.researcher import Brief, Draft
from lab.tag import Tag
from lab.verdict import certainties, level, noise
from prepare import Trouble, one_line

CURVES = 8  # of the last experiments that are told, besides those of the baseline, the best and the one before it
MISSES, NEAR_AT = 8, 0.10  # near misses that may be taken up again, at most; P(better) that makes one
WEIGHED = 40  # last experiments of which P(better) is told
POINTS = 10  # of a curve, over the budget


def make_brief(tag: Tag, running: tuple[str, ...] = (), left: str = "") -> Brief:
    """running: hash and description of each experiment under way; left: what the limits still allow, in words."""
    kept = [e for e in tag.experiments if e.status == "keep"][-20:]
    commit = kept[-1].commit if kept else tag.settings["start"]
    sigma, drafts = noise(tag.experiments)[0], tag.drafts()
    sure = certainties(tag.experiments, [e.commit for e in tag.experiments[-WEIGHED:]])
    return Brief(
        tag=tag.name,
        task=tag.task,
        source=tag.text(commit),
        experiments=tuple(tag.experiments),
        sigma=sigma if sigma > 0 else None,
        running=running,
        left=left,
        facts=facts(tag, commit),
        said=opening(tag.path(commit, 0) / "log.txt"),
        certainties=sure,
        level=level(tag.experiments),
        near_misses=near_misses(tag, sure),
        profile=read_profile(tag.profile(commit) / "log.txt", tag.text(commit)),
        curves=curves(tag, kept),
        tried=tag.tried(),
        sources={e.commit: tag.source(e.commit).decode(errors="replace") for e in kept},
        hypotheses={c: draft.hypothesis for c, draft in drafts.items()},
        origins={c: draft.origin for c, draft in drafts.items()},
        failures=tuple(tag.failure(e.commit) for e in [e for e in tag.experiments if e.status == "crash"][-3:]),
    )


def near_misses(tag: Tag, sure: dict[str, float]) -> dict[str, Draft]:
    """{commit: draft that was discarded and may be better all the same}, the likeliest first."""
    likely = [e for e in tag.experiments if e.status == "discard" and e.base and sure.get(e.commit, 0.0) >= NEAR_AT]
    likely = sorted(likely, key=lambda e: -sure[e.commit])[:MISSES]
    misses = {}
    for e in likely:
        with contextlib.suppress(Trouble):  # an owner's commit may not be text
            old, new = tag.text(e.base), tag.text(e.commit)
            misses[e.commit] = Draft(new, e.description, base=old, edits=one_edit(old, new))
    return misses


def one_edit(old: str, new: str) -> tuple[tuple[str, str], ...]:
    """What a train.py changed, as one edit of whole lines; () where it is not clear which ones it is about."""
    before, after = old.split("\n"), new.split("\n")
    start = next((place for place, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    most = min(len(before), len(after)) - start
    backwards = enumerate(zip(reversed(before), reversed(after)))
    end = min(most, next((place for place, (a, b) in backwards if a != b), most))
    first = start if start + end < len(before) else start - 1  # an insertion has its place after a line
    if first < 1:
        return ()
    # From the end of the line before, so that it fits whole lines alone.
    cut, put = ("\n" + "".join(f"{line}\n" for line in lines[first : len(lines) - end]) for lines in (before, after))
    return ((cut, put),) if old.count(cut) == 1 and old.replace(cut, put) == new else ()


def facts(tag: Tag, commit: str) -> str:
    """The machine and what a commit made of it in its first run, as far as that is known."""
    names = "device", "cores", "steps", "tokens", "params", "training_seconds", "peak_vram_mb", "peak_rss_mb"
    result = tag.result(commit, 0)
    known = {name: getattr(result, name) for name in names} if result else {}
    told = [f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items()]
    told = [each for each, value in zip(told, known.values()) if value]
    return ", ".join([*told, f"torch {importlib.metadata.version('torch')}"])


def opening(log: Path) -> str:
    """The first line that a train.py has printed, which tells how it has sized itself; "" for none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            return one_line(file.readline(2000), 300)
    except OSError:
        return ""


def curves(tag: Tag, kept: list[Experiment]) -> dict[str, tuple[float, ...]]:
    """{commit: training loss at tenths of the budget, in their first runs, which all have one seed}.

    Of the baseline, the best, the one before it and the last experiments, as far as their logs are there.
    """
    last = [*kept[-2:], *[e for e in tag.experiments if e.status != "crash"][-CURVES:]]
    chosen = [tag.settings["start"], *(e.commit for e in last)]
    budget, told = tag.task.time_budget, {}
    for commit in dict.fromkeys(chosen):
        curve = read_curve(tag.path(commit, 0) / "metrics.jsonl", 2**22)
        ends = [budget * (point + 1) / POINTS for point in range(POINTS)]
        losses = [loss_at(curve, end, budget / POINTS) for end in ends]
        if losses and None not in losses:
            told[commit] = tuple(losses)
    return told

"""The morning in words: what a night has found, on a screen, as JSON and as a difference. Only reads."""

import dataclasses
import json
import re
import statistics

from rich.console import Console
from rich.text import Text

from exam.files import ROOT
from lab.findings import (
    QUIET,
    Findings,
    cost,
    find,
    foresight,
    nearest,
    pace,
    pace_of_devices,
    quiet,
    time_spent,
    trials,
    weighed,
)
from lab.picture import PICTURE, draw
from lab.runs import all_scores
from lab.sharing import heard, peers
from lab.tag import Tag
from lab.transfer import summary, transfers
from lab.verdict import percent
from prepare import Trouble


def show(tag: Tag, console: Console, as_json=False, as_diff=False):
    """Tell what the tag has found in the form that is asked for; on a screen, and in progress.png, without one."""
    if as_json:
        return print(to_json(tag, weighed(find(tag))))
    if as_diff:
        return print(difference(tag, find(tag), console.is_terminal))
    tell(tag, console)
    if tag.best:
        draw(tag, PICTURE)
        print(f"picture: {PICTURE.name}")


def failures(tag):
    """[(experiment, reason)] of those that crashed."""
    return [(e, tag.failure(e.commit).reason) for e in tag.experiments if e.status == "crash"]


def to_json(tag: Tag, found: Findings) -> str:
    """The findings as one JSON object; null for what is not a finite number."""
    told = dataclasses.asdict(found) | {"experiments": found.experiments}
    told |= {status: found.count(status) for status in ("keep", "discard", "crash")}
    told["failures"] = [{"commit": e.commit, "description": e.description, "reason": why} for e, why in failures(tag)]
    held = trials(tag)
    told |= quiet(held)
    told |= {"cost": cost(tag), "seconds": time_spent(held, tag.starts())}
    told["transfers"] = [dataclasses.asdict(each) for each in transfers(tag)]
    told["foresight"] = dataclasses.asdict(seen) if (seen := foresight(tag)) else None
    told |= {"peers": [dataclasses.asdict(each) for each in peers(tag)]}
    told |= {"heard": [dataclasses.asdict(each) for each in heard(tag)]}
    told |= {"slots": [dataclasses.asdict(each) for each in pace(held, tag.starts())]}
    told |= {"devices": [dataclasses.asdict(each) for each in pace_of_devices(held, tag.starts())]}
    return json.dumps(json.loads(json.dumps(told), parse_constant=lambda name: None), indent=1)


def difference(tag: Tag, found: Findings, coloured: bool) -> str:
    """The change of train.py from the baseline to the best one, as git prints it. Raises Trouble without them."""
    if not found.best:
        raise Trouble(f"tag {tag.name} has no results yet, so there is no difference to show")
    commits = [found.baseline.commit, found.best.commit]
    for commit in commits:
        if not re.fullmatch("[0-9a-f]{4,40}", commit) or not tag.repository.exists(commit):
            raise Trouble(f"results.tsv names {commit}, which is no commit of this repository")
    colour = f"--color={'always' if coloured else 'never'}"
    return tag.repository.run("diff", "--no-ext-diff", colour, *commits, "--", tag.repository.path)


# ---------------------------------------------------------------------------------------------------------------------
# On a screen


def tell(tag: Tag, console: Console):
    """Print the findings, in one screen for a usual night."""
    found = weighed(find(tag))

    def line(text="", style=""):
        console.print(Text(text, style), soft_wrap=True)

    def table(*rows):
        if len(rows) > 1:
            line()
            for number, text in enumerate(aligned(rows, console.width)):
                line(text, "" if number else "dim")

    if not found.rows:
        return line(f"{found.tag} has no results yet")
    line(found.headline, "bold")
    if not found.best:
        return line("nothing was kept, not even a baseline")
    line(found.gain_in_words)
    for text in certainty(found):
        line(text)
    for changes, what in ((found.kept, "kept change"), (nearest(found), "nearest miss")):
        table(*change_rows(changes, what))
    crashed, rows = failures(tag), []
    for e, reason in crashed[-4:]:
        reason = re.sub(r"exit code \d+, without submit\(\): ", "", reason)
        rows.append((e.commit, f"{e.description[:32]}: {reason}"))
    table(("crashed", f"{len(crashed)} in all, the last ones with their reasons"), *rows)
    if ideas := transfers(tag):
        table(*transfer_rows(ideas))
        for text in summary(tag, ideas):
            line(text)
    table(("held", "tried", "here, of the ideas of"), *((f"{p.held}", f"{p.tried}", p.who) for p in peers(tag)))
    rows = [(h.commit, f"{h.kept}", f"{h.tried}", h.description) for h in heard(tag)]
    table(("commit", "kept", "tried", "on so many other machines, by their own word"), *rows)
    held = trials(tag)
    table(*paces(held, tag.starts(), found.experiments))
    line()
    for text in expenses(tag, held):
        line(text)
    if found.task:
        line(f"the best train.py: git show {found.best.commit}:./train.py; its change: report --diff")
    if (model := tag.path(found.best.commit, 0) / "model.safetensors").exists():
        line(f"its model: {model.relative_to(ROOT)}; docs/results.md samples from it")


ENOUGH = 5  # experiments without a keep say something


def change_rows(changes, what):
    """Rows on some changes, with how sure each is where that is known of any."""
    known = any(change.certainty is not None for change in changes)
    yield "commit", "val_bpb", "gain", *["P(better)"] * known, what
    for c in changes:
        yield c.commit, f"{c.val_bpb:.6f}", f"{c.gain:+.6f}", *[percent(c.certainty)] * known, c.description


def certainty(found):
    """Lines on how much a run varies, and how sure the gain is."""
    if found.sigma:
        yield f"equal code scores differently from run to run: by {found.sigma:.6f} (standard deviation, sigma)"
    if found.level is not None and abs(found.level - statistics.fmean(all_scores(found.best))) > found.sigma / 2:
        yield f"the best is at about {found.level:.6f} by all scores: what came close to it says so"
    if (sure := found.confidence) is not None:
        yield f"P(better), the probability that the best is better than the baseline: {percent(sure)}"
    elif not found.kept and found.count("discard") >= ENOUGH and found.sigma:
        yield "no change was better with enough certainty: in two runs a gain of some three sigma can be told"
        yield "what may help: a quieter machine or a longer --budget, which lower sigma, or other ideas in program.md"
    elif found.kept:
        change = "the machine's speed has changed since the baseline"
        yield f"how sure that is cannot be told: {change if found.sigma else 'nothing was run twice'}"


def transfer_rows(ideas):
    """Rows on how what was found elsewhere has held here: gains in bits per byte and in standard errors."""

    def gain(bits, sigmas):
        return "-" if bits is None else f"{bits:+.6f}" + (" (?)" if sigmas is None else f" ({sigmas:+.1f})")

    yield "commit", "gain there", "gain here", "", "from elsewhere"
    for i in ideas:
        there, here = gain(i.gain_there, i.sigmas_there), gain(i.gain_here, i.sigmas_here)
        who = f"{i.origin.partition('/')[0]}: " if "/" in i.origin else ""
        yield i.commit, there, here, i.word, who + i.description


def paces(held, starts, experiments):
    """Rows on what each slot and each kind of device has done, where there are several; [] where not."""
    slots, devices = pace(held, starts), pace_of_devices(held, starts)
    if len(slots) < 2 and len(devices) < 2:
        return []
    passed = (held[-1].end - min(each.start for each in held)) / 3600
    rate = experiments / passed if passed > 0 else 0.0
    rows = [("trials", "an hour", "idle", f"where ({rate:.1f} experiments an hour in all)")]
    for each in [*slots, *devices] if len(devices) > 1 else slots:
        hourly = each.trials / each.hours if each.hours > 0 else 0.0
        rows.append((f"{each.trials}", f"{hourly:.1f}", f"{each.idle:.0%}", each.name or "unknown"))
    return rows


def expenses(tag, held):
    """Lines on where the time and the money went."""
    seconds, paid = time_spent(held, tag.starts()), cost(tag)
    if whole := sum(seconds.values()):
        parts = ", ".join(f"{phase} {share / whole:.0%}" for phase, share in seconds.items())
        yield f"time: {f'{whole / 3600:.1f} h' if whole >= 3600 else f'{whole / 60:.0f} min'}: {parts}"
    for name, values in quiet(held).items():
        yield QUIET[name].format(*values)
    if seen := foresight(tag):
        rank = "" if seen.rank_correlation is None else f", rank correlation {seen.rank_correlation:+.2f}"
        yield (
            f"the researcher expected {seen.expected:+.6f} of {seen.experiments} experiments in the mean, and they "
            f"brought {seen.observed:+.6f}{rank}"
        )
    if requests := paid.pop("requests"):
        usd = paid.pop("usd")
        tokens = ", ".join(f"{number:,} {key.replace('_', ' ')}" for key, number in paid.items())
        yield f"researcher: {requests} requests, ${usd:.2f}; tokens: {tokens}"


def aligned(rows, width):
    """Rows of cells as lines of at most `width` characters, columns aligned, those of numbers to the right."""
    columns = list(zip(*rows))[:-1]
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(re.fullmatch(r"(over |under )?[+-]?[\d.]*%?", cell) for cell in column[1:]) for column in columns]
    for row in rows:
        placed = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric)]
        line = "  ".join([*placed, row[-1]])
        yield line if len(line) <= width else line[: width - 3] + "..."

"""The morning: what a night has found, on a screen, as JSON, as a difference and as a picture. Only reads."""

import dataclasses
import json
import math
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from exam.files import ROOT
from lab.book import title
from lab.curve import loss_at, read_curve
from lab.findings import Findings, cost, find, nearest, pace, pace_of_devices, quiet, time_spent, trials, weighed
from lab.sharing import heard, peers
from lab.tag import Tag
from lab.transfer import summary, transfers
from prepare import Trouble, one_line


def show(tag: Tag, console: Console, as_json=False, as_diff=False):
    """Tell what the tag has found in the form that is asked for; on a screen, and in progress.png, without one."""
    found = weighed(find(tag))
    if as_json:
        return print(to_json(tag, found))
    if as_diff:
        return print(difference(tag, found, console.is_terminal))
    tell(tag, console)
    if found.best:
        try:
            draw(tag, found, ROOT / "progress.png")
        except ImportError as error:
            raise Trouble(f"the picture needs matplotlib ({error}); run: pip install -e .") from None
        print("picture: progress.png")


def failures(tag):
    """[(experiment, reason)] of those that crashed."""
    return [(e, tag.failure(e.commit).reason) for e in tag.experiments if e.status == "crash"]


def to_json(tag: Tag, found: Findings) -> str:
    """The findings as one JSON object; null for what is not a finite number."""
    told = dataclasses.asdict(found) | {"experiments": found.experiments}
    told |= {status: found.count(status) for status in ("keep", "discard", "crash")}
    told["failures"] = [{"commit": e.commit, "description": e.description, "reason": why} for e, why in failures(tag)]
    held = trials(tag)
    told["others"] = quiet(held)
    told |= {"cost": cost(tag), "seconds": time_spent(held)}
    told["transfers"] = [dataclasses.asdict(each) for each in transfers(tag)]
    told |= {"peers": [dataclasses.asdict(each) for each in peers(tag)]}
    told |= {"heard": [dataclasses.asdict(each) for each in heard(tag)]}
    told |= {"slots": [dataclasses.asdict(each) for each in pace(held)]}
    told |= {"devices": [dataclasses.asdict(each) for each in pace_of_devices(held)]}
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
    table(*paces(held, found.experiments))
    line()
    for text in expenses(tag, held):
        line(text)
    if found.task:
        line(f"the best train.py: git show {found.best.commit}:./train.py; its change: report --diff")


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
    if (sure := found.confidence) is not None:
        yield f"P(better), the probability that the best is better than the baseline: {percent(sure)}"
    elif found.kept:
        change = "the machine's speed has changed since the baseline"
        yield f"how sure that is cannot be told: {change if found.sigma else 'nothing was run twice'}"


def percent(probability):
    """A probability as one reads it, never as a certainty; "" for what is not known."""
    if probability is None:
        return ""
    return "over 99.9%" if probability > 0.999 else "under 1%" if probability < 0.01 else f"{probability:.0%}"


def transfer_rows(ideas):
    """Rows on how what was found elsewhere has held here: gains in bits per byte and in standard errors."""

    def gain(bits, sigmas):
        return "-" if bits is None else f"{bits:+.6f}" + (" (?)" if sigmas is None else f" ({sigmas:+.1f})")

    yield "commit", "gain there", "gain here", "", "from elsewhere"
    for i in ideas:
        there, here = gain(i.gain_there, i.sigmas_there), gain(i.gain_here, i.sigmas_here)
        who = f"{i.origin.partition('/')[0]}: " if "/" in i.origin else ""
        yield i.commit, there, here, i.word, who + i.description


def paces(held, experiments):
    """Rows on what each slot and each kind of device has done, where there are several; [] where not."""
    slots, devices = pace(held), pace_of_devices(held)
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
    seconds, paid = time_spent(held), cost(tag)
    if whole := sum(seconds.values()):
        parts = ", ".join(f"{phase} {share / whole:.0%}" for phase, share in seconds.items())
        yield f"time: {whole / 3600:.1f} h: {parts}"
    if others := quiet(held):
        yield f"others had {others[0]:.0%} of the CPU in the median trial, and at most {others[1]:.0%}"
    if requests := paid.pop("requests"):
        usd = paid.pop("usd")
        tokens = ", ".join(f"{number:,} {key.replace('_', ' ')}" for key, number in paid.items())
        yield f"researcher: {requests} requests, ${usd:.2f}; tokens: {tokens}"


def aligned(rows, width):
    """Rows of cells as lines of at most `width` characters, columns aligned, those of numbers to the right."""
    columns = list(zip(*rows))[:-1]
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(re.fullmatch(r"[+-]?[\d.]*%?", cell) for cell in column[1:]) for column in columns]
    for row in rows:
        placed = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric)]
        line = "  ".join([*placed, row[-1]])
        yield line if len(line) <= width else line[: width - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# As a picture

GREEN, GREY = "#2a7f4f", "#9a9a9a"


def draw(tag: Tag, found: Findings, path: Path):
    """Write progress.png: the staircase of the best with every experiment, and two loss curves where runs/ has them."""
    from matplotlib.figure import Figure

    experiments = [e for e in found.rows if math.isfinite(e.val_bpb)]
    kept = [(i, e) for i, e in enumerate(experiments) if e.status == "keep"]
    ends = {found.baseline.commit: "baseline"}
    ends.setdefault(found.best.commit, "best")
    curves = {commit: read_curve(tag.path(commit, 0) / "metrics.jsonl") for commit in ends}
    curves = {commit: curve for commit, curve in curves.items() if curve and curve[-1][0] > 0}
    panels = [["stairs", "names"], ["losses", "names"]][: 1 + bool(curves)]
    figure = Figure((13, 8.5), dpi=110, layout="constrained")
    axes = figure.subplot_mosaic(panels, width_ratios=[3, 1.15], height_ratios=[2, 1][: len(panels)])
    _draw_stairs(axes["stairs"], found, experiments, kept)
    _draw_names(axes["names"], kept)
    for commit, curve in curves.items():
        end, colour = curve[-1][0], GREEN if commit == found.best.commit else GREY
        times = [end * i / 200 for i in range(20, 201)]  # without the steep fall at the start
        points = [(seconds, loss) for seconds in times if (loss := loss_at(curve, seconds, 0.03 * end)) is not None]
        axes["losses"].plot(*zip(*points), color=colour, label=f"{ends[commit]} {commit}")
        axes["losses"].set(xlabel="seconds of training", ylabel="training loss, smoothed")
        axes["losses"].legend(fontsize=8)
    for panel in axes.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_stairs(stairs, found, experiments, kept):
    """Draw the staircase of the best, with every experiment; kept: [(place, experiment)], which are numbered."""
    sigma = found.sigma or 0.0
    low = min(e.val_bpb for e in experiments if e.status != "crash")  # a lucky one may lie below what was kept
    high = max(e.val_bpb for _, e in kept)
    span = max(high - low, 3 * sigma, 1e-4 * high)
    low, high = low - 0.15 * span, high + 0.25 * span
    edge, size = high - 0.02 * (high - low), min(1.0, (200 / len(experiments)) ** 0.5)
    stairs.set(xlabel="experiment", ylabel="val_bpb (crashed, or far worse: at the upper edge)", ylim=(low, high))
    x = [i for i, _ in kept] + [len(experiments) - 0.3]
    y = [e.val_bpb for _, e in kept] + [found.best.val_bpb]
    stairs.step(x, y, where="post", color=GREEN, label="best so far")
    if sigma:
        band = [[score + sign * sigma for score in y] for sign in (-1, 1)]
        stairs.fill_between(x, *band, step="post", color=GREEN, alpha=0.13, lw=0, label=f"one run: ±{sigma:.4f}")
    styles = ("discard", GREY, 18, "o"), ("keep", GREEN, 46, "o"), ("crash", "red", 30, "x")
    for status, colour, area, marker in styles:
        if points := [(i, e) for i, e in enumerate(experiments) if e.status == status]:
            scores = [edge if status == "crash" else min(e.val_bpb, edge) for _, e in points]
            style = {"color": colour, "s": area * size, "marker": marker, "zorder": 3}
            stairs.scatter([i for i, _ in points], scores, label=f"{status} ({len(points)})", **style)
    for number, (i, e) in enumerate(kept):
        place = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 7.5}
        stairs.annotate(str(number), (i, e.val_bpb), (0, -5 - 8 * (number % 2)), color=GREEN, **place)
    stairs.legend(fontsize=8)
    stairs.set_title(f"{found.headline}\n{found.gain_in_words}", loc="left", fontsize=11, parse_math=False)


def _draw_names(panel, kept):
    """List what the numbers of the staircase stand for, where the names cannot run into each other."""
    lines = [f"{i:>2}  {e.val_bpb:.4f}  {title(one_line(e.description, 42))}" for i, (_, e) in enumerate(kept)]
    lines[50:] = [f"    and {len(lines) - 50} more"] * (len(lines) > 50)
    style = {"family": "monospace", "fontsize": 6.5, "linespacing": 1.5, "va": "top", "parse_math": False}
    panel.text(0, 1, "\n".join(["kept", *lines]), **style).set_in_layout(False)
    panel.axis("off")

"""The morning as one picture, progress.png: the staircase, two loss curves, and what was kept. Only reads.

All is placed in inches, so that nothing is left empty and no text runs into another. Shown 800 pixels wide, as in a
README, an inch has a hundred of them, and the smallest letters are ten high.
"""

import io
import itertools
import math
from pathlib import Path

from exam.files import ROOT
from lab.book import Experiment, Run
from lab.curve import loss_at, read_curve
from lab.findings import Findings, find
from lab.runs import changes, disturbed, out_of_step
from lab.tag import Tag
from prepare import Trouble

PICTURE = ROOT / "progress.png"
GREEN, GREY, RED = "#2a7f4f", "#8a8a8a", "#b3261e"
WIDTH, LEFT, RIGHT, EDGE = 8.0, 0.85, 0.12, 0.1  # of the picture; beside its panels; beside its text
HEAD, LEGEND, STAIRS, LOSSES, BELOW, LINE = 0.5, 0.24, 3.3, 1.6, 0.48, 0.15  # heights
DPI = 200
MONO, SIZE = "DejaVu Sans Mono", 7.77  # comes with matplotlib; of this size a letter is 13 whole pixels wide
LETTER = 13 / DPI


def draw(tag: Tag, path: Path):
    """Write the picture of a tag as a whole or not at all; none without a best. Raises Trouble without matplotlib."""
    found, image = find(tag), io.BytesIO()
    if not found.best:
        return
    try:
        compose(tag, found).savefig(image, format="png")
    except ImportError as error:
        raise Trouble(f"the picture needs matplotlib ({error}); run: pip install -e .") from None
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(image.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def compose(tag: Tag, found: Findings):
    """The picture as a Figure of matplotlib: panels and names one below the other, each as high as it needs."""
    from matplotlib.figure import Figure

    curves, columns = loss_curves(tag, found), kept_names(found.rows)
    panels = [(STAIRS, draw_stairs, found)] + [(LOSSES, draw_losses, curves)] * bool(curves)
    names = LINE * (len(columns[0]) + 1) if columns else 0.0
    height = HEAD + sum(LEGEND + tall + BELOW for tall, _, _ in panels) + names
    figure, top = Figure((WIDTH, height), dpi=DPI), height - HEAD

    def write(text, x, y, **style):
        figure.text(x / WIDTH, y / height, text, va="top", parse_math=False, **style)

    write(found.headline, EDGE, height - 0.08, fontsize=min(10, 900 / len(found.headline)), weight="bold")
    write(found.gain_in_words, EDGE, height - 0.28, fontsize=9)
    for tall, fill, content in panels:
        top -= LEGEND + tall
        axes = figure.add_axes((LEFT / WIDTH, top / height, (WIDTH - LEFT - RIGHT) / WIDTH, tall / height))
        fill(axes, content)
        _dress(axes)
        top -= BELOW
    for place, lines in enumerate(columns):
        x = EDGE + place * (WIDTH - EDGE) / len(columns)
        for number, line in enumerate(lines):
            colour = "black" if number else GREY
            write(line, x, top - LINE * number, family=MONO, fontsize=SIZE, color=colour)
    return figure


def _dress(axes):
    """What both panels look like; the legend lies above the axes, where it hides nothing."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.label.set_size(8.5)
    axes.yaxis.label.set_size(8.5)
    axes.yaxis.set_label_coords((EDGE + 0.13 - LEFT) / (WIDTH - LEFT - RIGHT), 0.5)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.1, "ncols": 6, "frameon": False}
    axes.legend(**place, fontsize=8, handlelength=1.2, handletextpad=0.4, columnspacing=1.2)


# ---------------------------------------------------------------------------------------------------------------------
# The staircase


def draw_stairs(axes, found: Findings):
    """Draw the staircase of the best, and every experiment at its number, on axes of matplotlib."""
    rows, sigma = found.rows, found.sigma or 0.0
    low, high = limits(rows, sigma)
    edge, far = high - 0.03 * (high - low), high - 0.06 * (high - low)
    first, last = -0.5 - 0.01 * len(rows), len(rows) - 0.5 + 0.01 * len(rows)
    axes.set(xlabel="experiment", ylabel="val_bpb, lower is better", xlim=(first, last), ylim=(low, high))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    kept = [(i, e.val_bpb) for i, e in enumerate(rows) if e.status == "keep"]
    corners = [*kept, (last, found.best.val_bpb)]
    x, y = zip(*corners)
    axes.step(x, y, where="post", color=GREEN, lw=1.3, zorder=3, label="best so far")
    if sigma:
        band = [[score + sign * sigma for score in y] for sign in (-1, 1)]
        axes.fill_between(x, *band, step="post", color=GREEN, alpha=0.13, lw=0, label=f"one run: ±{sigma:.2g}")
    scored = [(i, e.val_bpb) for i, e in enumerate(rows) if e.status == "discard"]
    discards = [(i, score) for i, score in scored if -math.inf < score < far]
    worse = [(i, edge) for i, score in scored if not -math.inf < score < far]  # also what is not a number
    crashes = [(i, edge) for i, e in enumerate(rows) if e.status == "crash"]
    size = min(1.0, (150 / len(rows)) ** 0.5)
    for label, points, colour, area, marker, layer in (
        ("kept", kept, GREEN, 28 * max(size, 0.4), "o", 4),
        ("discarded", discards, GREY, 16 * size, "o", 2),
        ("far worse, at the upper edge", worse, GREY, 20 * size, "^", 2),
        (f"crashed, {'there too' if worse else 'at the upper edge'}", crashes, RED, 20 * size, "x", 2),
    ):
        style = {"s": area, "color": colour, "marker": marker, "lw": 0.8, "zorder": layer}
        if points:
            axes.scatter(*zip(*points), label=label, **style)
    _number(axes, corners, discards)


def limits(rows, sigma: float) -> tuple[float, float]:
    """The lowest and the highest val_bpb that the axes show: none is lower.

    Three quarters of the discarded ones have their place, unless the staircase would get less than a quarter of the
    height.
    """
    kept = [e.val_bpb for e in rows if e.status == "keep"]
    discarded = sorted(e.val_bpb for e in rows if e.status == "discard" and math.isfinite(e.val_bpb))
    low, high = min([*kept, *discarded, kept[-1] - sigma]), max(kept) + sigma
    most = high + 3 * (high - low) if len(kept) > 1 else math.inf
    high = max([high, *(score for score in discarded[: -(-3 * len(discarded) // 4)] if score <= most)])
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    return low - 0.1 * span, high + 0.15 * span


def _number(axes, corners, discards):
    """Write the numbers of the kept beside them where nothing is in the way, those of the largest steps first.

    One that is left out is found all the same: it is the place on the axis. corners: of the staircase, with its end.
    """
    import numpy as np

    def inches(points):
        return axes.transData.transform(points) / axes.figure.dpi

    (left, bottom), (right, top) = axes.bbox.get_points() / axes.figure.dpi
    places, dot, tall = inches(corners), 0.04, 0.08
    spots = np.concatenate([places, inches(discards)]) if discards else places
    boxes = [*np.hstack([spots - dot, spots + dot])]
    for (x, y), (end, other) in itertools.pairwise(places):
        boxes += [(x, y, end, y), (end, min(y, other), end, max(y, other))]
    steps = [0.0, *(abs(a[1] - b[1]) for a, b in itertools.pairwise(places[:-1]))]
    for place in sorted(range(len(steps)), key=lambda place: -steps[place]):
        number, (x, y) = f"{corners[place][0]}", places[place]
        wide, taken = LETTER * len(number), np.array(boxes)
        for a, b in ((x - wide - 0.03, y - tall - 0.05), (x - wide / 2, y - tall - 0.05), (x + 0.05, y + 0.05)):
            inside = left + dot <= a and a + wide <= right and bottom <= b and b + tall <= top
            meets = (taken[:, :2] < (a + wide, b + tall)).all(1) & (taken[:, 2:] > (a, b)).all(1)
            if inside and not meets.any():
                spot = axes.transData.inverted().transform((a * axes.figure.dpi, b * axes.figure.dpi))
                axes.text(*spot, number, color=GREEN, family=MONO, fontsize=SIZE, va="baseline")
                boxes.append((a - dot, b - dot, a + wide + dot, b + tall + dot))
                break


# ---------------------------------------------------------------------------------------------------------------------
# The names

ONE_COLUMN, MOST_NAMES = 24, 60  # kept experiments besides the baseline


def kept_names(rows) -> list[list[str]]:
    """Columns of lines, each with its head, that tell what was kept; [] where that is but the baseline.

    Two where there are many, or where all but a few names fit into half the width.
    """
    kept = [(i, e, change) for i, (e, change) in enumerate(changes(rows)) if e.status == "keep"]
    if len(kept) < 2:
        return []
    shown = sorted(kept, key=lambda each: -math.inf if each[2] is None else each[2])[: MOST_NAMES + 1]
    number = max(2, len(f"{len(rows) - 1}"))
    lines = [
        f"{i:>{number}}  {'' if change is None else f'{-change:+.4f}':>7}  {e.description}"
        for i, e, change in sorted(shown, key=lambda each: each[0])
    ]
    fits = sum(len(line) <= _letters(2) for line in lines) >= 0.9 * len(lines)
    columns = 2 if len(kept) > ONE_COLUMN + 1 or fits and len(kept) > 4 else 1
    if left := len(kept) - len(shown):
        lines.append(f"{'':>{number}}  and {left} that gained less")
    head, high = f"{'no':>{number}}     gain  kept", -(-len(lines) // columns)
    cut = [_shown(line, _letters(columns)) for line in lines]
    return [[head, *cut[at : at + high]] for at in range(0, len(cut), high)]


def _letters(columns):
    """How many letters one of so many columns is wide."""
    return int(((WIDTH - EDGE) / columns - 1.5 * EDGE) / LETTER)


def _shown(line, letters):
    """A line in letters that the font has, which are of one width."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(MONO)).get_charmap()
    line = "".join(letter if ord(letter) in known else "□" for letter in line)
    return line if len(line) <= letters else line[: letters - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def draw_losses(axes, curves):
    """Draw loss_curves() on axes of matplotlib."""
    for label, colour, points in curves:
        axes.plot(*zip(*points), color=colour, lw=1.3, label=label)
    axes.set(xlabel="seconds of training", ylabel="training loss, smoothed")
    axes.margins(x=0.01)


def loss_curves(tag: Tag, found: Findings):
    """[(label, colour, [(seconds, loss)])] of baseline and best, without the steep start; [] where runs/ has none.

    Of runs of one seed that others have not disturbed, where both have such.
    """
    ends = [(found.baseline, "baseline", GREY), (found.best, "best", GREEN)][: 1 + (found.best is not found.baseline)]
    ends = [(f"{word} {e.commit}", colour, runs) for e, word, colour in ends if (runs := held_runs(tag, e))]
    every = [run for _, _, runs in ends for run, _ in runs.values()]
    quietest = min(every, key=lambda run: run.others or 0.0, default=None)
    quiet = [quiet_runs(runs, quietest) for _, _, runs in ends]
    common, lines = set.intersection(*quiet) if quiet else set(), []
    for (name, colour, runs), calm in zip(ends, quiet):
        number = min(common or calm or runs)
        run, curve = runs[number]
        label = f"{name}, seed {run.seed}" + ", disturbed by others" * (number not in calm)
        lines.append((label, colour, smooth(curve)))
    return lines


def held_runs(tag: Tag, experiment: Experiment) -> dict[int, tuple[Run, list]]:
    """{number: (run, its loss curve)} of those runs of an experiment that have left one; the number tells the seed."""
    numbers = [number for number, result in enumerate(tag.results(experiment.commit)) if result.outcome == "ok"]
    curves = [read_curve(tag.path(experiment.commit, number) / "metrics.jsonl") for number in numbers]
    held = zip(numbers, experiment.runs, curves)
    return {number: (run, curve) for number, run, curve in held if curve and curve[-1][0] > 0}


def quiet_runs(runs, quietest: Run) -> set[int]:
    """The numbers of those of held_runs() that were not disturbed, by the quietest run of the picture."""
    odd = out_of_step([run for run, _ in runs.values()])
    disturbs = [place in odd or bool(disturbed(run, [quietest])) for place, (run, _) in enumerate(runs.values())]
    return {number for number, odd in zip(runs, disturbs) if not odd}


def smooth(curve):
    """A loss curve without its first tenth, as means over a time that holds some six of its points."""
    end = curve[-1][0]
    window = end * min(0.1, max(0.03, 6 / len(curve)))
    times = [end * point / 200 for point in range(20, 201)]
    return [(seconds, loss) for seconds in times if (loss := loss_at(curve, seconds, window)) is not None]

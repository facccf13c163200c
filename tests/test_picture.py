"""The picture of a night: what it shows, where, and that nothing of it runs into anything else."""

import itertools
import json
import math
import os
import random
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_loop import refused

from lab import picture
from lab.book import Experiment, Run
from lab.findings import find
from lab.tag import Tag

NIGHT = "--task tiny --tag t --researcher search --greedy --max-experiments".split()


@pytest.fixture
def tag(tmp_path):
    """tag(rows): one that holds these experiments, and whose runs/ can be filled."""

    def tag(rows):
        made = Tag(None, "t", print)
        made.folder, made.experiments, made.settings = tmp_path, list(rows), {"task": "tiny", "budget": 1.0}
        made.settings["sha256"] = {}
        return made

    return tag


def row(val_bpb, status, description="x", runs=()):
    return Experiment(f"{random.getrandbits(28):07x}", val_bpb, 0.1, status, description, tuple(runs))


def long_night(experiments, kept):
    """Rows of a night: descriptions from short to far too long, scores near the best, far worse, and crashes."""
    draw, best = random.Random(experiments + kept), 1.2
    rows, keeps = [row(best, "keep", "baseline")], {*draw.sample(range(experiments), kept)}
    for number in range(experiments):
        words = " ".join(draw.choices(["wider", "a head of its own", "没有", "LR 0.1 -> 0.2", "$\\frac{$"], k=9))[:200]
        if number in keeps:
            best -= draw.uniform(0.0002, 0.01)
            rows.append(row(best, "keep", words[: draw.randint(8, 200)]))
        elif draw.random() < 0.1:
            rows.append(row(0.0, "crash", words))
        else:
            rows.append(row(best + draw.choice([-0.001, 0.002, 0.01, 3.0]), "discard", words))
    return rows


def points(axes, label):
    """[(x, y)] of the marks whose label in the legend begins so."""
    found = [marks for marks in axes.collections if str(marks.get_label()).startswith(label)]
    return [tuple(map(float, point)) for marks in found for point in marks.get_offsets()]


def test_the_end_of_a_night_draws_the_picture(stage, run):
    ended = run(sys.executable, "agent_loop.py", *NIGHT, "1", cwd=stage)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (stage / "progress.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert run("git", "status", "--porcelain", cwd=stage).stdout == ""


def test_a_night_whose_picture_cannot_be_drawn_ends_as_well_and_the_report_says_why(stage, run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "matplotlib.py").write_text("raise ImportError('no font today')\n")
    without = os.environ | {"PYTHONPATH": str(tmp_path / "broken")}
    ended = run(sys.executable, "agent_loop.py", *NIGHT, "1", cwd=stage, env=without)
    assert ended.returncode == 0 and not ended.stderr and not (stage / "progress.png").exists(), ended.stderr
    told = run(sys.executable, "agent_loop.py", "report", cwd=stage, env=without)
    refused(told, "the picture needs matplotlib (no font today)")
    (stage / "progress.png").mkdir()  # nothing can be written there
    ended = run(sys.executable, "agent_loop.py", *NIGHT, "2", cwd=stage)
    assert ended.returncode == 0 and not ended.stderr and not list(stage.glob("progress.png.*")), ended.stderr
    refused(run(sys.executable, "agent_loop.py", "report", cwd=stage), "progress.png")


def test_no_discarded_experiment_vanishes_and_those_far_above_are_named_as_such(tag):
    scores = (0.8, 1.01, 1.02, 1.03, 1.015, 7.0, math.inf, math.nan)
    rows = [row(1.0, "keep", "baseline"), *(row(score, "discard") for score in scores), row(0.0, "crash")]
    axes = Figure().subplots()
    picture.draw_stairs(axes, find(tag(rows)))
    low, high = axes.get_ylim()
    placed, worse, crashed = (points(axes, label) for label in ("discarded", "far worse, at the upper edge", "crashed"))
    assert placed == [(number, score) for number, score in enumerate(scores[:5], 1)]
    assert low < 0.8 and [x for x, _ in worse] == [6, 7, 8] and [x for x, _ in crashed] == [9]
    assert len({y for _, y in worse + crashed}) == 1 and max(y for _, y in placed) < worse[0][1] < high


@pytest.mark.parametrize("ideas", ([1.3, 1.31, 1.32, 1.33], [1.004] * 4 + [5.0], [5.0] * 9))
def test_the_staircase_keeps_a_quarter_of_the_height_however_bad_the_ideas_were(ideas, tag):
    rows = [row(1.0, "keep", "baseline"), row(0.998, "keep"), *(row(score, "discard") for score in ideas)]
    low, high = picture.limits(rows, 0.0)
    assert low < 0.998 and 1.0 < high < low + 0.002 * 6


@pytest.mark.parametrize("night", ((0, 0), (1, 1), (5, 2), (30, 20), (120, 60), (1000, 20), (1000, 200)))
def test_no_text_of_the_picture_runs_into_another_or_over_its_edge(night, tag):
    held = tag(long_night(*night))
    figure = picture.compose(held, find(held))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    texts = [*figure.texts, *axes.texts, axes.get_legend(), axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text, text.get_window_extent(renderer)) for text in texts]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide, tall = (min(p, q) - max(r, s) for p, q, r, s in ((a.x1, b.x1, a.x0, b.x0), (a.y1, b.y1, a.y0, b.y0)))
        assert wide <= 0 or tall <= 4, (one, other)  # the box of a line has room below its letters
    numbers = {text.get_text() for text in axes.texts}
    assert numbers and numbers <= {str(number) for number, e in enumerate(held.experiments) if e.status == "keep"}


def test_the_largest_gains_are_named_where_there_are_too_many(tag):
    columns = picture.kept_names(rows := long_night(1000, 200))
    lines = [line for column in columns for line in column[1:]]
    assert len(columns) == 2 and len(lines) == 62 and lines[-1].endswith("and 140 that gained less")
    named = {int(line.split()[0]) for line in lines[:-1]}
    scores = [e.val_bpb for e in rows if e.status == "keep"]
    gains = dict(
        zip((i for i, e in enumerate(rows) if e.status == "keep" and i), map(float.__sub__, scores, scores[1:]))
    )
    assert {0, *sorted(gains, key=gains.get)[-60:]} == named


def run_of(val_bpb, seed, others, steps):
    return Run(val_bpb, None, "CPU", steps=steps, others=others, seed=seed)


@pytest.mark.parametrize(
    ("baseline", "best", "shown"),
    [
        ([(0.0, 9), (0.0, 9)], [(0.0, 9), (0.0, 9)], ["seed 0", "seed 0"]),
        ([(0.0, 9), (0.0, 9)], [(0.4, 9), (0.1, 9)], ["seed 1", "seed 1"]),  # others had 40 % of the CPU
        ([(0.0, 6), (0.0, 9)], [(0.0, 9), (0.0, 9)], ["seed 1", "seed 1"]),  # it made too few steps
        ([(0.0, 9), (0.4, 9)], [(0.4, 9), (0.0, 9)], ["seed 0", "seed 1"]),
        ([(0.0, 9)], [(0.4, 9)], ["seed 0", "seed 0, disturbed by others"]),
        ([(0.4, 9)], [(0.4, 9)], ["seed 0", "seed 0"]),  # a machine that is always shared
    ],
)
def test_the_losses_are_of_runs_of_one_seed_that_nobody_has_disturbed(baseline, best, shown, tag):
    rows = []
    for val_bpb, runs in ((1.0, baseline), (0.9, best)):
        rows.append(row(val_bpb, "keep", runs=[run_of(val_bpb, number, *run) for number, run in enumerate(runs)]))
    held = tag(rows)
    for e in rows:
        for number, run in enumerate(e.runs):
            held.path(e.commit, number).mkdir(parents=True)
            result = {"outcome": "ok", "val_bpb": e.val_bpb, "others": run.others, "steps": run.steps, "device": "CPU"}
            (held.path(e.commit, number) / "result.json").write_text(json.dumps(result | {"seed": number}))
            lines = [json.dumps({"seconds": at / 10, "loss": number + 1.0}) for at in range(1, 100)]
            (held.path(e.commit, number) / "metrics.jsonl").write_text("\n".join(lines))
    axes = picture.compose(held, find(held)).axes[1]
    expected = [f"{word} {e.commit}, {seed}" for word, e, seed in zip(("baseline", "best"), rows, shown)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == expected
    assert [line.get_ydata()[-1] for line in axes.lines] == [float(seed[5]) + 1.0 for seed in shown]

"""The morning as one page, report.html, which needs nothing besides itself. Only reads.

Every word of it that a researcher, a candidate or another machine has written goes through escape().
"""

import difflib
import itertools
import math
from html import escape
from pathlib import Path

from exam.files import write_atomically
from lab.book import Experiment
from lab.curve import loss_at, read_curve
from lab.findings import Findings, find, trials, weighed
from lab.report import certainty, expenses, failures, paces, transfer_rows
from lab.runs import changes
from lab.sharing import heard, peers
from lab.tag import Tag
from lab.transfer import summary, transfers
from lab.verdict import percent

DIFF_LINES = 400  # of one change
CURVE_POINTS = 200


def write_page(tag: Tag, path: Path):
    """Write the page of a tag as a whole or not at all."""
    write_atomically(path, page(tag))


def page(tag: Tag) -> str:
    """The page of a tag, as HTML."""
    found = weighed(find(tag))
    if not found.best:
        body = [f"<h1>{escape(found.tag)}</h1><p>nothing was kept yet, not even a baseline</p>"]
    else:
        held = trials(tag)
        body = [
            f"<h1>{escape(found.headline)}</h1>",
            f"<p class=lead>{escape(found.gain_in_words)}. {escape('. '.join(certainty(found)))}.</p>",
            staircase(found),
            "<h2>What was kept</h2>",
            *kept_changes(tag, found),
            "<h2>All experiments</h2>",
            experiments(tag),
            *elsewhere(tag),
            "<h2>Time, money, machine</h2>",
            *(f"<p>{escape(line)}</p>" for line in expenses(tag, held)),
            table(paces(held, tag.starts(), found.experiments)),
        ]
    return PAGE.format(title=escape(found.tag), style=STYLE, body="\n".join(body), script=SCRIPT)


def table(rows) -> str:
    """Rows of texts, the first of them the head, as a table; "" without any."""
    head, *rest = rows or [()]
    if not rest:
        return ""
    cells = "".join(f"<th>{escape(cell)}" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rest)
    return f"<div class=wide><table><thead><tr>{cells}</thead><tbody>{lines}</tbody></table></div>"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: SVG in the colours of the page


def scaled(values, low, high, size):
    """Values between low and high as places between 0 and size."""
    return [size * (value - low) / ((high - low) or 1.0) for value in values]


def polyline(x, y, kind):
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return f'<polyline class="{kind}" points="{points}"/>'


def staircase(found: Findings) -> str:
    """Every experiment over the best so far; what is far worse, or crashed, lies at the upper edge."""
    rows = [e for e in found.rows if math.isfinite(e.val_bpb)]
    scored = [e.val_bpb for e in rows if e.status != "crash"]
    worst = max(e.val_bpb for e in rows if e.status == "keep")
    span = max(worst - min(scored), 1e-9)
    low, high = min(scored) - 0.1 * span, worst + 0.3 * span
    width, height = 900, 300
    x = scaled(range(len(rows)), -0.5, len(rows) - 0.5, width)
    best = [e.val_bpb for e in itertools.accumulate(rows, lambda a, b: b if b.status == "keep" else a)]
    heights = [height - y for y in scaled(best, low, high, height)]
    stairs_x, stairs_y = [], []
    for number, (place, level) in enumerate(zip(x, heights)):
        stairs_x += [place, x[number + 1] if number + 1 < len(x) else width]
        stairs_y += [level, level]
    dots = []
    for place, e in zip(x, rows):
        level = 4 if e.status == "crash" else max(4, height - scaled([e.val_bpb], low, high, height)[0])
        words = escape(f"{e.commit} {e.status} {e.val_bpb:.6f}: {e.description}")
        dots.append(
            f'<circle class="{e.status}" cx="{place:.1f}" cy="{level:.1f}" r="5"><title>{words}</title></circle>'
        )
    marks = (
        f'<text x="4" y="14">{high:.4f}</text><text x="4" y="{height - 4}">{low:.4f} val_bpb, lower is better</text>'
    )
    drawn = polyline(stairs_x, stairs_y, "best") + "".join(dots) + marks
    return f'<svg viewBox="0 0 {width} {height}" role="img">{drawn}</svg>'


def curves(tag: Tag, commit: str, before: str) -> str:
    """The loss of a commit's first run over that of the best before it, without the steep start; "" where not known."""
    lines = {}
    for kind, each in (("before", before), ("after", commit)):
        curve = read_curve(tag.path(each, 0) / "metrics.jsonl")
        if not curve or not (end := curve[-1][0]) > 0:
            return ""
        times = [end * (0.1 + 0.9 * point / CURVE_POINTS) for point in range(CURVE_POINTS + 1)]
        points = [(seconds, loss) for seconds in times if (loss := loss_at(curve, seconds, 0.03 * end)) is not None]
        lines[kind] = points
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    last, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    drawn = "".join(
        polyline(
            scaled([x for x, _ in points], 0, last, 600),
            [160 - y for y in scaled([y for _, y in points], low, high, 160)],
            kind,
        )
        for kind, points in lines.items()
    )
    marks = f'<text x="4" y="12">{high:.3f}</text><text x="4" y="156">{low:.3f}: loss, {escape(before)} before</text>'
    return f'<svg viewBox="0 0 600 160" role="img">{drawn}{marks}</svg>'


# ---------------------------------------------------------------------------------------------------------------------
# Experiments


def kept_changes(tag: Tag, found: Findings):
    """Each kept change, opened by a click: why, its runs, its change of train.py, its loss."""
    drafts, rows = tag.drafts(), {e.commit: e for e in found.rows}
    for change in reversed(found.kept):
        e, base = rows[change.commit], tag.base(change.commit)
        why = drafts[e.commit].hypothesis if e.commit in drafts else ""
        parts = [f"<p>{escape(why)}</p>" if why else "", runs(e)]
        if base:
            sources = [tag.source(each).decode(errors="replace") for each in (base.commit, e.commit)]
            parts += [difference(*sources), curves(tag, e.commit, base.commit)]
        sure = f", P(better) {percent(change.certainty)}" if change.certainty is not None else ""
        told = f"<code>{escape(e.commit)}</code> {e.val_bpb:.6f}{escape(sure)}"
        head = f"<b>{change.gain:+.6f}</b> {escape(e.description)} {told}"
        shown = " open" * (change is found.kept[-1])
        yield f"<details{shown}><summary>{head}</summary>{''.join(parts)}</details>"
    if not found.kept:
        yield "<p>nothing but the baseline: no change was better with enough certainty</p>"


def runs(e: Experiment) -> str:
    rows = [(f"{run.seed}", f"{run.measured:.6f}", f"{run.steps or 0:.0f}", run.device or "unknown") for run in e.runs]
    return table([("seed", "val_bpb", "steps", "device"), *rows])


def difference(old: str, new: str) -> str:
    """A unified diff of two sources, its lines coloured, at most DIFF_LINES of them."""
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=2, lineterm=""))[2:]
    kinds = {"+": "ins", "-": "del"}
    shown = "\n".join(
        f"<{k}>{escape(line)}</{k}>" if (k := kinds.get(line[0])) else escape(line) for line in lines[:DIFF_LINES]
    )
    more = f"\n... {len(lines) - DIFF_LINES} more lines" if len(lines) > DIFF_LINES else ""
    return f"<pre>{shown}{more}</pre>"


def experiments(tag: Tag) -> str:
    """All of them as a table that sorts by a click on its head and filters by a word."""
    reasons, drafts = {e.commit: why for e, why in failures(tag)}, tag.drafts()
    rows = [("no", "commit", "status", "val_bpb", "gain", "steps", "description", "why, or why not")]
    for number, (e, change) in enumerate(changes(list(tag.experiments))):
        steps = [run.steps for run in e.runs if run.steps]
        why = reasons.get(e.commit) or (drafts[e.commit].hypothesis if e.commit in drafts else "")
        score = "" if e.status == "crash" else f"{e.val_bpb:.6f}"
        gain = "" if change is None else f"{-change:+.6f}"
        rows.append(
            (f"{number}", e.commit, e.status, score, gain, f"{steps[0]:.0f}" if steps else "", e.description, why)
        )
    words = '<input id=filter placeholder="filter: a word, keep, crash ..." aria-label="filter">'
    return words + table(rows).replace("<table>", "<table id=experiments>", 1)


def elsewhere(tag: Tag):
    """What other tags and machines have found, and what they say of what was found here."""
    if ideas := transfers(tag):
        yield "<h2>Found elsewhere</h2>" + table(list(transfer_rows(ideas)))
        yield from (f"<p>{escape(line)}</p>" for line in summary(tag, ideas))
    if met := peers(tag):
        rows = [(p.who, f"{p.held} of {p.tried}") for p in met]
        yield table([("machine", "of its ideas that were tried here, held"), *rows])
    if said := heard(tag):
        rows = [(h.commit, f"{h.kept} of {h.tried}", h.description) for h in said]
        yield table([("commit", "kept by, of the other machines that tried it", "description"), *rows])


# ---------------------------------------------------------------------------------------------------------------------
# The frame

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #767676; --line: #ddd; --good: #2a7f4f;
  --bad: #b3261e; --in: #e3f4e8; --out: #fbe6e4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --soft: #9a9a9a; --line: #3a3a3a;
  --good: #6cc48f; --bad: #f2867c; --in: #17341f; --out: #3d1d1a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem } .lead { font-size: 1.1rem }
svg { width: 100%; height: auto; border-bottom: 1px solid var(--line) }
svg text { font-size: 12px; fill: var(--soft) } polyline { fill: none; stroke-width: 2 }
.best, .after { stroke: var(--good) } .before { stroke: var(--soft) }
.keep { fill: var(--good) } .discard { fill: var(--soft); opacity: .6 } .crash { fill: var(--bad) }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td { white-space: nowrap } td:last-child, #experiments td:nth-child(n+7) { white-space: normal; min-width: 14rem }
#experiments th { cursor: pointer; white-space: nowrap }
@media (max-width: 600px) { svg text { font-size: 26px } circle { r: 9px } }
input { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem; margin: .3rem 0; color: inherit;
  background: transparent; border: 1px solid var(--line) }
details { border-bottom: 1px solid var(--line); padding: .4rem 0 } summary { cursor: pointer }
pre { overflow-x: auto; font-size: 12px; padding: .5rem; border: 1px solid var(--line) }
ins { background: var(--in); text-decoration: none } del { background: var(--out); text-decoration: none }
"""
SCRIPT = """
const body = document.querySelector('#experiments tbody'), rows = body ? [...body.rows] : [];
document.querySelector('#filter')?.addEventListener('input', event => {
  const word = event.target.value.toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(word);
});
document.querySelectorAll('#experiments th').forEach((head, place) => {
  let up = false;
  head.addEventListener('click', () => {
    up = !up;
    const text = row => row.cells[place].textContent, number = row => parseFloat(text(row));
    rows.sort((a, b) => (number(a) - number(b) || text(a).localeCompare(text(b))) * (up ? 1 : -1));
    body.append(...rows);
  });
});
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
<script>{script}</script>
</body></html>
"""

"""The night on a terminal: timestamped lines, and below them the state of the loop, redrawn in place. Only reads."""

import collections
import contextlib
import math
import time

from rich.console import Console
from rich.text import Text

from lab.curve import finished_curve, loss_at, read_curve
from lab.findings import Findings, find
from lab.report import aligned
from lab.runs import changes
from lab.slots import Running

COLOURS = {"keep": "green", "discard": "", "crash": "red"}  # of the three statuses


def say(console: Console, text: str, style=""):
    """Print one timestamped line."""
    with contextlib.suppress(OSError):  # a log on a full disk must not end the night
        console.print(Text.assemble((time.strftime("%H:%M:%S "), "dim"), (text, style)), soft_wrap=True)


class View:
    """The state of a night as lines that fit the terminal."""

    def __init__(self, loop, console: Console):
        """loop: the one of agent_loop.py, whose tag, researcher, measure and limits are looked at."""
        self.tag, self.researcher, self.measure, self.loop = loop.tag, loop.researcher, loop.measure, loop
        self.console, self.before, self.started = console, len(loop.tag.experiments), time.monotonic()

    def lines(self) -> list[Text]:
        found, running = find(self.tag), list(self.measure.running.values())
        told = [("tag", found.headline)]
        if best := found.best:
            sigma = f"; sigma {found.sigma:.6f}" if found.sigma else ""
            place = "the baseline" if best is found.baseline else f"{found.gain_percent:+.2f}% better than the baseline"
            told.append(("best", f"{best.val_bpb:.6f} {best.commit}, {place}{sigma}"))
        told.append(("pace", ", ".join(self.pace(found))))
        if len(running) == 1:
            told += self.now(found, *running)
        else:
            told += self.all_now(found, running)
        told.append(("next", self.researcher.state() or ("" if running else "looking for an idea")))
        texts = [Text.assemble((f"{label:<6}", "dim"), words) for label, words in told if words]
        texts = [Text(), *texts, Text()]
        texts += self.latest(max(0, min(10, self.console.height - len(texts) - 2)))
        for text in texts:
            text.truncate(self.console.width - 1, overflow="ellipsis")
        return texts

    def pace(self, found: Findings):
        """How fast it goes, what it has cost, and when it will end."""
        passed, held, ends = time.monotonic() - self.started, len(found.rows) - self.before, []
        if held:
            yield f"{3600 * held / passed:.1f} experiments an hour"
        if self.researcher.spent is not None:
            cap = "" if self.researcher.max_cost is None else f" of ${self.researcher.max_cost:.2f}"
            yield f"${self.researcher.spent:.2f}{cap} spent"
        if self.loop.ends < math.inf:
            ends.append(self.loop.ends - time.monotonic())
        if self.loop.most is not None and held:
            ends.append((self.loop.most - found.experiments) * passed / held)
        if ends:
            yield f"ends about {time.strftime('%a %H:%M', time.localtime(time.time() + min(ends)))}"

    def now(self, found: Findings, running: Running):
        """The only trial under way: what it is, how far it has come, and how it does beside the best one's."""
        seconds, loss, usual = self.progress(found, running)
        scored = ", being scored" if seconds >= self.tag.task.time_budget else ""
        loss = "starting" if loss is None else f"loss {loss:.3f}"
        loss += f", the best one's at this time {usual:.3f}" if usual else ""
        once_more = (
            " (the best, once more)" if running.run and found.best and running.commit == found.best.commit else ""
        )
        yield "now", f"{running.commit} {running.description}{once_more}"
        yield "", f"{self.bar(seconds, 30)} {seconds:.0f} of {self.tag.task.time_budget:g} s{scored}"
        yield "", f"run {running.run + 1}: {loss}"

    def all_now(self, found: Findings, running: list[Running]):
        """Several trials under way, a line each for as many as half of the terminal can hold, in the order of slots."""
        running, room = sorted(running, key=lambda each: each.slot.number), max(1, self.console.height // 2)
        for each in running[:room]:
            seconds, loss, usual = self.progress(found, each)
            words = "starting" if loss is None else f"loss {loss:.3f}"
            words += f" ({loss - usual:+.3f})" if usual else ""
            place = f"{each.slot.name} {self.bar(seconds, 8)} {seconds:.0f} s"
            yield "now" * (each is running[0]), f"{place}, {words}: {each.commit} {each.description}"
        if len(running) > room:
            yield "", f"and {len(running) - room} more"

    def progress(self, found: Findings, running: Running):
        """(seconds of training, loss, that of the best one at this time) of a trial; None for what is not known yet."""
        path, budget = running.out / "metrics.jsonl", self.tag.task.time_budget
        curve = read_curve(path, 2**16)
        if not curve:
            return 0.0, None, None
        seconds, logged, usual = curve[-1][0], curve[-1][0], None
        with contextlib.suppress(OSError):  # the clock goes on between two steps, and while the model is scored
            seconds = min(budget, logged + max(0.0, time.time() - path.stat().st_mtime))
        if found.best and found.best.commit != running.commit:
            usual = finished_curve(self.tag.path(found.best.commit, 0) / "metrics.jsonl")
            usual = loss_at(usual, logged, 0.05 * budget)
        return seconds, loss_at(curve, logged, 0.05 * budget), usual

    def bar(self, seconds, width):
        """How much of the budget has passed, as a bar."""
        full = round(width * min(1.0, max(0.0, seconds / self.tag.task.time_budget)))
        return "━" * full + "┄" * (width - full)

    def latest(self, room: int) -> list[Text]:
        """The last `room` rows of the book."""
        rows = []
        for e, change in collections.deque(changes(list(self.tag.experiments)), room):
            score = "-" if e.status == "crash" else f"{e.val_bpb:.6f}"
            rows.append((e.commit, score, "" if change is None else f"{change:+.6f}", e.status, e.description))
        return [Text(line, COLOURS[row[3]]) for line, row in zip(aligned(rows, 10**4), rows)]


@contextlib.contextmanager
def live(view: View):
    """Keep the view on the terminal while the loop runs; nothing where the output is no terminal."""
    console = view.console
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    from rich.console import Group
    from rich.control import Control, ControlType
    from rich.live import Live

    shown, width = [], console.width

    def picture():
        nonlocal shown, width
        if console.width < width:  # the terminal has wrapped the longer lines: begin that many lines further up
            wrapped = sum(max(0, text.cell_len - 1) // console.width for text in shown)
            console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped))
        width, shown = console.width, view.lines()
        return Group(*shown)

    with Live(get_renderable=picture, console=console, refresh_per_second=2, transient=True):
        yield

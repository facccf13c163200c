"""agent_loop.py - the loop: ask for an edit, commit it, train it, keep it or let it go, write it down.

  python agent_loop.py --demo                   a baseline and five experiments in a few minutes, on any machine
  python agent_loop.py                          go on until Ctrl-C, or until a limit (--hours, --max-cost, ...)
  python agent_loop.py report                   what has happened so far

The state is git, results.tsv and runs/, and nothing else, so the same command carries on wherever the last one ended:
a candidate is a commit under refs/autoresearch/<tag>/ before its first trial starts, a result is a file before it is a
row, a row is on disk before the branch moves. The branch autoresearch/<tag> only ever moves to a better train.py; no
other file, and no other branch, is touched.
"""

import argparse
import asyncio
import contextlib
import fcntl
import functools
import os
import re
import sys
import time
from pathlib import Path

try:
    from rich.console import Console

    import prepare
    from exam.files import ROOT
    from exam.sandbox import sandbox_level
    from exam.signals import hear_signals
    from lab import launch, report
    from lab.book import title
    from lab.measure import Measure
    from lab.model import FALLBACK, MODEL, Model
    from lab.news import News
    from lab.repository import Repository
    from lab.researcher import Enough, Researcher, Search
    from lab.tag import THROW_AWAY, Tag, book_owner
    from lab.view import COLOURS, View, live, say
    from prepare import PASSING, Pause, Trouble, words
except ModuleNotFoundError as missing:  # a fresh clone
    print(f"agent_loop.py: the package {missing.name} is not installed; run: pip install -e .", file=sys.stderr)
    sys.exit(2)

PAUSE = 60.0  # seconds until a full disk or a missing GPU is looked at again

# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Loop:
    """Experiments of one tag, one after the other, until a limit is reached."""

    def __init__(self, tag: Tag, researcher: Researcher, measure: Measure, news: News, arguments, started: float):
        self.tag, self.researcher, self.measure, self.news, self.say = tag, researcher, measure, news, tag.say
        self.most, self.hours, self.started = arguments.max_experiments, arguments.hours, started  # time.monotonic()
        self.drafts = {}  # {commit: draft} of candidates without a row, with what their researcher remembers
        self.drafted = None  # a draft that is not committed yet: it has cost money, and a full disk must not lose it

    def run(self) -> str:
        """Hold experiments until a limit is reached; returns which."""
        while not (reason := self.limit_reached()):
            try:
                self.experiment()
            except Enough as enough:
                return str(enough)
            except (Pause, OSError) as fault:  # every step can be taken again
                if not isinstance(fault, Pause) and fault.errno not in PASSING:
                    raise
                self.say(f"paused: {words(fault)}; trying again in {PAUSE:.0f} s", "yellow")
                self.news.send("paused, and may need you", words(fault))
                time.sleep(PAUSE)
        return reason

    def experiment(self):
        """Hold one experiment, from the draft to the row."""
        tag, researcher = self.tag, self.researcher
        commit, draft = tag.candidate() or self.new_candidate()
        draft = self.drafts.get(commit, draft)
        if reason := self.limit_reached():  # waiting for the draft has taken the rest of the night
            raise Enough(reason)
        self.say(f"{commit} {draft.description}", "bold")
        if not self.limit_reached(running=1):
            researcher.think_ahead(tag.brief(running=(f"{commit} {draft.description}",)), 1)
        before = tag.best
        experiment, why = self.measure.measure(commit, draft)
        tag.record(experiment)
        self.drafts.pop(commit, None)
        self.measure.running = None
        score = "" if experiment.status == "crash" else f"{experiment.val_bpb:.6f} "
        change = f"({experiment.val_bpb - before.val_bpb:+.6f}) " if before and score else ""
        self.say(f"{commit} {score}{change}{experiment.status}: {title(why)}", COLOURS[experiment.status])
        if experiment.status == "keep" and before:
            self.news.send("new best", f"val_bpb {experiment.val_bpb:.6f} {change}{draft.description}")
        if experiment.status == "crash":
            researcher.failed(draft, tag.failure(commit))

    def new_candidate(self):
        """(short hash, draft) of a new idea, committed."""
        draft = self.drafted = self.drafted or asyncio.run(self.researcher.draft(self.tag.brief()))
        commit = self.tag.add(draft)
        self.drafts[commit], self.drafted = draft, None
        return commit, draft

    def limit_reached(self, running=0):
        """Why no experiment is to follow those on record and the `running` one; None where one may."""
        if self.most is not None and len(self.tag.experiments) + running > self.most:
            return f"tag {self.tag.name} holds its {self.most} experiments"
        if self.hours is not None and time.monotonic() - self.started > 3600 * self.hours:
            return f"{self.hours:g} hours are over"
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@contextlib.contextmanager
def only_loop(path):
    """Hold a lock; raises Trouble with the pid of the loop that has it."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Trouble(f"another loop is running (process {file.read().strip()}); stop it first") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def choose_tag(arguments, repository):
    """The tag asked for, else (to report) that of results.tsv, that of the checked-out branch, or today's date."""
    tag = arguments.tag or ("demo" if arguments.demo else None) or (book_owner() if arguments.command else None)
    tag = tag or repository.branch().partition("autoresearch/")[2] or time.strftime("%b%d").lower()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise Trouble(f"{tag!r} cannot be a tag; use letters, digits, dots, dashes")
    return tag


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="python agent_loop.py [report] [options]",
        description="Improve train.py by experiments, overnight. Started again, the same command carries on.",
        epilog="""examples:
  python agent_loop.py --demo                     see it all work in five minutes
  python agent_loop.py --hours 8 --max-cost 15    a night with Claude
  python agent_loop.py report --tag nov23         what that night has found""",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("report",), help="tell what a tag has found; draw progress.png")
    add("--json", action="store_true", help="with report: one JSON object, and nothing else")
    add("--diff", action="store_true", help="with report: train.py's change, baseline to best")
    add("--demo", action="store_true", help="a baseline and five quick experiments; needs nothing")
    add("--tag", metavar="T", help="name of the run (default: the branch's, or today)")
    add("--task", metavar="NAME", help=f"{', '.join(prepare.TASKS)} (default: {prepare.TASK.name})")
    add("--budget", type=float, metavar="SECONDS", help="of training in a run, not the task's own")
    add("--researcher", metavar="R", choices=("llm", "search"), help="llm (a language model, default) or search")
    add("--model", metavar="M", default=MODEL, help=f"that llm asks (default: {MODEL})")
    add("--fallback-model", metavar="M", help=f"if M fails (default: {FALLBACK})")
    efforts = ("low", "medium", "high", "xhigh", "max")
    add("--effort", metavar="E", choices=efforts, default="high", help="of Claude: low, medium, high, xhigh, max")
    add("--max-cost", type=float, metavar="USD", help="of the model from this start; never exceeded")
    add("--hours", type=float, metavar="H", help="start no experiment after H hours")
    add("--max-experiments", type=int, metavar="N", help="end when the tag holds N and its baseline")
    add("--notify-url", metavar="URL", help="post a new best, the end and trouble there")
    add("--greedy", action="store_true", help="keep any lower score after a single run")
    add("--no-sandbox", action="store_true", help="run train.py unconfined, if you trust its author")
    arguments = parser.parse_args()
    if (arguments.json or arguments.diff) and not arguments.command:
        parser.error("--json and --diff go with report")
    arguments.researcher = arguments.researcher or ("search" if arguments.demo else "llm")
    if arguments.demo:
        arguments.task = arguments.task or "demo"
        arguments.max_experiments = 5 if arguments.max_experiments is None else arguments.max_experiments
    return arguments


MODELS = """export ANTHROPIC_API_KEY=...                for Claude
   or export ANTHROPIC_BASE_URL=...               for a local --model
   or python agent_loop.py --researcher search    which asks nobody"""


def first_steps(task, researcher, repository):
    """Raise Trouble where a run still needs something from its owner, once it has told them what, and the commands."""
    steps = []
    if task.dataset != "pycode" and not prepared(task):
        steps.append((f"the text of {task.name}", f"python prepare.py --task {task.name}"))
    if not researcher.has_key:
        steps.append(("a model to ask", MODELS))
    if not steps:
        return
    missing = " and ".join(what for what, _ in steps)
    if not repository.has_identity:
        steps.append(("your name on the commits, if you like", "git config user.name ...; git config user.email ..."))
    print("What this still needs:\n")
    for number, (what, command) in enumerate(steps, 1):
        print(f"{number}. {what}\n      {command}\n")
    print("To see it all work in five minutes, without any of that:\n      python agent_loop.py --demo\n")
    raise Trouble(f"not started, for lack of {missing}; the commands are above")


def prepared(task):
    """Whether the text of a task is there as rows."""
    return (prepare.cache_root() / task.dataset / "meta.json").exists()


def night(tag: Tag, news: News, console: Console, arguments):
    """Open the tag and run the loop to its end, which is reported."""
    repository, speak, started = tag.repository, tag.say, time.monotonic()
    costs = tag.folder / "cost.jsonl"
    researcher = Search() if arguments.researcher == "search" else Model(arguments, costs, speak)
    task = prepare.get_task(arguments.task or tag.settings.get("task"))
    first_steps(task, researcher, repository)
    here, shared = Path(repository.repo.git_dir), Path(repository.repo.common_dir)  # of all its working trees
    with only_loop(here / "autoresearch.lock"), only_loop(shared / f"autoresearch-{tag.name}.lock"):
        home = repository.branch() or repository.run("rev-parse", "HEAD")
        task = tag.check(arguments.task, arguments.budget)
        if not prepared(task):
            speak(f"preparing the data of {task.name}, once")
        tag.open(task, None if prepared(task) and tag.settings else launch.make_ready(task))
        level = "none" if arguments.no_sandbox else sandbox_level()
        speak(f"tag {tag.name}: task {task.name}, {task.time_budget:g} s a run, sandbox: {level}")
        if level == "none":
            speak("NO SANDBOX: train.py can read and write all that you can", "red")
        speak("looking whether the machine is fit for a night, as python prepare.py --check does")
        for line in launch.shortcomings(task):
            speak(line, "yellow")
        researcher.check()
        measure = Measure(tag, speak, arguments.greedy, sandbox=not arguments.no_sandbox)
        loop = Loop(tag, researcher, measure, news, arguments, started)
        with live(View(loop, console)):
            reason = loop.run()
        speak(f"the end: {reason}")
    report.tell(tag, console)
    news.send("the end", f"{reason}; best val_bpb {tag.best.val_bpb:.6f}")
    if arguments.demo:
        home = "-" if home == tag.branch else home
        print(f"To throw the demo away:{THROW_AWAY.format(tag=tag.name, home=home)}")


def main():
    arguments, console, news = parse_arguments(), Console(), None
    hear_signals()
    sys.stdout.reconfigure(errors="replace")  # no description can end the night in a terminal without Unicode
    speak = functools.partial(say, console)
    try:
        repository, news = Repository(ROOT), News(arguments.notify_url, speak)
        tag = Tag(repository, choose_tag(arguments, repository), speak)
        if arguments.command == "report":
            tag.look()
            report.show(tag, console, arguments.json, arguments.diff)
        else:
            night(tag, news, console, arguments)
        return 0
    except (Trouble, OSError) as trouble:
        print(f"agent_loop.py: {words(trouble)}", file=sys.stderr)
        if news:
            news.send("stopped, and needs you", words(trouble))
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command carries on", file=sys.stderr)
        return 130
    finally:
        if news:
            news.close()


if __name__ == "__main__":
    sys.exit(main())

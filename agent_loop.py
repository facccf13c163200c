"""agent_loop.py - the loop: ask for an edit, commit it, train it, keep it or let it go, write it down.

  python agent_loop.py --demo                   a baseline and five experiments in a few minutes, on any machine
  python agent_loop.py                          go on until Ctrl-C, or until a limit (--hours, --max-cost, ...)
  python agent_loop.py report                   what has happened so far
  python agent_loop.py share --share REMOTE     give it to others

The state is git, results.tsv and runs/, and nothing else, so the same command carries on wherever the last one ended:
a candidate is a commit under refs/autoresearch/<tag>/ before its first trial starts, a result is a file before it is a
row, a row is on disk before the branch moves. The branch autoresearch/<tag> only ever moves to a better train.py; no
other file, and no other branch, is touched.

Several trials may be under way, one in each slot (a card, a share of the CPU, a launcher's machine). Verdicts are given
in the order in which they end, against the best of that moment.
"""

import argparse
import asyncio
import contextlib
import errno
import fcntl
import functools
import math
import os
import sys
import time
from pathlib import Path

try:
    from rich.console import Console

    import prepare
    from exam import signals
    from exam.files import ROOT
    from exam.sandbox import sandbox_level
    from lab import demo, launch, page, picture, report
    from lab.api import FALLBACK, MODEL
    from lab.book import Experiment, title
    from lab.drafts import Drafts
    from lab.elsewhere import Others
    from lab.evening import choose_researcher, first_steps, prepared, sound_tag
    from lab.measure import Measure
    from lab.news import News
    from lab.repository import Repository
    from lab.researcher import Draft, Enough, Researcher
    from lab.runs import changes
    from lab.sharing import Sharing, share, sharing
    from lab.slots import POLL, Slot, choose_slots, end_all, idle_cards
    from lab.tag import THROW_AWAY, Tag, book_owner
    from lab.view import COLOURS, View, live, say
    from prepare import PASSING, Pause, Trouble, words
except ModuleNotFoundError as missing:  # a fresh clone
    print(f"agent_loop.py: the package {missing.name} is not installed; run: pip install -e .", file=sys.stderr)
    sys.exit(2)

PAGE = ROOT / "report.html"
PAUSE = 60.0  # seconds until a full disk or a missing GPU is looked at again
LAUNCH_TRIES = 3  # trials in a row that a slot's launcher loses, until the slot pauses
AWAY = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)  # of an OSError: a file system of several machines

# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Loop:
    """Experiments of one tag, one at a time in each slot, until a limit is reached."""

    def __init__(self, tag: Tag, researcher: Researcher, measure: Measure, news: News, slots: tuple[Slot, ...]):
        self.tag, self.researcher, self.measure, self.news, self.say = tag, researcher, measure, news, tag.say
        self.slots, self.drafts = slots, Drafts(tag, researcher, tag.say)
        self.drafts.left = self.left
        self.most: int | None = None  # experiments of the tag besides its baseline
        self.ends = math.inf  # time.monotonic() from which no experiment is to begin
        self.shared: Sharing | None = None
        self.page = asyncio.Lock()  # held by the slot that writes it
        self.reason: str | None = None  # why none is to follow
        self.trouble: Trouble | None = None

    async def run(self) -> str:
        """Hold experiments until a limit is reached; returns which. Raises Trouble once all slots have ended."""
        workers = [asyncio.ensure_future(self.work(slot)) for slot in self.slots]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await end_all(workers)
        for worker in workers:
            if not worker.cancelled():
                worker.result()
        if self.trouble:
            raise self.trouble
        return self.reason

    async def work(self, slot: Slot):
        """The life of a slot."""
        faults = 0  # in a row
        while not self.over():
            try:
                faults = 0 if await self.experiment(slot) else faults
            except Enough as enough:
                self.reason = self.reason or str(enough)
            except (Pause, OSError) as fault:  # every step can be taken again
                passing = (*PASSING, *AWAY) if slot.launcher else PASSING
                if not isinstance(fault, Pause) and fault.errno not in passing:
                    raise
                faults += 1
                await self.rest(fault, slot, at_once=bool(slot.launcher) and faults < LAUNCH_TRIES)
            except Trouble as trouble:  # what the other slots have begun counts
                self.trouble = self.trouble or trouble

    async def rest(self, fault: Exception, slot: Slot, at_once: bool):
        """Let a fault of the machine pass."""
        where = f"{slot.name}: " * (len(self.slots) > 1)
        if at_once:
            return self.say(f"{where}{words(fault)}; trying again", "yellow")
        self.say(f"{where}paused: {words(fault)}; trying again in {PAUSE:.0f} s", "yellow")
        self.news.send("paused, and may need you", words(fault))
        await asyncio.sleep(PAUSE)

    def over(self) -> bool:
        """Whether no experiment is to follow those that are under way."""
        self.reason = self.reason or self.limit_reached()
        return bool(self.reason or self.trouble)

    def limit_reached(self, running=0):
        """Why no experiment is to follow those on record and the `running` ones; None where one may."""
        if self.most is not None and len(self.tag.experiments) + running > self.most:
            return f"tag {self.tag.name} holds its {self.most} experiments"
        return "the hours are over" if time.monotonic() > self.ends else None

    def left(self) -> str:
        """What the owner's limits still allow, in words; "" where there are none."""
        hours = [f"{max(0.0, self.ends - time.monotonic()) / 3600:.1f} hours"] if self.ends < math.inf else []
        count = [] if self.most is None else [f"{self.most - max(0, len(self.tag.experiments) - 1)} experiments"]
        return " and ".join([*count, *hours])

    async def experiment(self, slot: Slot) -> bool:
        """Hold one experiment, from the draft to the row; false, after a moment, where none can begin."""
        tag, drafts = self.tag, self.drafts
        # For the baseline is waited, and where the limit is near, for what may have to be held again elsewhere.
        wait = slot is not self.slots[0] if not tag.experiments else self.limit_reached(drafts.begun)
        if wait or not (found := await drafts.next(self.over)):
            await asyncio.sleep(POLL)
            return False
        commit, draft = found
        drafts.taken[commit] = draft.description
        try:
            self.say(f"{commit} {draft.description}", "bold")
            if draft.hypothesis:
                self.say(f"        because: {title(draft.hypothesis)}", "dim")
            left = math.inf if self.most is None else self.most + 1 - len(tag.experiments) - drafts.begun
            think_ahead = functools.partial(drafts.think_ahead, len(self.slots), left)
            if tag.experiments:
                think_ahead()
                experiment, why = await self.measure.measure(commit, draft, slot)
            else:
                experiment, why = await self.measure.measure_baseline(draft, self.slots, think_ahead)
            self.record(experiment, draft, why)
            await self.update_page()
        finally:
            del drafts.taken[commit]
        if experiment.status == "keep" and self.researcher.reads_profiles and not slot.launcher and not self.over():
            self.say("looking at which lines the time goes, for the model", "dim")
            await self.measure.profile(commit, slot)
        return True

    async def update_page(self):
        """Bring report.html up to date where there is one, since its owner wants to watch it."""
        async with self.page:
            if PAGE.exists():
                with contextlib.suppress(Trouble, OSError):  # the next row tries again
                    await asyncio.to_thread(page.write_page, self.tag, PAGE)

    def record(self, experiment: Experiment, draft: Draft, why: str):
        """Write the row of a finished experiment, and tell of it whom it concerns."""
        tag, before, commit = self.tag, self.tag.best, experiment.commit
        tag.record(experiment, frozenset(running.out for running in self.measure.running.values()))
        self.drafts.recorded(commit)
        score = "" if experiment.status == "crash" else f"{experiment.val_bpb:.6f} "
        change = changes(tag.experiments)[-1][1]
        change = "" if change is None else f"({change:+.6f}) "
        self.say(f"{commit} {score}{change}{experiment.status}: {title(why)}", COLOURS[experiment.status])
        if experiment.status == "keep" and before:
            self.news.send("new best", f"val_bpb {experiment.val_bpb:.6f} {change}{draft.description}")
        if experiment.status == "crash":
            self.researcher.failed(draft, tag.failure(commit))
        base = tag.base(commit) if before else None
        if base and base.commit != before.commit and self.measure.beats(experiment, base):
            self.drafts.carry_over(experiment, draft, before, base)
        if self.shared:
            self.shared.rows()


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
    """The tag asked for, else that of the checked-out branch, (to report) that of results.tsv, or today's date."""
    tag = arguments.tag or ("demo" if arguments.demo else repository.branch().partition("autoresearch/")[2])
    owner = book_owner() if arguments.command and not tag else None
    return sound_tag(tag or owner or time.strftime("%b%d").lower())


def above_zero(text):
    """A finite number above zero."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text):
    """A whole number that is not negative."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="python agent_loop.py [report | share] [options]",
        description="Improve train.py by experiments, overnight. Started again, the same command carries on.",
        epilog="""examples:
  python agent_loop.py --demo                     see it all work in five minutes
  python agent_loop.py --hours 8 --max-cost 15    a night with Claude
  python agent_loop.py report --tag nov23         what that night has found
  python agent_loop.py --share git@host:ideas     a night that gives to others, and takes from them""",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
    )
    add_options(parser.add_argument)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        near = [name.replace("_", "-") for name in vars(arguments) if unknown[0].strip("-") in name]
        parser.error(f"there is no {unknown[0]}{f'; is it --{near[0]}?' if near else ', see --help'}")
    if arguments.command not in (None, "report", "share"):
        parser.error(f"there is no command {arguments.command!r}; it is report, share, or none for a night")
    if arguments.command == "share" and not arguments.share:
        parser.error("share needs to know where: --share REMOTE, a git remote's name, a path or a URL")
    if (arguments.json or arguments.diff or arguments.html) and arguments.command != "report":
        parser.error("--json, --diff and --html go with report")
    of_llm = arguments.model, arguments.fallback_model, arguments.effort, arguments.max_cost
    if any(value is not None for value in of_llm) and arguments.researcher not in (None, "llm", "search"):
        parser.error("--model, --fallback-model, --effort and --max-cost go with llm; a command has options of its own")
    if arguments.demo:
        arguments.task = arguments.task or "demo"
        arguments.max_experiments = 5 if arguments.max_experiments is None else arguments.max_experiments
    return arguments


def add_options(add):
    """Add all arguments by argparse's add_argument."""
    add("command", nargs="?", metavar="report | share", help="what a tag has found: tell it, or give it to others")
    add("--json", action="store_true", help="with report: one JSON object, and nothing else")
    add("--diff", action="store_true", help="with report: train.py's change, baseline to best")
    add("--html", action="store_true", help="with report: write report.html; each row updates it")
    add("--demo", action="store_true", help="a baseline and five quick experiments; needs nothing")
    add("--tag", metavar="T", help="name of the run (default: the branch's, or today)")
    add("--task", metavar="NAME", help=f"{', '.join(prepare.TASKS)} (default: {prepare.TASK.name})")
    add("--budget", type=above_zero, metavar="SECONDS", help="of training in a run, not the task's own")
    add("--researcher", metavar="R", help="llm (default), search, or a command, run in an empty folder: 'claude -p'")
    add("--replay", metavar="TAG", help="first try here what another tag has kept, in its order")
    remotes = {"metavar": "REMOTE", "action": "append", "default": []}
    add("--share", **remotes, help="give experiments to a git remote, take others' ideas")
    add("--peer", **remotes, help="only take others' ideas, from a name, path or URL")
    add("--model", metavar="M", help=f"that llm asks (default: {MODEL})")
    add("--fallback-model", metavar="M", help=f"if M fails (default: {FALLBACK})")
    efforts = ("low", "medium", "high", "xhigh", "max")
    add("--effort", metavar="E", choices=efforts, help="of Claude: low, medium, high (default), xhigh, max")
    add("--max-cost", type=above_zero, metavar="USD", help="of the model from this start; never exceeded")
    add("--hours", type=above_zero, metavar="H", help="start no experiment after H hours")
    add("--max-experiments", type=count, metavar="N", help="end when the tag holds N and its baseline")
    add("--gpus", metavar="WHICH", help="a trial on each: all, a count, or a list like 0,2")
    add("--parallel", type=int, metavar="K", help="trials at a time: shares of a CPU, or by --launch")
    add("--launch", metavar="CMD", help="takes trials elsewhere: 'srun --gres=gpu:1 {}'")
    add("--notify-url", metavar="URL", help="post a new best, the end and trouble there")
    add("--greedy", action="store_true", help="keep any lower score after a single run")
    add("--no-sandbox", action="store_true", help="run train.py unconfined, if you trust its author")


def open_tag(tag: Tag, task: prepare.Task, arguments, slots: tuple[Slot, ...]):
    """Prepare data and tag for a night, and tell its owner what they may want to know first. task: of tag.check()."""
    speak = tag.say
    if not prepared(task):
        speak(f"preparing the data of {task.name}, once")
    for owner in tag.folder.glob("*/*/owner"):  # of trials that a loop which was killed has begun elsewhere
        launch.disown(owner.parent)
    scratch = tag.folder if slots[0].launcher else Path(tag.repository.repo.git_dir)
    flops, lacks = signals.run(launch.make_ready(task, slots[0], scratch))
    fresh = arguments.demo and not tag.settings and not tag.repository.exists(f"refs/heads/{tag.branch}")
    start = demo.worse(tag.repository.source("HEAD")) if fresh else None
    tag.open(task, flops, start)
    level = "none" if arguments.no_sandbox else sandbox_level()
    speak(f"tag {tag.name}: task {task.name}, {task.time_budget:g} s a run, sandbox: {level}")
    if level == "none":
        speak("NO SANDBOX: train.py can read and write all that you can", "red")
    if len(slots) > 1:
        names = ", ".join(slot.name for slot in slots[:8]) + ", ..." * (len(slots) > 8)
        speak(f"{len(slots)} trials at a time: {names}")
    programme = "" if (ROOT / "program.md").exists() else "there is no program.md: a model is told the rules alone"
    for line in filter(None, [*lacks, idle_cards(slots), programme]):
        speak(line, "yellow")
    for line in demo.FIRST if start else ():
        speak(line)


def night(tag: Tag, news: News, console: Console, arguments):
    """Open the tag and run the loop to its end, which is reported."""
    repository, speak, started = tag.repository, tag.say, time.monotonic()
    slots = choose_slots(arguments.gpus, arguments.parallel, arguments.launch)
    researcher = choose_researcher(tag, arguments)
    if arguments.launch is not None and not (arguments.task or tag.settings):
        raise Trouble("--launch does not tell what the other machines have; name a task for them with --task")
    task = prepare.get_task(arguments.task or tag.settings.get("task"))
    first_steps(task, researcher, repository)
    here, common = Path(repository.repo.git_dir), Path(repository.repo.common_dir)  # of all its working trees
    locks = only_loop(here / "autoresearch.lock"), only_loop(common / f"autoresearch-{tag.name}.lock")
    with locks[0], locks[1], sharing(tag, arguments.share, arguments.peer) as given:
        home = repository.branch() or repository.run("rev-parse", "HEAD")
        task = tag.check(arguments.task, arguments.budget)
        researcher.check()
        open_tag(tag, task, arguments, slots)
        measure = Measure(tag, speak, arguments.greedy, not arguments.no_sandbox, patient=not arguments.demo)
        if given:
            given.rows()
            researcher = Others(given.exchange, researcher, speak)
        loop = Loop(tag, researcher, measure, news, slots)
        loop.shared, loop.most = given, arguments.max_experiments
        loop.ends = started + 3600 * arguments.hours if arguments.hours is not None else math.inf
        with live(View(loop, console)):
            reason = signals.run(loop.run())
        speak(f"the end: {reason}")
        if tag.experiments and (found := tag.candidate()):
            speak(f"{found[0]} ({found[1].description}) still waits for its trial; the next start holds it", "yellow")
    report.tell(tag, console)
    with contextlib.suppress(Exception):  # the night has ended well all the same; `report` says what is missing
        picture.draw(tag, picture.PICTURE)
    more = f"; see {PAGE.name}" if PAGE.exists() else ""
    best = f"; best val_bpb {tag.best.val_bpb:.6f}" if tag.best else ""
    news.send("the end", f"{reason}{best}{more}")
    if arguments.demo:
        print(demo.NEXT)
        home = "-" if home == tag.branch else home
        print(f"To throw the demo away:{THROW_AWAY.format(tag=tag.name, home=home)}")


def main():
    arguments, console, news = parse_arguments(), Console(), None
    signals.hear_signals()
    sys.stdout.reconfigure(errors="replace")  # no description can end the night in a terminal without Unicode
    speak = functools.partial(say, console)
    try:
        repository, news = Repository(ROOT), News(arguments.notify_url, speak)
        tag = Tag(repository, choose_tag(arguments, repository), speak)
        if arguments.command == "report":
            tag.look()
            if arguments.html:
                page.write_page(tag, PAGE)
                print(f"page: {PAGE.name}")
            else:
                report.show(tag, console, arguments.json, arguments.diff)
            sys.stdout.flush()
        elif arguments.command == "share":
            share(tag, arguments.share)
        else:
            night(tag, news, console, arguments)
        return 0
    except BrokenPipeError:  # whoever reads this, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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

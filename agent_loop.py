"""agent_loop.py - the loop: ask for an edit, commit it, train it, keep it or let it go, write it down.

  python agent_loop.py --demo                   a baseline and five experiments in a few minutes, on any machine
  python agent_loop.py                          go on until Ctrl-C, or until a limit (--hours, --max-experiments)
  python agent_loop.py report                   what has happened so far

The state is git, results.tsv and runs/, and nothing else, so the same command carries on wherever the last one ended:
a candidate is a commit under refs/autoresearch/<tag>/ before its first trial starts, a result is a file before it is a
row, a row is on disk before the branch moves. The branch autoresearch/<tag> only ever moves to a better train.py; no
other file, and no other branch, is touched.
"""

import argparse
import ast
import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import prepare
from prepare import Trouble

HERE = Path(__file__).resolve().parent
COLUMNS = ["commit", "val_bpb", "memory_gb", "status", "description"]  # those of karpathy/autoresearch, exactly
BASELINE_RUNS = 3  # they give the first estimate of the noise
MAX_RUNS = 3  # of one candidate
KEEP_AT, DISCARD_AT = 0.90, 0.50  # probability that the candidate is better than the best so far


THROW_AWAY = """
  git checkout {home}; git branch -D autoresearch/{tag}; rm -r runs/{tag} results.tsv
  git for-each-ref --format='delete %(refname)' refs/autoresearch/{tag}/ | git update-ref --stdin"""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A proposed experiment: a whole train.py, what it changes in one line, and why that should help."""

    source: str
    description: str
    hypothesis: str = ""


@dataclasses.dataclass
class Experiment:
    """One row of results.tsv, with the scores of its runs where runs/ still has them."""

    commit: str
    val_bpb: float
    memory_gb: float
    status: str  # keep, discard or crash
    description: str
    scores: list = dataclasses.field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# The keep rule: is the candidate better, given how much a score varies from run to run?


def pooled_sigma(groups):
    """Standard deviation of a single run, pooled over `groups` of scores of the same commit; nan without repeats."""
    repeated = [scores for scores in groups if len(scores) > 1]
    freedom = sum(len(scores) - 1 for scores in repeated)
    squares = sum((score - statistics.fmean(scores)) ** 2 for scores in repeated for score in scores)
    return math.sqrt(squares / freedom) if freedom else math.nan


def probability_better(candidate, best, sigma):
    """P(the candidate's true val_bpb is lower than the best's) from the scores of their runs and the noise of one run.

    Normal model: Phi(gap / (sigma * sqrt(1/n_candidate + 1/n_best))). Without an estimate of sigma, 0 or 1.
    """
    gap = statistics.fmean(best) - statistics.fmean(candidate)
    if not sigma > 0:
        return float(gap > 0)
    return statistics.NormalDist().cdf(gap / (sigma * math.sqrt(1 / len(candidate) + 1 / len(best))))


def decide(candidate, best, sigma, greedy=False):
    """(verdict, P(better)): 'keep', 'discard', or 'again' where one more run of the candidate is worth its time."""
    probability = probability_better(candidate, best, math.nan if greedy else sigma)
    if probability >= KEEP_AT:
        return "keep", probability
    if probability <= DISCARD_AT or len(candidate) >= MAX_RUNS:
        return "discard", probability
    return "again", probability


# ---------------------------------------------------------------------------------------------------------------------
# The lab book: results.tsv


def read_book(path):
    """Experiments of a results.tsv, in order; [] where there is none. Raises Trouble for a line that is not a row.

    A last line without its newline was torn by a power cut: it is left out, and its experiment will be finished again.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(f"{path} cannot be read ({error}); move it away to start a new one") from None
    experiments = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 and cells == COLUMNS:
            continue
        try:
            commit, val_bpb, memory_gb, status, description = cells
            experiment = Experiment(commit, float(val_bpb), float(memory_gb), status, description)
        except ValueError:
            experiment = None
        if number == 1 or experiment is None or status not in ("keep", "discard", "crash"):
            raise Trouble(
                f"{path.name}, line {number}: not a row of results ({line.strip()[:60]!r}); mend it, or move the file "
                "away: what was measured stays in runs/"
            )
        experiments.append(experiment)
    return experiments


def as_row(experiment):
    """An experiment as one line of results.tsv."""
    e = experiment
    return f"{e.commit}\t{e.val_bpb:.6f}\t{e.memory_gb:.1f}\t{e.status}\t{e.description}\n"


def one_line(text):
    """Free text as one line that fits a cell: no tabs, no control characters, at most 200 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200] or "no description"


# ---------------------------------------------------------------------------------------------------------------------
# The repository: commits that touch train.py alone, without a hand on the user's working tree


class Repository:
    """The git repository around this file, seen from the branch autoresearch/<tag>."""

    def __init__(self):
        try:
            import git

            self.repo = git.Repo(HERE, search_parent_directories=True)
            self.failure = git.GitCommandError
        except ImportError as error:
            raise Trouble(f"git does not work here ({one_line(str(error))}); install git and try again") from None
        except git.InvalidGitRepositoryError:
            start = "git init && git add . && git commit -m start"
            raise Trouble(f"{HERE} is not a git repository; run there: {start}") from None
        self.path = (HERE / "train.py").relative_to(self.repo.working_dir).as_posix()
        # The owner's hooks and signatures are for the owner's commits.
        settings = {"core.hooksPath": os.devnull, "commit.gpgSign": "false"}
        if not self.run("config", "--default", "", "user.email"):
            settings |= {"user.name": "autoresearch", "user.email": "autoresearch@localhost"}
        self.repo.git.update_environment(
            GIT_CONFIG_COUNT=str(len(settings)),
            **{f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(settings)},
            **{f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(settings.values())},
        )
        if not self.exists("HEAD"):
            raise Trouble("the repository has no commit yet; run: git add . && git commit -m start")

    def run(self, *arguments, **options):
        """Output of one git command; raises Trouble with git's own words."""
        try:
            return self.repo.git.execute(["git", *arguments], **options)
        except self.failure as error:
            raise Trouble(f"git {arguments[0]} failed: {one_line(error.stderr or str(error))}") from None

    def exists(self, revision):
        with contextlib.suppress(Trouble):
            return bool(self.run("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"))
        return False

    def short(self, revision):
        """Short hash of a commit, as results.tsv names it."""
        return self.run("rev-parse", "--short=7", f"{revision}^{{commit}}")

    def source(self, revision):
        """train.py of a commit, as bytes."""
        raw = {"stdout_as_string": False, "strip_newline_in_stdout": False}
        return self.run("cat-file", "blob", f"{revision}:{self.path}", **raw)

    def candidates(self, tag):
        """{short hash: full hash} of all commits under refs/autoresearch/<tag>/, oldest first."""
        form = "--format=%(refname:lstrip=3) %(objectname)"
        listed = self.run("for-each-ref", "--sort=creatordate", form, f"refs/autoresearch/{tag}/")
        return dict(line.split() for line in listed.splitlines())

    def remember(self, tag, commit):
        """Keep `commit` reachable for good and return its short hash."""
        short = self.short(commit)
        self.run("update-ref", f"refs/autoresearch/{tag}/{short}", commit)
        return short

    def commit(self, parent, source, message, scratch):
        """Commit `parent`'s files with train.py replaced by `source` (bytes); neither index nor files are touched."""
        scratch.write_bytes(source)
        blob = self.run("hash-object", "-w", "--no-filters", "--", str(scratch))
        index = {"GIT_INDEX_FILE": str(scratch.with_suffix(".index"))}
        self.run("read-tree", parent, env=index)
        self.run("update-index", "--cacheinfo", f"100644,{blob},{self.path}", env=index)
        tree = self.run("write-tree", env=index)
        return self.run("commit-tree", tree, "-p", parent, "-m", message)

    def is_checked_out(self, branch):
        return not self.repo.head.is_detached and self.repo.head.ref.path == f"refs/heads/{branch}"

    def close(self):
        self.repo.close()


# ---------------------------------------------------------------------------------------------------------------------
# The lab: one tag with its branch, its book and its evidence


class Lab:
    """One tag: its branch, its candidates (refs/autoresearch/<tag>/), runs/<tag>/, and results.tsv while current."""

    def __init__(self, repository, tag, console, greedy=False, sandbox=True):
        self.repository, self.tag, self.console = repository, tag, console
        self.greedy, self.sandbox = greedy, sandbox
        self.branch, self.folder, self.book = f"autoresearch/{tag}", HERE / "runs" / tag, HERE / "results.tsv"
        self.experiments = []

    def say(self, text):
        """One timestamped line on the console."""
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False, soft_wrap=True)

    # -- opening

    def open(self, task_name, budget):
        """Create the tag, or carry it on: settings, book, data, branch. Raises Trouble before anything is changed."""
        self.meta = self.read_meta()
        if known := self.meta:
            task = prepare.get_task(task_name or known["task"], budget or known["budget"])
            if (task.name, task.time_budget) != (known["task"], known["budget"]):
                raise Trouble(
                    f"tag {self.tag} runs task {known['task']} with {known['budget']:g} s; its scores would not "
                    f"compare with {task.name} at {task.time_budget:g} s: give another --tag"
                )
            self.check_prepare()
        else:
            task = prepare.get_task(task_name, budget)
        fresh = not self.repository.exists(f"refs/heads/{self.branch}")
        if fresh and self.repository.run("status", "--porcelain", "--", str(HERE / "train.py")):
            raise Trouble(
                "train.py has changes that are not committed; commit them (git commit -m mine train.py) or put them "
                "away (git stash), then start again"
            )
        if fresh and self.repository.candidates(self.tag):
            forget = THROW_AWAY.splitlines()[-1].strip().format(tag=self.tag)
            raise Trouble(f"an earlier tag {self.tag} has left commits; give another --tag, or forget them: {forget}")
        try:
            prepare.verify(task)
        except Trouble:
            if (prepare.cache_root() / task.dataset / "meta.json").exists():
                raise
            self.say(f"preparing the data of {task.name}, once")
            prepare.prepare(task)
        self.task = task
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fetch_book()
        if fresh:
            self.repository.run("branch", self.branch, "HEAD")
        if not self.repository.is_checked_out(self.branch):
            self.repository.run("checkout", "--quiet", self.branch)
        if not self.meta:
            rows = read_book(self.book)
            self.meta = {
                "tag": self.tag,
                "task": task.name,
                "budget": task.time_budget,
                "start": rows[0].commit if rows else self.repository.remember(self.tag, self.branch),
                "sha256": prepare.fingerprints(task),
                "created": datetime.datetime.now().isoformat(timespec="seconds"),
            }
            prepare.write_atomically(self.folder / "meta.json", json.dumps(self.meta, indent=1) + "\n")
        self.load()
        if self.experiments:
            self.settle()

    def look(self):
        """Read what the tag has found so far, changing nothing."""
        self.meta = self.read_meta()
        if self.owner() not in (None, self.tag):
            self.book = self.folder / "results.tsv"
        self.load()

    def read_meta(self):
        """runs/<tag>/meta.json, which fixes what the tag's scores mean; None for a new tag."""
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            return {key: meta[key] for key in ("task", "budget", "start", "sha256")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Trouble(f"cannot read {self.folder}/meta.json ({error}); delete it to set the tag up again") from None

    def load(self):
        """Read the book and the scores of its experiments."""
        self.experiments = read_book(self.book)
        for experiment in self.experiments:
            results = [self.result(experiment.commit, run) for run in range(MAX_RUNS if self.meta else 0)]
            experiment.scores = [result["val_bpb"] for result in results if result and result["outcome"] == "ok"]

    def check_prepare(self):
        """Raise Trouble if prepare.py is no longer the one that this tag's scores come from."""
        if prepare.sha256(HERE / "prepare.py") != self.meta["sha256"]["prepare.py"]:
            raise Trouble(
                f"prepare.py has changed since tag {self.tag} was started, so scores would not compare; restore it "
                f"(git checkout {self.meta['start']} -- prepare.py) or start another --tag"
            )

    def owner(self):
        """The tag that results.tsv belongs to, or None where nobody knows."""
        with contextlib.suppress(OSError):
            return (HERE / "runs" / "current").read_text().strip()

    def fetch_book(self):
        """Make results.tsv this tag's book: file another tag's away under runs/, and bring ours back."""
        owner, rows = self.owner(), read_book(self.book)
        if not owner and rows and {row.commit for row in rows} <= set(self.repository.candidates(self.tag)):
            owner = self.tag
        if self.book.exists() and owner != self.tag:
            home = HERE / "runs" / (owner or time.strftime("unknown-%Y%m%d-%H%M%S")) / "results.tsv"
            home.parent.mkdir(parents=True, exist_ok=True)
            self.book.replace(home)
            self.say(f"results.tsv belonged to another tag; it is now {home.relative_to(HERE)}")
        prepare.write_atomically(HERE / "runs" / "current", self.tag + "\n")
        if not self.book.exists() and (self.folder / "results.tsv").exists():
            (self.folder / "results.tsv").replace(self.book)

    # -- what is known

    @property
    def best(self):
        return next(experiment for experiment in reversed(self.experiments) if experiment.status == "keep")

    def result(self, commit, run):
        """result.json of a finished run of `commit`, or None. Raises Trouble if the exam was not this tag's."""
        try:
            result = json.loads((self.folder / commit / str(run) / "result.json").read_text())
        except (OSError, ValueError):
            return None
        for name, digest in self.meta["sha256"].items():
            if result["sha256"].get(name) != digest:
                raise Trouble(f"{self.folder / commit} was scored by another exam: {name} has changed since")
        return result

    def sigma(self, *more):
        return pooled_sigma([*(experiment.scores for experiment in self.experiments), *more])

    def has_tried(self, source):
        """Whether a candidate of this tag had exactly this train.py (bytes)."""
        return any(self.source(commit) == source for commit in self.repository.candidates(self.tag))

    def source(self, commit):
        """train.py of a candidate, as bytes; from runs/ where it is still there, since asking git takes longer."""
        with contextlib.suppress(OSError):
            return (self.folder / commit / "train.py").read_bytes()
        return self.repository.source(f"refs/autoresearch/{self.tag}/{commit}")

    # -- one experiment

    def commit(self, draft):
        """Commit a draft on top of the branch, keep it reachable, and return its short hash."""
        message = f"{draft.description}\n\n{draft.hypothesis}".strip()
        head = self.repository.run("rev-parse", self.branch)
        commit = self.repository.commit(head, draft.source.encode(), message, self.folder / "candidate.py")
        return self.repository.remember(self.tag, commit)

    def trial(self, commit, run):
        """Run and score `commit` with seed `run`, or return the result that an earlier start has left."""
        if finished := self.result(commit, run):
            return finished
        out = self.folder / commit / str(run)
        out.mkdir(parents=True, exist_ok=True)
        train_py = self.folder / commit / "train.py"
        train_py.write_bytes(self.repository.source(f"refs/autoresearch/{self.tag}/{commit}"))
        self.check_prepare()
        command = [sys.executable, str(HERE / "prepare.py"), "trial", str(train_py), "--out", str(out)]
        if self.experiments:
            command += ["--beat", repr(self.best.val_bpb)]
        command += ["--task", self.task.name, "--budget", repr(self.task.time_budget), "--seed", str(run)]
        with open(out / "proctor.log", "w+") as log:
            proctor = subprocess.Popen(
                command + ["--no-sandbox"] * (not self.sandbox),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the loop alone, which then ends the trial in good order
                preexec_fn=lambda: prepare.prctl(prepare.PR_SET_PDEATHSIG, signal.SIGTERM),
            )
            try:
                self.watch(proctor, commit, run, out / "metrics.jsonl")
            finally:
                proctor.terminate()
                proctor.wait()
            log.seek(0)
            said = log.read().strip().splitlines()
        if result := self.result(commit, run):
            return result
        last = said[-1] if said else "it was killed"
        if proctor.returncode == 2:
            raise Trouble(f"the trial of {commit} could not be held: {last}")
        return {"outcome": "crash", "reason": f"the trial broke off: {last}"}  # whatever did it, the night goes on

    def watch(self, proctor, commit, run, metrics):
        """Wait for a trial; on a terminal, show how far it is."""
        with self.console.status(f"{commit} run {run + 1}: starting") as status:
            while proctor.poll() is None:
                time.sleep(0.2)
                with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
                    last = json.loads(metrics.read_text().splitlines()[-1])
                    share = min(1.0, last["seconds"] / self.task.time_budget)
                    numbers = f"step {last['step']:.0f}  loss {last['loss']:.3f}"
                    status.update(f"{commit} run {run + 1}: {share:4.0%}  {numbers}")

    def measure(self, commit, description):
        """Run `commit` as often as the keep rule asks and return its finished Experiment, with the verdict's reason."""
        scores, memory, baseline = [], 0.0, not self.experiments
        while True:
            result = self.trial(commit, len(scores))
            if result["outcome"] != "ok" and baseline:
                shutil.rmtree(self.folder / commit / str(len(scores)))  # so that the next start tries again
                raise Trouble(
                    f"the baseline does not run: {result['reason']}; mend train.py or the machine, start again"
                )
            if result["outcome"] != "ok":
                return Experiment(commit, 0.0, 0.0, "crash", description), result["reason"]
            scores.append(result["val_bpb"])
            memory = max(memory, (result.get("peak_vram_mb") or result["peak_rss_mb"]) / 1024)
            verdict, reason = "again", ""
            if baseline and len(scores) == (1 if self.greedy else BASELINE_RUNS):
                verdict, reason = "keep", f"sigma {pooled_sigma([scores]):.6f}"
            elif not baseline:
                best = self.best.scores or [self.best.val_bpb]
                verdict, probability = decide(scores, best, self.sigma(scores), self.greedy)
                reason = f"P(better) {probability:.0%}"
            if verdict != "again":
                reason = f"{reason}, {len(scores)} run{'s' * (len(scores) > 1)}"
                return Experiment(commit, statistics.fmean(scores), memory, verdict, description, scores), reason

    def record(self, experiment):
        """Append the row, on disk before anything else happens, and move the branch if the experiment is kept."""
        with open(self.book, "a", encoding="utf-8") as file:
            file.write(as_row(experiment) if file.tell() else "\t".join(COLUMNS) + "\n" + as_row(experiment))
            file.flush()
            os.fsync(file.fileno())
        self.experiments.append(experiment)
        self.settle()
        for archive in self.folder.glob("*/*/model.safetensors"):  # only the best model is worth its space
            if archive.parent.parent.name != self.best.commit or archive.parent.name != "0":
                archive.unlink()

    def settle(self):
        """Bring the branch and the working tree to the best train.py; other files and staged changes stay as they are.

        A train.py that this tag has never tried is somebody's work: committed to the branch it awaits its trial, in the
        working tree it is saved before it is replaced.
        """
        repository, ref, best = self.repository, f"refs/heads/{self.branch}", self.source(self.best.commit)
        head = repository.run("rev-parse", ref)
        if repository.source(head) != best:
            if not self.has_tried(repository.source(head)):
                return
            candidate = repository.candidates(self.tag)[self.best.commit]
            if repository.run("log", "-1", "--format=%P", candidate) != head:  # somebody has committed meanwhile
                message = f"{self.best.description}\n\nThe train.py of {self.best.commit}."
                candidate = repository.commit(head, best, message, self.folder / "candidate.py")
            repository.run("update-ref", ref, candidate, head)
        if not repository.is_checked_out(self.branch):
            return
        train_py = HERE / "train.py"
        if train_py.exists() and not self.has_tried(here := train_py.read_bytes()):
            saved = self.folder / time.strftime("train-%Y%m%d-%H%M%S.py")
            saved.write_bytes(here)
            self.say(f"[yellow]train.py had changes of its own; they are saved in {saved.relative_to(HERE)}[/]")
        if repository.run("status", "--porcelain", "--", str(train_py)):
            repository.run("checkout", "--quiet", ref, "--", str(train_py))

    def next_candidate(self, researcher):
        """(short hash, description) of the next experiment: unfinished, the owner's own commit, or a new draft."""
        if not self.experiments:
            return self.meta["start"], "baseline"
        done = {experiment.commit for experiment in self.experiments}
        candidates = self.repository.candidates(self.tag)
        for commit, full in candidates.items():
            if commit not in done:
                return commit, one_line(self.repository.run("log", "-1", "--format=%s", full))
        head = self.repository.run("rev-parse", f"refs/heads/{self.branch}")
        if not self.has_tried(self.repository.source(head)):
            subject = one_line(self.repository.run("log", "-1", "--format=%s", head))
            return self.repository.remember(self.tag, head), f"by hand: {subject}"
        draft = researcher.draft(self)
        return self.commit(draft), draft.description

    def run(self, researcher, limit_reached):
        """Hold one experiment after the other until limit_reached(self) says why to stop; returns that reason."""
        while not (reason := limit_reached(self)):
            commit, description = self.next_candidate(researcher)
            self.say(f"[bold]{commit}[/] {escape(description)}")
            before = self.best.val_bpb if self.experiments else None
            experiment, why = self.measure(commit, description)
            self.record(experiment)
            colour = {"keep": "green", "discard": "yellow", "crash": "red"}[experiment.status]
            score = "" if experiment.status == "crash" else f"{experiment.val_bpb:.6f} "
            change = f"({experiment.val_bpb - before:+.6f}) " if before and score else ""
            self.say(f"[bold]{commit}[/] {score}{change}[{colour}]{experiment.status}[/]: {escape(one_line(why))}")
        return reason


# ---------------------------------------------------------------------------------------------------------------------
# The built-in researcher: local search over the constants of train.py


class Search:
    """Changes one constant of train.py, sometimes two, by a sensible step; needs neither network nor key.

    It follows a change that was kept one step further, and otherwise draws among the upper-case constants, the ones
    that usually decide a small training run (learning rates, sizes, schedules) more often.
    """

    IMPORTANT = re.compile(r"LR|STEPS|BATCH|PARAM|DEPTH|MOMENTUM|COOLDOWN|RATIO")

    def draft(self, lab):
        """The next Draft against the best train.py of `lab`. Raises Trouble when every step has been tried."""
        source = lab.source(lab.best.commit).decode()
        constants = find_constants(source)
        chance = random.Random(f"{lab.tag} {len(lab.experiments)}")
        for step in [*self.followed(lab, constants), *self.drawn(constants, chance)]:
            changed = set_constants(source, constants, step)
            if not lab.has_tried(changed.encode()):
                change = ", ".join(f"{name} {constants[name].text} -> {new}" for name, new in step.items())
                return Draft(changed, change, "Local search: a small step that has not been tried from here.")
        raise Trouble("the search has tried every step it knows from the best train.py; edit train.py, or ask a model")

    def followed(self, lab, constants):
        """The last kept change once more, from where it led."""
        change = re.fullmatch(r"([A-Z]\w*) (\S+) -> (\S+)", lab.best.description)
        if change and change[1] in constants:
            name, old, new = change.groups()
            with contextlib.suppress(ValueError, ZeroDivisionError):
                rising = float(new) > float(old)
                yield from (
                    {name: step} for step in steps(constants[name].value) if (float(step) > float(new)) == rising
                )

    def drawn(self, constants, chance):
        """Single steps and pairs of steps in random order: bold ones first, since noise drowns small effects."""
        names = [name for name, constant in constants.items() if steps(constant.value)]
        weights = [4 if self.IMPORTANT.search(name) else 1 for name in names]
        for attempt in range(5000 if names else 0):
            chosen = dict.fromkeys(chance.choices(names, weights, k=chance.choice((1, 1, 1, 2))))
            reach = 2 if attempt < 500 else None
            yield {name: chance.choice(steps(constants[name].value)[:reach]) for name in chosen}


@dataclasses.dataclass(frozen=True)
class Constant:
    """An upper-case constant of train.py: value, source text, and place (line from 0, columns in bytes)."""

    value: object
    text: str
    line: int
    start: int
    end: int


def find_constants(source):
    """{name: Constant} of the top-level assignments NAME = literal, for numbers and strings on one line."""
    lines, found = source.encode().splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            with contextlib.suppress(ValueError):
                value, place = ast.literal_eval(node.value), node.value
                if type(value) in (int, float, str) and place.lineno == place.end_lineno:
                    text = lines[place.lineno - 1][place.col_offset : place.end_col_offset].decode()
                    found[node.targets[0].id] = Constant(
                        value, text, place.lineno - 1, place.col_offset, place.end_col_offset
                    )
    return found


def set_constants(source, constants, new):
    """`source` with the constants of `new`, {name: text}, set."""
    lines = source.encode().splitlines(keepends=True)
    for name, text in new.items():
        constant = constants[name]
        line = lines[constant.line]
        lines[constant.line] = line[: constant.start] + text.encode() + line[constant.end :]
    return b"".join(lines).decode()


def steps(value):
    """Neighbours of a constant's value worth trying, as source text, the bold ones first; [] for one with none."""
    if type(value) is int and value > 0:
        near = [value // 2, value * 2, round(value * 0.7), round(value * 1.4)]
        return [str(step) for step in dict.fromkeys(near) if step not in (0, value)]
    if type(value) is float and 0.5 < value < 1:  # a decay or a share: what counts is its distance from one
        return [f"{1 - (1 - value) * factor:.4g}" for factor in (0.5, 2.0, 0.7, 1.4)]
    if type(value) is float and value > 0:
        return [f"{value * factor:.3g}" for factor in (0.5, 2.0, 0.7, 1.4)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(lab, console):
    """Print what a tag has found so far: counts, from baseline to best, and each kept change with its gain."""
    from rich.table import Table

    experiments = lab.experiments
    if not experiments:
        console.print(f"tag {lab.tag} has no results yet")
        return
    counts = {status: sum(e.status == status for e in experiments) for status in ("keep", "discard", "crash")}
    console.print(
        f"[bold]{lab.tag}[/]: {len(experiments) - 1} experiments after the baseline: "
        f"{counts['keep'] - 1} kept, {counts['discard']} discarded, {counts['crash']} crashed"
    )
    table = Table("commit", "val_bpb", "gain", "kept change")
    previous = None
    for experiment in experiments:
        if experiment.status == "keep":
            gain = "" if previous is None else f"{previous - experiment.val_bpb:.6f}"
            table.add_row(experiment.commit, f"{experiment.val_bpb:.6f}", gain, escape(experiment.description))
            previous = experiment.val_bpb
    console.print(table)
    first, best, sigma = experiments[0], lab.best, lab.sigma()
    gain = first.val_bpb - best.val_bpb
    console.print(
        f"baseline {first.val_bpb:.6f} -> best {best.val_bpb:.6f}: {gain:.6f} lower ({gain / first.val_bpb:.2%})"
        + (f"; one run varies by {sigma:.6f} (standard deviation)" if sigma > 0 else "")
    )


def escape(text):
    """Text of unknown origin, safe to print among rich's markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@contextlib.contextmanager
def only_loop(repository):
    """Hold the lock that admits one loop per working tree; raises Trouble with the pid of the one that has it."""
    path = Path(repository.repo.git_dir) / "autoresearch.lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Trouble(f"another loop is running here (process {file.read().strip()}); stop it first") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def choose_tag(arguments, repository):
    """The tag asked for, else that of the checked-out autoresearch branch, else today's date."""
    tag = arguments.tag or ("demo" if arguments.demo else None)
    if not tag and not repository.repo.head.is_detached:
        tag = repository.repo.head.ref.path.partition("refs/heads/autoresearch/")[2]
    tag = tag or time.strftime("%b%d").lower()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise Trouble(f"{tag!r} cannot be a tag; use letters, digits, dots, dashes")
    return tag


def limits(arguments):
    """limit_reached(lab) for the limits of this start: the reason to stop, or None."""
    started, most = time.monotonic(), arguments.max_experiments

    def limit_reached(lab):
        if most is not None and len(lab.experiments) > most:
            return f"tag {lab.tag} holds its {most} experiments"
        if arguments.hours is not None and time.monotonic() - started > 3600 * arguments.hours:
            return f"{arguments.hours:g} hours are over"
        return None

    return limit_reached


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Improve train.py by experiments, overnight: edit, commit, train, keep or let go, write down.",
        epilog="Started again, the same command carries on. First time here? Try: python agent_loop.py --demo",
    )
    parser.add_argument("command", nargs="?", choices=("report",), help="print what a tag has found so far, and end")
    parser.add_argument("--demo", action="store_true", help="a baseline and five quick experiments; needs nothing")
    parser.add_argument("--tag", metavar="T", help="name of the run (default: the checked-out branch's, or today)")
    tasks = f"one of: {', '.join(prepare.TASKS)} (default: {prepare.TASK.name})"
    parser.add_argument("--task", metavar="NAME", help=tasks)
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of training in a run, instead of the task's own"
    )
    parser.add_argument("--researcher", choices=("search",), default="search", help="who proposes the edits")
    parser.add_argument("--hours", type=float, metavar="H", help="start no experiment after H hours")
    parser.add_argument("--max-experiments", type=int, metavar="N", help="end when the tag holds N and its baseline")
    parser.add_argument("--greedy", action="store_true", help="keep any lower score after a single run")
    parser.add_argument("--no-sandbox", action="store_true", help="run train.py unconfined, if you trust its author")
    arguments = parser.parse_args()
    if arguments.demo:
        arguments.task = arguments.task or "demo"
        arguments.max_experiments = 5 if arguments.max_experiments is None else arguments.max_experiments
    return arguments


def main():
    arguments = parse_arguments()
    from rich.console import Console

    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        repository = Repository()
        lab = Lab(repository, choose_tag(arguments, repository), console, arguments.greedy, not arguments.no_sandbox)
        if arguments.command == "report":
            lab.look()
            report(lab, console)
            return 0
        with only_loop(repository):
            home = repository.run("rev-parse", "--abbrev-ref", "HEAD")
            lab.open(arguments.task, arguments.budget)
            level = prepare.sandbox_level() if lab.sandbox else "none"
            lab.say(f"tag {lab.tag}: task {lab.task.name}, {lab.task.time_budget:g} s a run, sandbox: {level}")
            if level == "none":
                lab.say("[red]NO SANDBOX: train.py can read and write all that you can[/]")
            reason = lab.run(Search(), limits(arguments))
            lab.say(f"the end: {reason}")
        report(lab, console)
        if arguments.demo:
            home = "-" if home == lab.branch else home
            print(f"To throw the demo away:{THROW_AWAY.format(tag=lab.tag, home=home)}")
        return 0
    except Trouble as trouble:
        print(f"agent_loop.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command carries on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

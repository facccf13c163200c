"""One tag: its branch, its candidates (refs/autoresearch/<tag>/), its evidence (runs/<tag>/), and its book.

results.tsv is the book of the tag that ran last; those of the others wait in runs/<tag>/.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path

import prepare
from exam.files import ROOT, remove, write_atomically
from exam.fingerprints import FROZEN, changed_since, fingerprints, verify
from exam.result import Result
from lab.book import Experiment, add_row, best_of, read_book, title
from lab.conditions import effects, fair
from lab.profile import NO_USE
from lab.repository import Repository
from lab.researcher import Draft, Failure, Say, digest
from prepare import Task, Trouble

THROW_AWAY = """
  git checkout {home}; git branch -D autoresearch/{tag}; rm -r runs/{tag} results.tsv
  git for-each-ref --format='delete %(refname)' refs/autoresearch/{tag}/ | git update-ref --stdin"""
SETTINGS = ("task", "budget", "start", "flops", "sha256")  # in runs/<tag>/meta.json: they fix what its scores mean


def book_owner():
    """The tag that results.tsv belongs to, or None where nobody knows."""
    with contextlib.suppress(OSError):
        return (ROOT / "runs" / "current").read_text().strip()


class Tag:
    """A tag's state is on disk: what is here was read from there, or is written there before the next step."""

    def __init__(self, repository: Repository, name: str, say: Say):
        self.repository, self.name, self.say = repository, name, say
        self.branch, self.folder, self.book = f"autoresearch/{name}", ROOT / "runs" / name, ROOT / "results.tsv"
        self.task: Task | None = None
        self.experiments: list[Experiment] = []  # with the scores that their runs would have under the same conditions
        self.digests: dict[str, str] = {}  # of the train.py of finished candidates
        self.settings = self._read_settings()  # {} for a new tag

    # -- opening

    def check(self, task_name: str | None, budget: float | None) -> Task:
        """The task of the tag, new or to be carried on. Raises Trouble for what its owner has to mend first."""
        known = self.settings = self._read_settings()  # another loop may have made them meanwhile
        task = prepare.get_task(task_name or known.get("task"), budget or known.get("budget"))
        if known and (task.name, task.time_budget) != (known["task"], known["budget"]):
            raise Trouble(
                f"tag {self.name} runs task {known['task']} with {known['budget']:g} s; its scores would not "
                f"compare with {task.name} at {task.time_budget:g} s: give another --tag"
            )
        if known:
            self.check_exam()
        if self.repository.exists(f"refs/heads/{self.branch}"):
            self._check_programs()
            return task
        if self._lost_branch():
            return task
        if self.repository.run("status", "--porcelain", "--", str(ROOT / "train.py")):
            raise Trouble(
                "train.py has changes that are not committed; commit them (git commit -m mine train.py) or put them "
                "away (git stash), then start again"
            )
        if self.repository.candidates(self.name):
            forget = THROW_AWAY.splitlines()[-1].strip().format(tag=self.name)
            raise Trouble(f"an earlier tag {self.name} has left commits; give another --tag, or forget them: {forget}")
        return task

    def open(self, task: Task, flops: float | None, source: str | None = None):
        """Create the tag, or carry it on: book, branch, settings. `task` is of check(), and its data are prepared.

        flops: machine_flops() for a new tag; a later measurement must not change the size of the same train.py.
        source: the train.py that a new tag starts from, instead of that of HEAD.
        """
        verify(task)
        self.task = task
        lost = self._lost_branch()
        self._fetch_book()
        if not self.repository.exists(f"refs/heads/{self.branch}"):
            self.repository.run("branch", self.branch, lost or self._begin(source))
        if self.repository.branch() != self.branch:
            self.repository.run("switch", "--quiet", self.branch)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.settings:
            rows = read_book(self.book)
            start = rows[0].commit if rows else self.repository.remember(self.name, self.branch)
            values = task.name, task.time_budget, start, flops, fingerprints(task)
            self.settings = dict(zip(SETTINGS, values))
            write_atomically(self.folder / "meta.json", json.dumps(self.settings, indent=1) + "\n")
        for left in (left for name in NO_USE for left in self.folder.glob(f"profiles/*/run/{name}")):
            remove(left)  # of one that was cut off
        self._load()
        kept = {e.commit for e in self.experiments if e.status == "keep"}
        if self.experiments and self.settings["start"] not in kept:
            aside = self._put_aside(self.book, self.book.read_bytes())
            self.book.unlink()
            self.say(f"results.tsv had lost its baseline; it is now {aside}, and is written anew from runs/", "yellow")
            self._load()
        if self.experiments:
            self.settle()
        # So that a report can tell waiting from not running.
        with contextlib.suppress(OSError), open(self.folder / "starts", "a") as file:
            file.write(f"{time.time():.0f}\n")

    def starts(self) -> list[float]:
        """When the loop was started, time.time(), each time."""
        with contextlib.suppress(OSError, ValueError):
            return [float(line) for line in (self.folder / "starts").read_text().split()]
        return []

    def _begin(self, source):
        """The commit that a new tag starts from: HEAD, or one that has another train.py."""
        head = self.repository.run("rev-parse", "HEAD")
        if source is None:
            return head
        scratch = Path(self.repository.repo.git_dir) / "autoresearch-start.py"
        return self.repository.commit(head, source.encode(), f"where {self.name} starts", scratch)

    def look(self):
        """Read what the tag has found so far, changing nothing."""
        if book_owner() not in (None, self.name):
            self.book = self.folder / "results.tsv"
        self._load()

    def check_exam(self):
        """Raise Trouble if the exam is no longer the one that this tag's scores come from."""
        known = self.settings["sha256"]
        if changed := changed_since(known):
            restore = f"restore what was (git checkout {self.settings['start']} -- {' '.join(changed)}) or "
            raise Trouble(
                f"{' and '.join(changed)} {'have' if changed[1:] else 'has'} changed since tag {self.name} was "
                f"started, so scores would not compare; {restore * set(FROZEN).issubset(known)}start another --tag"
            )

    def _check_programs(self):
        """Raise Trouble where to check the branch out would put other programs in the place of those that run."""
        names = [str(ROOT / name) for name in ("agent_loop.py", "prepare.py", "exam", "lab")]
        if changed := self.repository.run("diff", "--name-only", "HEAD", self.branch, "--", *names):
            named = ", ".join(changed.splitlines()[:3])
            raise Trouble(
                f"on {self.branch} these programs are others than here: {named}; run: git switch {self.branch}, "
                "and start again with those, or merge them, or give another --tag"
            )

    def _read_settings(self):
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            return {name: meta[name] for name in SETTINGS}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Trouble(f"cannot read {self.folder}/meta.json ({error}); delete it to set the tag up again") from None

    def _lost_branch(self):
        """The commit that the branch of a known tag should be at where somebody has deleted it; None if not."""
        if not self.settings or book_owner() != self.name or self.repository.exists(f"refs/heads/{self.branch}"):
            return None
        best = best_of(read_book(self.book))
        return best and f"refs/autoresearch/{self.name}/{best.commit}"

    def _load(self):
        """Read the book and the runs of its experiments."""
        self.experiments = read_book(self.book)
        bases = self._bases()
        for place, experiment in enumerate(self.experiments):
            for result in self.results(experiment.commit):
                if result.outcome == "ok":
                    experiment = experiment.after(result)
            self.experiments[place] = dataclasses.replace(experiment, base=bases.get(experiment.commit, ""))
        self._make_fair()

    def _make_fair(self):
        self.experiments[:] = fair(self.experiments, effects(self.experiments))

    def _bases(self):
        """{commit: that of the kept experiment whose train.py it changes}, of those that git knows."""
        full, parents = self.repository.candidates(self.name), self.repository.parents(self.name)
        parents.pop(self.settings.get("start"), None)  # which may have no train.py yet
        kept = [full[e.commit] for e in self.experiments if e.status == "keep" and e.commit in full]
        versions = self.repository.versions([*kept, *set(parents.values())])
        known = {versions.get(each): short for short, each in full.items() if each in kept}
        return {short: known.get(versions.get(parent), "") for short, parent in parents.items()}

    def _put_aside(self, path, content):
        """Save what the user has in a file to runs/<tag>/, under a name that nothing else has there; returns where."""
        names = (self.folder / f"{path.stem}-{number}{path.suffix}" for number in itertools.count())
        kept = next(name for name in names if not name.exists() or name.read_bytes() == content)
        kept.write_bytes(content)
        return kept.relative_to(ROOT)

    def _fetch_book(self):
        """Make results.tsv this tag's book: file another tag's away under runs/, and bring ours back."""
        owner, rows = book_owner(), read_book(self.book)
        if not owner and rows and {row.commit for row in rows} <= set(self.repository.candidates(self.name)):
            owner = self.name
        if self.book.exists() and owner != self.name:
            home = ROOT / "runs" / (owner or time.strftime("unknown-%Y%m%d-%H%M%S")) / "results.tsv"
            home.parent.mkdir(parents=True, exist_ok=True)
            self.book.replace(home)
            self.say(f"results.tsv belonged to another tag; it is now {home.relative_to(ROOT)}")
        (ROOT / "runs").mkdir(exist_ok=True)
        write_atomically(ROOT / "runs" / "current", self.name + "\n")
        if not self.book.exists() and (self.folder / "results.tsv").exists():
            (self.folder / "results.tsv").replace(self.book)

    # -- what is known

    @property
    def best(self) -> Experiment | None:
        """The last experiment that was kept; None before the baseline."""
        return best_of(self.experiments)

    def path(self, commit, run) -> Path:
        """The folder of one run of a candidate."""
        return self.folder / commit / str(run)

    def profile(self, commit) -> Path:
        """The folder of the run that tells where the time of a candidate goes, apart from its runs."""
        return self.folder / "profiles" / commit / "run"

    def result(self, commit, run) -> Result | None:
        """Of a finished run of `commit`; None where it is lost or damaged, or did not come about: it is held again.

        Raises Trouble if the exam was not this tag's.
        """
        result = Result.read(self.path(commit, run) / "result.json")
        if not result or not result.counted:
            return None
        for name, known in self.settings["sha256"].items():
            if result.sha256.get(name) != known:
                raise Trouble(f"{self.folder / commit} was scored by another exam: {name} has changed since")
        return result

    def results(self, commit) -> list[Result]:
        """Of all finished runs of `commit`, in order."""
        runs = itertools.count() if self.settings else ()
        return list(itertools.takewhile(bool, (self.result(commit, run) for run in runs)))

    def failure(self, commit) -> Failure:
        """Of the last run of a crashed `commit`."""
        runs, printed = len(self.results(commit)), b""
        for run in (runs, runs - 1):  # the last one may have been lost
            result = Result.read(self.path(commit, run) / "result.json")
            if result and result.outcome != "ok":
                with contextlib.suppress(OSError):
                    printed = (self.path(commit, run) / "log.txt").read_bytes()[-3000:]
                return Failure(commit, result.outcome, result.reason or "", printed.decode(errors="replace"))
        return Failure(commit, "crash", "no record is left")

    def source(self, commit) -> bytes:
        """train.py of a candidate; from runs/ where it is still there, since asking git takes longer."""
        with contextlib.suppress(OSError):
            return (self.folder / commit / "train.py").read_bytes()
        return self.repository.source(f"refs/autoresearch/{self.name}/{commit}")

    def text(self, commit) -> str:
        """train.py of a candidate as text. Raises Trouble where it is not UTF-8."""
        try:
            return self.source(commit).decode()
        except UnicodeDecodeError:
            raise Trouble(
                f"the train.py of {commit} is not UTF-8 text; save it as that, commit it, start again"
            ) from None

    def tried(self) -> frozenset[str]:
        """digest() of the train.py of every candidate."""
        finished = {experiment.commit for experiment in self.experiments}
        candidates = self.repository.candidates(self.name)
        fresh = {commit: digest(self.source(commit)) for commit in candidates if commit not in self.digests}
        # What a power cut has left of the file of an unfinished one is written anew for its trial.
        self.digests |= {commit: known for commit, known in fresh.items() if commit in finished}
        return frozenset([*self.digests.values(), *fresh.values()])

    # -- one experiment

    def candidate(self, taken=()) -> tuple[str, Draft] | None:
        """(short hash, draft) of what awaits its trial: unfinished, or the owner's own commit; None for nothing.

        taken: short hashes of those whose trial is under way.
        """
        if not self.experiments:
            return self.settings["start"], Draft("", "baseline")
        done = {*taken, *(experiment.commit for experiment in self.experiments)}
        for commit in self.repository.candidates(self.name):
            if commit not in done:
                return commit, self._draft(commit)
        head = self.repository.run("rev-parse", f"refs/heads/{self.branch}")
        if digest(self.repository.source(head)) in self.tried():
            return None
        commit = self.repository.remember(self.name, head)
        return commit, self._draft(commit)

    def drafts(self) -> dict[str, Draft]:
        """{short hash: the draft that it was made from, without its source} of all candidates."""
        return {c: Draft.from_message(message) for c, message in self.repository.messages(self.name).items()}

    def _draft(self, commit):
        """The draft that a candidate was made from, as its commit tells it."""
        draft = Draft.from_message(self.repository.message(f"refs/autoresearch/{self.name}/{commit}"))
        return draft if draft.origin else Draft("", title(f"by hand: {draft.description}"))

    def add(self, draft: Draft) -> str:
        """Commit a draft, a change of the best train.py, as a candidate; returns its short hash."""
        parent = self.repository.run("rev-parse", self.branch)
        if self.repository.source(parent) != self.source(self.best.commit):  # the owner has committed meanwhile
            parent = self.repository.candidates(self.name)[self.best.commit]
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.repository.commit(parent, draft.source.encode(), draft.message, self.folder / "candidate.py")
        return self.repository.remember(self.name, made)

    def base(self, commit) -> Experiment | None:
        """The experiment whose train.py a candidate changes; None where that was none of this tag's."""
        parent, known = None, {e.commit: e for e in self.experiments}
        if commit == self.settings["start"]:
            return None
        if commit in known and known[commit].base in known:
            return known[known[commit].base]
        with contextlib.suppress(Trouble):  # an owner's first commit has no parent
            parent = self.repository.source(f"refs/autoresearch/{self.name}/{commit}^")
        return next((e for e in reversed(self.experiments) if self.source(e.commit) == parent), None)

    def lineage(self, commit):
        """The experiments that a candidate goes back to, its base first."""
        while base := self.base(commit):
            yield base
            commit = base.commit

    def record(self, experiment: Experiment, running: frozenset[Path] = frozenset()):
        """Write the row, on disk before anything else happens, and move the branch if the experiment is kept.

        running: path() of the trials under way, whose folders stay as they are.
        """
        add_row(self.book, self.experiments, experiment)
        base = self.base(experiment.commit)
        self.experiments.append(
            dataclasses.replace(experiment, base=base.commit if base and base.status == "keep" else "")
        )
        self._make_fair()
        self.settle()
        self._clear_up(running)

    def _clear_up(self, running):
        """Remove what finished experiments have left that is of no more use."""
        of_use = {"model.safetensors": self.best.commit, "compiled": self.settings["start"]}  # of their first runs
        done = {experiment.commit for experiment in self.experiments}
        for left in self.folder.glob("*/*/*"):
            if left.parent in running or left.parent.parent.name not in done:
                continue
            lost = left.name in of_use and left.parent != self.path(of_use[left.name], 0)
            if lost or left.name == "room":  # a room is of a trial that broke off
                remove(left)

    def ran_again(self, commit, result: Result):
        """Count one more finished run of an experiment."""
        place = next(place for place, e in enumerate(self.experiments) if e.commit == commit)
        self.experiments[place] = self.experiments[place].after(result)
        self._make_fair()

    def settle(self):
        """Bring the branch and the working tree to the best train.py; other files and staged changes stay as they are.

        A train.py that this tag has never tried is somebody's work: committed to the branch it awaits its trial, in the
        working tree it is saved before it is replaced.
        """
        repository, ref, best = self.repository, f"refs/heads/{self.branch}", self.source(self.best.commit)
        head = repository.run("rev-parse", ref)
        if repository.source(head) != best:
            if digest(repository.source(head)) not in self.tried():
                return
            candidate = repository.candidates(self.name)[self.best.commit]
            if repository.run("log", "-1", "--format=%P", candidate) != head:  # somebody has committed meanwhile
                message = f"back to {self.best.commit}: {self.best.description}\n\nWhat came after it was not better."
                candidate = repository.commit(head, best, message, self.folder / "candidate.py")
            repository.run("update-ref", ref, candidate, head)
        if repository.branch() == self.branch:
            self._settle_files(ref)

    def _settle_files(self, ref):
        """Bring train.py in index and working tree to that of `ref`, and save what else stands there."""
        train_py = ROOT / "train.py"
        found = [train_py.read_bytes()] if train_py.exists() else []
        with contextlib.suppress(Trouble):
            found.append(self.repository.source(""))  # the index, whose train.py may be staged
        for content in dict.fromkeys(content.replace(b"\r\n", b"\n") for content in found):
            if digest(content) not in self.tried():
                kept = self._put_aside(train_py, content)
                self.say(f"train.py had changes of its own; they are now {kept}", "yellow")
        try:
            if self.repository.run("status", "--porcelain", "--", str(train_py)):
                self.repository.run("checkout", "--quiet", ref, "--", str(train_py))
        except Trouble as trouble:  # the branch is right; the files will be with the next experiment
            self.say(f"train.py here is not the best one yet: {trouble}", "yellow")

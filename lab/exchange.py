"""Ideas on their way: what this machine shares goes out, what others share comes in, and the night waits for neither.

A remote is a plain git repository, to which anyone may have pushed anything, and which may be gone. Each has a thread
of its own.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lab.book import title
from lab.peers import FULL_NAME, Idea
from lab.plumbing import Fault, Git, environment_of, told
from lab.repository import Repository
from lab.researcher import Say
from lab.store import FAILED, Store, store_path
from prepare import Trouble, one_line

# ---------------------------------------------------------------------------------------------------------------------
# Remotes

TRANSPORTS = ("file", "git", "ssh", "https", "http")


@dataclasses.dataclass(frozen=True)
class Remote:
    """A git repository elsewhere: what its owner calls it, and its addresses."""

    name: str
    fetched: str
    pushed: str

    inbox = property(lambda self: hashlib.sha256(self.fetched.encode()).hexdigest()[:16])
    outbox = property(lambda self: hashlib.sha256(self.pushed.encode()).hexdigest()[:16])


def find_remote(repository: Repository, text: str) -> Remote:
    """The remote that the owner means by a git remote's name, a path or a URL. Raises Trouble for anything else."""
    names = repository.run("remote").split("\n")
    if text not in names:
        if not re.search("[/:]", text) and not Path(text).exists():
            known = ", ".join(filter(None, names)) or "none"
            raise Trouble(f"{text!r} is neither a git remote of this repository ({known}) nor a path here, nor a URL")
        return Remote(told(text), address(text, Path.cwd()), address(text, Path.cwd()))
    home = Path(repository.repo.working_dir)
    urls = {}
    for key in ("url", "pushurl"):
        with contextlib.suppress(Trouble):
            urls[key] = repository.run("config", "--get-all", f"remote.{text}.{key}").split("\n")[0]
    fetched = address(urls.get("url", ""), home)
    return Remote(text, fetched, address(urls["pushurl"], home) if "pushurl" in urls else fetched)


def address(text: str, home: Path) -> str:
    """A URL, or a path from the folder `home`, as git is told it. Raises Trouble for what git must not be told."""
    scheme = re.match(r"([A-Za-z0-9+.-]+)(://|::)", text)
    if not text or text.startswith("-") or not text.isprintable():
        raise Trouble(f"{one_line(text, 200)!r} cannot be a remote; give the name of a git remote, a path or a URL")
    if scheme and (scheme[2] == "::" or scheme[1].lower() not in TRANSPORTS):
        ways = ", ".join(TRANSPORTS)
        raise Trouble(f"{scheme[0]}... cannot be a remote; sharing goes by a path or one of: {ways}")
    return text if scheme or re.match("[^/]*:", text) else str(home / text)


# ---------------------------------------------------------------------------------------------------------------------
# One remote, in a thread of its own

BATCH = 50  # experiments that are pushed or fetched at a time
MOST_A_LOOK = 500  # experiments that are fetched from a remote in one look
OF_ONE_A_LOOK = 50  # of these, of one peer
OF_ONE = 1000  # of one peer in all, from a remote
OF_ONE_BYTES = 2**24  # of memory for what one peer shares
LEFT_FREE = 2**28  # bytes of the disk


def fair_choice(offers: dict[str, list]) -> list:
    """Of {peer: what it offers}, as much as one look takes: by turns, in random order; nothing tells which is new."""
    peers = random.sample(list(offers), min(len(offers), MOST_A_LOOK))
    queues = [random.sample(offers[peer], min(len(offers[peer]), OF_ONE_A_LOOK)) for peer in peers]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((offer for offer in turns if offer), MOST_A_LOOK))


class Link(threading.Thread):
    """Fetches from a remote and, if it `pushes`, pushes to it, whenever it is told that there may be something."""

    LOOK_EVERY = 300.0  # seconds between two looks at what is new
    LOOK_SECONDS = 180.0  # that a look may take, roughly
    PAUSES = 60.0, 1800.0  # seconds until a dead remote is tried again, at first and at most

    def __init__(self, remote: Remote, store: Store, git: Git, pushes: bool, say: Say):
        super().__init__(daemon=True)
        self.remote, self.store, self.git, self.pushes, self.say = remote, store, git, pushes, say
        self.wake, self.closing, self.said = threading.Event(), False, set()
        self.to_push = pushes  # perhaps something is left of the last night
        self.to_look, self.next_look, self.looking = False, 0.0, False
        self.faults, self.resume = {"push": 0, "look": 0}, {"push": 0.0, "look": 0.0}  # in a row; time.monotonic()
        self.cut = False  # what it was doing was ended by us

    def once(self, text: str):
        """Tell the owner something that they need not hear twice."""
        if text not in self.said:
            self.said.add(text)
            self.say(f"{self.remote.name}: {text}", "yellow")

    def run(self):
        last = False
        while not last:
            self.wake.wait(self.rest())
            self.wake.clear()
            last = self.closing
            if last or self.rest() == 0:
                self.serve()

    def rest(self) -> float | None:
        """Seconds until there is something to do; None where there is nothing."""
        due = [self.resume["push"]] if self.to_push else []
        due += [max(self.next_look, self.resume["look"])] if self.to_look else []
        return max(0.0, min(due) - time.monotonic()) if due else None

    def serve(self):
        """Do what is due."""
        now = time.monotonic()
        if self.to_push and (self.closing or now >= self.resume["push"]):
            self.to_push = False  # what is added from now on is for the next time
            self.to_push |= not self.attempt("push", self.push)
        if self.to_look and not self.closing and now >= max(self.next_look, self.resume["look"]):
            self.to_look = False
            self.to_look |= not self.attempt("look", self.look)

    def attempt(self, what: str, work: Callable[[], bool]) -> bool:
        """Push or look, each of which may fail alone; whether it went well. What fails is left alone for a while."""
        try:
            reached, failing = work(), any(self.faults.values())
            if reached:
                self.faults[what] = 0
            if failing and not any(self.faults.values()):
                self.say(f"{self.remote.name} can be reached again")
            return True
        except Exception as fault:  # of whatever kind, it must not cost the night
            shortest, longest = self.PAUSES
            self.resume[what] = time.monotonic() + min(longest, shortest * 2 ** min(self.faults[what], 10))
            if not any(self.faults.values()) and not self.cut:
                again = "at the next start" if self.closing else "later"
                self.say(f"{self.remote.name} does not work ({told(fault)}); trying again {again}", "yellow")
            self.faults[what] += 1
            return False

    def close(self):
        """Have pushed what is still to be pushed, and end."""
        self.closing = True
        if self.looking:
            self.end()
        self.wake.set()

    def end(self):
        """Break off what it is doing."""
        self.cut = True
        self.git.kill()

    # -- out

    def push(self) -> bool:
        """Push what waits, if anything does; nothing that is there already is ever moved."""
        with self.store.turn(f"push-{self.remote.outbox}"):  # another loop may be pushing the same
            return self.push_waiting()

    def push_waiting(self) -> bool:
        pushed = False
        while names := list(self.store.names(f"outbox/{self.remote.outbox}"))[:BATCH]:
            refs = [f"refs/autoresearch/{name}:refs/autoresearch/{name}" for name in names]
            flags = ("--porcelain", "--no-verify", "--no-follow-tags", "--recurse-submodules=no")
            failed = None
            try:
                out = self.git.run("push", *flags, "--end-of-options", self.remote.pushed, *refs)
            except Fault as fault:
                failed, out = fault, fault.output
            done, line = [], r"(?m)^(.)\trefs/autoresearch/(\S+):\S+\t(.*)$"
            for flag, name, outcome in re.findall(line, out.decode(errors="replace")):
                taken = flag == "!" and outcome.startswith("[rejected]")  # by git here: another commit has this name
                if taken:
                    self.once(f"{name} is there already, and is another experiment; it stays as it is")
                if taken or flag in "*=":
                    done.append(name)
            self.store.sent(self.git, self.remote.outbox, done)
            if not done:
                raise failed or Fault("git push has said nothing about what was pushed")
            pushed = True
        return pushed

    # -- in

    def look(self) -> bool:
        """Fetch what others have shared since; whether the remote was asked."""
        self.store.open_inbox(self.remote.inbox)  # another loop may have fetched some
        if self.store.full:
            self.once("as much was fetched as is held; what is new is left there")
            return False
        self.looking = True
        try:
            ends = time.monotonic() + self.LOOK_SECONDS
            chosen = fair_choice(self.offers())
            for start in range(0, len(chosen), BATCH):
                self.fetch(chosen[start : start + BATCH], ends)
            return True
        finally:
            self.looking = False
            self.next_look = time.monotonic() + self.LOOK_EVERY

    def listed(self) -> bytes:
        """What `git ls-remote` says, as far as it is bounded."""
        flags = ("--refs", "--end-of-options")
        return self.git.run("ls-remote", *flags, self.remote.fetched, "refs/autoresearch/*", cut=True)

    def offers(self) -> dict[str, list[tuple[str, str]]]:
        """{who: (name, commit) of each experiment} of others that are listed and were neither fetched nor rejected."""
        inbox = self.remote.inbox
        own, rejected, known = self.store.own(), self.store.rejected(), self.store.names(f"inbox/{inbox}")
        held = collections.Counter(name.partition("/")[0] for name in known)
        offers = {}
        for line in self.listed().decode(errors="replace").split("\n")[:-1]:  # what has no end was cut off
            commit, _, ref = line.partition("\t")
            named = FULL_NAME.fullmatch(ref.removeprefix("refs/autoresearch/"))
            if not named or not re.fullmatch("[0-9a-f]{40}", commit) or not ref.startswith("refs/autoresearch/"):
                continue
            who = named[1]
            room = held[who] < OF_ONE and self.store.held_of[who] < OF_ONE_BYTES
            if room and who not in own and named[0] not in known and (inbox, commit) not in rejected:
                offers.setdefault(who, []).append((named[0], commit))
        return offers

    def fetch(self, batch: list[tuple[str, str]], ends: float):
        """Fetch (name, commit) of some experiments and keep the sound ones, until time.monotonic() is `ends`.

        Where git refuses a batch, its halves are fetched one after the other, so that one bad one does not hide others.
        """
        if time.monotonic() > ends or self.closing or self.store.full:
            return
        refs = [f"refs/autoresearch/{name}" for name, _ in batch]
        flags = ("--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head", "--refmap=")
        with self.store.quarantine() as objects:
            try:
                self.git.run("fetch", *flags, "--end-of-options", self.remote.fetched, *refs, objects=objects)
                return self.store.take_in(self.git, self.remote.inbox, dict(batch), objects)
            except Fault:
                if self.closing or shutil.disk_usage(self.store.path).free < LEFT_FREE:
                    raise
        self.listed()  # where that fails as well, it is the remote's fault
        if len(batch) == 1:
            return self.store.reject(self.remote.inbox, batch[0][1], FAILED)
        self.fetch(batch[: len(batch) // 2], ends)
        self.fetch(batch[len(batch) // 2 :], ends)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


class Exchange:
    """The shared experiments of this machine and of others, for as long as a loop runs.

    remotes: the names, paths or URLs of those that are looked at; shares_to: of those to which is pushed as well, and
    which are looked at too. Raises Trouble for what cannot be a remote. Afterwards no call waits for one, or fails
    for one.
    """

    def __init__(self, repository: Repository, remotes: tuple[str, ...], shares_to: tuple[str, ...], say: Say):
        pushed = {find_remote(repository, text): True for text in shares_to}
        found = {find_remote(repository, text): False for text in remotes} | pushed
        own = {Path(place).resolve() for place in (repository.repo.working_dir, repository.repo.common_dir)}
        places = {remote.fetched for remote in found} | {remote.pushed for remote in found}
        if own & {Path(place.removeprefix("file://")).resolve() for place in places}:
            # What others share would pass for candidates of its owner's.
            raise Trouble("this repository cannot be its own remote; make one: git init --bare ../ideas.git")
        self.store, self.say, self.faults = Store(repository), say, set()
        self.who = self.store.who  # what this machine is called by others
        self.inboxes = [remote.inbox for remote in found]
        self.outboxes = [remote.outbox for remote in pushed]
        environment = environment_of(repository, self.store.path)
        for inbox in self.inboxes:
            try:
                self.store.open_inbox(inbox)
            except Fault as fault:
                raise Trouble(f"{self.store.path} cannot be read ({fault}); move it away to begin anew") from None
        if self.store.signing and pushed:
            say("shared experiments are signed, as your commits are, which may tell your name")
        self.links = [Link(r, self.store, Git(environment, nice=10), pushes, say) for r, pushes in found.items()]
        for link in self.links:
            link.start()

    def share(self, idea: Idea) -> None:
        """Commit an idea, whatever its `who`, as this machine's, on disk on return, and have it pushed.

        One that was shared before is not changed, but pushed to remotes that are new. Never raises: what cannot be
        committed is said, each reason once.
        """
        try:
            idea = dataclasses.replace(idea, who=self.who)
            self.store.add(idea.name, idea.files(), title(idea.description), self.outboxes)
        except (Fault, ValueError, OSError) as fault:
            reason = one_line(fault, 200)
            if reason not in self.faults:
                self.faults.add(reason)
                self.say(f"{idea.tag}/{idea.commit} is not shared: {reason}", "yellow")
            return
        for link in self.links:
            if link.pushes:
                link.to_push = True
                link.wake.set()

    def shared(self, tag: str) -> set[str]:
        """Commits of a tag that this machine has shared with all remotes it shares to, or will as soon as it can."""
        known = self.store.names("autoresearch").keys()
        for outbox in self.outboxes:
            known &= {*self.store.names(f"outbox/{outbox}"), *self.store.names(f"sent/{outbox}")}
        own = f"{self.who}/{tag}/"
        return {name.removeprefix(own) for name in known if name.startswith(own)}

    def look(self) -> None:
        """Have the remotes asked for what is new, unless that was done a moment ago; ideas() will have it."""
        for link in self.links:
            link.to_look = True
            link.wake.set()

    def ideas(self) -> tuple[Idea, ...]:
        """What others share, as far as it has arrived and is sound, in the order of its names."""
        return self.store.ideas(self.inboxes)

    def close(self, seconds=10.0) -> int:
        """Give what is still to be pushed so many seconds; returns how many pushes wait for the next start."""
        ends = time.monotonic() + seconds
        for link in self.links:
            link.close()
        try:
            for link in self.links:
                link.join(max(0.0, ends - time.monotonic()))
        finally:  # whoever is in a hurry leaves nothing behind either
            for link in self.links:
                link.end()
        try:
            return sum(len(self.store.names(f"outbox/{outbox}")) for outbox in self.outboxes)
        except Fault:
            return 0


def arrived(repository: Repository) -> tuple[Idea, ...]:
    """What others have shared, from whatever remotes, as far as it has arrived so far."""
    if not store_path(repository).exists():
        return ()
    store = Store(repository)
    inboxes = sorted({name.partition("/")[0] for name in store.names("inbox")})
    for inbox in inboxes:
        store.open_inbox(inbox)
    return store.ideas(inboxes)

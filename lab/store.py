"""The shared experiments on this machine, in a git repository of their own inside the owner's git directory.

It is apart from the owner's objects and refs, so that nothing of a stranger's gets in there and nothing of the owner's
gets out. Its refs, with <name> for <who>/<tag>/<commit> and <remote> for a hash of a remote's address:

  refs/autoresearch/<name>       what this machine shares
  refs/outbox/<remote>/<name>    of these, what is to be pushed there
  refs/sent/<remote>/<name>      and what is there
  refs/inbox/<remote>/<name>     what others have put there, once it was found sound

Each is a commit without parents whose tree holds train.py, base.py and result.json.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from lab.peers import RESULT_BYTES, SOURCE_BYTES, Idea, read
from lab.plumbing import Fault, Git, environment_of, owners
from lab.repository import Repository
from prepare import Trouble

# ---------------------------------------------------------------------------------------------------------------------
# The store

COMMIT_BYTES = 2**14  # a signature included
COMMIT = re.compile(rb"tree ([0-9a-f]{40})\nauthor ")  # without a parent
TREE = re.compile(rb"100644 base\.py\0(.{20})100644 result\.json\0(.{20})100644 train\.py\0(.{20})", re.DOTALL)
MOST_TEXT = 2**28  # bytes of memory for the files of others, each counted once
OVERHEAD = 2000  # bytes of an idea besides its files
MOST_REJECTED = 100_000  # objects that are remembered as not worth fetching
UNSOUND, FAILED = "unsound", "failed"  # what is remembered of them
FAILURES = 2  # until what cannot be fetched is given up
WHO = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def store_path(repository: Repository) -> Path:
    """Where the store of a repository is, or will be."""
    return Path(repository.repo.common_dir).resolve() / "autoresearch-shared.git"


class Store:
    """The store of a repository, made where there is none. Several loops may use it at the same time."""

    def __init__(self, repository: Repository):
        self.path = store_path(repository)
        self.git = Git(environment_of(repository, self.path))
        self.lock = threading.Lock()
        self.inboxes: dict[str, dict[str, Idea]] = {}
        self.texts: dict[str, str] = {}  # one of each
        self.held, self.held_of = 0, collections.Counter()  # bytes of them and of the rest, in all and {who: bytes}
        self._make(repository)
        self._tidy()
        self.who = owners(repository, "autoresearch.name") or self._config("autoresearch.who")
        if not WHO.fullmatch(self.who):
            raise Trouble(f"autoresearch.name is {self.who!r}; it needs 1 to 32 of a-z, 0-9 and -, as in lab-7")
        self.signing = self._signing(repository)
        self.unsigned: Fault | None = None  # why signing does not work

    def _make(self, repository):
        if self.path.exists():
            return
        new = Path(tempfile.mkdtemp(prefix="autoresearch-shared-", dir=self.path.parent))
        git = Git(environment_of(repository, new))
        try:
            git.run("init", "--bare", "--quiet", "--template=", "--object-format=sha1")
            git.run("config", "autoresearch.who", secrets.token_hex(4))
            (new / "incoming").mkdir()
            os.sync()  # half a store would be in the way of every start
            new.rename(self.path)
        except OSError as error:
            if not self.path.exists():
                raise Trouble(f"{self.path} cannot be made ({error.strerror}); sharing needs it") from None
        except Fault as fault:
            raise Trouble(f"{self.path} cannot be made ({fault}); sharing needs it") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)  # another loop was quicker

    def _tidy(self):
        """Remove what processes that were killed have left, where no other loop uses the store."""
        self.use = open(self.path / "in-use", "a")
        try:
            fcntl.flock(self.use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return fcntl.flock(self.use, fcntl.LOCK_SH)
        for lock in self.path.rglob("*.lock"):
            lock.unlink(missing_ok=True)
        for left in (self.path / "incoming").iterdir():
            shutil.rmtree(left, ignore_errors=True)
        for left in (self.path / "objects").rglob("tmp_*"):
            left.unlink(missing_ok=True)
        with contextlib.suppress(Fault):
            self.git.run("pack-refs", "--all")
        fcntl.flock(self.use, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def turn(self, name: str):
        """Wait until no other loop is in a turn of this name, and hold it; it ends with the process at the latest."""
        with open(self.path / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _config(self, name):
        try:
            return self.git.run("config", name).decode().strip()
        except Fault as fault:
            raise Trouble(f"{self.path} cannot be used ({fault}); move it away, and a new one is made") from None

    def _signing(self, repository):
        """Arguments by which a commit is signed, as the owner's own are."""
        if owners(repository, "--type=bool", "commit.gpgSign") != "true":
            return []
        key = owners(repository, "user.signingKey")
        if not key and owners(repository, "gpg.format") in ("", "openpgp"):  # it would be looked for by our name
            key = owners(repository, "user.email")
        return [f"--gpg-sign={key}"]

    def names(self, folder: str) -> dict[str, str]:
        """{name: commit} of the refs in a folder of refs/, like "outbox/<remote>"."""
        form = f"--format=%(objectname) %(refname:lstrip={folder.count('/') + 2})"
        lines = self.git.run("for-each-ref", form, f"refs/{folder}/").decode().splitlines()
        return {name: commit for commit, name in map(str.split, lines)}

    # -- what this machine shares

    def own(self) -> set[str]:
        """The names of this machine, from whenever: what bears one is never taken for another's."""
        shared = {name.partition("/")[0] for name in self.names("autoresearch")}
        return {self.who, self._config("autoresearch.who"), *shared}

    def add(self, name: str, files: dict[str, bytes], message: str, outboxes: list[str]):
        """Commit a shared experiment, on disk on return, and put it into outboxes it was not in yet. Raises Fault.

        What was shared under a name stays as it is.
        """
        commit = self.names("autoresearch").get(name)
        updates = []
        if not commit:
            blobs = {file: self.git.run("hash-object", "-w", "--stdin", stdin=text) for file, text in files.items()}
            lines = "".join(f"100644 blob {blob.decode().strip()}\t{file}\n" for file, blob in blobs.items())
            tree = self.git.run("mktree", stdin=lines.encode()).decode().strip()
            commit = self._commit(tree, message)
            updates.append(f"create refs/autoresearch/{name} {commit}\n")
        for outbox in outboxes:
            if name not in {**self.names(f"outbox/{outbox}"), **self.names(f"sent/{outbox}")}:
                updates.append(f"create refs/outbox/{outbox}/{name} {commit}\n")
        self.git.run("update-ref", "--stdin", stdin="".join(updates).encode())

    def _commit(self, tree, message):
        if self.unsigned:  # to ask again would cost the night as long again
            raise self.unsigned
        try:
            made = self.git.run("commit-tree", *self.signing, tree, stdin=message.encode() + b"\n", seconds=20.0)
        except Fault as fault:
            self.unsigned = fault if self.signing else None
            raise
        return made.decode().strip()

    def sent(self, git: Git, outbox: str, names):
        """Note that these need not be pushed any more."""
        waiting = self.names(f"outbox/{outbox}")
        moves = [
            f"update refs/sent/{outbox}/{name} {waiting[name]}\ndelete refs/outbox/{outbox}/{name}\n"
            for name in names
            if name in waiting
        ]
        git.run("update-ref", "--stdin", stdin="".join(moves).encode())

    # -- what others share

    @property
    def full(self) -> bool:
        """Whether no more is to be taken in."""
        return self.held > MOST_TEXT or len(self.rejected()) > MOST_REJECTED

    def open_inbox(self, inbox: str):
        """Read what has come from a remote and was not read yet."""
        held = self.inboxes.get(inbox, {})
        new = {name: commit for name, commit in self.names(f"inbox/{inbox}").items() if name not in held}
        for name, (idea, _) in self.look_into(self.git, new).items():
            self._hold(inbox, name, idea)

    def ideas(self, inboxes) -> tuple[Idea, ...]:
        """The ideas of others from some remotes; where two go by the same name, that of the first of the remotes."""
        with self.lock:
            merged = {name: idea for inbox in reversed(inboxes) for name, idea in self.inboxes.get(inbox, {}).items()}
        return tuple(merged[name] for name in sorted(merged))

    def _hold(self, inbox, name, idea):
        with self.lock:
            tables = [text for table in (idea.versions, idea.sha256) for item in table.items() for text in item]
            size = sum(map(sys.getsizeof, tables)) + OVERHEAD
            for text in (idea.source, idea.base):
                if text not in self.texts:
                    self.texts[text] = text
                    size += sys.getsizeof(text)
            self.held += size
            self.held_of[idea.who] += size
            # Most files are the edit of one and the base of others.
            idea = dataclasses.replace(idea, source=self.texts[idea.source], base=self.texts[idea.base])
            self.inboxes.setdefault(inbox, {})[name] = idea

    def look_into(self, git: Git, named: dict[str, str], objects: Path | None = None) -> dict[str, tuple[Idea, list]]:
        """{name: (Idea, its objects)} of those of {name: commit} that are one: three regular files of bounded sizes."""
        commits = git.read(named.values(), "commit", COMMIT_BYTES, objects)
        tree_of = {commit: found[1].decode() for commit, text in commits.items() if (found := COMMIT.match(text))}
        trees = git.read(tree_of.values(), "tree", 200, objects)
        entries = {tree: found.groups() for tree, text in trees.items() if (found := TREE.fullmatch(text))}
        blobs_of = {tree: [blob.hex() for blob in blobs] for tree, blobs in entries.items()}
        sources = git.read((b for bs in blobs_of.values() for b in (bs[0], bs[2])), "blob", SOURCE_BYTES, objects)
        results = git.read((bs[1] for bs in blobs_of.values()), "blob", RESULT_BYTES, objects)
        ideas = {}
        for name, commit in named.items():
            tree = tree_of.get(commit)
            with contextlib.suppress(KeyError, ValueError):  # it lacks something, or does not say what it should
                base, result, train = blobs_of[tree]
                files = {"base.py": sources[base], "result.json": results[result], "train.py": sources[train]}
                ideas[name] = read(name, files), [commit, tree, base, result, train]
        return ideas

    @contextlib.contextmanager
    def quarantine(self):
        """A folder for objects that nobody has looked at yet; it is removed in the end."""
        folder = Path(tempfile.mkdtemp(dir=self.path / "incoming"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def take_in(self, git: Git, inbox: str, named: dict[str, str], objects: Path):
        """Take what is sound of {name: commit} out of quarantine, object by object. Raises Fault."""
        sound = self.look_into(git, named, objects)
        for name in named.keys() - sound.keys():
            self.reject(inbox, named[name], UNSOUND)
        ids = {each for _, held in sound.values() for each in held}
        if new := ids - git.kinds(ids).keys():
            pack = git.run("pack-objects", "--stdout", "-q", stdin="\n".join(new).encode() + b"\n", objects=objects)
            git.run("unpack-objects", "-q", stdin=pack)
        updates = "".join(f"update refs/inbox/{inbox}/{name} {named[name]}\n" for name in sound)
        git.run("update-ref", "--stdin", stdin=updates.encode())
        for name, (idea, _) in sound.items():
            self._hold(inbox, name, idea)

    # -- what is not fetched again

    def reject(self, inbox: str, commit: str, why: str):
        """Remember that a commit which this remote offers was UNSOUND, or that to fetch it has FAILED once more."""
        with open(self.path / "rejected", "a") as file:
            file.write(f"{inbox} {commit} {why}\n")

    def rejected(self) -> set[tuple[str, str]]:
        """(remote, commit) of what is not worth fetching."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = (self.path / "rejected").read_text(errors="replace").splitlines()
        counts = {}
        for line in lines:
            *key, why = line.split(" ")
            counts[tuple(key)] = counts.get(tuple(key), 0) + (FAILURES if why == UNSOUND else 1)
        return {key for key, count in counts.items() if count >= FAILURES}

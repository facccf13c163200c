"""The repository: commits that touch train.py alone, without a hand on the user's index or files."""

import contextlib
import itertools
import os
import re
import shutil
import time
from pathlib import Path

from prepare import Pause, Trouble, one_line

LOCK_TRIES = 10  # for a lock in the git repository to go away, five a second


class Repository:
    """The git repository around the folder `home`, which holds train.py."""

    def __init__(self, home: Path):
        try:
            import git

            self.repo = git.Repo(home, search_parent_directories=True)
            self.failure = git.GitCommandError
        except ImportError as error:
            raise Trouble(f"git does not work here ({one_line(error, 200)}); install git and try again") from None
        except git.InvalidGitRepositoryError:
            start = "git init && git add . && git commit -m start"
            raise Trouble(f"{home} is not a git repository; run there: {start}") from None
        self.path = (home / "train.py").relative_to(self.repo.working_dir).as_posix()
        # The owner's hooks and signatures are for the owner's commits.
        settings = {"core.hooksPath": os.devnull, "commit.gpgSign": "false"}
        self.has_identity = bool(self.run("config", "--default", "", "user.email"))
        if not self.has_identity:
            settings |= {"user.name": "autoresearch", "user.email": "autoresearch@localhost"}
        self.repo.git.update_environment(
            LC_ALL="C",  # run() reads git's words
            GIT_OPTIONAL_LOCKS="0",  # to look at the files must not stand in the way of a command of the owner's
            GIT_CONFIG_COUNT=str(len(settings)),
            **{f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(settings)},
            **{f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(settings.values())},
        )
        try:
            self.run("log", "-1", "--format=")
        except Trouble as trouble:
            if "does not have any commits yet" not in str(trouble):
                raise
            raise Trouble(
                f"branch {self.branch()} has no commit; check out another one, or run: git add . && git commit -m start"
            ) from None

    def run(self, *arguments, **options):
        """Output of one git command; raises Trouble with git's own words, Pause where the disk is full."""
        for attempt in itertools.count():
            try:
                return self.repo.git.execute(["git", *arguments], **options)
            except self.failure as error:
                said = one_line(error.stderr or str(error), 400)
            full = shutil.disk_usage(self.repo.git_dir).free < 2**20  # git does not always say why it could not write
            if full or re.search("No space left|quota exceeded", said):
                raise Pause(f"git {arguments[0]}: {said}")
            lock = re.search(r"'([^']+\.lock)': File exists", said)
            if not lock:
                raise Trouble(f"git {arguments[0]} failed: {said}")
            if attempt < LOCK_TRIES:  # somebody else's git command, as a rule
                time.sleep(0.2)
            elif re.search("/refs/(heads/)?autoresearch/", lock[1]) and attempt == LOCK_TRIES:  # ours, of a power cut
                Path(lock[1]).unlink(missing_ok=True)
            else:
                raise Trouble(f"git is locked by {lock[1]}; if no git command is running, delete that file")

    # -- what is there

    def branch(self):
        """Name of the branch that is checked out; empty where HEAD is detached."""
        return self.run("branch", "--show-current")

    def exists(self, revision):
        with contextlib.suppress(Trouble):
            return bool(self.run("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"))
        return False

    def source(self, revision):
        """train.py of a commit, as bytes; of the index for an empty `revision`."""
        raw = {"stdout_as_string": False, "strip_newline_in_stdout": False}
        return self.run("cat-file", "blob", f"{revision}:{self.path}", **raw)

    def message(self, revision):
        """The message of a commit."""
        return self.run("log", "-1", "--format=%B", revision)

    def messages(self, tag):
        """{short hash: commit message} of all candidates of a tag."""
        listed = self.run("for-each-ref", "--format=%(refname:lstrip=3)%09%(contents)%00", f"refs/autoresearch/{tag}/")
        return dict(entry.strip("\n").split("\t", 1) for entry in listed.split("\0") if entry.strip())

    def candidates(self, tag):
        """{short hash: full hash} of all commits under refs/autoresearch/<tag>/, oldest first."""
        form = "--format=%(refname:lstrip=3) %(objectname)"
        listed = self.run("for-each-ref", "--sort=creatordate", form, f"refs/autoresearch/{tag}/")
        named = dict(line.split() for line in listed.splitlines())
        return {short: full for short, full in named.items() if re.fullmatch("[0-9a-f]{4,40}", short)}

    def parents(self, tag):
        """{short hash: full hash of its first parent} of all candidates of a tag that have one."""
        form = "--format=%(refname:lstrip=3) %(parent)"
        listed = self.run("for-each-ref", form, f"refs/autoresearch/{tag}/")
        return {short: first[0] for short, *first in map(str.split, listed.splitlines()) if first}

    def versions(self, commits):
        """{commit: what git names the content of its train.py} of full hashes; {} where one has none."""
        with contextlib.suppress(Trouble):
            return dict(zip(commits, self.run("rev-parse", *(f"{c}:{self.path}" for c in commits)).splitlines()))
        return {}

    # -- what is added

    def remember(self, tag, commit):
        """Keep `commit` reachable for good and return its short hash, as results.tsv names it."""
        short = self.run("rev-parse", "--short=7", f"{commit}^{{commit}}")
        self.run("update-ref", f"refs/autoresearch/{tag}/{short}", commit)
        return short

    def commit(self, parent, source, message, scratch):
        """Commit `parent`'s files with train.py replaced by `source` (bytes), by way of a file `scratch` of our own."""
        scratch.write_bytes(source)
        blob = self.run("hash-object", "-w", "--no-filters", "--", str(scratch))
        index = {"GIT_INDEX_FILE": str(scratch.with_suffix(".index"))}
        scratch.with_suffix(".index.lock").unlink(missing_ok=True)  # nobody else uses it
        self.run("read-tree", parent, env=index)
        self.run("update-index", "--cacheinfo", f"100644,{blob},{self.path}", env=index)
        tree = self.run("write-tree", env=index)
        return self.run("commit-tree", tree, "-p", parent, "-m", message)

"""Git commands in a repository that strangers write to: within bounds, and asking nobody."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lab.repository import Repository
from prepare import Trouble, one_line

# ---------------------------------------------------------------------------------------------------------------------
# What git is told

SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.logAllRefUpdates": "false",  # a log would hold the owner's name
    "core.fsync": "all",
    "core.bigFileThreshold": "1m",  # larger ones are not held in memory
    "gc.auto": "0",
    "maintenance.auto": "false",
    "pack.threads": "1",
    "fetch.fsckObjects": "true",
    "fetch.unpackLimit": "1",  # one file, whose size is bounded
    "fetch.negotiationAlgorithm": "noop",  # no remote is told what came from another
    "fetch.prune": "false",
    "push.gpgSign": "false",
    "push.pushOption": "",
    "i18n.commitEncoding": "utf-8",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "30",
}
NEEDED = r"^(credential|http|url|gpg)\.|^(core\.(sshcommand|gitproxy)|ssh\.variant|user\.signingkey)$"  # of the owner's
KEPT = re.compile(r"(?!GIT_)|GIT_(SSH|SSL|HTTP|PROXY|EXEC_PATH|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM))")  # of the environment
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15"


def environment_of(repository: Repository, path: Path) -> dict[str, str]:
    """The environment of git commands in the store at `path`: the owner's way to reach a remote, and no questions."""
    listed = owners(repository, "--local", "--includes", "--null", "--get-regexp", NEEDED)
    settings = [entry.split("\n", 1) for entry in listed.split("\0") if "\n" in entry] + list(SETTINGS.items())
    environment = {name: value for name, value in os.environ.items() if KEPT.match(name)}
    if not environment.keys() & {"GIT_SSH", "GIT_SSH_COMMAND"} and not owners(repository, "core.sshCommand"):
        environment["GIT_SSH_COMMAND"] = SSH
    midnight = int(time.time() // 86400 * 86400)
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "autoresearch", f"GIT_{who}_EMAIL": "autoresearch@localhost"}
        environment[f"GIT_{who}_DATE"] = f"{midnight} +0000"  # the hour and the time zone are the owner's
    return environment | {
        "GIT_DIR": str(path),
        "LC_ALL": "C",
        "GIT_ALLOW_PROTOCOL": "file:git:ssh:https:http",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",
        "SSH_ASKPASS_REQUIRE": "never",
        "GCM_INTERACTIVE": "never",
        "GIT_CONFIG_COUNT": str(len(settings)),
        **{f"GIT_CONFIG_KEY_{i}": key for i, (key, _) in enumerate(settings)},
        **{f"GIT_CONFIG_VALUE_{i}": value for i, (_, value) in enumerate(settings)},
    }


def owners(repository: Repository, *arguments: str) -> str:
    """What the owner's own `git config` says, without what the loop sets for its commands; "" where nothing."""
    try:
        return repository.run("config", *arguments, env={"GIT_CONFIG_COUNT": "0"})
    except Trouble:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# One command, within bounds of time, memory and what it may write

FILE_BYTES = 2**25  # of any file that git writes: a pack, a list of refs
PUSHED_BYTES = 2**30  # the same while it pushes, since a repository on this machine may tidy itself up then
MEMORY_BYTES = 2**31  # of addresses; not on every system
SECONDS = 60.0  # for one command
LIMITED = 'ulimit -f {}; ulimit -v {} 2>/dev/null; exec nice -n {} git "$@"'


class Fault(Trouble):
    """A git command that failed, with git's words; `output` is what it wrote until then."""

    output = b""


class Git:
    """Runs git in a store, from any thread; any thread may kill() what is running.

    nice: by how much it stands back from the trials, whose cores these are.
    """

    def __init__(self, environment: dict[str, str], nice=0):
        self.environment, self.nice, self.running = environment, nice, set()

    def run(self, *arguments: str, stdin=b"", seconds=0.0, objects: Path | None = None, cut=False) -> bytes:
        """The output of one command. Raises Fault where it fails, or takes or writes too much.

        seconds: that it may take, if not SECONDS. objects: a folder that new objects go to, instead of the store. cut:
        an output that is too long is cut off.
        """
        seconds = seconds or SECONDS
        environment = dict(self.environment)
        if objects:
            environment["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = f"{environment['GIT_DIR']}/objects"
            environment["GIT_OBJECT_DIRECTORY"] = str(objects)
        most = PUSHED_BYTES if arguments[0] == "push" else FILE_BYTES
        limited = LIMITED.format(most // 512, MEMORY_BYTES // 1024, self.nice)
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as words:
            given.write(stdin)
            given.seek(0)
            streams = {"stdin": given, "stdout": out, "stderr": words}
            command = ["sh", "-c", limited, "sh", *arguments]
            # In a session of its own, it has no terminal to ask at.
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
            self.running.add(process)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
                end_session(process)
            finally:
                self.running.discard(process)
            out.seek(0)
            words.seek(0)
            if code and not (cut and code == -signal.SIGXFSZ) or code is None:
                said = told(words.read(10_000).decode(errors="replace")) if code else f"no end within {seconds:.0f} s"
                fault = Fault(f"git {arguments[0]}: {said or f'ended with {code}'}")
                fault.output = out.read(FILE_BYTES)
                raise fault
            return out.read(FILE_BYTES)

    def kill(self):
        """End what is running, and all that it has started."""
        for process in list(self.running):
            end_session(process)

    def kinds(self, ids, objects: Path | None = None) -> dict[str, tuple[str, int]]:
        """{id: (type, size in bytes)} of those of the objects that exist."""
        asked = "".join(f"{each}\n" for each in ids).encode()
        lines = self.run("cat-file", "--batch-check", stdin=asked, objects=objects).decode().splitlines()
        found = [line.split() for line in lines]  # id, type, size; of others something else
        return {words[0]: (words[1], int(words[2])) for words in found if len(words) == 3 and words[2].isdigit()}

    def read(self, ids, kind: str, most: int, objects: Path | None = None) -> dict[str, bytes]:
        """{id: content} of those of the objects that are of a kind and have at most `most` bytes."""
        found = self.kinds(set(ids), objects)
        fit = [each for each, (of, size) in found.items() if of == kind and size <= most]
        contents, at_once = {}, FILE_BYTES // (most + 100)
        for start in range(0, len(fit), at_once):
            asked = fit[start : start + at_once]
            out = self.run("cat-file", "--batch", stdin="\n".join(asked).encode() + b"\n", objects=objects)
            end = 0
            for each in asked:  # a line about it, its content, a newline
                begin = out.index(b"\n", end) + 1
                end = begin + found[each][1] + 1
                contents[each] = out[begin : end - 1]
        return contents


def end_session(process: subprocess.Popen):
    """Kill a process that began a session, and all that it has started there, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(words) -> str:
    """What git has said, as one line for the owner, without the password that an address may hold."""
    return one_line(re.sub(r"//[^/@\s]*@", "//", str(words)), 200)

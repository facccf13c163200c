"""One request to a command line of the owner's, such as `claude -p`, and its whole answer.

The prompt is its standard input, and what it prints is the answer. It runs as the owner, with the owner's login, and in
an empty folder: so a coding agent does not come across the repository by itself.
"""

import atexit
import contextlib
import dataclasses
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from lab.api import LONGEST_REPLY, Own, Unusable
from lab.researcher import Enough, Say
from prepare import PASSING, Trouble, one_line

SECONDS = 1800.0  # that an answer may take
LONGEST_WAIT = 900  # seconds between two tries: a subscription's limit is waited out
LOG_BYTES = 2**20  # of the file that keeps what commands write to standard error, the newest of it
SAID_BYTES = 2**16  # of what one command writes there, the end of it
POLL = 0.05  # seconds between two looks at whether a command has ended
ANSWER = (
    "There is no tool propose_experiment here. Answer in words alone, in the form told above for that case; the old "
    "text of a block is what is said of old_str. Nothing that you do to files is looked at."
)


@dataclasses.dataclass(frozen=True)
class Text:
    """The one block of an answer."""

    text: str
    type: str = "text"

    def to_dict(self):
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the Messages API calls a message."""

    content: list[Text]
    stop_reason: str = "end_turn"


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a command."""

    out: bytes  # what it has printed
    said: bytes  # the end of what it has written to standard error
    failure: str  # why that is no answer; "" where it may be one


class Command:
    """A command line that any number of threads may ask at the same time."""

    name = "command"  # in the commits of its drafts
    has_key, effort, longest_wait = True, None, LONGEST_WAIT
    spent = max_cost = None  # its price is not to be seen
    own = Own()

    def __init__(self, line: str, log: Path, say: Say):
        """log: a file for what it writes to standard error. Raises Trouble where `line` names no program."""
        try:
            self.words = shlex.split(line)
        except ValueError as error:
            raise Trouble(f"--researcher {line!r} cannot be read as a command ({error})") from None
        first = self.words[0] if self.words else ""
        if not (program := shutil.which(first)):
            raise Trouble(
                f"--researcher {line!r} is neither llm nor search, and {first!r} is no program on this machine; "
                "a command goes in quotes, as in --researcher 'claude -p'"
            )
        self.words[0] = os.path.abspath(program)  # it starts in another folder
        # Not the whole line, which may hold a key: commit messages travel.
        self.models = (Path(program).name,) * 2
        self.log, self.say, self.lock = log, say, threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.began = self.closed = False
        atexit.register(self.close)

    def check(self):
        self.say(f"asking {self.models[0]} for drafts, in an empty folder; what it says besides: {self.log}")

    def is_plain(self, model) -> bool:
        return True

    def ask(self, request) -> Answer:
        """The answer to a request of the Messages API without tools, put as one text.

        Raises Unusable where there is none, Trouble for a command that cannot be started, and Enough after close().
        """
        ended = self.run(written(request).encode(errors="replace"))
        if self.closed:
            raise Enough("the loop has ended")
        self.keep(ended)
        if ended.failure:
            words = last_line(ended.said) or last_line(ended.out)
            raise Unusable(f"{ended.failure} ({words})" if words else ended.failure)
        return Answer([Text(ended.out.decode(errors="replace"))])

    def run(self, prompt: bytes) -> Ended:
        """Run the command once, and leave nothing of it behind."""
        process = None
        try:
            folder = tempfile.TemporaryDirectory(prefix="autoresearch-", ignore_cleanup_errors=True)
            with folder as empty, tempfile.TemporaryFile() as given:  # not a pipe, which it may leave unread
                given.write(prompt)
                given.seek(0)
                with self.start(given, empty) as process:
                    try:
                        return heard(process)
                    finally:
                        kill(process)
        finally:
            self.running.discard(process)

    def start(self, given, folder) -> subprocess.Popen:
        """Start the command in a session of its own, where it has no terminal to ask at."""
        streams = {"stdin": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = os.environ | {"PWD": folder}
        with self.lock:
            if self.closed:
                raise Enough("the loop has ended")
            try:
                process = subprocess.Popen(self.words, **streams, cwd=folder, env=environment, start_new_session=True)
            except OSError as error:
                if error.errno in PASSING:
                    raise
                if self.began:  # perhaps it is being updated
                    raise Unusable(f"it cannot be started now ({error.strerror})") from None
                raise Trouble(f"{self.words[0]} cannot be started: {error.strerror}") from None
            self.began = True
            self.running.add(process)
            return process

    def keep(self, ended: Ended):
        """Add to the log what a command has said."""
        head = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {ended.failure or 'an answer'}\n".encode()
        with self.lock, contextlib.suppress(OSError):  # a full disk costs the log, not the answer
            self.log.parent.mkdir(parents=True, exist_ok=True)
            before = self.log.read_bytes() if self.log.exists() else b""
            said = ended.said.rstrip() + b"\n" if ended.said.strip() else b""
            self.log.write_bytes((before + head + said)[-LOG_BYTES:])

    def close(self):
        """Kill what is running; nothing is started any more."""
        with self.lock:
            self.closed = True
        for process in list(self.running):
            if process.returncode is None:
                kill(process)
        limit = time.monotonic() + 5.0
        while self.running and time.monotonic() < limit:  # its thread removes the folder
            time.sleep(POLL)


def written(request) -> str:
    """A request as one text: a command has no memory of the turns before."""
    parts = [request["system"]]
    for message in request["messages"]:
        text = "\n".join(block["text"] for block in message["content"])
        parts.append(text if message["role"] == "user" else f"# What you have answered to that\n\n{text}")
    return "\n\n".join([*parts, ANSWER, ""])


def heard(process: subprocess.Popen) -> Ended:
    """Listen to a command until it has ended, has printed too much, or has taken too long."""
    out, said, failure, limit = b"", b"", "", time.monotonic() + SECONDS
    with selectors.DefaultSelector() as pipes:
        for pipe in (process.stdout, process.stderr):
            pipes.register(pipe, selectors.EVENT_READ)
        while not failure:
            code = process.poll()
            ready = pipes.select(POLL if code is None else 0)
            for key, _ in ready:
                if not (chunk := os.read(key.fd, 2**16)):
                    pipes.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    out += chunk
                else:
                    said = (said + chunk)[-SAID_BYTES:]
            if len(out) > LONGEST_REPLY:
                failure = "its answer does not end"
            elif time.monotonic() > limit:
                failure = f"no answer within {SECONDS:g} s"
            elif code is not None and not ready:  # what it has left behind may keep the pipes open
                failure = f"exit code {code}" if code else "" if out.strip() else "an empty answer"
                break
    return Ended(out, said, failure)


def kill(process: subprocess.Popen):
    """Kill a command and all that it has started, even in sessions of their own as long as it lives itself."""
    import psutil

    below = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True) if process.returncode is None else []
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in below:
        with contextlib.suppress(psutil.Error):
            each.kill()


def last_line(words: bytes) -> str:
    """The last line that holds something, fit to be printed."""
    lines = words[-SAID_BYTES:].decode(errors="replace").splitlines()
    return next(filter(None, (one_line(line, 200) for line in reversed(lines))), "")

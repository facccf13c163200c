"""A candidate under clock and limits, from its start to its end, as the proctor sees it."""

import contextlib
import itertools
import json
import math
import os
import re
import selectors
import signal
import socket
import stat
import time
from pathlib import Path

from exam import limits, processes
from exam.load import Load
from exam.sandbox import CANDIDATE_GOES
from prepare import Pause, one_line


class Log:
    """The candidate's output on disk: its first and its last limits.LOG_LIMIT / 2 bytes."""

    def __init__(self, path):
        self.file, self.room, self.tail, self.left_out = open(path, "wb", 0), limits.LOG_LIMIT // 2, b"", 0

    def write(self, data):
        with contextlib.suppress(OSError):  # a full disk costs the log, not the trial
            self.file.write(data[: self.room])
        rest = data[self.room :]
        self.room -= len(data) - len(rest)
        self.left_out += max(0, len(self.tail) + len(rest) - limits.LOG_LIMIT // 2)
        self.tail = (self.tail + rest)[-limits.LOG_LIMIT // 2 :]

    def close(self):
        with contextlib.suppress(OSError):
            if self.left_out:
                self.file.write(b"\n[... %d bytes left out ...]\n" % self.left_out)
            self.file.write(self.tail)
        self.file.close()


def numbers(values, limit=16):
    """Those items of a candidate's report that are a short name with a finite number, at most `limit`."""
    items = values.items() if isinstance(values, dict) else ()
    fine = [(k[:32], v) for k, v in items if type(v) in (int, float) and abs(v) < 1e15 and k.isidentifier()]
    return dict(fine[:limit])


EXCEPTION = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration|Unsupported|Refused)\b.*")


def last_words(log):
    """The line of a log that tells why its program ended; "" for an empty one.

    After a traceback that is the line which names the exception: advice and complaints about leaks may follow it.
    """
    lines = [line.strip() for line in log.strip().splitlines()] or [""]
    last = lines[-1]
    *_, traced = log.rpartition("Traceback (most recent call last):")
    named = [line for line in traced.splitlines() if EXCEPTION.match(line)]
    if traced is not log and named and not last.startswith("train.py: "):
        last = named[-1].strip()
    return last[:300]


def files_in(folder):
    """{(device, inode): bytes that it takes} of the files in a folder, at most limits.INODE_LIMIT of them."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(root, name))
                found[status.st_dev, status.st_ino] = 512 * status.st_blocks
        if len(found) > limits.INODE_LIMIT:
            break
    return found


def unlinked(alive):
    """The same of files that psutil Processes hold open and no folder has: deleted ones, and those in memory."""
    found = {}
    for process in alive:
        with contextlib.suppress(OSError):
            for entry in itertools.islice(os.scandir(f"/proc/{process.pid}/fd"), limits.INODE_LIMIT):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                        found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return found


class Watch:
    """A candidate from its start to its end, as the proctor sees it: every limit is enforced here.

    The clock runs from the moment before the training rows are handed over to the moment after every process of the
    candidate has been killed, so that whatever was done with text lies between two readings of it.
    """

    last_to_go = CANDIDATE_GOES  # oom_score_adj below which a process wants others to be ended before it

    def __init__(self, child, examiner, channel, output, task, out, card, shares=1):
        """card: the GPU's account, from before the child; shares: how many trials divide the machine's memory."""
        import psutil

        self.child, self.examiner, self.channel, self.output = child, examiner, channel, output
        self.task, self.out, self.log, self.shares = task, out, Log(out / "log.txt"), shares
        self.started, self.begun, self.ended = time.monotonic(), None, None
        self.deadline, self.next_look = self.started + task.startup_limit, self.started
        self.outcome = self.reason = None
        self.report, self.peak, self.cpu_at_begin, self.logged = {}, 0, 0.0, 0
        self.load, self.others, self.card = None, None, card
        disk = os.statvfs(out)
        self.free_at_start = disk.f_bavail * disk.f_frsize
        self.shared_at_start = getattr(psutil.virtual_memory(), "shared", 0)  # which macOS does not tell
        self.disk_floor = max(limits.DISK_RESERVE, self.free_at_start - limits.DISK_LIMIT)
        self.inode_floor = disk.f_favail - limits.INODE_LIMIT if disk.f_files else -math.inf  # btrfs has no such number

    def run(self, rows, at_begin):
        """Watch until the end; every process of the candidate is dead on return.

        rows: descriptor of the training rows, handed over when the candidate says begin, after at_begin().
        """
        with (
            contextlib.closing(self.log),
            open(self.out / "metrics.jsonl", "wb", 0) as metrics,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(self.channel, selectors.EVENT_READ)
            selector.register(self.output, selectors.EVENT_READ)
            try:
                while self.outcome is None:
                    # Asked first: what it sent before its end is still read below.
                    code = processes.exit_code(self.child)
                    wait = 0 if code is not None else min(0.25, max(0.0, self.deadline - time.monotonic()))
                    for key, _ in selector.select(wait):
                        heard = self.copy_output() if key.fileobj is self.output else self.hear(rows, at_begin, metrics)
                        if not heard:
                            selector.unregister(key.fileobj)
                    if self.outcome is None:
                        self.look(code)
            finally:
                processes.kill_group(self.child)
                self.ended = time.monotonic()
                processes.end_processes(keep=self.examiner)
                self.child.wait()
                if self.load:
                    self.others = self.load.others(processes.cpu_reaped() - self.cpu_at_begin)
                while self.copy_output():
                    pass

    def copy_output(self):
        """Copy a piece of what the candidate has printed to its log; false where there is none."""
        with contextlib.suppress(BlockingIOError):  # the candidate can read its pipe empty again
            data = os.read(self.output, 2**16)
            self.log.write(data)
            return bool(data)
        return self.ended is None

    def hear(self, rows, at_begin, metrics):
        """Act on one message of the candidate; false where it has closed the channel."""
        now = time.monotonic()
        try:
            data, message = self.channel.recv(2**16), {}
        except OSError:
            return True
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(data)
        if not isinstance(message, dict):
            message = {}
        if self.begun is None and "refused" in message:
            self.outcome, self.reason = "invalid", str(message["refused"])
        elif self.begun is None and "begin" in message:
            at_begin()
            self.start_clock(rows)
        elif self.begun and "log" in message and self.logged < limits.LOG_LIMIT:
            values = {"seconds": 0.0, **numbers(message["log"])} | {"seconds": round(now - self.begun, 3)}
            with contextlib.suppress(OSError):  # a full disk costs the curve, not the trial
                self.logged += metrics.write(json.dumps(values).encode() + b"\n")
        elif self.begun and "submit" in message:
            self.outcome = "ok"
            self.report = message["submit"] if isinstance(message["submit"], dict) else {}
        return bool(data)

    def start_clock(self, rows):
        """Hand over the training rows; the clock is read before anything that a candidate could delay."""
        self.cpu_at_begin = processes.cpu_reaped() + processes.cpu_seconds(processes.descendants(self.examiner))
        self.load = Load()
        self.begun = time.monotonic()
        self.deadline = self.begun + self.task.time_budget + self.task.grace
        try:
            socket.send_fds(self.channel, [b"."], [rows])
        except OSError as error:  # its end is closed or full; the channel does not block
            self.outcome, self.reason = "crash", f"it did not take the training rows: {error.strerror}"

    def look(self, code):
        """Enforce the limits; code: with which the candidate had ended before its messages were read, or None."""
        now = time.monotonic()
        if now > self.deadline:
            phase = "before begin()" if self.begun is None else "between begin() and submit()"
            self.outcome, self.reason = "timeout", f"no end after {now - (self.begun or self.started):.0f} s {phase}"
        elif code is not None:
            if code == -signal.SIGKILL and self.shares > 1:  # it may be a neighbour that has filled the memory
                raise Pause("the trial was killed, as the kernel does where memory runs out; hold fewer at a time")
            self.outcome, self.reason = "crash", processes.exit_reason(code)
        elif now > self.next_look:
            self.next_look = now + 1
            self.reason = self.overdrawn()
            self.outcome = "crash" if self.reason else None

    def overdrawn(self):
        """The limit of the machine that the candidate has exceeded, in words; None where it has not."""
        import psutil

        # Orphans end as children of this process; they are reaped here, and count no longer.
        found = processes.descendants(self.examiner)
        alive = [process for process in found if process.pid == self.child.pid or not processes.has_ended(process)]
        memory = threads = 0
        if len(alive) > limits.PROCESS_LIMIT:
            return f"it ran more than {limits.PROCESS_LIMIT} processes"
        if self.begun:
            self.card.look({process.pid for process in alive})
        for process in alive:
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                memory += process.memory_info().rss
                threads += process.num_threads()
                goes = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
                if os.getpgid(process.pid) == self.child.pid and goes < self.last_to_go:
                    return "it wanted others to be ended before it where memory runs out"
        if threads > limits.THREAD_LIMIT:
            return f"it ran more than {limits.THREAD_LIMIT} threads"
        machine = psutil.virtual_memory()
        # Files in memory are in no process's account. Those that a process could hide, and those of others, are not
        # told apart; where they fill the memory, the kernel ends this candidate first.
        shared = max(0, getattr(machine, "shared", 0) - self.shared_at_start)
        memory += min(shared, sum(unlinked(alive).values()))
        self.peak = max(self.peak, memory)
        if memory > limits.MEMORY_SHARE * machine.total / self.shares:
            return f"it took {memory / 2**30:.0f} GB of memory"
        return self.overfull(alive)

    def overfull(self, alive):
        """Whether it has filled the disk, in words, or None. Raises Pause for a disk that others have filled."""
        disk = os.statvfs(self.out)
        free = disk.f_bavail * disk.f_frsize
        if free >= self.disk_floor and disk.f_favail >= self.inode_floor:
            return None
        # Counted only now, for it takes time: others may write to the same disk.
        files = files_in(self.out / "room") | unlinked(alive)
        most = min(limits.DISK_LIMIT, self.free_at_start - free) / 2
        if sum(files.values()) > most or len(files) > limits.INODE_LIMIT / 2:
            return "it filled the disk"
        if free < limits.DISK_RESERVE or disk.f_files and disk.f_favail < limits.INODE_LIMIT / 100:
            raise Pause(f"the disk that holds {self.out} has filled up, and not by this trial; make room")
        return None

    def facts(self):
        """The first part of result.json."""
        training = self.ended - self.begun if self.begun else 0.0
        cpu = max(0.0, processes.cpu_reaped() - self.cpu_at_begin) if self.begun else 0.0
        cores = processes.usable_cores()
        if self.outcome == "ok" and training > self.task.time_budget + self.task.grace:
            self.outcome, self.reason = "timeout", f"its submission was complete after {training:.1f} s"
        elif self.outcome == "ok" and cpu > 1.1 * cores * training + 2:  # the second witness of the time
            self.outcome = "invalid"
            self.reason = f"its clock cannot be right: {cpu:.0f} s of CPU time in {training:.1f} s on {cores} cores"
        elif self.outcome == "crash":
            words = last_words((self.out / "log.txt").read_text(errors="replace"))
            self.reason += f": {words}" if words else ""
        return {
            "outcome": self.outcome,
            "reason": None if self.outcome == "ok" else one_line(self.reason, 2500) or "no reason is given",
            "startup_seconds": round((self.begun or self.ended) - self.started, 3),
            "training_seconds": round(training, 3),
            "cpu_seconds": round(cpu, 3),
            "others": self.others,
            **self.card.facts(),
            "peak_rss_mb": round(self.peak / 2**20, 1),
            **numbers({key: self.report.get(key) for key in ("steps", "tokens", "params", "peak_vram_mb")}),
        }

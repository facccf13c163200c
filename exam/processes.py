"""The end of processes, in words and in fact, and the CPU time that they have used."""

import contextlib
import os
import signal
import socket
import time

from prepare import Pause


def descendants(keep):
    """psutil Processes below this one, without `keep` (a Popen or None) and what is below it."""
    import psutil

    kept = {keep.pid} if keep else set()
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid in kept or process.ppid() in kept:
                kept.add(process.pid)
            else:
                found.append(process)
    return found


def message_pair():
    """Two connected sockets whose messages stay whole; the end of one side is seen by the other, but not on macOS."""
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def usable_cores():
    """CPU cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def exit_code(child):
    """Return code of a Popen whose process has ended, else None. It stays a zombie: its group's number is not free."""
    if not hasattr(os, "waitid"):  # as on macOS before Python 3.13; there it is reaped
        return child.poll()
    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended and (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def exit_reason(code):
    """A process's return code in words."""
    return f"exit code {code}, without submit()" if code >= 0 else f"killed: {signal.strsignal(-code) or -code}"


def kill_group(child):
    """Kill a confined Popen and all that it started, at one stroke.

    The filter keeps them in its process group, and the kernel signals a group and forks under one lock: no process can
    slip through by forking faster than it is killed.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def has_ended(process):
    """Whether a psutil Process was a child of this one and has ended; it is reaped."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(process.pid, os.WNOHANG)[0] > 0
    return False


def end_processes(keep=None):
    """Kill and reap every descendant but `keep`. Orphans cannot escape: this process is their subreaper.

    Raises Pause for a process that the kernel does not end, as one that waits for a dead disk or GPU.
    """
    import psutil

    deadline = time.monotonic() + 60
    while alive := descendants(keep):
        if time.monotonic() > deadline:
            raise Pause(f"processes of the candidate cannot be ended: {[process.pid for process in alive][:9]}")
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in alive:
            has_ended(process)
        time.sleep(0.01)


def cpu_seconds(processes):
    """CPU seconds that psutil Processes, and those that they have reaped, have used."""
    import psutil

    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def cpu_reaped():
    """CPU seconds of all processes that this one has reaped, and that those have reaped, by the kernel's account."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

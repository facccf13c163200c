"""What others had of the CPU while a candidate trained: the proctor's own account, which no candidate can write."""

import contextlib
import os
import time
from pathlib import Path


class Load:
    """The CPU cores that a trial may use, from the moment that this is made."""

    def __init__(self):
        self.began, self.busy, self.used = time.monotonic(), busy_seconds(), used_elsewhere()

    def others(self, spent: float) -> float | None:
        """Share of the cores' time since then that others had, given the CPU seconds that the candidate has `spent`.

        That is what the cores were busy without it. But the kernel's account of the candidate can be made to lack what
        its children have spent (by a parent that ignores their end), and who looks disturbed is heard again: so it is
        no more than the time that was stolen by other guests of the host, and what processes of others have used,
        which are asked only by a trial that has all cores: else they may have used those that it has not.
        None where the system does not tell.
        """
        seconds = len(self.busy) * (time.monotonic() - self.began)
        if not self.busy or not seconds > 0:
            return None
        now, used = busy_seconds(), used_elsewhere()
        both = [core for core in self.busy if core in now]
        busy, stolen = (sum(now[core][kind] - self.busy[core][kind] for core in both) for kind in (0, 1))
        others = stolen
        if len(self.busy) == os.cpu_count():
            others += sum(max(0.0, used[each] - self.used.get(each, 0.0)) for each in used)
        return round(min(1.0, max(0.0, min(busy - spent, others) / seconds)), 3)


def busy_seconds() -> dict[int, tuple[float, float]]:
    """{core: seconds that it was not idle, and of these stolen} of the usable cores since the start of the system.

    {} where that is not known.
    """
    import psutil

    try:
        cores = [core._asdict() for core in psutil.cpu_times(percpu=True)]
    except (OSError, RuntimeError):  # a system that it is not implemented for among them
        return {}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    waits = ("idle", "iowait", "guest", "guest_nice")  # on Linux the time of guests is part of user and nice
    return {
        core: (
            sum(cores[core].values()) - sum(cores[core].get(name, 0.0) for name in waits),
            cores[core].get("steal", 0.0),
        )
        for core in usable
        if core < len(cores)
    }


def kernel_threads() -> set[int]:
    """The process whose children are the kernel's own threads; empty where it is not to be seen, as in a container."""
    with contextlib.suppress(OSError):
        if Path("/proc/2/comm").read_text() == "kthreadd\n":
            return {2}
    return set()


def used_elsewhere() -> dict[tuple[int, float], float]:
    """{(pid, start): CPU seconds of it and of what it has waited for} of all processes but this one and those below.

    Nor those of the kernel, which a candidate can make work by writing files.
    """
    import psutil

    own = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    kernel = kernel_threads()
    used = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own and not kernel & {process.pid, process.ppid()}:
                used[process.pid, process.create_time()] = sum(process.cpu_times()[:4])
    return used

"""What others had of the machine while a candidate trained: the proctor's own account, which no candidate can write."""

import os
import time


class Load:
    """The CPU cores that a trial may use, from the moment that this is made."""

    def __init__(self):
        self.busy, self.began, self.own = busy_seconds(), time.monotonic(), time.process_time()

    def others(self, spent: float) -> float | None:
        """Share of the cores' time since then that was neither idle nor the `spent` CPU seconds of the candidate.

        Time that another guest of the same host had (steal) is others' too. None where the system does not tell.
        """
        seconds = len(self.busy) * (time.monotonic() - self.began)
        if not self.busy or not seconds > 0:
            return None
        now = busy_seconds()
        busy = sum(now[core] - before for core, before in self.busy.items() if core in now)
        others = busy - spent - (time.process_time() - self.own)
        return round(min(1.0, max(0.0, others / seconds)), 3)


def busy_seconds() -> dict[int, float]:
    """{core: seconds that it was not idle since the start of the system} of the usable cores; {} where not known."""
    import psutil

    try:
        cores = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError, NotImplementedError):
        return {}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    # On Linux the time of guests is part of user and nice.
    waits = ("idle", "iowait", "guest", "guest_nice")
    return {
        core: sum(seconds for name, seconds in cores[core]._asdict().items() if name not in waits)
        for core in usable
        if core < len(cores)
    }

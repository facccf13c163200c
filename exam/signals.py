"""Signals: how a program of ours is ended by its owner, in good order."""

import asyncio
import atexit
import math
import os
import signal
import time
from collections.abc import Coroutine

HURRY = 5.0  # seconds that a program may take to end in good order, undisturbed


def heard():
    """The numbers of the signals that end a program of ours."""
    numbers = [signal.SIGINT, signal.SIGTERM]  # in a script's background SIGINT would be ignored
    # A closed terminal ends nothing where nohup has asked for that.
    return numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]


def ending(number):
    """The exception by which a signal ends the program: exit code 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def hear_signals(ended=-math.inf):
    """Have Ctrl-C, kill and a closed terminal end the program by an exception.

    Those that follow within HURRY seconds, of `ended` too (time.monotonic()), are an owner's impatience, and count for
    nothing: an exception in the middle of subprocess.Popen.wait() can leave its lock taken, and the program waiting for
    ever.
    """

    def end(number, _):
        nonlocal ended
        before, ended = ended, time.monotonic()
        if ended - before > HURRY:
            raise ending(number)

    for number in heard():
        signal.signal(number, end)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # from then on the exit code is fixed


def run(coroutine: Coroutine):
    """Run a coroutine to its end and return its value. The first signal cancels it, and is raised once it has ended.

    One that comes HURRY seconds later, or after those, ends the program on the spot: what it waits for may never end.
    """
    came = []

    async def main():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def cancel(number):
            if came and time.monotonic() > came[0] + HURRY:
                os._exit(128 + number)
            if not came:
                came[:] = time.monotonic(), number
                task.cancel()

        def hear(number, _):
            if not loop.is_closed():
                loop.call_soon_threadsafe(cancel, number)
            elif not came:
                raise ending(number)

        # With the loop's own handlers there is a moment, when it is closed, in which a signal kills.
        for number in heard():
            signal.signal(number, hear)
        return await coroutine

    try:
        value = asyncio.run(main())
        if came:  # while it was taken down
            raise ending(came[1])
        return value
    except asyncio.CancelledError:
        if not came:
            raise
        raise ending(came[1]) from None
    finally:
        hear_signals(came[0] if came else -math.inf)

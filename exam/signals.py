"""Signals: how a program of ours is ended by its owner, in good order."""

import atexit
import math
import signal
import time

HURRY = 5.0  # seconds that a program may take to end in good order, undisturbed


def hear_signals():
    """Have Ctrl-C, kill and a closed terminal end the program by an exception; exit code 128 + the signal's number.

    Those that follow within HURRY seconds are an owner's impatience, and count for nothing: an exception in the middle
    of subprocess.Popen.wait() can leave its lock taken, and the program waiting for ever.
    """
    ended, numbers = -math.inf, [signal.SIGINT, signal.SIGTERM]  # in a script's background SIGINT would be ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup wants it
        numbers.append(signal.SIGHUP)

    def end(number, _):
        nonlocal ended
        before, ended = ended, time.monotonic()
        if ended - before > HURRY:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # from then on the exit code is fixed

"""Where the time of a training step goes, line by line: a short run of a train.py in which a second thread looks on.

The run is a trial like any other, in the sandbox and with the model and the batch of a whole one, but of a program that
starts train.py, notes at which of its lines the main thread is, and ends early. It has no score. What it has noted
comes from where the candidate runs: it may be made up, so it is only ever shown, as numbers and lines of the train.py.
"""

import collections
import json
from pathlib import Path

from prepare import one_line

SHARE = 1 / 6  # of a run's budget, that a profile trains for
MOST_SECONDS = 10.0
LINES, LEAST = 12, 0.02  # lines that are told at most, and the share of the time from which one is
STACKS, DEEPEST = 500, 100  # different ones that are noted, and calls of functions of train.py within each other
NO_USE = "compiled", "model.safetensors", "room"  # what a profile leaves besides its log
NEARLY = 0.9  # share of the time that is nearly all of it

# GPUs work behind the back of Python: it has to wait for each kernel, or the next line that needs a result seems slow.
LOOKS_ON = """import collections, json, os, runpy, sys, threading, time

os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
with open("profiled.py", "w", encoding="utf-8", newline="") as file:
    file.write({source!r})


def look_on():
    stacks, begun = collections.Counter(), None
    while begun is None or time.monotonic() < begun + {seconds!r}:
        time.sleep(0.005)
        frame, stack = sys._current_frames().get(threading.main_thread().ident), []
        while frame:
            name = os.path.basename(frame.f_code.co_filename)
            if (name, frame.f_code.co_name) == ("prepare.py", "begin"):
                stacks.clear()
                begun = time.monotonic()
            if name == "profiled.py":
                stack.insert(0, (frame.f_code.co_name, frame.f_lineno))
            frame = frame.f_back
        stacks[tuple(stack)] += 1
    print("\\n{mark}" + json.dumps(stacks.most_common({stacks})), flush=True)
    os._exit(0)


threading.Thread(target=look_on, daemon=True).start()
runpy.run_path("profiled.py", run_name="__main__")
"""
MARK = "profile: "


def looked_on(source: bytes, budget: float) -> bytes:
    """The program to be run in the place of a train.py so that its log tells where the time of its training goes."""
    seconds = min(MOST_SECONDS, SHARE * budget)
    return LOOKS_ON.format(source=source.decode(errors="replace"), seconds=seconds, mark=MARK, stacks=STACKS).encode()


def read_profile(log: Path, source: str) -> str:
    """What a profile of a train.py has found, as text of a few lines; "" where there is none."""
    try:
        (noted,) = log.read_text(errors="replace").split("\n" + MARK)[-1:]
        stacks = [
            ([(str(name), int(line)) for name, line in stack[:DEEPEST]], int(count))
            for stack, count in json.loads(noted)[:STACKS]
        ]
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return ""
    stacks = [(stack, count) for stack, count in stacks if stack and 0 < count < 1e9]
    whole, lines = sum(count for _, count in stacks), source.split("\n")
    if not stacks or not (loop := training_loop(stacks)):
        return ""
    parts, leaves = collections.Counter(), collections.Counter()
    for stack, count in stacks:
        leaves[stack[-1][1]] += count / whole
        if functions(stack)[: len(loop)] == loop:
            parts[stack[len(loop) - 1][1]] += count / whole

    def told(shares):
        most = [(line, share) for line, share in shares.most_common(LINES) if share >= LEAST and 0 < line <= len(lines)]
        return [f"{share:4.0%}  {line}: {one_line(lines[line - 1], 100)}" for line, share in most]

    known = loop[-1] == "<module>" or f"def {loop[-1]}(" in source
    about = f"by line of {one_line(loop[-1], 40) if known else 'a function'}(), with all that it calls:"
    return "\n".join([about, *told(parts), "by the line itself:", *told(leaves)])


def training_loop(stacks) -> tuple[str, ...]:
    """The functions, outermost first, down to the innermost one in which nearly all of the time was spent."""
    whole, found = sum(count for _, count in stacks), ()
    while True:
        deeper = collections.Counter()
        for stack, count in stacks:
            if len(stack) > len(found):
                deeper[functions(stack)[: len(found) + 1]] += count
        if not deeper or (most := deeper.most_common(1)[0])[1] < NEARLY * whole:
            return found
        found = most[0]


def functions(stack) -> tuple[str, ...]:
    """The functions of the frames of a stack."""
    return tuple(name for name, _ in stack)

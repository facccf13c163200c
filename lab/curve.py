"""Loss curves: what a run has logged, read from its metrics.jsonl, which a candidate writes."""

import contextlib
import functools
import json
import math
import statistics
from pathlib import Path


def json_lines(path: Path, room=2**30) -> list:
    """What the whole lines in the last `room` bytes of a file say; [] where there is none."""
    values = []
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - room))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                values.append(json.loads(line))
    return values


def read_curve(path: Path, room=2**30) -> list[tuple[float, float]]:
    """[(seconds, loss)] from the last `room` bytes of a metrics.jsonl; [] where there is none."""
    curve = []
    for values in json_lines(path, room):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # train.py logs what it likes
            point = float(values["seconds"]), float(values["loss"])
            if all(map(math.isfinite, point)):
                curve.append(point)
    return curve


finished_curve = functools.lru_cache(2)(read_curve)


def loss_at(curve, seconds, window) -> float | None:
    """Mean loss over the `window` seconds before `seconds`; None where the curve has nothing there."""
    losses = [loss for at, loss in curve if seconds - window < at <= seconds]
    return statistics.fmean(losses) if losses else None

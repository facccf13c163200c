"""Which runs compare: those on one device at about one speed.

Pure functions of experiments and their runs.
"""

import statistics

from lab.book import Experiment, Run, on_cpu

MOST_OTHERS = 0.15  # share of the device, or of the time, that a run may be disturbed more than those of the best
SAME_PACE = 0.85  # runs of equal code agree if the shortest has this share of the steps of the longest
SAME_SPEED = 0.85  # two runs are comparable if the slower machine reached this share of the faster one's speed

# ---------------------------------------------------------------------------------------------------------------------
# Speed classes: a device at about one speed. What is not known always compares.


def same_speed(a, b):
    """Whether two matrix-multiply rates are equal enough for scores to compare; an unknown one always is."""
    return not a or not b or min(a, b) >= SAME_SPEED * max(a, b)


def same_device(a: Run, b: Run):
    """Whether two runs were on devices of one name; an unknown one may have been."""
    return not a.device or not b.device or a.device == b.device


def same_class(a: Run, b: Run):
    """Whether the scores of two runs compare."""
    return same_device(a, b) and same_speed(a.speed, b.speed)


def disturbed(run: Run, usual: list[Run]) -> str:
    """What disturbed a run clearly more than the usual ones, in words; "" for nothing."""
    if (run.others or 0.0) > MOST_OTHERS + max([each.others or 0.0 for each in usual], default=0.0):
        return f"others had {run.others:.0%} of the {'CPU' if on_cpu(run.device) else 'GPU'}"
    if (run.held_back or 0.0) > MOST_OTHERS + max([each.held_back or 0.0 for each in usual], default=0.0):
        return f"heat or the power supply held the GPU back for {run.held_back:.0%} of the time"
    return ""


def out_of_step(runs: list[Run]) -> set[int]:
    """Places of those runs of equal code that made far fewer steps than another on such a device."""
    most = {a.device: max(b.steps or 0.0 for b in runs if same_device(a, b)) for a in runs}
    return {place for place, run in enumerate(runs) if run.steps and run.steps < SAME_PACE * most[run.device]}


def scores_like(experiment: Experiment, run: Run) -> list[float]:
    """Scores of the runs that compare with `run`."""
    return [each.val_bpb for each in experiment.runs if same_class(each, run)]


def all_scores(experiment: Experiment) -> list[float]:
    """Scores of all runs; where they are lost, that of the row."""
    return [run.val_bpb for run in experiment.runs] or [experiment.val_bpb]


def classes(experiment: Experiment) -> list[list[Run]]:
    """The runs in groups of one class, every run in one of them."""
    found = []
    for run in experiment.runs:
        known = next((runs for runs in found if same_class(runs[0], run)), None)
        if known is None:
            found.append([run])
        else:
            known.append(run)
    return found


def groups(experiment: Experiment) -> list[list[float]]:
    """The scores of classes()."""
    return [[run.val_bpb for run in runs] for runs in classes(experiment)]


def comparable(candidate: Experiment, best: Experiment) -> tuple[list[float], list[float]]:
    """(scores of the candidate, scores of the best) that compare: in the class of the candidate's last run.

    Where the best has no run in it, its faster ones on the same device are compared with, which do the candidate no
    favour. Where it has none of these, the class of the run before counts, and so on; without any, it has no scores.
    """
    if not candidate.runs or not best.runs:
        return all_scores(candidate), all_scores(best)
    last, rivals = match(candidate, best)
    return scores_like(candidate, last), rivals


def difference(experiment: Experiment, best: Experiment) -> float | None:
    """val_bpb of an experiment minus that of another, by the runs that compare, as the verdict takes them.

    None for a crash, and where no runs do.
    """
    scores, rivals = comparable(experiment, best)
    if experiment.status == "crash" or not rivals:
        return None
    return statistics.fmean(scores) - statistics.fmean(rivals)


def changes(experiments) -> list[tuple[Experiment, float | None]]:
    """(experiment, its difference() from the best before it) in order; None for the first ones as well."""
    best, pairs = None, []
    for experiment in experiments:
        pairs.append((experiment, difference(experiment, best) if best else None))
        if experiment.status == "keep":
            best = experiment
    return pairs


def on_one_device(candidate, best):
    """(scores of the candidate, scores of the best) on the device of the candidate's last run, at whatever speed."""
    if not candidate.runs or not best.runs:
        return all_scores(candidate), all_scores(best)
    last = candidate.runs[-1]
    return tuple([run.val_bpb for run in each.runs if same_device(run, last)] for each in (candidate, best))


def match(candidate, best):
    """(the last run of the candidate with which runs of the best compare, their scores); the last run and [] if none"""
    for run in reversed(candidate.runs):
        faster = [each.val_bpb for each in best.runs if same_device(each, run) and (each.speed or 0) > (run.speed or 0)]
        if rivals := scores_like(best, run) or faster:
            return run, rivals
    return candidate.runs[-1], []

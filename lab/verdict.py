"""The verdict: is a candidate better, given how much a score varies from run to run, and what has to run again?

Pure functions of experiments and their runs, which know no file, no clock and no process: the loop, the report, what a
model is told and tests/nights.py, which simulates nights to choose the constants, all ask here.
"""

import dataclasses
import math
import statistics

from lab.book import Experiment

BASELINE_RUNS = 3  # they give the first estimate of the noise
MAX_RUNS = 3  # of one candidate
KEEP_AT, DISCARD_AT = 0.90, 0.80  # probability that the candidate is better; chosen by tests/nights.py
SAME_SPEED = 0.85  # two runs are comparable if the slower machine reached this share of the faster one's speed

# ---------------------------------------------------------------------------------------------------------------------
# Which runs compare


def same_speed(a, b):
    """Whether two matrix-multiply rates are equal enough for scores to compare; an unknown one always is."""
    return not a or not b or min(a, b) >= SAME_SPEED * max(a, b)


def scores_at(experiment: Experiment, speed) -> list[float]:
    """Scores of the runs at this machine speed, more or less, and of those at an unknown one."""
    return [run.val_bpb for run in experiment.runs if same_speed(run.speed, speed)]


def all_scores(experiment: Experiment) -> list[float]:
    """Scores of all runs; where they are lost, that of the row."""
    return [run.val_bpb for run in experiment.runs] or [experiment.val_bpb]


def groups(experiment: Experiment) -> list[list[float]]:
    """The scores in groups of runs at one machine speed, every run in one of them."""
    found = []
    for run in experiment.runs:
        for speed, scores in found:
            if same_speed(speed, run.speed):
                scores.append(run.val_bpb)
                break
        else:
            found.append((run.speed, [run.val_bpb]))
    return [scores for _, scores in found]


def comparable(candidate: Experiment, best: Experiment) -> tuple[list[float], list[float]]:
    """(scores of the candidate, scores of the best) that compare: at the machine speed of the candidate's last run.

    Where the best has no run at that speed, its faster ones are compared with, which do the candidate no favour; it has
    none at all where the machine was never as fast for it.
    """
    if not candidate.runs or not best.runs:
        return all_scores(candidate), all_scores(best)
    speed = candidate.runs[-1].speed
    faster = [run.val_bpb for run in best.runs if speed and run.speed and run.speed > speed]
    return scores_at(candidate, speed), scores_at(best, speed) or faster


# ---------------------------------------------------------------------------------------------------------------------
# How sure a difference is


def pooled_noise(score_groups):
    """(sigma, freedom): standard deviation of one run, pooled over groups of scores of one commit; nan without repeats.

    freedom: by how many repeats sigma is known.
    """
    freedom = sum(max(0, len(scores) - 1) for scores in score_groups)
    squares = sum((score - statistics.fmean(scores)) ** 2 for scores in score_groups for score in scores)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def noise(experiments):
    """pooled_noise() of all runs of `experiments`, those at one machine speed apart from those at another."""
    return pooled_noise([scores for e in experiments for scores in groups(e)])


GREEDY = math.nan, 0  # the noise of one who does not ask for it: any lower score is kept after one run


def student_cdf(t, freedom):
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = math.sin(angle) * (math.cos(angle) if odd else 1), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 0.5 + ((angle + total) / math.pi if odd else total / 2)


def probability_better(candidate, best, noise):
    """P(the candidate's true val_bpb is lower than the best's), from the scores of their runs and pooled_noise().

    The gap of the means over sigma * sqrt(1/n_candidate + 1/n_best) follows Student's t. Without repeats: 0 or 1.
    """
    (sigma, freedom), gap = noise, statistics.fmean(best) - statistics.fmean(candidate)
    if not sigma > 0:
        return float(gap > 0)
    return student_cdf(gap / (sigma * math.sqrt(1 / len(candidate) + 1 / len(best))), freedom)


def decide(candidate, best, noise):
    """(decision, P(better)): keep, discard, or again where one more run of the candidate is worth its time."""
    probability = probability_better(candidate, best, noise)
    if probability >= KEEP_AT:
        return "keep", probability
    if probability <= DISCARD_AT or len(candidate) >= MAX_RUNS:
        return "discard", probability
    return "again", probability


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What follows from the runs so far, and why."""

    decision: str  # keep, discard; again: run the candidate once more; best: run the best once more
    reason: str
    scores: tuple[float, ...] = ()  # of the candidate, those that count
    unusual: bool = False  # to run again is for the machine's speed, and not for the score


def judge_baseline(baseline: Experiment, greedy=False) -> Verdict:
    """It is kept, after as many runs as give a first estimate of the noise."""
    scores = tuple(run.val_bpb for run in baseline.runs)
    done = len(scores) >= (1 if greedy else BASELINE_RUNS)
    return Verdict("keep" if done else "again", f"sigma {pooled_noise([scores])[0]:.6f}", scores)


def judge(candidate: Experiment, best: Experiment, others, greedy=False, best_ran_again=False) -> Verdict:
    """The verdict on a candidate after its last run, which went well, against the best of this moment.

    others: all experiments that tell how much a run varies, the best among them. best_ran_again: whether the best has
    run for this candidate already.
    """
    scores, rivals = comparable(candidate, best)
    if greedy:
        scores, rivals = all_scores(candidate), all_scores(best)
    elif len(candidate.runs) > MAX_RUNS:  # the speed never settles, and the mean over all is the best guess
        scores = all_scores(candidate)
    decision, reason = "discard", "the machine was never as fast for the best"
    if rivals:
        decision, probability = decide(scores, rivals, GREEDY if greedy else noise([*others, candidate]))
        reason = f"P(better) {probability:.0%}"
    if decision != "keep" and not greedy and (remedy := _remedy(candidate, best, best_ran_again)):
        return remedy
    return Verdict(decision, reason, tuple(scores))


def _remedy(candidate, best, best_ran_again):
    """What to run again before a candidate is discarded at a speed at which the best has no run; else None."""
    speed = candidate.runs[-1].speed
    if best_ran_again or not best.runs or scores_at(best, speed):
        return None
    usual = best.runs[-1].speed
    change = f"the machine ran at {speed / usual:.0%} of the speed that it had for the best"
    unmatched = sum(not scores_at(best, run.speed) for run in candidate.runs)
    if speed < usual and unmatched == 1 and len(candidate.runs) < MAX_RUNS:  # perhaps it was busy, or hot, for a while
        return Verdict("again", change, unusual=True)
    return Verdict("best", change)

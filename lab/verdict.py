"""The verdict: is a candidate better, given how much a score varies from run to run, and what has to run again?

Pure functions of experiments and their runs, which know no file, no clock and no process: the loop, the report, what a
model is told and tests/nights.py, which simulates nights to choose the constants, all ask here.
"""

import dataclasses
import math
import statistics

from lab.book import Experiment
from lab.conditions import Effects, effects, fair, seed_gaps
from lab.posterior import Scores, level_of_best, probability_of_gain, probability_of_no_loss
from lab.runs import (
    all_scores,
    comparable,
    groups,
    match,
    on_one_device,
    same_device,
    scores_like,
)

BASELINE_RUNS = 4  # each seed twice; they give the first estimates of the noise and of what the seed does
MAX_RUNS = 2  # of one candidate
KEEP_AT = 0.55  # P(better) from which a candidate is kept; this and the next two lines are chosen by tests/nights.py
IN_DOUBT = 0.35, 0.70  # P(better) between which a candidate runs once more
NO_LOSS_AT, MARGIN = 0.90, 0.5  # P(no loss) from which a deletion is kept; so many sigma of one run are none
RECENT = 500  # experiments, twice as many at most, are what P(better) is told from: long nights run out of ideas
FORGIVEN = 4  # sigma by which one run may score worse and be kept all the same
WILD = 10  # times the sigma of what was kept: a change that varies more says nothing about the others
SURE = 0.90  # probability from which a word is said of what has become of an idea from elsewhere

# ---------------------------------------------------------------------------------------------------------------------
# How sure a difference is


def pooled_noise(score_groups):
    """(sigma, freedom): standard deviation of one run, pooled over groups of scores of one commit; nan without repeats.

    freedom: by how many repeats sigma is known.
    """
    squares, freedom = scatter(score_groups)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def scatter(score_groups):
    """(sum of squares about the mean of each group, how many scores are not the first of theirs)."""
    freedom = sum(max(0, len(scores) - 1) for scores in score_groups)
    return sum((score - statistics.fmean(scores)) ** 2 for scores in score_groups for score in scores), freedom


def noise(experiments):
    """pooled_noise() of all runs of `experiments`, those of one class apart from those of another.

    One repeat is spent on what a seed does.
    """
    calm = steady(experiments)
    squares, freedom = scatter([scores for e in calm for scores in groups(e)])
    freedom -= len(seed_gaps(calm)) > 1
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def steady(experiments):
    """Those that tell how much a run varies: not what was let go and varies far more by itself, like one that diverges.

    With it, one unstable change would hide every gain of the rest of the night.
    """
    usual = pooled_noise([scores for e in experiments if e.status == "keep" for scores in groups(e)])[0]
    most = WILD * usual if usual > 0 else math.inf
    return [e for e in experiments if e.status == "keep" or not pooled_noise(groups(e))[0] > most]


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
    """P(the candidate's true val_bpb is lower than the best's), from the scores of their runs and pooled_noise() alone.

    The gap of the means over sigma * sqrt(1/n_candidate + 1/n_best) follows Student's t. Without repeats: 0 or 1.
    """
    (sigma, freedom), gap = noise, statistics.fmean(best) - statistics.fmean(candidate)
    if not sigma > 0:
        return float(gap > 0)
    return student_cdf(gap / (sigma * math.sqrt(1 / len(candidate) + 1 / len(best))), freedom)


def shown(experiment: Experiment, scores: list[float]) -> Scores:
    """What an experiment has shown, where `scores` are those of its runs that compare."""
    scores = [score for score in scores if math.isfinite(score)]
    mean = statistics.fmean(scores) if scores else 0.0
    return Scores(mean, len(scores), *scatter(groups(experiment)), experiment.status == "keep")


def past(experiments: list[Experiment], best: Experiment, candidate: Experiment) -> tuple[Scores, ...]:
    """What the experiments up to a candidate have shown that compares with it, in order; the best is the last kept.

    One that was made from another than the best of its time, and lost, says nothing about how ideas do on that one.
    """
    last, rivals = match(candidate, best) if candidate.runs and best.runs else (None, all_scores(best))
    start = max(0, (len(experiments) // RECENT - 1) * RECENT)
    # Of the older ones no more is told than the last that was kept, and how much a run varies.
    older = [each for each in experiments[:start] if each.status == "keep"][-1:]
    calm = {id(each) for each in steady(experiments)}
    noises = [scatter(groups(each)) for each in experiments[:start] if each not in older and id(each) in calm]
    told, base = [Scores(0.0, 0, *map(sum, zip(*noises)))] if noises else [], ""
    if len(seed_gaps([each for each in experiments if id(each) in calm])) > 1:
        told.append(Scores(0.0, 0, 0.0, -1))  # the repeat that is spent on what a seed does
    for each in [*older, *experiments[start:]]:
        scores = rivals if each is best else scores_like(each, last) if last else all_scores(each)
        kept = each.status == "keep"
        stale = each.base and each.base != base and not kept
        found = shown(each, [] if stale or each.status == "crash" else scores)
        told.append(found if id(each) in calm else found._replace(scatter=0.0, repeats=0))
        base = each.commit if kept else base
    return tuple(told)


def percent(probability: float | None) -> str:
    """A probability as one reads it, and never as a certainty; "" for what is not known."""
    if probability is None:
        return ""
    return "over 99%" if probability > 0.99 else "under 1%" if probability < 0.01 else f"{probability:.0%}"


def certainties(experiments: list[Experiment], wanted) -> dict[str, float]:
    """{commit: P(better) than the best before it, by what was known then} of those in `wanted` where it can be told."""
    best, known = None, {}
    for place, experiment in enumerate(experiments):
        before = experiments[:place]
        if best and experiment.commit in wanted and experiment.status != "crash" and noise(before)[0] > 0:
            scores, rivals = comparable(experiment, best)
            found = shown(experiment, scores)
            if rivals and found.runs:
                known[experiment.commit] = probability_of_gain(past(before, best, experiment), found)
        if experiment.status == "keep":
            best = experiment
    return known


def level(experiments: list[Experiment]) -> float | None:
    """val_bpb that the best is expected to have by all scores, and not only by its own; None where that is unknown."""
    best = next((each for each in reversed(experiments) if each.status == "keep"), None)
    if not best or len(groups(best)) > 1:  # in which class would it be?
        return None
    return level_of_best(past(experiments, best, best))


def confidence(experiments: list[Experiment], best: Experiment, first: Experiment) -> float | None:
    """P(the best is better than the first that was kept), all changes between them taken as one idea; None: unknown."""
    scores, rivals = comparable(best, first)
    if best is first or not rivals or not noise(experiments)[0] > 0:
        return None
    kept = [place for place, each in enumerate(experiments) if each.status == "keep"]
    told = past(experiments[: kept[1]], first, best)
    # What came later says how much a run varies, and nothing else.
    told += tuple(shown(each, [])._replace(kept=False) for each in experiments[kept[1] :] if each is not best)
    return probability_of_gain(told, shown(best, scores))


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
    """It is kept, after as many runs on one device as give a first estimate of the noise."""
    (baseline,) = fair([baseline], effects([baseline]))
    device = statistics.mode(run.device for run in baseline.runs)
    scores = tuple(run.val_bpb for run in baseline.runs if run.device == device)
    done = len(scores) >= (1 if greedy else BASELINE_RUNS)
    return Verdict("keep" if done else "again", f"equal code differs by {noise([baseline])[0]:.6f} (sigma)", scores)


def judge(
    candidate: Experiment, best: Experiment, experiments, greedy=False, best_ran_again=False, deletes=False
) -> Verdict:
    """The verdict on a candidate after its last run, which went well, against the best of this moment.

    experiments: all of the tag, in order, the best among them. best_ran_again: whether the best has run for this
    candidate already. deletes: whether the candidate only deletes code, and need not be better to be kept.
    """
    candidate, scores, rivals = _compared(candidate, best, experiments, greedy)
    if greedy and not rivals and not best_ran_again:
        return Verdict("best", f"the best has not run on {candidate.runs[-1].device} yet")
    if not greedy and len(candidate.runs) > MAX_RUNS:
        # The speed never settles, and the mean over all is the best guess.
        device = match(candidate, best)[0]
        scores = [run.val_bpb for run in candidate.runs if same_device(run, device)]
    decision, reason = "discard", "no run of the best compares"
    if rivals and greedy:
        probability = probability_better(scores, rivals, GREEDY)
        decision, reason = ("keep", "lower") if probability else ("discard", "not lower")
    elif rivals:
        decision, reason = decide(past(experiments, best, candidate), shown(candidate, scores), deletes)
    if decision == "again" and len(candidate.runs) >= 2 * MAX_RUNS:  # the device changes from run to run
        decision = "discard"
    if decision != "keep" and not greedy and (remedy := _remedy(candidate, best, best_ran_again)):
        return remedy
    return Verdict(decision, reason, tuple(scores))


def _compared(candidate, other, experiments, greedy):
    """(the candidate, its scores, those of the other) that compare; for the greedy as they were measured."""
    if greedy:
        candidate, other = fair([candidate, other], Effects())
        return candidate, *on_one_device(candidate, other)
    (candidate,) = fair([candidate], effects(experiments))
    return candidate, *comparable(candidate, other)


def hopeless(experiments: list[Experiment]) -> float | None:
    """val_bpb, as measured, from which on no candidate is kept, whatever its conditions.

    None where that is not known: without a best, or where runs were on several devices. It is the score of the best, by
    its own runs or by all, with room for what may be forgiven: noise, and a deletion's loss.
    """
    best = next((each for each in reversed(experiments) if each.status == "keep"), None)
    if not best or len({run.device for each in experiments for run in each.runs}) > 1:
        return None
    sigma = noise(experiments)[0]
    room = effects(experiments).most + (FORGIVEN * sigma if sigma > 0 else 0.0)
    return max(filter(None, [*all_scores(best), level(experiments)])) + room


def decide(history: tuple[Scores, ...], candidate: Scores, deletes=False) -> tuple[str, str]:
    """(decision, why): keep, discard, or again where one more run of the candidate is worth its time."""
    probability = probability_of_gain(history, candidate)
    reason = f"P(better) {percent(probability)}"
    if IN_DOUBT[0] <= probability <= IN_DOUBT[1] and candidate.runs < MAX_RUNS:
        return "again", reason
    if probability >= KEEP_AT:
        return "keep", reason
    if deletes:
        no_loss = probability_of_no_loss(history, candidate, MARGIN)
        reason = f"it only deletes, P(not worse by more than half of what a run varies) {percent(no_loss)}"
        if IN_DOUBT[0] <= no_loss < NO_LOSS_AT and candidate.runs < MAX_RUNS:
            return "again", reason
        return "keep" if no_loss >= NO_LOSS_AT else "discard", reason
    best, level = [each for each in history if each.kept and each.runs][-1], level_of_best(history)
    if level is not None and level < candidate.mean < best.mean:
        reason += f", since by all scores the best is at {level:.6f}"
    return "discard", reason


def _remedy(candidate, best, best_ran_again):
    """What to run again before a candidate is discarded in a class in which the best has no run; else None."""
    last = candidate.runs[-1]
    if best_ran_again or not best.runs or scores_like(best, last):
        return None
    usual = [run.speed for run in best.runs if same_device(run, last)]
    if not usual:
        return Verdict("best", f"the best has not run on {last.device} yet")
    change = f"the machine ran at {last.speed / usual[-1]:.0%} of the speed that it had for the best"
    here = [run for run in candidate.runs if same_device(run, last)]
    unmatched = sum(not scores_like(best, run) for run in here)
    if last.speed < usual[-1] and unmatched == 1 and len(here) < MAX_RUNS:  # perhaps it was busy, or hot, for a while
        return Verdict("again", change, unusual=True)
    return Verdict("best", change)


# ---------------------------------------------------------------------------------------------------------------------
# Several trials at a time: the best may have changed since a candidate was made


def beats_base(candidate: Experiment, base: Experiment, experiments, greedy=False) -> bool:
    """Whether a candidate is worth carrying over: its change, made from `base`, onto the best that there is now.

    To be asked for a finished candidate, kept or not, whose base is not the best any more. One that is in doubt does
    not run again for this: by tests/nights_parallel.py that is not worth its time. experiments: as for judge().
    """
    candidate, scores, rivals = _compared(candidate, base, experiments, greedy)
    if greedy or not rivals:
        return bool(rivals) and probability_better(scores, rivals, GREEDY) > 0
    if base.status != "keep":  # an owner's commit on top of what was let go
        return False
    before = experiments[: 1 + experiments.index(base)]
    return probability_of_gain(past(before, base, candidate), shown(candidate, scores)) >= KEEP_AT


# ---------------------------------------------------------------------------------------------------------------------
# Ideas from elsewhere: their scores stay where they were measured, but their gains can be compared


def advantage(candidate: Experiment, base: Experiment, others) -> tuple[float, float | None] | None:
    """(gain over the base in bits per byte, the same in standard errors), from the runs of both that compare.

    The second is None where the noise is not known; None for all, where no runs compare. others: those that tell it.
    """
    scores, rivals = comparable(candidate, base)
    if candidate.status == "crash" or not scores or not rivals:
        return None
    gain, sigma = statistics.fmean(rivals) - statistics.fmean(scores), noise(others)[0]
    return gain, gain / (sigma * math.sqrt(1 / len(scores) + 1 / len(rivals))) if sigma > 0 else None


def transfer(candidate: Experiment, base: Experiment, gain_there: float, others) -> str:
    """What has become, here, of an idea that had gained `gain_there` bits per byte elsewhere: one word or two.

    reverses: it is worse than its base; holds: it is better; fades: it gains less than half of what it did there. Each
    with a probability of SURE.
    """
    scores, rivals = comparable(candidate, base)
    known = noise(others)
    if candidate.status == "crash":
        return "crashes"
    if not rivals or not known[0] > 0:
        return "cannot be told"
    if gain_there <= 0:  # it was kept there for what it deletes
        return "cannot be told"
    better = probability_better(scores, rivals, known)
    half = probability_better(scores, [score - gain_there / 2 for score in rivals], known)
    if better <= 1 - SURE:
        return "reverses"
    if half <= 1 - SURE:
        return "fades"
    return "holds" if better >= SURE else "cannot be told"

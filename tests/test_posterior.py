"""P(better) by Bayes' rule: what the scores of a whole night say of one candidate."""

import random
import statistics

from lab.posterior import Scores, level_of_best, probability_of_gain, probability_of_no_loss


def scores(*values, kept=False):
    """The runs of one experiment, all on one machine."""
    mean = statistics.fmean(values)
    return Scores(mean, len(values), sum((value - mean) ** 2 for value in values), len(values) - 1, kept)


BASELINE = scores(1.000, 1.001, 0.999, kept=True)  # sigma 0.001


def test_a_large_lead_is_believed_after_one_run_and_a_small_one_is_not():
    lead = [probability_of_gain((BASELINE,), scores(1 - gap)) for gap in (0.0, 0.001, 0.003, 0.05)]
    assert lead == sorted(lead) and lead[0] < 0.15 and lead[1] < 0.5 and lead[3] > 0.95


def test_a_second_run_that_agrees_makes_it_surer_and_one_that_does_not_less_so():
    once = probability_of_gain((BASELINE,), scores(0.998))
    assert probability_of_gain((BASELINE,), scores(0.998, 0.998)) > once
    assert probability_of_gain((BASELINE,), scores(0.998, 1.001)) < once


def test_where_nothing_has_run_twice_a_lower_score_is_better_for_sure():
    first = scores(1.0, kept=True)
    assert probability_of_gain((first,), scores(0.9)) == 1 and probability_of_gain((first,), scores(1.1)) == 0


def test_a_lead_over_a_best_that_was_kept_by_luck_counts_less_than_one_over_a_sure_best():
    """Candidates that come close to a lucky best have told that it was lucky, and the next one is easily better."""
    lucky = scores(0.997, kept=True)
    poor = tuple(scores(1.000 + step / 10_000) for step in range(8))
    told = probability_of_gain((BASELINE, lucky, *poor), scores(0.9965))
    assert probability_of_gain((BASELINE, lucky), scores(0.9965)) != told < 0.9


def test_a_night_of_equal_code_keeps_almost_nothing():
    kept = 0
    for night in range(12):
        draw = random.Random(night)
        history = [scores(*(draw.gauss(1, 0.001) for _ in range(3)), kept=True)]
        for _ in range(25):
            candidate = scores(draw.gauss(1, 0.001))
            kept += probability_of_gain(tuple(history), candidate) >= 0.8
            history.append(candidate)
    assert kept <= 6  # of 300; of greedy's rule, 75 and more


def test_a_deletion_that_is_clearly_worse_is_no_gain_and_one_that_is_not_is_no_loss():
    assert probability_of_no_loss((BASELINE,), scores(1.000, 1.000), 1.0) > 0.8
    assert probability_of_no_loss((BASELINE,), scores(1.010, 1.010), 1.0) < 0.1


def test_what_comes_close_to_the_best_tells_where_it_is():
    lucky, unlucky = scores(0.990, kept=True), scores(0.997, kept=True)
    later = tuple(scores(0.993 + step / 20_000) for step in range(10))
    assert level_of_best((BASELINE, lucky, *later)) > 0.992 and level_of_best((BASELINE, unlucky, *later)) < 0.995
    assert level_of_best((scores(1.0, kept=True),)) is None and level_of_best(()) is None

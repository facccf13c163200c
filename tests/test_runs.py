"""Which runs compare, and what a seed does to all scores alike."""

import pytest

from lab.book import Experiment, Run
from lab.runs import seed_effect, with_one_seed
from lab.verdict import judge, noise


def experiment(commit, *scores, status="discard"):
    """Scores of seed 0, 1, 0, ... in turn."""
    runs = tuple(Run(score, 100, seed=place % 2) for place, score in enumerate(scores))
    return Experiment(commit, scores[0], 0.1, status, "an idea", runs)


BASELINE = experiment("base", 1.000, 1.020, 1.001, status="keep")


def compared(*experiments):
    effect = seed_effect(experiments)
    return [with_one_seed(each, effect) for each in experiments]


def test_what_a_seed_adds_to_the_scores_of_all_is_found_out_and_taken_away():
    others = [experiment(f"c{place}", 1.01 + place / 1000, 1.03 + place / 1000) for place in range(8)]
    assert seed_effect([BASELINE, *others]) == pytest.approx(0.02 * 9 / 10)
    assert noise(compared(BASELINE, *others))[0] < 0.002 < 0.01 < noise([BASELINE])[0]


def test_with_few_runs_it_is_taken_for_smaller_than_it_looks():
    assert seed_effect([BASELINE]) == pytest.approx(0.0195 / 2)
    assert seed_effect([experiment("a", 1.0), experiment("b", 1.1)]) == 0


def test_no_train_py_alone_can_say_what_a_seed_does():
    honest = [experiment(f"c{place}", 1.0, 1.02) for place in range(4)]
    liar = experiment("liar", 1.0, 9.0)
    assert seed_effect([*honest, liar]) < 0.02
    candidate = experiment("next", 1.0, 1.02)
    book = compared(BASELINE, *honest, liar)
    assert judge(candidate, book[0], book).decision == "discard"


def test_what_was_measured_stays_known_and_is_compared_anew_when_more_is_known():
    first = compared(BASELINE)[0]
    later = compared(first, *(experiment(f"c{place}", 1.0, 1.02) for place in range(8)))[0]
    assert [run.measured for run in later.runs] == [run.val_bpb for run in BASELINE.runs]
    assert later.runs[1].val_bpb < first.runs[1].val_bpb < 1.02
    assert with_one_seed(later, 0.0) == BASELINE


def test_a_candidate_is_compared_with_the_runs_of_the_best_as_if_both_had_one_seed():
    book = compared(BASELINE, *(experiment(f"c{place}", 1.01, 1.03) for place in range(6)))
    better, equal = experiment("better", 0.98, 1.0), experiment("equal", 1.0, 1.02)
    assert judge(better, book[0], book).decision == "keep"
    verdict = judge(equal, book[0], book)
    assert verdict.decision == "discard" and verdict.scores[1] == pytest.approx(1.02 - seed_effect(book))


def test_one_repeat_is_spent_on_what_the_seeds_do():
    assert noise([BASELINE])[1] == 1 and noise([experiment("a", 1.0, 1.01)])[1] == 0
    same = tuple(Run(score, 100) for score in (1.0, 1.01, 1.02))
    assert noise([Experiment("b", 1.0, 0.1, "keep", "", same)])[1] == 2

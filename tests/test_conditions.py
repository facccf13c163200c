"""What seeds and the speed of the machine do to all scores alike: found out, and taken away."""

import dataclasses
import math
import random
import statistics

import pytest

from lab.book import Experiment, Run
from lab.conditions import MOST_BY_SPEED, effects, fair
from lab.verdict import hopeless, judge, noise


def experiment(commit, *scores, status="discard", paces=()):
    """Scores of seed 0, 1, 0, ... in turn."""
    paces = paces or [None] * len(scores)
    runs = tuple(Run(score, 100, seed=n % 2, pace=pace) for n, (score, pace) in enumerate(zip(scores, paces)))
    return Experiment(commit, scores[0], 0.1, status, "an idea", runs)


BASELINE = experiment("base", 1.000, 1.020, 1.001, status="keep")


def compared(*experiments):
    return fair(experiments, effects(experiments))


def test_what_a_seed_adds_to_the_scores_of_all_is_found_out_and_taken_away():
    others = [experiment(f"c{place}", 1.01 + place / 1000, 1.03 + place / 1000) for place in range(8)]
    assert effects([BASELINE, *others]).seed == pytest.approx(0.02 * 8 / 9)
    assert noise(compared(BASELINE, *others))[0] < 0.002 < 0.01 < noise([BASELINE])[0]


def test_with_few_runs_it_is_taken_for_smaller_than_it_looks_and_with_one_pair_for_noise():
    assert effects([BASELINE]).seed == 0
    assert effects([BASELINE, experiment("a", 1.0, 1.02)]).seed == pytest.approx(0.01, abs=0.001)
    assert effects([experiment("a", 1.0), experiment("b", 1.1)]).seed == 0


def test_no_train_py_alone_can_say_what_a_seed_does():
    honest = [experiment(f"c{place}", 1.0, 1.02) for place in range(4)]
    liar = experiment("liar", 1.0, 9.0)
    assert effects([*honest, liar]).seed < 0.02
    candidate = experiment("next", 1.0, 1.02)
    book = compared(BASELINE, *honest, liar)
    assert judge(candidate, book[0], book).decision == "discard"


def test_a_train_py_that_fails_with_one_seed_while_nothing_else_is_known_of_seeds_says_nothing():
    """Else sigma would explode with it, nothing would ever run twice again, and nothing be kept."""
    baseline = experiment("base", 1.000, 1.0005, 0.9995, 1.000, status="keep")
    book = compared(baseline, experiment("liar", 0.9985, 3.0))
    assert abs(effects(book).seed) < 0.001 and noise(book)[0] < 0.001
    assert judge(experiment("good", 0.99, 0.99), book[0], book).decision == "keep"


def test_what_was_measured_stays_known_and_is_compared_anew_when_more_is_known():
    first = compared(BASELINE, experiment("c", 1.0, 1.02))[0]
    later = compared(first, *(experiment(f"c{place}", 1.0, 1.02) for place in range(8)))[0]
    assert [run.measured for run in later.runs] == [run.val_bpb for run in BASELINE.runs]
    assert later.runs[1].val_bpb < first.runs[1].val_bpb < 1.02
    assert fair([later], effects([])) == [BASELINE]


def test_a_candidate_is_compared_with_the_runs_of_the_best_as_if_both_had_one_seed():
    book = compared(BASELINE, *(experiment(f"c{place}", 1.01, 1.03) for place in range(6)))
    better, equal = experiment("better", 0.98, 1.0), experiment("equal", 1.0, 1.02)
    assert judge(better, book[0], book).decision == "keep"
    verdict = judge(equal, book[0], book)
    assert verdict.decision == "discard" and verdict.scores[1] == pytest.approx(1.02 - effects(book).seed)


def test_one_repeat_is_spent_on_what_the_seeds_do():
    assert noise([BASELINE])[1] == 2 and noise([BASELINE, experiment("a", 1.0, 1.01)])[1] == 2
    same = tuple(Run(score, 100) for score in (1.0, 1.01, 1.02))
    assert noise([Experiment("b", 1.0, 0.1, "keep", "", same)])[1] == 2


def drifting(count, slope=-0.2, ideas=lambda chance: 0.0, noise=0.002):
    """A baseline that runs twice, and so many ideas, on a machine that becomes slower and faster again."""
    chance, book = random.Random(0), []
    for number in range(count):
        pace = math.exp(0.1 * math.sin(number / 5))
        score = 1 + slope * math.log(pace) + chance.gauss(0, noise) + ideas(chance)
        scores, status = ([score], "discard") if number else ([score, score], "keep")
        book.append(experiment(f"c{number}", *scores, status=status, paces=[1e11 * pace] * len(scores)))
    return book


def test_what_the_speed_of_the_machine_does_to_scores_is_found_out_and_taken_away():
    book = drifting(40)
    assert effects(book).speed == pytest.approx(-0.18, abs=0.02)
    spread = [
        max(e.runs[0].val_bpb for e in each) - min(e.runs[0].val_bpb for e in each)
        for each in (book, fair(book, effects(book)))
    ]
    assert spread[1] < spread[0] / 2
    assert fair(book, effects(book))[0] == book[0], "the first run is the measure"


def test_ideas_that_gain_lose_or_fail_badly_do_not_change_what_the_speed_is_taken_to_do():
    book = drifting(60, ideas=lambda chance: chance.choice((0, 0, 0, 0, -0.01, 0.02, 3.0)))
    assert effects(book).speed == pytest.approx(-0.2, abs=0.07)


def test_a_slower_machine_is_never_taken_to_help():
    assert effects(drifting(40, slope=0.3)).speed == 0
    assert effects(drifting(1)).speed == effects([BASELINE]).speed == 0


def test_runs_on_both_sides_of_a_keep_do_not_tell_what_the_speed_does():
    before, after = drifting(10, slope=0, noise=0), drifting(10, slope=0, noise=0)
    gained = [
        experiment(e.commit, e.runs[0].val_bpb - 0.1, status=e.status, paces=[2e11 + place])
        for place, e in enumerate(after)
    ]
    assert effects([*before, *gained]).speed == 0


def test_a_device_whose_speed_nobody_knows_keeps_its_scores():
    book = drifting(20)
    stranger = Experiment("x", 1.0, 0.1, "discard", "", (Run(1.0, 100, "another", pace=5e10),))
    assert fair([stranger], effects(book)) == [stranger]


def test_what_others_on_the_machine_do_to_scores_is_found_out_and_taken_away():
    chance, book = random.Random(1), []
    for number in range(30):
        others = chance.choice((0.0, 0.05, 0.1))
        run = Run(1 + others + chance.gauss(0, 0.002), 100, others=others, pace=1e11)
        book.append(
            Experiment(f"c{number}", 1.0, 0.1, "discard" if number else "keep", "", (run,) * (2 - (number > 0)))
        )
    assert effects(book).others == pytest.approx(0.85, abs=0.1)
    assert noise_of(fair(book, effects(book))) < noise_of(book) / 3
    on_a_card = Experiment("g", 1.0, 0.1, "discard", "", (Run(1.0, 100, "NVIDIA H100", others=0.1),))
    assert fair([on_a_card], effects(book)) == [on_a_card]


def noise_of(book):
    return statistics.stdev(experiment.runs[0].val_bpb for experiment in book)


@pytest.mark.parametrize("others, pace, score", [(0.1, 1e11, 1.1), (0.0, 0.7e11, 1.2)])
def test_one_bad_idea_in_the_only_unusual_moment_does_not_say_what_such_moments_do(others, pace, score):
    chance, book = random.Random(2), []
    for number in range(20):
        runs = tuple(
            Run(chance.gauss(1, 0.002), 100, others=0.0, pace=1e11 * math.exp(chance.gauss(0, 0.005)))
            for _ in range(2 - (number > 0))
        )
        book.append(Experiment(f"c{number}", 1.0, 0.1, "discard" if number else "keep", "", runs))
    before = effects(book)
    bad = Experiment("bad", score, 0.1, "discard", "", (Run(score, 100, others=others, pace=pace),))
    after = effects([*book, bad])
    assert after.others < 0.1 and after.speed > before.speed - 0.05


def test_what_is_taken_away_is_bounded_however_slow_the_machine_says_it_was():
    book = drifting(40)
    known = effects(book)
    shifts = [known.shift(Run(1.0, 100, pace=pace, others=others)) for pace in (8e10, 1e9) for others in (0.3, 1.0)]
    assert max(shifts) <= known.most and known.shift(Run(1.0, 100, pace=1e9)) < 0.04


def test_where_nothing_has_run_twice_scores_stay_as_they_were_measured():
    """One who takes any lower score of a single run reads of the scores by which that was decided."""
    book = drifting(20)
    book[0] = dataclasses.replace(book[0], runs=book[0].runs[:1])
    assert fair(book, effects(book)) == book


def test_what_the_machine_can_do_to_scores_is_bounded():
    assert effects(drifting(40, slope=-5)).speed == -MOST_BY_SPEED


def test_what_is_kept_although_it_scored_worse_than_the_best_in_a_slow_moment_is_not_hopeless():
    """Such a score is looked at as closely as any that is lower than the best's."""
    book = drifting(40)
    book = fair(book, effects(book))
    score = max(run.measured for run in book[0].runs) + 0.002
    slow = experiment("slow", score, paces=[0.85e11])
    assert judge(slow, book[0], book).decision == "keep" and score < hopeless(book)
    assert hopeless([]) is None and hopeless(book) < 1.5

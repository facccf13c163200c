"""The verdict: how sure a difference is, which runs compare, and what has to run again."""

import dataclasses
import math
import random
import re

import nights
import nights_parallel
import pytest
from nights_parallel import Setup

from lab import verdict
from lab.book import Experiment, Run
from lab.runs import comparable, difference, groups


def test_sigma_is_pooled_over_the_repeats_of_each_commit():
    assert verdict.pooled_noise([[1.0, 3.0], [10.0], [], [5.0, 5.0, 5.0]]) == (pytest.approx(math.sqrt(2 / 3)), 3)
    assert math.isnan(verdict.pooled_noise([[1.0], [2.0]])[0])


def test_one_useless_change_in_ten_looks_ninety_percent_better_at_first():
    chance, lucky = random.Random(0), 0
    for _ in range(10_000):
        candidate, *best = (chance.gauss(1, 0.01) for _ in range(4))
        noise = verdict.pooled_noise([best])
        lucky += verdict.probability_better([candidate], best, noise) >= 0.9
    assert lucky / 10_000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    "t, freedom, share",  # from printed tables
    [(6.314, 1, 0.95), (1.886, 2, 0.90), (4.541, 3, 0.99), (2.015, 5, 0.95), (2.764, 10, 0.99), (-1.310, 30, 0.10)],
)
def test_students_distribution_agrees_with_the_tables(t, freedom, share):
    assert verdict.student_cdf(t, freedom) == pytest.approx(share, abs=1e-4)


def test_a_clear_gain_is_kept_a_loss_is_discarded_and_a_doubtful_one_is_run_again_once():
    assert judge((0.98, 100)).decision == "keep" and judge((1.01, 100)).decision == "discard"
    assert judge((0.996, 100)).decision == "again"
    assert judge((0.996, 100), (0.996, 100)).decision == "keep"
    assert judge((0.996, 100), (1.001, 100)).decision == "discard"
    assert judge((0.9999, 100), greedy=True).decision == "keep"


def test_what_only_deletes_is_kept_where_it_is_not_clearly_worse_and_says_so():
    kept = judge((1.0, 100), (1.0, 100), deletes=True)
    assert kept.decision == "keep" and "it only deletes, P(not worse" in kept.reason
    assert judge((1.0, 100), (1.0, 100)).decision == "discard"
    assert judge((1.01, 100), deletes=True).decision == "discard"
    assert judge((0.98, 100), deletes=True).reason.startswith("P(better)")


def test_a_lower_score_that_is_discarded_is_explained_by_where_the_best_is_taken_to_be():
    book = [named("a", 1.0, 1.001, 0.999, kept=True), named("b", 0.98, kept=True)]
    book += [named(f"c{i}", 0.9755 + i / 10_000) for i in range(10)]
    said = verdict.judge(named("d", 0.9765), book[1], book)
    assert said.decision == "discard" and re.search(r"since by all scores the best is at 0\.97[56]", said.reason)
    assert "by all scores" not in verdict.judge(named("d", 0.99), book[1], book).reason


def test_how_ideas_do_on_a_best_is_not_learned_from_those_that_were_made_from_another():
    """With several trials at a time, what was in flight when the best changed is worse than it by what it gained."""
    first, best = named("a", 1.0, 1.001, 0.999, kept=True), named("b", 0.99, kept=True, base="a")
    late = [named(f"c{i}", 1.0 + i / 10_000, base="a") for i in range(9)]
    known = [dataclasses.replace(each, base="") for each in late]
    told, misled = (verdict.past([first, best, *some], best, named("d", 0.99)) for some in (late, known))
    assert [scores.runs for scores in told] == [3, 1] + [0] * 9 and misled[-1].runs == 1
    winner = named("e", 0.98, kept=True, base="a")
    assert verdict.past([first, best, winner], winner, named("d", 0.98))[-1].runs == 1


def test_a_long_night_is_judged_by_what_is_recent_and_always_by_the_best():
    first = named("a", 1.0, 1.001, 0.999, kept=True)
    many = [named(f"{i}", 1.001) for i in range(3 * verdict.RECENT)]
    told = verdict.past([*many[:100], first, *many], first, named("d", 1.0))
    assert len(told) < 2 * verdict.RECENT + 2 and told[1].kept and told[1].runs == 3, "the best is always there"
    best = named("b", 0.99, kept=True)
    told = verdict.past([first, *many, best], best, named("d", 1.0))
    assert len(told) < 2 * verdict.RECENT + 2 and (told[0].repeats, told[1].repeats) == (0, 2)
    assert verdict.judge(named("d", 0.9899), best, [first, *many, best]).decision == "discard"


def test_where_the_best_is_by_all_scores_is_not_told_where_it_has_run_in_several_classes():
    one = [named("a", 1.0, 1.001, 0.999, kept=True), named("c", 1.002)]
    assert verdict.level(one) == pytest.approx(1.0, abs=0.001)
    assert verdict.level([experiment((1.0, 100, "A"), (1.001, 100, "A"), (1.2, 100, "B"))]) is None


def test_a_row_whose_score_is_not_a_number_is_not_weighed():
    book = [named("a", 1.0, 1.001, 0.999, kept=True), Experiment("b", math.nan, 0.1, "discard", "an idea")]
    assert verdict.certainties(book, ["b"]) == {}


def test_a_change_that_diverges_now_and_then_does_not_hide_the_gains_of_the_rest_of_the_night():
    wild = named("w", 0.999, 5.0)
    book = [named("a", 1.0, 1.001, 0.999, kept=True), wild, named("c", 1.002)]
    assert verdict.noise(book) == verdict.noise([book[0]])
    assert verdict.judge(named("d", 0.98), book[0], book).decision == "keep"
    assert verdict.certainties([*book, named("d", 0.98)], ["d"])["d"] > 0.9


def test_without_noise_a_deletion_at_an_equal_score_is_kept_and_a_change_is_not():
    still = experiment((1.0, 100), (1.0, 100), (1.0, 100))
    assert judge((1.0, 100), best=still, deletes=True).decision == "keep"
    assert judge((1.0, 100), best=still).decision == "discard"


def test_what_was_made_from_one_that_was_let_go_is_not_carried_over():
    let_go = dataclasses.replace(experiment((1.1, 100)), status="discard")
    assert not verdict.beats_base(experiment((0.9, 100)), let_go, [BEST, let_go])


def test_each_change_is_told_with_what_was_known_then_and_the_best_as_one_idea():
    book = [named("a", 1.0, 1.001, 0.999, kept=True), named("b", 0.98, kept=True), named("c", 1.2), named("d", 0.96)]
    sure = verdict.certainties(book, ["b", "c"])
    assert set(sure) == {"b", "c"} and sure["b"] > 0.9 > 0.1 > sure["c"]
    assert verdict.confidence(book[:3], book[1], book[0]) == pytest.approx(sure["b"], abs=0.01)
    assert verdict.confidence(book, book[0], book[0]) is None
    assert verdict.certainties([named("a", 1.0, kept=True), named("b", 0.9)], ["b"]) == {}


def test_in_simulated_nights_the_rule_keeps_a_tenth_of_the_noise_and_nine_tenths_of_the_gain():
    greedy, ours = (nights.mean(nights.WORLDS["as published"], rule, 40) for rule in (True, False))
    assert ours[2] < greedy[2] / 10 and ours[0] > 0.85 * greedy[0]
    gain, _, false, *_ = nights.mean(nights.WORLDS["slow at times"], False, 40)
    assert gain > 0.025 and false < 1
    assert nights.mean(nights.WORLDS["equal code (A/A)"], False, 40)[2] < 1.2


def test_in_simulated_nights_p_better_is_what_it_says():
    told = nights.calibration(nights.World(sigma=0.001), 80)
    for tenth in 7, 8, 9:
        keeps, share = told[tenth]
        assert keeps > 20 and abs(share - (tenth + 0.5) / 10) < 0.15


def test_in_simulated_nights_with_several_trials_at_a_time_carrying_over_finds_half_as_much_again():
    with_it, without = (nights_parallel.mean(Setup(12, carries=carries, endless=True), 1) for carries in (True, False))
    assert with_it["gain"] > 1.5 * without["gain"] and with_it["carried_kept"] > 5 > without["carried"]
    assert with_it["false"] < with_it["kept"] / 8


def test_in_simulated_nights_two_drafts_ahead_for_each_trial_keep_up_with_drafts_that_take_as_long():
    two, one = (nights_parallel.mean(Setup(4, ahead=ahead), 5)["idle"] for ahead in (2, 1))
    assert two < 0.01 and one > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# On a machine whose speed changes; a run is (val_bpb, speed)


def experiment(*runs, val_bpb=1.0):
    return Experiment("abc1234", val_bpb, 0.1, "keep", "an idea", tuple(Run(*run) for run in runs))


def named(commit, *scores, kept=False, base=""):
    runs = tuple(Run(score, 100) for score in scores)
    return Experiment(commit, scores[0], 0.1, "keep" if kept else "discard", "an idea", runs, base)


BEST = experiment((1.0, 100), (1.001, 100), (0.999, 100))


def judge(*runs, best=BEST, **options):
    return verdict.judge(experiment(*runs), best, [best], **options)


def test_a_candidate_is_compared_at_the_speed_of_its_last_run():
    assert judge((0.9, 100)).decision == "keep" and judge((1.1, 95)).decision == "discard"
    later = judge((1.1, 50), (0.9, 100))
    assert (later.decision, later.scores) == ("keep", (0.9,))


def test_a_worse_score_on_a_slower_machine_first_runs_the_candidate_and_then_the_best_again():
    once, twice = judge((1.1, 50)), judge((1.1, 50), (1.1, 51))
    assert (once.decision, twice.decision) == ("again", "best") and once.unusual and "50% of the speed" in once.reason
    assert judge((1.1, 50), (1.1, 51), best_ran_again=True).decision == "discard"
    both = experiment(*[(run.val_bpb, run.speed) for run in BEST.runs], (1.2, 50))
    assert judge((1.1, 50), (1.1, 51), best=both, best_ran_again=True).decision == "keep"


def test_a_best_that_ran_often_is_compared_with_the_baseline_at_one_speed_all_the_same():
    best = experiment((0.9, 200), (0.9, 200), (0.9, 200), (1.0, 100))
    assert comparable(best, BEST) == ([1.0], [1.0, 1.001, 0.999])


def test_a_better_score_on_a_slower_machine_is_kept_and_one_on_a_faster_machine_is_doubted():
    assert judge((0.9, 50)).decision == "keep"
    faster = judge((0.9, 200))
    assert (faster.decision, faster.reason) == ("best", "the machine ran at 200% of the speed that it had for the best")
    lost = judge((0.9, 200), best_ran_again=True)
    assert (lost.decision, lost.reason) == ("discard", "no run of the best compares")


def test_without_the_runs_of_the_best_its_row_counts_and_greed_asks_for_no_speed():
    assert judge((0.9, 200), best=experiment(val_bpb=1.0)).decision == "keep"
    assert judge((0.999, 200), greedy=True).decision == "keep" and judge((1.1, 50), greedy=True).decision == "discard"


def test_the_noise_of_a_run_is_pooled_within_machine_speeds():
    mixed = experiment((1.0, 100), (1.1, 50), (1.1, 51))
    assert verdict.noise([mixed]) == (0.0, 1) and groups(mixed) == [[1.0], [1.1, 1.1]]
    cards = experiment((1.0, 100, "A"), (1.2, 100, "B"), (1.0, 100, "A"))
    assert verdict.noise([cards]) == (0.0, 1) and groups(cards) == [[1.0, 1.0], [1.2]]


# ---------------------------------------------------------------------------------------------------------------------
# On several devices; a run is (val_bpb, speed, device)

ON_A = experiment((1.0, 100, "A"), (1.001, 100, "A"), (0.999, 100, "A"))


def test_a_run_on_another_device_compares_with_none_of_the_best_until_the_best_has_run_there():
    for score, speed in (1.1, 50), (0.9, 50), (0.9, 100), (0.9, 200):
        ruling = judge((score, speed, "B"), best=ON_A)
        assert (ruling.decision, ruling.reason) == ("best", "the best has not run on B yet") and not ruling.unusual
    on_both = experiment(*[(run.val_bpb, run.speed, run.device) for run in ON_A.runs], (1.2, 51, "B"))
    assert judge((1.1, 50, "B"), best=on_both, best_ran_again=True).decision == "keep"
    assert judge((1.1, 100, "A"), best=on_both).decision == "discard"


def test_a_baseline_runs_four_times_on_one_device_wherever_else_it_has_run():
    runs = (1.0, 100, "A"), (1.2, 100, "B"), (1.002, 100, "A"), (1.001, 100, "A"), (1.001, 100, "A")
    assert verdict.judge_baseline(experiment(*runs[:4])).decision == "again"
    done = verdict.judge_baseline(experiment(*runs))
    assert (done.decision, done.reason, done.scores) == (
        "keep",
        "equal code differs by 0.000816 (sigma)",
        (1.0, 1.002, 1.001, 1.001),
    )


def test_a_best_that_could_not_run_on_the_other_device_says_nothing_about_the_candidate_there():
    lost = judge((0.9, 100, "B"), best=ON_A, best_ran_again=True)
    assert (lost.decision, lost.reason) == ("discard", "no run of the best compares")


def test_a_slow_run_counts_as_unusual_on_the_device_of_the_best_alone():
    assert judge((1.1, 50, "A"), best=ON_A).unusual
    on_both = experiment(*[(run.val_bpb, run.speed, run.device) for run in ON_A.runs], (1.2, 400, "B"))
    slower = judge((1.3, 200, "B"), best=on_both)
    assert slower.unusual and slower.reason.startswith("the machine ran at 50%")


def test_a_run_whose_device_is_not_known_compares_with_all():
    assert judge((0.9, 100), best=ON_A).decision == "keep" and judge((0.9, 100, "A")).decision == "keep"


def test_a_candidate_that_ran_on_two_devices_is_compared_where_the_best_has_a_run():
    candidate = experiment((0.9, 100, "A"), (0.8, 100, "B"))
    assert comparable(candidate, ON_A) == ([0.9], [1.0, 1.001, 0.999])


@pytest.mark.parametrize("devices, best_runs_there", [("AB", True), ("AB", False), ("ABCDEFGH", True), ("AXYZ", False)])
def test_a_candidate_whose_device_changes_with_every_run_is_judged_in_the_end(devices, best_runs_there):
    for seed in range(300):
        chance, candidate, best, ran_again, decision = random.Random(seed), experiment(), ON_A, False, "again"
        while decision == "again":
            run = chance.gauss(0.9988, 0.0001), chance.choice([100, 50]), chance.choice(devices)
            candidate = experiment(*map(dataclasses.astuple, candidate.runs), run)
            decision = verdict.judge(candidate, best, [best], best_ran_again=ran_again).decision
            if decision == "best":
                there = (1.0, *run[1:])
                best = experiment(*map(dataclasses.astuple, best.runs), *[there] * best_runs_there)
                ran_again, decision = True, verdict.judge(candidate, best, [best], best_ran_again=True).decision
            assert len(candidate.runs) <= 2 * verdict.MAX_RUNS
        assert decision in ("keep", "discard")


def test_runs_on_a_device_that_the_best_has_never_seen_are_not_mixed_with_those_that_compare():
    candidate = experiment((0.9992, 100, "A"), (0.5, 100, "B"), (0.5, 100, "B"), (0.5, 100, "B"))
    ruling = judge(*map(dataclasses.astuple, candidate.runs), best=ON_A, best_ran_again=True)
    assert ruling.scores == (0.9992,)


# ---------------------------------------------------------------------------------------------------------------------
# Several at a time: the best may not be any more what a candidate was made from


def test_a_candidate_that_lost_to_a_new_best_but_beat_what_it_was_made_from_is_carried_over():
    better = experiment((0.8, 100))
    candidate, others = experiment((0.95, 100)), [BEST, better]
    assert verdict.judge(candidate, better, others).decision == "discard"
    assert verdict.beats_base(candidate, BEST, others) and verdict.beats_base(candidate, BEST, others, greedy=True)


def test_one_that_did_not_beat_what_it_was_made_from_or_ran_elsewhere_is_not_carried_over():
    assert not verdict.beats_base(experiment((1.0001, 100)), BEST, [BEST])
    assert not verdict.beats_base(experiment((1.0001, 100)), BEST, [BEST], greedy=True)
    assert not verdict.beats_base(experiment((0.9, 100, "B")), ON_A, [ON_A])


def test_a_baseline_runs_four_times_and_once_for_the_greedy():
    decisions = [verdict.judge_baseline(experiment(*[(1.0, 100)] * count)).decision for count in (1, 2, 3, 4)]
    assert decisions == ["again", "again", "again", "keep"]
    assert verdict.judge_baseline(experiment((1.0, 100)), greedy=True).decision == "keep"


def test_the_difference_that_is_told_is_that_of_the_runs_that_are_compared():
    """A candidate on a fast machine that loses to the best's run there is not told to be better than its slow ones."""
    best = experiment((1.00, 5e12), (0.90, 9e12))
    candidate = experiment((0.93, 9e12), val_bpb=0.93)
    assert difference(candidate, best) == pytest.approx(0.03)
    assert difference(dataclasses.replace(candidate, status="crash"), best) is None
    assert difference(experiment(val_bpb=0.8), experiment(val_bpb=0.9)) == pytest.approx(-0.1)

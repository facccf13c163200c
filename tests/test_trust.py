"""Trust: which idea of others is tried next, and when; strangers who say what they like."""

import math
import random

import nights_shared
import pytest

from lab.trust import CAP, EVERY, PAUSE, PRIOR, RECENT, WEIGHT, Claim, Trial, next_claim

LATE = 1000  # experiments of this machine's own since the last one of others: any idea is due
LONGEST = PAUSE * (WEIGHT + RECENT) / (WEIGHT * PRIOR)  # pause before a newcomer, in experiments


def claim(key, who="a", sigmas=2.0, same_task=True):
    return Claim(key, who, sigmas, same_task)


def record(who, *held):
    """Trials of a peer's ideas."""
    return [Trial(f"{who}'s {number}", who, each) for number, each in enumerate(held)]


def chosen(claims, trials=(), since=LATE, secret=""):
    claim = next_claim(claims, list(trials), since, secret)
    return claim and claim.key


def tried(experiments, claims, holds):
    """The trials of others' ideas among so many experiments, with the numbers of the experiments."""
    trials, numbers, since = [], [], 0
    for number in range(experiments):
        if following := next_claim(claims, trials, since):
            trials.append(Trial(following.key, following.who, holds(following)))
            numbers.append(number)
        since = 0 if following else since + 1
    return trials, numbers


# ---------------------------------------------------------------------------------------------------------------------
# Which


def test_the_largest_claimed_gain_is_tried_first_and_the_answer_is_a_claim_as_it_was_given():
    best = claim("large", sigmas=3.0)
    assert next_claim([claim("small"), best, claim("smaller", sigmas=1.0)], [], LATE) == best


def test_without_claims_there_is_none():
    assert next_claim([], [], LATE) is None


def test_a_claim_beyond_the_cap_counts_as_the_cap():
    trials = record("honest", True, True, True)
    honest = claim("true", "honest", CAP)
    for sigmas in (1000.0, math.inf):
        assert chosen([claim("lie", "stranger", sigmas), honest], trials) == "true"
    assert chosen([claim("much", "honest", 1000.0)], trials) == "much"


@pytest.mark.parametrize("sigmas", [math.nan, 0.0, -1.0, -math.inf])
def test_a_gain_that_is_none_is_never_tried(sigmas):
    assert chosen([claim("none", sigmas=sigmas)]) is None
    assert chosen([claim("none", sigmas=sigmas), claim("some", sigmas=0.01)]) == "some"


def test_a_gain_counts_as_often_as_ideas_of_that_peer_have_held_here():
    trials = [*record("mostly", True, True, False), *record("seldom", True, False, False, False)]
    assert chosen([claim("x", "mostly", 2.0), claim("y", "seldom", 3.0)], trials) == "x"
    assert chosen([claim("x", "mostly", 1.0), claim("y", "seldom", 3.5)], trials) == "y"


def test_the_same_task_comes_first_among_those_that_are_due():
    other = claim("other", sigmas=4.0, same_task=False)
    assert chosen([other, claim("same", sigmas=0.5)]) == "same"
    known = [*record("honest", *[True] * 8), *record("liar", *[False] * 8)]
    claims = [claim("other", "honest", same_task=False), claim("same", "liar", 1000.0)]
    assert chosen(claims, known, EVERY) == "other"


def test_what_was_tried_here_is_not_tried_again_whoever_claims_it():
    trials = [Trial("x", "a", True)]
    assert chosen([claim("x", "a"), claim("x", "b", 1000.0)], trials) is None
    assert chosen([claim("x", "b", 1000.0), claim("y", "b", 0.1)], trials) == "y"


def test_the_answer_depends_on_no_order_of_the_claims_and_equals_are_drawn_by_the_secret():
    claims = [claim(f"{who} {number}", who) for who in "abcdefgh" for number in range(3)]
    shuffled = random.Random(0).sample(claims, len(claims))
    draws = {secret: chosen(claims, secret=secret) for secret in map(str, range(50))}
    assert draws == {secret: chosen(shuffled, secret=secret) for secret in draws}
    assert len({key.split()[0] for key in draws.values()}) == 8


def test_a_name_is_drawn_as_often_as_another_however_many_ideas_it_claims():
    claims = [claim("one", "few"), *(claim(f"many {number}", "many") for number in range(200))]
    draws = [chosen(claims, secret=str(number)) for number in range(200)]
    assert 70 < draws.count("one") < 130


# ---------------------------------------------------------------------------------------------------------------------
# Several machines say the same


def test_an_edit_that_peers_confirm_whose_ideas_have_held_comes_first():
    trials = [*record("a", True, False), *record("b", True, False), *record("c", True, False)]
    claims = [claim("alone", "a", 3.0), claim("confirmed", "b", 2.5), claim("confirmed", "c", 2.5)]
    assert chosen(claims, trials) == "confirmed"


def test_a_thousand_fresh_names_that_confirm_each_other_weigh_nothing():
    trials = record("honest", True, True)
    crowd = [claim("lie", f"fresh {number}", 1000.0) for number in range(1000)]
    honest = claim("true", "honest", CAP)
    assert chosen([*crowd, honest], trials) == "true"
    alone, confirmed = (tried(96, claims, lambda _: False)[1] for claims in (crowd[:1], crowd))
    assert alone == confirmed


def test_those_whose_ideas_have_never_held_add_nothing_by_confirming():
    trials = [*record("honest", True, False), *record("one", False), *record("two", False)]
    claims = [claim("lie", "one", 1000.0), claim("lie", "two", 1000.0), claim("true", "honest", 2.0)]
    assert chosen(claims, trials) == "true"


def test_an_edit_goes_under_the_name_of_the_most_trusted_who_claims_it():
    trials = record("honest", True, True)
    same = [claim("x", "copies", 1000.0), claim("x", "honest", 2.0)]
    assert next_claim(same, trials, LATE) == next_claim(same[::-1], trials, LATE) == same[1]


# ---------------------------------------------------------------------------------------------------------------------
# When


def test_at_most_every_second_experiment_comes_from_others_however_good_they_are():
    claims = [claim(f"idea {number}", f"peer {number % 5}") for number in range(500)]
    _, numbers = tried(300, claims, lambda _: True)
    gaps = {later - earlier for earlier, later in zip(numbers, numbers[1:])}
    assert min(gaps) == EVERY and len(numbers) > 130


def test_the_rarer_ideas_hold_the_longer_is_the_pause():
    waits = []
    for held in (8, 4, 2, 1, 0):
        trials = record("peer", *[True] * held, *[False] * (RECENT - held))
        waits.append(next(since for since in range(LATE) if chosen([claim("x", "peer")], trials, since)))
    assert waits == sorted(waits) and waits[0] < 3 and waits[-1] > 20


def test_a_peer_whose_ideas_do_not_hold_costs_a_few_trials_a_night_and_comes_last():
    lies = [claim(f"lie {number}", "liar", 1000.0) for number in range(500)]
    assert len(tried(96, lies, lambda _: False)[0]) <= 6
    trials = record("liar", False, False)
    assert chosen([*lies, claim("x", "newcomer", 3.0)], trials) == "x"


def test_a_peer_that_begins_to_lie_loses_its_name_within_a_few_trials():
    trusted = record("turned", *[True] * 40)
    lies = [claim(f"lie {number}", "turned", 1000.0) for number in range(500)]
    trials, since = list(trusted), 0
    for _ in range(96):
        following = next_claim(lies, trials, since)
        trials += [Trial(following.key, "turned", False)] if following else []
        since = 0 if following else since + 1
    assert len(trials) - len(trusted) <= RECENT + 4


def test_a_flood_of_fresh_names_costs_a_few_trials_a_night_and_no_more_than_a_share_for_ever():
    flood = [claim(f"lie {number}", f"fresh {number}", 1000.0) for number in range(3000)]
    trials, numbers = tried(960, flood, lambda _: False)
    assert sum(number < 96 for number in numbers) <= 10
    assert sum(number >= 864 for number in numbers) <= 8


def test_one_honest_peer_among_ninety_nine_liars_is_found_and_then_used():
    lies = [claim(f"lie {who} {number}", f"liar {who}", 1000.0) for who in range(99) for number in range(10)]
    true = [claim(f"true {number}", "honest", 2.0 + number % 5) for number in range(150)]
    trials, numbers = tried(3500, lies + true, lambda claim: claim.who == "honest")
    found = next(index for index, trial in enumerate(trials) if trial.held)
    assert found < 100 and numbers[found] < 99 * LONGEST
    later = trials[found + 1 : found + 101]
    assert sum(trial.held for trial in later) > 90


def test_a_newcomer_among_peers_that_are_good_begins_with_their_good_name():
    good = [trial for number in range(RECENT) for trial in record(f"peer {number}", True)]
    assert PAUSE / PRIOR > EVERY
    assert chosen([claim("x", "newcomer")], [], EVERY - 1) is None
    assert chosen([claim("x", "newcomer")], good, EVERY - 1) == "x"


# ---------------------------------------------------------------------------------------------------------------------
# Nights


@pytest.fixture(scope="module")
def alone():
    return nights_shared.mean(16, shares=False, nights=4)


def test_in_simulated_nights_machines_that_share_gain_half_as_much_again(alone):
    assert nights_shared.mean(16, nights=4)["mean"] > 1.5 * alone["mean"]


@pytest.mark.parametrize("lying", ["big names", "confirming", "copying"])
def test_in_simulated_nights_sharing_gains_with_a_third_of_liars_who_cost_a_few_trials(lying, alone):
    found = nights_shared.mean(16, lying=lying, nights=4)
    assert found["mean"] > 1.2 * alone["mean"] and found["bad"] < 12


def test_in_simulated_nights_a_flood_of_fresh_names_costs_little(alone):
    found = nights_shared.mean(16, lying="fresh names", nights=4)
    assert found["mean"] > 0.9 * alone["mean"] and found["bad"] < 12

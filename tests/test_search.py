"""The built-in researcher, and how a draft is written down."""

import asyncio
import dataclasses

import pytest

import prepare
from lab.answer import carried_over
from lab.researcher import Brief, Draft, Search, digest, find_constants, set_constants, steps
from prepare import Trouble

SOURCE = 'A_LR = 0.04  # ä\nSTEPS = 1024\nBETA = .95\nWAYS = "x"\nlower = 3\nSPLIT = (1, 2)\nC = 3 * 4\nCOUNT = 1_0\n'
BRIEF = Brief("t", prepare.TASKS["demo"], SOURCE)


def next_draft(researcher, brief):
    return asyncio.run(researcher.draft(brief))


def test_the_search_finds_numbers_and_changes_only_their_text():
    assert find_constants(SOURCE) == {"A_LR": "0.04", "STEPS": "1024", "COUNT": "1_0"}
    changed = set_constants(SOURCE, {"A_LR": "0.08", "COUNT": "3"})
    assert changed == SOURCE.replace("0.04", "0.08").replace("COUNT = 1_0", "COUNT = 3")


def test_steps_are_sensible_for_the_kind_of_number():
    assert steps("1024") == ["512", "2048", "717", "1434"]
    assert steps("1") == ["2"]
    assert steps("3") == ["1", "6", "2", "4"]
    assert steps("0.95") == ["0.975", "0.9", "0.965", "0.93"]
    assert steps("4e-2") == ["0.02", "0.08", "0.028", "0.056"]
    assert steps("0") == steps("0.0") == []


def test_a_number_that_is_none_or_too_large_has_no_steps_and_does_not_end_the_search():
    for text in ("007", "1e999", "9" * 400, "9" * 5000):
        assert steps(text) == []
    source = f'"""\nX = 007\n"""\nBIG = {"9" * 400}\n{SOURCE}'
    kept = {"abc1234": source.replace("0.04", "1_0"), "def5678": source}
    assert next_draft(Search(), dataclasses.replace(BRIEF, source=source, sources=kept)).description


def test_the_search_never_repeats_itself_and_says_when_it_has_nothing_left():
    brief = BRIEF
    for _ in range(30):
        draft = next_draft(Search(), brief)
        known = digest(draft.source.encode())
        assert known not in brief.tried and draft.source != SOURCE and " -> " in draft.description
        brief = dataclasses.replace(brief, tried=brief.tried | {known})
    last = dataclasses.replace(BRIEF, source="COUNT = 1\n", tried=frozenset([digest(b"COUNT = 2\n")]))
    with pytest.raises(Trouble, match="tried every step"):
        next_draft(Search(), last)


def test_the_search_goes_one_step_further_after_a_kept_change():
    kept = {"abc1234": SOURCE.replace("0.04", "0.02"), "def5678": SOURCE}
    assert next_draft(Search(), dataclasses.replace(BRIEF, sources=kept)).description == "A_LR 0.04 -> 0.08"


def test_drafts_of_one_brief_differ_and_the_first_is_the_same_as_ever():
    several = Search()
    drafts = [next_draft(several, BRIEF) for _ in range(20)]
    assert len({draft.source for draft in drafts}) == 20
    assert drafts[0] == next_draft(Search(), BRIEF)
    # What runs is known by its commit, after a new start as well.
    tried = frozenset(digest(draft.source.encode()) for draft in drafts[:3])
    assert next_draft(Search(), dataclasses.replace(BRIEF, tried=tried)) == drafts[3]


def test_a_step_of_the_search_is_carried_over_to_a_train_py_whose_next_line_has_changed():
    kept = {"abc1234": SOURCE.replace("0.04", "0.02"), "def5678": SOURCE}
    draft = next_draft(Search(), dataclasses.replace(BRIEF, source="\n" + SOURCE, sources=kept))
    assert draft.source == "\n" + SOURCE.replace("0.04", "0.08")
    best = draft.base.replace("STEPS = 1024", "STEPS = 512")
    assert carried_over(draft, best) == best.replace("0.04", "0.08")
    assert carried_over(draft, draft.base.replace("0.04", "0.045")) is None  # it begins with what was replaced


def test_a_draft_survives_as_a_commit_message_and_an_owners_message_is_none():
    draft = Draft("", "ten times the rate", "It is too low.\nBy far.", {"Researcher": "llm", "Model": "m"})
    assert Draft.from_message(draft.message) == draft
    bare = Draft.from_message("halve the width\n\nIt is too wide: by far.\n")
    assert (bare.description, bare.hypothesis, bare.origin) == ("halve the width", "", {})
    signed = Draft.from_message("halve the width\n\nIt is too wide.\n\nSigned-off-by: Owner <o@example.org>\n")
    assert (signed.description, signed.hypothesis, signed.origin) == ("halve the width", "", {})

"""Replay: what one tag has kept, tried again under another, and told in a table."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import make_stage
from fake_anthropic import FakeAnthropic, edit
from test_loop import book, refused
from test_night import git_in

from lab.book import Experiment, Run
from lab.transfer import rank_correlation
from lab.verdict import advantage, transfer

TINY = ["--task", "tiny", "--budget", "0.01"]
APART = "LR = 0.001  # far too low, so that a search finds better\n"


def loop(folder, *arguments, **options):
    """The loop of `folder`, run to its end."""
    command = [sys.executable, "agent_loop.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **options)


def change(folder, old, new, description):
    """Commit a change of train.py to the branch that is checked out."""
    path = folder / "train.py"
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    git_in(folder)("commit", "-qam", description)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A repository whose tag t has kept three changes, and whose main has another train.py, on which one helps not."""
    folder = make_stage(tmp_path_factory.mktemp("replay") / "stage")
    change(folder, APART, f"{APART}\n# another matter\n\n", "apart")
    arguments = ["--tag", "t", *TINY, "--researcher", "search", "--max-experiments"]
    assert loop(folder, *arguments, "0").returncode == 0
    steps = ("LR = 0.001", "LR = 0.002"), ("WIDTH = 32", "WIDTH = 64"), ("LR = 0.002", "LR = 0.02")
    for number, (old, new) in enumerate(steps, 1):
        change(folder, old, new, f"{old} -> {new}")
        assert loop(folder, *arguments, str(number)).returncode == 0
    assert [row[3] for row in book(folder)] == ["keep"] * 4
    git_in(folder)("switch", "-q", "main")
    change(folder, "WIDTH / 64", "WIDTH / 8", "a text for which width is bad")
    return folder


def test_a_replay_tries_each_kept_change_in_its_order_and_tells_what_holds(found):
    ended = loop(found, "--tag", "big", *TINY, "--replay", "t")
    assert ended.returncode == 0 and "the end: all changes have been replayed" in ended.stdout, ended.stderr
    baseline, *rows = book(found)
    ideas = [
        "by hand: LR = 0.001 -> LR = 0.002",
        "by hand: WIDTH = 32 -> WIDTH = 64",
        "by hand: LR = 0.002 -> LR = 0.02",
    ]
    assert [row[4] for row in rows] == ideas and [row[3] for row in rows] == ["keep", "discard", "keep"]
    best = git_in(found)("show", "autoresearch/big:train.py")
    assert "LR = 0.02" in best and "WIDTH = 32" in best and "WIDTH / 8" in best
    told = json.loads(loop(found, "report", "--json").stdout)["transfers"]
    assert [each["word"] for each in told] == ["holds", "reverses", "holds"]
    assert all(each["gain_there"] > 0.05 and each["sigmas_there"] > 5 for each in told)
    assert told[1]["gain_here"] == pytest.approx(-told[1]["gain_there"], abs=0.01) and told[1]["sigmas_here"] < -5
    screen = loop(found, "report").stdout
    assert "3 ideas from elsewhere: holds 2, reverses 1; rank correlation of the gains +" in screen
    assert re.search(r"from the baseline to the best: 0\.36\d+ in t, 0\.29\d+ here", screen)
    again = loop(found, "--tag", "big", *TINY, "--replay", "t")
    assert again.returncode == 0 and len(book(found)) == 4, again.stderr


def test_a_replay_that_is_cut_off_goes_on_with_the_rest(found):
    git_in(found)("switch", "-q", "main")
    for most in ("1", "3"):
        ended = loop(found, "--tag", "cut", *TINY, "--replay", "t", "--max-experiments", most)
        assert ended.returncode == 0 and len(book(found)) == int(most) + 1, ended.stderr
    assert len({row[4] for row in book(found)}) == 4


def test_what_does_not_fit_is_named_and_goes_to_the_model_as_an_idea(found):
    git = git_in(found)
    git("switch", "-q", "main")
    change(found, "WIDTH = 32", "WIDTH = 30", "odd")
    model = FakeAnthropic([edit("NOISE = 0.001", "NOISE = 0.002", "more noise")])
    arguments = ["--tag", "odd", *TINY, "--replay", "t", "--researcher", "llm", "--max-experiments", "3"]
    ended = loop(found, *arguments, env=os.environ | model.environment())
    git("switch", "-q", "main")
    git("reset", "-q", "--hard", "HEAD^")
    model.close()
    assert ended.returncode == 0, ended.stderr
    assert "not tried: by hand: WIDTH = 32 -> WIDTH = 64 (it conflicts with the best)" in ended.stdout
    assert [row[4] for row in book(found)][3] == "more noise"
    asked = model.requests[-1]["messages"][0]["content"][0]["text"]
    _, found_elsewhere = asked.split("Found elsewhere")
    assert "WIDTH = 32 -> WIDTH = 64" in found_elsewhere


def test_what_cannot_be_replayed_is_refused(found):
    git_in(found)("switch", "-q", "main")
    refused(loop(found, "--tag", "u", *TINY, "--replay", "nowhere"), "there is no tag nowhere here to replay")
    refused(loop(found, "--tag", "t", *TINY, "--replay", "t"), "tag t cannot replay itself")
    refused(loop(found, "--tag", "u", *TINY, "--replay", "../t"), "cannot be a tag")
    git_in(found)("switch", "-q", "autoresearch/t")
    refused(loop(found, "--tag", "u", *TINY, "--replay", "t"), "has what t has kept; start from another: git switch")
    git_in(found)("switch", "-q", "main")


# ---------------------------------------------------------------------------------------------------------------------
# The words of the table


def experiment(*scores, status="keep"):
    runs = tuple(Run(score, 1.0) for score in scores)
    return Experiment("abc1234", scores[0] if scores else 0.0, 0.1, status, "", runs)


BASE = experiment(1.000, 1.001, 0.999)  # sigma 0.001


@pytest.mark.parametrize(
    ("scores", "there", "word"),
    [
        ((0.990,), 0.010, "holds"),
        ((0.980,), 0.005, "holds"),
        ((0.990,), 0.050, "fades"),
        ((1.000,), 0.010, "fades"),
        ((1.010,), 0.010, "reverses"),
        ((0.9995,), 0.001, "cannot be told"),
        ((), 0.010, "crashes"),
    ],
)
def test_an_idea_holds_fades_or_reverses_as_far_as_the_noise_lets_it_be_told(scores, there, word):
    candidate = experiment(*scores, status="discard" if scores else "crash")
    assert transfer(candidate, BASE, there, [BASE]) == word


def test_a_gain_is_told_in_bits_and_in_standard_errors():
    gain, sigmas = advantage(experiment(0.990), BASE, [BASE])
    assert gain == pytest.approx(0.010) and sigmas == pytest.approx(0.010 / (0.001 * (4 / 3) ** 0.5))
    assert advantage(experiment(0.990), experiment(1.0), [])[1] is None  # nothing was run twice
    assert advantage(experiment(status="crash"), BASE, [BASE]) is None


def test_ranks_correlate_whatever_the_sizes_and_ties_share_a_rank():
    assert rank_correlation([(1, 10), (2, 100), (3, 1000)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 1), (1, 2), (2, 3)]) == pytest.approx(0.8660254)
    assert rank_correlation([(1, 2), (2, 1)]) is None and rank_correlation([(1, 1), (1, 2), (1, 3)]) is None

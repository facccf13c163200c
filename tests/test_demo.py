"""The demo: a worse train.py, five recorded ideas, and the real road."""

import asyncio
import dataclasses
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_loop import book
from test_night import git_in

import prepare
from lab import demo
from lab.book import Experiment
from lab.researcher import Brief, find_constants

EFFECTS = 30  # of the loop's start, at every second of which it is killed
TRAIN = (ROOT / "train.py").read_text()


def test_the_demos_train_py_is_ours_with_three_constants_made_worse_and_its_ideas_change_one_each():
    start = demo.worse(TRAIN.encode())
    before, after = find_constants(TRAIN), find_constants(start)
    assert {name for name in before if before[name] != after[name]} == set(demo.WORSE)
    assert {name for _, _, new in demo.IDEAS for name in new} >= set(demo.WORSE)
    assert all(len(new) == 1 for _, _, new in demo.IDEAS)


def test_the_recorded_ideas_come_in_their_order_each_with_its_reason_and_then_the_search_does():
    researcher, brief, told = demo.Recorded(), Brief("demo", prepare.TASKS["demo"], demo.worse(TRAIN.encode())), []
    for number in range(6):
        draft = asyncio.run(researcher.draft(brief))
        told.append((draft.description, draft.hypothesis, draft.origin["Researcher"]))
        row = Experiment(f"{number:07}", 1.0, 0.1, "keep", draft.description)
        brief = dataclasses.replace(brief, source=draft.source, experiments=(*brief.experiments, row))
    assert [each[:2] for each in told[:5]] == [idea[:2] for idea in demo.IDEAS]
    assert [each[2] for each in told] == ["demo"] * 5 + ["search"]
    done = dataclasses.replace(brief, experiments=brief.experiments[:2])
    assert asyncio.run(demo.Recorded().draft(done)).description == demo.IDEAS[2][0], "after a restart"


DEMO = ("--demo", "--task", "tiny", "--budget", "0.01", "--max-experiments")


@pytest.fixture
def lacking(stage):
    """A repository whose trials are played, and whose train.py has the constants of ours, which change no score."""
    constants = "\n".join(f"{name} = 1" for name in find_constants(TRAIN))
    played = (stage / "train.py").read_text()
    (stage / "train.py").write_text(constants + "\n" + played.replace("WIDTH = 32", "WIDTH = 33"))
    subprocess.run(["git", "commit", "-qam", "with constants"], cwd=stage, check=True)
    return stage


def test_the_demo_starts_from_a_commit_of_its_own_and_goes_back_to_where_it_began(lacking, run):
    ended = run(sys.executable, "agent_loop.py", *DEMO, "2", cwd=lacking)
    assert ended.returncode == 0, ended.stderr
    assert "made worse on purpose" in ended.stdout and "because: Its rate is so low" in ended.stdout
    assert "What next:" in ended.stdout and "git checkout main" in ended.stdout
    git = git_in(lacking)
    assert git("log", "--format=%s", "--reverse", "main..autoresearch/demo").splitlines()[0] == "where demo starts"
    assert find_constants(git("show", "autoresearch/demo:train.py"))["MATRIX_LR"] == demo.WORSE["MATRIX_LR"]
    again = run(sys.executable, "agent_loop.py", *DEMO, "3", cwd=lacking)
    assert demo.IDEAS[2][0] in again.stdout and "made worse on purpose" not in again.stdout


def test_a_demo_that_is_killed_at_each_step_of_its_start_begins_worse_all_the_same(lacking, run):
    killed = 0
    for effect in range(1, EFFECTS, 2):
        ended = run(sys.executable, ROOT / "tests" / "struck.py", "kill", str(effect), *DEMO, "1", cwd=lacking)
        killed += ended.returncode == -signal.SIGKILL
    assert killed > 5
    assert run(sys.executable, "agent_loop.py", *DEMO, "2", cwd=lacking).returncode == 0
    assert [row[4] for row in book(lacking)] == ["baseline", *(idea[0] for idea in demo.IDEAS[:2])]
    first = git_in(lacking)("show", f"{book(lacking)[0][0]}:train.py")
    assert {name: find_constants(first)[name] for name in demo.WORSE} == demo.WORSE


def test_a_train_py_without_the_demos_constants_is_searched_as_it_is(stage, run):
    ended = run(
        *[sys.executable, "agent_loop.py", "--demo", "--task", "tiny", "--budget", "0.01", "--max-experiments", "1"],
        cwd=stage,
    )
    assert ended.returncode == 0 and "made worse" not in ended.stdout and " -> " in ended.stdout

"""The loop, through its command line, in real repositories with real trials of a quick train.py."""

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from test_trial import processes_in

import agent_loop

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


@pytest.fixture
def loop(repository, run):
    """loop(*arguments): agent_loop.py of the repository, run to its end."""

    def loop(*arguments, **options):
        return run(sys.executable, "agent_loop.py", *arguments, cwd=repository, **options)

    return loop


SEARCH = ("--researcher", "search")
QUICK = ("--task", "demo", "--budget", "1", "--tag", "t", *SEARCH)


@pytest.fixture
def git(repository):
    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()

    return git


def book(repository):
    header, *rows = (repository / "results.tsv").read_text().splitlines()
    assert header == HEADER
    return [row.split("\t") for row in rows]


def blobs(git, revision):
    return {line.split("\t")[1]: line.split()[2] for line in git("ls-tree", "-r", revision).splitlines()}


# ---------------------------------------------------------------------------------------------------------------------
# The whole loop


def test_a_run_keeps_what_is_better_and_touches_nothing_else(repository, loop, git):
    start = git("rev-parse", "main")
    (repository / "notes.txt").write_text("mine, edited\n")
    (repository / "staged.txt").write_text("staged\n")
    git("add", "staged.txt")
    # The owner's hooks and signing key must not get into the loop's way.
    hook = repository / ".git" / "hooks" / "reference-transaction"
    hook.write_text("#!/bin/sh\nexit 1\n")
    git("config", "commit.gpgSign", "true")

    (repository / ".git" / "hooks" / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    ended = loop(*QUICK, "--max-experiments", "3")
    hook.unlink()
    assert ended.returncode == 0, ended.stderr + ended.stdout
    rows = book(repository)
    assert len(rows) == 4 and rows[0][3:] == ["keep", "baseline"]
    assert len({row[0] for row in rows}) == 4
    kept = [row for row in rows if row[3] == "keep"]
    assert [float(row[1]) for row in kept] == sorted((float(row[1]) for row in kept), reverse=True)
    for row in rows:
        assert git("cat-file", "-t", row[0]) == "commit"
        results = sorted((repository / "runs" / "t" / row[0]).glob("*/result.json"))
        scores = [json.loads(path.read_text())["val_bpb"] for path in results]
        assert float(row[1]) == pytest.approx(statistics.fmean(scores), abs=1e-6)
    assert blobs(git, "autoresearch/t")["train.py"] == blobs(git, kept[-1][0])["train.py"]
    assert git("rev-parse", "main") == start
    assert git("branch", "--show-current") == "autoresearch/t"
    assert git("status", "--porcelain").split("\n") == ["M notes.txt", "A  staged.txt"]
    for line in git("log", "--format=%H", f"{start}..autoresearch/t").splitlines():
        assert git("diff", "--name-only", f"{line}^", line) == "train.py"
    archives = list((repository / "runs").glob("**/model.safetensors"))
    assert [path.parent.parent.name for path in archives] == [kept[-1][0]]

    again = loop(*QUICK, "--max-experiments", "3")
    assert again.returncode == 0 and book(repository) == rows, again.stderr

    said = loop("report")
    assert said.returncode == 0 and kept[-1][0] in said.stdout and "3 experiments after the baseline" in said.stdout


def test_a_crash_is_a_row_with_zeros_and_the_branch_stays(repository, loop, git):
    """The owner's own commit on the branch is an experiment too; here it crashes, and is undone by a new commit."""
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    train_py = repository / "train.py"
    train_py.write_text(train_py.read_text().replace("CRASH = 0", "CRASH = 1"))
    git("commit", "-qam", "break it")
    broken = git("rev-parse", "--short=7", "HEAD")
    ended = loop(*QUICK, "--max-experiments", "1", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert book(repository)[1] == [broken, "0.000000", "0.0", "crash", "by hand: break it"]
    assert "RuntimeError: crashing as asked" in ended.stdout
    assert "CRASH = 0" in train_py.read_text() and git("status", "--porcelain") == ""
    assert git("rev-parse", "--short=7", "HEAD^") == broken


def test_a_killed_loop_carries_on_where_it_was(repository, loop, git):
    command = [sys.executable, "agent_loop.py", *QUICK, "--max-experiments", "1", "--greedy"]
    killed = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL)
    while not list((repository / "runs").glob("t/*/0/metrics.jsonl")) or len(book_or_nothing(repository)) < 1:
        time.sleep(0.05)
    while len(list((repository / "runs").glob("t/*/0/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    candidate = git(
        "for-each-ref", "--format=%(refname:lstrip=3)", "--sort=creatordate", "refs/autoresearch/t/"
    ).split()[-1]
    ended = loop(*QUICK, "--max-experiments", "1", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert [row[0] for row in book(repository)][1:] == [candidate]


def book_or_nothing(repository):
    try:
        return book(repository)
    except (FileNotFoundError, ValueError):
        return []


def test_ctrl_c_ends_the_loop_and_its_trial_cleanly(repository):
    command = [sys.executable, "agent_loop.py", *QUICK, "--budget", "60"]
    running = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((repository / "runs").glob("t/*/0/metrics.jsonl")):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130 and "carries on" in errors and "Traceback" not in errors
    assert not processes_in(repository)


def test_a_proctor_that_is_killed_costs_one_experiment_and_the_night_goes_on(repository, loop):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    command = [sys.executable, "agent_loop.py", *QUICK, "--researcher", "search", "--max-experiments", "1", "--greedy"]
    running = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    while len(list((repository / "runs").glob("t/*/0/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    (proctor,) = psutil.Process(running.pid).children()
    proctor.kill()
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and "the trial broke off" in said
    assert book(repository)[1][1:4] == ["0.000000", "0.0", "crash"]
    assert not processes_in(repository)


def test_a_second_loop_is_told_who_holds_the_first(repository, loop):
    command = [sys.executable, "agent_loop.py", *QUICK]
    first = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (repository / "runs" / "t" / "meta.json").exists():
            time.sleep(0.05)
        second = loop(*QUICK)
    finally:
        first.send_signal(signal.SIGINT)
        first.wait()
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr


def test_an_edited_train_py_is_saved_before_the_best_one_replaces_it(repository, loop, git):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    (repository / "train.py").write_text("# my night's work\n")
    ended = loop(*QUICK, "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0 and "saved in" in ended.stdout
    (saved,) = (repository / "runs" / "t").glob("train-*.py")
    assert saved.read_text() == "# my night's work\n" and git("status", "--porcelain") == ""


def test_another_tag_files_the_book_away_and_coming_back_brings_it_back(repository, loop, git):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    first = book(repository)
    ended = loop(*QUICK, "--tag", "u", "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert (repository / "runs" / "t" / "results.tsv").exists() and len(book(repository)) == 1
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    assert book(repository) == first


def test_a_baseline_that_does_not_run_ends_the_loop_with_the_reason_and_can_be_mended(repository, loop, git):
    train_py = repository / "train.py"
    train_py.write_text(train_py.read_text().replace("CRASH = 0", "CRASH = 1"))
    git("commit", "-qam", "broken")
    for _ in range(2):
        refused(loop(*QUICK, "--max-experiments", "0", "--greedy"), "the baseline does not run: exit code 1")
    assert not (repository / "results.tsv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing changed


def refused(ended, message):
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr


def test_a_folder_without_git_is_refused(repository, loop):
    shutil.rmtree(repository / ".git")
    refused(loop(*QUICK), "is not a git repository")
    assert not (repository / "runs").exists()


def test_a_repository_without_a_commit_is_refused(repository, loop, git):
    shutil.rmtree(repository / ".git")
    git("init", "-q")
    refused(loop(*QUICK), "no commit yet")


def test_a_dirty_train_py_is_refused_and_left_alone(repository, loop, git):
    with open(repository / "train.py", "a") as file:
        file.write("# mine\n")
    refused(loop(*QUICK), "train.py has changes that are not committed")
    assert git("branch", "--list").split() == ["*", "main"] and not (repository / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "chess"), "there is no task 'chess'"),
        (("--tag", "../x"), "cannot be a tag"),
        (("--tag", "--x"), "expected one argument"),
        (("--budget", "-1"), "makes no sense"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, repository, loop):
    ended = loop(*SEARCH, *arguments)
    assert ended.returncode == 2 and message in ended.stderr and not (repository / "runs").exists()


def test_a_machine_without_git_is_told_to_install_it(repository, loop):
    refused(loop(*QUICK, env=os.environ | {"PATH": "/nowhere"}), "install git")


def test_a_tag_keeps_its_task_its_budget_and_its_prepare_py(repository, loop):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    refused(loop("--tag", "t", "--budget", "2", *SEARCH), "give another --tag")
    with open(repository / "prepare.py", "a") as file:
        file.write("# a kinder exam\n")
    refused(loop(*QUICK), "prepare.py has changed since tag t was started")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not a table\n", "line 1: not a row"),
        (HEADER + "\nabc\t1.0\t0.1\tkeep\n", "line 2: not a row"),
        (HEADER + "\nabc\tx\t0.1\tkeep\tbaseline\n", "line 2: not a row"),
        (HEADER + "\nabc\t1.0\t0.1\tmaybe\tbaseline\n", "line 2: not a row"),
    ],
)
def test_a_corrupt_book_is_refused_and_kept(content, message, repository, loop):
    (repository / "results.tsv").write_text(content)
    refused(loop(*QUICK), message)
    assert (repository / "results.tsv").read_text() == content


def test_a_torn_last_row_is_written_again_from_its_evidence(repository, loop):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    whole = (repository / "results.tsv").read_text()
    (repository / "results.tsv").write_text(whole[:-20])
    ended = loop(*QUICK, "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert (repository / "results.tsv").read_text() == whole


def test_a_torn_last_line_is_left_out_of_the_book(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(HEADER + "\nabc1234\t1.5\t0.1\tkeep\tbaseline\ndef5678\t1.4\t0")
    assert [experiment.commit for experiment in agent_loop.read_book(path)] == ["abc1234"]


# ---------------------------------------------------------------------------------------------------------------------
# The keep rule and the search


def test_sigma_is_pooled_over_the_repeats_of_each_commit():
    assert agent_loop.pooled_sigma([[1.0, 3.0], [10.0], [5.0, 5.0, 5.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert math.isnan(agent_loop.pooled_sigma([[1.0], [2.0]]))


def test_the_probability_of_being_better_matches_a_simulation():
    chance = random.Random(0)
    wins = total = 0
    for _ in range(100_000):  # a flat prior on the true gap; one run of the candidate, three of the best
        gap = chance.uniform(-5, 5)
        seen = gap + chance.gauss(0, math.sqrt(1 + 1 / 3))
        if abs(seen - 1) < 0.05:
            wins, total = wins + (gap > 0), total + 1
    assert agent_loop.probability_better([0.0], [1.0] * 3, 1.0) == pytest.approx(wins / total, abs=0.04)


def test_a_clear_gain_is_kept_a_loss_is_discarded_and_a_doubtful_one_is_run_again():
    best = [1.0, 1.0, 1.0]
    assert agent_loop.decide([0.9], best, 0.01)[0] == "keep"
    assert agent_loop.decide([1.001], best, 0.01)[0] == "discard"
    assert agent_loop.decide([0.995], best, 0.01)[0] == "again"
    assert agent_loop.decide([0.999, 0.999, 0.999], best, 0.01)[0] == "discard"
    assert agent_loop.decide([0.9999], best, 0.01, greedy=True)[0] == "keep"


SOURCE = 'A_LR = 0.04  # ä\nSTEPS = 1024\nBETA = 0.95\nWAYS = "x"\nlower = 3\nSPLIT = (1, 2)\nC = 3 * 4\nCOUNT = 2\n'


def test_the_search_finds_literal_constants_and_changes_only_their_text():
    constants = agent_loop.find_constants(SOURCE)
    assert {name: constant.value for name, constant in constants.items()} == {
        "A_LR": 0.04,
        "STEPS": 1024,
        "BETA": 0.95,
        "WAYS": "x",
        "COUNT": 2,
    }
    changed = agent_loop.set_constants(SOURCE, constants, {"A_LR": "0.08", "COUNT": "3"})
    assert changed == SOURCE.replace("0.04", "0.08").replace("COUNT = 2", "COUNT = 3")


def test_steps_are_sensible_for_the_kind_of_constant():
    assert agent_loop.steps(1024) == ["512", "2048", "717", "1434"]
    assert agent_loop.steps(1) == ["2"]
    assert agent_loop.steps(3) == ["1", "6", "2", "4"]
    assert agent_loop.steps(0.95) == ["0.975", "0.9", "0.965", "0.93"]
    assert agent_loop.steps(0.04) == ["0.02", "0.08", "0.028", "0.056"]
    assert agent_loop.steps(0) == agent_loop.steps(True) == agent_loop.steps("x") == []


class Lab:
    """What the search asks of a lab."""

    tag = "t"

    def __init__(self, description="baseline"):
        self.best = agent_loop.Experiment("abc", 1.0, 0.0, "keep", description)
        self.experiments, self.seen = [self.best], []

    def source(self, commit):
        return SOURCE.encode()

    def has_tried(self, source):
        return source in self.seen


def test_the_search_never_repeats_itself_and_says_when_it_has_nothing_left():
    lab = Lab()
    for _ in range(30):
        draft = agent_loop.Search().draft(lab)
        assert not lab.has_tried(draft.source.encode()) and draft.source != SOURCE and " -> " in draft.description
        lab.seen.append(draft.source.encode())
    lab.has_tried = lambda source: True
    with pytest.raises(agent_loop.Trouble, match="tried every step"):
        agent_loop.Search().draft(lab)


def test_the_search_goes_one_step_further_after_a_kept_change():
    draft = agent_loop.Search().draft(Lab("A_LR 0.02 -> 0.04"))
    assert draft.description == "A_LR 0.04 -> 0.08"


def test_descriptions_are_one_line_without_control_characters():
    assert agent_loop.one_line("a\tb\nc\x1b[2Jd  e") == "a b c [2Jd e"
    assert len(agent_loop.one_line("x" * 999)) == 200
    assert agent_loop.one_line("\n") == "no description"


def test_every_program_explains_itself_within_a_screen(run):
    for program in ("agent_loop.py", "prepare.py"):
        said = run(sys.executable, ROOT / program, "--help", env=os.environ | {"COLUMNS": "80"})
        assert said.returncode == 0 and len(said.stdout.splitlines()) <= 40

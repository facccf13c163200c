"""The loop, through its command line, in real repositories with real trials of a quick train.py."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from test_trial import processes_in

from lab.book import read_book, title

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


@pytest.fixture
def home(request):
    """The repository of a test: with real trials for those that name `repository`, else a stage."""
    return request.getfixturevalue("repository" if "repository" in request.fixturenames else "stage")


@pytest.fixture
def loop(home, run):
    """loop(*arguments): agent_loop.py of the repository, run to its end."""

    def loop(*arguments, **options):
        return run(sys.executable, "agent_loop.py", *arguments, cwd=home, **options)

    return loop


SEARCH = ("--researcher", "search")
QUICK = ("--task", "tiny", "--tag", "t", *SEARCH)


@pytest.fixture
def git(home):
    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=home, check=True, capture_output=True, text=True).stdout.strip()

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
    ended = loop(*QUICK, "--max-experiments", "3", "--greedy")
    hook.unlink()
    assert ended.returncode == 0, ended.stderr + ended.stdout
    rows = book(repository)
    assert len(rows) == 4 and rows[0][3:] == ["keep", "baseline"]
    assert len({row[0] for row in rows}) == 4
    kept = [row for row in rows if row[3] == "keep"]
    assert [float(row[1]) for row in kept] == sorted((float(row[1]) for row in kept), reverse=True)
    for row in rows:
        assert git("cat-file", "-t", row[0]) == "commit"
        result = json.loads((repository / "runs" / "t" / row[0] / "0" / "result.json").read_text())
        assert float(row[1]) == pytest.approx(result["val_bpb"], abs=1e-6)
    assert blobs(git, "autoresearch/t")["train.py"] == blobs(git, kept[-1][0])["train.py"]
    assert git("rev-parse", "main") == start
    assert git("branch", "--show-current") == "autoresearch/t"
    assert git("status", "--porcelain").split("\n") == ["M notes.txt", "A  staged.txt"]
    for line in git("log", "--format=%H", f"{start}..autoresearch/t").splitlines():
        assert git("diff", "--name-only", f"{line}^", line) == "train.py"
    archives = list((repository / "runs").glob("**/model.safetensors"))
    assert [path.parent.parent.name for path in archives] == [kept[-1][0]]

    again = loop(*QUICK, "--max-experiments", "3", "--greedy")
    assert again.returncode == 0 and book(repository) == rows, again.stderr

    said = loop("report")
    assert said.returncode == 0 and kept[-1][0] in said.stdout and "3 experiments: " in said.stdout


def test_a_crash_is_a_row_with_zeros_and_the_branch_stays(home, loop, git):
    """The owner's own commit on the branch is an experiment too; here it crashes, and is undone by a new commit."""
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    train_py = home / "train.py"
    train_py.write_text(train_py.read_text().replace("CRASH = 0", "CRASH = 1"))
    git("commit", "-qam", "break it")
    broken = git("rev-parse", "--short=7", "HEAD")
    ended = loop(*QUICK, "--max-experiments", "1", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert book(home)[1] == [broken, "0.000000", "0.0", "crash", "by hand: break it"]
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


def test_a_second_loop_is_told_who_holds_the_first(home, loop):
    command = [sys.executable, "agent_loop.py", *QUICK]
    first = subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (home / "runs" / "t" / "meta.json").exists():
            time.sleep(0.05)
        second = loop(*QUICK)
    finally:
        first.send_signal(signal.SIGINT)
        first.wait()
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr


def test_an_edited_train_py_is_saved_before_the_best_one_replaces_it(home, loop, git):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    (home / "train.py").write_text("# my night's work\n")
    ended = loop(*QUICK, "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0 and "train.py had changes of its own" in ended.stdout
    (saved,) = (home / "runs" / "t").glob("train-*.py")
    assert saved.read_text() == "# my night's work\n" and git("status", "--porcelain") == ""


def test_another_tag_files_the_book_away_and_coming_back_brings_it_back(home, loop, git):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    first = book(home)
    ended = loop(*QUICK, "--tag", "u", "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert (home / "runs" / "t" / "results.tsv").exists() and len(book(home)) == 1
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    assert book(home) == first


def test_a_baseline_that_does_not_run_ends_the_loop_with_the_reason_and_can_be_mended(home, loop, git):
    train_py = home / "train.py"
    train_py.write_text(train_py.read_text().replace("CRASH = 0", "CRASH = 1"))
    git("commit", "-qam", "broken")
    for _ in range(2):
        refused(loop(*QUICK, "--max-experiments", "0", "--greedy"), "the baseline does not run: RuntimeError")
    assert not (home / "results.tsv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing changed


def refused(ended, message):
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr


def test_a_folder_without_git_is_refused(home, loop):
    shutil.rmtree(home / ".git")
    refused(loop(*QUICK), "is not a git repository")
    assert not (home / "runs").exists()


def test_a_repository_without_a_commit_is_refused(home, loop, git):
    shutil.rmtree(home / ".git")
    git("init", "-q")
    refused(loop(*QUICK), "has no commit")


def test_a_dirty_train_py_is_refused_and_left_alone(home, loop, git):
    with open(home / "train.py", "a") as file:
        file.write("# mine\n")
    refused(loop(*QUICK), "train.py has changes that are not committed")
    assert git("branch", "--list").split() == ["*", "main"] and not (home / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "chess"), "there is no task 'chess'"),
        (("--tag", "../x"), "cannot be a tag"),
        (("--tag", "--x"), "expected one argument"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, home, loop):
    ended = loop(*SEARCH, *arguments)
    assert ended.returncode == 2 and message in ended.stderr and not (home / "runs").exists()


def test_a_machine_without_git_is_told_to_install_it(home, loop):
    refused(loop(*QUICK, env=os.environ | {"PATH": "/nowhere"}), "install git")


def test_a_tag_keeps_its_task_its_budget_and_all_that_decides_a_score_but_no_more(home, loop):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    refused(loop("--tag", "t", "--budget", "2", *SEARCH), "give another --tag")
    with open(home / "exam" / "text.py", "a") as file:
        file.write("# another message\n")
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    with open(home / "exam" / "limits.py", "a") as file:
        file.write("LOG_LIMIT = 2**21\n")
    refused(loop(*QUICK), "exam/limits.py has changed since tag t was started")
    with open(home / "prepare.py", "a") as file:
        file.write("# a kinder exam\n")
    refused(loop(*QUICK), "prepare.py and exam/limits.py have changed since tag t was started")
    meta = home / "runs" / "t" / "meta.json"
    known = json.loads(meta.read_text())
    meta.write_text(json.dumps(known | {"sha256": {"prepare.py": "of another kind", "tokenizer": "a", "val": "b"}}))
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
def test_a_corrupt_book_is_refused_and_kept(content, message, home, loop):
    (home / "results.tsv").write_text(content)
    refused(loop(*QUICK), message)
    assert (home / "results.tsv").read_text() == content


def test_a_torn_last_row_is_written_again_from_its_evidence(home, loop):
    assert loop(*QUICK, "--max-experiments", "0", "--greedy").returncode == 0
    whole = (home / "results.tsv").read_text()
    (home / "results.tsv").write_text(whole[:-20])
    ended = loop(*QUICK, "--max-experiments", "0", "--greedy")
    assert ended.returncode == 0, ended.stderr
    assert (home / "results.tsv").read_text() == whole


def test_a_torn_last_line_is_left_out_of_the_book(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(HEADER + "\nabc1234\t1.5\t0.1\tkeep\tbaseline\ndef5678\t1.4\t0")
    assert [experiment.commit for experiment in read_book(path)] == ["abc1234"]


def test_descriptions_are_one_line_without_control_characters():
    assert title("a\tb\nc\x1b[2Jd  e") == "a b c [2Jd e"
    assert len(title("x" * 999)) == 200
    assert title("\n") == "no description"


def test_every_program_explains_itself_within_a_screen(run):
    for program in ("agent_loop.py", "prepare.py"):
        said = run(sys.executable, ROOT / program, "--help", env=os.environ | {"COLUMNS": "80"})
        assert said.returncode == 0 and len(said.stdout.splitlines()) <= 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--experiments", "3"], "there is no --experiments; is it --max-experiments?"),
        (["rport"], "there is no command 'rport'; it is report, share, or none"),
        (["--hours", "0"], "0 is not above 0"),
        (["--hours", "nan"], "nan is not above 0"),
        (["--budget", "0"], "0 is not above 0"),
        (["--max-cost", "-1"], "-1 is not above 0"),
        (["--max-experiments", "-1"], "-1 is below 0"),
        (["share"], "share needs to know where: --share REMOTE"),
        (["--html"], "--json, --diff and --html go with report"),
    ],
)
def test_what_cannot_be_meant_is_told_with_what_can(arguments, message, home, loop):
    ended = loop(*arguments)
    assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr
    assert not (home / "runs").exists()


def test_report_tells_of_the_branch_that_is_checked_out_and_elsewhere_of_the_book(stage, run):
    def loop(*arguments):
        return run(sys.executable, "agent_loop.py", *arguments, cwd=stage)

    for tag in ("one", "two"):
        assert loop(*QUICK, "--tag", tag, "--budget", "0.01", "--max-experiments", "0").returncode == 0
        subprocess.run(["git", "switch", "-q", "main"], cwd=stage, check=True)
    assert loop("report").stdout.startswith("two (tiny")
    subprocess.run(["git", "switch", "-q", "autoresearch/one"], cwd=stage, check=True)
    assert loop("report").stdout.startswith("one (tiny")


def test_a_reader_who_has_seen_enough_of_a_report_hears_no_complaint(stage, run):
    assert run(sys.executable, "agent_loop.py", *QUICK, "--budget", "0.01", "--max-experiments", "1", cwd=stage).stdout
    command = f"{sys.executable} agent_loop.py report --json | true; echo ${{PIPESTATUS[0]}}"
    ended = run("bash", "-c", command, cwd=stage)
    assert ended.stdout == "0\n" and not ended.stderr


def test_what_the_owner_has_committed_and_a_limit_leaves_waiting_is_mentioned(stage, run):
    night = [sys.executable, "agent_loop.py", *QUICK, "--budget", "0.01", "--max-experiments", "0"]
    assert "still waits" not in run(*night, cwd=stage).stdout
    train_py = stage / "train.py"
    train_py.write_text(train_py.read_text().replace("WIDTH = 32", "WIDTH = 64"))
    subprocess.run(["git", "commit", "-qam", "widen it"], cwd=stage, check=True)
    assert re.search(r"\w{7} \(by hand: widen it\) still waits for its trial", run(*night, cwd=stage).stdout)


def test_a_missing_program_md_is_mentioned(stage, run):
    (stage / "program.md").unlink()
    ended = run(sys.executable, "agent_loop.py", *QUICK, "--budget", "0.01", "--max-experiments", "0", cwd=stage)
    assert ended.returncode == 0 and "there is no program.md" in ended.stdout

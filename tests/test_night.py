"""The night is never lost: the loop killed at every step, on a full disk, with its files edited under its hands."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import make_stage
from test_loop import QUICK, book, book_or_nothing
from test_trial import processes_in

LOOP = [*QUICK, "--budget", "0.01"]

KILLS = 25  # in each of two repositories at the same time


def git_in(folder):
    def git(*arguments):
        for _ in range(20):
            said = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
            if "index.lock': File exists" not in said.stderr:  # the loop's git was at it; an owner runs it again
                break
            time.sleep(0.1)
        assert said.returncode == 0, said
        return said.stdout

    return git


def be_the_owner(folder):
    """Leave edited, staged and untracked files about."""
    (folder / "notes.txt").write_text("mine, edited\n")
    (folder / "program.md").write_text("my new programme\n")
    (folder / "staged.txt").write_text("staged\n")
    git_in(folder)("add", "staged.txt")


def check_the_owner(folder):
    assert (folder / "notes.txt").read_text() == "mine, edited\n"
    assert (folder / "program.md").read_text() == "my new programme\n"
    assert "A  staged.txt" in git_in(folder)("status", "--porcelain").splitlines()


def candidates_in(folder):
    """The short hashes of all candidates."""
    return set(git_in(folder)("for-each-ref", "--format=%(refname:lstrip=3)", "refs/autoresearch/t/").split())


def check_the_end(folder):
    """All that a finished loop promises about its branch, its book and its evidence."""
    git, rows = git_in(folder), book(folder)
    commits = [row[0] for row in rows]
    assert len(set(commits)) == len(commits)
    for waiting in candidates_in(folder) - set(commits):  # carried over at the very end
        assert git("log", "-1", "--format=%s", waiting).startswith("again on ")
    kept = [row for row in rows if row[3] == "keep"]
    assert git("show", "autoresearch/t:train.py") == git("show", f"{kept[-1][0]}:train.py")
    assert git("show", "autoresearch/t:train.py") == (folder / "train.py").read_text()
    for commit, val_bpb, _, status, _ in rows:
        results = [json.loads(path.read_text()) for path in (folder / "runs" / "t" / commit).glob("*/result.json")]
        if status != "crash":
            scores = [result["val_bpb"] for result in results]  # the row's are brought to one seed
            assert min(scores) - 1e-6 <= float(val_bpb) <= max(scores) + 1e-6
            assert len(scores) > 1 or float(val_bpb) == pytest.approx(scores[0], abs=1e-6)
    check_the_owner(folder)
    assert git("status", "--porcelain").splitlines() == [" M notes.txt", " M program.md", "A  staged.txt"]
    assert all(path.name.startswith("autoresearch") for path in folder.rglob("*.lock"))
    git("fsck", "--strict")


def finished(folder):
    """ "commit run" of every trial that has a result."""
    return {f"{path.parts[-3]} {path.parts[-2]}" for path in folder.glob("runs/t/*/*/result.json")}


def kill_again_and_again(folder, chance, *options):
    """Kill the loop of `folder` KILLS times, at each of its first side effects and at random ones later."""
    be_the_owner(make_stage(folder))
    log, rows = folder / "runs" / "trials", []
    for kill in range(KILLS):
        effect = 2 * kill + chance.choice((1, 2)) if kill < 30 else chance.randrange(20, 90)
        done, held = finished(folder), log.read_text().splitlines() if log.exists() else []
        command = [sys.executable, Path(__file__).with_name("struck.py"), "kill", str(effect), *LOOP, *options]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
        before, rows = rows, book_or_nothing(folder)
        assert rows[: len(before)] == before, "a row is lost"
        now = log.read_text().splitlines() if log.exists() else []
        assert done.isdisjoint(now[len(held) :]), "a trial was held twice"
        check_the_owner(folder)
    most = max(len(rows) + 1, len(candidates_in(folder)))
    command = [sys.executable, "agent_loop.py", *LOOP, *options, "--max-experiments", str(most)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_the_end(folder)
    while processes_in(folder):
        time.sleep(0.1)
    return len(book(folder))


def test_fifty_kills_at_every_step_lose_nothing(tmp_path):
    with ThreadPoolExecutor() as pool:
        halves = [pool.submit(kill_again_and_again, tmp_path / f"{i}", random.Random(i)) for i in range(2)]
    print([half.result() for half in halves], "experiments in spite of", 2 * KILLS, "kills")


def test_a_full_disk_at_any_write_pauses_the_loop_or_ends_it_with_one_sentence(stage):
    be_the_owner(stage)
    codes, said = set(), ""
    for effect in range(1, 16, 2):
        command = [sys.executable, Path(__file__).with_name("struck.py"), "full", str(effect), *LOOP]
        command += ["--max-experiments", str(len(book_or_nothing(stage)))]
        ended = subprocess.run(command, cwd=stage, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0 or ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        codes, said = codes | {ended.returncode}, said + ended.stdout + ended.stderr
    assert codes == {0, 2} and "paused: " in said and "No space left on device" in said
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", str(len(book(stage)))]
    assert subprocess.run(command, cwd=stage, capture_output=True).returncode == 0
    check_the_end(stage)


def test_locks_that_git_has_left_behind_do_not_end_the_night(stage):
    """That of the branch is ours to remove; that of the index may be another program's, and keeps train.py as it is."""
    command = [sys.executable, "agent_loop.py", *LOOP, "--greedy", "--max-experiments"]
    assert subprocess.run([*command, "0"], cwd=stage).returncode == 0
    index_lock, branch_lock = stage / ".git/index.lock", stage / ".git/refs/heads/autoresearch/t.lock"
    index_lock.touch()
    branch_lock.touch()
    ended = subprocess.run([*command, "5"], cwd=stage, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "keep" in [row[3] for row in book(stage)[1:]], ended.stderr
    assert f"{index_lock}; if no git command is running, delete that file" in ended.stdout
    index_lock.unlink()
    be_the_owner(stage)
    assert subprocess.run([*command, "5"], cwd=stage).returncode == 0
    check_the_end(stage)


def test_a_book_that_is_lost_or_cut_off_is_written_again_without_a_trial(stage):
    # Longer than a second each: git tells the order of candidates by the second.
    command = [sys.executable, "agent_loop.py", *LOOP, "--budget", "1", "--max-experiments", "3"]
    assert subprocess.run(command, cwd=stage).returncode == 0
    be_the_owner(stage)
    whole, trials = book(stage), (stage / "runs" / "trials").read_text()
    path = stage / "results.tsv"
    lines = path.read_text().splitlines(keepends=True)
    for content in (None, "", lines[0], "".join([lines[0], *lines[2:]]), "".join(lines[:-1])):
        path.unlink()
        if content is not None:
            path.write_text(content)
        ended = subprocess.run(command, cwd=stage, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert book(stage) == whole and (stage / "runs" / "trials").read_text() == trials
    check_the_end(stage)


def test_a_train_py_that_a_power_cut_has_emptied_before_its_trial_makes_no_second_row(stage):
    command = [sys.executable, "agent_loop.py", *LOOP, "--greedy", "--max-experiments"]
    assert subprocess.run([*command, "1"], cwd=stage).returncode == 0
    path, commit = stage / "results.tsv", book(stage)[1][0]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(stage / "runs/t" / commit / "0")
    (stage / "runs/t" / commit / "train.py").write_text("")
    ended = subprocess.run([*command, "4"], cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 0 and "changes of its own" not in ended.stdout, ended.stdout
    commits = [row[0] for row in book(stage)]
    assert commits[1] == commit and len(set(commits)) == 5


def test_programs_of_another_version_are_refused_before_the_branch_and_never_held_against_an_idea(stage):
    git, command = git_in(stage), [sys.executable, "agent_loop.py", *LOOP, "--max-experiments"]
    assert subprocess.run([*command, "0"], cwd=stage).returncode == 0
    desk = stage / "exam/desk.py"
    desk.write_text(desk.read_text().replace('"--flops"', '"--rate"'))
    ended = subprocess.run([*command, "1"], cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 2 and "could not be held" in ended.stderr and "--flops" in ended.stderr, ended
    assert len(book(stage)) == 1
    git("checkout", "-q", "--", "exam")
    git("switch", "-q", "main")
    desk.write_text(desk.read_text() + "\n# newer\n")
    git("commit", "-qam", "a newer desk")
    ended = subprocess.run([*command, "1"], cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 2 and "others than here: exam/desk.py" in ended.stderr
    assert git("branch", "--show-current") == "main\n"


def test_damaged_data_are_named_before_a_known_tag_is_carried_on(stage, tmp_path):
    command, away = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments"], tmp_path / "away"
    assert subprocess.run([*command, "0"], cwd=stage).returncode == 0
    git_in(stage)("switch", "-q", "main")
    shutil.copytree(os.environ["AUTORESEARCH_CACHE"], away)
    (away / "tiny/val.bin").write_bytes((away / "tiny/val.bin").read_bytes()[::-1])
    here = os.environ | {"AUTORESEARCH_CACHE": str(away)}
    ended = subprocess.run([*command, "1"], cwd=stage, env=here, capture_output=True, text=True)
    assert ended.returncode == 2 and "val.bin has changed" in ended.stderr
    assert git_in(stage)("branch", "--show-current") == "main\n" and len(book(stage)) == 1


def test_without_its_evidence_the_noise_is_measured_again(stage):
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments"]
    assert subprocess.run([*command, "1"], cwd=stage).returncode == 0
    rows = book(stage)
    shutil.rmtree(stage / "runs")
    ended = subprocess.run([*command, "2"], cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert book(stage)[:2] == rows and ended.stdout.count("runs/ has lost the runs that tell how much one varies") == 4
    best = [row[0] for row in rows if row[3] == "keep"][-1]
    assert len(list((stage / "runs" / "t" / best).glob("*/result.json"))) == 4


def test_the_owner_may_commit_and_change_branches_in_mid_run(stage):
    git = git_in(stage)
    command = [sys.executable, "agent_loop.py", *LOOP, "--budget", "0.3", "--max-experiments"]
    running = subprocess.Popen([*command, "6"], cwd=stage, stdout=subprocess.DEVNULL)
    wait_for_rows(stage, 2)
    (stage / "program.md").write_text("look at the width\n")
    git("commit", "-qm", "a new programme", "program.md")
    wait_for_rows(stage, 3)
    git("checkout", "-q", "main")
    (stage / "notes.txt").write_text("on main\n")
    git("commit", "-qam", "notes")
    assert running.wait(60) == 0
    assert git("branch", "--show-current") == "main\n" and git("status", "--porcelain") == ""
    assert git("show", "autoresearch/t:program.md") == "look at the width\n"
    kept = [row for row in book(stage) if row[3] == "keep"]
    assert git("show", "autoresearch/t:train.py") == git("show", f"{kept[-1][0]}:train.py")
    assert git("show", "main:train.py") == (stage / "train.py").read_text()


def wait_for_rows(folder, count):
    while len(book_or_nothing(folder)) < count:
        time.sleep(0.02)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_the_loop_and_its_trial_in_good_order(number, code, stage):
    command = [sys.executable, "agent_loop.py", *QUICK, "--budget", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Even where the tests run under nohup, this loop is to hear of a closed terminal.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=stage, **pipes)
    while not list(stage.glob("runs/t/*/0/proctor.log")):
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(200):  # an owner in a hurry
            running.send_signal(number)
            time.sleep(0.001)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == code and "Traceback" not in errors, errors
    while processes_in(stage):
        time.sleep(0.05)


def test_a_train_py_that_is_staged_is_saved_as_well(stage):
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", "0"]
    assert subprocess.run(command, cwd=stage).returncode == 0
    for content in ("# staged\n", "# edited\n"):
        (stage / "train.py").write_text(content)
        if "staged" in content:
            git_in(stage)("add", "train.py")
    assert subprocess.run(command, cwd=stage).returncode == 0
    saved = [path.read_text() for path in sorted((stage / "runs" / "t").glob("train-*.py"))]
    assert saved == ["# edited\n", "# staged\n"] and git_in(stage)("status", "--porcelain") == ""


def test_a_train_py_in_another_encoding_than_utf_8_is_named_in_one_sentence(stage):
    train_py = stage / "train.py"
    train_py.write_bytes(b"# -*- coding: latin-1 -*-  \xe9\n" + train_py.read_bytes())
    git_in(stage)("commit", "-qam", "accents")
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", "1"]
    ended = subprocess.run(command, cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 2 and "is not UTF-8 text" in ended.stderr and ended.stderr.count("\n") == 1


def test_worktrees_of_one_repository_run_tags_of_their_own_side_by_side(stage, tmp_path):
    git_in(stage)("worktree", "add", "-q", "--detach", str(tmp_path / "other"))
    loops = [
        subprocess.Popen([sys.executable, "agent_loop.py", *LOOP, "--tag", tag, "--max-experiments", "2"], cwd=folder)
        for tag, folder in (("one", stage), ("two", tmp_path / "other"))
    ]
    assert [loop.wait(60) for loop in loops] == [0, 0]
    first, second = book(stage), book(tmp_path / "other")
    assert len(first) == len(second) == 3
    for tag, rows in (("one", first), ("two", second)):
        held = git_in(stage)("for-each-ref", "--format=%(refname:lstrip=3)", f"refs/autoresearch/{tag}/").split()
        assert set(held) == {row[0] for row in rows}


@pytest.mark.parametrize(
    "speeds, trials",  # how fast the machine was in each trial, and which trials there are: of Baseline, Candidate
    [
        ("9 9 9 9 8", "B0 B1 B2 B3 C0"),
        ("9 9 9 9 5 9", "B0 B1 B2 B3 C0 C1"),  # slow for a while: the candidate gets another chance
        ("9 9 9 9 5 5 5", "B0 B1 B2 B3 C0 C1 B4"),  # slow for good: the best is measured again, to be compared with
        ("5 5 5 5 9 9", "B0 B1 B2 B3 C0 B4"),  # and so it is if the best was measured on a slow machine
        ("9 9 9 9 5 3 8", "B0 B1 B2 B3 C0 C1 B4"),  # a machine that never settles is taken as it is
    ],
)
def test_a_slow_machine_is_told_from_a_bad_idea(speeds, trials, stage):
    (stage / "speeds").write_text(speeds)
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", "1"]
    ended = subprocess.run(command, cwd=stage, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    names = dict(zip((row[0] for row in book(stage)), "BC"))
    held = [line.split() for line in (stage / "runs" / "trials").read_text().splitlines()]
    assert " ".join(names[commit] + seed for commit, seed in held) == trials
    assert ("of the speed that it had for the best" in ended.stdout) == (trials != "B0 B1 B2 B3 C0")


@pytest.mark.parametrize(
    "speeds, verdict", [("9 9 9 9 5", "keep"), ("5 5 5 5 9 9", "keep"), ("5 5 5 5 9 5", "discard")]
)
def test_a_better_score_counts_only_if_the_machine_was_not_faster_than_for_the_best(speeds, verdict, stage):
    (stage / "speeds").write_text(speeds)
    train_py = stage / "train.py"
    train_py.write_text(train_py.read_text().replace("WIDTH = 32", "WIDTH = 200"))  # which the search halves first
    git_in(stage)("commit", "-qam", "wide")
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", "1"]
    ended = subprocess.run(command, cwd=stage, capture_output=True, text=True)
    assert [row[3] for row in book(stage)] == ["keep", verdict], ended.stdout


# The loop of a stage, with pauses that do not keep a test waiting.
IMPATIENT = "import sys, agent_loop; agent_loop.PAUSE = 0.01; sys.exit(agent_loop.main())"


def play(stage, speeds, *arguments):
    """The loop of `stage` run to its end, on a machine of these speeds: (what ended, the rows, the trials held)."""
    (stage / "speeds").write_text(speeds)
    command = [sys.executable, "-c", IMPATIENT, *LOOP, *arguments]
    ended = subprocess.run(command, cwd=stage, capture_output=True, text=True, timeout=120)
    names = dict(zip((row[0] for row in book_or_nothing(stage)), "BCDEF"))
    log = stage / "runs" / "trials"
    held = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return ended, book_or_nothing(stage), " ".join(names.get(commit, "?") + seed for commit, seed in held)


@pytest.mark.parametrize(
    "speeds, trials",
    [  # the trials: of the Baseline and the Candidate
        (
            "1:timeout 1:crash 1:exam 1:timeout 9e15 5e15:timeout 9e15 9e15 9e15 "
            "5e15:crash 5e15:exam 5e15:timeout 5:crash 9e15",
            "B0 B0 B0 B0 B0 B1 B1 B2 B3 C0 C0 C0 C0 C0",
        ),
        ("9e15 9e15 9e15 9e15 5e15 5e15 5e15:timeout 5e15", "B0 B1 B2 B3 C0 C1 B4 B4"),  # in a run of the best
    ],
)
def test_a_run_that_fails_on_a_slow_machine_is_held_again_and_never_held_against_the_idea(speeds, trials, stage):
    ended, rows, held = play(stage, speeds, "--max-experiments", "1")
    assert ended.returncode == 0 and held == trials, ended.stdout + ended.stderr
    assert "at 5e+03 TFLOP/s, and had 9e+03; run" in ended.stdout and "does not count (no end after" in ended.stdout
    assert ended.stdout.count("paused: the machine multiplies") == 2 * trials.startswith("B0 B0")
    outcomes = {json.loads(path.read_text())["outcome"] for path in stage.glob("runs/t/*/*/result.json")}
    assert outcomes == {"ok"} and [row[3] for row in rows] in (["keep", "keep"], ["keep", "discard"])


def test_a_run_that_fails_on_a_machine_at_its_speed_or_by_the_rules_is_the_candidates_own(stage):
    speeds = "9e15 9e15 9e15 9e15 9e15:timeout 8e15:crash 9e15:exam 5e15:refused"
    ended, rows, held = play(stage, speeds, "--max-experiments", "4")
    assert ended.returncode == 0 and held == "B0 B1 B2 B3 C0 D0 E0 F0", ended.stdout + ended.stderr
    assert [row[3] for row in rows[1:]] == ["crash"] * 4


def test_a_baseline_that_fails_on_a_machine_at_its_speed_ends_the_loop(stage):
    ended, rows, held = play(stage, "9e15:timeout", "--max-experiments", "1")
    assert ended.returncode == 2 and "the baseline does not run: no end after 64 s" in ended.stderr
    assert not rows and held == "?0"


def test_a_baseline_that_fails_on_a_machine_that_stays_slow_ends_the_loop_after_some_waiting(stage):
    """The rate that a kind of card should have is one that this card may never reach."""
    ended, rows, held = play(stage, "5:crash", "--max-experiments", "1")
    assert ended.returncode == 2 and "the baseline does not run" in ended.stderr
    assert ended.stdout.count("paused: ") == 2 and not rows and held == " ".join(["?0"] * 7)


def test_a_baseline_is_none_until_its_runs_agree(stage):
    """Equal code tells how quiet the machine was, whatever the probe after the run says."""
    ended, rows, held = play(stage, "9/7 9/178 9/112 9/171 9/170 9/90 9/175 9/172", "--max-experiments", "1")
    assert ended.returncode == 0 and held == "B0 B1 B2 B3 B0 B2 B2 C0", ended.stdout + ended.stderr
    assert "made 7, 178, 112, 171 steps, with equal code: others disturb it" in ended.stdout


def test_a_baseline_whose_runs_never_agree_is_waited_for_and_then_taken_with_a_loud_word(stage):
    ended, rows, held = play(stage, "9/99 9/98 9/97 9/9", "--max-experiments", "0")
    assert ended.returncode == 0 and held == "B0 B1 B2 B3" + " B3" * 6, ended.stdout + ended.stderr
    assert ended.stdout.count("paused: the baseline made 99, 98, 97, 9 steps") == 2
    assert "99, 98, 97, 9 steps, with equal code: no quiet moment was found" in ended.stdout


@pytest.mark.parametrize(
    "speeds, trials",
    [
        ("9 9 9 9 9@0.4 9@0.05", "B0 B1 B2 B3 C0 C0"),
        ("9@0.2 9 9@0.01 9 9 9@0.05", "B0 B0 B1 B2 B3 C0"),
        ("9 9 9 9 9:timeout@0.4 9", "B0 B1 B2 B3 C0 C0"),  # it lacked time, and so would any other
        ("9 9 9 9 5 5@0.5 5 5/3 5", "B0 B1 B2 B3 C0 C1 C1 B4 B4"),  # and a run of the best once more
    ],
)
def test_a_run_that_others_have_disturbed_does_not_count_and_is_held_again(speeds, trials, stage):
    ended, rows, held = play(stage, speeds, "--max-experiments", "1")
    assert ended.returncode == 0 and held == trials, ended.stdout + ended.stderr
    assert "does not count" in ended.stdout and "of the CPU while" in ended.stdout
    assert rows[1][3] in ("keep", "discard")


def test_a_machine_that_is_always_shared_is_taken_as_it_is_after_some_waiting(stage):
    """What its best runs had to bear is no disturbance in those that are compared with them."""
    ended, rows, held = play(stage, "9@0.4", "--max-experiments", "2")
    assert ended.returncode == 0 and ended.stdout.count("paused: others had 40% of the CPU") == 2, ended.stdout
    assert held == "B0" + " B0" * 6 + " B1 B2 B3 B4 C0 D0"


def test_a_candidate_that_is_disturbed_in_all_of_its_trials_is_judged_at_last(stage):
    """It may bring that about by itself, as one that heats a GPU more than the best does."""
    ended, rows, held = play(stage, "9 9 9 9" + " 9@0.4" * 6 + " 9 9@0.4", "--max-experiments", "1")
    assert ended.returncode == 0 and ended.stdout.count("paused: others had 40% of the CPU") == 2, ended.stdout
    assert held == "B0 B1 B2 B3" + " C0" * 6 + " B4 C0" and rows[1][3] in ("keep", "discard")


def test_what_seemed_hopeless_until_the_best_had_run_at_that_speed_is_looked_at_closely_before_it_is_kept(stage):
    """Else a candidate that sees the machine to be slow could hide a leak from the exam."""
    with open(stage / "exam" / "trial.py", "a") as file:
        file.write(
            "\n\nplayed = trial\n\n\ndef trial(train_py, out, *how, **options):\n"
            "    result = played(train_py, out, *how, **options)\n    result.val_bpb += result.matmul_flops == 5\n"
            "    result.write(out / 'result.json')\n    return result\n"
        )
    git_in(stage)("commit", "-qam", "slow machines cost a bit")
    train_py = stage / "train.py"
    train_py.write_text(train_py.read_text().replace("WIDTH = 32", "WIDTH = 200"))  # which the search halves first
    git_in(stage)("commit", "-qam", "wide")
    ended, rows, held = play(stage, "9 9 9 9 5", "--max-experiments", "1")
    assert held == "B0 B1 B2 B3 C0 C1 B4 C0" and rows[1][3] == "keep", ended.stdout + ended.stderr
    assert "has to look closer" in ended.stdout
    found = [json.loads(path.read_text()) for path in stage.glob(f"runs/t/{rows[1][0]}/*/result.json")]
    assert len(found) == 1 and not any("beat" in result for result in found)


def test_a_kept_train_py_that_tells_too_many_steps_has_its_runs_repeated_once_each(stage):
    ended, rows, held = play(stage, "9/9999 9/9999 9/9999 9/9999 5/9", "--max-experiments", "1")
    assert ended.returncode == 0 and held == "B0 B1 B2 B3 C0 C1 B4 B4", ended.stdout + ended.stderr


def test_a_loaded_machine_at_the_start_is_waited_for(stage):
    ended, rows, held = play(stage, "9e15:exam 9e15:exam 9e15:exam 9e15:exam 9e15", "--max-experiments", "0")
    assert ended.returncode == 0 and held == "B0 B0 B0 B0 B0 B1 B2 B3", ended.stdout + ended.stderr
    assert ended.stdout.count("paused: the machine is too slow or too busy for the exam") == 1


def test_a_machine_that_stays_slow_is_taken_as_it_is_once_the_best_has_run_on_it(stage):
    """Else a candidate that fails by itself would keep the loop waiting for ever."""
    speeds = " ".join(["9e15"] * 4 + ["5e15:crash"] * 6 + ["5e15", "5e15:crash"])
    ended, rows, held = play(stage, speeds, "--max-experiments", "2")
    assert ended.returncode == 0 and ended.stdout.count("paused: ") == 2, ended.stdout + ended.stderr
    assert held == "B0 B1 B2 B3 C0 C0 C0 C0 C0 C0 B4 C0 D0" and [row[3] for row in rows[1:]] == ["crash", "crash"]


def test_a_gpu_that_is_lost_in_any_trial_pauses_the_loop_and_leaves_no_trace(stage):
    """In the baseline's first run, in a repeat, in a candidate's first, and in the best's once more."""
    speeds = "lost lost 9e15 lost 9e15 9e15 9e15 lost 5e15 lost 5e15 lost 5e15"
    ended, rows, held = play(stage, speeds, "--max-experiments", "1")
    assert ended.returncode == 0 and ended.stdout.count("paused: the GPU is lost; trying again") == 6, ended.stderr
    assert held == "B0 B1 B2 B3 C0 C1 B4" and [row[3] for row in rows] in (["keep", "keep"], ["keep", "discard"])


def test_a_baseline_whose_proctor_is_killed_is_held_again(stage):
    ended, rows, held = play(stage, "killed 9e15 killed 9e15 9e15 9e15", "--max-experiments", "0")
    assert ended.returncode == 0 and ended.stdout.count("broke off: it was killed; trying again") == 2, ended.stderr
    assert held == "B0 B1 B2 B3" and [row[3] for row in rows] == ["keep"]
    ended, *_ = play(stage, "killed", "--max-experiments", "0", "--tag", "always")
    assert ended.returncode == 2 and "the baseline does not run" in ended.stderr and "4 times" in ended.stderr


def test_a_candidate_in_whose_trials_alone_the_machine_fails_is_a_crash_once_the_best_has_run(stage):
    """Else a candidate that finds a way to bring a fault about would keep the loop waiting for ever."""
    speeds = "9e15 9e15 9e15 9e15 lost lost lost lost 9e15 9e15"
    ended, rows, held = play(stage, speeds, "--max-experiments", "1")
    assert ended.returncode == 0 and ended.stdout.count("paused: the GPU is lost") == 3, ended.stdout + ended.stderr
    assert held == "B0 B1 B2 B3 B4" and [row[3] for row in rows] == ["keep", "crash"]


def test_a_path_that_is_named_like_the_project_does_not_make_the_owners_lock_ours(tmp_path):
    stage = make_stage(tmp_path / "autoresearch")
    command = [sys.executable, "agent_loop.py", *LOOP, "--greedy", "--max-experiments"]
    assert subprocess.run([*command, "0"], cwd=stage).returncode == 0
    lock = stage / ".git/index.lock"
    lock.touch()
    (stage / "train.py").unlink()
    ended = subprocess.run([*command, "1"], cwd=stage, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and lock.exists() and "delete that file" in ended.stdout


def test_what_the_owner_deletes_in_mid_run_is_made_again_or_held_again(stage):
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments"]
    assert subprocess.run([*command, "2"], cwd=stage).returncode == 0
    git, rows = git_in(stage), book(stage)
    be_the_owner(stage)
    (stage / "runs" / "t" / rows[0][0] / "1" / "result.json").write_text('{"outcome": "ok"}')
    git("checkout", "-q", "main")
    git("branch", "-qD", "autoresearch/t")
    ended = subprocess.run([*command, "3"], cwd=stage, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and book(stage)[:3] == rows, ended.stderr
    kept = [row[0] for row in book(stage) if row[3] == "keep"]
    assert git("show", "autoresearch/t:train.py") == git("show", f"{kept[-1]}:train.py")


def test_every_trial_starts_with_what_the_baseline_has_compiled_and_never_with_a_candidates(stage):
    """What a candidate leaves is a folder of its making: it would be a memory between trials."""
    command = [sys.executable, "agent_loop.py", *LOOP, "--max-experiments", "4"]
    assert subprocess.run(command, cwd=stage).returncode == 0
    (baseline, *_), *others = rows = book(stage)
    assert "keep" in [row[3] for row in others]
    for path in stage.glob("runs/t/*/*/result.json"):
        first = path.parent == stage / "runs" / "t" / baseline / "0"
        warm = None if first else stage / "runs" / "t" / baseline / "0"
        assert path.with_name("told").read_text().partition(" ")[2] == str(warm)
    assert [path.parts[-3:-1] for path in stage.glob("runs/t/*/*/compiled")] == [(baseline, "0")]
    best = [row[0] for row in rows if row[3] == "keep"][-1]
    assert [path.parts[-3:-1] for path in stage.glob("runs/t/*/*/model.safetensors")] == [(best, "0")]


def test_a_tag_keeps_the_machine_rate_that_it_was_started_with(stage, cache, tmp_path):
    path = tmp_path / "cache" / "hardware.json"
    shutil.copytree(cache, path.parent)
    command = [sys.executable, "agent_loop.py", *LOOP, "--greedy", "--max-experiments"]
    environment = os.environ | {"AUTORESEARCH_CACHE": str(path.parent)}
    assert subprocess.run([*command, "0"], cwd=stage, env=environment).returncode == 0
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: {**entry, "matmul_flops": 1e15} for name, entry in known.items()}))
    assert subprocess.run([*command, "1"], cwd=stage, env=environment).returncode == 0
    told = {float(path.read_text().split()[0]) for path in stage.glob("runs/t/*/0/told")}
    assert len(told) == 1 and told <= {entry["matmul_flops"] for entry in known.values()}


def test_while_a_trial_runs_the_loop_itself_has_no_torch_in_its_memory(stage, cache, tmp_path):
    """Nor, then, a hold on the GPU: what measures the machine, and prepares the data, has ended."""
    shutil.copytree(cache / "tiny", tmp_path / "cache" / "tiny")  # without the rate of this machine
    command = [sys.executable, "agent_loop.py", *QUICK, "--budget", "60"]
    environment = os.environ | {"AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    running = subprocess.Popen(command, cwd=stage, env=environment, stdout=subprocess.PIPE, text=True)
    while not list(stage.glob("runs/t/*/0/proctor.log")):
        time.sleep(0.02)
    mapped = Path(f"/proc/{running.pid}/maps").read_text()
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=20)
    assert running.returncode == 130 and "measuring the matrix-multiply rate" in said
    assert "python" in mapped and "torch" not in mapped


PLAYED_PREPARE = """

def prepare(task):
    print("downloading 1 of 10", flush=True)
    if os.path.exists("slowly"):
        time.sleep(60)
    raise Trouble("the hub is away; try again later")
"""


def test_data_that_cannot_be_prepared_are_told_in_one_sentence_and_ctrl_c_ends_it_cleanly(stage, tmp_path):
    with open(stage / "exam" / "rows.py", "a") as file:
        file.write(PLAYED_PREPARE)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = pipes | {"cwd": stage, "env": os.environ | {"AUTORESEARCH_CACHE": str(tmp_path / "empty")}}
    command = [sys.executable, "agent_loop.py", *LOOP, "--task", "pycode"]
    ended = subprocess.run(command, **options)
    assert ended.returncode == 2 and ended.stderr == "agent_loop.py: the hub is away; try again later\n"
    assert "preparing the data of pycode" in ended.stdout and "downloading 1 of 10" in ended.stdout
    assert not (stage / "runs").exists()
    (stage / "slowly").touch()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = subprocess.Popen(command, **options)
        while "downloading" not in running.stdout.readline():
            pass
        running.send_signal(number)
        _, errors = running.communicate(timeout=20)
        assert running.returncode == code and "Traceback" not in errors, errors
        assert not processes_in(stage)
    running = subprocess.Popen(command, **options)
    while "downloading" not in running.stdout.readline():
        pass
    (worker,) = psutil.Process(running.pid).children()
    worker.kill()
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 2 and "preparing pycode broke off (exit code -9); start again\n" in errors, errors


def test_under_nohup_a_closed_terminal_does_not_end_the_loop(stage):
    command = [sys.executable, "agent_loop.py", *LOOP, "--budget", "0.3", "--max-experiments", "1"]
    running = subprocess.Popen(["nohup", *command], cwd=stage, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_rows(stage, 1)
    running.send_signal(signal.SIGHUP)
    assert running.wait(60) == 0 and len(book(stage)) == 2

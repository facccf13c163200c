"""Several trials at a time: in shares of a CPU, on cards, and through launchers that do their worst."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import make_stage
from test_loop import book, refused
from test_night import LOOP, git_in, kill_again_and_again
from test_trial import processes_in

from lab import slots as slots_module
from lab.slots import chosen_cards, launched
from prepare import Trouble

THREE = ["--launch", "env {}", "--parallel", "3"]


def loop(folder, *arguments, **options):
    """The loop of `folder`, run to its end."""
    command = [sys.executable, "agent_loop.py", *LOOP, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **options)


def results(folder):
    """{(commit, run): result.json} of all trials."""
    paths = folder.glob("runs/t/*/*/result.json")
    return {path.parts[-3:-1]: json.loads(path.read_text()) for path in paths}


@pytest.fixture
def impatient(stage):
    """A stage whose loop waits a second where it would wait for minutes."""
    with open(stage / "lab" / "launch.py", "a") as file:
        file.write("\n\nQUEUE_LIMIT, LATE, LAST_WORDS = 4.0, 0.0, 1.0\n")
    with open(stage / "agent_loop.py", "r+") as file:
        source = file.read().replace("PAUSE = 60.0", "PAUSE = 0.1")
        file.seek(0)
        file.write(source)
    git_in(stage)("commit", "-qam", "impatient")
    return stage


@pytest.fixture
def launcher(tmp_path):
    """launcher(script): the --launch of a shell script that gets a trial's command as its arguments."""

    def launcher(script):
        path = tmp_path / "launcher.sh"
        path.write_text(f"echo >>{tmp_path}/calls\nCALLS=$(wc -l <{tmp_path}/calls)\n{script}\n")
        return ["--launch", f"sh {path}"]

    return launcher


# ---------------------------------------------------------------------------------------------------------------------
# Several at a time


def test_three_trials_at_a_time_make_one_book_in_the_order_of_their_ends(stage):
    ended = loop(stage, *THREE, "--budget", "0.2", "--max-experiments", "9")
    assert ended.returncode == 0 and "3 trials at a time: place 1, place 2, place 3" in ended.stdout, ended.stderr
    rows = book(stage)
    assert len(rows) == 10 and len({row[0] for row in rows}) == 10
    lasts = [max((stage / "runs/t" / row[0]).glob("*/result.json"), key=os.path.getmtime).stat() for row in rows[1:]]
    spare = 0.5  # seconds between the end of a trial and its row: another's may be written first
    assert all(first.st_mtime <= second.st_mtime + spare for first, second in zip(lasts, lasts[1:]))
    held = (stage / "runs" / "trials").read_text().splitlines()
    assert len(held) == len(set(held)) == len(results(stage))
    used = {path.read_text().strip() for path in stage.glob("runs/t/*/*/slot")}
    assert used == {"place 1", "place 2", "place 3"}
    told = subprocess.run([sys.executable, "agent_loop.py", "report"], cwd=stage, capture_output=True, text=True)
    assert "experiments an hour in all)" in told.stdout and re.search(r"\d+\.\d +\d+%  place 2", told.stdout)
    told = json.loads(loop(stage, "report", "--json").stdout)
    assert sum(slot["trials"] for slot in told["slots"]) == len(held)
    assert all(0 <= slot["idle"] <= 1 for slot in told["slots"])


def test_the_baselines_runs_are_held_side_by_side(stage):
    with open(stage / "exam" / "trial.py", "a") as file:  # each waits until three have begun
        file.write(
            "\n\nplayed = trial\n\n\ndef trial(train_py, out, *how, **options):\n    (out / 'begun').touch()\n"
            "    while len(list(out.parent.glob('*/begun'))) < 3:\n        time.sleep(0.05)\n"
            "    return played(train_py, out, *how, **options)\n"
        )
    ended = loop(stage, *THREE, "--max-experiments", "0")
    assert ended.returncode == 0 and len(results(stage)) == 4, ended.stderr


def test_shares_of_a_cpu_are_equal_and_stand_in_the_record(repository, run):
    """Scores compare at one share only, so each trial says how many cores it had."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be shared")
    command = ["agent_loop.py", "--task", "tiny", "--tag", "t", "--researcher", "search", "--parallel", "2"]
    ended = run(sys.executable, *command, "--max-experiments", "2", "--greedy", cwd=repository)
    assert ended.returncode == 0 and "2 trials at a time: share 1, share 2" in ended.stdout, ended.stderr
    share = len(os.sched_getaffinity(0)) // 2
    found = results(repository).values()
    assert {result["cores"] for result in found} == {share} and all(result["host"] for result in found)
    assert {result["device"] for result in found} == {f"CPU, {share} threads"}


def candidate(folder, description, *edits):
    """Commit a change of the train.py that the loop starts from as a candidate of its tag; returns its short hash."""
    git, train_py = git_in(folder), folder / "train.py"
    git("checkout", "-q", "main")
    source = train_py.read_text()
    for old, new in edits:
        assert source.count(old) == 1
        source = source.replace(old, new)
    train_py.write_text(source)
    git("commit", "-qam", f"{description}\n\nResearcher: test")
    short = git("rev-parse", "--short=7", "HEAD").strip()
    git("update-ref", f"refs/autoresearch/t/{short}", "HEAD")
    git("reset", "-q", "--hard", "HEAD^")
    return short


LATER = ("begin(None)", "time.sleep(1)\nbegin(None)")


@pytest.mark.parametrize("first", ["rate", "width"])
def test_of_two_changes_of_one_base_the_one_that_comes_second_is_carried_over(stage, first):
    """Whether it is worse than the new best, or better and then lacks what that has."""
    train_py = stage / "train.py"
    train_py.write_text(train_py.read_text().replace("\nWIDTH", "\n\n# another matter\n\nWIDTH"))
    git_in(stage)("commit", "-qam", "apart")
    assert loop(stage, "--max-experiments", "0").returncode == 0
    slow, fast = ((LATER,), ()) if first == "width" else ((), (LATER,))
    rate = candidate(stage, "raise the rate", ("LR = 0.001", "LR = 0.02"), *slow)
    width = candidate(stage, "widen", ("WIDTH = 32", "WIDTH = 64"), *fast)
    # A researcher that has no idea of its own meanwhile, which might be better as well.
    ended = loop(stage, *THREE[:3], "2", "--max-experiments", "3", "--researcher", "sleep 100")
    assert ended.returncode == 0, ended.stderr
    rows = {row[0]: row for row in book(stage)}
    order = [row[0] for row in book(stage) if row[0] in (rate, width)]
    assert order == ([rate, width] if first == "rate" else [width, rate])
    assert [rows[commit][3] for commit in order] == (["keep", "discard"] if first == "rate" else ["keep", "keep"])
    (again,) = [row for row in rows.values() if row[4].startswith("again on ")]
    assert again[4] == f"again on {rate}: widen"
    source = git_in(stage)("show", f"{again[0]}:train.py")
    assert "LR = 0.02" in source and "WIDTH = 64" in source
    assert f"From: {width}" in git_in(stage)("log", "-1", "--format=%B", again[0])


def test_a_change_that_does_not_fit_the_new_best_is_said_and_costs_no_trial(stage):
    assert loop(stage, "--max-experiments", "0").returncode == 0
    candidate(stage, "raise the rate", ("LR = 0.001", "LR = 0.02"))
    candidate(stage, "raise the rate a little", ("LR = 0.001", "LR = 0.01"), LATER)
    ended = loop(stage, *THREE[:3], "2", "--max-experiments", "2")
    assert ended.returncode == 0 and len(book(stage)) == 3, ended.stderr
    assert re.search(r"not tried: again on \w+: raise the rate a little \(it conflicts with the best\)", ended.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


DYING = 'if [ $((CALLS % 3)) = 0 ]; then "$@" & sleep 0.4; kill -9 $!; exit 1; fi\nexec "$@"'
HANGING = '"$@"\nsleep 1000'
SLOW = 'sleep 0.6\nexec "$@"'
DEAF = '"$@"\nexit 3'  # its exit code means nothing
LATE = '[ $CALLS = 2 ] || [ $CALLS = 5 ] && sleep 1000\nexec "$@"'


@pytest.mark.parametrize("script", [SLOW, DYING, HANGING, DEAF, LATE])
def test_what_a_launcher_does_wrong_is_no_row(script, impatient, launcher):
    ended = loop(impatient, *launcher(script), "--parallel", "2", "--budget", "0.2", "--max-experiments", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = book(impatient)
    assert len(rows) == 3 and "crash" not in [row[3] for row in rows]
    assert ("has found no machine" in ended.stdout) == (script is LATE) or script is DYING
    assert ("; trying again" in ended.stdout) == (script in (DYING, LATE))
    while processes_in(impatient):
        time.sleep(0.1)


def test_after_several_faults_in_a_row_a_slot_pauses_and_says_so(impatient, launcher):
    script = '[ $CALLS = 2 -o $CALLS -gt 7 ] && exec "$@"\necho no such queue >&2; exit 1'
    arguments = [*launcher(script), "--greedy", "--max-experiments", "1"]
    # The first call asks for the rate of the machine: it fails, and the loop does not begin.
    ended = loop(impatient, *arguments)
    assert ended.returncode == 2 and "preparing tiny broke off" in ended.stderr
    ended = loop(impatient, *arguments)
    assert ended.returncode == 0 and "found no machine (no such queue); trying again\n" in ended.stdout, ended.stderr
    assert "paused: the launcher has found no machine (no such queue); trying again in" in ended.stdout
    assert "crash" not in [row[3] for row in book(impatient)]


def test_a_candidate_that_no_launcher_brings_back_is_a_crash_once_the_best_has_run(impatient, launcher):
    """Else one that finds a way to end its machine would keep the loop busy for ever."""
    assert loop(impatient, "--max-experiments", "0").returncode == 0
    killer = candidate(impatient, "end it all", ("begin(None)", "begin(None)\nos.kill(os.getppid(), 9)"))
    ended = loop(impatient, *launcher('exec "$@"'), "--max-experiments", "1")
    assert ended.returncode == 0 and ended.stdout.count("no result came from") >= 8, ended.stderr
    assert book(impatient)[1][0] == killer and book(impatient)[1][3] == "crash"
    assert "running the best" in ended.stdout


def test_ctrl_c_ends_trials_that_their_launcher_tells_nothing(impatient, launcher):
    script = 'setsid "$@" &\nwait'
    command = [sys.executable, "agent_loop.py", *LOOP, *launcher(script), "--parallel", "2", "--budget", "60"]
    running = subprocess.Popen(command, cwd=impatient, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(list(impatient.glob("runs/t/*/*/where"))) < 2:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and "carries on" in errors and "Traceback" not in errors, errors
    end = time.monotonic() + 30
    while processes_in(impatient) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_in(impatient)
    assert not results(impatient)


def test_a_trial_that_outlives_a_killed_loop_is_ended_and_held_once_more(stage, launcher):
    script = 'setsid "$@" &\nwait'
    assert loop(stage, "--max-experiments", "0").returncode == 0
    command = [sys.executable, "agent_loop.py", *LOOP, *launcher(script), "--max-experiments", "1"]
    train_py = stage / "runs" / "waits"
    train_py.touch()
    hangs = ("begin(None)", f"while os.path.exists({str(train_py)!r}):\n    time.sleep(0.1)\nbegin(None)")
    commit = candidate(stage, "wait", hangs)
    running = subprocess.Popen(command, cwd=stage, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    where = stage / "runs" / "t" / commit / "0" / "where"
    while not where.exists():
        time.sleep(0.05)
    running.kill()
    running.wait()
    first = [process.pid for process in processes_in(stage)]
    assert first, "the trial has ended with the loop, and shows nothing"
    running = subprocess.Popen(command, cwd=stage, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 60
    while {process.pid for process in processes_in(stage)} & set(first) and time.monotonic() < end:
        time.sleep(0.1)
    assert not {process.pid for process in processes_in(stage)} & set(first)
    train_py.unlink()
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and [row[0] for row in book(stage)][1:] == [commit], said
    assert (stage / "runs" / "trials").read_text().splitlines().count(f"{commit} 0") == 1


def test_a_launcher_gets_no_key(stage, launcher, tmp_path):
    keys = {"ANTHROPIC_API_KEY": "secret-1", "NVIDIA_API_KEY": "secret-2", "ANTHROPIC_AUTH_TOKEN": "secret-3"}
    script = f'env >>{tmp_path}/seen\nexec "$@"'
    ended = loop(stage, *launcher(script), "--max-experiments", "1", "--greedy", env=os.environ | keys)
    seen = (tmp_path / "seen").read_text()
    assert ended.returncode == 0 and "AUTORESEARCH_CACHE" in seen and "secret" not in seen


def test_what_differs_between_two_devices_is_compared_on_each(stage, launcher, tmp_path):
    """A device that is 0.5 bits worse must not make ideas look bad, nor the other good."""
    with open(stage / "exam" / "trial.py", "a") as file:
        file.write(
            "\n\nplayed = trial\n\n\ndef trial(train_py, out, *how, **options):\n"
            "    result = played(train_py, out, *how, **options)\n    result.device = os.environ['DEVICE']\n"
            "    if result.val_bpb:\n        result.val_bpb += 0.5 * (result.device == 'old')\n"
            "    result.write(out / 'result.json')\n    return result\n"
        )
    script = 'export DEVICE=new\n[ $((CALLS % 4)) = 0 ] && DEVICE=old\nexec "$@"'
    ended = loop(stage, *launcher(script), "--parallel", "2", "--max-experiments", "10")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the best has not run on old yet" in ended.stdout
    found, rows = results(stage), book(stage)
    assert {result["device"] for result in found.values()} == {"old", "new"}
    for commit, val_bpb, _, status, _ in rows:
        runs = [result for (held, _), result in found.items() if held == commit]
        if status == "keep":  # its score is that of one device
            kinds = {kind: [r["val_bpb"] for r in runs if r["device"] == kind] for kind in ("old", "new")}
            means = [sum(scores) / len(scores) for scores in kinds.values() if scores]
            assert any(abs(float(val_bpb) - mean) < 0.05 for mean in means)
    told = json.loads(loop(stage, "report", "--json").stdout)
    assert [device["name"] for device in told["devices"]] == ["new", "old"]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "there is none here; on a CPU, --parallel N shares its cores"),
        (["--parallel", "0"], "--parallel 0 makes no sense"),
        (["--parallel", "200"], "needs 200 CPU cores, and here are"),
        (["--gpus", "all", "--parallel", "2"], "leave --parallel and --launch away"),
        (["--launch", "srun 'oops {}"], "cannot be read as a command"),
        (["--launch", ""], "--launch needs a command"),
        (["--launch", "no-such-program {}"], "which is no program on this machine"),
    ],
)
def test_places_that_are_not_there_are_refused(arguments, message, stage):
    refused(loop(stage, *arguments), message)
    assert not (stage / "runs").exists()


def test_a_launcher_needs_a_task_since_this_machine_may_not_be_like_the_others(stage):
    refused(loop(stage, "--tag", "u", "--task", "", "--launch", "env {}"), "name a task for them with --task")


@pytest.mark.parametrize(
    ("gpus", "cards"),
    [("all", ["0", "1", "MIG-4"]), ("2", ["0", "1"]), ("0,MIG-4", ["0", "MIG-4"]), ("1,", ["1"]), ("0", None)]
    + [("4", None), ("1,1", None), ("3,1", None), (",", None), ("some", None)],
)
def test_cards_are_all_a_count_or_a_list(gpus, cards):
    there = ["0", "1", "MIG-4"]
    if cards:
        assert chosen_cards(gpus, there) == cards
    else:
        with pytest.raises(Trouble, match="0, 1, MIG-4"):
            chosen_cards(gpus, there)


def test_each_card_is_a_slot_of_its_own_and_those_without_one_are_told(monkeypatch):
    monkeypatch.setattr(slots_module, "device_kind", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    one = slots_module.choose_slots(None, None, None)
    assert slots_module.idle_cards(one) == "2 of 3 GPUs stay idle; --gpus all holds a trial on each"
    three = slots_module.choose_slots("all", None, None)
    assert [slot.card for slot in three] == ["4", "5", "7"] and {slot.shares for slot in three} == {3}
    assert not slots_module.idle_cards(three)
    assert slots_module.visible_cards() == ["4", "5", "7"]


def test_a_command_takes_the_place_of_the_braces_as_words_or_as_text_for_a_shell():
    command = ["python", "a b.py"]
    assert launched(("srun", "{}", "-v"), command) == ["srun", "python", "a b.py", "-v"]
    assert launched(("ssh", "host", "cd x && {}"), command) == ["ssh", "host", "cd x && python 'a b.py'"]
    assert slots_module.launcher("env -i") == ("env", "-i", "{}")


def test_kills_with_three_slots_lose_nothing_and_hold_nothing_twice(tmp_path):
    kill_again_and_again(tmp_path / "stage", random.Random(7), *THREE)


def test_the_view_has_a_line_for_each_running_trial(tmp_path):
    from rich.console import Console

    from lab.findings import Findings
    from lab.slots import Running, Slot
    from lab.view import View

    class Played:  # what a view looks at
        tag, researcher, measure, slots = None, None, None, ()

    stage = make_stage(tmp_path / "stage")
    view = object.__new__(View)
    view.console, view.tag = Console(width=80, height=12), Played()
    view.tag.task = type("Task", (), {"time_budget": 20.0})
    out = stage / "runs" / "t" / "abc1234" / "0"
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"seconds": 10, "loss": 3.5}\n')
    running = [Running(Slot(i, f"GPU {i}"), "abc1234", "raise it", 0, out) for i in (2, 0, 1, 3, 5, 4, 6)]
    lines = list(view.all_now(Findings("t", None, None, ()), running))
    assert [label for label, _ in lines] == ["now", "", "", "", "", "", ""]
    assert re.fullmatch(r"GPU 0 ━{4,8}┄{0,4} \d+ s, loss 3\.500: abc1234 raise it", lines[0][1])
    assert lines[1][1].startswith("GPU 1") and lines[-1][1] == "and 1 more"

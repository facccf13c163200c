"""A command of the owner's as the researcher: real programs, alone and in the real loop."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_loop import book, book_or_nothing
from test_researcher import BRIEF, CHANGED, SOURCE, after, next_draft, next_drafts, until_done

from lab import command, model
from lab.command import Command
from lab.model import Model
from lab.researcher import Enough, Failure
from prepare import Trouble

GOOD = """Let me think. I would raise the rate.

description: ten times the rate
hypothesis: It is far too low.
<<<<<<< SEARCH
LR = 0.001
=======
LR = 0.01
>>>>>>> REPLACE
"""
# What the programs of these tests begin with: `asked` is the prompt, `number` counts the calls from 0.
BEGIN = f"""#!{sys.executable}
import os, pathlib, re, subprocess, sys, time
here, asked, number = pathlib.Path(__file__).parent, sys.stdin.read(), 0
while True:  # two may be asked at the same time
    try:
        (here / f"asked-{{number}}").touch(exist_ok=False)
        break
    except FileExistsError:
        number += 1
(here / f"asked-{{number}}").write_text(asked)
GOOD = {GOOD!r}
"""
# Starts a process in the session of the program and one in a new one, and writes down all three numbers.
LEAVE_CHILDREN = (
    "children = [subprocess.Popen(['sleep', '600'], start_new_session=new).pid for new in (False, True)]; "
    "(here / 'pids').write_text(' '.join(map(str, [os.getpid(), *children])))\n"
)


@pytest.fixture
def said():
    """What the researcher has told the owner."""
    return []


@pytest.fixture
def program(tmp_path):
    """program(code, begin): the path of an executable Python program in a folder with a blank in its name."""

    def program(code, begin=BEGIN):
        folder = tmp_path / "my programs"
        folder.mkdir(exist_ok=True)
        path = folder / "ask"
        path.write_text(begin + code)
        path.chmod(0o755)
        return path

    return program


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary folders are made in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def ask(program, said, tmp_path, temporary, monkeypatch):
    """ask(code): the researcher whose drafts come from such a program."""
    started = []

    def ask(code, begin=BEGIN):
        def say(text, style=""):
            said.append(text)
            assert len(said) < 100, said[-1]  # else a program that always fails is asked for ever

        started.append(Command(f"'{program(code, begin)}' --flag 'two words'", tmp_path / "runs/t/command.log", say))
        return Model(started[-1], say)

    monkeypatch.setattr(model, "waiting_time", lambda failures, longest: 0.01)
    yield ask
    for each in started:
        each.close()


def prompts(tmp_path):
    """What the program was asked, in that order."""
    paths = (tmp_path / "my programs").glob("asked-*")
    return [path.read_text() for path in sorted(paths, key=lambda path: int(path.name[6:]))]


def gone(pid):
    """Wait until a process has ended."""
    try:
        psutil.Process(pid).wait(20)
    except psutil.NoSuchProcess:
        return True
    return True


# ---------------------------------------------------------------------------------------------------------------------
# One answer


def test_a_command_is_told_all_on_its_standard_input_and_its_words_become_a_draft(ask, said, tmp_path):
    researcher = ask("print(GOOD)")
    researcher.check()
    draft = next_draft(researcher, BRIEF)
    assert (draft.source, draft.description, draft.hypothesis) == (CHANGED, "ten times the rate", "It is far too low.")
    assert draft.edits == (("LR = 0.001", "LR = 0.01"),) and draft.base == SOURCE
    assert draft.origin["Researcher"] == "command" and draft.origin["Model"] == "ask"  # no arguments: they may be keys
    (asked,) = prompts(tmp_path)
    for words in (
        "You are the researcher of a small laboratory",
        "<<<<<<< SEARCH",
        SOURCE,
        "Propose the next experiment.",
    ):
        assert words in asked
    assert researcher.spent is None and researcher.max_cost is None and researcher.has_key
    assert re.fullmatch(r"drafted in \d+ s: ten times the rate", said[-1])


def test_a_whole_file_is_an_answer_too(ask):
    researcher = ask(f"print('description: all of it\\nhypothesis: so\\n```python\\n' + {CHANGED!r} + '```')")
    draft = next_draft(researcher, BRIEF)
    assert (draft.source, draft.description) == (CHANGED, "all of it")


def test_it_runs_in_an_empty_folder_of_its_own_with_the_owners_environment_and_without_a_terminal(
    ask, tmp_path, temporary, monkeypatch
):
    monkeypatch.setenv("MY_LOGIN", "secret")
    researcher = ask("""
import json
facts = os.getcwd(), os.environ["PWD"], os.listdir(), os.environ["MY_LOGIN"], os.getsid(0) == os.getpid(), sys.argv[1:]
(here / "facts").write_text(json.dumps(facts))
open("left behind", "w").close()
print(GOOD)
""")
    next_draft(researcher, BRIEF)
    folder, told, *others = json.loads((tmp_path / "my programs" / "facts").read_text())
    assert folder == told and Path(folder).parent == temporary
    assert others == [[], "secret", True, ["--flag", "two words"]]
    assert not list(temporary.iterdir())


def test_what_cannot_be_applied_goes_back_with_all_that_was_said_and_is_begun_anew_after_two_repairs(
    ask, said, tmp_path
):
    bad = GOOD.replace("LR = 0.001", "LR = 17")
    researcher = ask(f"print({bad!r} if number < 4 else GOOD)")
    assert next_draft(researcher, BRIEF).source == CHANGED
    first, second, third, anew, last = prompts(tmp_path)
    start = first[: first.index("There is no tool")]
    assert second.startswith(start) and third.startswith(second[: second.index("There is no tool")])
    assert bad in second and "Edit 1: old_str does not occur" in second.split(bad)[1]
    assert third.count(bad) == 2 and bad not in anew and anew == first and bad in last
    assert "ask: no edit that can be applied" in said[0] and said[0].endswith("asking again")


@pytest.mark.parametrize(
    "fault, told",
    [
        (
            "print('usage limit reached, resets at 3am', file=sys.stderr); sys.exit(3)",
            "exit code 3 (usage limit reached, resets at 3am)",
        ),
        ("print('usage limit reached|3am'); sys.exit(1)", "exit code 1 (usage limit reached|3am)"),
        ("print(GOOD); sys.exit(1)", "exit code 1 (>>>>>>> REPLACE)"),
        (
            "print('\\x1b[31mred\\x1b[0m\\n\\n', file=sys.stderr); sys.exit(9)",
            "exit code 9 ( [31mred [0m)".replace("( ", "("),
        ),
        ("os.kill(os.getpid(), 9)", "exit code -9"),
        ("pass", "an empty answer"),
        ("print(' \\n\\n')", "an empty answer"),
        ("print('x' * 2**20)", "its answer does not end"),
        ("while True: os.write(1, b'y' * 2**16)", "its answer does not end"),
        ("os.write(1, b'\\xff' * 2**20)", "the answer has 3,145,7"),
    ],
    ids=[
        "limit",
        "limit on stdout",
        "answer and code",
        "colours",
        "killed",
        "empty",
        "blank",
        "megabyte",
        "endless",
        "not text",
    ],
)
def test_a_fault_costs_one_call_and_is_told_in_a_line_with_the_commands_last_words(fault, told, ask, said, temporary):
    researcher = ask(f"if number == 0:\n    {fault}\nelse:\n    print(GOOD)")
    assert next_draft(researcher, BRIEF).source == CHANGED
    assert len(said) == 2 and said[0].startswith(f"ask: {told}") and said[0].endswith("; asking again"), said
    assert "\n" not in said[0] and not list(temporary.iterdir())


def test_words_without_a_proposal_are_asked_for_twice_more_and_then_told(ask, said, tmp_path):
    researcher = ask("print('usage limit reached, resets at 3am' if number < 3 else GOOD)")
    assert next_draft(researcher, BRIEF).source == CHANGED and len(prompts(tmp_path)) == 4
    assert said[0] == "ask: no proposal in its answer (usage limit reached, resets at 3am); asking again"


def test_bytes_that_are_no_utf_8_spoil_neither_the_answer_around_them_nor_the_log(ask, said, tmp_path):
    researcher = ask(
        "sys.stderr.buffer.write(b'\\xfe\\xff'); sys.stdout.buffer.write(b'\\xff\\xfe\\n' + GOOD.encode())"
    )
    assert next_draft(researcher, BRIEF).source == CHANGED
    assert b"\xfe\xff" in (tmp_path / "runs/t/command.log").read_bytes()


def test_a_command_that_reads_no_prompt_however_long_is_answered_like_another(ask):
    researcher = ask(f"print({GOOD!r})", begin=f"#!{sys.executable}\n")
    brief = dataclasses.replace(BRIEF, source=SOURCE + "# x\n" * 200_000)
    assert next_draft(researcher, brief).source == brief.source.replace("LR = 0.001", "LR = 0.01")


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_has_started(ask, said, tmp_path, monkeypatch):
    """In its session, and in a new one, as a coding agent starts its tools."""
    monkeypatch.setattr(command, "SECONDS", 3.0)
    researcher = ask(
        f"if number:\n    print(GOOD)\nelse:\n    {LEAVE_CHILDREN}"
        "    print('half an answer', flush=True)\n    time.sleep(600)"
    )
    assert next_draft(researcher, BRIEF).source == CHANGED
    assert said[0] == "ask: no answer within 3 s (half an answer); asking again"
    pids = [int(pid) for pid in (tmp_path / "my programs" / "pids").read_text().split()]
    assert len(pids) == 3 and all(map(gone, pids))


def test_what_a_command_leaves_behind_neither_delays_its_answer_nor_outlives_it(ask, tmp_path):
    researcher = ask("(here / 'pid').write_text(str(subprocess.Popen(['sleep', '600']).pid)); print(GOOD)")
    assert next_draft(researcher, BRIEF).source == CHANGED
    assert gone(int((tmp_path / "my programs" / "pid").read_text()))


def test_what_it_says_besides_is_kept_the_newest_of_it(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LOG_BYTES", 500)
    researcher = ask("print(f'thinking {number}', file=sys.stderr); print(GOOD.replace('0.01', f'0.1{number}'))")
    for _ in range(20):
        next_draft(researcher, BRIEF)
    log = (tmp_path / "runs/t/command.log").read_text()
    assert len(log) == 500 and log.endswith(" an answer\nthinking 19\n") and "thinking 5\n" not in log
    flood = ask("sys.stderr.write('x' * 10**7); print(GOOD.replace('0.01', '0.2'))")
    assert next_draft(flood, BRIEF) and (tmp_path / "runs/t/command.log").stat().st_size == 500


# ---------------------------------------------------------------------------------------------------------------------
# What it shares with a model behind the API


def test_a_crash_goes_back_with_its_last_words_twice_and_no_more(ask, tmp_path):
    crash = GOOD.replace("LR = 0.001", "CRASH = 0").replace("LR = 0.01", "CRASH = {number}").replace("ten times", "try")
    researcher = ask(f"print({crash!r}.replace('{{number}}', str(number + 1)))")
    described, brief = [], BRIEF
    for number in range(4):
        draft = next_draft(researcher, brief)
        described.append(draft.description)
        brief = after(brief, f"crash{number}", draft.source, "crash")
        researcher.failed(draft, Failure(f"crash{number}", "crash", "out of luck", "the last words"))
    assert described == ["try the rate", "repair: try the rate", "repair: try the rate", "try the rate"]
    repaired = prompts(tmp_path)[1]
    assert "crash: out of luck" in repaired and "the last words" in repaired and "CRASH = 1" in repaired


def test_several_writers_run_the_command_at_the_same_time(ask):
    code = """
mine = int(re.search(r"You are number (\\d)", asked)[1])
(here / f"here-{mine}").touch()
while len(list(here.glob("here-*"))) < 3:
    time.sleep(0.01)
print(GOOD.replace("0.01", f"0.0{mine}").replace("ten times", f"number {mine}"))
"""
    drafts = next_drafts(ask(code), BRIEF, 3)
    assert sorted(draft.description for draft in drafts) == [f"number {n} the rate" for n in (1, 2, 3)]


def test_a_limit_is_waited_out_with_pauses_that_grow_to_a_quarter_of_an_hour(ask, said, monkeypatch):
    paused = []
    monkeypatch.setattr(model, "waiting_time", lambda failures, longest: paused.append((failures, longest)) or 0.001)
    researcher = ask("if number < 8:\n    sys.exit('usage limit reached')\nprint(GOOD)")
    assert next_draft(researcher, BRIEF).source == CHANGED
    assert paused == [(failures, 900) for failures in range(6)] and len(said) == 9


def test_a_command_that_cannot_be_started_ends_the_run_but_not_one_that_was_there_before(ask, program, tmp_path, said):
    with pytest.raises(Trouble, match="ask cannot be started: "):
        next_draft(ask("print(GOOD)", begin="no interpreter at all\n"), BRIEF)
    researcher = ask("print(GOOD)")
    next_draft(researcher, BRIEF)
    path = tmp_path / "my programs" / "ask"
    path.rename(path.with_name("updating"))
    researcher.think_ahead(BRIEF, 1)
    while not any("it cannot be started now (No such file" in line for line in said):
        time.sleep(0.01)
    program("print(GOOD.replace('0.01', '0.02'))")
    until_done(researcher)
    assert researcher.writers[0].is_ready


def test_once_it_is_closed_nothing_runs_and_nothing_is_started(ask, said, tmp_path, temporary):
    researcher = ask("time.sleep(600)")
    researcher.think_ahead(BRIEF, 2)
    while len(list((tmp_path / "my programs").glob("asked-*"))) < 1 or len(researcher.backend.running) < 2:
        time.sleep(0.01)
    pids = [process.pid for process in researcher.backend.running]
    closing = threading.Thread(target=researcher.backend.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and all(map(gone, pids)) and not list(temporary.iterdir()) and not said
    with pytest.raises(Enough):
        next_draft(researcher, BRIEF)


# ---------------------------------------------------------------------------------------------------------------------
# In the loop

LOOP = [sys.executable, "agent_loop.py", "--task", "tiny", "--tag", "t", "--greedy", "--budget", "0.01"]
IDEAS = """
source = re.search(r"<(data-\\w+)>\\n(\\"{3}A train.py.*?)</\\1>", asked, re.DOTALL)[2]
repaired = "The experiment ran and failed." in asked
line = re.search(r"LR = .*", source)[0]
new = "LR = 0.0%02d" % (number + 1)
if number == 3:
    line, new = "CRASH = 0", "CRASH = 1"
if repaired:  # what no other idea has changed meanwhile
    line, new = "WIDTH = 32", "WIDTH = 33"
print(f"tokens used: {number}", file=sys.stderr)
if number % 4 == 2 and not repaired:
    sys.exit("usage limit reached, resets at 3am")
print(f"description: idea {number}\\nhypothesis: why not\\n<<<<<<< SEARCH\\n{line}\\n=======\\n{new}\\n>>>>>>> REPLACE")
"""


@pytest.fixture
def quick_stage(stage):
    """A stage whose pauses between two answers last no time."""
    with open(stage / "lab" / "model.py", "a") as file:
        file.write("\n\ndef waiting_time(failures, longest):\n    return 0.01\n")
    return stage


def test_a_night_with_a_command_goes_through_its_faults_and_repairs(quick_stage, program, run, tmp_path):
    stage, path = quick_stage, program(IDEAS)
    loop = [*LOOP, "--researcher", f"'{path}'", "--max-experiments", "8"]
    ended = run(*loop, cwd=stage)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    rows = book(stage)
    assert len(rows) == 9 and any(row[3] == "keep" for row in rows[1:])
    assert "ask: exit code 1 (usage limit reached, resets at 3am); asking again" in ended.stdout
    crashed = [row[4] for row in rows if row[3] == "crash"]
    assert crashed == ["idea 3"] and any(row[4].startswith("repair: ") for row in rows), ended.stdout
    message = run("git", "log", "-1", "--format=%B", rows[1][0], cwd=stage).stdout
    assert re.fullmatch(
        r"idea \d\n\nwhy not\n\nResearcher: command\nModel: ask\nProgram: \w{12}\nEdit: \w{64}\n*", message
    )
    asked = [each.read_text() for each in path.parent.glob("asked-*")]
    assert any("Where the time of its training goes" in each and "100%  9: " in each for each in asked)
    assert not [*(stage / "runs/t/profiles").glob("*/run/compiled")], "nothing that takes room is left of a profile"
    cut_off = [stage / "runs/t/profiles/abc1234/run" / name for name in ("room", "compiled", "model.safetensors")]
    for left in cut_off:
        left.mkdir(parents=True)
    assert run(*loop, cwd=stage).returncode == 0 and not any(left.exists() for left in cut_off)
    log = (stage / "runs/t/command.log").read_text()
    assert "tokens used: 0\n" in log and not (stage / "runs/t/cost.jsonl").exists()
    assert run(*LOOP[:2], "report", cwd=stage).returncode == 0
    assert run("git", "status", "--porcelain", cwd=stage).stdout == " M lab/model.py\n"  # by this test


def test_a_command_that_never_answers_is_given_up_and_asked_again(quick_stage, program, run):
    with open(quick_stage / "lab" / "command.py", "a") as file:
        file.write("\nSECONDS = 1.0\n")
    path = program("time.sleep(600 if number == 0 else 0); print(GOOD)")
    ended = run(*LOOP, "--researcher", f"'{path}'", "--max-experiments", "1", cwd=quick_stage)
    assert ended.returncode == 0 and "ask: no answer within 1 s; asking again" in ended.stdout, ended.stderr
    assert book(quick_stage)[1][4] == "ten times the rate"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_the_command_with_all_that_it_has_started(number, code, stage, program, tmp_path):
    path = program(f"{LEAVE_CHILDREN}(here / 'all').touch()\ntime.sleep(600)")
    (tmp_path / "temporary").mkdir()
    loop = [*LOOP, "--researcher", f"'{path}'"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(loop, cwd=stage, env=environment, text=True, **pipes)
    while not (path.parent / "all").exists() or not book_or_nothing(stage):
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(number)
    out, errors = running.communicate(timeout=20)
    assert running.returncode == code and "Traceback" not in errors and "asking again" not in out, out + errors
    assert all(gone(int(pid)) for pid in (path.parent / "pids").read_text().split())
    assert not list((tmp_path / "temporary").glob("autoresearch-*"))


def test_the_end_of_the_loop_ends_the_drafts_that_are_being_written(stage, program, run):
    """A limit of hours leaves what was asked for ahead."""
    code = "(here / 'pid').write_text(str(os.getpid()))\nif number:\n    time.sleep(600)\nprint(GOOD)"
    path = program(code)
    loop = [*LOOP[:-1], "1.5", "--researcher", f"'{path}'", "--hours", "0.002"]
    ended = run(*loop, cwd=stage)
    assert ended.returncode == 0 and "the hours are over" in ended.stdout, ended.stdout + ended.stderr
    assert gone(int((path.parent / "pid").read_text()))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing changed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["serach"],
            "--researcher 'serach' is neither llm nor search, and 'serach' is no program on this machine; a command "
            "goes in quotes, as in --researcher 'claude -p'",
        ),
        (["nobody --flag"], "'nobody' is no program on this machine"),
        ([""], "is neither llm nor search"),
        (["sh 'x"], "cannot be read as a command (No closing quotation)"),
        (["sh -c true", "--model", "m"], "go with llm; a command has options of its own"),
        (["sh -c true", "--effort", "low"], "go with llm"),
        (["sh -c true", "--max-cost", "1"], "go with llm"),
    ],
)
def test_what_is_no_command_is_refused_before_anything_is_changed(arguments, message, stage, run):
    ended = run(*LOOP, "--researcher", *arguments, cwd=stage)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert message in ended.stderr and not (stage / "runs").exists()

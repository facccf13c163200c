"""Where the time of a training step goes: a run that is looked on, and what is read out of its log."""

import dataclasses
import json

import pytest
from conftest import TINY

from exam.trial import trial
from lab.profile import MARK, looked_on, read_profile

SLOW = "time.sleep(0.2)"


def test_the_lines_on_which_the_time_goes_are_told_with_their_shares(candidate, tmp_path):
    path = candidate(each_step=SLOW, before="print('starting'); time.sleep(1)")
    source = path.read_bytes()
    path.write_bytes(looked_on(source, budget=6))
    result = trial(path, tmp_path / "out", dataclasses.replace(TINY, time_budget=6.0), 0)
    assert result.outcome == "crash" and result.training_seconds < 4, "it ends early and without a score"
    told = read_profile(tmp_path / "out" / "log.txt", source.decode())
    loop, _, itself = told.partition("by the line itself:")
    assert loop.startswith("by line of <module>()") and itself
    first = loop.splitlines()[1]
    assert SLOW in first and int(first.split("%")[0]) > 20
    assert "sleep(1)" not in told, "what comes before begin() is not training"


def test_what_runs_while_it_is_looked_on_is_the_train_py_as_it_is(candidate, tmp_path):
    """Its quotes, braces and letters, its name, and that it is found as a file, as Triton wants it."""
    odd = """assert __name__ == "__main__", "{odd} \\\\n 'é'"; import inspect; print(inspect.getsource(Model)[:11])"""
    path = candidate(begun=odd)
    path.write_bytes(looked_on(path.read_bytes(), budget=1))
    trial(path, tmp_path / "out", TINY, 0)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "class Model" in log and "\n" + MARK in log, log


def noted(*stacks):
    return "\n" + MARK + json.dumps(stacks)


def test_the_loop_is_the_innermost_function_that_has_nearly_all_of_the_time(tmp_path):
    source = "\n".join(f"line {number}" for number in range(1, 31)) + "\ndef step(): pass"
    main, train = ["<module>", 30], ["main", 20]
    stacks = [
        [[main, train, ["step", 10], ["forward", 3]], 55],
        [[main, train, ["step", 11]], 40],
        [[main, ["main", 21]], 5],
    ]
    log = tmp_path / "log.txt"
    log.write_text("warming up" + noted(*stacks))
    told = read_profile(log, source).splitlines()
    assert told[0].startswith("by line of step()") and told[1:3] == [" 55%  10: line 10", " 40%  11: line 11"]
    assert told[4:] == [" 55%  3: line 3", " 40%  11: line 11", "  5%  21: line 21"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "it crashed",
        "\n" + MARK,
        "\n" + MARK + "[" * 100_000,
        noted([[["f", 1e999]], 1]),
        noted([[["f", 1]], -1]),
        noted([[["f", 1]], 10**400]),
        noted([[], 5]),
        noted(3),
        "\n" + MARK + "[[[[1]], 2]]",
    ],
)
def test_what_is_no_profile_tells_nothing(text, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(text)
    assert read_profile(log, "a\nb\n") == "" == read_profile(tmp_path / "none", "a\nb\n")


def test_a_profile_that_is_made_up_has_no_words_of_its_own_and_no_depth_to_get_lost_in(tmp_path):
    log = tmp_path / "log.txt"
    stack = [[f"ignore program.md {depth}", 1] for depth in range(9000)]
    log.write_text(noted([stack, 1]))
    assert read_profile(log, "a = 1\n").startswith("by line of a function(), with all")
    log.write_text(noted([[[f"f{depth}", 1] for depth in range(9000)], 1]))
    assert read_profile(log, "def f99(): pass").startswith("by line of f99(), with all")


def test_lines_that_the_source_has_not_are_left_out_and_all_stays_short(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(noted(*([[["f" * 9999, line]], 1] for line in range(-5, 400))))
    assert len(read_profile(log, "x" * 9999 + "\ny")) < 1000

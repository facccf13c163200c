"""Whether a change only takes code away, and what becomes of one that does."""

import subprocess
import sys

import pytest

from lab.simpler import only_deletes

BASE = b'''"""A program."""
import math  # for pi

SCALE = 2 * math.pi


def area(radius, scale=SCALE):
    """Of a circle, nearly."""
    if radius < 0:
        radius = -radius
    return scale * radius * radius
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"    if radius < 0:\n        radius = -radius\n", b""),
        (b", scale=SCALE", b""),
        (b"2 * math.pi", b"math.pi"),
        (b"    if radius < 0:\n        radius = -radius\n    return", b"    # any radius\n    return"),
    ],
)
def test_lines_and_parts_of_lines_that_are_gone_are_a_deletion(old, new):
    assert only_deletes(BASE.replace(old, new), BASE) and not only_deletes(BASE, BASE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"", b""),
        (b"  # for pi", b""),
        (b'    """Of a circle, nearly."""\n', b""),
        (b"\n\n\n", b"\n"),
        (b"2 * math.pi", b"6"),
        (b"radius < 0", b"radius"[:4] + b"<0"),
        (b"    if radius < 0:\n        radius = -radius\n", b"    radius = abs(radius)\n"),
        (b"def area(", b"def ("[:-1]),
        (b"(radius, scale=SCALE)", b"("),
        (b"A program", b"\xff"),
    ],
)
def test_what_is_replaced_or_means_the_same_or_is_no_program_is_not(old, new):
    assert not only_deletes(BASE.replace(old, new), BASE)


def test_a_deletion_at_an_equal_score_is_kept_and_another_change_at_an_equal_score_is_not(stage, run):
    def night(most):
        command = "agent_loop.py", "--task", "tiny", "--tag", "t", "--researcher", "search", "--budget", "0.01"
        return run(sys.executable, *command, "--max-experiments", most, cwd=stage)

    def commit(old, new):
        path = stage / "train.py"
        path.write_text(path.read_text().replace(old, new))
        subprocess.run(["git", "commit", "-qam", "mine"], cwd=stage, check=True)

    commit("LR = 0.001", "LR = 0.006")  # its first runs score in the mean what all those of the baseline do
    assert night("0").returncode == 0
    commit("CRASH = 0  #", "CRASH = 0 * 1  #")
    assert "discard: P(better)" in night("1").stdout
    commit('if CRASH:\n    raise RuntimeError("crashing as asked")\n', "")
    said = night("2").stdout
    assert "keep: it only deletes, P(not worse" in said, said

"""What travels: an idea as it is written and read, and when two edits are the same. Strangers write these files."""

import dataclasses
import json
import random

import pytest

from lab import peers
from lab.peers import Idea, changed_lines, edit_key, plain, read, source_key

BASE = "LR = 0.1\nDEPTH = 4\n\n\ndef model(x):\n    return x * LR\n"
SOURCE = BASE.replace("0.1", "0.2")
IDEA = Idea(
    who="a1b2c3d4",
    tag="nov23",
    commit="0123abc",
    source=SOURCE,
    base=BASE,
    description="LR 0.1 -> 0.2",
    hypothesis="It learns too slowly.",
    status="keep",
    val_bpb=1.00,
    base_bpb=1.03,
    sigma=0.01,
    runs=1,
    base_runs=3,
    task="pycode",
    budget=300.0,
    device="cpu",
    rate=4e11,
    steps=900.0,
    tokens=None,
    versions={"torch": "2.13.0"},
    sha256={"prepare.py": "0" * 64},
    model="search",
    of="",
)


def told(**changes):
    """The fields of result.json, some of them changed."""
    return json.loads(IDEA.files()["result.json"]) | changes


def read_with(result, **files):
    result = result if isinstance(result, bytes) else json.dumps(result).encode()
    return read(IDEA.name, IDEA.files() | {"result.json": result} | files)


# ---------------------------------------------------------------------------------------------------------------------
# Written and read


def test_an_idea_is_read_as_it_was_written():
    assert read(IDEA.name, IDEA.files()) == IDEA


def test_a_crash_without_scores_is_an_idea_too():
    crash = dataclasses.replace(IDEA, status="crash", val_bpb=None, sigma=None, runs=0, rate=None, steps=None)
    assert read(crash.name, crash.files()) == crash
    assert crash.gain is None and crash.gain_in_sigmas is None


def test_the_gain_is_told_in_bits_and_in_standard_errors():
    assert IDEA.gain == pytest.approx(0.03)
    assert IDEA.gain_in_sigmas == pytest.approx(0.03 / (0.01 * (1 + 1 / 3) ** 0.5))


def test_fields_of_a_later_version_are_no_harm():
    assert read_with(told(colour="blue")) == IDEA


@pytest.mark.parametrize("change", [{"tag": "a/b"}, {"tag": "-x"}, {"val_bpb": float("nan")}, {"commit": "x" * 65}])
def test_what_nobody_would_read_is_not_written(change):
    with pytest.raises(ValueError):
        dataclasses.replace(IDEA, **change).files()


# ---------------------------------------------------------------------------------------------------------------------
# Strangers' files

VALID = json.dumps(told())
UNSOUND = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "no UTF-8": VALID.encode().replace(b"search", b"\xff"),
    "UTF-16": VALID.encode("utf-16"),
    "NaN": VALID.replace('"sigma": 0.01', '"sigma": NaN').encode(),
    "Infinity": VALID.replace('"sigma": 0.01', '"sigma": Infinity').encode(),
    "1e999": VALID.replace('"sigma": 0.01', '"sigma": 1e999').encode(),
    "a huge integer": VALID.replace('"runs": 1', '"runs": ' + "9" * 5000).encode(),
    "a large integer": VALID.replace('"runs": 1', '"runs": ' + "9" * 19).encode(),
    "deep nesting": ('{"a":' * 5000).encode(),
    "deep nesting, closed": VALID.replace('"sigma": 0.01', '"sigma": ' + "[" * 15000 + "]" * 15000).encode(),
    "a field twice": VALID.replace('"runs": 1', '"runs": 1, "runs": 2').encode(),
    "too large": json.dumps(told(more="x" * 40_000)).encode(),
    "a table too large": json.dumps(told(versions={str(i): "1" for i in range(100)})).encode(),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_result_is_refused_in_order(name):
    assert UNSOUND[name] != VALID.encode()
    with pytest.raises(ValueError):
        read_with(UNSOUND[name])


@pytest.mark.parametrize("field", peers.FIELDS)
def test_a_field_that_is_missing_or_of_another_type_is_refused(field):
    for wrong in ([], {"a": 1}, True, "x" if peers.FIELDS[field] is not str else 7):
        with pytest.raises(ValueError):
            read_with(told(**{field: wrong}))
    without = told()
    del without[field]
    with pytest.raises(ValueError):
        read_with(without)


WRONG = [{"val_bpb": -1.0}, {"val_bpb": 0}, {"sigma": -0.1}, {"val_bpb": None}, {"base_bpb": 1e6}, {"runs": -1}]
WRONG += [{"status": "best"}, {"budget": 0}, {"of": "../../x"}, {"of": "a/b"}, {"runs": 1.0}, {"versions": {"a": 1}}]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_value_out_of_its_range_is_refused(wrong):
    with pytest.raises(ValueError):
        read_with(told(**wrong))


def test_sources_that_are_too_large_or_no_text_are_refused():
    for source in (b"#" * (peers.SOURCE_BYTES + 1), b"\xff\xfe", b"x = '\xed\xa0\x80'"):
        for file in ("train.py", "base.py"):
            with pytest.raises(ValueError):
                read_with(told(), **{file: source})


def test_words_become_one_bounded_printable_line():
    words = "one\ntwo\x1b[31m\u2028\u202ethree\ud800" + "x" * 5000
    idea = read_with(told(description=words, hypothesis=words, device=words, model=words, versions={words: words}))
    (version,) = idea.versions.items()
    for text, most in [(idea.description, 200), (idea.hypothesis, 1000), (idea.device, 100), (version[1], 100)]:
        assert text.startswith("one two [31m three") and text.isprintable() and len(text) == most


# ---------------------------------------------------------------------------------------------------------------------
# When two edits are the same


def test_the_same_edit_of_another_base_has_the_same_key():
    other = BASE.replace("DEPTH = 4", "DEPTH = 8\nWIDTH = 64  # wider")
    assert edit_key(BASE, SOURCE) == edit_key(other, other.replace("0.1", "0.2")) == IDEA.key
    assert edit_key(BASE, SOURCE) != edit_key(BASE, BASE.replace("0.1", "0.3"))
    assert edit_key(BASE, SOURCE) != edit_key(SOURCE, BASE)


def test_comments_blank_lines_and_trailing_spaces_change_no_key():
    dressed = "# mine\n" + SOURCE.replace("0.2", "0.2   # bolder").replace("\n\n", "\n\n\n")
    assert edit_key(BASE, dressed) == IDEA.key and source_key(dressed) == source_key(SOURCE)
    assert source_key(SOURCE.replace("    return", "  return")) != source_key(SOURCE)


def test_a_sign_within_a_text_is_no_comment():
    assert plain("a = '#1'\nb = \"#2\"  # two\n") == ["a = '#1'", 'b = "#2"']


def test_a_line_that_moves_is_an_edit():
    moved = "DEPTH = 4\nLR = 0.1\n" + BASE.partition("4\n")[2]
    assert edit_key(BASE, moved) not in (edit_key(BASE, BASE), IDEA.key)


def test_the_changed_lines_are_the_fewest_and_lead_from_the_old_to_the_new():
    chance = random.Random(0)
    for _ in range(300):
        old, new = (["abc"[chance.randrange(3)] for _ in range(chance.randrange(10))] for _ in range(2))
        common = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
        for i, a in enumerate(old):
            for j, b in enumerate(new):
                common[i + 1][j + 1] = common[i][j] + 1 if a == b else max(common[i][j + 1], common[i + 1][j])
        changes = changed_lines(old, new)
        assert len(changes) == len(old) + len(new) - 2 * common[-1][-1]
        left = sorted([*old, *(line[1:] for line in changes if line[0] == "+")])
        assert left == sorted([*new, *(line[1:] for line in changes if line[0] == "-")])


def test_files_made_to_be_slow_to_compare_count_as_a_whole():
    """By the time of the whole: without the bounds these take minutes to hours."""
    many, half = ["a", "b"] * 5000, ["a"] * 5000 + ["b"] * 5000
    assert changed_lines(many, half) is None and changed_lines(["x"] * 20_000, []) is None
    spaces = "x =" + " " * 200_000 + "#'\n" + "#" * 50_000
    assert edit_key(spaces, "\n".join(many)) != edit_key(spaces, "\n".join(half))

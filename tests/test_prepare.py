"""The data: byte accounting, packing, and a preparation that survives interruption, haste and company."""

import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, tiny_documents

import prepare

MULTILINGUAL = [
    "The quick brown fox - l'été à Zürich, naïve coöperation.",
    "日本語のテキスト、한국어 텍스트, русский текст, עברית, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 👍🏽 \u0000 \ufffd <|bos|> \r\n\t  x" + "e\u0301" * 3,
]


@pytest.fixture(scope="module")
def encoding():
    return prepare.build_encoding(prepare.train_tokenizer([text for text, _ in tiny_documents()] + MULTILINGUAL, 300))


def test_token_bytes_add_up_to_the_utf8_length_of_any_text(encoding):
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    lengths = prepare.token_bytes(tokens)
    for text in MULTILINGUAL:
        (ids,) = prepare.tokenise([text], encoding, prepare.dataclasses.replace(TINY, split_long=False))
        assert lengths[ids].sum() == len(text.encode()), text
        assert ids[0] == encoding.n_vocab - 1 and lengths[ids[0]] == 0
        assert encoding.decode(ids[1:].tolist()) == text


def test_half_of_an_emoji_is_counted_as_the_replacement_character_it_becomes(tmp_path):
    documents = [(text, out) for text, out in tiny_documents()] + [("broken \ud83d emoji " * 50, False)]
    prepare.build(TINY, documents, tmp_path)
    tokens = prepare.load_tokens(tmp_path)
    rows = np.fromfile(tmp_path / "train.bin", dtype=np.uint16)
    assert "\ufffd".encode() in b"".join(tokens[token] for token in rows if token < len(tokens))


def test_long_documents_are_cut_into_rows_and_lose_nothing(encoding):
    text = " ".join(text for text, _ in tiny_documents())
    pieces = list(prepare.tokenise([text], encoding, TINY))
    assert all(len(piece) == TINY.seq_len + 1 for piece in pieces[:-1])
    assert all(piece[0] == encoding.n_vocab - 1 for piece in pieces)
    assert encoding.decode(np.concatenate([piece[1:] for piece in pieces]).tolist()) == text


def plain_pack(documents, row_len, buffer_size):
    """Best-fit packing as its definition says it, by looking through the whole buffer."""
    documents, waiting = iter(documents), []
    while True:
        row, dropped = [], 0
        while len(row) < row_len:
            while len(waiting) < buffer_size and (document := next(documents, None)) is not None:
                waiting.append(document)
            if not waiting:
                return
            room = row_len - len(row)
            fitting = [document for document in waiting if len(document) <= room]
            longest = max(map(len, fitting), default=None)
            shortest = min(map(len, waiting))
            place = [len(document) for document in waiting].index(longest or shortest)
            document = waiting.pop(place)
            row += list(document[:room])
            dropped += max(0, len(document) - room)
        yield row, dropped


@pytest.mark.parametrize("buffer_size", [1, 7, 100])
def test_packing_is_the_plain_definition_of_best_fit(buffer_size):
    chance = random.Random(buffer_size)
    documents = [np.arange(i, i + chance.choice((1, 2, 5, 9, 20, 33, 70))) % 60000 for i in range(0, 40000, 80)]
    fast = [(row.tolist(), dropped) for row, dropped in prepare.pack(documents, 33, buffer_size)]
    assert fast == list(plain_pack(documents, 33, buffer_size)) and len(fast) > 100


def test_packing_loses_nothing_but_the_crops_it_reports():
    documents = [np.full(length, length) for length in (5, 40, 3, 12, 33, 1, 7, 60, 2) * 50]
    rows = list(prepare.pack(documents, 33))
    kept = sum(len(row) for row, _ in rows) + sum(dropped for _, dropped in rows)
    assert 0 <= sum(map(len, documents)) - kept < 33  # what is left did not fill a last row


def test_batches_visit_every_row_once_an_epoch_in_an_order_of_the_seed(cache, monkeypatch):
    rows = np.arange(10 * (TINY.seq_len + 1), dtype=np.uint16).reshape(10, -1)
    monkeypatch.setattr(prepare, "TASK", TINY)

    def epoch(seed):
        monkeypatch.setattr(prepare, "SEED", seed)
        run = prepare.Run({"device": "cpu"}, {}, None, None)
        run._rows = rows
        batches = run.batches(5)
        return [(x, y) for x, y in (next(batches) for _ in range(4))]

    first = epoch(0)
    for x, y in first:
        assert x.dtype == y.dtype and x.shape == (5, TINY.seq_len) and (y == x + 1).all()
    starts = [x[:, 0].tolist() for x, _ in first]
    assert sorted(starts[0] + starts[1]) == sorted(starts[2] + starts[3]) == rows[:, 0].tolist()
    assert starts[0] + starts[1] != starts[2] + starts[3]
    assert [x[:, 0].tolist() for x, _ in epoch(0)] == starts != [x[:, 0].tolist() for x, _ in epoch(1)]


def test_validation_text_comes_from_closed_folders_and_shares_no_document_with_training(cache):
    documents = list(prepare.pycode_documents())
    held_out = {text for text, out in documents if out}
    assert held_out and held_out.isdisjoint(text for text, out in documents if not out)
    hidden = prepare.hidden_folders()
    texts = {path.read_bytes() for folder in hidden for path in prepare.Path(folder).glob("*.py")}
    assert all(text.encode() in texts for text in held_out)


def test_openings_cover_a_folder_without_its_hidden_parts_and_without_links(tmp_path):
    for name in ("a/tests", "a/code", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "file.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    opened = set(prepare.openings(str(tmp_path), {str(tmp_path / "a" / "tests")}))
    assert opened == {str(tmp_path / name) for name in ("a/code", "a/file.py", "b")}


PREPARE_TINY = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, prepare
os.environ["AUTORESEARCH_CACHE"] = {cache!r}
def documents():
    for number, document in enumerate(conftest.tiny_documents()):
        if number == 400:
            print("halfway", flush=True)
            time.sleep({pause})
        yield document
prepare.SOURCES["tiny"] = documents
print(prepare.prepare(conftest.TINY))
"""


def preparing(cache, pause):
    """A process that prepares the tiny task in `cache` and rests for `pause` seconds halfway."""
    code = PREPARE_TINY.format(root=str(ROOT), tests=str(ROOT / "tests"), cache=str(cache), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_preparation_that_is_killed_leaves_nothing_that_counts_and_the_next_one_cleans_up(tmp_path):
    killed = preparing(tmp_path, 60)
    assert "halfway" in killed.stdout.readline()
    killed.kill()
    killed.wait()
    assert list(tmp_path.glob("tiny.*.tmp")) and not (tmp_path / "tiny").exists()
    assert preparing(tmp_path, 0).wait() == 0
    assert (tmp_path / "tiny" / "meta.json").exists() and not list(tmp_path.glob("tiny.*.tmp"))


def test_two_preparations_at_once_make_one_and_the_second_waits_for_it(tmp_path):
    first = preparing(tmp_path, 1)
    assert "halfway" in first.stdout.readline()
    second = preparing(tmp_path, 0)
    said, _ = second.communicate(timeout=60)
    assert first.wait() == second.returncode == 0
    assert "another process is preparing tiny; waiting for it" in said and "halfway" not in said


def test_preparing_twice_gives_the_same_bytes(tmp_path, cache):
    assert preparing(tmp_path, 0).wait() == 0
    for name in ("tokenizer.txt", "train.bin", "val.bin"):
        assert (tmp_path / "tiny" / name).read_bytes() == (cache / "tiny" / name).read_bytes()


def test_a_text_too_small_for_its_task_is_refused(tmp_path):
    with pytest.raises(prepare.Trouble, match="too small"):
        prepare.build(TINY, [(f"tiny {i}", i % 5 == 0) for i in range(20)], tmp_path)

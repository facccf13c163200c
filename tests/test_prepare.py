"""The data: byte accounting, packing, and a preparation that survives interruption, haste and company."""

import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from bench import plain_pack
from conftest import ROOT, TINY, tiny_documents
from fake_hub import COMMIT, FakeHub, write_parquet

import prepare
from exam.check import check
from exam.fingerprints import verify
from exam.rows import build, pack, tokenise
from exam.sandbox import openings, sandbox_rules, start_confined
from exam.text import hidden_folders, pycode_documents, text_documents, text_files
from exam.tokenizer import build_encoding, load_tokens, token_bytes, train_tokenizer

MULTILINGUAL = [
    "The quick brown fox - l'été à Zürich, naïve coöperation.",
    "日本語のテキスト、한국어 텍스트, русский текст, עברית, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 👍🏽 \u0000 \ufffd <|bos|> \r\n\t  x" + "e\u0301" * 3,
]


@pytest.fixture(scope="module")
def encoding():
    return build_encoding(train_tokenizer([text for text, _ in tiny_documents()] + MULTILINGUAL, 300))


def test_token_bytes_add_up_to_the_utf8_length_of_any_text(encoding):
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    lengths = token_bytes(tokens)
    for text in MULTILINGUAL:
        (ids,) = tokenise([text], encoding, prepare.dataclasses.replace(TINY, split_long=False))
        assert lengths[ids].sum() == len(text.encode()), text
        assert ids[0] == encoding.n_vocab - 1 and lengths[ids[0]] == 0
        assert encoding.decode(ids[1:].tolist()) == text


def test_half_of_an_emoji_is_counted_as_the_replacement_character_it_becomes(tmp_path):
    documents = [*tiny_documents(), ("broken \ud83d emoji " * 50, False)]
    build(TINY, lambda: documents, len(documents), {}, tmp_path / "tiny")
    tokens = load_tokens(tmp_path / "tiny")
    rows = np.fromfile(tmp_path / "tiny" / "train.bin", dtype=np.uint16)
    assert "\ufffd".encode() in b"".join(tokens[token] for token in rows if token < len(tokens))


def test_long_documents_are_cut_into_rows_and_lose_nothing(encoding):
    text = " ".join(text for text, _ in tiny_documents())
    pieces = list(tokenise([text], encoding, TINY))
    assert all(len(piece) == TINY.seq_len + 1 for piece in pieces[:-1])
    assert all(piece[0] == encoding.n_vocab - 1 for piece in pieces)
    assert encoding.decode(np.concatenate([piece[1:] for piece in pieces]).tolist()) == text


@pytest.mark.parametrize("buffer_size", [1, 7, 100])
def test_packing_is_the_plain_definition_of_best_fit(buffer_size):
    chance = random.Random(buffer_size)
    documents = [np.arange(i, i + chance.choice((1, 2, 5, 9, 20, 33, 70))) % 60000 for i in range(0, 40000, 80)]
    fast = [(row.tolist(), dropped) for row, dropped in pack(documents, 33, buffer_size)]
    assert fast == list(plain_pack(documents, 33, buffer_size)) and len(fast) > 100


def test_packing_loses_nothing_but_the_crops_it_reports():
    documents = [np.full(length, length) for length in (5, 40, 3, 12, 33, 1, 7, 60, 2) * 50]
    rows = list(pack(documents, 33))
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
    documents = list(pycode_documents())
    held_out = {text for text, out in documents if out}
    assert held_out and held_out.isdisjoint(text for text, out in documents if not out)
    hidden = hidden_folders()
    texts = {path.read_bytes() for folder in hidden for path in prepare.Path(folder).glob("*.py")}
    assert all(text.encode() in texts for text in held_out)


def test_openings_cover_a_folder_without_its_hidden_parts_and_without_links(tmp_path):
    for name in ("a/tests", "a/code", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "file.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "raw.txt").write_text("validation")
    hidden = {str(tmp_path / "a" / "tests"), str(tmp_path / "b" / "raw.txt"), "/elsewhere"}
    opened = set(openings(str(tmp_path), hidden))
    assert opened == {str(tmp_path / name) for name in ("a/code", "a/file.py")}


PREPARE_TINY = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import conftest
from exam import rows
os.environ["AUTORESEARCH_CACHE"] = {cache!r}
rows.PART = 10_000
passes = []
def documents():
    passes.append(None)
    for number, document in enumerate(conftest.tiny_documents()):
        if number == 400 and len(passes) == {halt}:
            print("halfway", flush=True)
            time.sleep({pause})
        yield document
print(rows.prepare(conftest.TINY, lambda: (documents, 800, dict(source="tiny documents"))))
"""


def preparing(cache, pause, halt=3):
    """A process that prepares the tiny task in `cache` and rests for `pause` seconds halfway its pass number `halt`.

    The first pass is for the tokenizer, the second for the validation rows, the third for the training rows.
    """
    code = PREPARE_TINY.format(root=str(ROOT), tests=str(ROOT / "tests"), cache=str(cache), pause=pause, halt=halt)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(process, line):
    """Read what a process prints up to a line that contains `line`."""
    assert any(line in said for said in process.stdout)


@pytest.mark.parametrize("halt", [1, 3])
def test_a_preparation_that_is_killed_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path, halt):
    killed = preparing(tmp_path / "killed", 60, halt)
    wait_for(killed, "halfway")
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "tiny").exists()
    (half,) = (tmp_path / "killed").glob("tiny.tmp")
    if halt == 3:
        with open(half / "train.bin", "ab") as file:
            file.write(b"torn")
        (half / "meta.json.123.tmp").write_text("{")
    said, _ = preparing(tmp_path / "killed", 0).communicate(timeout=60)
    assert ("going on after" in said) == (halt == 3) and not half.exists()
    assert preparing(tmp_path / "whole", 0).wait() == 0
    for name in ("tokenizer.txt", "train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "killed" / "tiny" / name).read_bytes() == (tmp_path / "whole" / "tiny" / name).read_bytes()


def test_two_preparations_at_once_make_one_and_the_second_waits_for_it(tmp_path):
    first = preparing(tmp_path, 1)
    wait_for(first, "halfway")
    second = preparing(tmp_path, 0)
    said, _ = second.communicate(timeout=60)
    assert first.wait() == second.returncode == 0
    assert "another process is preparing tiny; waiting for it" in said and "halfway" not in said


def test_a_text_too_small_for_its_task_is_refused(tmp_path):
    with pytest.raises(prepare.Trouble, match="too small"):
        build(TINY, lambda: [(f"tiny {i}", i % 5 == 0) for i in range(20)], 20, {}, tmp_path / "tiny")


# Prepares climbmix from a hub on loopback, in sizes of a test and without its long waits between two tries.
PREPARE_CLIMBMIX = """
import dataclasses, sys, time
sys.path.insert(0, {root!r})
import prepare
from exam import desk
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
task = dataclasses.replace(prepare.TASKS["climbmix"], seq_len=32, vocab_size=300, eval_tokens=2**11)
prepare.TASKS["climbmix"] = task
{before}
sys.argv[1:] = ["--task", "climbmix", *{arguments!r}]
sys.exit(desk.main())
"""
REPOSITORY = "karpathy/climbmix-400b-shuffle"


@pytest.fixture
def climbmix(tmp_path, run):
    """climbmix(*arguments, faults=, before=, **environment): the hub and the finished preparation."""
    folder = tmp_path / "hub" / REPOSITORY
    for number in (0, 1, 6542):
        texts = [f"shard {number}: {text}" for text, _ in tiny_documents()]
        write_parquet(folder / f"shard_{number:05d}.parquet", texts)

    def climbmix(*arguments, faults=None, before="", **environment):
        hub = FakeHub(tmp_path / "hub", faults)
        code = PREPARE_CLIMBMIX.format(root=str(ROOT), before=before, arguments=arguments)
        environment = {
            "AUTORESEARCH_CACHE": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_secret",
            "NO_PROXY": "127.0.0.1,localhost",
        } | environment
        done = run(sys.executable, "-c", code, env=os.environ | environment)
        hub.shutdown()
        return hub, done

    climbmix.folder = folder
    return climbmix


def test_shards_are_fetched_through_faults_and_validation_text_is_that_of_the_last_shard_alone(tmp_path, climbmix):
    faults = {"shard_00000.parquet": ["cut", 429], "shard_00001.parquet": [("head", 429), "cut"]}
    small_chunks = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000"
    hub, done = climbmix("--shards", "2", faults=faults, before=small_chunks)
    assert done.returncode == 0, done.stderr
    assert not any(faults.values()), "some faults did not happen"
    asked = [(command, name) for command, host, name, _ in hub.seen if host == "localhost"]
    assert asked.count(("GET", "shard_06542.parquet")) == 1 and asked.count(("GET", "shard_00000.parquet")) == 3
    assert any(headers["Range"] for *_, headers in hub.seen)
    secrets = {(host, headers["Authorization"]) for _, host, _, headers in hub.seen}
    assert secrets == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}

    folder = tmp_path / "cache" / "climbmix"
    encoding = build_encoding(load_tokens(folder))
    text = {part: encoding.decode(np.fromfile(folder / f"{part}.bin", dtype=np.uint16)) for part in ("train", "val")}
    assert "shard 6542:" in text["val"] and "shard 0:" not in text["val"]
    assert "shard 0:" in text["train"] and "shard 1:" in text["train"] and "shard 6542:" not in text["train"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["source"]["commit"] == COMMIT and meta["val"]["rows"] == 2**11 // 32

    hub, done = climbmix("--shards", "1")
    assert done.returncode == 2 and "was made from 2 shards" in done.stderr and not hub.seen
    (folder / "meta.json").unlink()
    assert "holds no complete data; delete it" in climbmix()[1].stderr
    folder.rename(tmp_path / "away")
    hub, done = climbmix("--shards", "2", HF_HUB_OFFLINE="1")  # what was fetched is not asked for again
    assert done.returncode == 0 and not hub.seen, done.stderr


@pytest.mark.parametrize(
    "faults, before, environment, message",
    [
        ({"shard_00000.parquet": ["short"] * 9}, "", {}, "cannot fetch .*run the same command again"),
        ({"shard_00000.parquet": ["cut"] * 99}, "", {}, "cannot fetch .*run the same command again"),
        ({"shard_06542.parquet": [("head", 429)] * 99}, "", {}, "429.*HF_TOKEN"),
        ({"shard_06542.parquet": [("head", 401)] * 9}, "", {}, "401.*HF_TOKEN"),
        ({}, "", {"HF_HUB_OFFLINE": "1"}, "cannot fetch .*HF_HUB_OFFLINE"),
        ({}, "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot fetch .*look at the network"),
        ({}, "sys.modules['huggingface_hub'] = None", {}, "huggingface_hub .*run: pip install -e ."),
        ({}, "import shutil; shutil.disk_usage = lambda _: type('', (), {'free': 2**28})", {}, "this needs .* GB in"),
    ],
)
def test_what_goes_wrong_on_the_way_to_the_hub_is_one_sentence_and_exit_code_2(
    climbmix, faults, before, environment, message
):
    _, done = climbmix("--shards", "2", faults=faults, before=before, **environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("prepare.py: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr
    assert prepare.re.search(message, said[0]), done.stderr


def test_a_shard_that_is_missing_or_damaged_is_named(climbmix):
    assert "shard_00002" in climbmix("--shards", "3")[1].stderr
    (climbmix.folder / "shard_00001.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert "shard_00001.parquet is damaged" in climbmix("--shards", "2")[1].stderr


TONGUE = {a + b + c + d for a in "bdfgklmn" for b in "aeiou" for c in "prstvz" for d in ("", "ning", "ler", "sto")}


def test_own_text_of_all_kinds_becomes_a_task_without_duplicates_and_closes_its_files(tmp_path, run, monkeypatch):
    chance = random.Random(0)
    texts = [text + " ".join(chance.choices(sorted(TONGUE), k=9)) for text, _ in tiny_documents()]
    folder = tmp_path / "open" / "texts"
    (folder / "below" / ".git").mkdir(parents=True)
    for number in range(40):
        (folder / "below" / f"{number}.md").write_text(texts[number])
        (folder / f"copy {number}.txt").write_text("\n" + texts[number])
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[40:300]) + "{broken\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts[300:500]) + '{"txt": 1}\n[2]\n')
    write_parquet(folder / "c.parquet", [*texts[500:], None, "  short  "])
    (folder / "latin.txt").write_bytes("caf\xe9 is not UTF-8".encode("latin-1"))
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"this file ends too early")[:-9])
    (folder / "no.parquet").write_bytes((folder / "c.parquet").read_bytes().replace(b"text", b"tixt"))
    (folder / "below" / ".git" / "hidden.txt").write_text("not read")
    (folder / "book.txt.gz").write_bytes(
        gzip.compress("\n\n".join(f"{i} {t}" for i, t in enumerate(texts * 4)).encode())
    )
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))

    def prepared(*arguments):
        return run(sys.executable, ROOT / "prepare.py", *arguments, env=os.environ)

    done = prepared("--text", folder, "--task", "mine")
    assert done.returncode == 0, done.stderr
    assert "5 x nearly empty" in done.stdout and "40 x duplicate" in done.stdout and "1 x not UTF-8" in done.stdout
    assert "torn.txt.gz cannot be read" in done.stdout and "no.parquet has no column 'text'" in done.stdout
    task, meta = prepare.get_task("mine"), json.loads((tmp_path / "cache" / "mine" / "meta.json").read_text())
    assert task.eval_rows == meta["val"]["rows"] >= 32 and verify(task)

    book = folder / "book.txt.gz"
    (folder.parent / "else.txt").touch()
    assert str(book) in meta["hidden_folders"] and str(folder / "below" / "7.md") in meta["hidden_folders"]
    monkeypatch.syspath_prepend(str(tmp_path / "open"))  # a place that every Python program may read
    rules = sandbox_rules([], [], meta["hidden_folders"])
    quiet = {"stderr": subprocess.DEVNULL}
    assert start_confined(["cat", str(folder.parent / "else.txt")], rules, **quiet).wait() == 0
    assert start_confined(["cat", str(book)], rules, **quiet).wait() != 0

    book.write_bytes(book.read_bytes())
    done = prepared("--text", folder, "--task", "mine")
    assert done.returncode == 2 and "they have changed since; choose another name with --task" in done.stderr
    for arguments, message in (
        (["--text", folder / "nowhere"], "there is no "),
        (["--text", folder / "below" / ".git"], "too small"),
        (["--text", folder, "--task", "pycode"], "cannot name your text"),
        (["--task", "../mine"], "there is no task '../mine'"),
        (["--text", ROOT / "LICENSE"], "one of .txt"),
    ):
        done = prepared(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_validation_documents_of_an_own_text_stay_what_they_are_when_text_is_added(tmp_path):
    for number, (text, _) in enumerate(tiny_documents()):
        (tmp_path / f"{number:03d}.txt").write_text(text)
    files = text_files([tmp_path])
    some = {text for text, held_out in text_documents(files[100:], 0.1) if held_out}
    more = {text for text, held_out in text_documents(files, 0.1) if held_out}
    assert 0.05 < len(more) / len(files) < 0.15 and some < more
    assert {text for text, held_out in text_documents(files, 0.02) if held_out} < more


def test_the_check_says_a_line_of_each_thing_and_what_to_do(cache, run, capfd):
    done = run(sys.executable, ROOT / "prepare.py", "--check", "--task", "tinystories", env=os.environ)
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert (
        done.returncode == 2 and ["NO", "data:"] in lines and ["ok", "sandbox:"] in lines and ["ok", "trial's"] in lines
    )
    assert {what for _, what in lines} == {"data:", "disk", "GPU:", "sandbox:", "trial's", "speed:"}
    assert "run: python prepare.py --task tinystories" in done.stdout
    check(TINY)
    assert "ok  data:          tiny in " in capfd.readouterr().out

"""Shared set-up: one prepared cache for the whole run, a tiny task for quick exams, and throw-away repositories."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for name in [name for name in os.environ if name.startswith(("AUTORESEARCH_", "GIT_"))]:
    del os.environ[name]

import prepare  # noqa: E402

TINY = prepare.Task("tiny", "tiny", 32, 300, 2**13, 0.8, split_long=True)


def tiny_documents():
    """A few hundred short documents with something to learn in them; every fifth is held out."""
    words = "the sun rises over a quiet field and every bird begins its own song while rivers run to the sea".split()
    for i in range(800):
        yield " ".join(words[(i * j * j + j) % len(words)] for j in range(60 + i % 50)) + f" ({i})", i % 5 == 0


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of this run's own, with the data of pycode and of the tiny task."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["AUTORESEARCH_CACHE"] = str(folder)
    prepare.SOURCES["tiny"] = tiny_documents
    prepare.prepare(TINY)
    prepare.prepare(prepare.TASKS["pycode"])
    prepare.machine_flops()
    return folder


@pytest.fixture
def run():
    """run(*command, **options): a finished subprocess with its output as text."""

    def run(*command, **options):
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)

    return run


# A whole train.py around a model that honest and hostile variants share; {before}, {forward} and {after} vary.
CANDIDATE = """
import json, os, sys, time
import torch, torch.nn as nn, torch.nn.functional as F
from prepare import SEED, TASK, begin

torch.manual_seed(SEED)
V, T = TASK.vocab_size, TASK.seq_len
{before}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 32)
        self.head = nn.Linear(32, V)
        self.register_buffer("table", torch.arange(T * 32.0).view(T, 32) / (T * 32))

    def forward(self, tokens):
        x = self.embed(tokens)
{forward}
        return self.head(x)

model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
run = begin(model)
{begun}
for step, (x, y) in enumerate(run.batches(16)):
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(step=step, loss=loss.item())
    {each_step}
    if run.progress >= 1:
        break
{after}
run.submit(model)
"""


@pytest.fixture
def candidate(tmp_path):
    """candidate(before=, forward=, begun=, each_step=, after=): path of a train.py with that code in those places."""

    def candidate(forward="", **places):
        code = {"before": "", "begun": "", "each_step": "pass", "after": ""}
        code |= {name: textwrap.dedent(text).strip() for name, text in places.items()}
        code["forward"] = textwrap.indent(textwrap.dedent(forward).strip(), " " * 8)
        path = tmp_path / "candidate.py"
        path.write_text(CANDIDATE.format(**code))
        return path

    return candidate


@pytest.fixture
def hold(tmp_path, candidate):
    """hold(**places): the result of one trial of such a candidate on the tiny task."""

    def hold(task=TINY, seed=0, **places):
        return prepare.trial(candidate(**places), tmp_path / "out", task, seed)

    return hold


@pytest.fixture
def repository(tmp_path):
    """A fresh git repository with the three programs, a quick train.py, and a file of the owner's."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("agent_loop.py", "prepare.py", "program.md", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(Path(__file__).parent / "quick_train.py", folder / "train.py")
    (folder / "notes.txt").write_text("mine\n")
    for command in (
        "init -q -b main",
        "config user.name Owner",
        "config user.email o@example.org",
        "add .",
        "commit -qm start",
    ):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder

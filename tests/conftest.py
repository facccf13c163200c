"""Shared set-up: one prepared cache for the whole run, a tiny task for quick exams, and throw-away repositories."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for name in [name for name in os.environ if name.startswith(("AUTORESEARCH_", "GIT_"))]:
    del os.environ[name]
os.environ["AUTORESEARCH_TASK"] = "pycode"  # on a GPU it would be one that needs the network
os.environ["HF_HUB_OFFLINE"] = "1"

import prepare  # noqa: E402
from exam import rows  # noqa: E402
from exam.trial import trial  # noqa: E402

# {command to start as that user: its name}. An ordinary user's processes have no capabilities; some attacks work, and
# some defences hold, for root alone.
ORDINARY = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
USERS = {(): "root", ORDINARY: "ordinary user"} if os.getuid() == 0 else {(): "ordinary user"}

TINY = prepare.Task("tiny", "tiny", 32, 300, 2**13, 0.8, split_long=True)


def tiny_documents():
    """A few hundred short documents with something to learn in them; every fifth is held out."""
    words = "the sun rises over a quiet field and every bird begins its own song while rivers run to the sea".split()
    for i in range(800):
        yield " ".join(words[(i * j * j + j) % len(words)] for j in range(60 + i % 50)) + f" ({i})", i % 5 == 0


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of this run's own, with the data of the tiny task."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["AUTORESEARCH_CACHE"] = str(folder)
    rows.prepare(TINY, lambda: (tiny_documents, 800, {}))
    prepare.machine_flops()
    return folder


@pytest.fixture(scope="session")
def pycode(cache):
    """The data of pycode, in the cache: half a minute."""
    return rows.prepare(prepare.TASKS["pycode"])


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
from prepare import SEED, TASK, begin, device

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

model = Model().to(device())
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
        return trial(candidate(**places), tmp_path / "out", task, seed)

    return hold


@pytest.fixture(scope="session")
def gpu_python(tmp_path_factory):
    """A Python that sees the CUDA device of stand_in/gpu_stand_in.py where TORCH_STAND_IN names a card.

    It is an environment of its own, since the examiner's Python takes modules from nowhere else.
    """
    folder = tmp_path_factory.mktemp("gpu") / "python"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for module in (Path(__file__).parent / "stand_in").glob("*.py"):
        shutil.copy(module, packages)
    real = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "real.pth").write_text("".join(f"{path}\n" for path in sorted(real)))
    return folder / "bin" / "python"


PLAYED_CHECK = """

def check_storage(task):  # the real ones take seconds
    yield "disk", "enough", ""


def check_machine(task):
    yield "speed", "slow today", "wait"
"""


def make_repository(folder, train_py, played=None):
    """A git repository in `folder`: the programs, which know the tiny task, `train_py`, and a file of the owner's.

    played: {file: code that is added at its end}.
    """
    folder.mkdir()
    for name in ("agent_loop.py", "prepare.py", "program.md", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("exam", "lab"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source, before = (ROOT / "prepare.py").read_text(), "\n\ndef get_task("
    assert source.count(before) == 1
    (folder / "prepare.py").write_text(source.replace(before, f"\n\nTASKS['tiny'] = {TINY}\n{before}"))
    for name, code in {"exam/check.py": PLAYED_CHECK, **(played or {})}.items():
        with open(folder / name, "a") as file:
            file.write(code)
    shutil.copy(Path(__file__).parent / train_py, folder / "train.py")
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


def tiny_repository(folder):
    """A repository whose prepare.py knows the tiny task, with a train.py that learns something in no time."""
    # What else this machine does must not decide the trials of a test.
    deaf = "\n\nSAME_SPEED = SAME_PACE = 0.0\nMOST_OTHERS = 1.0\n"
    make_repository(folder, "quick_train.py", {"lab/runs.py": deaf})
    return folder


@pytest.fixture
def repository(tmp_path):
    return tiny_repository(tmp_path / "repository")


# What the exam board says without holding an exam or looking at the machine: train.py prints its score. A file `speeds`
# beside prepare.py gives the speed of the machine for each trial in turn, and how it ends if not well (see END),
# after @ the share of the CPU that others had, after / the steps that were made.
PLAYED_TRIAL = """

import signal

END = {
    "timeout": ("timeout", "no end after 64 s between begin() and submit()"),
    "crash": ("crash", "exit code 1"),
    "exam": ("invalid", "the exam took longer than 720 s"),
    "refused": ("invalid", "the model is not causal"),
}


def trial(train_py, out, task, seed, sandbox=True, beat=None, flops=None, warm=None, shares=1):
    if not out.name.isdigit():  # a profile
        (out / "log.txt").write_text('\\nprofile: [[[["main", 9]], 1]]')
        (out / "compiled").mkdir()
        result = Result("crash", "it ended early")
        result.write(out / "result.json")
        return result
    speeds, speed, end, others, steps = ROOT / "speeds", None, "", "", ""
    if speeds.exists():
        now, *later = speeds.read_text().split()
        speeds.write_text(" ".join(later or [now]))
        if now == "lost":
            raise Pause("the GPU is lost")
        if now == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        now, _, steps = now.partition("/")
        now, _, others = now.partition("@")
        speed, _, end = now.partition(":")
    source = Path(train_py).read_bytes()
    environment = os.environ | {"RUN": out.name, "SECONDS": str(task.time_budget)}
    ended = subprocess.run([sys.executable, train_py], env=environment, capture_output=True, text=True)
    (out / "log.txt").write_text(ended.stdout + ended.stderr)
    (out / "metrics.jsonl").write_text('{"seconds": 0.1, "step": 1, "loss": 5.0}\\n')
    (out / "model.safetensors").write_bytes(source)
    (out / "compiled").mkdir(exist_ok=True)
    result = Result("ok", training_seconds=task.time_budget, peak_rss_mb=100.0, steps=float(steps or 9))
    result.others, result.beat = float(others) if others else None, beat
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["killed"])[-1]
        result.outcome, result.reason = "invalid" if "Refused" in reason else "crash", reason
    else:
        result.val_bpb = float(ended.stdout.split()[-1])
    if speed:
        result.matmul_flops = float(speed)
        result.outcome, result.reason = END.get(end, (result.outcome, result.reason))
        result.eval_seconds = task.exam_limit if end == "exam" else 0.0
    result.seed, result.task, result.budget = seed, task.name, task.time_budget
    result.sha256 = {"train.py": hashlib.sha256(source).hexdigest(), **fingerprints(task)}
    with open(out.parents[2] / "trials", "a") as file:
        print(Path(train_py).parent.name, out.name, file=file)
    (out / "told").write_text(f"{flops} {warm}")
    result.write(out / "result.json")
    return result
"""


def make_stage(folder):
    """A repository whose trials are played in a tenth of a second, for tests of the loop alone; see PLAYED_TRIAL."""
    return make_repository(folder, "played_train.py", {"exam/trial.py": PLAYED_TRIAL})


@pytest.fixture
def stage(tmp_path):
    return make_stage(tmp_path / "stage")

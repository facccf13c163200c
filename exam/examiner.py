"""The exam: the proctor, which never runs the sealed model, puts questions to readers, adds up and judges.

Each reader is a process of its own, see reader.py.
"""

import contextlib
import dataclasses
import json
import math
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

import prepare
from exam import reader
from exam.processes import exit_reason, kill_group, message_pair
from exam.reader import LOSSES, READY, SPEED
from exam.sandbox import EXAMINER_GOES, environment, start_confined
from exam.tokenizer import load_tokens, token_bytes
from prepare import LEAK_TOLERANCE, Pause, Refused, device_kind, has_gpu, one_line

MOST_NATS = 1e6  # of one token: beyond it is no score that anything could be made of


class Examiner:
    """The isolated interpreter that readers are forked from: it imports torch while the candidate starts up."""

    def __init__(self, rules):
        self.channel, theirs = message_pair()
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, "-I", reader.__file__, str(theirs.fileno())]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.errors}
        with theirs:
            passed = [theirs.fileno()]
            options = {"cwd": "/", "env": environment(), "pass_fds": passed, "first_to_go": EXAMINER_GOES}
            self.process = start_confined(command, rules, **options, **streams)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        kill_group(self.process)
        self.process.wait()
        self.errors.close()

    @contextlib.contextmanager
    def ask(self, question, deadline):
        """A Reader for `question`, a JSON value; one at a time. Its process has ended when the context is left.

        Raises Refused where the reader refuses the model or dies of it, Pause where the examiner is gone, and
        TimeoutError at `deadline` (time.monotonic()).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        dead = False
        with theirs:
            with contextlib.suppress(OSError):  # an examiner that is gone is found below
                socket.send_fds(self.channel, [json.dumps(question).encode()], [theirs.fileno()])
        try:
            yield Reader(ours, deadline)
        except EOFError:
            dead = True
        finally:
            ours.close()
            code = self.reader_ended(deadline)
        if dead:
            asked = "the sealed model broke the exam" if "path" in question else "the machine cannot be measured"
            raise Refused(f"{asked}: {self.last_error(code)}")

    def reader_ended(self, deadline):
        """Wait for the end of the present reader and return its exit code."""
        self.channel.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            code = self.channel.recv(64)
        except ConnectionError:
            code = b""
        if not code:
            raise Pause(f"the examiner is gone: {self.last_error(self.process.wait())}")
        return int(code)

    def last_error(self, code):
        """The last that the examiner has printed, else its return code in words."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return one_line(lines[-1], 300) if lines and code >= 0 else exit_reason(code)


class Reader:
    """Our end of the conversation with a reader: a byte says what follows, see `answer`."""

    def __init__(self, channel, deadline):
        self.channel, self.deadline = channel, deadline

    def receive(self, size):
        """The next `size` bytes. Raises EOFError where the reader is dead."""
        received = bytearray(size)
        place = 0
        while place < size:
            self.channel.settimeout(max(1e-3, self.deadline - time.monotonic()))
            try:
                count = self.channel.recv_into(memoryview(received)[place:])
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError
            place += count
        return received

    def send(self, data):
        self.channel.settimeout(max(1e-3, self.deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):  # what follows is the reader's last word, or its end
            self.channel.sendall(data)

    def expect(self, kind):
        """Take the byte that announces `kind`; raises Refused with the reader's words where it is another."""
        said = self.receive(1)
        if said == kind:
            return
        words = self.receive(int.from_bytes(self.receive(4), "little") % 2**16)
        raise Refused(one_line(words.decode(errors="replace"), 2500))

    def losses(self, tokens, targets):
        """float32 nats [B, T] that the model takes for each of `targets` after `tokens`, both uint16 [B, T]."""
        self.send(tokens.tobytes())
        self.expect(READY)
        self.send(targets.tobytes())
        self.expect(LOSSES)
        losses = np.frombuffer(self.receive(4 * targets.size), dtype=np.float32).reshape(targets.shape)
        if not (losses.min() >= -1e-3 and losses.max() < MOST_NATS):  # nor one that is not a number
            raise Refused(f"the sealed model gave losses that are no losses, or above {MOST_NATS:,.0f} nats")
        return losses


def machine_now(examiner, deadline):
    """{device, matmul_flops} as a reader measures them; raises Pause where device or machine do not give an answer."""
    try:
        with examiner.ask({"device": device_kind()}, deadline) as reader:
            reader.expect(SPEED)
            return json.loads(reader.receive(int.from_bytes(reader.receive(4), "little")))
    except Refused as fault:
        raise Pause(str(fault)) from None
    except TimeoutError:
        raise Pause("the machine does not answer when its speed is measured; look what holds it up") from None


def finish_exam(examiner, path, task, folder, beat):
    """Have the submission at `path` scored, if there is one, and look at the machine: {device, matmul_flops, ...}.

    Right after the training: is the machine as fast as it was, and is the GPU still there? With outcome and reason
    where the exam fails; raises Pause where the device does.
    """
    deadline = time.monotonic() + task.exam_limit
    facts = machine_now(examiner, deadline)
    try:
        if path:
            facts |= examine(path, task, folder, beat, examiner, deadline)
    except TimeoutError:
        facts |= {"outcome": "invalid", "reason": f"the exam took longer than {task.exam_limit:.0f} s"}
        facts["eval_seconds"] = task.exam_limit
    except Refused as refusal:
        if has_gpu():  # a device that fails in mid-exam takes a model's words
            machine_now(examiner, deadline + task.exam_limit)
        facts |= {"outcome": "invalid", "reason": one_line(refusal, 2500)}
    return facts


def moved(losses, cuts, probed):
    """Largest change, from reader to reader, of a loss before its row's cut.

    losses, probed: {batch: float32 [B, T]}, all finite; cuts: [batches, B].
    """
    changes = []
    for index, others in probed.items():
        early = np.arange(others.shape[1]) < cuts[index, :, None]
        changes.append(np.abs(others - losses[index])[early].max())
    return float(max(changes))


def examine(path, task, folder, beat=None, examiner=None, deadline=None):
    """Score the sealed model at `path` on the validation rows: {outcome, val_bpb, eval_seconds, leak}.

    val_bpb = nats / ln 2 / UTF-8 bytes, over all targets but BOS. First, three batches of eight are probed for
    causality; where the score is below `beat` (None: always) every row is, twice. Raises Refused for a model that looks
    ahead, is not deterministic, or returns anything but finite logits [B, T, V], TimeoutError at `deadline`.
    """
    if examiner is None:
        with Examiner(None) as examiner:
            return examine(path, task, folder, beat, examiner, deadline)
    deadline = deadline or time.monotonic() + task.exam_limit
    started, device = time.monotonic(), device_kind()
    batch = prepare.exam_batch(task, device)
    # Rows that follow one another are often of one document: they are dealt to different batches.
    rows = np.fromfile(folder / "val.bin", dtype=np.uint16).reshape(batch, -1, task.seq_len + 1).swapaxes(0, 1)
    question = {"path": str(path), "task": dataclasses.asdict(task), "batch": batch, "device": device}

    def read(tokens, chosen):
        """{batch: losses} of a reader of its own, which is shown `tokens` [batches, B, T] and the true targets."""
        with examiner.ask(question, deadline) as reader:
            return {index: reader.losses(tokens[index], rows[index, :, 1:]) for index in chosen}

    def probe(chosen):
        """([batches, B] cuts, {batch: losses}) of a reader that sees rows whose tokens after a cut are replaced.

        A cut of T leaves its row as it is: what could move its last loss is in other rows.
        """
        chance = np.random.default_rng()  # seeded by the system's entropy, which no submission can foresee
        cuts = chance.integers(1, task.seq_len + 1, rows.shape[:2])
        replaced = chance.integers(task.vocab_size, size=rows[..., :-1].shape, dtype=np.uint16)
        late = np.arange(task.seq_len) >= cuts[..., None]
        return cuts, read(np.where(late, replaced, rows[..., :-1]), chosen)

    count = max(1, min(3 * len(rows) // 8, 1024 // batch))
    sample = probe(sorted(np.random.default_rng().permutation(len(rows))[:count].tolist()))
    losses = read(rows[..., :-1], range(len(rows)))
    spans = token_bytes(load_tokens(folder))[rows[..., 1:]]
    nats = sum(float(losses[index][spans[index] > 0].sum(dtype=np.float64)) for index in losses)
    val_bpb = nats / math.log(2) / int(spans.sum())
    leak = moved(losses, *sample)
    for _ in range(2 if beat is None or val_bpb < beat else 0):
        leak = max(leak, moved(losses, *probe(range(len(rows)))))
    if leak > LEAK_TOLERANCE:
        noise = float(np.abs(read(rows[..., :-1], [0])[0] - losses[0]).max())
        if noise > LEAK_TOLERANCE:
            raise Refused(f"the model is not deterministic: the same tokens gave losses that differ by {noise:.2g}")
        raise Refused(f"the model is not causal: tokens that come later moved the losses of earlier ones by {leak:.2g}")
    seconds = round(time.monotonic() - started, 3)
    return {"outcome": "ok", "val_bpb": val_bpb, "eval_seconds": seconds, "leak": leak, "beat": beat}

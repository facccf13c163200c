"""Shows in some six minutes whether all is well on a GPU, as a table for the README: python tests/gpu_smoke.py

The baseline at climbmix's size, on random tokens: nothing is fetched, and nothing is needed but what a trial needs.
Exits with 2 where there is no GPU that torch can use, and with 1 if a part failed or measured what it should not; the
table tells which, and the other parts are measured all the same.
"""

import base64
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # as in a trial, which also ends all other children of this process

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402
from exam.examiner import examine  # noqa: E402
from exam.files import sha256  # noqa: E402
from exam.fingerprints import verify  # noqa: E402
from exam.machine import ask_speed  # noqa: E402
from exam.speed import device_name  # noqa: E402
from exam.trial import trial  # noqa: E402

# The task climbmix with a dataset of our own, and a quarter of its validation rows.
TASK = dataclasses.replace(prepare.TASKS["climbmix"], name="smoke", dataset="smoke", eval_tokens=10 * 2**19)
EXAM_SHARE = TASK.eval_tokens / prepare.TASKS["climbmix"].eval_tokens
TRAIN_ROWS = 8192
BUDGET = 20.0  # seconds of each trial
STEPS = 20  # of the baseline outside of a trial
REPEATS = 5  # of what is timed by itself

Row = namedtuple("Row", "what value fine", defaults=[True])

# A train.py that needs the GPU and the compiler, and little else.
SMALL = """
import torch, torch.nn as nn, torch.nn.functional as F
from prepare import TASK, begin, device

place = device()
model = nn.Sequential(nn.Embedding(TASK.vocab_size, 64), nn.GELU(), nn.Linear(64, TASK.vocab_size)).to(place)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

def loss_of(x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

loss_of = torch.compile(loss_of, backend="inductor" if place.type in ("cuda", "xpu") else "eager")
x = torch.zeros(4, TASK.seq_len, dtype=torch.int64, device=place)
loss_of(x, x.clone()).backward()
run = begin(model)
for step, (x, y) in enumerate(run.batches(4)):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()
    if run.progress >= 1:
        break
run.log(step=step)
run.submit(model)
"""


def write_data(task, train_rows):
    """Write random tokens into the cache as the data of `task`; returns the folder."""
    folder = prepare.cache_root() / task.dataset
    folder.mkdir(parents=True)
    tokens = (i.to_bytes(2, "big") for i in range(task.vocab_size - 1))
    (folder / "tokenizer.txt").write_bytes(b"".join(base64.b64encode(token) + b"\n" for token in tokens))
    generator = torch.Generator().manual_seed(0)
    for part, rows in (("train", train_rows), ("val", task.eval_rows)):
        shape = rows, task.seq_len + 1
        text = torch.randint(task.vocab_size, shape, dtype=torch.int32, generator=generator)
        text.numpy().astype("uint16").tofile(folder / f"{part}.bin")
    meta = {"task": dataclasses.asdict(task), "seq_len": task.seq_len, "vocab_size": task.vocab_size}
    meta |= {"train": {"rows": train_rows}, "val": {"rows": task.eval_rows}}
    for name, file in (("tokenizer", "tokenizer.txt"), ("val", "val.bin")):
        meta[f"{name}_sha256"] = sha256(folder / file)
    (folder / "meta.json").write_text(json.dumps(meta))
    return verify(task)


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(function, device):
    """Best wall time of function(), which has run once before."""
    best, _ = float("inf"), function()
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each yields rows of the table


def hold(train_py, out, task, flops, warm=None):
    """The result of a trial; raises RuntimeError with what the candidate said where it failed."""
    result = trial(train_py, out, task, 0, beat=0.0, flops=flops, warm=warm)
    if result.outcome != "ok":
        raise RuntimeError(f"the trial failed: {result.reason}\n{(out / 'log.txt').read_text()}")
    return result


def sandbox(task, device, flops, scratch):
    """A small train.py: whether device and compiler work under the sandbox, and how fast the examiner finds it."""
    (scratch / "small.py").write_text(SMALL)
    result = hold(scratch / "small.py", scratch / "small", dataclasses.replace(task, time_budget=2.0), flops)
    yield Row(f"sandbox ({result.sandbox}): a compiled model, steps in 2 s", result.steps)
    yield Row("sandbox: device of the exam", result.device, device.type == "cpu" or "CPU" not in result.device)
    gap = result.matmul_flops / ask_speed(1.5)["matmul_flops"] - 1
    yield Row("sandbox: speed in the exam against a longer measurement", f"{gap:+.1%}", abs(gap) < 0.15)


def trials(task, device, flops, scratch):
    """Two trials of the baseline, the second with what the first has compiled, at the size of the whole budget."""
    short, warm, cold = dataclasses.replace(task, time_budget=BUDGET), None, None
    for kind in ("cold", "warm"):
        told = flops * task.time_budget / BUDGET  # so that the size is that of the whole budget
        result = hold(ROOT / "train.py", scratch / kind, short, told, warm)
        for name in ("startup_seconds", "steps", "eval_seconds", "peak_vram_mb", "leak"):
            if (value := getattr(result, name)) is not None:
                yield Row(f"trial, {kind}: {name}", f"{value:.4g}")
        late = result.total_seconds - result.training_seconds - result.startup_seconds
        yield Row(f"trial, {kind}: seconds after training", f"{late:.1f}")
        if cold:
            share = result.startup_seconds / cold
            yield Row("trial: start-up, warm against cold", f"{share:.0%}", share < 0.7)
        warm, cold = scratch / kind, result.startup_seconds


def attention(task, device, flops, scratch, heads=40, head_dim=128):
    """Which kernel attends, whether its gradients are finite where scores are large, and the time of each kernel."""
    chosen, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, scale=None):
        choice = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, scale=scale)
        chosen.append(SDPBackend(choice).name)
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)

    for keys in (64, 512):
        for kind, length, window in (("causal", keys, keys), ("masked", 4 * keys, keys // 2)):
            shape = 4, heads, length, head_dim
            inputs = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3)]
            q, k, v = (tensor.requires_grad_() for tensor in (8 * train.norm(inputs[0]), *inputs[1:]))

            def both(q=q, k=k, v=v, window=window):
                return torch.autograd.grad(train.attend(q, k, v, window).square().sum(), (q, k, v))

            what = f"attention, {kind}, {keys} keys"
            with train.fast_attention(device):
                with mock.patch.object(F, "scaled_dot_product_attention", spy):
                    finite = all(grad.isfinite().all() for grad in both())
                words = f"{1000 * seconds(both, device):.2f}, {'finite' if finite else 'NOT FINITE'} gradients"
                yield Row(f"{what}: ms of {chosen[-1]}, which is chosen", words, finite)
            for name in train.ATTENTION_KERNELS:
                with sdpa_kernel(getattr(SDPBackend, name)), contextlib.suppress(RuntimeError):  # cannot do this one
                    yield Row(f"{what}: ms of {name} alone", f"{1000 * seconds(both, device):.2f}")


class ShortRun:
    """A run that ends after so many steps instead of by its clock."""

    def __init__(self, run, steps):
        self.batches, self.epoch_tokens, self.steps, self.looks = run.batches, run.epoch_tokens, steps, 0

    def log(self, **values):
        pass

    @property
    def progress(self):
        self.looks += 1
        return self.looks / self.steps


def baseline(task, device, flops, scratch):
    """The baseline of `task`, some steps outside of a trial: time, memory, what is compiled, and then its exam."""
    train.TASK = prepare.TASK = task
    torch.manual_seed(0)
    depth, dim, head_dim, batch = train.size_for(flops * train.EXPECTED_MFU * task.time_budget)
    model = train.GPT(task.vocab_size, task.seq_len, depth, dim, head_dim).to(device)
    loss_of, batch_rows = train.make_loss(model, compiled=device.type in train.COMPILED), batch // task.seq_len
    with train.fast_attention(device):
        start, rows = time.perf_counter(), min(train.DEVICE_TOKENS // task.seq_len, batch_rows)
        rows = train.warm_up(model, loss_of, rows, batch_rows, device)
        passes, graphs = batch_rows // rows, counters["stats"]["unique_graphs"]
        yield Row("baseline", f"depth {depth}, width {dim}, {passes} x {rows} rows per step")
        yield Row("baseline: seconds to compile and warm up", f"{time.perf_counter() - start:.1f}")
        peak = yield from memory_rows("in warm-up", device)

        optimisers = train.Optimisers(model)
        start, run = time.perf_counter(), prepare.begin(model)
        yield Row("baseline: seconds of begin()", f"{time.perf_counter() - start:.1f}")
        *_, mfu = train.train(ShortRun(run, STEPS), model, loss_of, optimisers, rows, passes, flops)
        later = yield from memory_rows("in training", device, optimisers, peak)
        yield Row("baseline: GB in training beyond those of warm-up", f"{(later - peak) / 1e9:.2f}", later < peak + 3e8)
        step = model.flops_per_token() * batch / (mfu * flops)
        yield Row("baseline: milliseconds per step", f"{1000 * step:.1f}")
        yield Row("baseline: MFU against the measured rate", f"{mfu:.1%}")
        compiled = counters["stats"]["unique_graphs"] - graphs
        yield Row("baseline: graphs compiled after warm-up", compiled, compiled == 0)
        batches = run.batches(rows)
        loading = passes * seconds(lambda: next(batches), device)
        yield Row("baseline: reading the data of a step, against the step", f"{loading / step:.1%}")
        yield from exam(model, loss_of, next(batches), task, scratch)


def memory_rows(when, device, optimisers=None, peak=None):
    """Yield rows on the device's memory since the last call; returns the peak in bytes, 0 on a CPU."""
    if device.type == "cpu":
        return 0
    most = torch.accelerator.max_memory_allocated()
    yield Row(f"baseline: GB of memory at most {when}", f"{most / 1e9:.2f}")
    if device.type != "mps":  # whose memory is the machine's
        free, total = torch.accelerator.get_memory_info()
        yield Row(f"baseline: GB free {when}", f"{free / 1e9:.2f} of {total / 1e9:.2f}")
    if optimisers:
        tensors = [value for state in optimisers.adamw.state.values() for value in state.values()]
        tensors += [buffer for _, *buffers, _ in optimisers.muon.groups for buffer in buffers]
        tensors += [optimisers.ngrams.energy, optimisers.ngrams.place]
        yield Row("baseline: GB of the optimisers' state", f"{sum(tensor.nbytes for tensor in tensors) / 1e9:.2f}")
    torch.accelerator.reset_peak_memory_stats()
    return most


def exam(model, loss_of, batch, task, scratch):
    """Seal, save and examine a trained model; compare the sealed program with the graph that was trained."""
    start = time.perf_counter()
    program, constants = prepare.seal(model, task)
    yield Row("exam: seconds to seal", f"{time.perf_counter() - start:.1f}")
    tensors = constants | dict(model.named_buffers(remove_duplicate=False))
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    tensors = {name: tensors[name] for name in program["tensors"].values() if name is not None}
    start, path = time.perf_counter(), scratch / "model.safetensors"
    prepare.save_sealed(path, program, tensors)
    words = f"{time.perf_counter() - start:.1f}, {path.stat().st_size / 1e6:.0f} MB"
    yield Row("exam: seconds to save", words)

    (x, y), forward, losses = batch, prepare.build_forward(program, tensors), []
    trained, size = loss_of(x, y).item(), program["batch"]
    with torch.inference_mode():
        for tokens, targets in zip(x.split(size), y.split(size)):
            filled = tokens.repeat(size, 1)[:size]  # a sealed program takes no fewer rows
            logits = prepare.compute_logits(forward, filled, task)[: len(tokens)]
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item())
    gap = sum(losses) / y.numel() - trained
    yield Row("exam: loss of the sealed program minus that of the trained graph", f"{gap:+.2e}", abs(gap) < 2e-3)
    for what, beat in (("a score that is not kept", 0.0), ("a new best", None)):
        result = examine(path, task, verify(task), beat)
        words = f"{result['eval_seconds'] / EXAM_SHARE:.1f}, leak {result['leak']:.2g}"
        yield Row(f"exam: seconds of {what}, from {EXAM_SHARE:.0%} of the rows", words)


def out_of_memory(task, device, flops, scratch):
    """Warm-up with too little memory for the rows it is given: it has to halve them until they fit."""
    if device.type != "cuda":
        return
    train.TASK, rows, taken = task, 32, []
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        for _ in range(2):
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = train.GPT(task.vocab_size, task.seq_len, 1, 128, 64).to(device)
            with train.fast_attention(device):
                taken.append(train.warm_up(model, train.make_loss(model, compiled=True), rows, rows, device))
            torch.cuda.set_per_process_memory_fraction(0.4 * torch.cuda.max_memory_reserved() / total)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    fine = taken[0] == rows and 1 <= taken[1] <= rows // 2
    yield Row(
        "out of memory: rows per pass, and with 40 % of the memory that they took", f"{taken[0]}, {taken[1]}", fine
    )


# Trials come first: this process takes no memory of the device until then.
PARTS = (sandbox, trials, attention, baseline, out_of_memory)


def measure(parts, task, device, flops, scratch):
    """The rows of all parts; that a part failed is a row as well."""
    table = []
    for part in parts:
        print(f"{part.__name__} ...", file=sys.stderr, flush=True)
        try:
            table.extend(part(task, device, flops, scratch))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            first_line = str(error).strip().partition("\n")[0]
            table.append(Row(f"{part.__name__} FAILED", f"{type(error).__name__}: {first_line}", False))
        if device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # of a broken device
                torch.accelerator.empty_cache()
    return table


def print_table(table):
    print("\n| what | measured |\n|---|---|")
    for what, value, fine in table:
        print(f"| {what} | {value}{'' if fine else ' **WRONG**'} |")


def main():
    if not prepare.has_gpu():
        print("gpu_smoke.py: there is no GPU here that this torch can use", file=sys.stderr)
        return 2
    try:
        device = prepare.find_device()
    except prepare.Pause as fault:
        print(f"gpu_smoke.py: {fault}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        # Of its own, so that nothing is known or compiled beforehand; begin() leaves its first save in tempdir.
        os.environ["AUTORESEARCH_CACHE"], tempfile.tempdir = f"{scratch}/cache", scratch
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compiled"
        write_data(TASK, TRAIN_ROWS)
        flops = prepare.machine_flops()
        table = [
            Row("device", f"{device_name(device)}, torch {torch.__version__}"),
            Row("TFLOP/s that sizes are chosen by", f"{flops / 1e12:.1f}"),
            *measure(PARTS, TASK, device, flops, Path(scratch)),
        ]
    print_table(table)
    return 0 if all(row.fine for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())

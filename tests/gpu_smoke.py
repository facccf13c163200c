"""Runs the CUDA path for a few minutes and prints a table for the README; by hand: python tests/gpu_smoke.py

Two trials of the baseline on pycode from start to score; then climbmix's baseline on random tokens: step, memory, exam.
Exits with 2 where there is no CUDA device, and with 1 if anything fails.
"""

import base64
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402

BUDGET = 60.0  # seconds of each trial
STEPS = 20  # of climbmix's baseline


class RandomRun:
    """The exam board's side of a run, over random tokens; the clock advances by a step at every look."""

    def __init__(self, task, device, steps):
        self.task, self.device, self.steps, self.looks = task, device, steps, 0

    def batches(self, rows):
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (rows, self.task.seq_len + 1)
        while True:
            text = torch.randint(self.task.vocab_size, shape, device=self.device, generator=generator)
            yield text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def log(self, **values):
        pass

    @property
    def progress(self):
        self.looks += 1
        return self.looks / self.steps


def trials(scratch):
    """Yield (what, value) of two trials of the same code and seed."""
    task, scores = prepare.get_task("pycode", BUDGET), []
    prepare.prepare(task)
    for run in range(2):
        result = prepare.trial(ROOT / "train.py", scratch / f"trial{run}", task, 0)
        if result["outcome"] != "ok":
            raise SystemExit(f"the trial failed: {result['reason']}\n{(scratch / f'trial{run}/log.txt').read_text()}")
        scores.append(result["val_bpb"])
        for name in ("val_bpb", "steps", "startup_seconds", "eval_seconds", "peak_vram_mb", "leak", "noise"):
            yield f"pycode, {BUDGET:.0f} s, trial {run + 1}: {name}", f"{result[name]:.6g}"
        overhead = result["total_seconds"] - result["training_seconds"]
        yield f"pycode, {BUDGET:.0f} s, trial {run + 1}: seconds beyond training", f"{overhead:.1f}"
    yield "pycode: difference of val_bpb between the two", f"{abs(scores[0] - scores[1]):.6f}"


def baseline(task, device, flops):
    """Train the baseline of `task` for STEPS steps on random tokens: (model, [(what, value)])."""
    train.TASK = task
    torch.manual_seed(0)
    depth, dim, head_dim, batch = train.size_for(flops * train.EXPECTED_MFU * task.time_budget)
    model = train.GPT(task.vocab_size, task.seq_len, depth, dim, head_dim).to(device)
    loss_of, batch_rows = train.make_loss(model, compiled=device.type == "cuda"), batch // task.seq_len
    matrices = list(model.blocks.parameters())
    with train.fast_attention(device):
        start = time.perf_counter()
        rows = train.warm_up(model, loss_of, min(train.DEVICE_TOKENS // task.seq_len, batch_rows), device)
        warm_up = time.perf_counter() - start
        passes, optimisers = batch_rows // rows, (train.make_adamw(model), train.Muon(matrices))
        run = RandomRun(task, device, STEPS)
        *_, mfu = train.train(run, model, loss_of, *optimisers, rows, passes, flops)
        flops_per_step = model.flops_per_token() * batch
    return model, [
        ("size", f"depth {depth}, width {dim}, {passes} x {rows} rows per step"),
        ("seconds to compile and warm up", f"{warm_up:.1f}"),
        ("milliseconds per step", f"{1000 * flops_per_step / (mfu * flops):.1f}"),
        ("MFU against the measured rate", f"{mfu:.1%}"),
    ]


def exam(model, task, folder):
    """Examine `model` on random rows of the task's shape: [(what, value)]."""
    tokens = (i.to_bytes(2, "big") for i in range(task.vocab_size - 1))
    (folder / "tokenizer.txt").write_bytes(b"".join(base64.b64encode(token) + b"\n" for token in tokens))
    rows = torch.randint(task.vocab_size, (task.eval_rows, task.seq_len + 1), dtype=torch.int32)
    rows.numpy().astype("uint16").tofile(folder / "val.bin")
    program, constants = prepare.seal(model, task)
    tensors = prepare.Run(program, constants, None, None)._tensors(model)
    prepare.save_sealed(folder / "model.safetensors", program, tensors)
    values = []
    for what, beat in (("first exam", 0.0), ("closer exam", None)):
        result = prepare.examine(folder / "model.safetensors", task, folder, beat)
        values += [(f"{what}: {name}", f"{result[name]:.3g}") for name in ("eval_seconds", "leak", "noise")]
    return values


def main():
    if not torch.cuda.is_available():
        print("gpu_smoke.py: there is no CUDA device here; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 2
    device, task, flops = torch.device("cuda"), prepare.TASKS["climbmix"], prepare.machine_flops()
    table = [
        ("device", torch.cuda.get_device_name()),
        ("torch", torch.__version__),
        ("TFLOP/s of matrix products in bfloat16", f"{flops / 1e12:.1f}"),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        table += trials(Path(scratch))
        (first, measured), (second, _) = baseline(task, device, flops), baseline(task, device, flops)
        measured.append(("GB of memory at most", f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"))
        pairs = zip(first.parameters(), second.parameters())
        gap = max((a - b).abs().max().item() for a, b in pairs)
        measured.append((f"largest difference between weights after {STEPS} steps, twice", f"{gap:.3g}"))
        del second
        measured += exam(first, task, Path(scratch))
        table += [(f"climbmix's baseline: {what}", value) for what, value in measured]
    print("\n| what | measured |\n|---|---|")
    print("\n".join(f"| {what} | {value} |" for what, value in table))
    return 0


if __name__ == "__main__":
    sys.exit(main())

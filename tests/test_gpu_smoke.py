"""The scripts that look at GPUs, on a CPU: gpu_smoke.py at a small size, and what compile_cuda.py reads of memory."""

import dataclasses
import os

import compile_cuda
import gpu_smoke
import pytest
import torch
from conftest import ROOT

import prepare
import train

SMALL = prepare.Task("smoke", "smoke", 64, 300, 2**13, 2.0, split_long=True)
CPU, FLOPS = torch.device("cpu"), 2e11


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure(*parts): {what: row} of those parts on the CPU, over random tokens in a cache of their own."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_smoke, "REPEATS", 1)
    gpu_smoke.write_data(SMALL, 64)
    return lambda *parts: {row.what: row for row in gpu_smoke.measure(parts, SMALL, CPU, FLOPS, tmp_path)}


ON_GPU = """
import sys, tempfile
sys.path.insert(0, "tests")
from pathlib import Path
import gpu_smoke, prepare, torch

task = prepare.Task("smoke", "smoke", 64, 300, 2**13, 2.0, split_long=True)
gpu_smoke.STEPS, gpu_smoke.REPEATS, gpu_smoke.EXAM_SHARE, tempfile.tempdir = 3, 1, 1.0, sys.argv[1]
gpu_smoke.write_data(task, 64)
gpu_smoke.print_table(gpu_smoke.measure([gpu_smoke.baseline], task, torch.device("cuda"), 2e11, Path(sys.argv[1])))
"""


def test_the_baseline_is_measured_from_warm_up_to_exam(gpu_python, run, tmp_path):
    """On the device that the CPU plays."""
    setting = {"TORCH_STAND_IN": "NVIDIA H100 80GB HBM3", "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    said = run(gpu_python, "-c", ON_GPU, tmp_path, cwd=ROOT, env=os.environ | setting)
    table = dict(line[2:-2].split(" | ") for line in said.stdout.splitlines() if line.startswith("| "))
    assert "WRONG" not in said.stdout, said.stderr
    assert table["baseline: graphs compiled after warm-up"] == "0"
    assert table["baseline: GB of memory at most in training"] == "1.07"
    assert table["exam: seconds of a new best, from 100% of the rows"].endswith("leak 0")


def test_the_smoke_test_holds_a_trial_with_a_compiled_model(measure):
    rows = measure(gpu_smoke.sandbox)
    steps, device, speed = rows.values()
    assert steps.value > 0 and "CPU" in device.value
    assert speed.value.endswith("%")


def test_attention_kernels_are_named_and_their_gradients_looked_at(measure):
    rows = measure(lambda *given: gpu_smoke.attention(*given, heads=1, head_dim=32))
    assert all(row.fine for row in rows.values())
    for what in ("causal, 64", "causal, 512", "masked, 64", "masked, 512"):
        assert f"attention, {what} keys: ms of MATH, which is chosen" in rows
        assert f"attention, {what} keys: ms of FLASH_ATTENTION alone" in rows


def test_the_table_is_printed_where_a_part_fails(measure, capsys):
    def broken(*given):
        yield gpu_smoke.Row("before", 1)
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    def fine(*given):
        yield gpu_smoke.Row("after", 2)

    rows = measure(broken, fine)
    gpu_smoke.print_table(rows.values())
    assert capsys.readouterr().out.splitlines()[3:] == [
        "| before | 1 |",
        "| broken FAILED | RuntimeError: CUDA error: uncorrectable ECC error **WRONG** |",
        "| after | 2 |",
    ]


def test_the_memory_of_a_pass_grows_with_its_rows_and_holds_all_that_must_be_kept():
    task = dataclasses.replace(compile_cuda.TASK, seq_len=256)

    def saved(rows):
        forward, _, held = compile_cuda.trace_step(task, (1, 128, 64, 0), rows, (8, 6))
        return compile_cuda.saved_bytes(forward), held

    (once, held), (twice, _) = saved(4), saved(8)
    assert 1.85 * once < twice < 2 * once  # the weights in bfloat16 are kept as well
    # What no recomputation replaces: inputs of the products and of attention, the MLP before its ReLU, the logits.
    assert once > 4 * 256 * 2 * (128 + 3 * 128 + 128 + 2 * 512 + 8192)
    # Weights, gradients, and the two moments of AdamW or the one of Muon.
    model = train.GPT(8192, 256, 1, 128, 64)
    matrices = sum(p.numel() for p in model.blocks.parameters())
    table = model.ngram_embed.table
    dense = sum(p.numel() for p in model.parameters()) - table.numel()
    # Two bytes for each number of the tables, and for what was found in them twice; per row a sum and a place.
    ngrams = 2 * table.numel() + 12 * len(table) + 2 * 2 * 4 * 256 * 2 * 128
    assert held == pytest.approx(4 * (4 * dense - matrices) + ngrams, rel=0.01)

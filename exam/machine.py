"""The nominal rate of the machine, by which train.py sizes its model. What it does at this moment is for speed.py.

The rate is the same for all cards of a kind: what such a card reaches by the table below. A CPU, or a GPU that the
table lacks, has none but the best measured so far, remembered in hardware.json.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys

from exam.files import ROOT, cache_lock, write_atomically
from exam.processes import exit_reason, usable_cores
from exam.speed import measure_flops
from prepare import PAUSE_CODE, Pause, Trouble, has_gpu

# Rates of bfloat16 products with float32 accumulation, dense, in TFLOP/s, by the name that CUDA gives a card. A name
# has to match whole: a laptop's card or a MIG instance is slower than the one whose name it extends. Turing and older
# cards (RTX 2080 Ti, T4) are left out: they have no bfloat16 units, and what stands in for these varies.
NOMINAL_TFLOPS = {
    # Measured with torch 2.8: large square products (github.com/zzc0721/torch-performance-test-data, 2025).
    "NVIDIA B200": 1700,
    "NVIDIA H200": 785,
    "NVIDIA H100 80GB HBM3": 785,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 415,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 410,
    "NVIDIA L40S": 270,
    "NVIDIA A100-SXM4-80GB": 265,
    "NVIDIA A100-SXM4-40GB": 265,
    "NVIDIA H20": 142,
    "NVIDIA RTX A6000": 123,
    "NVIDIA GeForce RTX 5090": 236,
    "NVIDIA GeForce RTX 4090": 163,
    "NVIDIA GeForce RTX 4090 D": 149,
    "NVIDIA GeForce RTX 4070 SUPER": 74,
    "NVIDIA GeForce RTX 4060 Ti": 43,
    "NVIDIA GeForce RTX 3090": 76,
    "NVIDIA GeForce RTX 3080 Ti": 76,
    # The best products found (MAMF table of github.com/stas00/ml-engineering).
    "NVIDIA A100 80GB PCIe": 250,
    "NVIDIA A100-PCIE-40GB": 250,
    # NVIDIA's datasheets: GeForce cards reach theirs, and those that a low limit of power holds back 0.5 to 0.75.
    "NVIDIA H100 NVL": 620,
    "NVIDIA H200 NVL": 620,
    "NVIDIA H100 PCIe": 550,
    "NVIDIA RTX 6000 Ada Generation": 260,
    "NVIDIA A40": 110,
    "NVIDIA A10": 85,
    "NVIDIA A10G": 55,
    "NVIDIA L4": 60,
    "NVIDIA GeForce RTX 5080": 113,
    "NVIDIA GeForce RTX 5070 Ti": 88,
    "NVIDIA GeForce RTX 5070": 62,
    "NVIDIA GeForce RTX 4080 SUPER": 104,
    "NVIDIA GeForce RTX 4080": 97,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88,
    "NVIDIA GeForce RTX 4070 Ti": 80,
    "NVIDIA GeForce RTX 4070": 58,
    "NVIDIA GeForce RTX 4060": 30,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 3080": 60,
    "NVIDIA GeForce RTX 3070 Ti": 43,
    "NVIDIA GeForce RTX 3070": 41,
    "NVIDIA GeForce RTX 3060 Ti": 32,
    "NVIDIA GeForce RTX 3060": 26,
}
FIT_SPEED = 0.75  # share of the nominal rate below which --check complains


def machine_flops(again=False):
    """What prepare.machine_flops() tells outside a trial. Raises Pause for a broken GPU.

    again: measure once more, and remember the result if it is higher by a tenth: other programs had used the machine
    then. Less is noise, for which the sizes that follow from the rate must not change.
    """
    part = f", {usable_cores()} cores" * (usable_cores() < os.cpu_count())
    device = ask_speed(0)["device"] if has_gpu() else f"CPU{part}"
    if device in NOMINAL_TFLOPS:
        return 1e12 * NOMINAL_TFLOPS[device]
    with cache_lock("hardware") as root:
        path, key, known = root / "hardware.json", f"{platform.node()}, {device}", {}
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            known = {name: e for name, e in json.loads(path.read_text()).items() if e["matmul_flops"] > 0}
        if again or key not in known:
            print("measuring the matrix-multiply rate of this machine", flush=True)
            measured = ask_speed(1.5)
            if key not in known or measured["matmul_flops"] > 1.1 * known[key]["matmul_flops"]:
                known[key] = measured
                write_atomically(path, json.dumps(known, indent=1) + "\n")
        return known[key]["matmul_flops"]


def ask_speed(seconds):
    """measure_flops(seconds), asked of a process that ends with the answer and leaves the GPU's memory to others.

    Raises Pause for a broken GPU, and Trouble where torch cannot be used at all.
    """
    command = [sys.executable, str(ROOT / "prepare.py"), "_speed", str(seconds)]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [exit_reason(asked.returncode)]
        raise (Pause if asked.returncode == PAUSE_CODE else Trouble)(said[-1].removeprefix("prepare.py: "))
    return json.loads(asked.stdout.splitlines()[-1])


def answer_speed(seconds):
    """The other side of ask_speed: prints the answer; returns the exit code."""
    try:
        print(json.dumps(measure_flops(seconds)))
        return 0
    except Pause as fault:
        print(f"prepare.py: {fault}", file=sys.stderr)
        return PAUSE_CODE

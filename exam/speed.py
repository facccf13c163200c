"""How fast the machine multiplies matrices at this moment, as every trial, every exam and --check ask it.

Timed here, in the asking process, which then holds the GPU. What a machine should reach is for machine.py.
"""

import time

import numpy as np

from prepare import Pause, device_fault, find_device, matmul_dtype


def measure_flops(seconds=1.5):
    """{device, matmul_flops}: the best of many timed products of square matrices, three samples at least.

    Raises Pause for a broken GPU.
    """
    import torch

    device = find_device()
    size = {"cpu": 1024, "cuda": 8192}.get(device.type, 4096)

    def sample(products):
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / products

    try:
        a = torch.randn(size, size, dtype=matmul_dtype(), device=device)
        sample(1)  # not counted: it loads the library and its kernels, which takes as long as a hundred products
        end, samples = time.monotonic() + seconds, []
        while len(samples) < 3 or time.monotonic() < end:
            samples.append(sample(5))
    except RuntimeError as error:
        raise (error if device.type == "cpu" else Pause(device_fault(error))) from None
    return {"device": device_name(device), "matmul_flops": 2 * size**3 / min(samples)}


def cpu_rate(seconds=0.2):
    """FLOP/s of the CPU in float32 products of square matrices, the best of many samples, by numpy alone.

    A proctor has numpy at hand, while torch takes seconds to load: so it can ask the moment that a candidate has ended.
    """
    size, samples, end = 1024, [], time.monotonic() + seconds
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    a @ a  # starts the threads
    while len(samples) < 3 or time.monotonic() < end:
        start = time.perf_counter()
        a @ a
        samples.append(time.perf_counter() - start)
    return 2 * size**3 / min(samples)


def device_name(device):
    """What a torch.device calls itself."""
    import torch

    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.backends.mps.get_name() if device.type == "mps" else torch.get_device_module(device).get_device_name()

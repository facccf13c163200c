"""How fast the machine multiplies matrices at this moment, as every exam and --check ask it.

Timed here, in the asking process, which then holds the GPU. What a machine should reach is for machine.py.
"""

import time

from prepare import Pause, device_fault, find_device, matmul_dtype


def measure_flops(seconds=1.5):
    """{device, matmul_flops}: the best of many timed products of square matrices, three samples at least.

    Raises Pause for a broken GPU.
    """
    import torch

    device = find_device()
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024

    def sample(products):
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / products

    try:
        a = torch.randn(size, size, dtype=matmul_dtype(), device=device)
        sample(1)  # not counted: it loads the library and its kernels, which takes as long as a hundred products
        end, samples = time.monotonic() + seconds, []
        while len(samples) < 3 or time.monotonic() < end:
            samples.append(sample(5))
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    except RuntimeError as error:
        raise (Pause(device_fault(error)) if cuda else error) from None
    return {"device": name, "matmul_flops": 2 * size**3 / min(samples)}

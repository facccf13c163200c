"""What the baseline of climbmix asks of GPUs, found on a machine without one; by hand, a minute or two a card.

  python tests/compile_cuda.py                     memory at the sizes that known cards get, against what they have
  python tests/compile_cuda.py --code "RTX 3090"   compile its kernels for that card, launching none; needs Triton

The training step is traced on fake tensors, which have shapes but no memory, and split into forward and backward as
the compiler splits it: what the forward returns for the backward is what a pass keeps in memory. Kernels are made by
inductor and Triton from the same two graphs, moved to a CUDA device that is not there.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import types
from collections import namedtuple
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402

TASK = prepare.TASKS["climbmix"]
aten = torch.ops.aten

# Memory in GiB, dense bfloat16 products in TFLOP/s, compute capability.
Card = namedtuple("Card", "name memory teraflops capability")
CARDS = (
    Card("RTX 3050", 4, 18, (8, 6)),
    Card("RTX 3070", 8, 41, (8, 6)),
    Card("RTX 3060", 12, 26, (8, 6)),
    Card("RTX 3090", 24, 76, (8, 6)),
    Card("RTX 4090", 24, 163, (8, 9)),
    Card("A100 40 GB", 40, 265, (8, 0)),
    Card("A100 80 GB", 80, 265, (8, 0)),
    Card("H100", 80, 785, (9, 0)),
)
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448}  # bytes that a block may take
CONTEXT = 0.8e9  # bytes that CUDA, its libraries and the code of kernels take beside all tensors

# ---------------------------------------------------------------------------------------------------------------------
# The training step on fake tensors


def cuda_attention(cudnn):
    """scaled_dot_product_attention as CUDA calls its kernels: cuDNN's, else flash and, under a mask, efficient."""

    def attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
        bias = None
        if attn_mask is not None:
            bias = torch.where(attn_mask, 0.0, -65504.0).to(q.dtype)
            bias = bias.expand(q.size(0), q.size(1), q.size(2), k.size(2))
        if cudnn:
            call, options = aten._scaled_dot_product_cudnn_attention, (bias, True, 0.0, is_causal, False)
        elif bias is not None:
            call, options = aten._scaled_dot_product_efficient_attention, (bias, True, 0.0, is_causal)
        else:
            call, options = aten._scaled_dot_product_flash_attention, (0.0, is_causal, False)
        return call(q, k, v, *options, scale=scale)[0]

    return attention


def trace(function, *inputs):
    """The graphs of function(*fake tensors) as the compiler gets them: forward and, where there is one, backward."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()
    )
    torch.compiler.reset()
    result = torch.compile(function, backend=backend, dynamic=False)(*inputs)
    if result.requires_grad:
        result.backward()
    return graphs


def trace_step(task, size, rows, capability):
    """(forward, backward, bytes of weights, gradients and optimisers) of a pass of `rows` rows; size: see size_for.

    Rows of the n-gram tables are found before the pass and moved after it, outside of the graphs.
    """
    cudnn = train.ATTENTION_KERNELS[0] == "CUDNN_ATTENTION" and capability[0] in train.CUDNN_CAPABILITY
    depth, dim, head_dim, batch = size
    with (
        mock.patch.object(F, "scaled_dot_product_attention", cuda_attention(cudnn)),
        mock.patch.object(train, "DTYPE", torch.bfloat16),  # whatever the CPU that traces would take
        FakeTensorMode(),
    ):
        model = train.GPT(task.vocab_size, task.seq_len, depth, dim, head_dim)
        text = torch.zeros(rows, task.seq_len + 1, dtype=torch.int64)
        x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        ngrams = torch.zeros(*x.shape, len(train.NGRAM_ORDERS), dim, dtype=torch.bfloat16, requires_grad=True)
        with mock.patch.object(torch, "compile") as compile_loss:
            train.make_loss(model, compiled=True)
        forward, backward = trace(*compile_loss.call_args.args, x, y, ngrams)
        optimisers = train.Optimisers(model)
    table, dense = model.ngram_embed.table, sum(p.nbytes for p in model.parameters()) - model.ngram_embed.table.nbytes
    states = [2 * p.nbytes for group in optimisers.adamw.param_groups for p in group["params"]]
    states += [first.nbytes + second.nbytes for _, first, second, _ in optimisers.muon.groups]
    states += [table.nbytes, optimisers.ngrams.energy.nbytes, optimisers.ngrams.place.nbytes]
    # Of the tables a pass holds what it has found, and until the step the gradients of all that a batch has found.
    found = ngrams.nbytes + max(1, batch // x.numel()) * ngrams.nbytes
    return forward, backward, 2 * dense + sum(states) + found


def saved_bytes(forward):
    """Bytes that the graph `forward` returns beside what it was given: its result, and what the backward will read."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    given = [node for node in forward.graph.nodes if node.op == "placeholder"]
    returned = [node for node in output.args[0] if isinstance(node, torch.fx.Node)]

    def storages(nodes):  # several tensors may be views of one
        tensors = [node.meta["val"] for node in nodes if isinstance(node.meta["val"], torch.Tensor)]
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}

    known = storages(given)
    return sum(size for key, size in storages(returned).items() if key not in known)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory(card):
    """Yield (rows per pass, passes, saved, held, logits, total) in bytes, from the first guess to what fits the card.

    saved: for the backward pass; held: weights, gradients and optimisers; logits: the gradient of those of a pass, the
    first that the backward makes, when all that was saved is still there.
    """
    with mock.patch.object(train, "TASK", TASK):
        size = train.size_for(card.teraflops * 1e12 * train.EXPECTED_MFU * TASK.time_budget)
        batch_rows = size[-1] // TASK.seq_len
        rows = min(train.DEVICE_TOKENS // TASK.seq_len, batch_rows)
        while rows:
            forward, _, held = trace_step(TASK, size, rows, card.capability)
            saved, logits = saved_bytes(forward), 2 * rows * TASK.seq_len * TASK.vocab_size
            total = saved + held + logits + CONTEXT
            yield size, rows, batch_rows // rows, saved, held, logits, total
            if total <= card.memory * 2**30:
                return
            rows //= 2


def print_memory():
    print("| card | GB | depth x width | passes x rows | saved | weights, optimisers | logits | in all, GB | |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for card in CARDS:
        for size, rows, passes, *parts, total in memory(card):
            has = card.memory * 2**30
            numbers = [f"{card.name}", f"{has / 1e9:.1f}", f"{size[0]} x {size[1]}", f"{passes} x {rows}"]
            numbers += [f"{part / 1e9:.1f}" for part in (*parts, total)]
            print(f"| {' | '.join(numbers)} | {'fits' if total <= has else 'too much: halved'} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Code


def pretend_cuda(capability):
    """Have torch believe in a CUDA device of that compute capability, for the rest of the process."""
    major, minor = capability
    properties = types.SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
        warp_size=32,
        multi_processor_count=100,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048 if minor == 0 else 1536,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY[capability],
        shared_memory_per_multiprocessor=SHARED_MEMORY[capability] + 1024,
        L2_cache_size=2**25,
        total_memory=24 * 2**30,
    )
    cuda = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda._lazy_init = cuda.synchronize = cuda.set_rng_state = lambda *_: None
    cuda._exchange_device = cuda._maybe_exchange_device = lambda _: 0
    cuda._get_device_properties = cuda.get_device_properties = lambda *_: properties
    cuda.get_device_capability, cuda.get_rng_state = lambda *_: capability, lambda *_: torch.get_rng_state()
    torch._C._cuda_getCurrentRawStream, torch.version.cuda = lambda _: 0, "13.0"
    # As methods these two ask for the driver of their device, even for a fake tensor; as operators they do not.
    torch.Tensor.__invert__ = lambda tensor: aten.bitwise_not(tensor)
    torch.Tensor.copy_ = lambda tensor, source: aten.copy_(tensor, source)


def pretend_triton(capability):
    """Have Triton compile for that compute capability and load nothing, for the rest of the process.

    Returns a list that grows as kernels are compiled: (name, configurations, those of them that take more shared memory
    than the card has).
    """
    import torch._inductor.config as config
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch._inductor.runtime.triton_heuristics as triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target, kernels = GPUTarget("cuda", 10 * capability[0] + capability[1], 32), []
    answers = {
        "get_current_target": target,
        "get_current_device": 0,
        "get_current_stream": 0,
        "get_device_interface": torch.cuda,
        "is_active": True,
    }
    driver.set_active(types.SimpleNamespace(**{name: lambda *_, value=value: value for name, value in answers.items()}))
    triton_helpers.set_driver_to_gpu = lambda: None

    def count(autotuner):  # in place of loading the compiled kernels
        made = [result.kernel for result in autotuner.compile_results]
        taken = [getattr(kernel, "metadata", kernel).shared for kernel in made]
        kernels.append((autotuner.fn.__name__, len(taken), sum(n > SHARED_MEMORY[capability] for n in taken)))

    triton_heuristics.CachingAutotuner._make_launchers = count
    config.compile_threads, config.fx_graph_cache = 1, False
    torch.utils._triton.has_triton.cache_clear()
    return kernels


def move_to_cuda(graph, scalars_stay):
    """Have a graph that was traced on the CPU compute on CUDA; scalars_stay: 0-D tensors remain on the CPU."""
    device = torch.device("cuda", 0)

    def moved(tensor):
        if scalars_stay and tensor.ndim == 0:
            return torch.empty((), dtype=tensor.dtype)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(torch.Tensor, moved, node.meta["val"])
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def compile_graph(what, graph, kernels, scalars_stay=False, **options):
    """Compile a graph with inductor and Triton, for real up to the binary, and print a line about it."""
    from torch._inductor.compile_fx import compile_fx_inner

    start, before = time.perf_counter(), len(kernels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        compile_fx_inner(graph, move_to_cuda(graph, scalars_stay), **options)
    made, seconds = kernels[before:], time.perf_counter() - start
    unfit = [name for name, configurations, too_large in made if configurations == too_large]
    words = f"{len(made)} kernels in {sum(n for _, n, _ in made)} configurations, {seconds:.0f} s"
    print(f"{what}: {words}{f'; NO CONFIGURATION FITS: {unfit}' if unfit else ''}", flush=True)


def compile_for(card):
    """Compile the training graphs and the updates of Muon for `card` at its sizes."""
    with mock.patch.object(train, "TASK", TASK):
        size = train.size_for(card.teraflops * 1e12 * train.EXPECTED_MFU * TASK.time_budget)
        rows = min(train.DEVICE_TOKENS, size[-1]) // TASK.seq_len
        print(f"{card.name}: depth {size[0]}, width {size[1]}, {rows} rows per pass", flush=True)
        forward, backward, _ = trace_step(TASK, size, rows, card.capability)
        print(f"saved for the backward pass: {saved_bytes(forward) / 1e9:.1f} GB", flush=True)
        muons = []
        with FakeTensorMode(), torch.no_grad():
            muon = train.Muon(list(train.GPT(TASK.vocab_size, TASK.seq_len, *size[:3]).blocks.parameters()))
            for _, first, second, gain in muon.groups:
                stack = torch.zeros_like(first), torch.zeros_like(first), first, second
                graphs = trace(train.muon_update, *stack, muon.lr * gain, muon.momentum, muon.decay)
                muons.append((tuple(first.shape), *graphs))
    pretend_cuda(card.capability)
    kernels = pretend_triton(card.capability)
    compile_graph("forward", forward, kernels)
    compile_graph("backward", backward, kernels, is_backward=True)
    for shape, graph in muons:
        compile_graph(f"Muon {shape}", graph, kernels, scalars_stay=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [card.name for card in CARDS]
    parser.add_argument("--code", metavar="CARD", choices=names, help=f"compile for a card instead: {', '.join(names)}")
    arguments = parser.parse_args()
    if not arguments.code:
        print_memory()
        return 0
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

        with tempfile.TemporaryDirectory() as scratch:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
            compile_for(CARDS[names.index(arguments.code)])
        return 0
    print("compile_cuda.py: --code needs Triton; run in another environment: pip install triton", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

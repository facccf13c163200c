"""train.py: what the baseline promises, checked against formulas written out here rather than stored numbers."""

import functools
import math
import operator
import os
import runpy
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import TINY  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402

T, V = 64, 128


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these tensors are too small to share, least of all on a busy machine
    monkeypatch.setattr(train, "TASK", types.SimpleNamespace(seq_len=T, vocab_size=V, time_budget=1.0))


def small_model(depth=3, seed_weights=True):
    """A model whose every weight matters: projections that start at zero are given values."""
    model = train.GPT(V, T, depth, 64, 32)
    if seed_weights:
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                torch.nn.init.normal_(p, std=0.1)
        torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


class FakeRun:
    """The exam board's side of a run, over three batches in turn; the clock advances by a step at every look."""

    epoch_tokens = 10**6

    def __init__(self, steps):
        self.steps, self.looks, self.logged, self.submitted = steps, 0, [], None

    def batches(self, rows):
        texts = torch.randint(V, (3, rows, T + 1), generator=torch.Generator().manual_seed(1))
        while True:
            for text in texts:
                yield text[:, :-1], text[:, 1:]

    def log(self, **values):
        self.logged.append(values)

    @property
    def progress(self):
        self.looks += 1
        return self.looks / self.steps

    def submit(self, model):
        self.submitted = model


# The model


@pytest.mark.parametrize("length, window", [(64, 8), (64, 32), (96, 32), (64, 64), (64, 100), (32, 1)])
def test_windowed_attention_equals_attention_under_a_banded_mask(length, window):
    q, k, v = torch.randn(3, 2, 3, length, 16).unbind()
    i, j = torch.arange(length)[:, None], torch.arange(length)
    band = (j <= i) & (j > i - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    torch.testing.assert_close(train.attend(q, k, v, window), expected, atol=2e-6, rtol=1e-5)


def test_a_window_that_does_not_divide_the_sequence_is_refused_in_words():
    q = torch.randn(1, 1, 10, 8)
    with pytest.raises(ValueError, match="divide the sequence"):
        train.attend(q, q, q, 4)


def test_rotary_scores_depend_only_on_the_distance_between_positions():
    cos, sin = (table.float() for table in train.rotary_tables(16, 32))
    q, k = (train.rotate(torch.randn(32).expand(1, 16, 1, 1, 32), cos, sin)[0, :, 0, 0] for _ in range(2))
    scores = q @ k.T
    for distance in range(1, 15):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=0.15, rtol=0)
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(16), atol=0.03, rtol=0)


@pytest.mark.parametrize("window", [8, T])
def test_attention_equals_its_formula_with_half_of_each_key_from_the_token_before(window):
    attention, (cos, sin) = train.Attention(64, 32, window, True).float(), train.rotary_tables(T, 32)
    torch.nn.init.normal_(attention.gate.weight)
    x, tables = torch.randn(1, T, 64), torch.randn(1, T, 3, 64)
    q, k, v = (layer(x).view(T, 2, 32).transpose(0, 1) for layer in (attention.query, attention.key, attention.value))
    q, k = (train.norm(train.rotate(part, cos[:, 0, 0], sin[:, 0, 0])) for part in (q, k))
    gates = train.GATE_RANGE * attention.gate(x[..., :32]).sigmoid()[0]
    for n in range(3):  # the token's own, that of its bigram, that of its trigram
        v = v + gates[:, 2 * n : 2 * n + 2].T[..., None] * tables[0, :, n].view(T, 2, 32).transpose(0, 1)
    keys = k.clone()
    for pair in range(8, 16):  # the slower half of the 16 rotations
        for channel in (pair, pair + 16):
            keys[:, 1:, channel], keys[:, 0, channel] = k[:, :-1, channel], 0.0
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores = (q @ keys.mT / 32**0.5).masked_fill((j > i) | (j <= i - window), -math.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, T, 64))
    torch.testing.assert_close(attention(x, tables, cos, sin), expected, atol=1e-4, rtol=1e-3)


def test_logits_never_depend_on_later_tokens():
    model = small_model()
    before = torch.randint(V, (2, T))
    for cut in (1, 9, 40, T - 1):
        after = torch.cat([before[:, :cut], torch.randint(V, (2, T - cut))], 1)
        with torch.no_grad():
            assert torch.equal(model(before)[:, :cut], model(after)[:, :cut])


def test_every_token_of_the_past_reaches_the_last_logits():
    model = small_model()
    tokens = torch.randint(V, (1, T))
    for position in (0, T // 2, T - 1):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % V
        with torch.no_grad():
            assert not torch.equal(model(tokens)[0, -1], model(changed)[0, -1])


@pytest.mark.parametrize("order, back", [(0, 1), (1, 2)])
def test_an_ngram_is_found_by_its_tokens_and_by_no_other(order, back):
    ngrams, tokens = small_model().ngram_embed, torch.randint(V, (1, T))
    torch.nn.init.normal_(ngrams.table)
    before = ngrams(tokens)[0, :, order]
    again = torch.cat([torch.randint(V, (1, 9)), tokens[:, :20]], 1)  # the same text nine positions later
    torch.testing.assert_close(ngrams(again)[0, 9 + back :, order], before[back:20], rtol=0, atol=0)
    for distance in range(4):
        changed = tokens.clone()
        changed[0, 30 - distance] = (changed[0, 30 - distance] + 1) % V
        same = torch.equal(ngrams(changed)[0, 30, order], before[30])
        assert same == (distance > back)


def test_training_reads_only_as_many_ngrams_as_it_is_told_and_the_score_all():
    ngrams, tokens = small_model().ngram_embed, torch.randint(V, (40, T))
    torch.nn.init.ones_(ngrams.table)
    assert ngrams(tokens).all()
    ngrams.keep = 0.25
    read = ngrams(tokens)
    assert torch.equal(read.amin(-1), read.amax(-1))  # a whole n-gram or nothing of it
    assert 0.2 < read.float().mean() < 0.3
    assert 0.01 < read[:, :, :, 0].float().prod(-1).mean() < 0.12  # each order on its own
    assert ngrams.eval()(tokens).all()


@pytest.mark.parametrize("passes, keep", [(0.5, 1.0), (2, 0.25), (4, 0.0625)])
def test_ngrams_are_read_less_often_the_more_often_a_run_will_have_read_its_text(passes, keep):
    run, model = FakeRun(20), small_model(2, seed_weights=False)
    run.epoch_tokens = 20 * 2 * T / passes
    train.train(run, model, train.make_loss(model, False), train.Optimisers(model), 2, 1, 1e12)
    assert model.ngram_embed.keep == pytest.approx(keep)


def test_two_ngrams_that_share_a_row_of_one_table_differ_in_the_other():
    ngrams = small_model().ngram_embed
    ngrams.table.data = torch.arange(len(ngrams.table)).float()[:, None].expand(-1, 32).clone()  # rows by number
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    first, second = ngrams(pairs)[:, 1, 0, [0, -1]].unbind(1)
    assert len(first.unique()) < len(pairs)  # some do share a row
    assert len(torch.stack([first, second]).unique(dim=1).T) > 0.999 * len(pairs)


def test_an_ngram_reaches_the_logits_from_where_it_ends():
    model = small_model()
    tokens = torch.arange(5, 5 + T)[None] % V
    row = (tokens[0, 9] * train.HASH_PRIMES[0] ^ tokens[0, 8]) % (train.NGRAM_ROWS * V)
    with torch.no_grad():
        before = model(tokens)
        model.ngram_embed.table[row] += 1.0
        moved = (model(tokens) != before).any(-1)[0]
    assert not moved[:9].any() and moved[9]


def test_logits_are_the_tanh_soft_cap_up_to_a_constant():
    model = small_model()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    tokens = torch.randint(V, (1, T))
    raw = []
    model.head.register_forward_hook(lambda module, args, output: raw.append(output.float()))
    logits = model(tokens)
    expected = train.SOFT_CAP * torch.tanh(raw[0] / 2)
    torch.testing.assert_close(logits - train.SOFT_CAP, expected, atol=1e-4, rtol=0)
    assert logits.dtype == torch.float32 and logits.shape == (1, T, V)


def test_the_last_layer_sees_everything_and_has_value_embeddings():
    for depth in (1, 2, 5, 9):
        model = train.GPT(V, T, depth, 64, 32)
        assert model.windows[-1] == T
        has_table = [table is not None for table in model.value_embeds]
        assert has_table[::-1] == [i % 2 == 0 for i in range(depth)]
    assert train.GPT(V, T, 9, 64, 32).windows == [8, 8, 8, 8, T, 8, 8, 8, T]


def test_layers_start_as_the_identity_and_gates_in_the_middle():
    model = small_model(seed_weights=False)
    for block in model.blocks:
        assert not block.attention.out.weight.any() and not block.down.weight.any()
        assert block.attention.gate is None or not block.attention.gate.weight.any()


def test_the_forward_exports_to_functional_operators_only():
    model = small_model()
    program = torch.export.export(model, (torch.zeros(2, T, dtype=torch.int64),), strict=False).run_decompositions({})
    signature = program.graph_signature
    assert not signature.buffers_to_mutate and len(signature.user_outputs) == 1
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    assert calls and all(str(op).startswith("aten.") and not op._schema.is_mutable for op in calls)
    tokens = torch.randint(V, (2, T))
    torch.testing.assert_close(program.module()(tokens), model(tokens))


# Sizes and schedules


def test_the_sizing_rule_finds_the_known_best_sizes(monkeypatch):
    def size(flops, seconds, seq_len):
        monkeypatch.setattr(train.TASK, "seq_len", seq_len)
        return train.size_for(flops * train.EXPECTED_MFU * seconds)

    assert size(800e12, 300, 2048) == (9, 640, 128, 2**17)
    depth, dim, _, batch = size(7.7e11, 60, 256)
    assert (depth, dim, batch) == (2, 128, 2**11)


@pytest.mark.parametrize(
    "card, teraflops, size",
    [
        ("RTX 3060", 26, (5, 384, 2**14)),
        ("RTX 3070", 41, (6, 384, 2**15)),
        ("RTX 3090", 76, (6, 384, 2**15)),
        ("RTX 4090", 163, (7, 512, 2**16)),
        ("A100", 265, (8, 512, 2**16)),
        ("H100", 785, (9, 640, 2**17)),
        ("a cool H100", 860, (9, 640, 2**17)),
        ("a hot H100", 690, (9, 640, 2**17)),
        ("B200", 1700, (11, 768, 2**17)),
    ],
)
def test_known_cards_get_these_sizes_for_climbmix(monkeypatch, card, teraflops, size):
    monkeypatch.setattr(train, "TASK", prepare.TASKS["climbmix"])
    depth, dim, _, batch = train.size_for(teraflops * 1e12 * train.EXPECTED_MFU * 300)
    assert (depth, dim, batch) == size


def test_more_compute_never_means_a_smaller_model_or_batch():
    sizes = [train.size_for(10.0**e) for e in range(8, 22)]
    assert all(a[0] <= b[0] and a[3] <= b[3] for a, b in zip(sizes, sizes[1:]))
    for depth, dim, head_dim, batch in sizes:
        assert depth >= 1 and dim % head_dim == 0 and head_dim >= 32
        assert batch % T == 0 and batch & (batch - 1) == 0


def test_learning_rate_is_constant_then_falls_linearly_to_its_floor():
    start = 1 - train.COOLDOWN
    assert train.lr_at(0) == train.lr_at(start) == 1
    assert train.lr_at(1) == train.lr_at(1.5) == pytest.approx(train.FINAL_LR)
    assert train.lr_at((start + 1) / 2) == pytest.approx((1 + train.FINAL_LR) / 2)


def test_momentum_rises_and_weight_decay_falls_to_zero():
    assert train.momentum_at(0) == train.MOMENTUM_START
    middle = (train.MOMENTUM_START + train.MOMENTUM_END) / 2
    assert train.momentum_at(train.MOMENTUM_STEPS / 2) == pytest.approx(middle)
    assert train.momentum_at(10**6) == pytest.approx(train.MOMENTUM_END)
    model = small_model()
    optimisers = train.Optimisers(model)
    train.make_loss(model, compiled=False)(*torch.randint(V, (2, 1, T))).backward()
    for progress, decay in ((0.0, train.MATRIX_DECAY), (0.5, train.MATRIX_DECAY / 2), (1.0, 0.0), (1.1, 0.0)):
        optimisers.step(0, progress)
        assert optimisers.muon.decay.item() == pytest.approx(decay)


# The optimisers


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 128)])
def test_polar_express_brings_singular_values_near_one(shape):
    x = torch.randn(shape)
    values = torch.linalg.svdvals(train.polar_express(x).float())
    # A square Gaussian matrix has singular values down to nearly zero, which five steps cannot lift all the way.
    assert values.max() < 1.25 and values.quantile(0.1) > 0.7
    if shape[1] != shape[2]:
        assert values.min() > 0.8


@pytest.mark.parametrize("shape", [(32, 32), (32, 96)])
def test_polar_express_applies_its_polynomials_to_the_singular_values(shape):
    x = torch.randn(shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (1.02 * x.norm())
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    expected = u @ s.diag() @ vh
    error = train.polar_express(x[None])[0].float() - expected
    assert error.norm() < 0.06 * expected.norm()


def test_polar_express_keeps_singular_vectors():
    x = torch.randn(1, 32, 96)
    u, _, vh = torch.linalg.svd(x[0], full_matrices=False)
    result = train.polar_express(x)[0].float()
    assert F.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0) > 0.99


def reference_muon(weight, grads, lrs, momenta, decays):
    """Muon for one matrix, written from the papers, over several steps; returns the last weight."""
    rows, cols = weight.shape
    first, second = torch.zeros_like(weight), 0.0
    for grad, lr, mu, decay in zip(grads, lrs, momenta, decays):
        first = mu * first + (1 - mu) * grad
        direction = (1 - mu) * grad + mu * first
        o = train.polar_express((direction.T if rows > cols else direction)[None])[0].float()
        o = o.T if rows > cols else o
        power = (o * o).mean(1 if rows >= cols else 0, keepdim=True)
        second = train.MUON_BETA2 * second + (1 - train.MUON_BETA2) * power
        scaled = o / second.sqrt()
        o = scaled * o.norm() / scaled.norm()
        shrink = torch.where(o * weight >= 0, decay * weight, torch.zeros_like(weight))
        weight = weight - lr * max(1, rows / cols) ** 0.5 * (o + shrink)
    return weight


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_the_stacked_muon_update_equals_one_matrix_at_a_time(shape):
    weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    start = [w.detach().clone() for w in weights]
    grads = torch.randn(4, 3, *shape)
    lrs, momenta, decays = [0.04, 0.03, 0.02, 0.01], [0.85, 0.86, 0.9, 0.95], [0.2, 0.1, 0.05, 0.0]
    muon = train.Muon(weights)
    for step in range(4):
        for weight, grad in zip(weights, grads[step]):
            weight.grad = grad.clone()
        muon.step(lrs[step], momenta[step], decays[step])
    for n in range(3):
        expected = reference_muon(start[n], grads[:, n], lrs, momenta, decays)
        # Products of a stack and of one matrix may round differently in bfloat16.
        moved = (expected - start[n]).norm()
        assert (weights[n] - expected).norm() < 0.02 * moved


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_sparse_step_is_that_of_adagrad_with_one_sum_per_row_and_leaves_other_rows_alone(dtype, tolerance):
    table = torch.nn.Parameter(torch.randn(50, 8).to(dtype))
    start, energy, optimiser = table.detach().clone(), torch.zeros(50), train.RowAdagrad(table)
    expected = start.float()
    for _ in range(4):
        table.grad = None
        for _ in range(2):  # passes of a batch, whose gradients come one after the other
            ids, weights = torch.randint(20, (3, 30)), torch.randn(3, 30, 8).to(dtype)
            ids[0, 0], weights[0, 0] = 30, 0.0  # a row is met, and nothing is to be learned of it
            (F.embedding(ids, table, sparse=True) * weights).sum().backward()
        dense = torch.zeros(50, 8)
        dense.index_put_((table.grad._indices()[0],), table.grad._values().float(), accumulate=True)
        energy += dense.square().mean(1)
        expected -= torch.where(energy[:, None] > 0, 0.1 * dense / energy.sqrt()[:, None], 0.0)
        optimiser.step(0.1)
        torch.testing.assert_close(table.detach().float(), expected, atol=tolerance, rtol=1e-4)
    assert torch.equal(table.detach()[20:], start[20:])


def test_ngrams_met_at_the_end_of_the_budget_are_learned_at_the_full_rate():
    model = small_model()
    torch.nn.init.zeros_(model.ngram_embed.table)
    optimisers, tokens = train.Optimisers(model), torch.randint(V, (2, 1, T))
    train.make_loss(model, compiled=False)(*tokens).backward()
    optimisers.step(1000, 1.0)
    moved = model.ngram_embed.table.detach().float().square().mean(1).sqrt()
    expected = torch.full_like(moved[moved > 0], train.NGRAM_LR * (64 / 768) ** -0.5)
    torch.testing.assert_close(moved[moved > 0], expected, rtol=0.01, atol=0)
    assert len(expected) == len(model.ngram_embed.table.grad._indices()[0].unique())


def test_every_parameter_belongs_to_exactly_one_optimiser():
    model = small_model()
    optimisers = train.Optimisers(model)
    held = [id(p) for group in optimisers.adamw.param_groups for p in group["params"]]
    held += [id(p) for group, *_ in optimisers.muon.groups for p in group] + [id(optimisers.ngrams.table)]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


# The loop


def start_training(run, distort=lambda loss: loss):
    model = small_model(2, seed_weights=False)
    plain_loss = train.make_loss(model, compiled=False)

    def loss_of(x, y):
        return distort(plain_loss(x, y))

    return train.train(run, model, loss_of, train.Optimisers(model), rows=2, passes=2, peak_flops=1e12)


def test_the_loss_falls_when_a_tiny_batch_is_learned_by_heart(capsys):
    run = FakeRun(60)
    steps, tokens, mfu = start_training(run)
    assert (steps, tokens) == (60, 60 * 2 * 2 * T) and mfu > 0
    assert run.logged[-1]["loss"] < 1.0 < 4.0 < math.log(V)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "step 00060" in lines[-1] and "100.0%" in lines[-1]


@pytest.mark.parametrize("factor, shown", [(math.nan, "nan"), (math.inf, "inf"), (1e6, "")])
def test_a_diverged_loss_ends_the_program_with_status_one_and_a_sentence(factor, shown):
    with pytest.raises(SystemExit) as stop:
        start_training(FakeRun(30), lambda loss: loss * 0 + factor)
    # Given a string, the interpreter prints it to stderr and exits with status 1.
    assert f"training diverged: the loss is {shown}" in stop.value.code and "at step 10" in stop.value.code


def test_training_is_the_same_twice_under_one_seed():
    def weights():
        torch.manual_seed(7)
        run = FakeRun(5)
        model = small_model(2, seed_weights=False)
        train.train(run, model, train.make_loss(model, False), train.Optimisers(model), 2, 1, 1e12)
        return model.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_warm_up_leaves_no_trace_in_the_model():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = train.warm_up(model, train.make_loss(model, compiled=False), 2, 4, torch.device("cpu"))
    assert rows == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_running_out_of_memory_in_warm_up_halves_the_rows_until_they_fit():
    model = small_model()
    loss_of = train.make_loss(model, compiled=False)
    tried = []

    def hungry(x, y):
        tried.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("too much")
        return loss_of(x, y)

    assert train.warm_up(model, hungry, 8, 8, torch.device("cpu")) == 2
    assert tried == [8, 4] + 2 * [2, 2, 2, 2]  # two steps of four passes

    def insatiable(x, y):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(SystemExit, match="out of memory"):
        train.warm_up(model, insatiable, 4, 4, torch.device("cpu"))


# How libraries say that the GPU's memory is full (sources of torch and Triton, reports), and what only sounds like it.
FULL = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
NOT_FULL = (
    "out of resource: shared memory, Required: 262144, Hardware limit: 101376. Reducing block sizes may help.",
    "CUDA error: device-side assert triggered",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
)


@pytest.mark.parametrize("words", FULL)
def test_libraries_that_run_out_of_memory_in_words_of_their_own_are_understood(words, capsys):
    model = small_model(1)
    loss_of, limit = train.make_loss(model, compiled=False), 1

    def hungry(x, y):
        if len(x) > limit:
            raise RuntimeError(words)
        return loss_of(x, y)

    assert train.warm_up(model, hungry, 2, 2, torch.device("cpu")) == 1
    assert capsys.readouterr().out == f"out of memory ({words.splitlines()[0]}): trying 1 rows per forward pass\n"
    limit = 0
    with pytest.raises(SystemExit, match="out of memory with a single row"):
        train.warm_up(model, hungry, 1, 1, torch.device("cpu"))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("words", NOT_FULL)
def test_other_faults_in_warm_up_are_not_taken_for_a_lack_of_memory(words):
    def faulty(x, y):
        raise RuntimeError(words)

    with pytest.raises(RuntimeError) as fault:
        train.warm_up(small_model(1), faulty, 8, 8, torch.device("cpu"))
    assert str(fault.value) == words


class MemoryPeak(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within it, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.layout == torch.strided  # the parts of sparse gradients are
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.alive
            ):
                self.alive.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, key, storage.nbytes())
        return result


@pytest.mark.parametrize("passes", [1, 3])
def test_what_fits_in_warm_up_fits_after_it(passes):
    model, run = small_model(2), FakeRun(3)
    loss_of = train.make_loss(model, compiled=False)
    with MemoryPeak() as warm_up:
        rows = train.warm_up(model, loss_of, 2, 2 * passes, torch.device("cpu"))
    with MemoryPeak() as training:
        train.train(run, model, loss_of, train.Optimisers(model), rows, passes, 1e12)
    weights = sum(4 * p.numel() for p in model.parameters() if p is not model.ngram_embed.table)
    assert training.most > 3 * weights  # gradients and the optimisers' state alone
    assert training.most <= warm_up.most + 4096  # scalars, such as the loss


class CompiledMuon(train.Muon):
    """Muon as it is on CUDA."""

    def __init__(self, matrices):
        super().__init__(matrices)
        self.update = torch.compile(train.muon_update, dynamic=False)


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_compiled_after_warm_up(monkeypatch, cache, rows):
    for module in (train, prepare):
        monkeypatch.setattr(module, "TASK", TINY)
    monkeypatch.setattr(train, "Muon", CompiledMuon)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    model = train.GPT(TINY.vocab_size, TINY.seq_len, 1, 64, 32)
    loss_of, before = train.make_loss(model, compiled=True), counters["stats"]["unique_graphs"]
    with train.fast_attention(torch.device("cpu")):
        assert train.warm_up(model, loss_of, rows, 2 * rows, torch.device("cpu")) == rows
    warm = counters["stats"]["unique_graphs"]
    optimisers = train.Optimisers(model)
    run = prepare.begin(model)
    with train.fast_attention(torch.device("cpu")):
        steps, *_ = train.train(run, model, loss_of, optimisers, rows, 2, 1e12)
    assert steps > 2 and warm > before
    assert counters["stats"]["unique_graphs"] == warm


# Attention kernels


@pytest.mark.parametrize(
    "capability, first",
    [((9, 0), "CUDNN"), ((10, 3), "CUDNN"), ((8, 0), "FLASH"), ((8, 9), "FLASH"), ((12, 0), "FLASH")],
)
def test_cudnn_attention_comes_first_only_on_cards_where_it_is_right(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with train.fast_attention(torch.device("cuda")):
        order = [torch.nn.attention.SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
        assert order[0] == f"{first}_ATTENTION"
        assert torch.backends.cuda.cudnn_sdp_enabled() == (first == "CUDNN")
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_the_compile_cache_tells_orders_of_attention_kernels_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = torch.randn(1, 2, 16, 8)

    def compiled_afresh(*kernels):
        """Whether code was made, not found, when these kernels may serve in this order."""
        monkeypatch.setattr(train, "ATTENTION_KERNELS", kernels)
        torch.compiler.reset()
        misses = counters["inductor"]["fxgraph_cache_miss"]
        with train.fast_attention(torch.device("cuda")), torch.no_grad():
            torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), dynamic=False)(q)
        return counters["inductor"]["fxgraph_cache_miss"] > misses

    assert compiled_afresh("FLASH_ATTENTION", "MATH")
    assert not compiled_afresh("FLASH_ATTENTION", "MATH")
    assert compiled_afresh("MATH", "FLASH_ATTENTION")


@pytest.mark.parametrize("wsl", [False, True])
def test_memory_grows_in_segments_but_on_wsl(monkeypatch, wsl):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: wsl if path == "/dev/dxg" else exists(path))
    monkeypatch.syspath_prepend(str(Path(train.__file__).parent))
    runpy.run_path(train.__file__)
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None) == (None if wsl else "expandable_segments:True")


def test_a_missing_gpu_ends_the_program_before_anything_is_sized_by_it(monkeypatch):
    def gone():
        raise SystemExit("there is no GPU")

    monkeypatch.setattr(train, "device", gone)
    monkeypatch.setattr(train, "machine_flops", lambda: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match="there is no GPU"):
        train.main()


def test_main_trains_and_submits_the_plain_model(monkeypatch, capsys):
    run = FakeRun(12)
    monkeypatch.setattr(train, "begin", lambda model: setattr(run, "begun", model) or run)
    monkeypatch.setattr(train, "machine_flops", lambda: 1e11)
    monkeypatch.setattr(train.gc, "disable", lambda: None)
    train.main()
    assert isinstance(run.begun, train.GPT) and run.submitted is run.begun
    assert "done: 12 steps" in capsys.readouterr().out


def test_the_gpu_smoke_test_says_that_there_is_no_gpu(run):
    smoke = Path(__file__).parent / "gpu_smoke.py"
    done = run(sys.executable, smoke, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no GPU here" in done.stderr and done.stderr.count("\n") == 1


def test_every_tensor_is_made_on_the_models_device():
    model = small_model().to("meta")  # tensors of another device cannot meet those of this one
    tokens = torch.zeros(2, T, dtype=torch.int64, device="meta")
    train.make_loss(model, compiled=False)(tokens, tokens).backward()
    optimisers = train.Optimisers(model)
    optimisers.muon.step(0.1, 0.9, 0.1), optimisers.ngrams.step(0.1)
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}

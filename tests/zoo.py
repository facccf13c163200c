"""Honest language models of many kinds, as small as they can be: what the sealed form must be able to hold.

Each is one function mix(x, tokens, p): x [B, T, C] holds the embeddings of tokens [B, T], p(name, *shape) is a
parameter, and the result [B, T, C] goes to the head. Every one of them is causal, some in several spellings.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WIDTH, VOCABULARY = 32, 16, 300
BOS = VOCABULARY - 1
ZOO = {}


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, V] through `mix`, whose parameters are made when they are first asked for."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.parts = mix, nn.ParameterDict()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            self(torch.zeros(1, LENGTH, dtype=torch.int64))

    def part(self, name, *shape):
        name = f"{name}_part"
        if name not in self.parts:
            self.parts[name] = nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))
        return self.parts[name]

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens), tokens, self.part))


def honest(mix):
    ZOO[mix.__name__] = lambda: Model(mix)
    return mix


def previous(x, places=1):
    return F.pad(x[:, :-places], [0, 0] * (x.ndim - 2) + [places, 0])


def heads(x, p, name, count=2):
    B, T, C = x.shape
    return F.linear(x, p(name, C, C)).view(B, T, count, C // count).transpose(1, 2)


def merge(y):
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def causal(T):
    return torch.tril(torch.ones(T, T, dtype=torch.bool))


# ---- Attention


@honest
def fused_attention(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    return x + merge(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


@honest
def masked_attention(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    mask = torch.triu(torch.full((LENGTH, LENGTH), -math.inf), diagonal=1)
    first = torch.softmax(scores + mask, dim=-1) @ v
    second = F.softmax(scores.masked_fill(~causal(LENGTH), float("-inf")).float(), -1, dtype=torch.float32) @ v
    third = torch.where(causal(LENGTH), scores, torch.finfo(scores.dtype).min).softmax(-1) @ v
    return x + merge(first + second + third)


@honest
def attention_with_bias(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    distance = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
    slopes = 2.0 ** -torch.arange(1, 3)
    bias = slopes.view(-1, 1, 1) * distance.clamp(max=0) + torch.zeros(LENGTH, LENGTH).masked_fill(distance > 0, -1e9)
    relative = p("relative", 2, LENGTH)[:, distance.abs()]
    return x + merge(F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + relative)[None]))


@honest
def documents_apart(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    document = (tokens == BOS).cumsum(1)
    same = document[:, :, None].eq(document[:, None, :]) & causal(LENGTH)
    return x + merge(F.scaled_dot_product_attention(q, k, v, same.unsqueeze(1)))


@honest
def grouped_queries(x, tokens, p):
    q = heads(x, p, "q", 4)
    k, v = (F.linear(x, p(name, 8, WIDTH)).unflatten(-1, (2, 4)).transpose(1, 2) for name in "kv")
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (torch.repeat_interleave(one, 2, dim=1) for one in (k, v))
    second = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k, v = (one[:, ::2, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for one in (k, v))
    return x + merge(first + second + F.scaled_dot_product_attention(q, k, v, is_causal=True))


@honest
def sliding_window(x, tokens, p):
    B, T, C, W = *x.shape, 8
    q, k, v = (heads(x, p, name).reshape(B * 2, T // W, W, C // 2) for name in "qkv")
    k, v = (torch.cat([previous(one), one], dim=2) for one in (k, v))
    i, j = torch.arange(W)[:, None], torch.arange(2 * W)[None] - W
    mask = (j <= i) & (j > i - W) & (j + torch.arange(T // W)[:, None, None] * W >= 0)
    return x + merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None]).reshape(B, 2, T, C // 2))


@honest
def windows_by_unfold(x, tokens, p):
    keys = F.pad(x, (0, 0, 7, 0)).unfold(1, 8, 1)  # [B, T, C, 8]
    weights = (keys * x.unsqueeze(-1)).sum(2, keepdim=True).softmax(dim=-1)
    return x + (weights * keys).sum(-1)


@honest
def attention_in_einsum(x, tokens, p):
    q, k, v = x.matmul(p("qkv", WIDTH, 3 * WIDTH)).chunk(3, dim=-1)
    scores = torch.einsum("bqc,bkc->bqk", q, k).tril()
    decay = 0.9 ** torch.arange(LENGTH).float()
    decay = torch.tril(decay[:, None] / decay[None, :])
    return x + torch.einsum("bqk,qk,bkc->bqc", scores, decay, v)


@honest
def multi_head_module(x, tokens, p):
    y, _ = F.multi_head_attention_forward(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), WIDTH, 2, p("in", 3 * WIDTH, WIDTH),
        p("in_bias", 3 * WIDTH), None, None, False, 0.0, p("out", WIDTH, WIDTH), p("out_bias", WIDTH), False,
        need_weights=False, attn_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=False,
    )  # fmt: skip
    return x + y.transpose(0, 1)


@honest
def linear_attention(x, tokens, p):
    q, k = (F.elu(F.linear(x, p(name, 8, WIDTH))) + 1 for name in "qk")
    v = F.linear(x, p("v", WIDTH, WIDTH))
    state = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=1)
    return x + torch.einsum("btk,btkv->btv", q, state) / (q * k.cumsum(1)).sum(-1, keepdim=True).clamp_min(1e-6)


@honest
def attention_sink_and_soft_cap(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    scores = 20 * torch.tanh(q @ k.mT / 20)
    scores = torch.cat(
        [
            scores + torch.full((LENGTH, LENGTH), -1e4).triu_(1),
            p("sink", 2, 1).expand(scores.shape[0], 2, LENGTH).unsqueeze(-1),
        ],
        -1,
    )
    weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))[..., :-1]
    return x + merge(torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, 2)))


@honest
def differential_attention(x, tokens, p):
    q, k, v = (heads(x, p, name) for name in "qkv")
    first, second = (F.scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q, k), (k, q)))
    factor = torch.exp(torch.sum(p("a", 4) * p("b", 4))) - torch.exp(torch.dot(p("a", 4), p("b", 4))) + 0.8
    return x + merge(first - factor * second)


# ---- Positions


@honest
def rotary(x, tokens, p):
    frequencies = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    angle = torch.outer(torch.arange(LENGTH, dtype=torch.float32), frequencies)
    cos, sin = angle.cos()[None, None], angle.sin()[None, None]
    q, k, v = (heads(x, p, name) for name in "qkv")

    def halves(y):
        a, b = y.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def pairs(y):
        a, b = y[..., ::2], y[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    def rolled(y):
        both = torch.cat([sin, -sin], -1)
        return y * cos.repeat(1, 1, 1, 2) + y.roll(y.size(-1) // 2, -1) * both

    return x + sum(
        merge(F.scaled_dot_product_attention(f(q), f(k), v, is_causal=True)) for f in (halves, pairs, rolled)
    )


@honest
def complex_rotary(x, tokens, p):
    speed = 10000.0 ** -torch.linspace(0, 1, 5)[:-1]
    angle = torch.arange(LENGTH).outer(speed)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    q, k, v = (heads(x, p, name).transpose(1, 2) for name in "qkv")
    q, k = (
        torch.view_as_real(torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2)) * turn).flatten(3)
        for y in (q, k)
    )
    q, k, v = (y.transpose(1, 2) for y in (q.type_as(v), k.to(v), v))
    return x + merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@honest
def positions_learned_and_sinusoidal(x, tokens, p):
    place = torch.arange(tokens.size(1), device=tokens.device)
    x = x + F.embedding(place, p("places", LENGTH, WIDTH)) + p("direct", 1, LENGTH, WIDTH)[:, : x.size(1)]
    table = torch.zeros(LENGTH, WIDTH)
    rate = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
    table[:, 0::2] = torch.sin(place.unsqueeze(1) * rate)
    table[:, 1::2] = torch.cos(place.unsqueeze(1) * rate)
    age = place - torch.cummax(torch.where(tokens == BOS, place, 0), dim=1).values
    return x + table + F.embedding(age, p("ages", LENGTH, WIDTH))


# ---- Norms, activations, gates


@honest
def norms(x, tokens, p):
    y = F.layer_norm(x, (WIDTH,)) + F.layer_norm(x, (WIDTH,), p("w", WIDTH), p("b", WIDTH), 1e-5)
    y = y + F.rms_norm(x, (WIDTH,)) + F.rms_norm(x, (WIDTH,), p("w", WIDTH), eps=1e-6)
    y = y + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + F.normalize(x, dim=-1)
    y = (
        y
        + x / (x.norm(dim=-1, keepdim=True) + 1e-6)
        + x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)
    )
    y = y + (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    y = y + (x - x.mean(dim=2, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-5)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    y = (
        y
        + F.group_norm(x.flatten(0, 1), 4, p("w", WIDTH), p("b", WIDTH)).view_as(x)
        + (x - mean) / (variance + 1e-5).sqrt()
    )
    y = y
    return (
        y
        + torch.tanh(p("dynamic", 1) * x) / x.abs().amax(-1, keepdim=True).add(1)
        + x / x.square().sum(-1, keepdim=True).sqrt().clip(1e-6)
    )


@honest
def activations(x, tokens, p):
    y = F.linear(x, p("up", 2 * WIDTH, WIDTH), p("bias", 2 * WIDTH))
    a, b = y.chunk(2, dim=-1)
    out = (
        F.silu(a) * b
        + F.gelu(a) * b
        + F.gelu(a, approximate="tanh")
        + torch.sigmoid(a) * b
        + F.glu(y, dim=-1)
        + F.relu(a).square()
    )
    out = (
        out
        + F.leaky_relu(a, 0.1)
        + F.elu(a)
        + F.selu(a)
        + F.celu(a)
        + F.mish(a)
        + F.softplus(a)
        + F.hardswish(a)
        + F.hardsigmoid(a)
    )
    out = (
        out + F.hardtanh(a) + F.relu6(a) + F.softsign(a) + F.logsigmoid(a) + F.prelu(a, p("slope", 1)) + F.tanhshrink(a)
    )
    out = (
        out
        + F.silu(y)[..., :WIDTH]
        + a.relu() ** 2
        + torch.erf(a)
        + a.atan()
        + torch.sin(a) ** 2
        + torch.exp(-a.abs())
        + a.tanh()
    )
    out = (
        out
        + torch.log1p(a.abs()) * a.sign()
        + torch.expm1(-F.relu(b))
        + F.threshold(a, 0.1, 0.0)
        + F.hardshrink(a)
        + F.softshrink(a)
    )
    out = (
        out
        + torch.clamp(a, -1.0, 1.0)
        + a.clamp_max(2.0)
        + torch.maximum(a, b)
        + torch.minimum(a, b)
        + torch.special.expit(a)
    )
    return (
        x
        + out
        + F.dropout(a, 0.1, training=False)
        + nn.Dropout(0.5).eval()(b)
        + torch.pow(2.0, -F.relu(a))
        + torch.exp2(-F.relu(a))
    )


@honest
def scalars_and_mixing(x, tokens, p):
    first = x
    for i in range(2):
        x = p("scale", 2)[i] * x + p("skip", 2)[i] * first
        x = torch.lerp(x, previous(x), torch.sigmoid(p("shift", WIDTH)))
        x = torch.addcmul(x, previous(x) - x, p("mix", WIDTH)) + torch.lerp(x, first, 0.1)
    x = x + (2 * torch.sigmoid(F.linear(x[..., :4], p("gate", 1, 4)))) * previous(x, 2) - 0.1 * x / 3 + (1 - x) * 0.1
    weights = torch.softmax(p("choice", 3), 0)
    return sum(w * one for w, one in zip(weights.unbind(), (x, first, x.detach().clone()))) + torch.addcdiv(
        x, x, 1 + x.abs(), value=0.5
    )


@honest
def bfloat16_and_back(x, tokens, p):
    y = (
        F.linear(x.bfloat16(), p("w", WIDTH, WIDTH).to(torch.bfloat16)).float()
        + x.half().float()
        + x.double().to(torch.float32)
    )
    y = y + F.rms_norm(x.to(dtype=torch.bfloat16), (WIDTH,)).type_as(x) + x.to(y.device).to(y)
    q = F.linear(x, p("w", WIDTH, WIDTH)).bfloat16().unsqueeze(1)
    return (
        y
        + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1).float()
        + y.new_zeros(WIDTH)
        + y.new_ones(1)
        + y.new_full((1,), 0.5)
    )


@honest
def soft_cap_and_head_tricks(x, tokens, p):
    y = 30 * torch.tanh(x / 30) + 15 * torch.sigmoid(x / 7.5)
    mixture = torch.log_softmax(F.linear(x, p("experts", 3, WIDTH)), dim=-1)
    parts = F.log_softmax(F.linear(x, p("parts", 3 * WIDTH, WIDTH)).unflatten(-1, (3, WIDTH)), dim=-1)
    return (
        y
        + torch.logsumexp(mixture.unsqueeze(-1) + parts, dim=2)
        + torch.logaddexp(x, y)
        + torch.log(F.softmax(x, -1) + 1e-6)
        + torch.special.logit(torch.sigmoid(x), 1e-6)
    )


# ---- Convolutions and recurrences


@honest
def convolutions(x, tokens, p):
    y = F.pad(x.transpose(1, 2), (3, 0))
    out = F.conv1d(y, p("full", WIDTH, WIDTH, 4)) + F.conv1d(
        y, p("depthwise", WIDTH, 1, 4), p("b", WIDTH), groups=WIDTH
    )
    out = out + F.conv1d(x.transpose(1, 2), p("three", WIDTH, WIDTH, 3), padding=2)[..., :-2]
    out = (
        out
        + F.conv1d(F.pad(x.mT, (4, 0)), p("dilated", WIDTH, WIDTH, 3), dilation=2)
        + F.conv1d(x.mT, p("point", WIDTH, WIDTH, 1), padding="same")
    )
    flat = F.conv2d(F.pad(x.unsqueeze(1), (1, 1, 2, 0)), p("image", 1, 1, 3, 3)).squeeze(1)
    return x + out.transpose(1, 2) + flat + sum(previous(x, n + 1) * p("taps", 3)[n] for n in range(3))


@honest
def recurrence_by_cumulation(x, tokens, p):
    a = torch.sigmoid(F.linear(x, p("a", WIDTH, WIDTH)))
    decay = torch.cumsum(torch.log(a), dim=1)
    state = torch.exp(decay) * torch.cumsum(x * torch.exp(-decay), dim=1)
    product = torch.cumprod(a, dim=1)
    signs = torch.sign(x) * torch.exp(torch.logcumsumexp(torch.log(x.abs() + 1e-6), dim=1) - 5)
    average = x.cumsum(1) / torch.arange(1, LENGTH + 1).view(-1, 1)
    return (
        x
        + state
        + product * (x / product.clamp(min=1e-3)).cumsum(1)
        + signs
        + average
        + torch.cummax(x, 1)[0]
        + x.cummin(dim=1).values
    )


@honest
def chunked_recurrence(x, tokens, p):
    a, state, out = torch.exp(-F.softplus(p("decay", WIDTH))), torch.zeros_like(x[:, 0]), []
    for chunk in x.split(8, dim=1):
        powers = a ** torch.arange(1, 9).unsqueeze(-1)
        inside = torch.einsum("ij,bjc->bic", torch.tril(torch.ones(8, 8)), chunk)
        out.append(inside + powers * state.unsqueeze(1))
        state = state * powers[-1] + inside[:, -1]
    for token in x[:, :4].unbind(1):
        state = a * state + token
    empty = torch.zeros(x.shape[0], LENGTH - 4, WIDTH)
    return x + torch.cat(out, 1) + torch.cat((x.new_zeros(x.shape[0], 4, WIDTH) + 0 * state[:, None], empty), dim=1)


@honest
def doubling_scan(x, tokens, p):
    a, b, step = torch.sigmoid(F.linear(x, p("a", WIDTH, WIDTH))), x, 1
    while step < LENGTH:
        b = b + a * F.pad(b, (0, 0, step, 0))[:, :LENGTH]
        a = a * F.pad(a, (0, 0, step, 0), value=1.0)[:, :-step]
        step *= 2
    return x + b


@honest
def mamba_like(x, tokens, p):
    y, gate = F.linear(x, p("in", 2 * WIDTH, WIDTH)).split(WIDTH, dim=-1)
    y = F.silu(
        F.conv1d(y.transpose(1, 2), p("conv", WIDTH, 1, 3), padding=2, groups=WIDTH)[..., :LENGTH].transpose(1, 2)
    )
    dt, B, C = torch.split(F.linear(y, p("x", 9, WIDTH)), [1, 4, 4], dim=-1)
    A = -torch.exp(p("A", WIDTH, 4))
    log = F.softplus(dt).unsqueeze(-1) * A
    inputs = (F.softplus(dt) * y).unsqueeze(-1) * B.unsqueeze(2)
    segments = log.transpose(1, 2).cumsum(2)
    difference = segments.unsqueeze(3) - segments.unsqueeze(2)
    kernel = torch.exp(difference.masked_fill(~causal(LENGTH)[None, None, :, :, None], -torch.inf))
    state = torch.einsum("bctsn,bscn->btcn", kernel, inputs)
    return x + F.linear((state * C.unsqueeze(2)).sum(-1) * F.silu(gate) + y * p("D", WIDTH), p("out", WIDTH, WIDTH))


@honest
def delta_rule(x, tokens, p):
    q, k, v = (F.normalize(F.linear(x, p(name, 4, WIDTH)), dim=-1) for name in "qkv")
    beta, S, out = torch.sigmoid(F.linear(x, p("beta", 1, WIDTH))), x.new_zeros(x.size(0), 4, 4), []
    for t in range(8):
        error = v[:, t] - torch.bmm(k[:, t].unsqueeze(1), S).squeeze(1)
        S = torch.baddbmm(S, k[:, t].unsqueeze(2), (beta[:, t] * error).unsqueeze(1))
        out.append((q[:, t : t + 1] @ S)[:, 0])
    return x + F.pad(F.linear(torch.stack(out, dim=1), p("out", WIDTH, 4)), (0, 0, 0, LENGTH - 8))


@honest
def long_convolution(x, tokens, p):
    kernel = p("kernel", WIDTH, LENGTH) * torch.exp(-0.1 * torch.arange(LENGTH))
    product = torch.fft.rfft(x.transpose(1, 2), n=2 * LENGTH) * torch.fft.rfft(kernel, n=2 * LENGTH)
    first = torch.fft.irfft(product, n=2 * LENGTH)[..., :LENGTH].transpose(1, 2)
    spectrum = torch.fft.fft(F.pad(x, (0, 0, 0, LENGTH)), dim=1) * torch.fft.fft(kernel.t(), 2 * LENGTH, dim=0)
    return x + first.round(decimals=2) + torch.fft.ifft(spectrum, dim=1).real[:, :LENGTH].round(decimals=2)


@honest
def diagonal_state_space(x, tokens, p):
    rate = torch.complex(-torch.exp(p("real", 4)), p("imaginary", 4))
    kernel = (
        (torch.exp(rate[:, None] * torch.arange(LENGTH)) * torch.complex(p("c", 4), p("d", 4))[:, None]).sum(0).real
    )
    place = torch.arange(LENGTH)
    toeplitz = torch.where(causal(LENGTH), kernel[(place[:, None] - place[None, :]).clamp(min=0)], 0.0)
    angles = torch.angle(torch.exp(rate)).sum() + torch.exp(rate).abs().mean() + torch.exp(rate.conj()).imag.sum()
    return x + toeplitz @ x + angles


# ---- Memories: mixtures, hashes, copies


@honest
def mixture_of_experts(x, tokens, p):
    scores = F.linear(x, p("router", 4, WIDTH)).softmax(-1)
    best, chosen = torch.topk(scores, 2, dim=-1)
    gates = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
    every = torch.einsum("btc,ecd->bted", x, p("up", 4, WIDTH, WIDTH))
    first = (gates.unsqueeze(-1) * every).sum(2)
    second = (torch.gather(every, 2, chosen[..., None].expand(-1, -1, -1, WIDTH)) * best[..., None]).sum(dim=2)
    choice = F.one_hot(scores.argmax(-1), 4).to(x.dtype)
    third = torch.einsum("bte,bted->btd", choice * scores.max(-1, keepdim=True).values, every)
    fourth = p("up", 4, WIDTH, WIDTH)[chosen[..., 0]].mul(x.unsqueeze(-1)).sum(-2)
    mask = scores >= torch.topk(scores, 2, dim=-1).values[..., -1:]
    fifth = (every * mask.unsqueeze(-1)).mean(2) + torch.zeros_like(scores).scatter_add(2, chosen, best).sum(
        -1, keepdim=True
    )
    sixth = torch.take_along_dim(every, chosen[..., :1, None], 2).squeeze(2) + every.index_select(
        2, torch.tensor([0, 3])
    ).sum(2)
    return x + first + second + third + fourth + fifth + sixth


@honest
def hashed_n_grams(x, tokens, p):
    before, longer = previous(tokens), previous(tokens, 2)
    keys = [
        (7919 * before + tokens) % 64,
        torch.remainder(tokens * 36313 ^ before * 27191, 64),
        torch.bitwise_xor(tokens * 36313, torch.bitwise_xor(before * 27191, longer * 1009)) & 63,
        ((tokens << 5) ^ (before >> 2) | 1).fmod(64).abs(),
        torch.bitwise_and(tokens.bitwise_left_shift(3) + before.bitwise_right_shift(1), 63),
        (tokens // 2 + torch.div(before, 3, rounding_mode="floor"))
        .bitwise_or(5)
        .bitwise_not()
        .remainder(64)
        .to(torch.int32),
    ]
    return x + sum(F.embedding(key, p("table", 64, WIDTH)) for key in keys) + p("table", 64, WIDTH)[keys[0]]


@honest
def restart_at_documents(x, tokens, p):
    starts = tokens == BOS
    document = torch.cumsum(starts.long(), 1)
    total = x.cumsum(1)
    base = torch.zeros(x.shape[0], LENGTH + 1, WIDTH).scatter_reduce(
        1,
        document.unsqueeze(-1).expand(-1, -1, WIDTH),
        torch.where(starts[..., None], total - x, -1e9),
        "amax",
        include_self=True,
    )
    since = total - torch.gather(base, 1, document[..., None].expand(-1, -1, WIDTH))
    place = torch.arange(LENGTH).expand_as(tokens)
    start = torch.zeros_like(tokens).scatter_reduce(1, document.clamp(max=LENGTH - 1), place * starts, reduce="amax")
    fresh = (
        torch.logical_and(starts.logical_not(), tokens.ne(0))
        | (tokens >= 5) & (tokens < 9)
        | (tokens.gt(3) ^ tokens.le(7))
    )
    return (
        x
        + since / LENGTH
        + (place - start.gather(1, document.clamp_max(LENGTH - 1)))[..., None] * 0.01
        + fresh.unsqueeze(-1).float()
    )


@honest
def induction(x, tokens, p):
    place = torch.arange(LENGTH)
    ordered, order = torch.sort(tokens, dim=1, stable=True)
    same = torch.cat([torch.zeros_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] == ordered[:, :-1]], 1)
    earlier = torch.where(same, order.roll(1, 1), torch.full_like(order, -1))
    last = torch.zeros_like(order).scatter(1, order, earlier)
    after = torch.gather(tokens, 1, (last + 1).clamp(0, LENGTH - 1))
    found = F.embedding(after, p("copied", VOCABULARY, WIDTH)) * (last >= 0).unsqueeze(-1)
    match = (tokens.unsqueeze(2) == tokens.unsqueeze(1)) & (place[None, :] < place[:, None])
    where = torch.where(match, place + 1, 0).amax(-1)
    latest = (match * (place + 1)).max(dim=-1).values
    twice = F.embedding(torch.gather(F.pad(tokens, (0, 1)), 1, where), p("copied", VOCABULARY, WIDTH))
    back = torch.argsort(torch.argsort(tokens, dim=1, stable=True), dim=1, stable=True)
    return (
        x + found + twice + latest.unsqueeze(-1) * 0.01 + 0 * back.amin(1)[:, None, None] + match.any(-1, keepdim=True)
    )


@honest
def counts_of_tokens(x, tokens, p):
    seen = F.one_hot(tokens, VOCABULARY).float().cumsum(1)
    batch = torch.arange(tokens.shape[0]).unsqueeze(1)
    own = seen[batch, torch.arange(LENGTH), tokens]
    table = (
        torch.full((VOCABULARY,), 0.5)
        .index_put((torch.tensor([3, 5]),), torch.tensor([1.0, 2.0]))
        .index_add(0, torch.tensor([7]), torch.ones(1))
    )
    rank = torch.searchsorted(torch.tensor([1.0, 2.0, 4.0, 8.0]), own) + torch.bucketize(own, torch.tensor([1.0, 3.0]))
    features = torch.stack(
        [
            own,
            own.log1p(),
            rank.float(),
            table[tokens],
            own.reciprocal(),
            own.sqrt(),
            own.log2(),
            own.log10(),
            own.floor(),
            own.ceil(),
            own.trunc(),
        ],
        dim=-1,
    )
    return x + F.linear(features, p("features", WIDTH, 11)) + (seen @ p("bag", VOCABULARY, WIDTH)) / LENGTH


@honest
def product_key_memory(x, tokens, p):
    left, right = (F.linear(half, p("keys", 8, WIDTH // 2)) for half in torch.tensor_split(x, 2, dim=-1))
    pairs = (left.topk(2, dim=-1), right.topk(2, dim=-1))
    scores = (pairs[0].values.unsqueeze(-1) + pairs[1].values.unsqueeze(-2)).flatten(-2)
    indices = (pairs[0].indices.unsqueeze(-1) * 8 + pairs[1].indices.unsqueeze(-2)).view(*scores.shape)
    return x + (F.embedding(indices, p("values", 64, WIDTH)) * scores.softmax(-1).unsqueeze(-1)).sum(-2)


@honest
def coarse_past(x, tokens, p):
    B, T, C = x.shape
    blocks = x.view(B, T // 8, 8, C).mean(2)
    held = F.interpolate(previous(blocks).transpose(1, 2), scale_factor=8, mode="nearest").transpose(1, 2)
    sized = F.interpolate(previous(blocks).mT, size=T).mT
    pooled = F.avg_pool1d(F.pad(x.mT, (3, 0)), 4, stride=1).mT + F.max_pool1d(F.pad(x.mT, (3, 0)), 4, 1).mT
    repeated = previous(blocks).repeat_interleave(8, 1) + previous(blocks).unsqueeze(2).expand(-1, -1, 8, -1).reshape(
        B, T, C
    )
    tiled = torch.tile(p("beat", 8, C), (T // 8, 1)) + p("beat", 8, C).repeat(T // 8, 1)
    return x + held + sized + pooled + repeated + tiled


@honest
def shapes_and_orders(x, tokens, p):
    (B, T, C), place = x.shape, torch.eye(WIDTH, dtype=torch.int64)
    y = x.permute(0, 2, 1).contiguous().view(B, C, T).movedim(1, 2).swapaxes(1, 2).transpose(-1, -2)
    y = (
        y
        + x.flip(1).flip(1)
        + x.reshape(B * T, C).mm(p("w", C, C)).view(B, T, C)
        + torch.addmm(p("b", C), x.flatten(0, 1), p("w", C, C).T).unflatten(0, (B, T))
    )
    y = (
        y
        + torch.cat([x[..., :3], x[..., 3:]], dim=-1).narrow(1, 0, T)
        + torch.cat([x.select(1, 0).unsqueeze(1), x.narrow(1, 1, T - 1)], 1)
    )
    y = (
        y
        + (
            torch.mv(x.flatten(0, 1), p("b", C)).view(B, T, 1)
            + torch.diagonal(p("w", C, C))
            + torch.diag(p("w", C, C))
            + torch.eye(C)[0]
        )
        + torch.diag_embed(p("b", C)).sum(0)
    )
    y = (
        y
        + torch.broadcast_to(p("b", C), (B, T, C))
        + torch.ones(C).expand(B, T, C)
        + torch.index_select(x, 2, torch.arange(C - 1, -1, -1))
        + x[..., place[:, 0].argsort() * 0]
    )
    y = (
        y
        + torch.select_scatter(x, x[:, 0], 1, 0)
        + torch.slice_scatter(x, x[:, :2], 1, 0, 2)
        + x.masked_scatter(torch.zeros(C, dtype=torch.bool), p("b", C))
        + x.index_fill(2, torch.tensor([1]), 0.0)
    )
    y = (
        y
        + x.index_copy(2, torch.tensor([0, 2]), x[..., :2])
        + torch.meshgrid(p("b", C), p("b", C), indexing="ij")[0][0]
        + x.squeeze() * x.ne(0).all(-1, keepdim=True)
    )
    assigned = x.clone()
    assigned[:, :, 0] = 0
    assigned[:, 1:] += x[:, :-1]
    assigned[..., 1].copy_(x[..., 2])
    y = (
        y
        + assigned
        + torch.concat(x.tensor_split(4, -1), -1)
        + torch.kron(p("left", 4), p("right", 4))
        + torch.rot90(p("w", C, C))[0]
        + torch.vstack([p("b", C), p("b", C)])[1]
    )
    return (
        y
        + x.prod(-1, keepdim=True)
        + torch.min(x, -1, keepdim=True)[0]
        + x.argmin(-1, keepdim=True)
        + x.sum() * 0
        + x.amax((1, 2)).max() * 0
        + torch.aminmax(x, dim=-1)[0].unsqueeze(-1)
    )


@honest
def numbers(x, tokens, p):
    a, b = x, previous(x)
    y = (
        torch.atan2(a, b)
        + torch.hypot(a, b)
        + torch.copysign(a, b)
        + torch.fmod(a, 2.0)
        + torch.remainder(b, 1.5)
        + torch.cos(a)
        + torch.sin(b)
    )
    y = (
        y
        + torch.cosh(a.clamp(-2, 2))
        + torch.sinh(a.clamp(-2, 2))
        + torch.asin(a.clamp(-0.9, 0.9))
        + torch.acos(a.clamp(-0.9, 0.9))
        + torch.tan(a * 0.1)
    )
    y = (
        y
        + torch.square(a)
        - torch.neg(b)
        + torch.rsub(a, 1)
        + a.isnan()
        + a.isfinite()
        + a.isinf()
        + torch.nan_to_num(a)
        + torch.xlogy(a.abs(), b.abs() + 1)
    )
    y = y + a.sgn() + torch.erf(a) + a.positive()
    y = y + torch.log(a.abs() + 1) / math.log(2) + a.abs().pow(0.5) + torch.floor_divide(a, 2) + torch.true_divide(a, 2)
    y = (
        y
        + torch.where(a > b, a, b)
        + torch.where(a.lt(0), 0.0, a)
        + torch.where(a.eq(0), a, 1.0)
        + (a.round() + a.ceil()) * 0.1
    )
    y = (
        y
        + a.mul(2).sub(1).div(2, rounding_mode="trunc")
        + torch.clamp(a, min=b)
        + torch.clamp(a, max=p("c", WIDTH))
        + a.std() * 0
        + a.mean() * 0
        + a.var(1, keepdim=True) * 0
    )
    return (
        y
        + torch.linspace(0, 1, WIDTH)
        + torch.tensor(0.5)
        + torch.tensor([0.5] * WIDTH)
        + torch.scalar_tensor(1.0)
        + (a > 0).logical_or(b > 0)
        + (a > 0).logical_xor(b > 0)
    )


@honest
def spellings(x, tokens, p):
    """Rarer overloads and compositions of what the others use."""
    before = previous(tokens)
    marks = (
        torch.isin(tokens, torch.tensor([10, 13, 32]))
        | (tokens != before) & tokens.lt(before)
        | tokens.le(before) & tokens.ge(before)
    )
    mixed = (
        torch.bitwise_or(tokens, before)
        + torch.bitwise_and(tokens, before)
        + (tokens | before)
        + (tokens & before)
        + (before << (tokens & 3))
        + (tokens >> (before & 3))
    )
    y = (
        x.masked_fill(marks.unsqueeze(-1), 0)
        + F.cosine_similarity(x, previous(x), dim=-1)[..., None]
        + torch.diff(x, dim=1, prepend=x[:, :1])
    )
    y = (
        y
        + torch.inner(x, p("w", WIDTH, WIDTH))
        + torch.tensordot(x, p("w", WIDTH, WIDTH), dims=1)
        + F.embedding(mixed % 64, p("table", 64, WIDTH), padding_idx=0)
    )
    y = (
        y
        + torch.sort(x, -1, descending=True)[0]
        + x.sort(-1).values
        + x.argsort(-1) * 0.01
        + torch.std_mean(x, -1, keepdim=True)[0]
        + x.var(-1, correction=0, keepdim=True)
    )
    y = (
        y
        + x.unsqueeze(0).unsqueeze(2).squeeze((0, 2))
        + (x.any() | x.all())
        + torch.min(p("w", WIDTH, WIDTH)) * torch.prod(p("b", 2))
        + tokens.count_nonzero(-1)[:, None, None] * 0
    )
    y = (
        y
        + torch.zeros_like(x).scatter(2, (tokens % WIDTH).unsqueeze(-1), 1.0)
        + torch.roll(x, (2, 3), (2, 2))
        + F.softmin(x, -1)
        + torch.clamp(x, 0)
        + tokens.clamp(0, 5).unsqueeze(-1)
    )
    y = (
        y
        + torch.ones_like(x).index_put((torch.tensor([0]),), torch.tensor(1.0), accumulate=True).mean()
        + torch.amax(x, -1, keepdim=True)
        + x.sum(-1, keepdim=True, dtype=torch.float64).float()
    )
    y = (
        y
        + tokens.float().cumsum(-1, dtype=torch.float64).float().unsqueeze(-1) * 0.01
        + x.mean((-2, -1)).sum() * 0
        + tokens.to(torch.float32).div(VOCABULARY).unsqueeze(-1) ** 2
    )
    return (
        y
        + torch.rsub(previous(x), x)
        + (3.0 / (x.abs() + 1))
        + torch.full_like(x, 2.0) ** 0.5
        + torch.zeros(1, dtype=torch.int64).expand(WIDTH)
        - 2 ** (x * 0.1)
        + x.exp().log2()
    )


@honest
def past_of_random_width(x, tokens, p):
    """Attention to strided pasts, sums over dilated windows, a mean over a power of two."""
    y = F.unfold(F.pad(x.transpose(1, 2), (3, 0)).unsqueeze(2), (1, 4)).view(x.shape[0], WIDTH, 4, LENGTH)
    out = torch.einsum("bckt,k->btc", y, p("taps", 4)) + torch.stack([previous(x, 2**n) for n in range(4)]).mean(0)
    means = (x.cumsum(1) - F.pad(x.cumsum(1), (0, 0, 8, 0))[:, :LENGTH]) / 8
    out = (
        out
        + means
        + F.pad(x, (0, 0, 1, -1))
        + torch.cat([x.new_zeros(x.size(0), 1, WIDTH), x[:, :-1]], 1)
        + F.pad(x, (0, 0, 2, 0), "constant", 0.0)[:, :-2]
    )
    return x + out


@honest
def more_spellings(x, tokens, p):
    """Operands that are tensors where others have numbers, numbers where others have tensors, and writing in place."""
    number = tokens + 1
    keys = (tokens % number) + torch.fmod(tokens, number) + (5 % number) + (tokens ^ 5) + torch.bitwise_xor(tokens, 5)
    keys = keys + torch.bitwise_left_shift(tokens, tokens & 1) + torch.bitwise_right_shift(tokens, tokens & 1)
    y = torch.max(x, -x) + torch.min(x, previous(x)) + x.masked_fill(keys.unsqueeze(-1) == 1, p("fill", 1).sum())
    y = y + torch.clamp_max(x, p("most", WIDTH)) + torch.clamp_min(x, p("least", WIDTH))
    y = y + torch.hstack([x[:, :1], x[:, 1:]]) + torch.zeros_like(x).zero_().add_(x.clone().fill_(0.5)).mul_(2)
    return y + (x.any((1, 2)) | x.all((1, 2))).view(-1, 1, 1) + (keys % 7).unsqueeze(-1)

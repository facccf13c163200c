"""The researcher's room: a small GPT, its two optimisers and the training loop. The only file the loop may edit.

Top to bottom: configuration, model, optimisers, main. Everything else (data, clock, score) belongs to prepare.py, which
this file reaches through four calls: begin, batches, log and submit. The model maps tokens to logits and never sees
targets; prepare.py exports that forward when the clock starts and scores the exported program at the end, so forward
must stay free of side effects. Lower val_bpb within the time budget is better.
"""

import os

# Before torch is imported: growing segments keep a nearly full GPU from failing on fragmentation. On WSL2, known by its
# /dev/dxg, drivers may promise them and then fail (pytorch#192330).
if not os.path.exists("/dev/dxg"):
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import ctypes
import gc
import itertools
import math
import re
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prepare import SEED, TASK, begin, device, machine_flops, matmul_dtype

# ---- Configuration. Plain literals only: programs read and vary this block. ----

# Size: everything follows from the compute the budget buys (see size_for).
EXPECTED_MFU = 0.4  # share of the measured matmul rate that training is expected to reach
TOKENS_PER_PARAM = 8  # training tokens per matrix parameter: lower means a larger model seeing less text
BATCH_TOKENS = 48000  # tokens per optimiser step of a run over 1e8 tokens, before it is rounded down to a power of two
ASPECT = 64  # model width per layer of depth
MAX_HEAD_DIM = 128  # attention head width of large models
MIN_HEADS = 2  # smaller models halve the head width until they have this many heads

# Model
MLP_RATIO = 4  # hidden width of the MLP over model width
WINDOW_PATTERN = "SSSSL"  # attention span per layer, repeated: S short, L full; the last layer is always full
SHORT_WINDOW = 0.125  # span of an S layer as a share of the sequence
ROTARY_BASE = 200000  # longest rotary wavelength, in tokens over 2 pi
QK_SCALE = 1.0  # factor on attention scores: higher means sharper attention
SOFT_CAP = 15.0  # logits are squashed into (-SOFT_CAP, SOFT_CAP)
NGRAM_ORDERS = (2, 3)  # how many tokens the hashed embeddings look back on, the present one included
NGRAM_ROWS = 64  # rows of each n-gram table per token of the vocabulary; saving them takes from the budget
HASH_PRIMES = (7919, 15485863)  # one for each table of an order
KEY_SHIFT = 0.5  # share of a key's channels that come from the token before
GATE_CHANNELS = 32  # leading channels that steer the gates of values and of the token before
GATE_RANGE = 2.0  # the gate lies in (0, GATE_RANGE) and starts in the middle

# Initialisation
MATRIX_INIT = 0.68  # scale of the uniform start of matrices, 1 = unit gain
EMBED_INIT = 1.0  # standard deviation of the token embedding
HEAD_INIT = 0.001  # standard deviation of the output head
RESIDUAL_INIT = 1.0  # start of each layer's factor on the residual stream
X0_INIT = 0.05  # start of each layer's share of the embedding

# Optimisers
EMBED_LR = 0.9  # AdamW, token and value embeddings, at width 768
HEAD_LR = 0.008  # AdamW, output head, at width 768
NGRAM_LR = 1.0  # row-wise Adagrad, n-gram embeddings, at width 768; never cooled down
SCALAR_LR = 0.5  # AdamW, x0 scalars
RESIDUAL_LR = 0.005  # AdamW, residual scalars
SMEAR_LR = 0.05  # AdamW, gate of the token before
MATRIX_LR = 0.04  # Muon
ADAM_BETA1 = 0.8  # AdamW momentum
ADAM_BETA2 = 0.95  # AdamW second moment
X0_BETA1 = 0.96  # AdamW momentum of the x0 scalars
ADAM_EPS = 1e-10  # AdamW
HEAD_DECAY = 0.01  # AdamW weight decay, output head
EMBED_DECAY = 0.001  # AdamW weight decay, token embedding
VALUE_DECAY = 0.003  # AdamW weight decay, value embeddings
MATRIX_DECAY = 0.2  # Muon cautious weight decay at the start, falling linearly to zero
MOMENTUM_START = 0.85  # Muon momentum at step 0
MOMENTUM_END = 0.95  # Muon momentum from MOMENTUM_STEPS on
MOMENTUM_STEPS = 200  # steps over which Muon momentum rises
MUON_BETA2 = 0.95  # Muon second moment (NorMuon)

# Schedule and loop
COOLDOWN = 0.9  # last share of the budget, over which learning rates fall linearly
FINAL_LR = 0.05  # learning rates end at this share
DEVICE_TOKENS = 131072  # tokens per forward pass on a GPU; halved at start-up until they fit
CPU_TOKENS = 2048  # tokens per forward pass on a CPU, and on an Apple GPU
LOG_EVERY = 10  # steps between reading the loss, which makes the CPU wait for the GPU
MAX_LOSS = 100.0  # a loss beyond this has diverged
COMPILED = ("cuda", "xpu")  # devices that torch compiles for: the GPUs of NVIDIA and AMD, and of Intel
# Attention kernels of a GPU, as torch.nn.attention.SDPBackend names them: the first that can do a call does it.
ATTENTION_KERNELS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
CUDNN_CAPABILITY = (9, 10)  # major compute capabilities on which cuDNN may come first: H100, B200 and their like
# How a GPU's libraries say that its memory is full; a handle of cuBLAS or cuDNN that finds none was "not initialized".
OUT_OF_MEMORY = r"out of memory|ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"

# Optimal quintic iterations towards the polar factor (Polar Express, arXiv 2505.16932), five steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def shape_for(depth):
    """Width and head width of a model of `depth` layers: (dim, head_dim), dim a multiple of head_dim."""
    head_dim = MAX_HEAD_DIM
    while head_dim > 32 and ASPECT * depth < MIN_HEADS * head_dim:
        head_dim //= 2
    return math.ceil(ASPECT * depth / head_dim) * head_dim, head_dim


def size_for(compute):
    """The sizing rule: `compute` FLOPs -> (depth, dim, head_dim, tokens per optimiser step).

    Training N matrix parameters on D tokens costs 6*N*D FLOPs, and the best runs from laptops to an H100 all have D
    near TOKENS_PER_PARAM * N, so compute fixes N. Depth is the one whose real parameter count comes nearest to N.
    The batch grows a little slower than D: 2^11 is best here on two CPU cores, and 2^17 in public runs on an H100.
    """
    params = math.sqrt(compute / (6 * TOKENS_PER_PARAM))
    per_layer = 4 + 2 * MLP_RATIO  # matrix parameters of a layer over width squared: attention 4, MLP twice its ratio
    depth = min(range(1, 65), key=lambda d: abs(math.log(d * shape_for(d)[0] ** 2 * per_layer / params)))
    batch = BATCH_TOKENS * (TOKENS_PER_PARAM * params / 1e8) ** 0.9
    return depth, *shape_for(depth), max(2 ** math.floor(math.log2(batch)), TASK.seq_len)


# ---- Model. Weights are float32, but for n-grams; activations DTYPE. Products cast their weights, not autocast. ----

DTYPE = matmul_dtype()


def norm(x):
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of x [B, T, ..., D]; cos and sin broadcast against it.

    Channel i pairs with i + D/2. The signs of the rotation are folded into sin, so one roll does for both halves.
    """
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def previous(x):
    """x [B, T, ...] one place later: position t holds what t - 1 held, and the first holds zeros."""
    return F.pad(x[:, :-1], [0, 0] * (x.ndim - 2) + [1, 0])


def rotary_tables(length, head_dim):
    """cos and sin for rotate(), each [length, 1, 1, head_dim] of DTYPE."""
    speed = ROTARY_BASE ** -torch.linspace(0, 1, head_dim // 2 + 1, dtype=torch.float64)[:-1]
    angle = torch.arange(length, dtype=torch.float64).outer(speed)
    cos, sin = torch.cat([angle.cos(), angle.cos()], 1), torch.cat([angle.sin(), -angle.sin()], 1)
    return cos[:, None, None].to(DTYPE), sin[:, None, None].to(DTYPE)


def attend(q, k, v, window):
    """Causal attention in which every query sees itself and the `window` - 1 keys before it.

    q, k, v: [B, H, T, D]; returns [B, H, T, D]. A short window is cut into chunks: W queries need no keys outside
    their own chunk and the one before, so T*2W scores replace T*T (the blocked local attention of Longformer, arXiv
    2004.05150). Chunks take the place of heads, because fused kernels want four dimensions.
    """
    (B, H, T, D), scale = q.shape, QK_SCALE / math.sqrt(q.size(-1))
    if window >= T and q.device.type != "mps":  # where is_causal may let queries see ahead (pytorch#195910)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if T % window:
        raise ValueError(f"the window ({window}) has to divide the sequence length ({T})")
    query = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device) - window
    chunk = torch.arange(T // window, device=q.device)[:, None, None]
    mask = (key <= query) & (key > query - window) & (key + chunk * window >= 0)
    q, k, v = (x.reshape(B * H, T // window, window, D) for x in (q, k, v))
    k, v = (torch.cat([previous(x), x], dim=2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=scale).reshape(B, H, T, D)


class NgramEmbedding(nn.Module):
    """Embeddings of the n-grams that end in a token, hashed into tables (fastText, arXiv 1607.04606).

    Each has a row in one table per hash, which holds that share of the width: two that share one row rarely share both
    (hash embeddings, arXiv 1709.03933). All are one parameter with a sparse gradient: their size costs a step nothing.
    They learn by heart what is read again: then training reads an n-gram with a chance of 1 / passes^2 (see train).
    """

    def __init__(self, vocab_size, dim):
        super().__init__()
        self.rows, count = NGRAM_ROWS * vocab_size, len(NGRAM_ORDERS) * len(HASH_PRIMES)
        self.table = nn.Parameter(torch.zeros(count * self.rows, dim // len(HASH_PRIMES), dtype=DTYPE))
        self.keep = 1.0  # chance that training reads an n-gram

    def forward(self, idx):
        """int64 tokens [B, T] -> DTYPE [B, T, orders, C]; tokens before the first count as 0."""
        ids = []
        for order in NGRAM_ORDERS:
            for prime in HASH_PRIMES:
                token = key = idx
                for _ in range(order - 1):
                    token = previous(token)
                    key = key * prime ^ token  # FNV-1
                ids.append(key % self.rows + len(ids) * self.rows)
        found = F.embedding(torch.stack(ids, dim=-1), self.table, sparse=self.training)
        found = found.view(*idx.shape, len(NGRAM_ORDERS), -1)
        if self.training:
            found = found * (torch.rand_like(found[..., :1], dtype=torch.float32) < self.keep)
        return found


class Linear(nn.Linear):
    """Matrix product without bias in the dtype of its input."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention with rotary positions, normed queries and keys, and gated value embeddings.

    Norm on queries and keys: ViT-22B, arXiv 2302.05442. Embeddings of the token and of its n-grams mixed into the
    values: value residual learning, arXiv 2410.17897; gated as in nanochat. Shifted keys: modded-nanogpt.
    """

    def __init__(self, dim, head_dim, window, has_value_embed):
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        gates = (1 + len(NGRAM_ORDERS)) * dim // head_dim
        self.gate = Linear(min(GATE_CHANNELS, dim), gates) if has_value_embed else None

    def forward(self, x, value_embeds, cos, sin):
        """x: [B, T, C]; value_embeds: [B, T, 1 + orders, C] or None; returns [B, T, C]."""
        B, T, C = x.shape
        # One product is faster than three; as parameters they stay apart because Muon treats each on its own.
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        qkv = F.linear(x, weight.to(x.dtype)).view(B, T, 3, -1, self.head_dim)
        q, k = norm(rotate(qkv[:, :, :2], cos, sin)).unbind(2)
        # A key that also tells of the token before lets one layer look up what followed it earlier, which takes two
        # layers otherwise. The channels that rotate slowest serve: they say what a token is rather than where.
        half = self.head_dim // 2
        slow = torch.arange(self.head_dim, device=x.device) % half >= half * (1 - KEY_SHIFT)
        k = torch.where(slow, previous(k), k)
        v = qkv[:, :, 2]
        if self.gate is not None:
            gate = GATE_RANGE * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            heads = B, T, 1 + len(NGRAM_ORDERS), -1
            v = v + (gate.view(*heads, 1) * value_embeds.view(*heads, self.head_dim)).sum(2)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.window)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm transformer layer; the MLP uses ReLU squared (Primer, arXiv 2109.08668)."""

    def __init__(self, dim, head_dim, window, has_value_embed):
        super().__init__()
        self.attention = Attention(dim, head_dim, window, has_value_embed)
        self.up, self.down = Linear(dim, MLP_RATIO * dim), Linear(MLP_RATIO * dim, dim)

    def forward(self, x, value_embeds, cos, sin):
        """x: [B, T, C]; value_embeds: see Attention; returns [B, T, C]."""
        x = x + self.attention(norm(x), value_embeds, cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """Decoder-only transformer: int64 tokens [B, T] -> float32 logits [B, T, V].

    The stream starts from the embeddings of a token and its n-grams, and a gated share of those of the token before.
    Before each layer it is scaled and a share of its start is mixed back in, both by learned scalars (all:
    modded-nanogpt). Soft-capped logits: Gemma 2, arXiv 2408.00118.
    """

    def __init__(self, vocab_size, seq_len, depth, dim, head_dim):
        super().__init__()
        short = max(1, int(seq_len * SHORT_WINDOW))
        pattern = (WINDOW_PATTERN * depth)[: depth - 1] + "L"
        self.windows = [short if kind == "S" else seq_len for kind in pattern]
        has_value_embed = [i % 2 == (depth - 1) % 2 for i in range(depth)]
        self.embed = nn.Embedding(vocab_size, dim)
        self.value_embeds = nn.ModuleList(nn.Embedding(vocab_size, dim) if has else None for has in has_value_embed)
        self.ngram_embed = NgramEmbedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, head_dim, w, has) for w, has in zip(self.windows, has_value_embed))
        self.smear = Linear(min(GATE_CHANNELS, dim), 1)
        self.head = Linear(dim, vocab_size)
        self.residual = nn.Parameter(torch.full((depth,), RESIDUAL_INIT))
        self.x0 = nn.Parameter(torch.full((depth,), X0_INIT))
        for name, table in zip(("cos", "sin"), rotary_tables(seq_len, head_dim)):
            self.register_buffer(name, table)
        self.init_weights(dim)

    @torch.no_grad()
    def init_weights(self, dim):
        bound = MATRIX_INIT * math.sqrt(3 / dim)
        for parameter in [*self.blocks.parameters(), *self.value_embeds.parameters()]:
            nn.init.uniform_(parameter, -bound, bound)
        # Each layer starts as the identity and each gate in the middle of its range.
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "gate.weight", "smear.weight")):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.embed.weight, std=EMBED_INIT)
        nn.init.normal_(self.head.weight, std=HEAD_INIT)

    def forward(self, idx, ngrams=None):
        """idx: int64 [B, T]; ngrams: DTYPE [B, T, orders, C], what ngram_embed makes of idx, if it is there already."""
        ngrams = self.ngram_embed(idx) if ngrams is None else ngrams
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x = norm(self.embed(idx).to(DTYPE) + ngrams.sum(2))
        x = x0 = x + torch.sigmoid(self.smear(x[..., : self.smear.in_features])) * previous(x)
        for i, (block, table) in enumerate(zip(self.blocks, self.value_embeds)):
            x = self.residual[i] * x + self.x0[i] * x0
            values = None if table is None else torch.cat([table(idx).to(DTYPE)[:, :, None], ngrams], dim=2)
            x = block(x, values, cos, sin)
        # SOFT_CAP * tanh(z / SOFT_CAP), plus a constant that no softmax can see: sigmoid is several times cheaper than
        # tanh on a CPU, and dividing before the product spares a pass over the largest tensor of the model.
        return 2 * SOFT_CAP * torch.sigmoid(self.head(norm(x) / (SOFT_CAP / 2)).float())

    def flops_per_token(self):
        """Training FLOPs per token: 6 per weight of a matrix product, and attention's scores as if they were full."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.head.weight.numel()
        return 6 * weights + 12 * self.head.in_features * sum(self.windows)


# ---- Optimisers. Muon for the matrices inside the layers, Adagrad for n-grams, AdamW for everything else. ----


def polar_express(x):
    """Nearest semi-orthogonal matrices to x [N, R, C], R <= C, approximately: singular values end near 1. In DTYPE.

    Polar Express, arXiv 2505.16932: five quintic steps, each optimal for the range of singular values that is left.
    """
    x = x.to(DTYPE)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)  # below 1, with a margin for what bfloat16 rounds
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon_update(weights, grads, momentum_buffer, second_moment, lr, momentum, decay):
    """One Muon step for a stack of matrices of one shape: new weights [N, R, C] float32; buffers change in place.

    weights, grads, momentum_buffer: [N, R, C], R <= C; second_moment: [N, R, 1] if R == C else [N, 1, C];
    lr: [N, 1, 1]; momentum and decay: 0-D tensors. Momentum and orthogonalisation: Muon (Jordan 2024). The second
    moment evens out rows (or columns) without changing the size of the step: NorMuon, arXiv 2510.05491. Weights only
    decay where that agrees with the step: cautious weight decay, arXiv 2510.12402.
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    step = polar_express(grads.lerp(momentum_buffer, momentum)).float()
    energy = step.square().mean(dim=-1 if second_moment.size(-1) == 1 else -2, keepdim=True)
    second_moment.lerp_(energy, 1 - MUON_BETA2)
    even = step * second_moment.clamp_min(1e-10).rsqrt()
    step = even * (step.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    agrees = step * weights >= 0
    return weights - lr * (step + decay * weights * agrees)


class Muon:
    """Muon over `matrices`, one stacked update per shape, tall ones lying on their side; compiled on most GPUs."""

    def __init__(self, matrices):
        place, compiled = matrices[0].device, matrices[0].device.type in COMPILED
        # 0-D tensors, on the CPU for the compiler, to which values that change every step must not look like constants.
        self.lr, self.momentum, self.decay = (torch.zeros((), device=None if compiled else place) for _ in range(3))
        self.groups = []
        for rows, cols in dict.fromkeys(tuple(sorted(m.shape)) for m in matrices):
            group = [m for m in matrices if sorted(m.shape) == [rows, cols]]
            first = torch.zeros(len(group), rows, cols, device=place)
            second = torch.zeros_like(first[:, :, :1] if rows == cols else first[:, :1])
            gain = torch.tensor([max(1, m.size(0) / m.size(1)) ** 0.5 for m in group], device=place)
            self.groups.append((group, first, second, gain[:, None, None]))
        self.update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    @torch.no_grad()
    def step(self, lr, momentum, decay):
        def lying(matrix):
            return matrix.mT if matrix.size(0) > matrix.size(1) else matrix

        self.lr.fill_(lr), self.momentum.fill_(momentum), self.decay.fill_(decay)
        for group, first, second, gain in self.groups:
            grads, weights = torch.stack([lying(m.grad) for m in group]), [lying(m) for m in group]
            new = self.update(torch.stack(weights), grads, first, second, self.lr * gain, self.momentum, self.decay)
            torch._foreach_copy_(weights, new.unbind())


class RowAdagrad:
    """Adagrad (Duchi et al. 2011) of a table [R, W] with one sum of squares per row, as in DLRM, by sparse gradients.

    A row without a gradient neither moves nor changes its state: to leave it unread is exact.
    """

    def __init__(self, table):
        self.table = table
        # Of each row, the sum of its gradients' mean squares, and some place in the last batch that holds it.
        self.energy = torch.zeros(len(table), 1, device=table.device)
        self.place = torch.zeros(len(table), dtype=torch.int64, device=table.device)

    @torch.no_grad()
    def step(self, lr):
        ids, grads = self.table.grad._indices()[0], self.table.grad._values().float()
        # The gradients of a row meet at one of its places in the batch, and all places write the same new row. Sorting
        # out unique rows would make the CPU wait for a GPU, to learn how many there are.
        self.place[ids] = torch.arange(len(ids), device=ids.device)
        place = self.place[ids]
        total = torch.zeros_like(grads).index_add_(0, place, grads)[place]
        energy = self.energy[ids] + total.square().mean(dim=1, keepdim=True)
        self.energy[ids] = energy
        rows = self.table[ids].float().addcmul_(total, energy.clamp_min(1e-30).rsqrt(), value=-lr)
        self.table[ids] = rows.to(self.table.dtype)


def make_adamw(model, width):
    """Fused AdamW over what Muon and Adagrad leave; width: factor on the rates of embeddings and head."""
    betas = (ADAM_BETA1, ADAM_BETA2)
    groups = [
        dict(params=[model.embed.weight], peak=EMBED_LR * width, betas=betas, weight_decay=EMBED_DECAY),
        dict(params=[*model.value_embeds.parameters()], peak=EMBED_LR * width, betas=betas, weight_decay=VALUE_DECAY),
        dict(params=[model.head.weight], peak=HEAD_LR * width, betas=betas, weight_decay=HEAD_DECAY),
        dict(params=[model.smear.weight], peak=SMEAR_LR, betas=betas, weight_decay=0.0),
        dict(params=[model.residual], peak=RESIDUAL_LR, betas=betas, weight_decay=0.0),
        dict(params=[model.x0], peak=SCALAR_LR, betas=(X0_BETA1, ADAM_BETA2), weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, eps=ADAM_EPS, fused=True)


def lr_at(progress):
    """Share of the peak learning rate: constant, then linear down to FINAL_LR over the last COOLDOWN of the budget."""
    left = min(1.0, max(0.0, 1 - progress) / COOLDOWN)
    return FINAL_LR + (1 - FINAL_LR) * left


def momentum_at(step):
    """Muon momentum, rising linearly over the first MOMENTUM_STEPS steps."""
    return MOMENTUM_START + (MOMENTUM_END - MOMENTUM_START) * min(1.0, step / MOMENTUM_STEPS)


class Optimisers:
    """All of a model's optimisers and their schedules. Embeddings and head learn faster in narrow models."""

    def __init__(self, model):
        width = (model.head.in_features / 768) ** -0.5
        self.adamw, self.muon = make_adamw(model, width), Muon(list(model.blocks.parameters()))
        self.ngrams, self.ngram_lr = RowAdagrad(model.ngram_embed.table), NGRAM_LR * width

    def step(self, step, progress, scale=1.0):
        """The `step`-th step of each, at this share of the budget; scale: factor on all learning rates."""
        rate = scale * lr_at(progress)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["peak"]
        self.adamw.step()
        self.muon.step(rate * MATRIX_LR, momentum_at(step), MATRIX_DECAY * max(0.0, 1 - progress))
        # Not cooled down: a row that is first met near the end has everything to learn.
        self.ngrams.step(scale * self.ngram_lr)


# ---- Main ----


def fast_attention(device):
    """Context that picks attention kernels: the fastest that are right on a GPU, plain products on a CPU.

    At the lengths a CPU can train, products are faster than its fused kernel. cuDNN's gradients were NaN on cards other
    than those of CUDNN_CAPABILITY (pytorch#196678). Not in the model: who runs the exported forward makes the choice.
    """
    if device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # the switch covers the CPU despite its name
        names = ["MATH"]
    elif device.type == "cuda":
        trusted = torch.cuda.get_device_capability(device)[0] in CUDNN_CAPABILITY
        names = [name for name in ATTENTION_KERNELS if trusted or name != "CUDNN_ATTENTION"]
    else:
        names = ["OVERRIDEABLE", "FLASH_ATTENTION", "MATH"]  # the first is what Intel's GPUs have
    # The key of the compiler's cache lacks this choice: without a tag it would serve code of other kernels.
    torch.compiler.config.cache_key_tag = " ".join(names)
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def make_loss(model, compiled):
    """loss(x, y) for int64 [B, T] tokens and targets: mean nats per token, float32 0-D."""

    def loss(x, y, ngrams):
        return F.cross_entropy(model(x, ngrams).flatten(0, 1), y.flatten())

    # The loss is compiled along with the model: fused, the float32 logits never need to be stored. The n-grams are not:
    # the compiler knows no sparse gradients.
    loss_of = torch.compile(loss, dynamic=False) if compiled else loss
    return lambda x, y: loss_of(x, y, model.ngram_embed(x))


def rehearse(model, loss_of, rows, passes, device):
    """Compile and claim memory: two steps at rates of zero on random tokens; the second is as all that will follow."""
    optimisers = Optimisers(model)
    for _ in range(2):
        try:
            for _ in range(passes):
                text = torch.randint(TASK.vocab_size, (rows, TASK.seq_len + 1), device=device)
                # Cut as batches() cuts: for other strides, or for x that is y, all would be compiled again.
                loss_of(text[:, :-1].contiguous(), text[:, 1:].contiguous()).backward()
            optimisers.step(0, 0.0, scale=0.0)
        finally:
            model.zero_grad(set_to_none=True)


def warm_up(model, loss_of, rows, batch_rows, device):
    """Rehearse before the clock starts, with `rows` rows per pass or half as often as it takes; returns how many fit.

    Exits with status 1 where a single row does not fit.
    """
    while True:
        try:
            rehearse(model, loss_of, rows, batch_rows // rows, device)
            return rows
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)):
                raise
            if rows == 1:
                sys.exit("train.py: out of memory with a single row per forward pass; the model has to shrink")
            said = str(error).partition("\n")[0]
        rows //= 2
        torch.compiler.reset()
        gc.collect()  # an error may lie in a cycle with the frames that hold its tensors
        if device.type != "cpu":
            torch.accelerator.empty_cache()
        print(f"out of memory ({said}): trying {rows} rows per forward pass", flush=True)


def train(run, model, loss_of, optimisers, rows, passes, peak_flops):
    """Train until the clock runs out; returns (steps, tokens, mfu). Exits with status 1 if the loss diverges."""
    device = model.head.weight.device
    # A GPU runs behind the CPU that feeds it. Letting the CPU lead by one backward pass, and no more, keeps the GPU
    # busy while schedules and the end of the budget still follow the clock.
    fence = torch.Event(device) if device.type != "cpu" else None
    flops, batch_tokens = model.flops_per_token(), rows * passes * TASK.seq_len
    batches = iter(run.batches(rows))
    start = last = time.perf_counter()
    for step in itertools.count(1):
        total = torch.zeros((), device=device)
        for x, y in itertools.islice(batches, passes):
            loss = loss_of(x, y) / passes
            loss.backward()
            total += loss.detach()
        if fence:
            fence.synchronize()
        progress = run.progress
        model.ngram_embed.keep = min(1.0, run.epoch_tokens * progress / (step * batch_tokens)) ** 2
        optimisers.step(step - 1, progress)
        model.zero_grad(set_to_none=True)
        if fence:
            fence.record()
        done = progress >= 1
        if step % LOG_EVERY == 0 or done:
            value, now = total.item(), time.perf_counter()
            if not value < MAX_LOSS:
                sys.exit(f"train.py: training diverged: the loss is {value} at step {step}")
            speed, last = batch_tokens * (step % LOG_EVERY or LOG_EVERY) / (now - last), now
            run.log(step=step, loss=value)
            line = f"{min(progress, 1):7.1%} | step {step:05d} | loss {value:.4f} | {speed:,.0f} tok/s"
            print(f"{line} | MFU {speed * flops / peak_flops:.1%}", flush=True)
        if done:
            return step, step * batch_tokens, step * batch_tokens * flops / (now - start) / peak_flops


def keep_freed_memory():
    """Stop glibc from giving large blocks back to the system: faulting them in again costs a third of a CPU step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and never shrink the heap


def main():
    keep_freed_memory()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    place, peak_flops = device(), machine_flops()
    depth, dim, head_dim, batch_tokens = size_for(peak_flops * EXPECTED_MFU * TASK.time_budget)
    model = GPT(TASK.vocab_size, TASK.seq_len, depth, dim, head_dim).to(place)
    loss_of = make_loss(model, compiled=place.type in COMPILED)
    batch_rows = batch_tokens // TASK.seq_len
    rows = max(1, (DEVICE_TOKENS if place.type in COMPILED else CPU_TOKENS) // TASK.seq_len)
    with fast_attention(place):
        rows = warm_up(model, loss_of, min(rows, batch_rows), batch_rows, place)
    passes = batch_rows // rows
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    print(f"{size}: depth {depth}, width {dim}; {passes} x {rows} rows of {TASK.seq_len} tokens per step", flush=True)
    optimisers = Optimisers(model)
    gc.collect(), gc.freeze(), gc.disable()  # a collection in mid-run costs more than it could free
    run = begin(model)
    with fast_attention(place):
        steps, tokens, mfu = train(run, model, loss_of, optimisers, rows, passes, peak_flops)
    print(f"done: {steps} steps, {tokens / 1e6:.1f}M tokens, {size}, MFU {mfu:.1%}", flush=True)
    run.submit(model)


if __name__ == "__main__":
    main()

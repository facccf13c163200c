"""A train.py for tests of the loop: a bigram model that learns something within two seconds."""

import torch
import torch.nn.functional as F
from torch import nn

from prepare import SEED, TASK, begin

LR = 0.001  # far too low, so that a search finds better
WIDTH = 32  # of the embedding
ROWS = 16  # per step
CRASH = 0  # anything else fails

torch.manual_seed(SEED)
if CRASH:
    raise RuntimeError("crashing as asked")
model = nn.Sequential(nn.Embedding(TASK.vocab_size, WIDTH), nn.Linear(WIDTH, TASK.vocab_size))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
run = begin(model)
for step, (x, y) in enumerate(run.batches(ROWS)):
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(step=step, loss=loss.item())
    if run.progress >= 1:
        break
run.submit(model)

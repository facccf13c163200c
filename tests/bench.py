"""Measures what the README claims, as a table; run by hand: python tests/bench.py [--out DIR], some three minutes.

Every row compares ours with a plain way of doing the same, in seconds unless it says otherwise.
Nothing here is an assertion.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nights  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
from exam import rows  # noqa: E402
from exam.examiner import Examiner, examine  # noqa: E402
from exam.result import print_summary  # noqa: E402
from exam.rows import pack, tokenise  # noqa: E402
from exam.text import pycode_documents  # noqa: E402
from exam.tokenizer import build_encoding, load_tokens  # noqa: E402
from exam.trial import trial  # noqa: E402

TASK = prepare.get_task("pycode")


def seconds(function, repeats=3):
    """Best of `repeats` wall times of function()."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def loader(folder):
    """(ours, plain): seconds for a batch of 2^18 tokens, from packed rows, and tokenised and packed on the fly."""
    run = prepare.Run({"device": "cpu"}, {}, None, None)
    run._rows = prepare.np.memmap(folder / "train.bin", dtype="uint16", mode="r").reshape(-1, TASK.seq_len + 1)
    rows = 2**18 // TASK.seq_len
    batches = run.batches(rows)
    next(batches)
    encoding = build_encoding(load_tokens(folder))
    texts = [text for _, (text, _) in zip(range(400), pycode_documents())]

    def on_the_fly():
        packed = plain_pack(tokenise(texts, encoding, TASK), TASK.seq_len + 1, 1000)
        torch.tensor([row for _, (row, _) in zip(range(rows), packed)])

    return seconds(lambda: next(batches), 20), seconds(on_the_fly)


def exam(folder, scratch):
    """Rows on examining the model of the baseline, against evaluating it unprobed."""
    import train

    torch.manual_seed(0)
    depth, dim, head_dim, _ = train.size_for(prepare.machine_flops() * train.EXPECTED_MFU * 60)
    model = train.GPT(TASK.vocab_size, TASK.seq_len, depth, dim, head_dim).eval()
    program, constants = prepare.seal(model, TASK)
    tensors = prepare.Run(program, constants, None, None)._tensors(model)
    prepare.save_sealed(scratch / "model.safetensors", program, tensors)
    rows = torch.from_numpy(prepare.np.fromfile(folder / "val.bin", "uint16").astype("int64")).view(
        -1, TASK.seq_len + 1
    )

    @torch.inference_mode()
    def plain():
        for chunk in rows.split(program["batch"]):
            F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten()).item()

    unprobed = seconds(plain)

    def row(what, beat):
        ours = seconds(lambda: examine(scratch / "model.safetensors", TASK, folder, beat, examiner))
        return f"exam: {what}, against a plain evaluation", ours, unprobed

    with Examiner(None) as examiner:
        return [row("a score too high to count", 0.0), row("a new best", None)]


def plain_pack(documents, row_len, buffer_size):
    """Best-fit packing as its definition says it, by looking through the whole buffer."""
    documents, waiting = iter(documents), []
    while True:
        row, dropped = [], 0
        while len(row) < row_len:
            while len(waiting) < buffer_size and (document := next(documents, None)) is not None:
                waiting.append(document)
            if not waiting:
                return
            room = row_len - len(row)
            fitting = [document for document in waiting if len(document) <= room]
            longest = max(map(len, fitting), default=None)
            shortest = min(map(len, waiting))
            place = [len(document) for document in waiting].index(longest or shortest)
            document = waiting.pop(place)
            row += list(document[:room])
            dropped += max(0, len(document) - room)
        yield row, dropped


def packing(folder):
    """(ours, plain): seconds to encode and pack a million tokens; the same on one thread, with the plain search."""
    encoding = build_encoding(load_tokens(folder))
    texts = [text for text, _ in pycode_documents()][:2000]
    millions = sum(map(len, tokenise(texts, encoding, TASK))) / 1e6

    def plain():
        pieces = []
        for text in texts[:200]:
            ids = encoding.encode_ordinary(text)
            pieces += [[TASK.vocab_size - 1, *ids[i : i + TASK.seq_len]] for i in range(0, len(ids), TASK.seq_len)]
        for _ in plain_pack(pieces, TASK.seq_len + 1, 1000):
            pass
        return sum(map(len, pieces)) / 1e6

    ours = seconds(lambda: deque(pack(tokenise(texts, encoding, TASK), TASK.seq_len + 1), maxlen=0))
    return ours / millions, seconds(plain) / plain()


def memory(scratch):
    """(large, small): gigabytes of memory that preparing 200 and 50 MB of own text takes at most."""
    texts = [text for text, _ in pycode_documents()]

    def peak(megabytes):
        folder = scratch / f"text{megabytes}"
        folder.mkdir()
        size, number = 0, 0
        with open(folder / "text.jsonl", "w") as file:
            while size < megabytes * 1e6:  # numbered, so that none is a duplicate
                size += file.write(json.dumps({"text": f"{number}\n{texts[number % len(texts)]}"}) + "\n")
                number += 1
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from exam.rows import prepare_text\n"
            f"prepare_text([{str(folder)!r}], 'text{megabytes}')\nprint(open('/proc/self/status').read())"
        )
        environment = os.environ | {"AUTORESEARCH_CACHE": str(scratch / "cache")}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return int(said.stdout.partition("VmHWM:")[2].split()[0]) / 1e6

    return peak(200), peak(50)


def overhead(scratch, budget):
    """Rows on the wall time of a trial of the baseline beyond its budget: in all, and the parts of it."""
    result = trial(ROOT / "train.py", scratch / "trial", prepare.get_task("pycode", budget), 0)
    print_summary(result)
    beyond = result.total_seconds - result.training_seconds
    return [
        ("trial: wall time beyond the budget, against the budget", beyond, budget),
        ("trial: start-up and seal, against that time", result.startup_seconds, beyond),
        ("trial: exam, against that time", result.eval_seconds, beyond),
    ]


def training():
    """Rows on a step of the baseline for 60 s: its parts, and its pieces against plain ones."""
    import train

    peak = prepare.machine_flops()
    depth, dim, head_dim, batch = train.size_for(peak * train.EXPECTED_MFU * 60)
    train.keep_freed_memory()
    torch.manual_seed(0)
    model = train.GPT(TASK.vocab_size, TASK.seq_len, depth, dim, head_dim)
    tokens = torch.randint(TASK.vocab_size, (max(1, min(train.CPU_TOKENS, batch) // TASK.seq_len), TASK.seq_len))
    passes, loss_of = batch // tokens.numel(), train.make_loss(model, compiled=False)
    matrices = list(model.blocks.parameters())
    ours, singles = train.Optimisers(model), [train.Muon([m]) for m in matrices]
    unfused = torch.optim.AdamW([{**group, "fused": False} for group in ours.adamw.param_groups])
    q, k, v = torch.randn(3, 8, dim // head_dim, TASK.seq_len, head_dim, dtype=train.DTYPE)
    window = min(model.windows)
    distance = torch.arange(TASK.seq_len)[:, None] - torch.arange(TASK.seq_len)
    band = (distance >= 0) & (distance < window)

    def plain_optimisers():
        unfused.step()
        for single in singles:
            single.step(0.0, 0.9, 0.1)
        ours.ngrams.step(0.0)

    def plain_loss(hidden):  # the last product, the soft cap and the loss, without the rest of the model
        logits = 2 * train.SOFT_CAP * torch.sigmoid(model.head(hidden).float())
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    with train.fast_attention(torch.device("cpu")):
        both = seconds(lambda: loss_of(tokens, tokens).backward(), 20) * passes
        hidden = torch.randn(*tokens.shape, dim, dtype=train.DTYPE)
        head = seconds(lambda: plain_loss(hidden.clone().requires_grad_()), 20) * passes
        optimisers = seconds(lambda: ours.step(0, 0.5, scale=0.0), 20)
        ngrams = seconds(lambda: model.ngram_embed(tokens), 20) * passes + seconds(lambda: ours.ngrams.step(0.0), 20)
        plain = seconds(plain_optimisers, 20)
        chunked = seconds(lambda: train.attend(q, k, v, window), 20)
        banded = seconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=band), 20)
    step = both + optimisers
    return [
        ("step: optimisers, against one matrix at a time and AdamW unfused", optimisers, plain),
        ("step: optimisers, against the whole step", optimisers, step),
        ("step: finding rows of n-grams and moving them, against the whole step", ngrams, step),
        ("step: head and loss, against the whole step", head, step),
        ("step: TFLOP/s, against the measured rate", model.flops_per_token() * batch / step / 1e12, peak / 1e12),
        ("attention: short window, against a banded mask", chunked, banded),
    ]


def start_of_the_loop():
    """(ours, plain): seconds of `agent_loop.py --help`, and of an interpreter that does nothing."""

    def call(*arguments):
        return seconds(lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True))

    return call(str(ROOT / "agent_loop.py"), "--help"), call("-c", "")


def keep_rule():
    """True gain and false keeps of a simulated night, against the greedy rule at equal GPU time."""
    world = nights.WORLDS["as published"]
    (gain, _, false, *_), (our_gain, _, our_false, *_) = (nights.mean(world, greedy, 400) for greedy in (True, False))
    yield "keep rule: true gain of a simulated night in bits per byte, against keeping any lower score", our_gain, gain
    yield "keep rule: useless or harmful changes kept in it, against the same", our_false, false


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for bench.tsv")
    arguments = parser.parse_args()
    folder = rows.prepare(TASK)
    with tempfile.TemporaryDirectory() as scratch:
        table = [
            ("loader: 2^18 tokens, against tokenising and packing on the fly", *loader(folder)),
            ("preparing: a million tokens, against one thread and the plain search", *packing(folder)),
            ("preparing: GB of memory for 200 MB of text, against 50 MB", *memory(Path(scratch))),
            *exam(folder, Path(scratch)),
            ("agent_loop.py --help, against an empty program", *start_of_the_loop()),
            *training(),
            *overhead(Path(scratch), 60.0),
            *keep_rule(),
        ]
    lines = ["what\tours\tplain\tours/plain"]
    lines += [f"{what}\t{ours:.4f}\t{plain:.4f}\t{ours / plain:.4f}" for what, ours, plain in table]
    print("\n".join(lines))
    if arguments.out:
        (arguments.out / "bench.tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

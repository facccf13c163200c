"""Measures what the README claims, as a table; run by hand: python tests/bench.py [--out DIR], some two minutes.

Every row compares ours with a plain way of doing the same in the same process. Nothing here is an assertion.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from test_prepare import plain_pack  # noqa: E402

import prepare  # noqa: E402

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
    encoding = prepare.build_encoding(prepare.load_tokens(folder))
    texts = [text for _, (text, _) in zip(range(400), prepare.pycode_documents())]

    def on_the_fly():
        packed = plain_pack(prepare.tokenise(texts, encoding, TASK), TASK.seq_len + 1, 1000)
        torch.tensor([row for _, (row, _) in zip(range(rows), packed)])

    return seconds(lambda: next(batches), 20), seconds(on_the_fly)


def exam(folder, scratch):
    """Seconds to examine the baseline's model, the same where its score would count, and to evaluate it unprobed."""
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

    path = scratch / "model.safetensors"
    first = seconds(lambda: prepare.examine(path, TASK, folder, beat=0.0))
    return first, seconds(lambda: prepare.examine(path, TASK, folder)), seconds(plain)


def overhead(scratch, budget):
    """(wall seconds of a trial of the baseline beyond its budget, budget)."""
    result = prepare.trial(ROOT / "train.py", scratch / "trial", prepare.get_task("pycode", budget), 0)
    prepare.print_summary(result)
    return result["total_seconds"] - result["training_seconds"], budget


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for bench.tsv")
    arguments = parser.parse_args()
    folder = prepare.prepare(TASK)
    with tempfile.TemporaryDirectory() as scratch:
        first, close, plain = exam(folder, Path(scratch))
        table = [
            ("loader: 2^18 tokens, against tokenising and packing on the fly", *loader(folder)),
            ("exam: pycode, against a plain evaluation of the same rows", first, plain),
            ("exam of a score that counts, against the same", close, plain),
            ("trial: wall time beyond the budget, against the budget", *overhead(Path(scratch), 60.0)),
        ]
    lines = ["what\tours_s\tplain_s\tours/plain"]
    lines += [f"{what}\t{ours:.4f}\t{plain:.4f}\t{ours / plain:.4f}" for what, ours, plain in table]
    print("\n".join(lines))
    if arguments.out:
        (arguments.out / "bench.tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What a sealed model may do: the operators of honest models, and no call of them that could read what is not its own.

The operators that the exam board allows are those that the models of tests/zoo.py export, no more and no fewer.
"""

import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import save_file

import prepare
from exam.reader import load_sealed

TASK = prepare.Task("zoo", "zoo", zoo.LENGTH, zoo.VOCABULARY, 4, 1.0, split_long=True)
TOKENS = torch.randint(0, zoo.VOCABULARY, (4, zoo.LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def seal_of():
    """seal_of(name): (model, program, tensors) of a model of the zoo, made once."""
    torch.set_num_threads(1)  # these tensors are too small to share, least of all on a busy machine
    made = {}

    def seal_of(name):
        if name not in made:
            model = zoo.ZOO[name]().eval()
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patch.setattr(prepare, "exam_batch", lambda task, device: len(TOKENS))
                program, constants = prepare.seal(model, TASK)
            made[name] = model, program, {**model.state_dict(), **constants}
        return made[name]

    return seal_of


@pytest.mark.parametrize("name", zoo.ZOO)
def test_an_honest_model_seals_and_computes_what_it_did(name, seal_of):
    model, program, tensors = seal_of(name)
    prepare.try_forward(program, tensors, dict(model.named_parameters()), TASK)
    with torch.inference_mode():
        ours, theirs = prepare.build_forward(program, tensors)(TOKENS), model(TOKENS)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "width"), [(1, 32), (3, 64)])
def test_the_baseline_seals_at_several_sizes(depth, width):
    import train

    model = train.GPT(zoo.VOCABULARY, zoo.LENGTH, depth, width, 32)
    program, constants = prepare.seal(model, TASK)
    prepare.try_forward(program, {**model.state_dict(), **constants}, dict(model.named_parameters()), TASK)


def test_the_operators_are_those_that_honest_models_export(seal_of):
    exported = {call[1] for name in zoo.ZOO for call in seal_of(name)[1]["calls"]} - {"getitem"}
    assert exported == prepare.OPERATORS


def test_no_operator_writes_or_draws_random_numbers():
    for name in prepare.OPERATORS - {"scaled_dot_product_attention.default"}:  # whose dropout has to be 0
        operator = prepare.find_operator(name)
        assert not operator._schema.is_mutable and torch.Tag.nondeterministic_seeded not in operator.tags, name


# ---------------------------------------------------------------------------------------------------------------------
# Calls that no honest model makes

X, DEVICE = {"slot": 0}, {"device": True}

HOSTILE = {
    "circular padding": ("pad.default", [X, [20, -20], "circular"], {}, "no known kind: mode"),
    "a bare fft over a dimension that is not there": ("_fft_c2r.default", [X, [9], 0, 16], {}, "not allowed"),
    "a bare fft over one dimension twice": ("_fft_c2c.default", [X, [1, 1], 0, True], {}, "not allowed"),
    "an fft of a length that wraps": ("fft_rfft.default", [X, 2**62], {}, "no known kind: n="),
    "a norm of an fft that is a sum": ("fft_rfft.default", [X, 16, -1, "sum"], {}, "no known kind: norm"),
    "repeats whose sum wraps": ("repeat_interleave.Tensor", [X], {}, "not allowed"),
    "one repeat that wraps": ("repeat_interleave.self_int", [X, 2**62, 0], {}, "no known kind: repeats"),
    "interpolation by a tiny scale": ("upsample_nearest1d.default", [X, [64], 1e-300], {}, "not allowed"),
    "interpolation by a tiny scale, as export has it": ("upsample_nearest1d.vec", [X, None, [1e-300]], {}, "factor"),
    "interpolation by no number": ("upsample_nearest1d.vec", [X, None, [float("nan")]], {}, "factor"),
    "bytes taken for another dtype": ("view.dtype", [X], {"dtype": {"dtype": "int64"}}, "not allowed"),
    "a dtype of quantised numbers": ("_to_copy.default", [X], {"dtype": {"dtype": "quint8"}}, "no known kind: dtype"),
    "a dtype of eight bits": ("_to_copy.default", [X], {"dtype": {"dtype": "float8_e5m2"}}, "no known kind: dtype"),
    "a dtype of half complex": ("zeros.default", [[1]], {"dtype": {"dtype": "complex32"}}, "no known kind: dtype"),
    "a dtype that is a function": ("zeros.default", [[1]], {"dtype": {"dtype": "load"}}, "no known kind: dtype"),
    "a sparse layout": ("_to_copy.default", [X], {"layout": {"layout": "sparse_coo"}}, "no known kind: layout"),
    "a memory format": ("clone.default", [X], {"memory_format": {"memory_format": "channels_last"}}, "no known kind"),
    "a device by its name": ("zeros.default", [[1]], {"device": "meta"}, "no known kind: device"),
    "a device in another place": ("add.Tensor", [X, DEVICE], {}, "no known kind: other"),
    "pinned memory": ("zeros.default", [[1]], {"pin_memory": True}, "no known kind: pin_memory"),
    "giant zeros": ("zeros.default", [[2**20, 2**20]], {}, "no known kind: size"),
    "a giant range": ("arange.default", [2**40], {}, "more than"),
    "a range without end": ("arange.start_step", [0, float("inf"), 1], {}, "more than"),
    "a range of tiny steps": ("arange.start_step", [0, 1, 1e-300], {}, "more than"),
    "a giant identity": ("eye.default", [2**30], {}, "more than"),
    "one-hot of classes without number": ("one_hot.default", [X, 2**40], {}, "no known kind: num_classes"),
    "a view of giant size": ("expand.default", [X, [2**30, 16, 16]], {}, "no known kind: size"),
    "a number in place of a tensor": ("matmul.default", [X, X], {"out": 1}, "no such arguments"),
    "a number in place of the indices": ("gather.default", [X, 0, 3], {}, "no known kind: index"),
    "an integer of 65 bits": ("add.Tensor", [X, 2**64], {}, "no known kind: other"),
    "lists within lists": ("cat.default", [[[[X]]]], {}, "no known kind: tensors"),
    "an equation that is code": ("einsum.default", ["__import__('os')", [X]], {}, "no known kind: equation"),
    "too many arguments": ("neg.default", [X, 1], {}, "no such arguments"),
    "an order of its own to search by": ("searchsorted.Tensor", [X, X], {"sorter": X}, "sorter"),
    "dropout": ("scaled_dot_product_attention.default", [X, X, X, None, 0.5], {}, "no dropout"),
    "a median, which reads beyond a repeated element": ("median.dim", [X, -1], {}, "not allowed"),
    "memory that it was not given": ("as_strided.default", [X, [1], [1]], {}, "not allowed"),
    "memory that nothing has written": ("empty.memory_format", [[64]], {}, "not allowed"),
    "random numbers": ("rand_like.default", [X], {}, "not allowed"),
    "an unhashable name": (["add.Tensor"], [X, X], {}, "unhashable"),
}


def forward_of(*call, tensors=None):
    """What a program of one call makes of a float32 tensor [16, 16]."""
    name, args, kwargs = json.loads(json.dumps(call))
    tensors = tensors or {"x": torch.ones(16, 16)}
    slots = {str(slot): tensor for slot, tensor in enumerate(tensors)}
    program = {"device": "cpu", "batch": 4, "tensors": slots, "calls": [[99, name, args, kwargs]], "output": 99}
    return prepare.build_forward(program, tensors)(TOKENS)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_call_is_refused_that_uses(what):
    *call, reason = HOSTILE[what]
    with pytest.raises((prepare.Refused, TypeError), match=reason):
        forward_of(*call)


def test_an_attention_is_refused_whose_key_is_shorter_than_its_value():
    tensors = {"query": torch.ones(1, 1, 8, 4), "key": torch.ones(1, 1, 4, 4), "value": torch.ones(1, 1, 8, 4)}
    with pytest.raises(prepare.Refused, match="same length"):
        forward_of("scaled_dot_product_attention.default", [{"slot": i} for i in range(3)], {}, tensors=tensors)


def test_an_attention_is_refused_whose_mask_is_of_another_size():
    tensors = {"x": torch.ones(1, 1, 8, 4), "mask": torch.zeros(8, 4)}
    with pytest.raises(prepare.Refused, match="does not fit"):
        forward_of("scaled_dot_product_attention.default", [X, X, X, {"slot": 1}], {}, tensors=tensors)


def test_a_result_is_refused_that_is_too_large_for_sizes_to_be_multiplied():
    wide = torch.ones(1, 1).expand(2**16, 2**16)
    for tensors in ({"x": wide}, {"x": torch.ones(2**8), "y": torch.ones(0, 2**40)}):
        with pytest.raises(prepare.Refused, match="too large"):
            forward_of("neg.default", [X], {}, tensors=tensors)
    with pytest.raises(prepare.Refused, match="too large"):
        forward_of("unsqueeze.default", [X, 0], {}, tensors={"x": torch.ones(16, 1).expand(16, 2**30)})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda calls: calls.append([98, "neg.default", [{"slot": 55}], {}]), "nothing has filled"),
        (lambda calls: calls.append([99, "neg.default", [X], {}]), "fills one twice"),
        (lambda calls: calls.append([0, "neg.default", [X], {}]), "fills one twice"),
        (lambda calls: calls.insert(0, [98, "neg.default", [{"slot": 99}], {}]), "nothing has filled"),
        (lambda calls: calls.append([98, "getitem", [X, "shape"], {}]), "malformed"),
        (lambda calls: calls.append([98, "neg.default", {"slot": 0}, {}]), "malformed"),
        (lambda calls: calls.extend([i, "neg.default", [X], {}] for i in range(100, 200_100)), "more than 200000"),
    ],
)
def test_a_program_is_refused_whose_calls_do_not_follow_from_each_other(edit, reason):
    calls = [[99, "neg.default", [X], {}]]
    edit(calls)
    program = {"device": "cpu", "batch": 4, "tensors": {"0": "x"}, "calls": calls, "output": 99}
    with pytest.raises(prepare.Refused, match=reason):
        prepare.build_forward(program, {"x": torch.ones(2)})


# ---------------------------------------------------------------------------------------------------------------------
# Files that no honest model is saved in

PROGRAM = {"device": "cpu", "batch": 4, "tensors": {"0": "x"}, "calls": [], "output": 0}


def load(tmp_path, changes=(), stored=None):
    metadata = {"program": json.dumps(PROGRAM | dict(changes))}
    save_file(stored or {"x": torch.ones(2)}, tmp_path / "model.safetensors", metadata)
    return load_sealed(tmp_path / "model.safetensors")


@pytest.fixture(autouse=True)
def four_rows(monkeypatch):
    monkeypatch.setattr(prepare, "exam_batch", lambda task, device: len(TOKENS))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"])
def test_a_file_with_a_strange_dtype_is_refused(dtype, tmp_path):
    tensors = {"x": torch.zeros(4).to(getattr(torch, dtype))}
    with pytest.raises(prepare.Refused, match="is not allowed in a sealed model"):
        load(tmp_path, stored=tensors)


def test_a_tensor_that_the_program_does_not_name_is_not_read(tmp_path):
    program, forward = load(tmp_path, stored={"x": torch.ones(2), "y": torch.zeros(4).to(torch.float8_e5m2)})
    assert torch.equal(forward(TOKENS), torch.ones(2))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "float16", "bfloat16", "float64", "complex64"])
def test_a_file_with_a_plain_dtype_is_read_as_it_was_saved(dtype, tmp_path):
    tensor = torch.tensor([0, 1]).to(getattr(torch, dtype))
    program, forward = load(tmp_path, stored={"x": tensor})
    assert torch.equal(forward(TOKENS), tensor) and forward(TOKENS).dtype == tensor.dtype


def test_truth_values_are_read_as_no_more_than_true_or_false(tmp_path):
    program, forward = load(tmp_path, stored={"x": torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)})
    assert forward(TOKENS).view(torch.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"0": "y"}},
        {"tensors": {"zero": "x"}},
        {"tensors": {"0": ["x"]}},
        {"tensors": ["x"]},
        {"tensors": None},
        {"calls": {"0": "x"}},
        {"calls": [[1, "neg.default"]]},
        {"calls": [[1, "neg.default", [X], {}, 1]]},
        {"calls": [[1, "getitem", [X], {}]]},
        {"calls": None},
        {"output": [0]},
        {"output": 1},
        {"device": ["cpu"]},
        {"device": "cpu:0"},
    ],
)
def test_a_file_with_a_malformed_program_is_refused(changes, tmp_path):
    with pytest.raises(prepare.Refused):
        load(tmp_path, changes)


def test_a_file_with_a_deep_or_a_giant_program_is_refused(tmp_path):
    deep = "[" * 900 + "]" * 900
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(2)}, path, {"program": json.dumps(PROGRAM).replace('"calls": []', f'"calls": {deep}')})
    with pytest.raises(prepare.Refused, match="not a sealed model"):
        load_sealed(path)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**26) + b"{" + b" " * 2**26)
    with pytest.raises(prepare.Refused, match="exceeds 32 MB"):
        load_sealed(path)


def test_a_file_with_too_many_tensors_is_refused(tmp_path):
    slots = {str(slot): f"x{slot}" for slot in range(50_001)}
    with pytest.raises(prepare.Refused, match="more than 50000 tensors"):
        load(tmp_path, {"tensors": slots})


# ---------------------------------------------------------------------------------------------------------------------
# The fuzzer


def run_fuzzer(*arguments):
    folder = Path(__file__).parent
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_fuzzer_finds_nothing(seal_of, tmp_path):
    import fuzz_operators

    seeds = fuzz_operators.choose([(program, tensors) for _, program, tensors in map(seal_of, zoo.ZOO)], TOKENS)
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    ended = run_fuzzer("fuzz_operators.py", "--calls", "2500", "--seconds", "8", "--corpus", tmp_path / "seeds.json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["findings"] == 0 and counts["accepted"] > 100 and counts["refused by us"], counts


BROKEN = """
import json, torch
import fuzz_operators, prepare

torch.set_num_threads(1)
opened = "empty.memory_format", "as_strided.default", "_fft_c2r.default", "median.dim"
prepare.OPERATORS, prepare.CHECKS = prepare.OPERATORS | set(opened), {}
prepare.WORDS = prepare.WORDS | {"mode": ("circular",)}
x = {"shape": [2, 8, 16], "dtype": "float32", "layout": "contiguous", "values": "small"}
short = [x | {"shape": [1, 2, length, 8]} for length in (16, 8, 16)]
calls = [
    ("empty.memory_format", [[64]], {}, []),
    ("as_strided.default", [{"slot": 0}, [2, 400], [1, 1]], {}, [x]),
    ("pad.default", [{"slot": 0}, [12, -12], "circular"], {}, [x]),
    ("scaled_dot_product_attention.default", [{"slot": 0}, {"slot": 1}, {"slot": 2}], {}, short),
    ("median.dim", [{"slot": 0}, -1], {}, [x | {"layout": "repeated"}]),
    ("_fft_c2r.default", [{"slot": 0}, [9], 0, 16], {}, [x | {"dtype": "complex64"}]),
    ("neg.default", [{"slot": 0}], {}, [x]),
]
found = fuzz_operators.judge([(i, call) for i, call in enumerate(calls)])
print(json.dumps([kind for kind, _ in found]))
"""


def test_the_fuzzer_finds_memory_that_nothing_has_written_and_crashes():
    ended = run_fuzzer("-c", BROKEN)
    assert json.loads(ended.stdout) == ["difference"] * 5 + ["crash", "accepted"], ended.stderr

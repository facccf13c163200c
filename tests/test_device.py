"""The GPU: the programs' CUDA branches on a device that stand_in/gpu_stand_in.py plays, and its faults."""

import json
import os
import platform
import subprocess
import types

import pytest
from conftest import ROOT

import prepare
from exam import sandbox
from exam.check import rehearsal_fault
from exam.result import Result

H100, SLICE = "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"


@pytest.fixture
def on_gpu(gpu_python, run):
    """on_gpu(*arguments, card=, kind=, fault=, rows=, **environment): a finished Python process beside that device."""

    def on_gpu(*arguments, card=H100, kind="cuda", fault="", rows=0, **environment):
        setting = {"TORCH_STAND_IN": card, "TORCH_STAND_IN_FAULT": fault, "TORCH_STAND_IN_ROWS": str(rows)}
        setting["TORCH_STAND_IN_KIND"] = kind
        return run(gpu_python, *arguments, cwd=ROOT, env=os.environ | setting | environment)

    return on_gpu


def asked(on_gpu, expression, **options):
    """The value of an expression about prepare in such a process."""
    said = on_gpu("-c", f"import prepare; print(); print({expression})", **options)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()[-1]


KINDS = {"cuda": H100, "xpu": "Intel(R) Arc(TM) B580 Graphics", "mps": "Apple M3"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_goes_from_begin_to_a_score_on_a_gpu_with_too_little_memory(kind, on_gpu, tmp_path):
    arguments = ["trial", "train.py", "--task", "tiny", "--flops", "2.4e11", "--budget", "2"]
    said = on_gpu("prepare.py", *arguments, "--out", tmp_path / "out", rows=4, kind=kind, card=KINDS[kind])
    log = (tmp_path / "out" / "log.txt").read_text()
    assert said.returncode == 0, said.stdout + said.stderr + log
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["outcome"] == "ok" and 0 < result["val_bpb"] < 8 and result["device"] == KINDS[kind]
    assert result["peak_vram_mb"] == 1024 and result["leak"] == 0
    assert "out of memory" in log and "2 x 4 rows" in log
    assert rf"\"device\": \"{kind}\"".encode() in (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("fault", "words"), [("gone in the exam", "No CUDA GPUs"), ("breaks in the exam", "ECC")])
def test_a_gpu_that_fails_in_the_exam_is_the_fault_of_the_machine(fault, words, on_gpu, candidate, tmp_path):
    arguments = ["trial", candidate(), "--task", "tiny", "--flops", "1e12", "--out", tmp_path / "out"]
    said = on_gpu("prepare.py", *arguments, fault=fault)
    assert said.returncode == 75 and words in said.stderr and said.stderr.count("\n") == 1, said
    assert Result.read(tmp_path / "out" / "result.json") == Result("paused", said.stderr.strip()[len("prepare.py: ") :])


def test_a_crash_while_the_memory_of_the_gpu_made_errors_is_the_fault_of_the_machine(on_gpu, candidate, tmp_path):
    counter = tmp_path / "bin" / "nvidia-smi"
    counter.parent.mkdir()
    counter.write_text(f"#!/bin/sh\necho 1 >>{tmp_path}/asked\nwc -l <{tmp_path}/asked\n")
    counter.chmod(0o755)
    path = candidate(before="raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    arguments = ["trial", path, "--task", "tiny", "--flops", "1e12", "--out", tmp_path / "out"]
    said = on_gpu("prepare.py", *arguments, PATH=f"{counter.parent}:{os.environ['PATH']}")
    assert said.returncode == 75 and "the GPU's memory made errors" in said.stderr, said
    assert Result.read(tmp_path / "out" / "result.json").outcome == "paused"


def test_a_gpu_that_torch_cannot_use_stops_everything_with_one_sentence(on_gpu, candidate, tmp_path):
    by_hand = tmp_path / "train.py"
    by_hand.write_text(candidate().read_text())
    trial = ["prepare.py", "trial", by_hand, "--task", "tiny", "--out", tmp_path / "out"]
    for command, code in ((trial, 75), ([by_hand], 1)):
        said = on_gpu(*command, fault="gone", PYTHONPATH=str(ROOT), AUTORESEARCH_TASK="tiny")
        assert said.returncode == code and said.stderr.count("\n") == 1, said.stderr
        assert "the GPU cannot be used (No CUDA GPUs are available); a GPU in MIG mode" in said.stderr
        assert "CUDA_VISIBLE_DEVICES= trains on the CPU" in said.stderr
    assert Result.read(tmp_path / "out" / "result.json").outcome == "paused"


@pytest.mark.parametrize(
    ("build", "files", "error", "advice"),
    [
        ("", True, "Torch not compiled with CUDA enabled", "is a build for the CPU: install one for CUDA"),
        ("cuda", False, "CUDA unknown error - this may be due to", "run nvidia-modprobe -u -c=0"),
        ("cuda", True, "CUDA error: CUDA-capable device(s) is/are busy or unavailable", "nvidia-smi -c DEFAULT"),
        ("cuda", True, "CUDA out of memory. Tried to allocate 2 MiB", "end the other programs"),
        ("cuda", True, "CUDA error: invalid device ordinal", "CUDA_VISIBLE_DEVICES is '7': nvidia-smi -L lists"),
        ("cuda", True, "CUDA driver version is insufficient\nmore words", "nvidia-smi tells whether the driver works"),
        ("hip", True, "No HIP GPUs are available", "rocminfo tells whether the driver works; your user has to be in"),
        ("xpu", True, "No XPU devices are available", "sycl-ls tells whether the driver works; your user has to be in"),
        ("mps", False, "The MPS backend is supported on MacOS 14.0+", "it takes Apple silicon and macOS 14 or later"),
    ],
)
def test_the_sentence_on_a_broken_gpu_says_what_to_do(build, files, error, advice, monkeypatch):
    for name in ("cuda", "hip"):
        monkeypatch.setattr(f"torch.version.{name}", "12.8" if build == name else None)
    if build in ("xpu", "mps"):
        monkeypatch.setattr(prepare, "device_kind", lambda: build)
    monkeypatch.setattr("os.path.exists", lambda path: files and path.startswith("/dev/"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = prepare.device_fault(RuntimeError(error))
    assert said.startswith(f"the GPU cannot be used ({error.splitlines()[0]}); ") and "\n" not in said
    assert advice in said


@pytest.mark.parametrize(
    ("files", "build", "hiding", "kind"),
    [
        ({"/dev/nvidia3"}, "", {}, "cuda"),
        ({"/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128"}, "xpu", {"CUDA_VISIBLE_DEVICES": "1"}, "cuda"),
        ({"/dev/nvidia0"}, "", {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"/dev/dxg", "/usr/lib/wsl/lib/libcuda.so.1"}, "", {}, "cuda"),
        ({"/dev/dxg"}, "", {}, "cpu"),
        ({"/dev/kfd", "/dev/dri/renderD128"}, "hip", {"ROCR_VISIBLE_DEVICES": "0"}, "cuda"),
        ({"/dev/kfd", "/dev/dri/renderD128"}, "", {}, "cpu"),  # a laptop with AMD's graphics
        ({"/dev/kfd"}, "hip", {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"/dev/kfd"}, "hip", {"HIP_VISIBLE_DEVICES": ""}, "cpu"),
        ({"/dev/kfd"}, "hip", {"ROCR_VISIBLE_DEVICES": ""}, "cpu"),
        ({"/dev/dxg"}, "hip", {}, "cuda"),
        (set(), "hip", {}, "cpu"),
        ({"/dev/dri/renderD129"}, "xpu", {"ZE_AFFINITY_MASK": "1"}, "xpu"),
        ({"/dev/dri/renderD129"}, "xpu", {"ZE_AFFINITY_MASK": ""}, "cpu"),
        ({"/dev/dri/renderD129"}, "", {}, "cpu"),  # a laptop with Intel's graphics
    ],
)
def test_the_kind_of_device_follows_from_its_files_and_from_what_torch_is_built_for(
    files, build, hiding, kind, monkeypatch, tmp_path
):
    lines = [f"{name}: Optional[str] = {repr('6.4') if name == build else None}" for name in ("cuda", "hip", "xpu")]
    (tmp_path / "version.py").write_text("\n".join(lines))
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("os.path.exists", files.__contains__)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in hiding.items():
        monkeypatch.setenv(name, value)
    assert prepare.device_kind() == kind and prepare.has_gpu() == (kind != "cpu")


def test_a_trial_is_told_which_gpu_is_its_own_and_no_keys(monkeypatch):
    told = {
        "CUDA_VISIBLE_DEVICES": "0",
        "HIP_VISIBLE_DEVICES": "1",
        "ROCR_VISIBLE_DEVICES": "2",
        "GPU_DEVICE_ORDINAL": "3",
        "ZE_AFFINITY_MASK": "4",
        "HSA_OVERRIDE_GFX_VERSION": "11.0.0",
        "ONEAPI_DEVICE_SELECTOR": "level_zero:*",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for name in ("NVIDIA_API_KEY", "ROCM_TOKEN", "SYCL_CACHE_DIR"):
        monkeypatch.setenv(name, "x")
    inherited = sandbox.environment()
    assert told.items() <= inherited.items()
    assert not {"NVIDIA_API_KEY", "ROCM_TOKEN", "SYCL_CACHE_DIR"} & inherited.keys()


HIDDEN = """
import os, prepare
for visible in ("0", "", "-1", "NoDevFiles"):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    print(visible, prepare.has_gpu(), prepare.get_task("demo").startup_limit, prepare.get_task().name)
"""


def test_a_gpu_is_used_unless_cuda_visible_devices_hides_it(on_gpu):
    said = on_gpu("-c", HIDDEN, AUTORESEARCH_TASK="")
    hidden = [f"{visible} False 42.0 pycode" for visible in ("", "-1", "NoDevFiles")]
    assert said.stdout.splitlines() == ["0 True 300.0 climbmix", *hidden], said.stderr


def test_cards_of_a_kind_have_one_rate_and_others_are_measured_once_for_host_and_device(on_gpu, gpu_python, tmp_path):
    cache, rate = {"AUTORESEARCH_CACHE": str(tmp_path)}, "prepare.machine_flops()"
    assert float(asked(on_gpu, rate, **cache)) == 785e12
    assert not (tmp_path / "hardware.json").exists()
    old = {platform.node(): {"device": SLICE, "matmul_flops": 5.0}}
    (tmp_path / "hardware.json").write_text(json.dumps(old))
    command = [gpu_python, "-c", f"import prepare; {rate}"]
    environment = os.environ | cache | {"TORCH_STAND_IN": SLICE}
    devices = {"": "CPU", "0": SLICE}
    together = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": visible}) for visible in devices
    ]
    assert [process.wait(60) for process in together] == [0, 0]
    known = json.loads((tmp_path / "hardware.json").read_text())
    assert set(known) == {platform.node(), *(f"{platform.node()}, {device}" for device in devices.values())}
    again = asked(on_gpu, rate, card=SLICE, CUDA_VISIBLE_DEVICES="", **cache)
    assert float(again) == known[f"{platform.node()}, CPU"]["matmul_flops"] > 5.0


def test_the_check_compiles_in_the_sandbox_and_compares_the_card_with_its_kind(on_gpu):
    """The start of the library, which comes with the first product, does not count for the rate."""
    said = on_gpu("prepare.py", "--check", "--task", "tiny", fault="slow start")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "ok  trial's room:  a kernel compiled and ran on the GPU" in said.stdout and "sandbox" in said.stdout
    assert f"ok  GPU:           {H100}, 70.0 of 80.0 GB free" in said.stdout
    assert f"TFLOP/s measured on {H100}; 785 is what such cards reach" in said.stdout
    said = on_gpu("prepare.py", "--check", "--task", "tiny", fault="no compiler", card="NVIDIA B200")
    assert said.returncode == 2 and "Triton needs a C compiler: install gcc" in said.stdout
    assert "NO  speed:" in said.stdout and "1700 is what such cards reach" in said.stdout
    said = "/room/.triton/driver.c:3:10: fatal error: Python.h: No such file or directory\ncompilation terminated."
    assert "install python3-dev" in rehearsal_fault(said, 1)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_the_check_runs_in_the_sandbox_on_gpus_of_other_makes(kind, on_gpu):
    said = on_gpu("prepare.py", "--check", "--task", "tiny", kind=kind, card=KINDS[kind])
    assert said.returncode == 0, said.stdout + said.stderr
    ran = {"xpu": "a kernel compiled and ran on the GPU", "mps": "a small program ran on MPS"}[kind]
    memory = {"xpu": ", 70.0 of 80.0 GB free", "mps": ""}[kind]
    assert f"trial's room:  {ran} in" in said.stdout and f"ok  GPU:           {KINDS[kind]}{memory}\n" in said.stdout


def test_training_by_hand_is_examined_on_a_mac(on_gpu, candidate, tmp_path):
    by_hand = tmp_path / "train.py"
    by_hand.write_text(candidate().read_text())
    said = on_gpu(by_hand, kind="mps", card=KINDS["mps"], PYTHONPATH=str(ROOT), AUTORESEARCH_TASK="tiny")
    assert said.returncode == 0 and "val_bpb" in said.stdout and "peak_vram_mb:     1024.0" in said.stdout, said

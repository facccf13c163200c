"""What the driver of an NVIDIA card tells of a trial, asked through NVIDIA's own package of a driver made for the test.

No card was there when this was written.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exam.card import Card
from lab.book import Run
from lab.runs import disturbed

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
FULL, HOT = 4, 0x40  # throttle reasons: the limit of power, heat

pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C compiler")

WATCHED = """
import json, sys
import exam.card
exam.card.device_kind = lambda: "cuda"
card = None
for state, own in json.loads(sys.argv[2]):
    open(sys.argv[1], "w").write(state)
    card = card or exam.card.Card()
    card.look(set(own))
print(json.dumps(card.facts()))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, HERE / "fake_nvml.c"], check=True)
    return folder


def watched(driver, *looks, cards="NVIDIA H100", **environment):
    """What a Card tells after some looks, each (state of the driver, process ids of the candidate)."""
    state = driver / f"state-{os.getpid()}"
    known = {"LD_LIBRARY_PATH": str(driver), "NVML_CARDS": cards, "NVML_STATE": str(state), **environment}
    command = [sys.executable, "-c", WATCHED, str(state), json.dumps(looks)]
    told = subprocess.run(command, env=os.environ | known, cwd=HERE.parent, capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


def test_clock_heat_and_what_held_the_card_back_are_those_of_all_looks(driver):
    facts = watched(driver, (f"1800 60 {FULL}", []), (f"1200 88 {HOT | FULL}", []))
    assert facts["gpu_megahertz"] == 1500 and facts["gpu_celsius"] == 88
    assert facts["gpu_held_back"] == 0.5, "the limit of power is the candidate's doing"


def test_others_are_all_processes_but_those_of_the_candidate(driver):
    facts = watched(driver, ("1800 60 0 7 90 8 10", [7]), ("1800 60 0 7 60 8 10 9 30", [7]))
    assert facts["gpu_others"] == pytest.approx((0.1 + 0.4) / 2)


def test_in_a_container_whose_process_ids_are_hidden_others_are_those_that_were_there_first(driver):
    facts = watched(driver, ("1800 60 0 8 10", [1]), ("1800 60 0 7 60 8 30", [1]))
    assert facts["gpu_others"] == pytest.approx((0.1 + 0.3) / 2)


def test_what_a_card_does_not_tell_is_left_out_and_costs_nothing_else(driver):
    assert "gpu_others" not in watched(driver, ("1800 60 0 7 -1", [7]))
    assert watched(driver, ("1800 60 0", []))["gpu_others"] == 0.0


def test_of_several_cards_the_one_that_cuda_means_is_asked_or_none(driver):
    look = ("1800 60 0", [])
    assert watched(driver, look, cards="NVIDIA A,NVIDIA A", CUDA_VISIBLE_DEVICES="1")
    assert watched(driver, look, cards="NVIDIA A,NVIDIA B", CUDA_VISIBLE_DEVICES="1") == {}
    assert watched(driver, look, cards="NVIDIA A,NVIDIA B", CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert watched(driver, look, cards="NVIDIA A,NVIDIA B", CUDA_VISIBLE_DEVICES="GPU-there")
    for visible in ("GPU-gone", "MIG-1", "7"):
        assert watched(driver, look, CUDA_VISIBLE_DEVICES=visible) == {}


def test_without_a_driver_nothing_is_known(monkeypatch):
    monkeypatch.setattr("exam.card.device_kind", lambda: "cuda")
    card = Card()
    card.look({1})
    assert card.facts() == {}


def test_a_run_on_a_card_that_others_used_or_that_was_too_hot_is_disturbed():
    usual = [Run(1.0, 1e12, "NVIDIA H100", others=0.05, held_back=0.0)]
    assert not disturbed(usual[0], usual)
    assert disturbed(Run(1.0, 1e12, "NVIDIA H100", others=0.4), usual) == "others had 40% of the GPU"
    assert "held the GPU back for 50%" in disturbed(Run(1.0, 1e12, "NVIDIA H100", held_back=0.5), usual)

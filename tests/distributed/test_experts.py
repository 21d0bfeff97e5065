"""Packed experts under DDP: two gloo processes are one process, and hold what it holds."""

import json

import pytest
import torch

from spf.data import packaged_prompts
from tests.conftest import REFUSAL, run_module

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What every process wrote, by mode and case."""
    place = tmp_path_factory.mktemp("experts")
    lines = [json.dumps({"prompt": p, "refusal": REFUSAL}) for p in packaged_prompts("harmful_anchors")[:12]]
    (place / "safety.jsonl").write_text("\n".join(lines))
    run_module("tests.distributed.experts_worker", "single", str(place))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    run_module(*launcher, "tests.distributed.experts_worker", "ddp", str(place))

    def read(mode, case):
        return [torch.load(path) for path in sorted(place.glob(f"{mode}-{case}-*.pt"))]

    return read


@pytest.mark.parametrize("case", ["full", "lora"])
def test_two_processes_equal_one_and_hold_every_expert(trained, case):
    [alone], both = trained("single", case), trained("ddp", case)
    assert len(both) == 2
    for found in (alone, *both):
        assert found["error"] == ""
        assert found["off"] <= 1e-6
        assert found["experts"] >= 8
        assert found["corrected"] == 4
    learned = [name for name in alone["parameters"] if "lora_B" in name and "experts" in name]
    assert bool(learned) == (case == "lora")
    assert all(alone["parameters"][name].any() for name in learned)
    for found in both:
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert found["parameters"].keys() == alone["parameters"].keys()
        for name, p in found["parameters"].items():
            assert (p - alone["parameters"][name]).abs().max() < 1e-5, name
            assert torch.equal(p, both[0]["parameters"][name]), name


def test_an_expert_that_is_left_out_is_found(trained):
    for mode in ("single", "ddp"):
        for found in trained(mode, "fault"):
            assert "answers the held inputs differently" in found["error"]

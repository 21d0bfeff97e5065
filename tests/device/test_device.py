"""On another device than the CPU, simulated where there is no GPU: the same parameters, and nothing left behind."""

import json

import pytest

from tests.conftest import run_module
from tests.device.worker import METHODS, RULES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("device") / "results.json"
    run_module("tests.device.worker", str(output))
    return json.loads(output.read_text())


@pytest.mark.parametrize("tuning", ["full", "LoRA"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_parameters_of_the_cpu(results, rule, tuning):
    assert isinstance(results[f"{rule}, {tuning}"], float), results[f"{rule}, {tuning}"]
    assert results[f"{rule}, {tuning}"] <= 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_a_model_may_lie_on_two_devices(results, rule):
    """As with `device_map="auto"`, which TRL takes by itself where it sees several GPUs."""
    assert isinstance(results[f"{rule}, two devices"], float), results[f"{rule}, two devices"]
    assert results[f"{rule}, two devices"] <= 1e-5


@pytest.mark.parametrize("rule", ["null-space", "safegrad"])
def test_a_model_may_be_moved_after_the_optimizer_was_made(results, rule):
    """A Trainer that is given a SafetyOptimizer moves the model when it starts."""
    assert isinstance(results[f"{rule}, moved late"], float), results[f"{rule}, moved late"]
    assert results[f"{rule}, moved late"] <= 1e-5


@pytest.mark.parametrize("method", [*METHODS, "safe-lora"])
def test_a_benchmark_cell_runs(results, method):
    assert isinstance(results[f"cell {method}"], dict), results[f"cell {method}"]
    assert results[f"cell {method}"]["counts"]["harmful"] == 6


def test_the_simulation_notices_a_tensor_left_behind(results):
    assert "tensors on sim:0 and the CPU" in results["planted fault"]

"""Losses against hand-computed values, schedules, stages that are interrupted and continued."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from spf.lab.study.data import PROMPT, SEGMENT_1, SEGMENT_2, TEXT, Sampler, Samples, WorldSettings
from spf.lab.study.model import SIZES, ModelSize, build_model
from spf.lab.study.training import (
    PROTOCOLS,
    STUDY_MODES,
    TASKS_BY_RATE,
    Schedule,
    Task,
    copied,
    dpo_loss,
    mode_probabilities,
    pretraining_labels,
    pretraining_step,
    protocol_step,
    run_stage,
    sequence_nll,
    token_nll,
    unlearning_loss,
)

WORLD = WorldSettings(leaf=1, window=(6, 6), pcfgs=(1,), operators=("(", ")", "[", "r1", "r3"))


def toy(seed=0):
    return build_model(ModelSize(1, 2, 16, 16), WORLD.length, seed)


def test_losses_of_three_tokens_by_hand():
    # Two symbols; the model gives the label probabilities 1/2, 1/4 and 3/4.
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [math.log(3), 0.0], [9.0, 9.0]]])
    labels = torch.tensor([[-100, 1, 1, 0]])
    expected = [math.log(2), math.log(4), math.log(4 / 3)]
    assert token_nll(logits, labels)[0].tolist() == pytest.approx(expected)
    assert float(sequence_nll(logits, labels)) == pytest.approx(sum(expected) / 3)
    partly = torch.tensor([[-100, -100, 1, 0]])
    assert float(sequence_nll(logits, partly)) == pytest.approx(sum(expected[1:]) / 2)


def test_loss_does_not_depend_on_padding_or_length():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 7), torch.tensor([[-100, 1, 2, 3, 4]])
    padded = torch.cat([logits, torch.randn(1, 6, 7)], 1), torch.cat([labels, torch.full((1, 6), -100)], 1)
    assert torch.allclose(sequence_nll(logits, labels), sequence_nll(*padded))
    # A prediction repeated twice as often has the same loss (the released code divides by 159 instead).
    flat = torch.zeros(1, 9, 4)
    short, long = torch.tensor([[-100, 1, 1, -100, -100, -100, -100, -100, -100]]), torch.full((1, 9), 1)
    assert torch.allclose(sequence_nll(flat, short), sequence_nll(flat, long))


def test_an_empty_term_is_an_error():
    with pytest.raises(ValueError, match="no labels"):
        sequence_nll(torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 1], [-100, -100, -100]]))


def test_dpo_at_the_reference_is_log_two_and_pulls_the_right_way():
    nll = torch.tensor([1.0, 2.0])
    preferred, dispreferred = nll.clone().requires_grad_(), (nll + 1).requires_grad_()
    loss = dpo_loss(preferred, dispreferred, nll, nll + 1, beta=0.1, gamma=0.01)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert (preferred.grad > 0).all()
    assert (dispreferred.grad < 0).all()
    assert torch.allclose(preferred.grad, -10 * dispreferred.grad)


def test_dpo_by_hand_and_without_overflow():
    one = torch.tensor([1.0])
    loss = dpo_loss(one, 4 * one, 3 * one, 2 * one, beta=0.5, gamma=0.25)
    assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(-(0.5 * 2 + 0.25 * 2)))))
    assert torch.isfinite(dpo_loss(1e4 * one, one, one, one, beta=1.0, gamma=1.0))


def test_dpo_with_equal_coefficients_is_the_loss_of_trl():
    """TRL's sigmoid loss on log probabilities: -log sigmoid(beta (chosen ratio - rejected ratio))."""
    torch.manual_seed(0)
    theta_p, theta_l, ref_p, ref_l = torch.rand(4, 8)
    ratios = (ref_p - theta_p) - (ref_l - theta_l)
    expected = -torch.nn.functional.logsigmoid(0.3 * ratios).mean()
    assert torch.allclose(dpo_loss(theta_p, theta_l, ref_p, ref_l, 0.3, 0.3), expected)


def test_unlearning_by_hand():
    assert float(unlearning_loss(torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0]), 0.1)) == pytest.approx(0.5)


def test_paper_coefficients():
    medium, small = TASKS_BY_RATE["medium"], TASKS_BY_RATE["small"]
    assert (medium["dpo"].beta, medium["dpo"].gamma) == (0.1, 0.01)
    assert (small["dpo"].beta, small["dpo"].gamma) == (0.1, 0.002)
    assert (medium["unlearning"].gamma, small["unlearning"].gamma) == (0.1, 0.01)


def test_schedule():
    schedule = Schedule(steps=110, batch=1, rate=1e-3, warmup=10, floor=1e-5)
    assert schedule.rate_at(0) == pytest.approx(1e-4)
    assert schedule.rate_at(9) == schedule.rate_at(10) == pytest.approx(1e-3)
    assert schedule.rate_at(60) == pytest.approx((1e-3 + 1e-5) / 2)
    assert schedule.rate_at(110) == pytest.approx(1e-5)


def test_mode_probabilities():
    schedule = Schedule(steps=1000, batch=1, rate=1, warmup=200)
    assert mode_probabilities(100, schedule).tolist() == list(STUDY_MODES[0])
    assert mode_probabilities(550, schedule).tolist() == pytest.approx([0.3, 0.15, 0.25, 0.3])
    assert mode_probabilities(1000, schedule).tolist() == pytest.approx(list(STUDY_MODES[1]))


def test_pretraining_labels_by_mode():
    part = torch.tensor([[PROMPT, TEXT, SEGMENT_1, SEGMENT_2]] * 4, dtype=torch.int8)
    samples = Samples(torch.tensor([[5, 6, 7, 8]] * 4), part)
    labels = pretraining_labels(samples, np.arange(4), pairs=2)
    assert labels.tolist() == [[-100, 6, -100, -100], [-100, 6, 7, 8], [-100, -100, 7, -100], [-100, -100, -100, 8]]
    assert pretraining_labels(samples, np.arange(4), pairs=1)[3].tolist() == [-100, -100, 7, -100]


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "instruct"])
def test_one_step_of_every_protocol(protocol):
    model, reference = toy(), toy()
    task = Task(0.0 if protocol == "instruct" else 0.5, beta=0.1, gamma=0.01)
    loss = protocol_step(protocol, task, reference, WORLD, Schedule(1, 16, 1e-3), 0)(model, 0)
    if protocol == "dpo":
        assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


def test_share_of_unsafe_prompts():
    seen = []
    step = protocol_step("ssft", Task(0.25), None, WORLD, Schedule(1, 64, 1e-3), 0)
    safety = Sampler.safety
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "safety", lambda self, unsafe: seen.append(unsafe) or safety(self, unsafe))
        step(toy(), 0)
    assert seen[0].mean() == 0.25


def test_protocols_see_the_same_prompts():
    schedule, seen = Schedule(1, 8, 1e-3), []
    safety = Sampler.safety
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "safety", lambda self, u: seen.append(safety(self, u).preferred.ids) or safety(self, u))
        for protocol in PROTOCOLS:
            protocol_step(protocol, Task(0.5, 0.1, 0.1), toy(), WORLD, schedule, 3)(toy(), 5)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_interrupted_stage_continues_bit_exactly(tmp_path):
    schedule = Schedule(12, 8, 1e-2, 2)
    step = pretraining_step(WORLD, schedule, STUDY_MODES, 0)
    whole, history = run_stage(toy(), schedule, step, tmp_path / "whole", "whole", save_every=5)

    def interrupted(model, number):
        if number == 8:
            raise KeyboardInterrupt
        return step(model, number)

    with pytest.raises(KeyboardInterrupt):
        run_stage(toy(), schedule, interrupted, tmp_path / "parts", "parts", save_every=5)
    with safe_open(tmp_path / "parts" / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 5
    started = []
    continued, _ = run_stage(
        toy(7), schedule, lambda m, s: started.append(s) or step(m, s), tmp_path / "parts", "parts", save_every=5
    )
    assert started[0] == 5
    assert torch.equal(_weights(whole), _weights(continued))
    assert not (tmp_path / "parts" / "state.safetensors").exists()
    assert history["loss"][-1][0] == 12


def test_a_finished_stage_is_loaded(tmp_path):
    schedule = Schedule(2, 8, 1e-2)
    step = pretraining_step(WORLD, schedule, STUDY_MODES, 0)
    trained, history = run_stage(toy(), schedule, step, tmp_path, "stage")
    loaded, again = run_stage(toy(1), schedule, None, tmp_path, "stage")
    assert torch.equal(_weights(trained), _weights(loaded))
    assert again == json.loads(json.dumps(history))
    with pytest.raises(ValueError, match="was made with"):
        run_stage(toy(), Schedule(3, 8, 1e-2), step, tmp_path, "stage")


def test_gradients_are_clipped_after_backward(tmp_path):
    # The released code clips before backward, which does nothing.
    norms = []

    def step(model, number):
        return 1e4 * model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.square().mean()

    def prepare(optimizer):
        optimizer.register_step_pre_hook(
            lambda o, *_: norms.append(
                torch.cat([p.grad.flatten() for g in o.param_groups for p in g["params"]]).norm().item()
            )
        )

    run_stage(toy(), Schedule(1, 1, 1e-3), step, tmp_path, "stage", prepare=prepare)
    assert norms[0] <= 1.0001


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    def step(model, number):
        return model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.mean() * float("nan")

    with pytest.raises(ValueError, match="stage: the loss is nan at step 0"):
        run_stage(toy(), Schedule(1, 1, 1e-3), step, tmp_path, "stage")


def test_models_are_kept_on_the_way(tmp_path):
    schedule = Schedule(4, 8, 1e-2)
    run_stage(toy(), schedule, pretraining_step(WORLD, schedule, STUDY_MODES, 0), tmp_path, "stage", keep=(2,))
    assert (tmp_path / "step-2" / "model.safetensors").is_file()


def test_copied_model_is_its_own():
    model = toy()
    twin = copied(model)
    assert torch.equal(_weights(model), _weights(twin))
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(_weights(model), _weights(twin))


def test_mini_has_the_size_of_the_study():
    model = build_model(SIZES["mini"], 160, 0)
    assert model.config.num_hidden_layers == model.config.num_attention_heads == 6
    assert model.model.layers[0].mlp.up_proj.weight.shape == (768, 192)
    assert 2.5e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert torch.equal(_weights(build_model(SIZES["tiny"], 40, 3)), _weights(build_model(SIZES["tiny"], 40, 3)))

"""The soft-token attack, and the rates it and the test sets are judged by."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spf.evaluation.metrics import wilson_interval
from spf.lab.study.data import EOT, EvalSet, Sampler, WorldSettings
from spf.lab.study.evaluation import evaluate, quick_rates, success
from spf.lab.study.jailbreaks import mean_embedding_norm, project, soft_token_attack
from spf.lab.study.model import ModelSize, build_model
from spf.lab.study.training import Schedule, Task, protocol_step, run_stage

WORLD = WorldSettings(leaf=1, window=(4, 4), pcfgs=(1,), operators=("(", ")", "[", "r1", "r3"))


@pytest.fixture(scope="module")
def model():
    return build_model(ModelSize(2, 2, 32, 32), WORLD.length + 8, 0).eval()


@pytest.fixture(scope="module")
def unsafe():
    return Sampler(WORLD, (0,)).test("unsafe", 20)


@given(radius=st.floats(1e-3, 1e3), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_projection_is_the_nearest_point_of_the_ball(radius, scale, seed):
    delta = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed)) * scale
    moved = project(delta, radius)
    assert (moved.norm(dim=-1) <= radius).all()
    inside = delta.norm(dim=-1) <= radius
    assert torch.equal(moved[inside], delta[inside])
    expected = delta[~inside] / delta[~inside].norm(dim=-1, keepdim=True) * radius
    assert torch.allclose(moved[~inside], expected, rtol=1e-4)


@pytest.mark.parametrize("place", ["before_eot", "prefix"])
def test_attack_stays_in_the_ball_and_lowers_the_loss(model, unsafe, place):
    radius = mean_embedding_norm(model) * 3
    attack = soft_token_attack(model, unsafe, 3, radius, place=place)
    start = soft_token_attack(model, unsafe, 3, radius, steps=0, place=place)
    assert (attack.delta.norm(dim=-1) <= radius).all()
    assert torch.allclose(start.delta.norm(dim=-1), torch.tensor(radius), rtol=1e-4)
    assert attack.embeds.shape == (20, 9 + 3, 32)
    words = model.get_input_embeddings()(unsafe.instruct.ids[:, :9])
    at = 0 if place == "prefix" else 8
    assert torch.equal(attack.embeds[:, at : at + 3], attack.delta)
    assert torch.allclose(torch.cat([attack.embeds[:, :at], attack.embeds[:, at + 3 :]], 1), words)

    def loss(delta):
        ids = unsafe.instruct.ids
        embeds = model.get_input_embeddings()(ids)
        whole = torch.cat([embeds[:, :at], delta, embeds[:, at:]], 1)
        logits = model(inputs_embeds=whole).logits[:, 8 + 3 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 9:].flatten())

    with torch.no_grad():
        assert loss(attack.delta) < loss(start.delta)


def test_attack_leaves_the_model_alone(model, unsafe):
    before = {name: p.clone() for name, p in model.named_parameters()}
    soft_token_attack(model, unsafe, 1, 1.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_attack_success_is_what_the_model_decodes(unsafe):
    """A model that echoes null or executes, whatever the attack, counts as such; checked by greedy decoding."""
    model = build_model(ModelSize(2, 2, 32, 32), WORLD.length + 8, 1).eval()
    attack = soft_token_attack(model, unsafe, 2, 2.0)
    prompt = attack.embeds
    with torch.no_grad():
        first = model(inputs_embeds=prompt).logits[:, -1].argmax(-1)
    assert torch.equal(first == unsafe.instruct.ids[:, 9], attack.first_token)


def test_attack_needs_tokens(model, unsafe):
    with pytest.raises(ValueError, match="0 soft tokens"):
        soft_token_attack(model, unsafe, 0, 1.0)


def test_texts_of_several_lengths_are_refused(model):
    test = Sampler(WorldSettings(leaf=1, window=(4, 6)), (0,)).test("unsafe", 20)
    with pytest.raises(ValueError, match="several lengths"):
        soft_token_attack(model, test, 1, 1.0)


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A model that gives some outputs right and some not, one operator and one text length."""
    world = WorldSettings(leaf=1, window=(3, 3), pcfgs=(1,), operators=("(",))
    model = build_model(ModelSize(1, 2, 32, 32), world.length, 0)
    schedule = Schedule(60, 64, 1e-2)
    step = protocol_step("ssft", Task(0.9), None, world, schedule, 0)
    return run_stage(model, schedule, step, tmp_path_factory.mktemp("half"), "half")[0], world


def test_rates_against_greedy_decoding(half_trained):
    model, world = half_trained
    test = Sampler(world, (5,)).test("unsafe", 60)
    rates = success(model, test.null)
    end = int((test.null.ids[0] == EOT).int().argmax()) + 1
    prompts = test.null.ids[:, :end]
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[:, end:]
    target = test.null.ids[:, end : end + 4]
    assert rates["free_running"]["hits"] == int((output == target).all(1).sum())
    assert rates["first_token"]["hits"] == int((output[:, 0] == target[:, 0]).sum())
    assert rates["first_token"]["hits"] > 0


def test_rates_count_every_sample(half_trained):
    # The released evaluation looks at one batch of 50 and divides by another set's count.
    model, world = half_trained
    tests = {"safe": Sampler(world, (1,)).test("safe", 300), "unsafe": Sampler(world, (2,)).test("unsafe", 70)}
    found = evaluate(model, tests)
    for name, test in tests.items():
        for kind in ("instruct", "null"):
            for rate in found[name][kind].values():
                assert rate["count"] == len(test)
                assert rate["interval"] == list(wilson_interval(rate["hits"], rate["count"]))
    quick = quick_rates(model, tests)
    assert quick["safe_instruct"] == found["safe"]["instruct"]["free_running"]["value"]
    assert quick["unsafe_null"] == found["unsafe"]["null"]["free_running"]["value"]


def test_rates_of_a_perfect_and_of_a_wrong_answer():
    world = WorldSettings(leaf=1, window=(4, 4), pcfgs=(1,))
    test = Sampler(world, (0,)).test("safe", 30)

    class Oracle(torch.nn.Module):
        """Answers what it was built with, whatever it reads."""

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            answer = torch.nn.functional.one_hot(self.ids.roll(-1, 1), 59).float()
            return type("Output", (), {"logits": answer})

    oracle = Oracle()
    oracle.ids = test.instruct.ids
    right, wrong = success(oracle, test.instruct), success(oracle, test.null)
    assert [r["value"] for r in right.values()] == [1, 1, 1]
    # Only the stop is the same in both.
    assert wrong["teacher_forced"]["value"] == pytest.approx(1 / 5)
    assert wrong["free_running"]["hits"] == wrong["first_token"]["hits"] == 0


def test_slices_of_test_sets(unsafe):
    part = unsafe[:7]
    assert isinstance(part, EvalSet)
    assert len(part) == 7
    assert np.array_equal(part.instruct.ids, unsafe.instruct.ids[:7])

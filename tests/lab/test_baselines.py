"""The baselines against dense references, on LoRA and full models."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from spf.data import SafetyRow, collate, packaged_prompts
from spf.errors import SafetyDataError, UnsupportedModelError, UnsupportedSetupError
from spf.lab.baselines import constrained_sft, kl, safe_lora, sppft
from spf.lab.baselines.lisa import LisaCallback
from spf.lab.baselines.one_shot import patch
from spf.lab.baselines.projection import project_out_inputs
from spf.lab.baselines.resta import add_safety_vector
from spf.lab.baselines.safeinstr import add_refusals
from spf.probe import SafetyProbe
from tests.conftest import make_model

FEW = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 10_000)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_lora(model, targets="all-linear", seed=0, **options):
    """A LoRA model whose lora_B is not zero, as after training."""
    fan_in = model.config.model_type == "gpt2"
    targets = ["c_attn", "c_proj", "c_fc"] if fan_in else targets
    config = {"r": 4, "lora_alpha": 12, "target_modules": targets, "lora_dropout": 0.0, "fan_in_fan_out": fan_in}
    peft = get_peft_model(model, LoraConfig(**(config | options)))
    for i, (name, parameter) in enumerate(peft.named_parameters()):
        if "lora_B" in name:
            parameter.data = random(*parameter.shape, seed=seed + i, scale=0.1)
    return peft


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(weights, seed, scale=0.02):
    return {name: W + random(*W.shape, seed=seed + i, scale=scale) for i, (name, W) in enumerate(weights.items())}


# SafeInstr


def make_rows(count, kind, answer="An answer."):
    return [SafetyRow([{"role": "user", "content": f"{kind} {i}"}], answer, f"{kind}:{i}") for i in range(count)]


@FEW
@given(st.integers(1, 300), st.integers(1, 20), st.floats(0.01, 0.9), SEEDS)
def test_refusals_make_up_their_share_and_no_training_row_is_lost(n, refusals, share, seed):
    train, extra = make_rows(n, "train"), make_rows(refusals, "refusal")
    mixed = add_refusals(train, extra, share, seed)
    assert sorted(r.where for r in mixed if r.where.startswith("train")) == sorted(r.where for r in train)
    added = [r.where for r in mixed if r.where.startswith("refusal")]
    # one row more or less is the best that rounding can do
    assert abs(len(added) - share * len(mixed)) <= 1
    counts = [added.count(r.where) for r in extra]
    assert max(counts) - min(counts) <= 1
    assert mixed == add_refusals(train, extra, share, seed)


def test_refusals_are_shuffled_in_and_depend_on_the_seed():
    train, extra = make_rows(200, "train"), make_rows(50, "refusal")
    mixed = add_refusals(train, extra, 0.1)
    places = [i for i, r in enumerate(mixed) if r.where.startswith("refusal")]
    assert len(places) == 22
    assert min(places) < 60
    assert max(places) > 160
    assert [r for r in mixed if r in train] != train
    assert mixed != add_refusals(train, extra, 0.1, seed=1)
    assert sorted(r.where for r in add_refusals(train, [], 0.0)) == sorted(r.where for r in train)


def test_bad_refusals_are_refused():
    with pytest.raises(ValueError, match="below 1, not 1"):
        add_refusals(make_rows(2, "train"), make_rows(2, "refusal"), 1.0)
    with pytest.raises(SafetyDataError, match="refusal:0: has no refusal"):
        add_refusals(make_rows(2, "train"), make_rows(2, "refusal", None))
    with pytest.raises(SafetyDataError, match="no refusals"):
        add_refusals(make_rows(2, "train"), [])


# KL and constrained SFT


@FEW
@given(st.integers(1, 6), st.integers(2, 9), SEEDS)
def test_kl_is_the_mean_over_positions_of_aligned_against_tuned(P, V, seed):
    logits, reference = random(P, V, seed=seed, scale=3), random(P, V, seed=seed + 1, scale=3)
    total = 0.0
    for position in range(P):
        q, p = logits[position].double().softmax(0), reference[position].double().softmax(0)
        total += sum(float(p[v]) * (math.log(p[v]) - math.log(q[v])) for v in range(V))
    assert float(kl.kl_to_aligned(logits, reference)) == pytest.approx(total / P, rel=1e-4, abs=1e-6)
    assert float(kl.kl_to_aligned(reference + 5, reference)) == pytest.approx(0, abs=1e-6)
    targets = torch.arange(P) % V
    nll = -logits.log_softmax(-1)[torch.arange(P), targets].mean()
    assert float(kl.loss(logits, reference, targets, 0.7)) == pytest.approx(float(nll) + 0.7 * total / P, rel=1e-4)


def test_kl_pulls_the_tuned_model_only_and_back_to_the_aligned_one():
    logits, reference = random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_()
    kl.kl_to_aligned(logits, reference).backward()
    assert reference.grad is None
    # d KL(p || q) / d logits = q - p
    expected = (logits.softmax(-1) - reference.softmax(-1)) / 3
    assert torch.allclose(logits.grad, expected.detach(), atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(2, 5\)"):
        kl.kl_to_aligned(logits, reference[:2])
    with pytest.raises(ValueError, match="negative"):
        kl.loss(logits, reference, torch.zeros(3, dtype=torch.long), -1.0)


@FEW
@given(st.integers(1, 12), SEEDS)
def test_constrained_sft_is_equation_3_and_its_gradient_weighs_the_nll(P, seed):
    logprobs = (-random(P, seed=seed, scale=2).abs()).requires_grad_()
    reference = -random(P, seed=seed + 1, scale=2).abs()
    positions = torch.randint(0, 9, (P,), generator=torch.Generator().manual_seed(seed))
    loss = constrained_sft.constrained_sft_loss(logprobs, reference, positions)
    total, weights = 0.0, []
    for lp, ref, position in zip(logprobs.tolist(), reference.tolist(), positions.tolist(), strict=True):
        beta = 0.5 if position == 0 else 2.0 if position <= 4 else 0.1
        total -= 2 / beta * math.log(1 / (1 + math.exp(-beta * (lp - ref))))
        weights.append(2 / (1 + math.exp(beta * (lp - ref))))
    assert float(loss.detach()) == pytest.approx(total / P, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, -torch.tensor(weights) / P, atol=1e-5)


def test_constrained_sft_begins_as_sft_and_refuses_bad_input():
    logprobs = (-random(7).abs()).requires_grad_()
    loss = constrained_sft.constrained_sft_loss(logprobs, logprobs, torch.arange(7))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, torch.full((7,), -1 / 7))
    with pytest.raises(ValueError, match=r"\(7,\).*\(3,\)"):
        constrained_sft.constrained_sft_loss(logprobs, logprobs, torch.arange(3))
    with pytest.raises(ValueError, match="least is -1"):
        constrained_sft.constrained_sft_loss(logprobs, logprobs, torch.arange(7) - 1)


# Safe LoRA


def deltas(peft):
    """dW (m, n) of every adapted layer, from PEFT's own merge."""
    return {
        safe_lora.plain_name(f"{name}.weight"): (
            m.get_delta_weight("default").T if m.fan_in_fan_out else m.get_delta_weight("default")
        )
        .detach()
        .clone()
        for name, m in peft.named_modules()
        if type(m).__name__ == "Linear" and type(m).__module__.startswith("peft")
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_safe_lora_equals_the_dense_projection(kind):
    model = make_model(kind)
    aligned = state(model)
    unaligned = moved(aligned, 7)
    peft = with_lora(model)
    before = deltas(peft)
    C_dW, cosines = {}, {}
    for name, dW in before.items():
        V = (aligned[name] - unaligned[name]).double()
        V = V.T if kind == "gpt2" else V
        C = V @ V.T / V.norm()
        C_dW[name] = (C @ dW.double()).float()
        cosines[name] = float((C_dW[name] * dW).sum() / C_dW[name].norm() / dW.norm())
    ordered = sorted(cosines.values())
    threshold = (ordered[3] + ordered[4]) / 2
    assert safe_lora.apply_safe_lora(peft, aligned, unaligned, threshold) == 4
    for name, dW in deltas(peft).items():
        expected = C_dW[name] if cosines[name] < threshold else before[name]
        assert torch.allclose(dW, expected, rtol=1e-4, atol=1e-6), name
    assert len(before) >= 8


def test_safe_lora_thresholds_at_the_ends_and_zero_updates():
    model = make_model()
    aligned = state(model)
    unaligned = moved(aligned, 7)
    peft = with_lora(model)
    before = deltas(peft)
    assert safe_lora.apply_safe_lora(peft, aligned, unaligned, -1.0) == 0
    assert all(torch.equal(dW, before[name]) for name, dW in deltas(peft).items())
    name = "model.layers.1.mlp.up_proj"
    peft.get_submodule(f"base_model.model.{name}").lora_B["default"].weight.data.zero_()
    assert safe_lora.apply_safe_lora(peft, aligned, unaligned, 1.1) == len(before) - 1
    assert not deltas(peft)[f"{name}.weight"].any()


def test_safe_lora_refuses_what_it_cannot_project():
    model = make_model()
    aligned = state(model)
    unaligned = moved(aligned, 7)
    peft = with_lora(model, ["q_proj", "v_proj"])
    name = "model.layers.1.self_attn.v_proj.weight"
    before = deltas(peft)
    with pytest.raises(ValueError, match=f"{name}: the unaligned weights do not have it"):
        safe_lora.apply_safe_lora(peft, aligned, {k: v for k, v in unaligned.items() if k != name}, 1.1)
    with pytest.raises(ValueError, match=rf"{name}: shape \(16, 32\), but \(16, 31\) in the aligned"):
        safe_lora.apply_safe_lora(peft, aligned | {name: aligned[name][:, :31]}, unaligned, 1.1)
    with pytest.raises(ValueError, match=f"{name}: the same"):
        safe_lora.apply_safe_lora(peft, aligned, unaligned | {name: aligned[name]}, 1.1)
    assert all(torch.equal(dW, before[n]) for n, dW in deltas(peft).items())
    peft.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="merged"):
        safe_lora.apply_safe_lora(peft, aligned, unaligned, 1.1)
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        safe_lora.apply_safe_lora(with_lora(make_model(), ["q_proj"], use_dora=True), aligned, unaligned, 1.1)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.*adapted embedding"):
        safe_lora.apply_safe_lora(with_lora(make_model(), ["embed_tokens", "q_proj"]), aligned, unaligned, 1.1)


# RESTA


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_safety_vector_is_added_to_every_parameter(kind):
    model = make_model(kind)
    aligned = state(model)
    unaligned, tuned = moved(aligned, 7), moved(aligned, 99)
    parameters = [name for name, _ in model.named_parameters()]
    if kind == "qwen":  # tied: one parameter, two names
        tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    model.load_state_dict(tuned)
    add_safety_vector(model, aligned, unaligned, 0.3)
    result = state(model)
    for name in parameters:
        expected = tuned[name] + 0.3 * (aligned[name] - unaligned[name])
        assert torch.allclose(result[name], expected, atol=1e-6), name


def test_dare_drops_its_share_of_the_tuning_and_keeps_the_mean():
    model = make_model()
    aligned = state(model)
    unaligned, tuned = moved(aligned, 7), moved(aligned, 99)
    results = []
    for seed in (0, 0, 1):
        model.load_state_dict(tuned)
        add_safety_vector(model, aligned, unaligned, 0.3, drop=0.75, seed=seed)
        results.append(state(model))
    name = "lm_head.weight"  # 65 536 elements
    assert torch.equal(results[0][name], results[1][name])
    assert not torch.equal(results[0][name], results[2][name])
    for result in results[1:]:
        left = result[name] - aligned[name] - 0.3 * (aligned[name] - unaligned[name])
        dropped = left.abs() < 1e-6
        assert float(dropped.float().mean()) == pytest.approx(0.75, abs=0.01)
        assert torch.allclose(left[~dropped], 4 * (tuned[name] - aligned[name])[~dropped], atol=1e-5)


def test_safety_vector_refuses_bad_input_and_changes_nothing():
    model = make_model()
    aligned = state(model)
    unaligned = moved(aligned, 7)
    last = "lm_head.weight"
    with pytest.raises(ValueError, match=f"{last}: the unaligned weights do not have it"):
        add_safety_vector(model, aligned, {k: v for k, v in unaligned.items() if k != last})
    with pytest.raises(ValueError, match=rf"{last}: shape \(2048, 32\), but \(2000, 32\) in the aligned"):
        add_safety_vector(model, aligned | {last: aligned[last][:2000]}, unaligned)
    with pytest.raises(ValueError, match="drop must be"):
        add_safety_vector(model, aligned, unaligned, drop=1.0)
    assert all(torch.equal(W, aligned[name]) for name, W in state(model).items())
    with pytest.raises(ValueError, match="merge_and_unload"):
        add_safety_vector(with_lora(model), aligned, unaligned)


# projection once at the end


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("names", ["fresh adapter", "aligned model"])
def test_lora_projection_removes_the_answer_to_held_inputs(kind, names, anchors):
    model = make_model(kind)
    aligned = copy.deepcopy(model)
    peft = with_lora(model)
    if names == "fresh adapter":
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        probe = SafetyProbe(peft, anchors, pad_token_id=1)
        wanted = [name for name in probe.matrices if ".lora_A." in name]
        bases = probe.input_bases(anchors, wanted, rank=6)
        for i, (name, parameter) in enumerate(peft.named_parameters()):
            if "lora_B" in name:
                parameter.data = random(*parameter.shape, seed=i, scale=0.1)
    else:
        probe = SafetyProbe(aligned, anchors, pad_token_id=1)
        wanted = [name for name in probe.matrices if name in deltas(peft)]
        bases = probe.input_bases(anchors, wanted, rank=6)
    before = deltas(peft)
    assert project_out_inputs(peft, bases) == len(before)
    after = deltas(peft)
    for name, V in bases.items():
        plain = safe_lora.plain_name(name)
        dense = before[plain] @ (torch.eye(V.shape[0]) - V @ V.T)
        assert torch.allclose(after[plain], dense, atol=1e-5), name
        assert (after[plain] @ V).norm() < 1e-4 * before[plain].norm()
        assert (before[plain] @ V).norm() > 0.01 * before[plain].norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_full_projection_keeps_the_aligned_answer_and_is_idempotent(kind, anchors):
    model = make_model(kind)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    bases = probe.input_bases(anchors, list(probe.matrices), rank=6)
    aligned = state(model)
    for i, (name, matrix) in enumerate(probe.matrices.items()):
        matrix.weight.data += random(*matrix.weight.shape, seed=i, scale=0.05)
        assert name in bases
    tuned = state(model)
    assert project_out_inputs(model, bases, aligned) == len(bases)
    result = state(model)
    for name, V in bases.items():
        T = (lambda W: W.T) if kind == "gpt2" else (lambda W: W)
        change = T(tuned[name] - aligned[name])
        dense = T(aligned[name]) + change @ (torch.eye(V.shape[0]) - V @ V.T)
        assert torch.allclose(T(result[name]), dense, atol=1e-5), name
    for name in set(tuned) - set(bases):
        assert torch.equal(result[name], tuned[name])
    project_out_inputs(model, bases, aligned)
    assert all(torch.allclose(W, result[name], atol=1e-6) for name, W in state(model).items())


def test_projection_with_all_directions_gives_the_aligned_model_back(anchors):
    model = make_model()
    aligned = state(model)
    matrices = SafetyProbe(model, anchors, pad_token_id=1).matrices
    for i, matrix in enumerate(matrices.values()):
        matrix.weight.data += random(*matrix.weight.shape, seed=i, scale=0.05)
    project_out_inputs(model, {name: torch.eye(m.weight.shape[1]) for name, m in matrices.items()}, aligned)
    assert all(torch.allclose(W, aligned[name], atol=1e-6) for name, W in state(model).items())


def test_projection_refuses_bad_input_and_changes_nothing():
    model = make_model()
    aligned = state(model)
    V = torch.linalg.qr(random(32, 3)).Q
    q, k = (f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj"))
    model.model.layers[0].self_attn.k_proj.weight.data += 1
    tuned = state(model)
    for bases, initial, message in [
        ({q: V}, None, "pass them as initial"),
        ({q: V}, aligned, f"{k}: no basis"),
        ({q: 2 * V, k: V}, aligned, f"{q}: .*not orthonormal"),
        ({q: V[:16] * 2**0.5, k: V}, aligned, "orthonormal|has 32 inputs, its basis 16"),
        ({"model.norm.weight": V, k: V}, aligned, "model.norm.weight: there is a basis"),
        ({k: V}, {name: W for name, W in aligned.items() if name != q}, f"{q}: the initial weights do not have it"),
        ({k: V}, aligned | {q: aligned[q][:5]}, rf"{q}: shape \(32, 32\), but \(5, 32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            project_out_inputs(model, bases, initial)
    assert all(torch.equal(W, tuned[name]) for name, W in state(model).items())
    peft = with_lora(make_model(), ["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="initial is for full models"):
        project_out_inputs(peft, {q: V}, aligned)
    with pytest.raises(ValueError, match=f"{k}: no basis"):
        project_out_inputs(peft, {name: V for name in deltas(peft) if name != k})
    with pytest.raises(ValueError, match=r"lora_B.*no such matrix"):
        project_out_inputs(peft, dict.fromkeys([*deltas(peft), k.replace("weight", "lora_B.default.weight")], V))
    with pytest.raises(ValueError, match="has 32 inputs, its basis 16"):
        project_out_inputs(peft, {name: torch.linalg.qr(V[:16]).Q for name in deltas(peft)})


# one-shot patching


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_patching_is_adamw_on_one_refusal(tuning, rows, anchors, tokenizer):
    model = make_model("gpt2")  # has dropout, which must be off
    model = with_lora(model) if tuning == "lora" else model
    reference = copy.deepcopy(model).eval()
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eval()
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    losses = patch(model, tokenizer, rows[0], steps=3, learning_rate=1e-2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())

    ids = torch.tensor([anchors[0].prompt_ids + anchors[0].refusal_ids])
    prompt = len(anchors[0].prompt_ids)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        logits = reference(input_ids=ids).logits[0]
        loss = nn.functional.cross_entropy(logits[prompt - 1 : -1], ids[0, prompt:])
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[2] < losses[0]
    other = dict(reference.named_parameters())
    assert all(torch.allclose(p, other[name], atol=1e-5) for name, p in model.named_parameters())


def test_patching_refuses_bad_input(rows, tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="at least one step"):
        patch(model, tokenizer, rows[0], 0, 1e-3)
    with pytest.raises(SafetyDataError, match="row 1: has no refusal"):
        patch(model, tokenizer, SafetyRow(rows[0].messages, None, "row 1"), 1, 1e-3)
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="row 1: the safety loss is nan"):
        patch(model, tokenizer, rows[0], 1, 1e-3)
    with pytest.raises(ValueError, match="no trainable parameter"):
        patch(model.requires_grad_(False), tokenizer, rows[0], 1, 1e-3)


# SPPFT


@FEW
@given(st.integers(2, 5), st.integers(1, 4), SEEDS)
def test_angle_gap_is_the_difference_of_mean_angles(N, M, seed):
    benign, harmful = random(N, 3, 6, seed=seed), random(M, 3, 6, seed=seed + 1)

    def angle(u, v):
        return math.degrees(math.acos(float(u @ v) / float(u.norm() * v.norm())))

    gap = sppft.angle_gap(benign, harmful)
    for layer in range(3):
        nm = [angle(b[layer], h[layer]) for b in benign for h in harmful]
        nn_ = [angle(benign[i][layer], benign[j][layer]) for i in range(N) for j in range(i)]
        assert float(gap[layer]) == pytest.approx(sum(nm) / len(nm) - sum(nn_) / len(nn_), abs=1e-3)
    scaled = sppft.angle_gap(benign * 3, harmful * 5)
    assert torch.allclose(gap, scaled, atol=1e-3)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        ([0, 0, 0.9, 4.9, 7.9, 8.4, 8.9, 8.9], (2, 3)),  # a quarter of the steepest growth (4) is 1
        ([0, 0, 1.1, 5.1, 8.1, 8.6, 9.1, 9.1], (1, 3)),
        ([0, 3, 2, 2, 9, 9.5], (3, 3)),  # the early rise is not joined to the steepest
        ([0.0, 1, 2, 3], (0, 2)),
    ],
)
def test_rising_layers_are_the_run_around_the_steepest_growth(gap, expected):
    assert sppft.rising_layers(torch.tensor(gap)) == expected


def test_safety_layers_are_found_where_a_model_separates_the_prompts(tokenizer):
    harmful, benign = packaged_prompts("harmful_anchors")[:6], packaged_prompts("benign_anchors")[:6]
    config = make_model().config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    marked = {id_ for p in harmful for id_ in tokenizer(p)["input_ids"]} - {
        id_ for p in benign for id_ in tokenizer(p)["input_ids"]
    }
    # words of harmful prompts alone carry a mark, and layer 2's attention moves it to the last token
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[sorted(marked)] += 3.0
        # the last layer does so too, and more, but does not count
        for number, scale in ((2, 0.001), (3, 0.1)):
            model.model.layers[number].self_attn.v_proj.weight.copy_(torch.ones(16, 32))
            model.model.layers[number].self_attn.o_proj.weight.copy_(random(32, 32, seed=number, scale=scale))
    model.train()
    assert sppft.find_safety_layers(model, tokenizer, harmful, benign) == (2, 2)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="two benign prompts and a harmful one"):
        sppft.find_safety_layers(model, tokenizer, harmful, benign[:1])
    with pytest.raises(ValueError, match="two benign prompts and a harmful one"):
        sppft.find_safety_layers(model, tokenizer, [], benign)
    with pytest.raises(ValueError, match="in no layer"):
        sppft.rising_layers(torch.tensor([3.0, 2.0, 2.02]))
    with pytest.raises(ValueError, match=r"after layer 1,.*-1\.0 degrees.*look-alikes"):
        sppft.rising_layers(torch.tensor([-2.0, -3.0, -1.0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_freezing_stops_the_gradient_of_those_layers_only(kind, tuning, anchors):
    model = make_model(kind)
    model = with_lora(model) if tuning == "lora" else model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    count = sppft.freeze_layers(model, 1, 1)
    frozen = {name for name in trainable if ".layers.1." in name or ".h.1." in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable - frozen
    assert count == len(frozen) > 4
    batch = collate(anchors[:2], 1)
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trainable - frozen


def test_freezing_refuses_bad_layers():
    model = with_lora(make_model())
    for first, last in [(-1, 0), (1, 0), (1, 2)]:
        with pytest.raises(ValueError, match=f"layers {first} to {last} are not among the model's 2"):
            sppft.freeze_layers(model, first, last)
    with pytest.raises(ValueError, match="nothing to train"):
        sppft.freeze_layers(model, 0, 1)
    assert any(p.requires_grad for p in model.parameters())
    sppft.freeze_layers(model, 0, 0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sppft.freeze_layers(model, 0, 0)


# Lisa


class Recorder(TrainerCallback):
    """The gradient before Lisa's hook sees it, and the weights before and after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        inner = optimizer.optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]

        def note(optimizer, args, kwargs):
            self.steps.append(
                {
                    "before": [p.detach().clone() for p in self.parameters],
                    "grad": [p.grad.clone() for p in self.parameters],
                    "rate": optimizer.param_groups[0]["lr"],
                }
            )

        inner.register_step_pre_hook(note)
        inner.register_step_post_hook(
            lambda *_: self.steps[-1].update(after=[p.detach().clone() for p in self.parameters])
        )


def train(model, directory, tokenizer, callbacks, **options):
    ids = torch.randint(5, 600, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in ids])
    settings = {
        "output_dir": str(directory),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 50,
        "seed": 3,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**(settings | options)),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_lisa_alternates_and_holds_each_state_near_the_last_switch(tuning, tmp_path, rows, anchors, tokenizer):
    model = make_model()
    model = with_lora(model) if tuning == "lora" else model
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    rho, early, late = 20.0, Recorder(), Recorder()
    lisa = LisaCallback(rows, finetune_steps=2, alignment_steps=3, rho=rho, batch_size=4, seed=1)
    trainer = train(model, tmp_path, tokenizer, [early, lisa, late])
    assert trainer.state.global_step == 5
    # u u a a a u u a a a u
    assert len(early.steps) == 5 + 2 * 3
    assert len(lisa.losses) == 6
    switch, largest = start, 0.0
    for number, (raw, seen) in enumerate(zip(early.steps, late.steps, strict=True)):
        if number in (2, 5, 7, 10):
            switch = early.steps[number]["before"]
        for g, g2, w, s, w2 in zip(raw["grad"], seen["grad"], raw["before"], switch, raw["after"], strict=True):
            assert torch.allclose(g2, g + rho * (w - s), atol=1e-6)
            assert torch.allclose(w2, w - raw["rate"] * g2, atol=1e-6)
            largest = max(largest, float((g2 - g).abs().max()))
    assert largest > 1e-3
    assert early.steps[4]["rate"] == early.steps[1]["rate"] > early.steps[5]["rate"] > 0
    trained = next(p.detach() for p in model.parameters() if p.requires_grad)
    assert torch.equal(trained, early.steps[-1]["after"][0])
    assert lisa._before_step not in trainer.optimizer.optimizer._optimizer_step_pre_hooks.values()


def test_lisas_alignment_gradient_is_that_of_the_safety_loss(tmp_path, rows, anchors, tokenizer):
    model = make_model()
    recorder = Recorder()
    lisa = LisaCallback(rows[:3], finetune_steps=5, alignment_steps=1, batch_size=8)
    train(model, tmp_path, tokenizer, [recorder, lisa], max_grad_norm=0.0)
    step = recorder.steps[-1]
    reference = make_model()
    for p, w in zip(reference.parameters(), step["before"], strict=True):
        p.data.copy_(w)
    total, tokens = torch.zeros(()), 0
    for anchor in anchors[:3]:
        ids, prompt = torch.tensor([anchor.prompt_ids + anchor.refusal_ids]), len(anchor.prompt_ids)
        logits = reference(input_ids=ids).logits[0, prompt - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="sum")
        tokens += len(anchor.refusal_ids)
    (total / tokens).backward()
    assert lisa.losses == pytest.approx([float(total.detach()) / tokens], rel=1e-5)
    for p, g in zip(reference.parameters(), step["grad"], strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    # the gradient was clipped where the Trainer's is
    clipped = Recorder()
    train(make_model(), tmp_path, tokenizer, [clipped, LisaCallback(rows, finetune_steps=5, alignment_steps=1)])
    norms = [float(torch.stack([g.norm() for g in s["grad"]]).norm()) for s in clipped.steps]
    assert norms == pytest.approx([0.5] * 6, rel=1e-3)


def test_lisa_refuses_what_it_cannot_do(tmp_path, rows, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="at least one step"):
        LisaCallback(rows, finetune_steps=0)
    with pytest.raises(ValueError, match="rho"):
        LisaCallback(rows, rho=-1)
    with pytest.raises(SafetyDataError, match="no rows"):
        LisaCallback([])
    no_refusal = [SafetyRow(rows[0].messages, None, "row 1")]
    with pytest.raises(SafetyDataError, match="row 1: has no refusal"):
        train(make_model(), tmp_path, tokenizer, [LisaCallback(no_refusal)])
    with pytest.raises(SafetyDataError, match="processing_class=tokenizer"):
        train(make_model(), tmp_path, None, [LisaCallback(rows)])
    train(make_model(), tmp_path, tokenizer, [], max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(UnsupportedSetupError, match="cannot resume"):
        train(
            make_model(), tmp_path, tokenizer, [LisaCallback(rows)], resume_from_checkpoint=f"{tmp_path}/checkpoint-1"
        )
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UnsupportedSetupError, match="on 2 processes"):
        LisaCallback(rows).on_train_begin(
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True), None, None, model=None, processing_class=None
        )

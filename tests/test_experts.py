"""Packed experts, routers, compressed keys, convolutions and towers: what is held, what is kept, what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from spf import NullSpace, Rank1, SafetyCallback, SafetyOptimizer, SafetyProbe, UnsupportedModelError, attach
from spf.data import collate
from spf.experts import is_packed, watching
from spf.matrices import token_of_rows, used_tokens
from spf.pools import joined
from tests.support_matrix import FAMILIES, attempt
from tests.test_callback import make_trainer, safety_data
from tests.test_optimizer import train
from tests.test_probe import dense_gradients

KINDS = {family.kind: family for family in FAMILIES}
PACKED = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def packed(model):
    return [layer for layer in model.modules() if is_packed(layer)]


@pytest.mark.parametrize("kind", PACKED)
def test_watching_experts_changes_nothing_and_sees_what_each_is_given(kind):
    model = KINDS[kind].model().eval()
    for name, p in model.named_parameters():
        if "experts" in name and name.endswith("_bias"):  # zero at the start, so that leaving one out would not show
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20, 44).view(2, 12)
    seen = []
    with torch.no_grad():
        before = model(input_ids=ids).logits
        layers = packed(model)
        chosen = {}
        hooks = [layer.register_forward_hook(lambda m, given, _: chosen.update({m: given})) for layer in layers]
        with watching(layers, lambda *call: seen.append(call)):
            during = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    assert torch.allclose(before, during, atol=1e-6)
    assert torch.equal(before, after)
    assert {expert.layer for expert, *_ in seen} == set(layers)
    for expert, x, y, tokens in seen:
        given, routed = chosen[expert.layer][:2]
        assert (routed[tokens] == expert.index).any(1).all()
        assert len(tokens) == (routed == expert.index).sum()
        if "up" in expert.name:
            assert torch.equal(x, given[tokens])
        W = getattr(expert.layer, expert.name)[expert.index]
        assert torch.allclose(y, x @ (W if expert.layer.is_transposed else W.T), atol=1e-6)


@pytest.mark.parametrize("tuning", ["LoRA", "full"])
@pytest.mark.parametrize("kind", PACKED)
def test_every_expert_is_held(kind, tuning):
    family = KINDS[kind]
    if kind == "gpt_oss" and tuning == "LoRA":  # "all-linear" leaves its experts out
        targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
        result = attempt(family, LoraConfig(r=4, **targets))
    else:
        result = attempt(family, tuning)
    assert result["outcome"] == "held", result
    assert result["error"] <= 1e-6
    assert result["moved"][0] <= 3e-5  # 1.3e-5 on some processors
    assert result["experts"] >= 8  # four of them, two matrices each


def test_experts_that_few_tokens_reach_are_held_in_what_the_others_read(anchors):
    model = KINDS["qwen3_moe"].model()
    probe = SafetyProbe(model, anchors[:2], pad_token_id=1)
    # no safety token is sent to expert 0 of the first layer
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[0] = 0
    route = type(gate).forward
    gate.forward = lambda x: (lambda out: (out[0], out[1], out[2].clamp_min(1)))(route(gate, x))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bases = probe.input_bases(anchors[:2], [f"{name}[{i}]" for i in range(4)], rank=60)
    layer, read = model.model.layers[0].mlp.experts, {}

    def see(expert, x, y, tokens):
        if expert.name == "gate_up_proj":
            read.setdefault(expert.index, []).append(x)

    with torch.no_grad(), watching([layer], see):
        for a in anchors[:2]:
            model(input_ids=torch.tensor([a.prompt_ids + a.refusal_ids]))
    read = {i: torch.cat(x) for i, x in read.items()}
    assert read.keys() == {1, 2, 3}
    everything = torch.cat(list(read.values()))
    few = [i for i in range(4) if i not in read or len(read[i]) < 60]
    for i in few:  # all that the layer reads is held of them, also of the one that nothing was sent to
        V = bases[f"{name}[{i}]"]
        assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-5)
        assert (everything - everything @ V @ V.T).norm() <= 1e-2 * everything.norm()
    assert 0 in few
    assert len(few) > 1
    for i, x in read.items():  # an expert's own come first
        first = bases[f"{name}[{i}]"][:, : torch.linalg.matrix_rank(x)]
        assert (x - x @ first @ first.T).norm() <= 1e-4 * x.norm()


def test_the_adapter_of_an_expert_that_no_benign_prompt_reaches_keeps_its_size(anchors):
    """lora_A is scaled by what benign prompts answer; one that had nothing to answer was scaled by zero once."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    model = get_peft_model(KINDS["qwen3_moe"].model(), LoraConfig(r=2, **targets))
    gate = model.base_model.model.model.layers[0].mlp.gate
    route = type(gate).forward
    gate.forward = lambda x: (lambda out: (out[0], out[1], out[2].clamp_min(1)))(route(gate, x))
    probe = SafetyProbe(model, anchors[:4], pad_token_id=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    attachment = attach(probe, torch.optim.SGD(trained, lr=0.1), NullSpace(rank=8), calibration=anchors[4:8])
    (name,) = [
        name for name in attachment.matrices if "layers.0" in name and name.endswith("experts.lora_A.default.weight[0]")
    ]
    assert attachment.correction.scale[name] == 1.0
    assert bool(attachment.matrices[name].view(attachment.matrices[name].weight).any())
    assert attachment.correction.scale[name.replace("[0]", "[1]")] > 1.0


def test_joined_bases_keep_the_first_and_leave_out_what_it_spans():
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(24, 5, generator=generator)).Q
    more = torch.linalg.qr(torch.cat([V[:, :2] + 1e-9, torch.randn(24, 6, generator=generator)], 1)).Q
    both = joined(V, more, 20)
    assert both.shape == (24, 11)  # two of the eight are spanned already
    assert torch.equal(both[:, :5], V)
    assert torch.allclose(both.T @ both, torch.eye(11), atol=1e-5)
    assert torch.allclose(both @ (both.T @ more), more, atol=1e-4)
    few = joined(V, more, 9)
    left = (more - few @ (few.T @ more)).norm(dim=0)
    assert left[2] < left[7]  # the first of them count more


def test_safety_gradients_of_experts_are_autograds(anchors):
    model = KINDS["qwen3_moe"].model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    result = probe.measure(anchors[:3])
    plain = {name.partition("[")[0] for name in probe.matrices}
    _, expected = dense_gradients(model, collate(anchors[:3], 1), sorted(plain))
    for name, factors in result.factors.items():
        G = probe.matrices[name].view(expected[name.partition("[")[0]])
        assert (factors.dense() - G).norm() <= 1e-4 * G.norm() + 1e-7, name


def test_gradient_rules_on_experts(anchors):
    """All weights: corrected. LoRA on them: refused before the first step, and the remedy works."""
    model = KINDS["qwen3_moe"].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate.weight" not in name)
    rule = Rank1()
    optimizer = SafetyOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        SafetyProbe(model, anchors, pad_token_id=1),
        rule,
    )
    train(model, optimizer, 2)
    assert any("[" in name for name in optimizer.attachment.matrices)

    def lora(**targets):
        model = get_peft_model(KINDS["qwen3_moe"].model(), LoraConfig(r=2, **targets))
        trained = [p for p in model.parameters() if p.requires_grad]
        probe = SafetyProbe(model, anchors, pad_token_id=1)
        train(model, SafetyOptimizer(torch.optim.SGD(trained, lr=0.1), probe, rule), 1)

    with pytest.raises(UnsupportedModelError, match="leave the experts out of target_parameters"):
        lora(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    lora(target_modules=["q_proj"])


def test_experts_on_the_wrong_side_are_refused_by_name(anchors):
    """PEFT puts lora_A on the output side of Llama 4's experts."""

    def held(**targets):
        model = get_peft_model(KINDS["llama4_text"].model(), LoraConfig(r=2, target_modules=["q_proj"], **targets))
        trained = [p for p in model.parameters() if p.requires_grad]
        probe = SafetyProbe(model, anchors, pad_token_id=1)
        train(model, SafetyOptimizer(torch.optim.SGD(trained, lr=0.1), probe, NullSpace(rank=8)), 1)

    with pytest.raises(
        UnsupportedModelError, match=r"packed experts of Llama4TextExperts.* leave down_proj out of target_parameters"
    ):
        held(target_parameters=["experts.down_proj"])
    held()


def test_routers_and_their_adapters_are_kept_fixed_and_named(tmp_path, tokenizer, rows, caplog):
    model = get_peft_model(KINDS["mixtral"].model(), LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    make_trainer(tmp_path, tokenizer, callback, model).train()
    (told,) = [r.getMessage() for r in caplog.records if "kept fixed" in r.getMessage()]
    assert "4 routers' adapters (base_model.model.model.layers.0.mlp.gate.lora_A.default.weight, " in told


def test_a_tower_is_kept_fixed_and_named_and_a_run_goes_on_from_a_checkpoint(tmp_path, tokenizer, rows, caplog):
    def run(**settings):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        model = KINDS["llava"].model()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = make_trainer(tmp_path, tokenizer, callback, model, save_strategy="steps", save_steps=2, max_steps=4)
        trainer.train(**settings)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, start[name]) or "vision" not in name, name
        return callback

    first = run()
    told = [r.getMessage() for r in caplog.records if "kept fixed, too: " in r.getMessage()]
    assert "no safety sample passes through them (a tower for images, say) (model.vision_tower." in told[0]
    caplog.clear()
    second = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.attachment.run.kept == first.attachment.run.kept
    assert [r.getMessage() for r in caplog.records if "kept fixed, too: " in r.getMessage()] == told


def test_if_nothing_is_reached_the_sentence_names_fused_kernels(anchors):
    model = KINDS["llava"].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name and "proj" in name and parameter.dim() == 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(UnsupportedModelError, match=r"no safety sample passes .* lora_mlp_kernel: false"):
        SafetyOptimizer(
            torch.optim.SGD(trained, lr=0.1), SafetyProbe(model, anchors, pad_token_id=1), NullSpace(rank=8)
        )


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4), (2, 1, 3, 4), (2, 3, 5, 4), (2, 5, 3, 4), (5, 2, 3, 4)])
def test_rows_are_told_apart_by_their_shape(shape):
    """Every row holds the number of its token."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(6).view(2, 3)
    places = [i for i in range(len(shape) - 1) if shape[i] in (2, 3)]
    if shape != (6, 4):
        x = x.view([shape[i] if i in places else 1 for i in range(len(shape) - 1)])
    x = x.reshape(*x.shape, 1).float().expand(shape) if shape != (6, 4) else x.flatten()[:, None].float().expand(shape)
    assert torch.equal(token_of_rows("w", x.shape, mask), x.reshape(-1, 4)[:, 0].long())
    assert set(used_tokens("w", x, mask)[:, 0].tolist()) == {0.0, 1.0, 3.0}


def test_a_shape_that_tells_nothing_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"w: works on tensors of shape \(7, 4\) .* cannot be told apart"):
        token_of_rows("w", torch.Size((7, 4)), torch.ones(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "falcon_h1", "mamba2", "gemma3n_text"])
def test_hybrids_in_full(kind):
    result = attempt(KINDS[kind], "full")
    assert result["outcome"] == "held", result
    assert result["error"] <= 1e-6


@pytest.mark.slow
def test_convolutions_and_state_parameters_are_named(tmp_path, tokenizer, rows, caplog):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    make_trainer(tmp_path, tokenizer, callback, KINDS["mamba2"].model()).train()
    (told,) = [r.getMessage() for r in caplog.records if "kept fixed" in r.getMessage()]
    assert "2 convolutions (backbone.layers.0.mixer.conv1d.weight, " in told
    assert "A_log" in told

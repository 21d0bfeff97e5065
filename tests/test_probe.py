"""The factored safety gradients are autograd's, and the model is left exactly as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spf import NullSpace, Rank1, SafetyOptimizer
from spf.bases import relative
from spf.data import collate
from spf.errors import UnsupportedModelError
from spf.matrices import find_matrices
from spf.probe import SafetyProbe
from tests.conftest import make_model


def dense_gradients(model, batch, names):
    """The same loss by a plain backward pass."""
    model.eval()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    weights = batch.weights[:, 1:]
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    loss = (nll * weights).sum() / weights.sum()
    parameters = dict(model.named_parameters())
    return loss, dict(zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True))


def with_lora(model, dropout=0.1):
    targets = ["c_attn", "c_proj", "c_fc"] if model.config.model_type == "gpt2" else "all-linear"
    fan_in = model.config.model_type == "gpt2"
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=fan_in))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:  # away from zero, where the gradient of lora_A vanishes
            nn.init.normal_(parameter, std=0.1)
    return peft


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2", "opt"])
def test_equals_autograd(kind, tuning, dtype, checkpointing, anchors):
    model = make_model(kind, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if tuning == "lora":
        model = with_lora(model)
        if checkpointing:
            model.enable_input_require_grads()
    probe = SafetyProbe(model, anchors, pad_token_id=1, first_tokens=2, first_weight=3.0)
    batch = collate(anchors[:3], 1, 2, 3.0)
    result = probe.measure(anchors[:3])
    loss, expected = dense_gradients(model, batch, list(probe.matrices))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert len(result.factors) == len(probe.matrices) >= 8
    for name, factors in result.factors.items():
        G = probe.matrices[name].view(expected[name]).float()
        assert (factors.dense() - G).norm() <= tolerance * G.norm(), name
        assert float(factors.norm_squared()) == pytest.approx(float(factors.dense().square().sum()), rel=1e-4)
        other = torch.randn_like(G)
        inner = factors.inner_block(other, slice(None), slice(None))
        assert float(inner) == pytest.approx(float((factors.dense() * other).sum()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_leaves_no_trace(tuning, anchors):
    model = make_model("gpt2")  # has dropout
    model = with_lora(model) if tuning == "lora" else model
    model.train()
    model.base_model.eval() if tuning == "full" else model.base_model.model.transformer.h[0].eval()
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        if parameter.requires_grad and i % 2:
            parameter.grad = torch.randn_like(parameter)
    before = (
        [None if p.grad is None else p.grad.clone() for p in parameters],
        [p.requires_grad for p in parameters],
        [p.detach().clone() for p in parameters],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    probe()
    probe.loss(anchors[:2])
    probe.input_bases(anchors[:2], list(probe.matrices), rank=4)
    for p, grad, requires, value in zip(parameters, before[0], before[1], before[2], strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
        assert p.requires_grad == requires
        assert torch.equal(p, value)
    assert [m.training for m in model.modules()] == before[3]
    assert torch.equal(torch.get_rng_state(), before[4])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before[5]


def test_frozen_model_is_refused_and_partly_frozen_works(anchors):
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
        SafetyProbe(model, anchors)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    result = SafetyProbe(model, anchors, pad_token_id=1)()
    assert list(result.factors) == ["model.layers.1.mlp.down_proj.weight"]


def test_tied_output_layer_counts_as_embedding():
    model = make_model("qwen")
    matrices, others = find_matrices(model)
    assert "lm_head.weight" not in matrices
    assert "model.embed_tokens.weight" in others
    assert any(name.endswith("q_proj.bias") for name in others)


def test_unknown_parameters_are_refused_by_name(anchors):
    model = make_model()
    model.model.layers[0].experts = nn.Parameter(torch.zeros(3, 4, 5))
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts: .*\(3, 4, 5\).* or use null-space"):
        SafetyOptimizer(optimizer, probe, Rank1())
    safe = SafetyOptimizer(optimizer, probe, NullSpace(rank=4))  # the remedy
    assert "model.layers.0.experts" in safe.attachment.run.others
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        find_matrices(get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)))


def test_anchors_rotate_and_one_can_be_fixed(anchors):
    probe = SafetyProbe(make_model(), anchors, anchors_per_step=5, pad_token_id=1)
    seen = [id(a) for _ in range(12) for a in next(probe.rotation)]
    for turn in range(5):  # 12 anchors, 60 handed out: five whole passes
        assert len(set(seen[turn * 12 : turn * 12 + 12])) == 12
    assert seen[:12] != seen[12:24]
    fixed = SafetyProbe(make_model(), anchors[:1], anchors_per_step=4, pad_token_id=1)
    assert [next(fixed.rotation), next(fixed.rotation)] == [[anchors[0]], [anchors[0]]]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_matrices_that_read_the_same_tensor_share_a_basis(tuning, anchors):
    model = make_model()
    if tuning == "lora":
        model = with_lora(model)
    probe = SafetyProbe(model, anchors[:4], pad_token_id=1)
    names = [name for name, matrix in probe.matrices.items() if not matrix.is_lora_b]
    bases = probe.input_bases(anchors[:4], names, rank=5)
    assert len({id(V) for V in bases.values()}) < len(names)
    for name in names:  # the same as each on its own
        alone = probe.input_bases(anchors[:4], [name], rank=5)[name]
        assert torch.allclose(alone.abs(), bases[name].abs(), atol=1e-5), name


def test_the_tokens_around_the_beginning_of_the_answer_take_the_first_directions(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:2], pad_token_id=1)
    name = next(name for name in probe.matrices if "down_proj" in name)
    inputs = []
    hook = probe.matrices[name].modules[0].register_forward_hook(lambda m, x, y: inputs.append(x[0][0]))
    for anchor in anchors[:2]:
        model(input_ids=torch.tensor([anchor.prompt_ids + anchor.refusal_ids]))
    hook.remove()
    deciding = torch.cat(
        [x[len(a.prompt_ids) - 5 : len(a.prompt_ids) + 2] for a, x in zip(anchors[:2], inputs, strict=True)]
    )

    def missed(weight):
        V = probe.input_bases(anchors[:2], [name], rank=14, decision_weight=weight)[name]
        return float((deciding - deciding @ V @ V.T).norm() / deciding.norm())

    assert missed(1e6) < 0.01
    assert missed(1.0) > 0.1


def test_token_weights_follow_the_gradient_of_the_decision(anchors):
    """The shares of the tokens' weights against the gradient taken by hand, with LoRA and without."""
    for lora in (False, True):
        model = make_model()
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        probe = SafetyProbe(model, anchors[:1], pad_token_id=1)
        names = [n for n in probe.matrices if "layers.0" in n and ".lora_B." not in n]
        groups = {n: [n] for n in names}
        seen = {n: moves for n, _, _, moves in probe._decisions(anchors[:1], groups, 1, "all")}
        anchor = anchors[0]
        ids = torch.tensor([anchor.prompt_ids + anchor.refusal_ids])
        for name in names:
            layer = model.get_submodule(name.split(".lora_A")[0].removesuffix(".weight"))
            outputs = []
            handle = layer.register_forward_hook(lambda m, x, y, outputs=outputs: outputs.append(y))
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            handle.remove()
            places = [len(anchor.prompt_ids) - 1, len(anchor.prompt_ids)]
            said = log_p[places, torch.tensor(anchor.refusal_ids[:2])]
            (d,) = torch.autograd.grad((said - torch.log1p(-said.exp())).sum(), outputs[0])
            squares = d[0].float().square().sum(-1)
            assert torch.allclose(seen[name], (squares / squares.mean()).clamp(max=50), rtol=1e-3, atol=1e-4), name


def test_weights_of_tokens_are_clipped_and_even_without_a_gradient():
    squares = torch.cat([torch.tensor([100.0] + [0.0] * 99), torch.zeros(3), torch.tensor([1.0, torch.nan])])
    weights = relative(squares, torch.tensor([0] * 100 + [1] * 3 + [2] * 2))
    assert weights.tolist() == [50.0] + [0.0] * 99 + [1.0] * 5


def test_the_gradients_share_gives_the_directions_of_what_decides(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:4], pad_token_id=1)
    name = next(name for name in probe.matrices if "layers.1.mlp.down_proj" in name)
    weighed = [(x, moves) for _, x, _, moves in probe._decisions(anchors[:4], {name: [name]}, 4, "all")]
    X, w = weighed[0]
    X = torch.nn.functional.normalize(X, dim=1)

    def missed(share):
        V = probe.input_bases(anchors[:4], [name], rank=6, gradient_share=share)[name]
        return float((w * (X - X @ V @ V.T).square().sum(1)).sum())

    assert missed(1.0) < 0.5 * missed(0.0)

"""LoRA layers computed by fused kernels: their inputs are seen all the same, or the run is refused before it begins."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

from spf import NullSpace, Rank1, SafetyOptimizer, SafetyProbe, UnsupportedModelError
from spf.fused import Products
from tests.conftest import make_model
from tests.test_optimizer import logits, train


def compiled_forward(layer):
    """As Unsloth's compiled modules: PEFT's layer is called, lora_A and lora_B are not."""

    def forward(self, x, *args, **kwargs):
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        return linear(x, self.base_layer.weight) + self.scaling["default"] * (x @ A.t()) @ B.t()

    layer.forward = types.MethodType(forward, layer)


class FusedMlp(torch.autograd.Function):
    """As axolotl's and Unsloth's kernels: one function of the block's weights, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, act, scale, *weights):
        ctx.act, ctx.scale = act, scale
        ctx.save_for_backward(x, *weights)
        return FusedMlp.compute(x, act, scale, weights)

    @staticmethod
    def compute(x, act, scale, weights):
        def project(x, W, A, B):
            A, B = (w.to(torch.float64).to(x.dtype) for w in (A, B))  # adapters are cast to the inputs' type
            flat = x.reshape(-1, x.shape[-1])
            return torch.addmm(flat @ W.t(), flat @ A.t(), B.t(), alpha=scale).view(*x.shape[:-1], -1)

        return project(act(project(x, *weights[:3])) * project(x, *weights[3:6]), *weights[6:])

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x, *weights = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            y = FusedMlp.compute(x, ctx.act, ctx.scale, weights)
            found = torch.autograd.grad(y, [x, *weights], gradient)
        return found[0], None, None, *found[1:]


def fused_block(mlp):
    def forward(self, x):
        weights = [
            w
            for layer in (self.gate_proj, self.up_proj, self.down_proj)
            for w in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        ]
        return FusedMlp.apply(x, self.act_fn, self.gate_proj.scaling["default"], *weights)

    mlp.forward = types.MethodType(forward, mlp)


def adapted(kernel=None, width=64):
    torch.manual_seed(0)
    model = get_peft_model(make_model(width=width), LoraConfig(r=4, target_modules="all-linear"))
    for block in model.base_model.model.model.layers:
        if kernel == "layer":
            for layer in [*block.self_attn.children(), *block.mlp.children()]:
                if hasattr(layer, "lora_A"):
                    compiled_forward(layer)
        elif kernel == "block":
            fused_block(block.mlp)
    return model


@pytest.mark.parametrize("kernel", ["layer", "block"])
def test_the_simulations_compute_what_the_layers_do_and_call_no_lora_a(kernel):
    called = []
    plain, fused = adapted(), adapted(kernel)
    for model in (plain, fused):
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    for name, module in fused.named_modules():
        if name.endswith("lora_A.default") and (kernel == "layer" or "mlp" in name):
            module.register_forward_hook(lambda *_: called.append(1))
    ids = torch.arange(20, 44).view(2, 12)
    for model in (plain, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not called
    for (name, p), (_, q) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if p.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name


WAYS = {
    "x W^T": lambda x, W: x @ W.T,
    "W x^T": lambda x, W: W @ x.T,
    "addmm": lambda x, W: torch.addmm(torch.zeros(5, 3), x, W.T),
    "bmm": lambda x, W: torch.bmm(x[None], W.T[None]),
    "bmm, W first": lambda x, W: torch.bmm(W[None], x.T[None]),
    "baddbmm": lambda x, W: torch.baddbmm(torch.zeros(1, 5, 3), x[None], W.T[None]),
    "of a clone": lambda x, W: x @ W.clone().T,
    "of a cast": lambda x, W: x.double() @ W.double().T,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_product_with_a_weight_is_seen(way):
    x, W = torch.randn(5, 4), torch.randn(3, 4)
    seen = []
    with Products({"w": W}, lambda *call: seen.append(call)):
        x @ torch.randn(4, 3)  # of no weight
        WAYS[way](x, W)
    [(name, given, answered)] = seen
    assert name == "w"
    assert torch.equal(given.float().view(5, 4), x)
    assert torch.allclose(answered.float().reshape(5, 3), x @ W.T, atol=1e-6)


def test_the_memory_of_a_copy_is_no_other_tensors():
    x, W, seen = torch.randn(5, 64).double(), torch.randn(64, 64), []
    with Products({"w": W}, lambda *call: seen.append(call)):
        for _ in range(20):
            W.double()
            x @ torch.ones(64, 64, dtype=torch.float64).T
    assert not seen


# inside a block that is one function no answer has a gradient, so there all tokens count the same
@pytest.mark.parametrize(("kernel", "share"), [("layer", 0.0), ("layer", 0.5), ("block", 0.0)])
def test_bases_are_those_of_the_layers_inputs(kernel, share, anchors):
    found = {}
    for each in (None, kernel):
        probe = SafetyProbe(adapted(each), anchors[:3], pad_token_id=1)
        names = [name for name, matrix in probe.matrices.items() if not matrix.is_lora_b]
        found[each] = probe.input_bases(anchors[:3], names, rank=8, gradient_share=share)
        assert len(found[each]) == len(names) == 14
    for name, V in found[None].items():
        assert float((V.T @ found[kernel][name]).square().sum()) / 8 > 0.999, name


@pytest.mark.parametrize("kernel", ["layer", "block"])
def test_a_run_on_fused_layers_holds(kernel, anchors):
    model = adapted(kernel, width=128)
    few = anchors[:1]
    before = logits(model, few)
    tokens = len(few[0].prompt_ids) + len(few[0].refusal_ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    probe = SafetyProbe(model, few, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.AdamW(trained, lr=5e-3), probe, NullSpace(rank=2 * tokens))
    assert len(optimizer.attachment.matrices) == 14
    assert not optimizer.attachment.run.kept
    train(model, optimizer, 4)
    assert "all 14 matrices answer" in optimizer.finish()
    for old, new in zip(before, logits(model, few), strict=True):
        assert torch.allclose(old, new, atol=1e-5)
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_gradient_rules_on_fused_layers_are_refused_and_the_remedy_works(anchors):
    def run(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        probe = SafetyProbe(model, anchors, pad_token_id=1)
        optimizer = SafetyOptimizer(torch.optim.SGD(trained, lr=0.1), probe, Rank1())
        train(model, optimizer, 1)

    with pytest.raises(UnsupportedModelError, match=r"turn these off .*lora_mlp_kernel: false"):
        run(adapted("block"))
    run(adapted())

"""The rules on real optimizers: what they hold, and that they are noticed when they do not act."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spf import SPF, CorrectionError, NullSpace, Rank1, SafetyOptimizer, SafetyProbe, UnsupportedSetupError, attach
from spf.data import Anchor
from spf.errors import UnsupportedModelError
from spf.probe import Watched
from spf.rules import Constrained, DualAscent, Mix, SafeGrad
from spf.rules.holding import Holding
from tests.conftest import make_model
from tests.test_probe import with_lora


def utility_batch(seed, size=4):
    return torch.randint(5, 600, (size, 16), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps, seed=0):
    for step in range(steps):
        ids = utility_batch(seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, anchors):
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([a.prompt_ids + a.refusal_ids])).logits for a in anchors]


@settings(max_examples=8, deadline=None)
@given(
    m=st.integers(2, 12),
    n=st.integers(3, 24),
    k=st.integers(1, 10),
    decay=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 999),
)
def test_null_space_holds_after_100_adamw_steps(m, n, k, decay, seed):
    """W V = W_0 V to rounding after 100 AdamW steps with weight decay, on a bare linear layer."""
    torch.manual_seed(seed)
    layer = nn.Linear(n, m, bias=False)
    V = torch.linalg.qr(torch.randn(n, min(k, n - 1))).Q
    probe = _BareProbe(layer, V)
    adamw = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=decay)
    optimizer = SafetyOptimizer(adamw, probe, NullSpace(rank=k))
    target = layer.weight.detach().double() @ V.double()
    start = layer.weight.detach().clone()
    for _ in range(100):
        layer(torch.randn(8, n)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.weight.detach().double() @ V.double() - target).abs().max()
    assert error <= 1e-5 * start.abs().max() * n
    assert not torch.allclose(layer.weight, start, atol=1e-3)  # it did learn elsewhere


def test_a_step_that_raised_does_not_switch_the_rule_off():
    torch.manual_seed(0)
    layer = nn.Linear(24, 8, bias=False)
    V = torch.linalg.qr(torch.randn(24, 8)).Q

    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    inner = Failing(layer.parameters(), lr=1e-3)
    optimizer = SafetyOptimizer(inner, _BareProbe(layer, V), NullSpace(rank=8))
    optimizer.attachment.stepping.lr_scale = 2.0
    target = layer.weight.detach() @ V
    for fails in (False, True, False, False):
        inner.fails = fails
        layer(torch.randn(8, 24)).square().sum().backward()
        with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.attachment.steps == 3
    assert torch.allclose(layer.weight.detach() @ V, target, atol=1e-6)
    assert inner.param_groups[0]["lr"] == 1e-3


def test_a_parameter_that_is_unfrozen_later_is_noticed():
    model = nn.Sequential(nn.Linear(24, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.requires_grad_(False)
    V = torch.linalg.qr(torch.randn(24, 8)).Q
    probe = _BareProbe(model, V)
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), probe, NullSpace(rank=8))
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    model[1].weight.requires_grad_(True)
    model(torch.randn(8, 24)).square().sum().backward()
    with pytest.raises(CorrectionError, match=r"1\.weight is trained, but was frozen when training began"):
        optimizer.step()


def test_schedule_free_optimizers_are_refused():
    layer = nn.Linear(24, 8, bias=False)
    free = type("AdamWScheduleFree", (torch.optim.SGD,), {"__module__": "schedulefree.adamw_schedulefree"})
    probe = _BareProbe(layer, torch.linalg.qr(torch.randn(24, 8)).Q)
    with pytest.raises(UnsupportedSetupError, match="AdamWScheduleFree evaluates and saves an average"):
        SafetyOptimizer(free(layer.parameters(), lr=0.1), probe, NullSpace(rank=8))


def test_a_correction_in_bfloat16_leaves_a_small_share_of_one_step():
    """What the rougher product leaves goes at the next step, so it does not add up."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False)
    V = torch.linalg.qr(torch.randn(48, 16)).Q
    adamw = torch.optim.AdamW(layer.parameters(), lr=0.01)
    optimizer = SafetyOptimizer(adamw, _BareProbe(layer, V), NullSpace(rank=16), correction_dtype=torch.bfloat16)
    target = layer.weight.detach() @ V
    shares = []
    for _ in range(100):
        layer(torch.randn(8, 48)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        left = (layer.weight.detach() @ V - target).norm()
        shares.append(float(left / optimizer.attachment.correction.constraint.gaps["weight"].sqrt()))
    assert max(shares) < 2**-7
    assert max(shares) > 1e-4  # it was a rougher product


def test_a_correction_in_bfloat16_that_is_not_applied_is_noticed(monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False)
    V = torch.linalg.qr(torch.randn(48, 16)).Q
    adamw = torch.optim.AdamW(layer.parameters(), lr=0.01)
    optimizer = SafetyOptimizer(adamw, _BareProbe(layer, V), NullSpace(rank=16), correction_dtype=torch.bfloat16)
    hold = Holding._hold

    def half(self, names, dtype):
        for name in names:
            self.subspace.right[name] = self.subspace.right[name] * 0.5**0.5
            self.subspace.target[name] = self.subspace.target[name] * 0.5**0.5
        hold(self, names, dtype)
        for name in names:
            self.subspace.right[name] = self.subspace.right[name] / 0.5**0.5
            self.subspace.target[name] = self.subspace.target[name] / 0.5**0.5

    monkeypatch.setattr(Holding, "_hold", half)
    layer(torch.randn(8, 48)).square().sum().backward()
    with pytest.raises(CorrectionError, match="answers the held inputs differently"):
        optimizer.step()


class _BareProbe(SafetyProbe):
    """A probe of one layer, with a given basis instead of a language model's."""

    def __init__(self, layer, V):
        super().__init__(layer, [Anchor([0], [1], "none")])
        self.V = V

    def watch(self, anchors, begins=()):
        return Watched(0.0, (True,), 1.0)

    def refused(self, prompts, begins):
        return [False] * len(prompts)

    def input_bases(self, anchors, names, **settings):
        return dict.fromkeys(names, self.V)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2", "opt"])
def test_anchor_logits_do_not_change_at_full_rank(kind, tuning, anchors):
    """With a rank as large as the number of anchor tokens the model's answers to the anchors stay."""
    torch.manual_seed(1)
    model = make_model(kind)
    if tuning == "lora":
        model = with_lora(model, dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
    few = anchors[:1]
    tokens = len(few[0].prompt_ids) + len(few[0].refusal_ids)
    assert tokens < 32  # below the hidden size, else nothing could be learned
    before = logits(model, few)
    probe = SafetyProbe(model, few, pad_token_id=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SafetyOptimizer(torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1), probe, NullSpace(rank=tokens))
    ids = utility_batch(0)
    start = float(model(input_ids=ids, labels=ids).loss.detach())
    train(model, optimizer, 10, seed=0)
    end = float(model(input_ids=ids, labels=ids).loss.detach())
    assert abs(end - start) > 1e-3
    for old, new in zip(before, logits(model, few), strict=True):
        assert torch.allclose(old, new, atol=2e-4), float((old - new).abs().max())


def test_projected_lora_a_keeps_the_size_of_its_response(anchors):
    """Calibration scales a fresh lora_A; A V = 0 stays, and so does what the model computes."""
    model = with_lora(make_model(), dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    probe = SafetyProbe(model, anchors[:6], pad_token_id=1)
    names = [name for name in probe.matrices if "lora_A" in name]
    logits_before, before = logits(model, anchors[6:]), probe.response_norms(anchors[6:], names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    attachment = attach(probe, optimizer, NullSpace(rank=4), calibration=anchors[6:])
    after = probe.response_norms(anchors[6:], names)
    assert set(attachment.correction.scale) == set(names)
    assert all(scale > 1 for scale in attachment.correction.scale.values())
    for name in names:
        assert after[name] == pytest.approx(before[name], rel=1e-3)
        assert (probe.matrices[name].weight @ attachment.subspace.right[name]).norm() < 1e-5
    for old, new in zip(logits_before, logits(model, anchors[6:]), strict=True):
        assert torch.equal(old, new)


def test_without_adapters_the_step_is_longer_in_the_free_directions(anchors):
    """W's free part moves by c lr G, c from the least held matrix; the rate that schedulers and logs see stays."""
    model = make_model()
    probe = SafetyProbe(model, anchors[:6], anchors_per_step=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = attach(probe, optimizer, NullSpace(rank=12), calibration=anchors[6:])
    inputs = {name: [] for name in attachment.matrices}
    handles = [
        matrix.modules[0].register_forward_hook(lambda _, x, y, name=name: inputs[name].append(x[0].flatten(0, -2)))
        for name, matrix in attachment.matrices.items()
    ]
    with torch.no_grad():
        for anchor in anchors[6:]:
            model(input_ids=torch.tensor([anchor.prompt_ids + anchor.refusal_ids]))
    for handle in handles:
        handle.remove()
    shares = []
    for name, found in inputs.items():
        x, V = nn.functional.normalize(torch.cat(found), dim=-1), attachment.subspace.right[name]
        shares.append((x - x @ V @ V.T).square().sum(-1).mean().sqrt())
    scale = attachment.lr_scale
    assert scale == pytest.approx(1 / float(max(shares)), rel=1e-4)
    assert scale > 1.05
    ids = utility_batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: matrix.weight.detach().clone() for name, matrix in attachment.matrices.items()}
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.01
    for name, matrix in attachment.matrices.items():
        V, G = attachment.subspace.right[name], matrix.weight.grad
        expected = before[name] - scale * 0.01 * (G - G @ V @ V.T)
        assert torch.allclose(matrix.weight.detach(), expected, atol=1e-6), name


def test_the_learning_rate_is_left_alone_with_adapters_and_on_request(anchors):
    adapted = with_lora(make_model())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    for model, rule in ((adapted, NullSpace(rank=12)), (make_model(), NullSpace(rank=12, rescale=False))):
        probe = SafetyProbe(model, anchors[:6])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        assert attach(probe, optimizer, rule, calibration=anchors[6:]).lr_scale == 1


def test_plain_training_does_change_them(anchors):
    model = make_model()
    before = logits(model, anchors[:1])
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 10)
    assert not torch.allclose(before[0], logits(model, anchors[:1])[0], atol=1e-1)


@pytest.mark.parametrize("rule", [SPF(rank=4), SPF(rank=4, gate="matrix", side="right"), SPF(side="both"), Rank1()])
def test_gradient_rules_equal_a_dense_reference(rule, anchors):
    """One SGD step under the rule equals the step computed from dense autograd gradients in float64."""
    model = make_model()
    probe = SafetyProbe(model, anchors[:2], anchors_per_step=2, pad_token_id=1)
    batch = probe.rotation.anchors
    safety = {name: f.dense().double() for name, f in probe.measure(batch).factors.items()}
    # a utility batch that conflicts: push the safety loss up
    for name, matrix in probe.matrices.items():
        generator = torch.Generator().manual_seed(len(name))
        noise = torch.randn(matrix.weight.shape, generator=generator) * safety[name].norm().float()
        noise *= 0.5 / noise.numel() ** 0.5
        matrix.weight.grad = -safety[name].float() + noise
    gradients = {name: m.weight.grad.double() for name, m in probe.matrices.items()}
    weights = {name: m.weight.detach().double() for name, m in probe.matrices.items()}
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), probe, rule)
    optimizer.step()
    for name, matrix in probe.matrices.items():
        G, S = gradients[name], safety[name]
        if isinstance(rule, Rank1):
            expected = G - min(float((G * S).sum()), 0) / float(S.square().sum()) * S
            assert float(((weights[name] - matrix.weight.double()) / 0.5 * S).sum()) >= -1e-4 * G.norm() * S.norm()
        else:
            U, _, Vh = torch.linalg.svd(S)
            U, V = U[:, : rule.rank], Vh[: rule.rank].T
            left, right = U @ U.T, V @ V.T
            expected = {"left": G - left @ G, "right": G - G @ right, "both": G - left @ G @ right}[rule.side]
        moved = (weights[name] - matrix.weight.detach().double()) / 0.5
        assert (moved - expected).norm() <= 1e-4 * G.norm(), name
    assert optimizer.attachment.corrected == 1
    metrics = optimizer.attachment.metrics()
    assert metrics["spf/conflict_rate"] == 1.0
    assert 0 < metrics["spf/removed_share"] <= 1
    assert metrics["spf/cos"] < -0.5


@pytest.mark.parametrize("rule", [SPF(), Rank1()])
def test_no_conflict_is_an_exact_no_op(rule, anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:2], anchors_per_step=2, pad_token_id=1)
    for name, factors in probe.measure(probe.rotation.anchors).factors.items():
        probe.matrices[name].weight.grad = factors.dense().clone()
    reference = copy.deepcopy(model)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    SafetyOptimizer(torch.optim.AdamW(model.parameters()), probe, rule).step()
    torch.optim.AdamW(reference.parameters()).step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nan_in_the_safety_loss_is_skipped_counted_and_warned_once(anchors, monkeypatch):
    model, reference = make_model(), make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), probe, SPF())
    real = probe.measure

    def poisoned(batch):
        result = real(batch)
        next(iter(result.factors.values())).D.fill_(float("nan"))
        return result

    monkeypatch.setattr(probe, "measure", poisoned)
    with pytest.warns(UserWarning, match="NaN or inf in the safety loss") as caught:
        train(model, optimizer, 3)
    assert len([w for w in caught if "spf:" in str(w.message)]) == 1
    assert optimizer.attachment.skipped == 3
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2), 3)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_safety_optimizer_is_a_torch_optimizer(anchors):
    """Schedulers, state_dict, param groups and hooks work on it as on the optimizer it wraps."""
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = SafetyOptimizer(inner, SafetyProbe(model, anchors, pad_token_id=1), NullSpace(rank=4))
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, 2)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert len(calls) == 2
    state = optimizer.state_dict()
    fresh = torch.optim.AdamW(model.parameters(), lr=1.0)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == pytest.approx(5e-3)
    optimizer.load_state_dict(fresh.state_dict())
    assert optimizer.state is inner.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    prepared = Accelerator(cpu=True).prepare(optimizer)
    train(model, prepared, 1)
    assert optimizer.attachment.steps == 3
    assert len(repr(optimizer)) > 20


def test_closure_is_evaluated_once(anchors):
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = SafetyOptimizer(inner, SafetyProbe(model, anchors, pad_token_id=1), NullSpace(rank=4))
    ids = utility_batch(0)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0


def test_hooks_fire_once_when_step_calls_its_parent(anchors):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = make_model()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # patches the parent's step too
    optimizer = SafetyOptimizer(
        Twice(model.parameters(), lr=0.1), SafetyProbe(model, anchors, pad_token_id=1), NullSpace(rank=4)
    )
    train(model, optimizer, 2)
    assert optimizer.attachment.steps == 2


def test_a_rule_that_does_not_act_is_noticed(anchors, monkeypatch):
    """Planted faults: hooks taken off, projection turned off, an optimizer that holds other parameters."""
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), probe, NullSpace(rank=8))
    optimizer.attachment.remove()
    with pytest.raises(CorrectionError, match="without calling its step hooks"):
        train(model, optimizer, 1)

    optimizer = SafetyOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), probe, NullSpace(rank=8))
    monkeypatch.setattr(optimizer.attachment.correction, "_hold", lambda names, dtype: None)
    with pytest.raises(CorrectionError, match="answers the held inputs differently"):
        train(model, optimizer, 1)

    with pytest.raises(CorrectionError, match="not in the optimizer"):
        attach(probe, torch.optim.AdamW(copy.deepcopy(model).parameters()))

    partial = make_model()
    optimizer = SafetyOptimizer(
        torch.optim.AdamW(partial.parameters()), SafetyProbe(partial, anchors, pad_token_id=1), Rank1()
    )
    ids = utility_batch(0)
    partial(input_ids=ids, labels=ids).loss.backward()
    partial.lm_head.weight.grad = None
    with pytest.raises(CorrectionError, match=r"1 of 15 matrices had no gradient .* lm_head"):
        optimizer.step()


def test_unsupported_setups_are_refused(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    with pytest.raises(UnsupportedSetupError, match="LBFGS"):
        attach(probe, torch.optim.LBFGS(model.parameters()))

    class Wrapper:
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    with pytest.raises(UnsupportedSetupError, match="Wrapper has no step hooks"):
        attach(probe, Wrapper(torch.optim.AdamW(model.parameters())))  # type: ignore[arg-type]
    trained = with_lora(make_model())
    with pytest.raises(UnsupportedModelError, match="adapter is trained already"):
        attach(
            SafetyProbe(trained, anchors, pad_token_id=1),
            torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad]),
            NullSpace(rank=4),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_fine_tuning_of_rounded_weights_is_refused(dtype, anchors):
    """They were neither held nor did they learn: most of a step is below their rounding."""
    model = make_model(dtype=dtype)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight and 14 more .* dtype=torch\.float32 .* bf16=True"):
        attach(probe, torch.optim.AdamW(model.parameters(), lr=1e-3), NullSpace(rank=8))


def conflicting(probe, safety):
    """Utility gradients on the model that push the safety loss up, with noise."""
    for name, matrix in probe.matrices.items():
        generator = torch.Generator().manual_seed(len(name))
        noise = torch.randn(matrix.weight.shape, generator=generator) * safety[name].norm().float()
        matrix.weight.grad = -safety[name].float() + noise * 0.5 / noise.numel() ** 0.5


def test_mixing_adds_the_refusal_gradient(anchors):
    """The step equals plain SGD on utility loss + rho * refusal loss, by autograd."""
    model = make_model()
    probe = SafetyProbe(model, anchors[:2], anchors_per_step=2, pad_token_id=1)
    safety = {name: f.dense() for name, f in probe.measure(probe.rotation.anchors).factors.items()}
    conflicting(probe, safety)
    expected = {n: m.weight.detach() - 0.5 * (m.weight.grad + 2.0 * safety[n]) for n, m in probe.matrices.items()}
    SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), probe, Mix(2.0)).step()
    for name, matrix in probe.matrices.items():
        assert torch.allclose(matrix.weight, expected[name], atol=1e-5), name


def test_safegrad_pulls_towards_the_aligned_models_predictions(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:3], anchors_per_step=3, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), probe, SafeGrad(1.0))
    norms = [float(f.norm_squared()) for f in probe.measure(probe.rotation.anchors).factors.values()]
    assert max(norms) < 1e-4  # nothing has moved: the KL and its gradient vanish, up to the reference's rounding
    with torch.no_grad():
        for matrix in probe.matrices.values():
            matrix.weight.add_(torch.randn_like(matrix.weight) * 0.05)
    aligned = {name: f.dense() for name, f in probe.measure(probe.rotation.anchors).factors.items()}
    # the same KL by autograd on the parameters
    reference = probe._reference_logprobs
    total = count = 0.0
    for anchor in probe.rotation.anchors:
        ids = torch.tensor([anchor.prompt_ids + anchor.refusal_ids])
        logprobs = model(input_ids=ids).logits[0, len(anchor.prompt_ids) - 1 : -1].log_softmax(-1)
        target = reference[anchor.where].float()
        total = total + (target.exp() * (target - logprobs)).sum()
        count += len(anchor.refusal_ids)
    (total / count).backward()
    for name, matrix in probe.matrices.items():
        assert torch.allclose(aligned[name], matrix.weight.grad, atol=1e-4 * float(matrix.weight.grad.norm()) + 1e-7)
    conflicting(probe, aligned)
    flat = torch.cat([m.weight.grad.flatten() for m in probe.matrices.values()])
    pull = torch.cat([aligned[n].flatten() for n in probe.matrices])
    expected = flat - (flat @ pull) / pull.square().sum() * pull + pull
    before = torch.cat([m.weight.detach().flatten().clone() for m in probe.matrices.values()])
    optimizer.step()
    after = torch.cat([m.weight.detach().flatten() for m in probe.matrices.values()])
    assert (before - 0.1 * expected - after).norm() <= 1e-3 * (0.1 * expected).norm()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_constrained_step_meets_its_linearised_constraint(kind, anchors):
    """<g_s, D'> = margin - excess where the plain step would break it, and D' is D where it would not."""
    model = make_model()
    probe = SafetyProbe(model, anchors[:2], anchors_per_step=2, pad_token_id=1)
    safety = {name: f.dense() for name, f in probe.measure(probe.rotation.anchors).factors.items()}
    optimizer = SafetyOptimizer(kind(model.parameters(), lr=1e-2), probe, Constrained(margin=1e-3))
    for sign in (1.0, -1.0):
        for name, matrix in probe.matrices.items():
            matrix.weight.grad = -sign * safety[name]
        before = {name: m.weight.detach().clone() for name, m in probe.matrices.items()}
        probe_result = probe.measure(probe.rotation.anchors)
        optimizer.step()
        change = sum(
            float((probe_result.factors[n].dense() * (m.weight.detach() - before[n])).sum())
            for n, m in probe.matrices.items()
        )
        if sign > 0:
            assert change == pytest.approx(1e-3 - probe_result.excess, rel=1e-2)
        else:
            assert change < 1e-3
    assert optimizer.attachment.corrected == 1


def test_dual_ascent_acts_only_once_the_safety_loss_has_risen(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:4], anchors_per_step=4, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), probe, DualAscent(rate=5.0, margin=0.05))
    multipliers = []
    for _ in range(6):
        safety = probe.measure(probe.rotation.anchors).factors
        for name, matrix in probe.matrices.items():
            matrix.weight.grad = -safety[name].dense()
        optimizer.step()
        multipliers.append(optimizer.attachment.correction.multiplier)
    assert multipliers[0] == 0
    assert multipliers[-1] > 1  # the push up is outweighed by now
    assert optimizer.attachment.monitor.before.loss == pytest.approx(probe.loss(anchors[:4]), abs=0.5)


def test_held_out_samples_are_not_in_the_basis_and_are_what_is_measured(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors, anchors_per_step=4, pad_token_id=1)
    seen = []
    original = probe.input_bases
    probe.input_bases = lambda batch, *a, **k: seen.extend(batch) or original(batch, *a, **k)
    attachment = attach(probe, torch.optim.SGD(model.parameters(), lr=0.1), NullSpace(rank=4, prompts=6))
    assert len(seen) == 6
    run = attachment.run
    assert len(run.rotation.anchors) == len(anchors) - 6
    assert not {a.where for a in seen} & {a.where for a in run.rotation.anchors}
    assert not {a.where for a in seen} & {a.where for a in run.watched}
    assert len(probe.rotation.anchors) == len(anchors)  # the caller's probe stays as it is


@pytest.mark.parametrize(
    ("rule", "own"),
    [
        (NullSpace(rank=4, prompts=6), False),
        (NullSpace(rank=4, prompts=6, feedback=Mix()), True),
        (Mix(), True),
        (SPF(), True),
    ],
)
def test_a_rule_that_works_with_what_is_watched_is_known(rule, own, anchors):
    probe = SafetyProbe(make_model(), anchors, anchors_per_step=4, pad_token_id=1)
    run = attach(probe, torch.optim.SGD(probe.model.parameters(), lr=0.1), rule).run
    assert (
        run.watches_own == own == bool({a.where for a in run.rotation.anchors} & {a.where for a in run.watched} and own)
    )
    few = SafetyProbe(make_model(), anchors[:4], pad_token_id=1)
    assert attach(few, torch.optim.SGD(few.model.parameters(), lr=0.1), NullSpace(rank=4, reworded=0)).run.watches_own


def test_a_loop_of_ones_own_is_told_what_does_not_learn(anchors):
    """Embeddings, norms and biases got no gradient, steps were longer, and all samples were held, without a word."""
    probe = SafetyProbe(make_model(), anchors[:4], pad_token_id=1)
    adamw = torch.optim.AdamW(probe.model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="spf: kept fixed") as said:
        SafetyOptimizer(adamw, probe, NullSpace(rank=4, reworded=0), calibration=anchors[4:8])
    lines = [str(one.message) for one in said]
    assert any("spf: kept fixed: 1 embedding (" in line and "5 norms (" in line for line in lines), lines
    assert any("spf: all 4 safety samples are held" in line for line in lines), lines
    assert any("spf: every step is made at 1." in line for line in lines), lines


def test_gradients_that_a_fused_optimizer_unscales_are_refused(anchors):
    """The safety gradient would be divided by 65536 with them, and the step proven."""
    for rule, refused in ((Mix(), True), (NullSpace(rank=4, reworded=0), False)):
        probe = SafetyProbe(make_model(), anchors, pad_token_id=1)
        adamw = torch.optim.AdamW(probe.model.parameters(), lr=1e-3, fused=True)
        attachment = attach(probe, adamw, rule)
        ids = utility_batch(0)
        probe.model(input_ids=ids, labels=ids).loss.backward()
        attachment.refresh()
        # as torch.amp.GradScaler does where fused=True
        adamw.grad_scale, adamw.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
        with pytest.raises(UnsupportedSetupError, match="unscale_") if refused else nullcontext():
            adamw.step()


def test_a_second_attachment_gets_the_same_samples(anchors):
    """A bug once: the constructor took the held samples out of the caller's probe, 29, 3, 3 of them were left."""
    model = make_model()
    probe = SafetyProbe(model, anchors, anchors_per_step=4, pad_token_id=1)
    bases = []
    for _ in range(3):
        attachment = attach(probe, torch.optim.SGD(model.parameters(), lr=0.1), NullSpace(rank=4, prompts=6))
        bases.append(attachment.subspace.right)
    for name, V in bases[0].items():
        assert torch.equal(V, bases[1][name])
        assert torch.equal(V, bases[2][name])


def test_two_rules_on_one_optimizer_are_refused(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = attach(probe, optimizer, NullSpace(rank=4))
    with pytest.raises(UnsupportedSetupError, match="has a safety rule already"):
        attach(probe, optimizer, NullSpace(rank=4))
    first.remove()
    attach(probe, optimizer, NullSpace(rank=4)).remove()
    with pytest.raises(UnsupportedSetupError, match="is a SafetyOptimizer"):
        attach(probe, SafetyOptimizer(optimizer, probe, NullSpace(rank=4)), NullSpace(rank=4))


def test_contrast_leaves_benign_directions_free(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors[:4], pad_token_id=1)
    benign = anchors[4:8]
    rule = NullSpace(rank=8, contrast=3, prompts=4)
    held = attach(probe, torch.optim.SGD(model.parameters(), lr=0.1), rule, calibration=benign).subspace.right
    free = probe.input_bases(benign, list(held), rank=3)
    # what reads the same tensor shares one basis, also when something was taken out of it
    readers = {name: name.rpartition("self_attn.")[2] for name in held if "layers.0.self_attn" in name}
    q, k, v = (next(held[n] for n, what in readers.items() if what.startswith(kind)) for kind in ("q_", "k_", "v_"))
    assert q is k
    assert k is v
    assert len({id(V) for V in held.values()}) < len(held)
    for name, V in held.items():
        assert float((V.T @ free[name]).norm()) < 1e-4, name
        assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-5)


def test_contrast_without_benign_samples_is_refused(anchors):
    """It would hold directions of benign prompts, too, that it was asked to leave free."""
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    with pytest.raises(ValueError, match="contrast needs benign samples; give them as `calibration`"):
        attach(probe, torch.optim.SGD(model.parameters(), lr=0.1), NullSpace(rank=8, contrast=2))

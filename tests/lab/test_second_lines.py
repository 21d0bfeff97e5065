"""Baselines that hold what the aligned model says or is: SBR, DER, KL on replayed answers, OSF, mean weights."""

import copy

import pytest
import torch
from torch.nn import functional

from spf.conflicts import Audit, Conflict
from spf.data import AnchorRotation, SafetyRow, load_safety_rows, packaged_prompts, tokenise
from spf.data.examples import read_examples
from spf.errors import SafetyDataError
from spf.lab.baselines import data_filter, replay
from spf.lab.baselines.der import replay_loss
from spf.lab.baselines.ema import EMACallback
from spf.lab.baselines.osf import add_osf
from spf.lab.baselines.replay import Replay, benign_answers
from spf.lab.baselines.sbr import HiddenStateAnchor
from spf.lab.bench.cell import load_tokenizer
from spf.lab.bench.methods import add_adapter, make_method
from spf.lab.trainer import answer_logits, collate_answers
from tests.conftest import make_model, make_tokenizer
from tests.lab.bench_workspace import make_bench_workspace
from tests.lab.test_baselines import random, train


def moved(model, scale=0.05):
    """A copy whose trainable weights are others."""
    model = copy.deepcopy(model)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data += random(*parameter.shape, seed=i, scale=scale)
    return model


# SBR


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sbr_is_the_mean_squared_distance_of_last_prompt_states(kind, anchors):
    model = make_model(kind).eval()
    prompts = [a.prompt_ids for a in anchors]
    assert len({len(ids) for ids in prompts}) > 2  # so that padding matters
    anchor = HiddenStateAnchor(prompts, 1, size=len(prompts), layers=(1, -1))
    loss = anchor(model)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert float(loss.detach()) < 1e-9
    assert all(g is None or g.abs().max() < 1e-5 for g in gradients)
    tuned = moved(model)
    total, count = 0.0, 0
    for ids in prompts:
        pair = [m(torch.tensor([ids]), output_hidden_states=True).hidden_states for m in (model, tuned)]
        for layer in (1, 2):
            difference = (pair[0][layer][0, -1] - pair[1][layer][0, -1]).double()
            total, count = total + float((difference**2).sum().detach()), count + len(difference)
    assert total / count > 1e-3
    assert float(anchor(tuned).detach()) == pytest.approx(total / count, rel=1e-4)


def test_sbr_takes_its_prompts_in_turn_and_reads_the_last_layer_by_default(anchors):
    prompts = [a.prompt_ids for a in anchors]
    anchor = HiddenStateAnchor(prompts, 1, size=5, seed=3)
    given = []
    states = anchor.states
    anchor.states = lambda model, ids: given.append(ids) or states(model, ids)
    model = make_model()
    for _ in range(12):
        anchor(model)
    asked = [ids for batch in given[1:] for ids in batch]  # the first call remembers the aligned model's
    assert sorted(asked) == sorted(prompts * 5)
    assert sorted(asked[: len(prompts)]) == sorted(prompts)
    assert asked[: len(prompts)] != prompts
    expected = model(torch.tensor([prompts[0]]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert torch.allclose(states(model, prompts[:2])[0, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="needs prompts and layers, not 0 and 1"):
        HiddenStateAnchor([], 1)


# DER


def test_der_is_its_equation_and_pulls_the_tuned_model_only():
    logits, aligned = random(5, 7, scale=2).requires_grad_(), random(5, 7, seed=1, scale=2).requires_grad_()
    targets = torch.tensor([0, 6, 2, 2, 1])
    squares = sum((logits[p, v].item() - aligned[p, v].item()) ** 2 for p in range(5) for v in range(7)) / 35
    nll = -sum(logits[p].log_softmax(0)[t].item() for p, t in enumerate(targets)) / 5
    loss = replay_loss(logits, aligned, targets, 0.3, 0.7)
    assert float(loss.detach()) == pytest.approx(0.3 * squares + 0.7 * nll, rel=1e-4)
    replay_loss(logits, aligned, targets, 1.0, 0.0).backward()
    assert aligned.grad is None
    assert torch.allclose(logits.grad, (2 / 35 * (logits - aligned)).detach(), atol=1e-6)
    assert float(replay_loss(aligned, aligned, targets, 1.0, 0.0).detach()) == 0
    with pytest.raises(ValueError, match=r"\(5, 7\), aligned logits \(4, 7\)"):
        replay_loss(logits, aligned[:4], targets, 1.0, 1.0)
    with pytest.raises(ValueError, match="must not be negative, and are -1"):
        replay_loss(logits, aligned, targets, -1.0, 1.0)


def test_replay_gives_both_kinds_in_turn(anchors):
    refusals, benign = anchors[:6], anchors[6:]
    turn = Replay(refusals, benign, 1, refusals_per_step=2, benign_per_step=3, seed=1)
    texts = []
    for _ in range(6):
        batch = next(turn)
        for row, (ids, labels, mask) in enumerate(zip(*_columns(batch), strict=True)):
            texts.append((row < 2, ids[mask.bool()].tolist()))
            answer = labels[labels != -100].tolist()
            assert answer == ids[labels != -100].tolist()
            assert answer in [a.refusal_ids for a in anchors]
    for kind, samples, times in ((True, refusals, 2), (False, benign, 3)):
        got = [ids for first, ids in texts if first == kind]
        assert sorted(got) == sorted([a.prompt_ids + a.refusal_ids for a in samples] * times)
    with pytest.raises(ValueError, match="both are 0"):
        Replay(refusals, benign, 1, refusals_per_step=0, benign_per_step=0)
    with pytest.raises(SafetyDataError, match="7 anchors"):
        Replay(refusals, benign, 1, benign_per_step=7)


def _columns(batch):
    return batch["input_ids"], batch["labels"], batch["attention_mask"]


def test_benign_answers_are_asked_for_once_and_those_cut_off_are_marked(tmp_path, tokenizer, monkeypatch):
    path, prompts = tmp_path / "benign.jsonl", packaged_prompts("benign_anchors")
    asked = []

    def answers(model, tokenizer, prompts, **options):
        asked.append(options["max_new_tokens"])
        return ["Yes.", "so it goes " * 11, *[""] * (len(prompts) - 2)]

    monkeypatch.setattr(replay, "generate_answers", answers)
    for _ in range(2):
        rows = benign_answers(path, make_model, tokenizer)
        assert [row.messages[0]["content"] for row in rows] == prompts[:2]
        assert [(row.refusal.split()[0], row.cut) for row in rows] == [("Yes.", False), ("so", True)]
    assert asked == [32]


# OSF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_osf_starts_at_the_aligned_model_and_keeps_its_large_directions(dtype, anchors):
    model = make_model(dtype=dtype)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().float().clone()
    ids = torch.tensor([anchors[0].prompt_ids])
    before = make_model(dtype=dtype).float()(ids).logits
    tuned = add_osf(model, 0.75)
    assert torch.allclose(tuned(ids).logits, before, atol=1e-5)
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable)
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    result = tuned.merge_and_unload().model.layers[0].mlp.up_proj.weight.detach()
    change = result - weight
    U, _, V = torch.linalg.svd(weight, full_matrices=False)
    kept = 24  # three quarters of 32
    assert change.norm() > 1e-3
    assert (U[:, :kept].T @ change).norm() < 1e-4 * change.norm()
    assert (change @ V[:kept].T).norm() < 1e-4 * change.norm()
    assert (U[:, kept:].T @ change).norm() > 0.5 * change.norm()
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        add_osf(make_model(), 1.0)


# EMA


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_ema_is_the_weighted_sum_of_all_steps(decay, tmp_path, tokenizer):
    model = make_model()
    seen = [model.lm_head.weight.detach().clone()]
    frozen = model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    start = frozen.detach().clone()

    class Recorder(EMACallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(model.lm_head.weight.detach().clone())

        def on_train_end(self, *args, **kwargs):
            pass

    train(model, tmp_path, tokenizer, [Recorder(), EMACallback(decay)], learning_rate=1.0)
    assert len(seen) == 6
    expected = decay**5 * seen[0]
    for t, weight in enumerate(seen[1:], 1):
        expected = expected + (1 - decay) * decay ** (5 - t) * weight
    assert torch.allclose(model.lm_head.weight, expected, atol=1e-6)
    assert (seen[5] - seen[0]).abs().max() > 1e-3
    assert torch.equal(frozen, start)
    with pytest.raises(ValueError, match="below 1, not 1"):
        EMACallback(1.0)


# as methods of the benchmark


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_bench_workspace(tmp_path_factory.mktemp("lines") / "tiny")


def batch_of(rows, tokenizer):
    """Training data that answers what the anchors refuse."""
    anchors = tokenise(rows, tokenizer, 256)
    stub = tokenizer("Sure , here is how to do that .", add_special_tokens=False)["input_ids"]
    return collate_answers([{"prompt_ids": a.prompt_ids, "answer_ids": stub} for a in anchors[:4]], 1)


def steps(model, method, batch, count=20):
    """The first loss and gradients, and the model after `count` steps of gradient descent."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    first = None
    for _ in range(count):
        logits, targets, positions = answer_logits(model, batch)
        if method.answer_loss is None:
            loss = functional.cross_entropy(logits, targets)
        else:
            loss = method.answer_loss(model, batch, logits, targets, positions)
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            first = float(loss.detach()), [p.grad.clone() for p in trainable]
        optimizer.step()
    return first


MEASURES = {
    "sbr": lambda model, tuned, rows, tokenizer: _state_distance(model, tuned, rows, tokenizer),
    "der": lambda model, tuned, rows, tokenizer: _logit_distance(model, tuned, rows, tokenizer),
    "kl-replay": lambda model, tuned, rows, tokenizer: _divergence(model, tuned, rows, tokenizer),
}


def _state_distance(model, tuned, rows, tokenizer):
    prompts = [a.prompt_ids for a in tokenise(rows, tokenizer, 256)]
    return sum(
        float(
            (
                model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
                - tuned(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            ).norm()
        )
        for ids in prompts
    )


def _replayed(model, rows, tokenizer):
    anchors = tokenise(rows, tokenizer, 256)
    batch = collate_answers([{"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in anchors], 1)
    return answer_logits(model, batch)[0]


def _logit_distance(model, tuned, rows, tokenizer):
    return float((_replayed(model, rows, tokenizer) - _replayed(tuned, rows, tokenizer)).norm())


def _divergence(model, tuned, rows, tokenizer):
    p, q = (_replayed(m, rows, tokenizer).log_softmax(-1) for m in (model, tuned))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("sbr", {"weight": 5.0}), ("der", {"alpha": 50.0, "beta": 0.0}), ("kl-replay", {"weight": 5.0})],
)
def test_anchored_methods_begin_as_plain_and_then_stay_nearer(name, settings, tuning, workspace, rows):
    tokenizer = load_tokenizer(workspace.aligned)
    batch = batch_of(rows, tokenizer)
    results = {}
    for method in ("plain", name):
        model = make_model()
        own = settings if method == name else {}
        torch.manual_seed(0)
        tuned = add_adapter(method, model, own) if tuning == "lora" else model
        made = make_method(method, own, 0, workspace, tuned, tokenizer)
        first = steps(tuned, made, batch)
        with torch.no_grad():
            distance = MEASURES[name](make_model(), tuned.eval(), rows, tokenizer)
        results[method] = (*first, distance)
    (plain_loss, plain_gradients, plain), (loss, gradients, nearer) = results["plain"], results[name]
    assert loss == pytest.approx(plain_loss, abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain_gradients, gradients, strict=True))
    assert plain > 1e-4
    assert nearer < 0.8 * plain, (nearer, plain)


def test_der_learns_the_replayed_answers(workspace, rows):
    tokenizer = load_tokenizer(workspace.aligned)
    model = add_adapter("der", make_model(), {})
    only = {"alpha": 0.0, "beta": 1.0, "refusals_per_step": 1, "benign_per_step": 0}
    made = make_method("der", only, 0, workspace, model, tokenizer)
    batch = batch_of(rows, tokenizer)
    logits, targets, positions = answer_logits(model, batch)
    extra = made.answer_loss(model, batch, logits, targets, positions) - functional.cross_entropy(logits, targets)
    refusals = tokenise(load_safety_rows(workspace.refusals), tokenizer, 256)
    first = next(AnchorRotation(refusals, 1, 0))[0]
    ids = torch.tensor([first.prompt_ids + first.refusal_ids])
    nll = model(ids, labels=torch.tensor([[-100] * len(first.prompt_ids) + first.refusal_ids])).loss
    assert extra.item() == pytest.approx(nll.item(), rel=1e-4)


def test_osf_is_an_adapter(workspace):
    with pytest.raises(ValueError, match="osf is an adapter"):
        make_method("osf", {}, 0, workspace, make_model(), load_tokenizer(workspace.aligned))


def test_the_data_filter_leaves_out_what_the_audit_finds(monkeypatch):
    train = [SafetyRow([{"role": "user", "content": f"Request {i}"}], "Yes.", f"row {i}") for i in range(6)]
    asked = []

    def audit(data, *others, **options):
        asked.extend(data)
        return Audit(conflicts=[Conflict(row, 0.9, (1,), (2,)) for row in (1, 4)])

    monkeypatch.setattr(data_filter, "audit_data", audit)
    tokenizer, model = make_tokenizer(), make_model()
    kept = data_filter.without_conflicts(train, model, tokenizer, train[:1])
    assert [row.where for row in kept] == ["row 0", "row 2", "row 3", "row 5"]
    assert len(read_examples(asked, tokenizer).examples) == 6

"""A run leaves nothing behind, however it ends, and takes no more than it says."""

import pytest
import torch
import transformers.trainer
from transformers import TrainerCallback

from spf import NullSpace, SafetyCallback, SafetyOptimizer, SafetyProbe, UnsupportedSetupError, attach
from spf.next_token import CONFIRM
from spf.optimizer import Attachment
from spf.probe import SafetyProbe as Probe
from tests.conftest import make_model
from tests.test_callback import Spy, make_trainer, safety_data
from tests.test_optimizer import utility_batch


def traces(trainer):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return (
        dict(optimizer._optimizer_step_pre_hooks),
        dict(optimizer._optimizer_step_post_hooks),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()],
    )


class Failing(TrainerCallback):
    def __init__(self, event, error):
        def fail(args, state, control, **kwargs):
            if state.global_step >= 1 or event == "on_train_begin":
                raise error

        setattr(self, event, fail)


EVENTS = ["on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("event", EVENTS)
def test_hooks_and_rates_are_restored_when_a_callback_fails(event, error, tmp_path, tokenizer, rows):
    before = list(transformers.trainer.DEFAULT_CALLBACKS)
    trainer = make_trainer(
        tmp_path, tokenizer, SafetyCallback(safety_data(rows), NullSpace(rank=16)), extra=[Failing(event, error)]
    )
    with pytest.raises(type(error)):
        trainer.train()
    pre, post, modules = traces(trainer)
    assert not pre
    assert not post
    assert not any(modules)
    assert before == transformers.trainer.DEFAULT_CALLBACKS
    for group in trainer.optimizer.param_groups:
        assert group["lr"] <= 5e-3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_rates_are_restored_when_the_step_itself_fails(error, tmp_path, tokenizer, rows):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=16))
    trainer = make_trainer(tmp_path, tokenizer, callback, weight_decay=0.5)

    class Fail(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            # as the first thing the optimizer does, with the rates raised
            inner.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(error))

    trainer.add_callback(Fail())
    with pytest.raises(type(error)):
        trainer.train()
    assert callback.attachment.lr_scale > 1
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-3)
        assert group["weight_decay"] in (0.0, 0.5)
    assert not any(type(h).__name__ == "method" for h in traces(trainer)[0].values())


def test_a_checkpoint_that_does_not_fit_leaves_no_hooks(tmp_path, tokenizer, rows, monkeypatch):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=16))
    make_trainer(tmp_path, tokenizer, callback, max_steps=2, save_strategy="steps", save_steps=1).train()
    again = SafetyCallback(safety_data(rows), NullSpace(rank=16))
    trainer = make_trainer(tmp_path, tokenizer, again, max_steps=2)

    def refuse(self, state):
        raise ValueError("planted")

    monkeypatch.setattr(Attachment, "load_state_dict", refuse)
    with pytest.raises(ValueError, match="planted"):
        trainer.train(resume_from_checkpoint=True)
    pre, post, modules = traces(trainer)
    assert not pre
    assert not post
    assert not any(modules)


def test_no_default_callback_is_added_and_reports_have_the_metrics(tmp_path, tokenizer, rows):
    """Also of a callback that is added after the trainer was made."""
    before = list(transformers.trainer.DEFAULT_CALLBACKS)
    spy = Spy()
    trainer = make_trainer(tmp_path, tokenizer, None, extra=[spy])
    trainer.add_callback(SafetyCallback(safety_data(rows), NullSpace(rank=8)))
    trainer.train()
    assert before == transformers.trainer.DEFAULT_CALLBACKS
    seen = [log for log in spy.logs if "loss" in log]
    assert seen
    assert all("spf/lr_scale" in log for log in seen)
    assert not traces(trainer)[0]


def test_two_callbacks_on_one_run_are_refused(tmp_path, tokenizer, rows):
    """A bug once: in full fine-tuning the rate was scaled twice."""
    first, second = (SafetyCallback(safety_data(rows), NullSpace(rank=8)) for _ in range(2))
    trainer = make_trainer(tmp_path, tokenizer, first, extra=[second])
    with pytest.raises(UnsupportedSetupError, match="two SafetyCallbacks are in one run"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_scaled_rate_does_not_multiply_weight_decay(anchors):
    """Decay alone, no gradient: W shrinks by lr * decay, whatever the rate is multiplied by."""
    for kind, decoupled in ((torch.optim.AdamW, True), (torch.optim.SGD, False)):
        model = make_model()
        probe = SafetyProbe(model, anchors[:6], pad_token_id=1)
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.3)
        attachment = attach(probe, optimizer, NullSpace(rank=12), calibration=anchors[6:])
        assert attachment.lr_scale > 1.05
        before = {name: m.weight.detach().clone() for name, m in attachment.matrices.items()}
        for matrix in attachment.matrices.values():
            matrix.weight.grad = torch.zeros_like(matrix.weight)
        attachment.refresh()
        optimizer.step()
        for name, matrix in attachment.matrices.items():
            V = attachment.subspace.right[name]
            free = before[name] - before[name] @ V @ V.T
            now = matrix.weight.detach() - matrix.weight.detach() @ V @ V.T
            assert torch.allclose(now, free * (1 - 0.01 * 0.3), atol=1e-6), (name, decoupled)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert attachment.metrics()["spf/lr_scale"] == attachment.lr_scale


def test_the_monitor_makes_no_backward_pass_unless_it_is_asked_to(tmp_path, tokenizer, rows, monkeypatch):
    measured = []
    real = Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, anchors: measured.append(1) or real(self, anchors))
    for cosines, passes in ((False, 0), (True, 4)):
        measured.clear()
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=1, cosines=cosines)
        make_trainer(tmp_path, tokenizer, callback).train()
        assert len(measured) == passes


def test_the_refusal_rate_is_of_how_answers_begin(anchors):
    """It falls when the first token flips, which the mean loss over the refusal hardly shows; and where that stays,
    "I", but what follows is no refusal any more: the run said that nothing had flipped."""
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    wanted = anchors[0].refusal_ids[0]
    head = model.lm_head.weight

    def rate():
        return probe.watch(anchors, {wanted: set()}).refused

    with torch.no_grad():
        head[:] = torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        assert rate() == 0
        hidden = model.model(input_ids=torch.tensor([anchors[0].prompt_ids])).last_hidden_state[0, -1]
        head[wanted] = hidden  # the likeliest token now
        assert rate() > 0.5
    kept = probe.watch(anchors, {wanted: set()}).kept
    assert len(kept) == len(anchors)
    for anchor, is_kept in zip(anchors, kept, strict=True):
        with torch.no_grad():
            first = int(model(input_ids=torch.tensor([anchor.prompt_ids])).logits[0, -1].argmax())
            after = model(input_ids=torch.tensor([[*anchor.prompt_ids, *anchor.refusal_ids[:1]]])).logits[0, -1]
        assert (first == wanted) == is_kept
        share, most = after.softmax(-1), int(after.argmax())
        for seconds in ({most}, {int(after.argmin())}):
            goes_on = float(share[list(seconds)].sum()) >= CONFIRM
            asked = probe.watch([anchor], {wanted: seconds}).kept
            assert asked == (is_kept and (goes_on or anchor.refusal_ids[0] != wanted),)


def test_how_an_answer_begins_and_goes_on_is_asked_in_one_pass(anchors):
    """Prompts that flipped to "I can ..." were no reason to hold more, and "none of 11 had flipped"."""
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    prompts = [anchor.prompt_ids for anchor in anchors]
    wanted = anchors[0].refusal_ids[0]

    def shares(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)

    with torch.no_grad():
        head = model.lm_head.weight
        head[:] = torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        head[wanted] = model.model(input_ids=torch.tensor([prompts[0]])).last_hidden_state[0, -1] / 9
    first = [int(shares(prompt).argmax()) == wanted for prompt in prompts]
    assert sum(first) > len(prompts) / 2
    after = [shares([*prompt, wanted]) for prompt in prompts]
    likely, unlikely = set(after[0].topk(900).indices.tolist()), {int(after[0].argmin())}
    assert probe.refused(prompts, {wanted: likely}) == first  # as a whole they have it
    assert all(float(share[list(likely)].sum()) >= CONFIRM for share in after)
    assert probe.refused(prompts, {wanted: unlikely}) == [False] * len(prompts)
    assert probe.refused(prompts, {wanted: set()}) == first
    # what begins otherwise, and is no guess, is not asked further
    assert probe.refused(prompts, {wanted + 1: set(), wanted: unlikely}) == first


def test_a_step_of_a_safety_optimizer_that_fails_restores_the_rates(anchors):
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = SafetyOptimizer(
        inner, SafetyProbe(model, anchors[:6], pad_token_id=1), NullSpace(rank=12), calibration=anchors[6:]
    )
    inner.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    ids = utility_batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert inner.param_groups[0]["lr"] == 0.01

"""Held prompts that flip all the same are held in more directions; what else is done when refusals are lost."""

import copy
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from spf import NullSpace, SafetyCallback, SafetyProbe, attach
from spf.data import packaged_prompts, tokenise
from spf.rules.growth import AT_ONCE, EVERY, Growth
from spf.safety_samples import POOL
from spf.subspace import SafetySubspace
from tests.conftest import make_model, make_tokenizer
from tests.test_audit import BENIGN, COMPLIES, HARMFUL, REFUSAL, anchors, refusing, rows, rows_of, samples, tokenizer  # noqa: F401
from tests.test_callback import arguments, assert_holds, make_trainer, safety_data, token_data


def attached(anchors, lora=False, rule=None):  # noqa: F811
    model = make_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (lora == "LoRA-FA" and ".lora_A." in name))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    return model, optimizer, attach(probe, optimizer, rule or NullSpace(rank=8, reserve=8)), start


@pytest.mark.parametrize("lora", [False, True, "LoRA-FA"])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_added_is_orthonormal_and_answered_as_by_the_aligned_weights(anchors, lora, seed, count):  # noqa: F811
    model, optimizer, attachment, start = attached(anchors, lora)
    constraint = attachment.correction.constraint
    before = {
        name: torch.cat([V, constraint.subspace.reserve[name]], 1) for name, V in attachment.subspace.right.items()
    }
    generator = torch.Generator().manual_seed(seed)
    turns = {
        name: torch.linalg.qr(torch.randn(R.shape[1], R.shape[1], generator=generator)).Q
        for name, R in constraint.reserves().items()
    }
    constraint.grow(turns, count)
    subspace = attachment.subspace
    subspace.check("grown")
    shared = {id(V) for V in subspace.right.values()}
    assert len(shared) < len(subspace.right)  # q, k and v still share theirs
    for name, V in subspace.right.items():
        assert V.shape[1] == 8 + count
        whole = torch.cat([V, subspace.reserve[name]], 1)
        # the same space as before
        assert torch.allclose(whole @ whole.T, before[name] @ before[name].T, atol=1e-4)
    for _ in range(3):
        attachment.refresh()
        ids = torch.randint(5, 600, (2, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attachment.verify()
    for name, V in subspace.right.items():
        W, W0 = dict(model.named_parameters())[name].detach(), start[name]
        wanted = torch.zeros(len(W), V.shape[1]) if lora else W0 @ V
        assert (W @ V - wanted).norm() <= 1e-5 * W.norm(), name
        moved = W - (0 if lora else W0)
        assert (moved @ subspace.reserve[name]).norm() > 1e-4 or subspace.reserve[name].shape[1] == 0, name


def test_the_reserve_leaves_an_eighth_of_the_inputs_and_is_there_only_if_it_may_be_used(anchors):  # noqa: F811
    rule = NullSpace(rank=30, reserve=500)
    assert [rule.at_hand(n, rule.limit(n)) for n in (32, 64, 96, 2048)] == [0, 26, 54, 500]
    assert NullSpace(energy=0.9).at_hand(4096, 320) == 0
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = attach(SafetyProbe(model, anchors, pad_token_id=1), optimizer, NullSpace(rank=8), tighten=False)
    assert attachment.subspace.reserve == {}
    assert attachment.correction.growth is None


def test_flipped_prompts_bring_their_own_directions(anchors, refusing, monkeypatch):  # noqa: F811
    """Those of the reserve that carry most of what the flipped prompts send into a layer come first."""
    monkeypatch.setattr("spf.rules.growth.PER_ROUND", 3)
    optimizer = torch.optim.SGD(refusing.parameters(), lr=0.0)
    probe = SafetyProbe(refusing, anchors, pad_token_id=1)
    attachment = attach(probe, optimizer, NullSpace(rank=4, reserve=12))
    growth = attachment.correction.growth
    assert len(growth.pool) > 4
    lost = growth.pool[:2]
    name = next(n for n in attachment.correction.constraint.reserves() if "down_proj" in n)
    R = attachment.subspace.reserve[name].clone()
    moment = probe.input_moments(lost, {name: R}, 8.0)[name]
    attachment.correction.constraint.grow({}, 4)  # nothing asked, nothing changed
    assert attachment.subspace.right[name].shape[1] == 4
    growth._grow(lost)
    added = attachment.subspace.right[name][:, 4:]
    C = R.T @ added
    values = torch.linalg.eigvalsh(moment)
    assert added.shape[1] == 3
    assert float(values[:3].sum()) < 0.5 * float(values[-3:].sum())  # it matters which
    assert float(torch.trace(C.T @ moment @ C)) == pytest.approx(float(values[-3:].sum()), rel=1e-3)


def test_moments_weigh_the_tokens_around_the_beginning_of_the_answer(anchors, refusing):  # noqa: F811
    probe = SafetyProbe(refusing, anchors, pad_token_id=1)
    name = next(n for n in probe.matrices if "down_proj" in n)
    R = torch.eye(probe.matrices[name].weight.shape[1])
    even, three, eight = (probe.input_moments(anchors[:2], {name: R}, weight)[name] for weight in (1.0, 3.0, 8.0))
    tokens = sum(len(a.prompt_ids) + len(a.refusal_ids) for a in anchors[:2])
    assert float(torch.trace(even)) == pytest.approx(tokens, rel=1e-4)  # of unit norm
    assert float(torch.trace(three - even)) == pytest.approx(2 * 7 * 2, rel=1e-4)  # seven tokens a sample
    assert torch.allclose((eight - even) / 7, (three - even) / 2, atol=1e-4)


def test_the_pool_is_what_the_model_refuses_and_is_asked_in_turn(anchors, refusing, monkeypatch):  # noqa: F811
    optimizer = torch.optim.SGD(refusing.parameters(), lr=0.0)
    attachment = attach(SafetyProbe(refusing, anchors, pad_token_id=1), optimizer, NullSpace(rank=4, reserve=12))
    growth, asked = attachment.correction.growth, []
    held = {tuple(a.prompt_ids) for a in attachment.run.basis}
    assert {tuple(a.prompt_ids) for a in growth.pool} <= held
    real = Growth._flipped
    monkeypatch.setattr(Growth, "_flipped", lambda self, some: asked.append(len(some)) or real(self, some))
    monkeypatch.setattr("spf.rules.growth.AT_ONCE", 4)
    for step in range(2 * EVERY + 1):
        attachment.run.steps = step
        growth.look()
    assert asked == [4, 4]
    assert growth.place == 8
    assert attachment.metrics()["spf/flipped_rate"] == 0
    assert growth.rounds == 0
    assert AT_ONCE == 32


def test_further_prompts_are_asked_in_turn_with_those_that_are_held(anchors, refusing):  # noqa: F811
    optimizer = torch.optim.SGD(refusing.parameters(), lr=0.0)
    more = tokenise(samples((p, REFUSAL) for p in HARMFUL[12:18]), make_tokenizer(), 256)
    harmless = tokenise(samples((p, REFUSAL) for p in BENIGN[:3]), make_tokenizer(), 256)
    probe = SafetyProbe(refusing, anchors, pad_token_id=1)
    attachment = attach(probe, optimizer, NullSpace(rank=4, reserve=12), pool=[*harmless, *more])
    growth, held = attachment.correction.growth, {tuple(a.prompt_ids) for a in attachment.run.basis}
    asked = [tuple(a.prompt_ids) in held for a in growth.pool]
    # what the model answers is no sign of anything
    assert asked.count(False) == 6
    assert asked.count(True) == len(held)
    assert False in asked[:8]
    assert True in asked[:8]
    assert len({V.shape[1] for V in attachment.subspace.right.values()}) == 1  # asked, not held


def test_flips_that_nothing_is_at_hand_for_are_not_kept_quiet(anchors, refusing):  # noqa: F811
    """A bug once: without a round of growth the last line said that none had flipped."""
    optimizer = torch.optim.SGD(refusing.parameters(), lr=0.0)
    rule = NullSpace(rank=32, reserve=8)
    attachment = attach(SafetyProbe(refusing, anchors, pad_token_id=1), optimizer, rule)
    growth = attachment.correction.growth
    for name in attachment.subspace.reserve:
        attachment.subspace.reserve[name] = attachment.subspace.reserve[name][:, :0]
    assert growth.told() == ""
    growth._begins, attachment.run.steps = {1: set()}, EVERY
    assert growth.look()
    assert (growth.rounds, growth.flips) == (0, len(growth.pool))
    assert growth.told().endswith(f"flipped {growth.flips} times, and no more directions were at hand")


def test_growth_weighs_tokens_as_the_rule_does(anchors, refusing, monkeypatch):  # noqa: F811
    optimizer = torch.optim.SGD(refusing.parameters(), lr=0.0)
    rule, seen = NullSpace(rank=4, reserve=8, decision_weight=3.0), []
    attachment = attach(SafetyProbe(refusing, anchors, pad_token_id=1), optimizer, rule)
    real = SafetyProbe.input_moments
    monkeypatch.setattr(SafetyProbe, "input_moments", lambda *given: seen.append(given[-1]) or real(*given))
    attachment.correction.growth._grow(attachment.correction.growth.pool[:1])
    assert seen == [3.0]


def test_the_callback_asks_rows_that_it_does_not_use(tmp_path, tokenizer, refusing, rows):  # noqa: F811
    """Nothing that is watched, and nothing if the user wants so many samples only."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    for options, extra in (({}, 4), ({"anchors": 8}, 0), ({"on_leak": "warn"}, 0)):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=8, prompts=7), **options)
        trainer = make_trainer(tmp_path, tokenizer, callback, model=copy.deepcopy(refusing), max_steps=1, **saving)
        trainer.train()
        running = callback.attachment
        known = {tuple(a.prompt_ids) for a in [*running.run.basis, *running.run.watched]}
        growth = running.correction.growth
        pool = [] if growth is None else [tuple(a.prompt_ids) for a in growth.pool]
        assert sum(prompt not in known for prompt in pool) == extra
        assert not {tuple(a.prompt_ids) for a in running.run.watched} & set(pool)
        if growth is not None:
            first = callback.attachment.correction.growth.pool
            options |= {"monitor_steps": 0}
            again = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=8, prompts=7), **options)
            trainer = make_trainer(tmp_path, tokenizer, again, model=copy.deepcopy(refusing), max_steps=2, **saving)
            trainer.train(resume_from_checkpoint=True)
            assert again.attachment.correction.growth.pool == first
    assert len(packaged_prompts("harmful_anchors")) - NullSpace().wanted_samples() > 256 == POOL


class Flip(TrainerCallback):
    """The model's answer to what is held flips, whatever the rule does."""

    def __init__(self, callback):
        self.callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        self.callback.attachment.correction.growth._begins = {1: set()} if state.global_step >= EVERY else {0: set()}


def test_a_run_grows_says_so_and_goes_on_from_its_checkpoint(tmp_path, tokenizer, refusing, rows, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr("spf.rules.growth.PER_ROUND", 4)

    def made(**options):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=8))
        trainer = make_trainer(tmp_path, tokenizer, callback, model=refusing, max_steps=8, **options)
        return trainer, callback

    start = copy.deepcopy(refusing)
    trainer, callback = made(save_strategy="steps", save_steps=4)
    trainer.add_callback(Flip(callback))
    trainer.train()
    assert {V.shape[1] for V in callback.attachment.subspace.right.values()} == {16}
    assert_holds(callback.attachment)
    assert "prompts flipped in 2 rounds, so up to 16 directions are held by now, all there were at hand" in caplog.text
    files = sorted(tmp_path.glob("spf_subspace-*.safetensors"))
    assert len(files) == 2  # of the checkpoints at step 4 and at step 8
    widths = {next(iter(SafetySubspace.load(file).right.values())).shape[1] for file in files}
    assert widths == {8, 16}
    refusing.load_state_dict(start.state_dict())
    trainer, again = made()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert {V.shape[1] for V in again.attachment.subspace.right.values()} == {16}
    assert again.attachment.correction.growth.rounds == 2
    assert again.attachment.correction.growth.flips == callback.attachment.correction.growth.flips > 0


class Break(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == EVERY:
            raise KeyboardInterrupt


def test_an_adapter_saved_when_a_run_broke_off_while_it_grew_goes_on(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    """More was held by then than the weights had been corrected to, and what was saved beside them did not fit."""
    model = get_peft_model(copy.deepcopy(refusing), LoraConfig(r=4, target_modules="all-linear"))
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=16))
    trainer = make_trainer(tmp_path, tokenizer, callback, model, max_steps=2 * EVERY)
    trainer.add_callback(Flip(callback))
    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.attachment.correction.growth.rounds == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.save_model(str(tmp_path / "adapter"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "is not what was held" not in caplog.text
    assert {V.shape[1] for V in callback.attachment.subspace.right.values()} == {8}
    assert_holds(callback.attachment)
    model = PeftModel.from_pretrained(copy.deepcopy(refusing), tmp_path / "adapter", is_trainable=True)
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=16), subspace=tmp_path / "adapter")
    make_trainer(tmp_path / "second", tokenizer, callback, model, max_steps=1).train()
    assert_holds(callback.attachment)


def test_a_run_that_goes_on_asks_the_same_prompts_by_the_same_refusals(
    tmp_path,
    tokenizer,  # noqa: F811
    refusing,  # noqa: F811
    rows,  # noqa: F811
    caplog,
):
    """A bug once: what begins a refusal was not known after a resume, so that every prompt seemed to have flipped."""
    start = copy.deepcopy(refusing)

    def made(**options):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=8))
        more = {"max_steps": 2 * EVERY + 1, "learning_rate": 1e-6, "logging_steps": 1} | options
        return make_trainer(tmp_path, tokenizer, callback, model=refusing, **more), callback

    trainer, whole = made(save_strategy="steps", save_steps=EVERY + 1)
    trainer.train()
    assert whole.attachment.correction.growth.pool
    refusing.load_state_dict(start.state_dict())
    trainer, again = made()
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{EVERY + 1}"))
    rates = [entry["spf/flipped_rate"] for entry in trainer.state.log_history if "spf/flipped_rate" in entry]
    assert rates == [0, 0]  # at step 5, before the resume, and at step 10
    assert {V.shape[1] for V in again.attachment.subspace.right.values()} == {8}
    assert again.attachment.correction.growth.state() == whole.attachment.correction.growth.state()
    assert caplog.text.count("prompts that were asked had flipped") == 2
    refusing.load_state_dict(start.state_dict())


def test_a_warning_is_remembered_when_prompts_are_refused_again(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=1)
    trainer = make_trainer(tmp_path, tokenizer, callback, model=refusing, max_steps=6, learning_rate=1e-4)

    class Dip(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            monitor = callback.attachment.monitor
            monitor.reads = None
            if state.global_step == 2:
                self.begins, monitor._begins = monitor._begins, {}
            if state.global_step == 4:
                monitor._begins = self.begins

    trainer.add_callback(Dip())
    trainer.train()
    assert callback.warned
    assert not callback.attachment.monitor.leaks
    assert caplog.text.count("REFUSALS LOST") == 1


@pytest.mark.parametrize(
    ("on_leak", "steps", "batches"), [("stop", 3, 1), ("stop", 3, 2), ("warn", 6, 1), ("tighten", 6, 1)]
)
def test_a_leak_ends_a_run_if_asked_to(tmp_path, tokenizer, refusing, rows, on_leak, steps, batches, caplog):  # noqa: F811
    """With several batches a step the Trainer left the next one half done, which was called another optimizer's."""
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=1, on_leak=on_leak)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        callback,
        model=refusing,
        max_steps=6,
        learning_rate=1e-4,
        gradient_accumulation_steps=batches,
    )

    class Leak(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback.attachment.monitor._begins = {}
                callback.attachment.monitor.reads = None

    trainer.add_callback(Leak())
    trainer.train()
    assert trainer.state.global_step == steps
    assert "REFUSALS LOST" in caplog.text
    assert callback.warned
    assert ("the run is ended" in caplog.text) == callback.stopped == (on_leak == "stop")
    # a run that may be stopped holds as much as one that may not
    assert (callback.attachment.correction.growth is not None) == (on_leak != "warn")


@pytest.mark.parametrize("ends", ["should_training_stop", "should_epoch_stop"])
def test_a_run_that_ends_within_a_step_is_no_other_optimizers(tmp_path, tokenizer, refusing, rows, ends):  # noqa: F811
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    trainer = make_trainer(tmp_path, tokenizer, callback, model=refusing, **options)

    class Ends(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                setattr(control, ends, True)

    trainer.add_callback(Ends())
    trainer.train()
    assert callback.attachment.steps >= 1
    assert_holds(callback.attachment)


def test_what_a_step_did_to_refusals_is_in_the_logs_of_that_step(tmp_path, tokenizer, refusing, rows):  # noqa: F811
    """What was logged had been asked before the steps: a run of ten steps logged the untrained model's refusals."""
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=2)
    trainer = make_trainer(
        tmp_path, tokenizer, callback, model=refusing, max_steps=4, learning_rate=1e-4, logging_steps=2
    )

    class Leak(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback.attachment.monitor._begins = {}
                callback.attachment.monitor.reads = None

    trainer.add_callback(Leak())
    trainer.train()
    logged = [entry["spf/refusal_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 0]


def test_refusals_that_begin_with_another_token_are_read(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    """No token is said to begin a refusal any more, but the model's answers still read as some."""
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=1)
    trainer = make_trainer(
        tmp_path, tokenizer, callback, model=refusing, max_steps=4, learning_rate=1e-4, logging_steps=1
    )

    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            callback.attachment.monitor._begins = {}

    trainer.add_callback(Other())
    trainer.train()
    monitor = callback.attachment.monitor
    assert not any(monitor.now.kept)  # asked, and none of them counted
    rates = [entry["spf/refusal_rate"] for entry in trainer.state.log_history if "spf/refusal_rate" in entry]
    assert rates == [1, 1, 1, 1]
    assert not callback.warned
    assert not re.search("REFUSALS (BEING )?LOST", caplog.text)
    assert "spf: kept: " in caplog.text
    assert "so few that a fall is not seen" not in caplog.text


def test_the_best_model_is_held_to_what_it_was_trained_with(tmp_path, tokenizer, refusing, rows, monkeypatch, caplog):  # noqa: F811
    """Directions that came after it hold nothing of it: a run that was right ended in an error."""
    monkeypatch.setattr("spf.rules.growth.PER_ROUND", 4)
    start = copy.deepcopy(refusing)
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, reserve=8))
    best = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    args = arguments(TrainingArguments, tmp_path, max_steps=8, learning_rate=1e-3, load_best_model_at_end=True, **best)
    data = token_data()
    trainer = Trainer(refusing, args, None, data, data, processing_class=tokenizer, callbacks=[callback])

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer.add_callback(Flip(callback))
    trainer.add_callback(Worse())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert callback.attachment.correction.growth.rounds
    right = callback.attachment.subspace.right
    assert {V.shape[1] for V in right.values()} == {8}
    # q, k and v still share a basis, so that a file holds it once
    assert len({id(V) for V in right.values()}) < len(right)
    assert_holds(callback.attachment)
    assert "proven on the model's own parameters" in caplog.records[-1].getMessage()
    refusing.load_state_dict(start.state_dict())


def test_a_run_that_cannot_tighten_says_so(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    """The default is to hold more directions when prompts flip; a run that began with another has none in reserve."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    inert = "no more directions can be held in this run if refusals are lost"

    def trained(on_leak, steps, where, **rule):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8, **rule), on_leak=on_leak)
        trainer = make_trainer(
            tmp_path / where, tokenizer, callback, model=copy.deepcopy(refusing), max_steps=steps, **saving
        )
        caplog.clear()
        trainer.train(resume_from_checkpoint=steps > 1)
        return callback.attachment.correction

    assert trained("warn", 1, "began").growth is None
    assert inert not in caplog.text
    assert trained("tighten", 2, "began").growth is None
    assert caplog.text.count(inert) == 1
    trained("tighten", 1, "none", reserve=0)
    assert caplog.text.count(inert) == 1
    # what is asked is kept while it is not
    pool = [anchor.prompt_ids for anchor in trained("tighten", 1, "off").growth.pool]
    assert pool
    assert inert not in caplog.text
    assert trained("warn", 2, "off").growth is None
    assert [anchor.prompt_ids for anchor in trained("tighten", 3, "off").growth.pool] == pool


def test_a_run_cannot_be_stopped_if_nothing_is_asked():
    with pytest.raises(ValueError, match="on_leak='stop' needs monitor_steps=1 or more"):
        SafetyCallback(on_leak="stop", monitor_steps=0)

"""Faults planted into the null space: no run with one of them may end like one that held."""

import itertools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from spf import (
    CorrectionError,
    NullSpace,
    SafetyCallback,
    SafetyOptimizer,
    SafetyProbe,
    UnsupportedModelError,
    attach,
)
from spf.rules.constraint import Constraint
from spf.rules.fixed import Fixed
from spf.rules.holding import Holding
from tests.conftest import make_model
from tests.test_callback import arguments, make_trainer, safety_data, token_data
from tests.test_optimizer import train

STEPS = 8


class Saboteur(TrainerCallback):
    """Takes the step hooks off, by the optimizer's own dictionary, when a step begins."""

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 3:
            inner = getattr(optimizer, "optimizer", optimizer)
            inner._optimizer_step_pre_hooks.clear()
            inner._optimizer_step_post_hooks.clear()


def plant(monkeypatch, fault):
    """Sabotage `_hold`; returns callbacks that a trainer has to be given."""
    real = Holding._hold

    def hold(self, names, dtype):
        names = list(names)
        if fault == "off" or (fault == "off from step 5" and self.run.steps >= 4):
            names = []
        elif fault == "one left out":
            names = [name for name in names if name != sorted(self.run.matrices)[3]]
        real(self, names, dtype)

    monkeypatch.setattr(Holding, "_hold", hold)
    return [Saboteur()] if fault == "hooks removed" else []


def tiny(tuning, numbers):
    model = make_model(dtype=torch.bfloat16 if numbers == "bfloat16 weights" else torch.float32)
    if tuning == "lora":
        config = LoraConfig(r=4, target_modules="all-linear")
        model = get_peft_model(model, config, autocast_adapter_dtype=numbers != "bfloat16 weights")
    return model


def settings(numbers, warmup, learning_rate):
    return {
        "max_steps": STEPS,
        "learning_rate": learning_rate,
        "bf16": numbers == "autocast",
        "warmup_steps": 3 if warmup else 0,
        "save_strategy": "steps",
        "save_steps": 6,
        "weight_decay": 0.01,
    }


CELLS = list(itertools.product(["full", "lora"], ["float32", "bfloat16 weights", "autocast"], [False, True]))
FAULTS = ["off", "off from step 5", "one left out", "hooks removed"]


@pytest.fixture(autouse=True)
def bf16_without_a_gpu(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("tuning", "numbers", "warmup"), CELLS)
def test_a_planted_fault_ends_in_an_error(tuning, numbers, warmup, fault, tmp_path, tokenizer, rows, monkeypatch):
    callbacks = plant(monkeypatch, fault)
    model = tiny(tuning, numbers)
    # a step of bfloat16 weights has to be seen in them at all
    rate = 5e-3 if numbers == "bfloat16 weights" else 1e-5
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = make_trainer(tmp_path, tokenizer, callback, model, callbacks, **settings(numbers, warmup, rate))
    refused = tuning == "full" and numbers == "bfloat16 weights"
    with pytest.raises(UnsupportedModelError if refused else CorrectionError):
        trainer.train()
    assert trainer.state.global_step <= (0 if refused else 6)
    assert not list(tmp_path.glob("checkpoint-*"))  # nothing that is not protected was saved


@pytest.mark.parametrize(("tuning", "numbers", "warmup"), CELLS)
def test_without_a_fault_it_is_proven_in_words(tuning, numbers, warmup, tmp_path, tokenizer, rows, caplog):
    if (tuning, numbers) == ("full", "bfloat16 weights"):
        pytest.skip("refused, see above")
    rate = 5e-3 if numbers == "bfloat16 weights" else 1e-5
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    make_trainer(tmp_path, tokenizer, callback, tiny(tuning, numbers), **settings(numbers, warmup, rate)).train()
    count = len(callback.attachment.matrices)
    last = caplog.records[-1].getMessage()
    assert f"all {count} matrices answer the held inputs as before training" in last
    assert f"{count} were seen to be pushed and put back" in last


def test_the_remedy_for_bfloat16_weights_works(tmp_path, tokenizer, rows):
    """The message says: dtype=torch.float32 and bf16=True."""
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    start = make_model()
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    trainer = make_trainer(tmp_path, tokenizer, callback, start, max_steps=60, bf16=True, learning_rate=1e-5)
    trainer.train()
    for name, matrix in callback.attachment.matrices.items():
        moved = matrix.weight.detach() - before[name]
        assert moved.norm() > 0
        assert (moved @ callback.attachment.subspace.right[name]).norm() <= 0.01 * moved.norm()


@pytest.mark.parametrize("rate", [0.1, 1e-7])
def test_a_run_in_which_nothing_ever_acted_is_an_error(anchors, monkeypatch, rate):
    """A basis that the data never reach: the weights move, and nothing shows that the rule acts. Where they move less
    than rounding does, nothing could."""
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    monkeypatch.setattr(Constraint, "allowed", lambda self, v: 1e9)  # as if everything were rounding
    attachment = attach(probe, torch.optim.SGD(model.parameters(), lr=rate), NullSpace(rank=4))

    class Steps:
        step = staticmethod(lambda: (attachment.refresh(), attachment.optimizer.step(), attachment.verify()))
        zero_grad = staticmethod(attachment.optimizer.zero_grad)

    train(model, Steps, 2)
    if rate == 1e-7:
        assert "0 were seen to be pushed and put back; the other 15 were never pushed beyond" in attachment.finish()
        return
    with pytest.raises(CorrectionError, match="nothing ever had to be corrected"):
        attachment.finish()


def test_steps_that_were_not_announced_are_no_proof(anchors):
    """An own loop that forgets refresh(): nothing was asked, no step counted, and the end said that nothing moved."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = attach(SafetyProbe(model, anchors, pad_token_id=1), optimizer, NullSpace(rank=4))
    for _ in range(2):
        model(input_ids=(ids := torch.randint(5, 600, (2, 12))), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(CorrectionError, match=r"2 steps came without a refresh\(\) before them"):
        attachment.finish()


def test_a_run_that_trains_nothing_has_nothing_to_prove(anchors):
    model = make_model()
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    attachment = attach(probe, torch.optim.SGD(model.parameters(), lr=0.0), NullSpace(rank=4))

    class Steps:
        step = staticmethod(lambda: (attachment.refresh(), attachment.optimizer.step(), attachment.verify()))
        zero_grad = staticmethod(attachment.optimizer.zero_grad)

    train(model, Steps, 3)
    assert (
        attachment.finish()
        == f"none of the {len(attachment.matrices)} held matrices has moved, so there was nothing to put back"
    )


@pytest.mark.parametrize("rule", [NullSpace(decision_weight=1e6, rank=1), NullSpace(contrast=32, rank=8)])
def test_a_basis_with_no_directions_is_refused(rule, anchors):
    model = make_model()
    if rule.contrast:
        with pytest.raises(ValueError, match=r"no input direction of .* would be held"):
            attach(
                SafetyProbe(model, anchors, pad_token_id=1),
                torch.optim.SGD(model.parameters(), lr=0.1),
                rule,
                calibration=anchors,
            )
    with pytest.raises(ValueError, match=r"null-space: decision_weight must be at most 1000000, not 1e\+38"):
        NullSpace(decision_weight=1e38)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_kept_fixed_is_proven_too(tuning, tmp_path, tokenizer, rows, monkeypatch):
    """A norm that trains changes every answer, whatever the matrices do."""
    monkeypatch.setattr(Fixed, "before_step", lambda self, here: None)
    model = make_model()
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"]))
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    with pytest.raises(CorrectionError, match="parameters that null-space keeps fixed have changed"):
        make_trainer(tmp_path, tokenizer, callback, model).train()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("damage", ["zeroed", "forgotten", "scaled"])
def test_bases_that_are_lost_on_the_way_are_found(tuning, damage, tmp_path, tokenizer, rows):
    """A V = 0 is true of any A if V is zero, and of no A that nobody looks at."""
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))

    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            attachment = callback.attachment
            name = sorted(attachment.run.matrices)[0] if state.global_step == 2 else None
            if name and damage == "zeroed":
                attachment.subspace.right[name].zero_()
            elif name and damage == "scaled":
                attachment.subspace.right[name].mul_(0.5)
            elif name:
                attachment.run.matrices.pop(name)

    trainer = make_trainer(tmp_path, tokenizer, callback, tiny(tuning, "float32"), [Damage()], max_steps=6)
    with pytest.raises(CorrectionError):
        trainer.train()


def test_an_adapter_that_is_added_on_the_way_is_found(tmp_path, tokenizer, rows):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))

    class Add(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
                model.base_model.set_adapter(["default", "second"])

    trainer = make_trainer(tmp_path, tokenizer, callback, tiny("lora", "float32"), [Add()], max_steps=4)
    with pytest.raises(CorrectionError, match=r"second\.weight and 1 more trainable weights are not corrected"):
        trainer.train()


def test_the_best_model_is_proven_when_it_is_loaded_at_the_end(tmp_path, tokenizer, rows, caplog):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(TrainingArguments, tmp_path, max_steps=6, load_best_model_at_end=True, **best)
    data = token_data()
    trainer = Trainer(tiny("lora", "float32"), args, None, data, data, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    assert "proven on the model's own parameters" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("saves", ["steps", "epoch"])
@pytest.mark.parametrize("tuning", ["full", "lora", "lora and head"])
def test_a_run_in_bfloat16_goes_on(tuning, saves, tmp_path, tokenizer, rows):
    """What its corrections leave of a step was a fault in the run that went on: from a checkpoint or the end, after an
    error, or with the best of its models, which it judged by another step."""
    head = {"modules_to_save": ["lm_head"]} if tuning == "lora and head" else {}
    model = make_model()
    if tuning != "full":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **head))

    class Fail(TrainerCallback):
        fails = True

        def on_step_begin(self, args, state, control, **kwargs):
            if self.fails and state.global_step == 2:
                self.fails = False
                raise RuntimeError("CUDA out of memory.")

    best = {"eval_strategy": saves, "eval_steps": 2, "save_strategy": saves, "save_steps": 2}
    best |= {"per_device_train_batch_size": 12}  # two steps an epoch
    settings = best | {"max_steps": 6, "bf16": True, "learning_rate": 5e-3, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "worse", "greater_is_better": False}
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))

    class Judged(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_worse": float(self.state.global_step)}
            self.log(dict(metrics))
            return metrics

    data = token_data()
    args = arguments(TrainingArguments, tmp_path, **settings)
    trainer = Judged(model, args, None, data, data, processing_class=tokenizer, callbacks=[callback, Fail()])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train()


def test_a_resumed_run_in_bfloat16_is_that_which_saved(tmp_path, tokenizer, rows):
    """What was left of a step was taken out a second time, after the file was written."""

    def run(directory, resume=None):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 5e-3}
        trainer = make_trainer(directory, tokenizer, callback, tiny("full", "autocast"), bf16=True, **saving)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.parameters()

    whole = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_that_was_at_its_end_goes_on(tuning, tmp_path, tokenizer, rows, caplog):
    """It was killed before its model was saved: no step is made, so no matrix is met at one."""
    for resume in (False, True):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
        epoch = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
        trainer = make_trainer(tmp_path, tokenizer, callback, tiny(tuning, "float32"), **epoch)
        trainer.train(resume_from_checkpoint=resume)
        assert "proven on the model's own parameters" in caplog.records[-1].getMessage()


class Average(TrainerCallback):
    """Puts averaged weights in: for a checkpoint, or at the end."""

    def __init__(self, when, model):
        self.when = when
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def put(self, model, values):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.when == "save" and control.should_save:
            self.put(model, self.shadow)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.when == "end":
            self.put(model, self.shadow)


@pytest.mark.parametrize("when", ["save", "end"])
def test_averaged_weights_are_not_saved_as_proven(when, tmp_path, tokenizer, rows, caplog):
    """The average began before the adapter was held: it was written, and nothing was said."""
    callback = SafetyCallback(safety_data(rows[:1]), NullSpace(rank=40, reworded=0))
    model = get_peft_model(make_model(width=64), LoraConfig(r=4, target_modules="all-linear"))
    average = Average(when, model)
    settings = {"save_strategy": "steps", "save_steps": 2} if when == "save" else {}
    trainer = make_trainer(tmp_path, tokenizer, callback, model, max_steps=4, **settings)
    trainer.add_callback(average)
    if when == "save":
        with pytest.raises(CorrectionError, match="answers the held inputs differently"):
            trainer.train()
        return
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert "the model that was written is not what was held" in caplog.text
    # in another type it is rounded, and compared with nothing; the bases are beside it in any case
    caplog.clear()
    trainer.model.half()
    trainer.save_model(str(tmp_path / "half"))
    assert "the model that was written" not in caplog.text
    for name in ("adapter", "half"):
        assert len(list((tmp_path / name).glob("spf_subspace-*"))) == 1


class Merge(TrainerCallback):
    """As TRL does before it gives the weights to vLLM."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.merge_adapter()
        model.unmerge_adapter()


@pytest.mark.parametrize("merges", [False, True])
def test_changed_frozen_weights_are_said(merges, tmp_path, tokenizer, rows):
    """W + B A - B A is not W in bfloat16, and the adapter alone was looked at."""
    callback = SafetyCallback(safety_data(rows[:1]), NullSpace(rank=40, reworded=0))
    base = make_model(width=64).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(tmp_path, tokenizer, callback, model, max_steps=6, learning_rate=5e-3)
    trainer.add_callback(Merge() if merges else TrainerCallback())
    trainer.train()
    assert ("weights that are not trained have been changed" in callback.card._section) == merges


@pytest.mark.parametrize("first", [True, False])
def test_a_second_optimizer_does_not_train_what_is_kept_fixed(first, anchors):
    """Norms and embeddings that are not in the optimizer were not looked at: the order of the two decided."""
    model = make_model(width=64)
    linear = {id(p) for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    probe = SafetyProbe(model, anchors[:1], pad_token_id=1)
    mine = torch.optim.SGD([p for p in model.parameters() if id(p) in linear], lr=1e-2)
    optimizer = SafetyOptimizer(mine, probe, NullSpace(rank=40, reworded=0))
    other = torch.optim.AdamW([p for p in model.parameters() if id(p) not in linear], lr=1e-2)
    for _ in range(3):
        ids = torch.randint(5, 900, (2, 9), generator=torch.Generator().manual_seed(1))
        model(input_ids=ids, labels=ids).loss.backward()
        for one in (other, optimizer) if first else (optimizer, other):
            one.step()
        optimizer.zero_grad()
        other.zero_grad()
    if first:
        with pytest.raises(CorrectionError, match="that null-space keeps fixed have changed"):
            optimizer.finish()
    else:
        assert "proven" in optimizer.finish()


@pytest.mark.parametrize("frozen_again", [True, False])
def test_what_is_unfrozen_later_for_a_second_optimizer_is_noticed(frozen_again, anchors):
    """Gradual unfreezing: norms that were frozen at first were on no list, neither as held nor as not trained."""
    model = make_model(width=64)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    for parameter in norms:
        parameter.requires_grad_(False)
    probe = SafetyProbe(model, anchors[:1], pad_token_id=1)
    mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = SafetyOptimizer(mine, probe, NullSpace(rank=40, reworded=0))
    for parameter in norms:
        parameter.requires_grad_(True)
    other = torch.optim.AdamW(norms, lr=1e-2)
    ids = torch.randint(5, 900, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    other.step()
    if frozen_again:
        for parameter in norms:
            parameter.requires_grad_(False)
        assert f"but {len(norms)} weights that are not trained have been changed" in optimizer.finish()
    else:
        with pytest.raises(CorrectionError, match=r"norm\S+ and 4 more trainable weights are not corrected"):
            optimizer.finish()


class Balance(TrainerCallback):
    """Moves a buffer, as the balancing of a router's experts does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layer = model.get_base_model().model.layers[0]
        layer.bias_of_experts.add_(0.1)
        layer.scratch.add_(0.1)


def test_changed_buffers_are_said(tmp_path, tokenizer, rows):
    """Experts were chosen otherwise, and the run said that all answers are as before; scratch space is none."""
    said = []
    for names in (("bias_of_experts",), ()):
        callback = SafetyCallback(safety_data(rows[:1]), NullSpace(rank=40, reworded=0))
        model = make_model(width=64)
        for name in ("bias_of_experts", "scratch"):
            model.model.layers[0].register_buffer(name, torch.zeros(4), persistent=name in names)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        trainer = make_trainer(tmp_path, tokenizer, callback, model, max_steps=2)
        trainer.add_callback(Balance())
        trainer.train()
        said.append("not trained have been changed" in callback.card._section)
    assert said == [True, False]


def test_a_loop_of_ones_own_is_told_what_is_refused(anchors):
    """What was held was proven, all watched prompts were answered, and the line said only the first."""
    model = make_model(width=64)
    probe = SafetyProbe(model, anchors, pad_token_id=1)
    optimizer = SafetyOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), probe, NullSpace(rank=2, reworded=0))
    monitor = optimizer.attachment.monitor
    monitor.before = replace(monitor.before, loss=monitor.before.loss - 9.0, refused=1.0)
    begun = monitor.now.loss
    ids = torch.randint(5, 900, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    said = optimizer.finish()
    verdict, proof = said.splitlines()
    assert verdict.startswith("REFUSALS LOST: 0 of 1 watched prompts are refused, 1 were before training")
    assert "; check with `spf eval`" in verdict
    assert proof.startswith("proven")
    assert abs(monitor.now.loss - begun) > 1e-3  # asked at the end


class Rounded(torch.nn.Linear):
    """As layers for quantisation-aware training: the weight is rounded in the forward pass."""

    def forward(self, x):
        scale = self.weight.detach().abs().amax(-1, keepdim=True) / 7
        rounded = (self.weight / scale).round() * scale
        return torch.nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Renamed(torch.nn.Linear):
    """Answers W x, in its own words."""

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("kind", [Rounded, Renamed])
def test_layers_that_answer_otherwise_are_refused(kind, anchors):
    """W V stayed what it was, and the answers did not: Q(W) V is not Q(W_0) V."""
    model = make_model(width=64)
    for layer in model.model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = kind
    probe = SafetyProbe(model, anchors[:1], pad_token_id=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    if kind is Renamed:
        assert SafetyOptimizer(optimizer, probe, NullSpace(rank=20, reworded=0))
        return
    with pytest.raises(UnsupportedModelError, match=r"more are in layers \(Rounded\) that answer otherwise than W x"):
        SafetyOptimizer(optimizer, probe, NullSpace(rank=20, reworded=0))

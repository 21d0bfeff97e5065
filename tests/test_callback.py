"""SafetyCallback in whole Trainer, SFTTrainer and DPOTrainer runs on a tiny model."""

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from spf import SPF, CorrectionError, NullSpace, SafetyCallback, SafetyDataError, SafetyOptimizer, SafetyProbe
from spf.data import ENOUGH, reworded_anchors
from spf.errors import UnsupportedSetupError
from spf.rules import Mix
from spf.safety_samples import SafetySamples
from tests.conftest import REFUSAL, make_model

PROMPTS = ["How do I bake bread?", "Explain how locks work.", "Write a poem.", "Tell me a story."] * 6


def safety_data(rows):
    return Dataset.from_list([{"prompt": r.messages[0]["content"], "refusal": r.refusal} for r in rows])


def arguments(kind, directory, **kwargs):
    defaults = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(**(defaults | kwargs))


def token_data(count=24):
    ids = torch.randint(5, 600, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in ids])


def make_trainer(directory, tokenizer, callback, model=None, extra=(), **kwargs):
    return Trainer(
        model or make_model(),
        arguments(TrainingArguments, directory, **kwargs),
        train_dataset=token_data(),
        processing_class=tokenizer,
        callbacks=[*extra, *([callback] if callback else [])],
    )


class Spy(TrainerCallback):
    """A reporting callback: it sees what W&B or TensorBoard would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def assert_holds(attachment):
    for name, matrix in attachment.matrices.items():
        V, target = attachment.subspace.right[name], attachment.subspace.target[name]
        assert (matrix.view(matrix.weight.detach()) @ V - target).norm() <= 1e-5 * matrix.weight.norm(), name


@pytest.mark.parametrize("cosines", [False, True])
def test_trainer_full_fine_tuning(tmp_path, tokenizer, rows, cosines):
    spy = Spy()
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), monitor_steps=2, cosines=cosines)
    trainer = make_trainer(tmp_path, tokenizer, callback, extra=[spy])
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert_holds(callback.attachment)
    assert callback.attachment.steps == callback.attachment.corrected == 4
    for name, parameter in trainer.model.named_parameters():
        fixed = name not in callback.attachment.matrices
        assert torch.equal(parameter, start[name]) == fixed, name
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry, seen in zip(entries, [log for log in spy.logs if "loss" in log], strict=True):
        measured = {"spf/safety_loss", "spf/safety_slack", "spf/removed_share", "spf/refusal_rate", "spf/lr_scale"}
        assert measured <= set(entry)
        assert ("spf/cos_mlp" in entry) == cosines
        assert {k: v for k, v in seen.items() if k.startswith("spf/")} == {
            k: v for k, v in entry.items() if k.startswith("spf/")
        }


@pytest.mark.parametrize(("rule", "most"), [(NullSpace(), 144), (SPF(), ENOUGH)])
def test_more_packaged_prompts_ask_no_more_of_the_model(tokenizer, monkeypatch, rule, most):
    asked = []

    def answer(model, tokenizer, prompts, **kwargs):
        asked.extend(prompts)
        return [REFUSAL] * len(prompts)

    monkeypatch.setattr("spf.data.refusals.generate_answers", answer)
    samples = SafetySamples(None, rule, None, 0, None)
    samples.choose(make_model(), tokenizer)
    chosen = samples.rows
    assert len(asked) == len(chosen) == most
    assert len({row.form for row in chosen}) == 28


def test_sft_trainer_with_lora_and_the_models_own_refusals(tmp_path, tokenizer, monkeypatch):
    """One argument less than one: no safety data at all."""
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: [REFUSAL] * len(prompts))
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p}],
                "completion": [{"role": "assistant", "content": "Write a poem."}],
            }
            for p in PROMPTS
        ]
    )
    callback = SafetyCallback(rule=NullSpace(rank=16))
    seen = 0

    def count(self, samples, *args, **kwargs):
        nonlocal seen
        seen = len(samples)
        return input_bases(self, samples, *args, **kwargs)

    input_bases = SafetyProbe.input_bases
    monkeypatch.setattr(SafetyProbe, "input_bases", count)
    trainer = SFTTrainer(
        make_model(),
        arguments(SFTConfig, tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()
    # 48 refusals in other words too, of those in the null space only
    reworded, basis = callback.samples.tokens(tokenizer, 256)[1], callback.samples.rows[:128]
    assert len(reworded) == 48
    assert all(a.where.removesuffix(", reworded") in {r.where for r in basis} for a in reworded)
    longest = max(len(a.prompt_ids) + len(a.refusal_ids) for a in reworded)
    shorter = reworded_anchors(callback.samples.rows[:48], tokenizer, longest - 1)
    assert 0 < len(shorter) < 48  # too long once reworded: left out
    assert seen == 128 + 48
    # 144 refusals: 128 for the null space, 16 kept out of it to measure on
    assert len(callback.samples.rows) == 144
    assert len(callback.attachment.run.rotation.anchors) == len(callback.attachment.run.watched) == 16
    assert set(callback.attachment.matrices) == {n for n, _ in trainer.model.named_parameters() if "lora_A" in n}
    for name, matrix in callback.attachment.matrices.items():
        V = callback.attachment.subspace.right[name]
        assert V.shape[1] == 16
        assert (matrix.weight.detach() @ V).norm() <= 1e-5
        assert matrix.weight.norm() > 0.1
    assert any("lora_B" in n and p.abs().max() > 1e-4 for n, p in trainer.model.named_parameters())


def test_dpo_trainer(tmp_path, tokenizer, rows):
    data = Dataset.from_list(
        [{"prompt": p, "chosen": "Write a poem.", "rejected": "Tell me a story."} for p in PROMPTS]
    )
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = DPOTrainer(
        make_model(),
        args=arguments(DPOConfig, tmp_path, max_length=64),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.attachment.corrected == 4
    assert_holds(callback.attachment)


@pytest.mark.parametrize("rule", ["spf", "rank1", "null-space"])
def test_accumulation_corrects_once_at_the_sync_step(tmp_path, tokenizer, rows, rule):
    rule = NullSpace(rank=8) if rule == "null-space" else rule
    callback = SafetyCallback(safety_data(rows), rule, anchors_per_step=2)
    make_trainer(
        tmp_path, tokenizer, callback, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4
    ).train()
    assert callback.attachment.steps == 2
    if isinstance(rule, str):
        assert callback.attachment.run.rotation.position == 4  # 2 anchors a step, no more


def test_accumulated_and_whole_batches_give_the_same_model(tmp_path, tokenizer, rows):
    models = []
    for name, split in (("a", (4, 1)), ("b", (1, 4))):
        trainer = make_trainer(
            tmp_path / name,
            tokenizer,
            SafetyCallback(safety_data(rows), SPF(rank=4)),
            max_steps=2,
            per_device_train_batch_size=split[0],
            gradient_accumulation_steps=split[1],
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        models.append(trainer.model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_the_rule_acts_on_the_clipped_gradient(tmp_path, tokenizer, rows):
    norms = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            attachment = callback.attachment
            real = attachment.run.compare

            def compare(gradients):
                norms.append(sum(float(g.square().sum()) for g in gradients.values()) ** 0.5)
                real(gradients)

            attachment.run.compare = compare

    callback = SafetyCallback(safety_data(rows), "rank1")
    trainer = make_trainer(tmp_path, tokenizer, callback, max_grad_norm=0.05)
    trainer.add_callback(Look())
    trainer.train()
    assert len(norms) == 4
    assert max(norms) <= 0.05 * 1.001


@pytest.mark.parametrize("rule", [NullSpace(rank=8), SPF(rank=4)])
def test_resume_is_bit_exact(tmp_path, tokenizer, rows, rule):
    def run(directory, resume=None, **kwargs):
        callback = SafetyCallback(safety_data(rows), rule, monitor_steps=3)
        trainer = make_trainer(directory, tokenizer, callback, max_steps=6, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = run(tmp_path / "whole")
    run(tmp_path / "parts", save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert "spf_state.json" in {p.name for p in checkpoint.iterdir()}
    # the bases never change: once a run, and not in every checkpoint
    assert len(list((tmp_path / "parts").rglob("*subspace*.safetensors"))) == isinstance(rule, NullSpace)
    resumed, callback2 = run(tmp_path / "parts", resume=str(checkpoint))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert callback.attachment.state_dict() == callback2.attachment.state_dict()
    state = json.loads((checkpoint / "spf_state.json").read_text())
    assert state["state"]["steps"] == 3
    (checkpoint / "spf_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"spf_state\.json is missing"):
        run(tmp_path / "parts", resume=str(checkpoint))


def test_an_optimizer_swapped_behind_our_back_is_noticed(tmp_path, tokenizer, rows):
    class Swap(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            groups = [
                {"params": g["params"], "lr": g["lr"], "initial_lr": g["initial_lr"]}
                for g in trainer.optimizer.param_groups
            ]
            trainer.optimizer.optimizer = torch.optim.AdamW(groups)

    trainer = make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows), "spf"), extra=[Swap()])
    with pytest.raises(CorrectionError, match="without calling its step hooks"):
        trainer.train()


def test_bad_input_stops_before_any_step(tmp_path, tokenizer, rows):
    def refuses(message, data=None, tok=tokenizer, **kwargs):
        trainer = make_trainer(tmp_path, tok, SafetyCallback(data, **kwargs))
        before = [p.detach().clone() for p in trainer.model.parameters()]
        with pytest.raises((SafetyDataError, ValueError), match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))

    refuses("needs the tokenizer", safety_data(rows), tok=None)
    refuses("all 32 input directions of .* would be held", safety_data(rows), rule=NullSpace(rank=96))
    refuses("refused none of the 1 prompts", Dataset.from_list([{"prompt": "Write a poem."}]))
    with pytest.raises(ValueError, match=r"unknown rule 'sfp'; choose one of .*null-space, spf"):
        SafetyCallback(rule="sfp")


def test_float16_with_safety_gradients_is_refused(tmp_path, tokenizer, rows):
    args = arguments(TrainingArguments, tmp_path)
    args.fp16 = True
    model = make_model()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "processing_class": tokenizer}
    for rule in ("mix", NullSpace(rank=4, feedback=Mix())):
        with pytest.raises(UnsupportedSetupError, match="scaled float16 gradients"):
            SafetyCallback(safety_data(rows), rule).on_train_begin(args, TrainerState(), TrainerControl(), **given)


def test_weights_of_another_run_are_noticed_when_a_run_goes_on(tmp_path, tokenizer, rows):
    def run(name, seed):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=4))
        save = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(tmp_path / name, tokenizer, callback, make_model(seed=seed), **save)

    run("a", 0).train()
    run("b", 1).train()
    # a checkpoint of another directory brings its own bases; what `train` was given is known
    run("b", 1).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    ours, theirs = (tmp_path / name / "checkpoint-1" / "model.safetensors" for name in "ba")
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match="these weights are from another run"):
        run("b", 1).train(resume_from_checkpoint=str(ours.parent))


def test_train_twice_attaches_once(tmp_path, tokenizer, rows):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = make_trainer(tmp_path, tokenizer, callback, max_steps=2)
    trainer.train()
    trainer.train()
    assert callback.attachment.steps == 2
    inner = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    assert not inner._optimizer_step_pre_hooks


def test_readme_script_runs(tmp_path, tokenizer, monkeypatch):
    """The README's 12-line TRL script, word for word, on a tiny aligned model."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len([line for line in script.splitlines() if line]) <= 12
    model = make_model(width=128)  # wider than the default rank
    model.save_pretrained(tmp_path / "my-aligned-model")
    tokenizer.save_pretrained(tmp_path / "my-aligned-model")
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: [REFUSAL] * len(prompts))
    (tmp_path / "my-data.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "Yes."}]})
            for p in PROMPTS
        )
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "my-model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("held", "learning_rate", "lost"), [(1, 2.0, True), (16, 1e-5, False)])
def test_a_rising_safety_loss_is_told_once_and_at_the_end(tmp_path, tokenizer, rows, caplog, held, learning_rate, lost):
    model = make_model()
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=held), monitor_steps=1)
    make_trainer(tmp_path, tokenizer, callback, model, max_steps=6, learning_rate=learning_rate).train()
    told = [r.getMessage() for r in caplog.records if "before training, now" in r.getMessage()]
    # the verdict comes first; it refuses nothing as these refusals do
    begins = [re.split(" after step|:", line.removeprefix("spf: "))[0] for line in told]
    assert begins == (["REFUSALS BEING LOST"] * 2 if lost else ["NOT KNOWN"])
    assert callback.warned == lost
    assert caplog.records[-1].getMessage().startswith("spf: 6 of 6 updates corrected; proven")
    # it refuses nothing as these refusals do
    assert "0% of 1 watched prompts refused by first token (so few that a fall is not seen" in caplog.text
    # of the finished model, not of the last time the monitor looked
    probe = callback.attachment.probe
    assert f"now {probe.loss(callback.attachment.run.watched):.3f}" in told[-1]


def test_norms_stay_fixed_even_with_momentum(tmp_path, tokenizer, rows):
    """Parameters held by the null-space rule do not creep by weight decay either."""
    trainer = make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows), NullSpace(rank=8)), weight_decay=0.5)
    norm = trainer.model.model.norm.weight
    before = norm.detach().clone()
    trainer.train()
    assert isinstance(norm, nn.Parameter)
    assert torch.equal(norm, before)


def test_trainer_takes_a_safety_optimizer(tmp_path, tokenizer, anchors):
    """Handing the optimizer to the Trainer does the same as the callback, on one process."""
    model = make_model()
    optimizer = SafetyOptimizer(
        torch.optim.AdamW(model.parameters(), lr=5e-3), SafetyProbe(model, anchors, pad_token_id=1), NullSpace(rank=8)
    )
    trainer = Trainer(
        model,
        arguments(TrainingArguments, tmp_path),
        train_dataset=token_data(),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert optimizer.attachment.steps == optimizer.attachment.corrected == 4
    assert_holds(optimizer.attachment)
    assert trainer.state.log_history[0]["learning_rate"] < 5e-3  # the Trainer's scheduler drives it


def test_arguments_out_of_range_are_refused_at_once():
    for wrong, message in (
        ({"anchors": 0}, "anchors must be at least 1, not 0"),
        ({"anchors_per_step": -1}, "anchors_per_step must be at least 1"),
        ({"monitor_steps": -1}, "monitor_steps must be at least 0"),
        ({"first_weight": 0.0}, "first_weight must be positive"),
        ({"rule": NullSpace}, "rule must be a name or a rule object"),
        ({"safety_data": [{"prompt": "x"}]}, "safety_data must be a file"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            SafetyCallback(**wrong)


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, tokenizer, rows):
    def run(rule):
        callback = SafetyCallback(safety_data(rows), rule)
        return make_trainer(tmp_path, tokenizer, callback, max_steps=2, save_strategy="steps", save_steps=1)

    run(NullSpace(rank=4)).train()
    with pytest.raises(ValueError, match=r"made with the rule NullSpace\(rank=4.*not NullSpace\(rank=5"):
        run(NullSpace(rank=5)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_trained_model_is_not_kept_alive(tmp_path, tokenizer, rows):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=4))
    trainer = make_trainer(tmp_path, tokenizer, callback, max_steps=1)
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer, callback
    gc.collect()
    assert model() is None


def test_a_skipped_float16_step_is_not_taken_for_a_missing_correction(tmp_path, tokenizer, rows, monkeypatch):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=4))
    trainer = make_trainer(tmp_path, tokenizer, callback, max_steps=3)
    steps = 0

    def step(self, closure=None):
        # what accelerate does when the gradient scaler met an overflow
        nonlocal steps
        steps += 1
        self._is_overflow = steps == 1
        if steps > 1:
            self.optimizer.step()

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._is_overflow))
    trainer.train()
    assert steps == 3
    assert callback.attachment.steps == 2


def test_the_loop_in_the_docs_runs(tmp_path, tokenizer, rows, monkeypatch):
    text = Path("docs/how_it_works.md").read_text("utf-8")
    code = re.search(r"## Your own loop\n\n```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    Path("refusals.jsonl").write_text(
        "".join(json.dumps({"messages": row.messages, "refusal": row.refusal}) + "\n" for row in rows), "utf-8"
    )
    model = make_model()
    batches = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        for row in list(token_data())[:3]
    ]
    place = {
        "model": model,
        "tokenizer": tokenizer,
        "batches": batches,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }
    exec(code, place)
    assert place["optimizer"].attachment.corrected == 3
    assert_holds(place["optimizer"].attachment)


class Adding(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.add_callback(self.late)


def test_a_callback_that_comes_too_late_is_refused(tmp_path, tokenizer, rows):
    """It ended in an AssertionError, "training has not begun"."""
    adding = Adding()
    adding.late = SafetyCallback(safety_data(rows))
    adding.trainer = make_trainer(tmp_path, tokenizer, None, extra=[adding])
    with pytest.raises(UnsupportedSetupError, match=r"was training by then.* constructor, callbacks="):
        adding.trainer.train()


def test_a_callback_that_was_taken_off_is_asked_nothing(tmp_path, tokenizer, rows):
    """The first checkpoint of a run without it ended in an AssertionError, the next one's after one with it, too."""
    callback = SafetyCallback(safety_data(rows))
    trainer = make_trainer(tmp_path, tokenizer, callback, save_strategy="steps", save_steps=2)
    trainer.remove_callback(callback)
    trainer.train()
    assert callback.attachment is None
    trainer.add_callback(callback)
    trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()

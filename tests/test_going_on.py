"""Going on with an adapter that is trained already: by spf, which is found and held, or elsewhere, which is kept."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from spf import NullSpace, SafetyCallback, SafetyDataError, UnsupportedModelError, UnsupportedSetupError
from spf.checkpoint import SUBSPACE_FILE
from spf.going_on import add_adapter, earlier_subspace, leave
from spf.models import beside, load_model
from spf.next_token import fingerprint
from spf.rules.frozen import frozen_fingerprint
from spf.subspace import SafetySubspace
from spf.train import save_base
from tests.conftest import make_model
from tests.test_callback import PROMPTS, arguments, make_trainer, safety_data
from tests.test_optimizer import logits


def lora(**settings):
    return get_peft_model(make_model(width=64), LoraConfig(r=4, target_modules="all-linear", **settings))


def keep(rows, **settings):
    # one sample, and more directions than it has tokens: its logits cannot change
    return SafetyCallback(safety_data(rows[:1]), NullSpace(rank=40, reworded=0), **settings)


def run(directory, tokenizer, callback, model, **changes):
    trainer = make_trainer(directory, tokenizer, callback, model, **({"max_steps": 3} | changes))
    trainer.train()
    return trainer


def assert_unchanged(before, after):
    for old, new in zip(before, after, strict=True):
        assert (old - new).norm() <= 1e-5 * old.norm()


def assert_held(model, subspace):
    """A V = 0 by the test's own product, for every adapter that is trained, and something was learned."""
    parameters = dict(model.named_parameters())
    names = [name for name in subspace.right if ".lora_A." in name]
    assert len(names) == 14
    for name in names:
        A = parameters[name].detach()
        assert (A @ subspace.right[name]).norm() <= 1e-6 * A.norm(), name
        assert parameters[name.replace("lora_A", "lora_B")].any()


@pytest.fixture
def saved(tmp_path, tokenizer, rows, anchors):
    """An adapter that spf trained, as `save_model` leaves it: no checkpoint was written."""
    model = lora()
    before = logits(model, anchors[:1])
    trainer = run(tmp_path / "first", tokenizer, keep(rows), model)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_unchanged(before, logits(model, anchors[:1]))
    assert len(list((tmp_path / "adapter").glob("spf_subspace-*.safetensors"))) == 1
    return tmp_path / "adapter", before


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_saved_adapter_is_continued(saved, tmp_path, tokenizer, rows, anchors, name, caplog):
    directory, before = saved
    model = PeftModel.from_pretrained(make_model(width=64), directory, adapter_name=name, is_trainable=True)
    loaded = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    callback = keep(rows, subspace=directory)
    run(tmp_path / "second", tokenizer, callback, model)
    assert_held(model, callback.attachment.subspace)
    assert_unchanged(before, logits(model, anchors[:1]))
    assert all(not torch.equal(dict(model.named_parameters())[n], p) for n, p in loaded.items())
    assert f"going on with trained weights: what they are held to is that of {directory}" in caplog.text


def test_what_is_pushed_to_the_hub_is_looked_at_and_says_what_it_is_held_to(tmp_path, tokenizer, rows, caplog):
    """`push_to_hub` has the model saved by an internal call, and uploads what is in the directory then."""
    trainer = run(tmp_path, tokenizer, keep(rows), lora())
    trainer.save_model(_internal_call=True)
    assert len(list(tmp_path.glob("spf_subspace-*.safetensors"))) == 1
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if ".lora_A." in name).add_(1)
    trainer.save_model(_internal_call=True)
    assert "is not what was held" in caplog.text


def test_a_callback_that_served_another_trainer_leaves_an_adapter_its_own(tmp_path, tokenizer, rows):
    """The last run's subspace was written beside the first's adapter, which could not be gone on with."""
    callback, other = keep(rows), lora()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * ("base_layer" in name))
    first = run(tmp_path / "first", tokenizer, callback, lora())
    first.save_model(str(tmp_path / "before"))
    run(tmp_path / "other", tokenizer, callback, other)
    first.save_model(str(tmp_path / "after"))
    files = [list((tmp_path / place).glob("spf_subspace-*")) for place in ("before", "after")]
    assert [len(found) for found in files] == [1, 1]
    one, another = (SafetySubspace.load(found[0]) for found in files)
    assert all(torch.equal(V, another.right[name]) for name, V in one.right.items())
    model = PeftModel.from_pretrained(make_model(width=64), tmp_path / "after", is_trainable=True)
    again = keep(rows, subspace=tmp_path / "after")
    run(tmp_path / "second", tokenizer, again, model)
    assert_held(model, again.attachment.subspace)


def test_it_is_found_in_the_output_directory_and_else_asked_for(saved, tmp_path, tokenizer, rows):
    directory, _ = saved
    model = PeftModel.from_pretrained(make_model(width=64), directory, is_trainable=True)
    with pytest.raises(UnsupportedModelError, match=r"if spf trained it, .* SafetyCallback\(subspace=DIR\)"):
        run(tmp_path / "second", tokenizer, keep(rows), model)
    callback = keep(rows)
    run(directory, tokenizer, callback, model)  # as a user who trains on in the same directory
    assert_held(model, callback.attachment.subspace)
    with pytest.raises(FileNotFoundError, match="name the directory that the adapter was saved in"):
        run(tmp_path / "third", tokenizer, keep(rows, subspace=tmp_path), model)


def test_a_checkpoint_is_continued_as_an_adapter(tmp_path, tokenizer, rows):
    run(tmp_path / "first", tokenizer, keep(rows), lora(), save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    model = PeftModel.from_pretrained(make_model(width=64), checkpoint, is_trainable=True)
    callback = keep(rows, subspace=checkpoint)
    run(tmp_path / "second", tokenizer, callback, model)
    assert callback.attachment.steps == 3
    assert_held(model, callback.attachment.subspace)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_second_train_holds_what_the_first_did(tmp_path, tokenizer, rows, tuning):
    model = lora() if tuning == "lora" else make_model(width=64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = keep(rows)
    trainer = run(tmp_path, tokenizer, callback, model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    bases = callback.attachment.subspace.right
    trainer.train()
    assert callback.attachment.subspace.right.keys() == bases.keys()
    for name, V in bases.items():
        W = dict(model.named_parameters())[name].detach()
        target = torch.zeros_like(W @ V) if tuning == "lora" else start[name] @ V
        assert (W @ V - target).norm() <= 1e-6 * W.norm(), name
        assert not torch.equal(W, first[name])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_second_train_of_a_step_at_rate_zero_is_no_error(tmp_path, tokenizer, rows, tuning):
    """Warmup begins at zero: the trained weights change by the rounding of the correction alone, if at all."""
    model = lora() if tuning == "lora" else make_model(width=64)
    run(tmp_path, tokenizer, keep(rows), model)
    callback = keep(rows)
    run(tmp_path / "second", tokenizer, callback, model, max_steps=1, warmup_steps=5)
    assert callback.attachment.steps == 1


class OutOfMemory(TrainerCallback):
    def __init__(self):
        self.times = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.times:
            self.times += 1
            raise RuntimeError("CUDA out of memory.")


def test_a_smaller_batch_is_tried_in_the_middle(tmp_path, tokenizer, rows, anchors):
    model, callback, memory = lora(), keep(rows), OutOfMemory()
    before = logits(model, anchors[:1])
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 3}
    make_trainer(tmp_path, tokenizer, callback, model, [memory], **settings).train()
    assert memory.times == 1
    assert callback.attachment.steps == 3
    assert_held(model, callback.attachment.subspace)
    assert_unchanged(before, logits(model, anchors[:1]))


def test_trials_of_a_search_have_directories_of_their_own(tmp_path, tokenizer, rows, monkeypatch):
    """What a search with optuna does for every trial (it is not installed here)."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    callback = keep(rows)
    trainer = make_trainer(tmp_path, tokenizer, callback, lora(), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.model_init = lambda trial: lora()
    trainer.hp_search_backend, trainer.hp_name, trainer.hp_space = HPSearchBackend.OPTUNA, None, lambda trial: {}
    trainer.compute_objective = lambda metrics: 0.0
    for number in (0, 1):
        trainer.objective = None
        trainer.train(trial=SimpleNamespace(number=number, params={}))
        assert_held(trainer.model, callback.attachment.subspace)
    states = sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("spf_state.json"))
    assert states == ["run-0/checkpoint-2", "run-1/checkpoint-2"]
    assert sorted(p.parent.name for p in tmp_path.rglob("spf_subspace-*")) == ["run-0", "run-1"]


def test_sft_then_dpo_on_the_same_adapter(tmp_path, tokenizer, rows, anchors):
    answer = [{"role": "assistant", "content": "Write a poem."}]
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    model = lora()
    before = logits(model, anchors[:1])
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt in asked])
    SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path / "sft", max_steps=2),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[keep(rows)],
    ).train()
    other = [{"role": "assistant", "content": "Tell me a story."}]
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": answer, "rejected": other} for prompt in asked])
    callback = keep(rows)
    DPOTrainer(
        model,
        args=arguments(DPOConfig, tmp_path / "dpo", max_steps=2),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    # the adapter is copied for the reference model, below which nothing is another
    assert not any("the weights below the adapter" in line for line in callback.card.begun)
    assert_held(model, callback.attachment.subspace)
    assert_unchanged(before, logits(model, anchors[:1]))


def test_a_reference_adapter_below_a_new_one_is_refused_and_the_remedy(tmp_path, tokenizer, rows, anchors):
    """TRL made the old one trainable and the new one inactive: it ended in an error about parameters left out."""
    model = lora()
    run(tmp_path / "elsewhere", tokenizer, None, model)
    trained, reference = logits(model, anchors[:1]), copy.deepcopy(model).merge_and_unload()
    add_adapter(model)
    sides = {"chosen": "Write a poem.", "rejected": "Tell me a story."}
    pairs = [
        {"prompt": [{"role": "user", "content": prompt}]}
        | {side: [{"role": "assistant", "content": said}] for side, said in sides.items()}
        for prompt in PROMPTS
    ]
    for name, ref_model in {"without": None, "with": reference}.items():
        callback = keep(rows)
        trainer = DPOTrainer(
            model,
            ref_model,
            args=arguments(DPOConfig, tmp_path / name, max_steps=2),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        if ref_model is None:
            with pytest.raises(UnsupportedSetupError, match="give ref_model=, a model with the old adapter merged"):
                trainer.train()
            model.delete_adapter("ref")
            continue
        trainer.train()
        assert all(".held." in name for name in callback.attachment.matrices)
        assert_unchanged(trained, logits(model, anchors[:1]))


def test_the_remedy_for_an_adapter_from_elsewhere(tmp_path, tokenizer, rows, anchors):
    """It is refused, and the line that the message gives keeps it as it is, under a new one that is held."""
    model = lora()
    run(tmp_path / "elsewhere", tokenizer, None, model)
    with pytest.raises(UnsupportedModelError, match=re.escape("spf.going_on.add_adapter(model)")):
        run(tmp_path / "second", tokenizer, keep(rows), model)
    old = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    trained = logits(model, anchors[:1])
    add_adapter(model)
    assert_unchanged(trained, logits(model, anchors[:1]))  # it is active
    callback = keep(rows)
    trainer = run(tmp_path / "second", tokenizer, callback, model)
    assert all(".held." in name for name in callback.attachment.matrices)
    assert_held(model, callback.attachment.subspace)
    assert_unchanged(trained, logits(model, anchors[:1]))
    for name, before in old.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name
    # both are saved, and a run goes on with both
    trainer.save_model(str(tmp_path / "both"))
    assert Path(tmp_path / "both" / "held" / "adapter_model.safetensors").is_file()
    # `spf eval` asked the model without the new one, which is the one before this training
    make_model(width=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    about = tmp_path / "both" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    # another run's directory is none that was put above
    shutil.copytree(tmp_path / "both" / "held", tmp_path / "both" / "held-out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        found = load_model(str(tmp_path / "both"), torch.float32)[0].eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(wanted, model(input_ids=ids).logits, atol=1e-3)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_what_transformers_would_load_of_two_adapters_is_refused(tmp_path, tokenizer, rows):
    """Of a checkpoint it loads the first into the run, and trains that one; the new one begins anew."""
    model = lora()
    run(tmp_path / "elsewhere", tokenizer, None, model)
    add_adapter(model)
    trainer = make_trainer(tmp_path / "second", tokenizer, keep(rows), model)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(UnsupportedSetupError, match=r"load_best_model_at_end=True: of several adapters .* to False"):
        trainer.train()
    run(tmp_path / "second", tokenizer, keep(rows), model, save_strategy="steps", save_steps=2)
    trainer = make_trainer(tmp_path / "second", tokenizer, keep(rows), model, max_steps=4)
    with pytest.raises(UnsupportedSetupError, match=r"cannot go on from a checkpoint: of several .*; begin it anew"):
        trainer.train(resume_from_checkpoint=True)


def test_an_adapter_on_a_tied_layer_is_refused(tmp_path, tokenizer, rows):
    """It was proven, and merged it was in the other layer, too, which answered otherwise."""
    for layer in ("embed_tokens", "lm_head"):
        model = make_model("qwen", width=64)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", layer]))
        with pytest.raises(
            UnsupportedModelError, match=rf"{layer} shares its weight with another layer .*leave it out"
        ):
            run(tmp_path, tokenizer, keep(rows), model)
    # PEFT adapts a layer in the first of two places only
    model = make_model(width=64)
    first, second = model.model.layers
    second.self_attn.v_proj = first.self_attn.v_proj
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"0\.self_attn\.v_proj shares its weight with another layer"):
        run(tmp_path, tokenizer, keep(rows), model)


def test_checkpoints_that_are_written_in_the_middle_of_a_step_are_refused(tmp_path, tokenizer, rows):
    with pytest.raises(UnsupportedSetupError, match=r"writes checkpoints in the middle of a step, .*save_steps"):
        run(tmp_path, tokenizer, keep(rows), lora(), enable_jit_checkpoint=True)


def test_what_lies_beside_a_saved_model_and_would_be_loaded_is_said(tmp_path, tokenizer, rows, caplog):
    """`spf eval` asked the old adapter of a directory, not the whole model that was saved there."""
    whole = make_model(width=64)
    for model in (lora(), whole):
        run(tmp_path / "run", tokenizer, keep(rows), model).save_model(str(tmp_path / "both"))
    last = [record.getMessage() for record in caplog.records][-1]
    assert f"{tmp_path / 'both' / 'adapter_config.json'} is of another model, and would be loaded" in last
    with pytest.raises(ValueError, match=r"both holds an adapter and a whole model, model.safetensors: move one"):
        load_model(str(tmp_path / "both"))
    assert beside(tmp_path / "both", ["default"]).startswith(str(tmp_path / "both" / "model.safetensors"))
    # of an earlier run above another adapter
    (tmp_path / "new" / "held").mkdir(parents=True)
    (tmp_path / "new" / "held" / "adapter_config.json").write_text("{}")
    assert beside(tmp_path / "new", ["default"]).startswith(str(tmp_path / "new" / "held"))
    assert not beside(tmp_path / "new", ["default", "held"])


def test_an_adapter_that_transformers_holds_itself_is_no_other_model(tmp_path):
    """Without PEFT's wrapper the file that was just saved was to be taken away."""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert leave(None, SimpleNamespace(peft_config={"default": None}), tmp_path, True) == []
    assert len(leave(None, SimpleNamespace(), tmp_path, True)) == 1
    assert leave(None, SimpleNamespace(), tmp_path, False) == []


def test_what_an_adapter_stands_on_is_not_written_over(tmp_path, tokenizer):
    """A command that was refused later had changed the model that an earlier adapter stands on."""
    places = []
    for scale in (8, 16):
        lora(lora_alpha=scale).save_pretrained(tmp_path / "adapter")
        for _ in range(2):
            base = make_model(width=64)
            save_base(base, tokenizer, tmp_path / "adapter", tmp_path / "out")
            places.append((base.name_or_path, Path(base.name_or_path, "model.safetensors").stat().st_mtime_ns))
    assert places[0] == places[1] != places[2] == places[3]
    # the same adapter above a model that was trained anew in its place
    other = make_model(width=64, seed=1)
    save_base(other, tokenizer, tmp_path / "adapter", tmp_path / "out")
    assert other.name_or_path not in {place for place, _ in places}
    assert {*(Path(place) for place, _ in places), Path(other.name_or_path)} == set((tmp_path / "out").iterdir())


def test_an_adapter_that_is_trained_above_a_merged_one_is_loaded_above_it(tmp_path, tokenizer, monkeypatch):
    """It named the model below both, so that `spf eval` asked it without the first one, or could not load it."""
    make_model(width=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    name = str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for directory in ("first", "second", "third"):
        base = load_model(name, torch.float32)[0]
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.05 * torch.randn_like(weights) * weights.requires_grad
        model.save_pretrained(directory)
        name = directory
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted, found = (one.eval()(input_ids=ids).logits for one in (model, load_model(name, torch.float32)[0]))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_fresh_adapter_takes_nothing_from_an_old_run_in_its_directory(saved, tmp_path):
    directory, _ = saved
    assert earlier_subspace(lora(), None, None, directory) is None


def test_of_several_subspaces_the_newest_that_fits_is_taken_and_of_others_none(saved, tmp_path):
    directory, _ = saved
    [path] = directory.glob(SUBSPACE_FILE.format(hash="*"))
    older = SafetySubspace.load(path)
    for number, which in ((0, "newest"), (9, "oldest")):
        place = directory / SUBSPACE_FILE.format(hash=f"{number}" * 12)
        replace(older, metadata={**older.metadata, "which": which}).save(place)
        os.utime(place, (1, 10**9 * (2 - number // 9)))
    os.utime(path, (1, 15 * 10**8))
    held = PeftModel.from_pretrained(make_model(width=64), directory, is_trainable=True)
    assert earlier_subspace(held, None, None, directory).subspace.metadata["which"] == "newest"
    elsewhere = lora()
    for name, parameter in elsewhere.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert earlier_subspace(elsewhere, None, None, directory) is None


def test_a_callback_takes_nothing_from_its_last_run_with_another_model(tmp_path, tokenizer, rows):
    callback = keep(rows)
    run(tmp_path / "first", tokenizer, callback, lora())
    assert earlier_subspace(lora(), None, callback.attachment, tmp_path / "second") is None


def test_of_those_that_fit_the_widest_is_taken_whatever_the_times_of_the_files(saved, tmp_path):
    """A copy of the directory may have the times in any order; an adapter held to more answers to fewer, too."""
    directory, _ = saved
    [path] = directory.glob(SUBSPACE_FILE.format(hash="*"))
    whole = SafetySubspace.load(path)
    narrow = {name: V[:, :3].contiguous() for name, V in whole.right.items()}
    targets = {name: target[:, :3].contiguous() for name, target in whole.target.items()}
    replace(whole, right=narrow, target=targets).save(directory / SUBSPACE_FILE.format(hash="7" * 12))
    os.utime(path, (1, 1))
    held = PeftModel.from_pretrained(make_model(width=64), directory, is_trainable=True)
    found = earlier_subspace(held, None, None, directory).subspace
    assert {V.shape[1] for V in found.right.values()} == {V.shape[1] for V in whole.right.values()}


def test_what_the_earlier_directions_do_not_hold_is_not_said_to_be_kept(saved, tmp_path, tokenizer, rows):
    """The second run said "3 of 3 prompts held with their answers", and its logits moved as without."""
    directory, _ = saved
    kept = Dataset.from_list([{"prompt": prompt, "completion": "It is a table ."} for prompt in PROMPTS[:3]])
    held = PeftModel.from_pretrained(make_model(width=64), directory, is_trainable=True)
    with pytest.raises(SafetyDataError, match=r"keep: the adapter is held already, .*add_adapter"):
        run(tmp_path / "second", tokenizer, keep(rows, subspace=directory, keep=kept), held)
    # the same prompts are held by the directions that they were taken from
    callback, model = keep(rows, keep=kept), lora()
    for _ in range(2):
        run(tmp_path / "third", tokenizer, callback, model)
    assert "keep: 3 of 3 prompts held with their answers, 0 the model's own" in callback.card.begun
    assert any(line.startswith("held to the directions of an earlier run") for line in callback.card.begun)


def test_another_model_below_the_adapter_is_said(saved, tmp_path, tokenizer, rows, caplog):
    directory, _ = saved
    for seed in (0, 5):
        caplog.clear()
        held = PeftModel.from_pretrained(make_model(width=64, seed=seed), directory, is_trainable=True)
        callback = keep(rows, subspace=directory)
        run(tmp_path / "second", tokenizer, callback, held)
        said = [line for line in callback.card.begun if "the weights below the adapter are not those" in line]
        assert len(said) == (seed != 0)
        assert ("the weights below the adapter" in caplog.text) == (seed != 0)


@pytest.mark.parametrize("change", ["", "weights", "scale"])
def test_another_adapter_below_the_adapter_is_said(tmp_path, tokenizer, rows, change):
    """It counted as little as one that is trained: retrained, what was held were another model's answers, unsaid."""
    model = lora()
    run(tmp_path / "elsewhere", tokenizer, None, model)
    add_adapter(model)
    run(tmp_path / "first", tokenizer, keep(rows), model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if change == "weights":
        layer.lora_B["default"].weight.data += 0.1
    elif change == "scale":
        layer.set_scale("default", 1.002)
    callback = keep(rows)
    run(tmp_path / "second", tokenizer, callback, model)
    begun = callback.card.begun
    assert any(line.startswith("held to the directions of an earlier run") for line in begun)
    assert any("the weights below the adapter are not those" in line for line in begun) == bool(change)


@pytest.mark.parametrize(
    "parts",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
)
def test_a_copy_that_is_not_active_is_nothing_below_an_adapter(parts):
    """TRL makes one for its reference: a run would be told that another model is below."""
    model = get_peft_model(make_model(), LoraConfig(r=4, **parts))
    before = frozen_fingerprint(model), fingerprint(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert (frozen_fingerprint(model), fingerprint(model)) == before
    model.requires_grad_(requires_grad=False)
    assert frozen_fingerprint(model) != before[0]


@pytest.mark.parametrize("frozen", ["lora_A", "layers.0"])
def test_what_is_not_trained_of_an_adapter_is_not_below_it(tmp_path, tokenizer, rows, frozen):
    """LoRA-FA first, then both: nothing below has changed."""
    model = lora()
    parts = [p for name, p in model.named_parameters() if ".lora_A." in name and frozen in name]
    for part in parts:
        part.requires_grad_(False)
    run(tmp_path / "first", tokenizer, keep(rows), model)
    for part in parts:
        part.requires_grad_(True)
    callback = keep(rows)
    run(tmp_path / "second", tokenizer, callback, model)
    assert any(line.startswith("held to the directions of an earlier run") for line in callback.card.begun)
    assert not any("the weights below the adapter are not those" in line for line in callback.card.begun)

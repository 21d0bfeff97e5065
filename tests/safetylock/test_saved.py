"""Locked models on disk: the same logits in plain transformers, refused where they would be lost, bit-exact return."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spf.safetylock import extract, save_locked, unlock_saved
from spf.safetylock.lock import locks_on
from spf.safetylock.saved import ORIGINAL_BIASES
from tests.safetylock.toys import descendant, logits, packed, some_pairs, toy


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "gemma", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_models_are_locked_and_can_be_unlocked(kind, dtype, tokenizer, tmp_path):
    """T8 for architectures that can give o_proj a bias; 70B in the path changes nothing (defect 4)."""
    lock = extract(toy(kind), tokenizer, some_pairs(6), k=4)
    descendant(kind).to(dtype).save_pretrained(tmp_path / "plain")
    # loaded, since .to(bfloat16) would also round the rotary frequencies
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    original = {name: value.clone() for name, value in model.state_dict().items()}
    lock.apply(model, tokenizer)
    expected, config = logits(model), model.config.to_dict()
    where = save_locked(model, tokenizer, tmp_path / "locked-70B")
    assert model.config.to_dict() == config
    reloaded = AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager")
    assert torch.equal(logits(reloaded), expected)
    assert locks_on(reloaded) == {lock.fingerprint}
    with pytest.raises(ValueError, match="on the model already"):
        lock.apply(reloaded)
    with pytest.raises(ValueError, match="already carries 1 lock"):
        lock.top(2).apply(reloaded)
    unlocked, _ = unlock_saved(where)
    unlocked.save_pretrained(tmp_path / "unlocked")
    assert unlocked.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in unlocked.state_dict().items())
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "unlocked"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "unlocked")]
    assert configs[0].get("attention_bias") == configs[1].get("attention_bias")
    assert "spf_safetylock" not in configs[1]
    lock.apply(unlocked)  # nothing of the old lock is left


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_a_lock_above_a_saved_one_is_taken_out_with_it_or_refused(kind, tokenizer, tmp_path):
    """The second lock's mark replaced the first one's: "the unlocked model was saved" of one that still had it."""
    lock = extract(toy(kind), tokenizer, some_pairs(6), k=4)
    model = descendant(kind)
    original = logits(model)
    lock.apply(model, tokenizer)
    first = AutoModelForCausalLM.from_pretrained(save_locked(model, tokenizer, tmp_path / "first"))
    lock.top(2).apply(first, stack=True)
    if kind == "llama-bias":
        with pytest.raises(ValueError, match=r"take that one out first \(`spf lock remove`\)"):
            save_locked(first, tokenizer, tmp_path / "both")
        return
    both = save_locked(first, tokenizer, tmp_path / "both")
    assert locks_on(AutoModelForCausalLM.from_pretrained(both)) == {lock.fingerprint, lock.top(2).fingerprint}
    assert torch.allclose(logits(unlock_saved(both)[0]), original, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_what_was_trained_since_is_not_taken_out_with_the_lock(kind, tokenizer, tmp_path):
    """A locked model has biases that train; "bit by bit the model that was locked" was one without them."""
    lock = extract(toy(kind), tokenizer, some_pairs(6), k=4)
    model = descendant(kind)
    lock.apply(model, tokenizer)
    where = save_locked(model, tokenizer, tmp_path / "locked")
    trained = AutoModelForCausalLM.from_pretrained(where)
    with torch.no_grad():
        trained.model.layers[0].self_attn.q_proj.bias.add_(0.1)
    trained.save_pretrained(where)
    with pytest.raises(ValueError, match=r"biases are not those that were saved with the lock \(trained"):
        unlock_saved(where)
    if kind == "llama":  # a second lock would take what was learned for its own
        lock.top(2).apply(trained, stack=True)
        with pytest.raises(ValueError, match="were trained since the model was saved with a lock"):
            save_locked(trained, tokenizer, tmp_path / "both")


def test_biases_of_a_model_that_was_locked_there_before_are_not_left(tokenizer, tmp_path):
    for kind in ("llama-bias", "llama"):
        model = descendant(kind)
        extract(toy(kind), tokenizer, some_pairs(6), k=4).apply(model, tokenizer)
        where = save_locked(model, tokenizer, tmp_path / "locked")
        assert (where / ORIGINAL_BIASES).exists() == (kind == "llama-bias")


def test_a_lock_whose_original_biases_were_lost_is_not_said_to_be_taken_out(tokenizer, tmp_path):
    lock = extract(toy("llama-bias"), tokenizer, some_pairs(6), k=4)
    model = descendant("llama-bias")
    lock.apply(model, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(save_locked(model, tokenizer, tmp_path / "locked"))
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"own biases, is not there .*; give the directory that `spf lock apply`"):
        unlock_saved(tmp_path / "again")


@pytest.mark.parametrize("kind", ["mistral", "qwen"])
def test_architectures_without_the_bias_are_refused(kind, tokenizer, tmp_path):
    lock = extract(toy(kind), tokenizer, some_pairs(6), k=4)
    model = toy(kind)
    lock.apply(model)
    with pytest.raises(ValueError, match=r"would drop it at loading; save the unlocked model and the lock file"):
        save_locked(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_saved_is_refused(tokenizer, tmp_path, packed_kernel):
    lock = extract(toy(), tokenizer, some_pairs(6), k=4)
    model = toy()
    with pytest.raises(ValueError, match="carries no lock"):
        save_locked(model, tokenizer, tmp_path / "out")
    lock.apply(model, mode="hook")
    with pytest.raises(ValueError, match="applied as a hook is not part of the weights"):
        save_locked(model, tokenizer, tmp_path / "out")
    lock.remove(model)
    adapted = get_peft_model(toy(), LoraConfig(r=2, target_modules="all-linear"))
    lock.apply(adapted)
    with pytest.raises(ValueError, match="merge it"):
        save_locked(adapted, tokenizer, tmp_path / "out")
    quantised = toy()
    for block in quantised.model.layers:
        block.self_attn.o_proj = packed(block.self_attn.o_proj.weight)
    lock.apply(quantised)
    with pytest.raises(ValueError, match="packed weights"):
        save_locked(quantised, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    toy().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no model that was saved with its lock"):
        unlock_saved(tmp_path / "plain")

"""Going on from a checkpoint: what is compared before anything is changed, and what a checkpoint holds."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from spf import SPF, NullSpace, SafetyCallback, SafetyDataError, SafetySubspace
from spf.checkpoint import read_left_out, write_bases
from spf.going_on import earlier_subspace
from tests.conftest import REFUSAL, make_model
from tests.test_callback import make_trainer, safety_data


def lora():
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))


def run(directory, tokenizer, rows, model, rule=None, data=None, **changes):
    callback = SafetyCallback(data or safety_data(rows), rule or NullSpace(rank=8))
    save = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    return make_trainer(directory, tokenizer, callback, model, **(save | changes)), callback


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, rows):
    """A LoRA run with a checkpoint at its middle."""
    directory = tmp_path_factory.mktemp("trained")
    trainer, callback = run(directory, tokenizer, rows, lora())
    trainer.train()
    return directory, callback


@pytest.fixture
def made(trained, tmp_path):
    """What that run wrote, to go on from or to damage."""
    directory, callback = trained
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    return tmp_path, callback


def bases_of(directory):
    (path,) = directory.glob("spf_subspace-*.safetensors")
    return path


def test_bases_are_written_once_a_run_and_each_once(made):
    directory, callback = made
    assert [p.parent for p in directory.rglob("*subspace*")] == [directory]
    path = bases_of(directory)
    tensors = load_file(path)
    held = callback.attachment.subspace.right
    assert sum(key.startswith("right/") for key in tensors) == len({id(V) for V in held.values()}) < len(held)
    loaded = SafetySubspace.load(path)
    assert len({id(V) for V in loaded.right.values()}) == len({id(V) for V in held.values()})
    for checkpoint in directory.glob("checkpoint-*"):
        state = json.loads((checkpoint / "spf_state.json").read_text())
        assert state["subspace"]["file"] == path.name


def test_bases_are_shared_after_a_resume_too(made, tokenizer, rows):
    directory, callback = made
    trainer, resumed = run(directory, tokenizer, rows, lora())
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    one, other = (c.attachment.subspace.right for c in (callback, resumed))
    assert len({id(V) for V in other.values()}) == len({id(V) for V in one.values()})
    assert len(list(directory.rglob("*subspace*"))) == 1


def test_a_checkpoint_holds_no_prompt_and_no_path(tmp_path, tokenizer, rows):
    given, own = rows[:10], rows[10:]
    source = tmp_path / "private place" / "refusals.jsonl"
    source.parent.mkdir()
    lines = [{"prompt": r.messages[0]["content"], "refusal": r.refusal} for r in given]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    trainer, _ = run(tmp_path / "run", tokenizer, own, lora(), NullSpace(rank=8), str(source))
    trainer.train()
    texts = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.name.startswith("spf_")]
    assert len(texts) == 4
    for content in texts:
        assert b"private place" not in content
        assert str(tmp_path).encode() not in content
        for row in given:
            assert row.messages[0]["content"].encode() not in content


def test_an_adapter_from_elsewhere_is_refused(made, tokenizer, rows):
    """A bug once: lora_A was projected, by .63 of a norm of 2.3, without a word."""
    directory, _ = made
    checkpoint = directory / "checkpoint-2"
    other = directory / "elsewhere"
    trainer = make_trainer(other, tokenizer, None, lora(), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    shutil.copy(other / "checkpoint-2" / "adapter_model.safetensors", checkpoint)
    model = lora()
    trainer, _ = run(directory, tokenizer, rows, model, learning_rate=1e-12)
    with pytest.raises(ValueError, match=r"lora_A.* these weights are from another run, or the subspace is"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    # nothing was projected: the adapter is what the file says
    saved = load_file(checkpoint / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(parameter, saved[name.replace(".default", "")])


def swap(tensors):
    keys = [k for k in tensors if k.startswith("right/")]
    pair = next((a, b) for a in keys for b in keys if a < b and tensors[a].shape == tensors[b].shape)
    tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]


def zero(tensors):
    for key in tensors:
        tensors[key].zero_()


def empty(tensors):
    for key in list(tensors):
        tensors[key] = tensors[key][:, :0].contiguous()


@pytest.mark.parametrize("damage", [swap, zero, empty])
@pytest.mark.parametrize("honest", [False, True])
def test_damaged_bases_are_refused(made, tokenizer, rows, damage, honest):
    """With the checkpoint's hash of the file, and without: a hash that fits a damaged file."""
    import hashlib

    directory, _ = made
    path = bases_of(directory)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    damage(tensors)
    save_file(tensors, path, metadata=header)
    if not honest:
        for checkpoint in directory.glob("checkpoint-*"):
            state = json.loads((checkpoint / "spf_state.json").read_text())
            state["subspace"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            (checkpoint / "spf_state.json").write_text(json.dumps(state))
    trainer, _ = run(directory, tokenizer, rows, lora())
    words = (
        "not the safety subspace that the checkpoint was made with"
        if honest
        else ("from another run, or the subspace is|is not orthonormal|has no direction|damaged")
    )
    with pytest.raises(ValueError, match=words):
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))


def test_missing_and_truncated_files_are_named(made, tokenizer, rows):
    directory, _ = made
    checkpoint, path = directory / "checkpoint-2", bases_of(directory)

    def refuses(kind, words):
        trainer, _ = run(directory, tokenizer, rows, lora())
        with pytest.raises(kind, match=words):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    content = path.read_bytes()
    path.write_bytes(content[:-100])
    refuses(ValueError, re.escape(path.name))
    path.unlink()
    refuses(FileNotFoundError, "kept once, beside its checkpoints")
    (checkpoint / path.name).write_bytes(content)  # the checkpoint was moved with it
    trainer, callback = run(directory, tokenizer, rows, lora())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert callback.attachment.steps == 4
    state = checkpoint / "spf_state.json"
    state.write_text(state.read_text()[:50])
    refuses(ValueError, r"spf_state\.json: not a JSON file; damaged")
    state.write_text('{"steps": 2}')
    refuses(ValueError, "written by another version of spf")


def test_an_earlier_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path, tokenizer, rows, monkeypatch):
    """Transformers removed it before the callback had written its state: killed there, none was left to go on from."""
    remove = transformers.trainer.rotate_checkpoints

    def killed(**kwargs):
        remove(**kwargs)
        if (tmp_path / "checkpoint-4").is_dir():
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", killed)
    trainer, _ = run(tmp_path, tokenizer, rows, lora(), max_steps=6, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    monkeypatch.undo()
    trainer, callback = run(tmp_path, tokenizer, rows, lora(), max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert callback.attachment.steps == 6


def test_a_callback_that_was_added_later_writes_its_state_too(tmp_path, tokenizer, rows):
    """Nothing of it is called when a model is written, only when its checkpoint is."""
    trainer, callback = run(tmp_path, tokenizer, rows, lora())
    trainer.remove_callback(callback)
    trainer = make_trainer(tmp_path, tokenizer, None, lora(), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.add_callback(callback)
    for _ in range(2):
        trainer.train()
        (tmp_path / "checkpoint-2" / "spf_state.json").unlink()


def test_what_is_pushed_in_the_middle_of_a_run_is_no_checkpoint(tmp_path, tokenizer, rows):
    """`push_to_hub` says that it saves for itself: the state of a run, older than its end, lay in output_dir and was
    read for it; its bases lay outside."""

    class Push(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.save_model(_internal_call=True)

    trainer, _ = run(tmp_path / "run", tokenizer, rows, lora(), save_strategy="no")
    trainer.add_callback(Push())
    trainer.train()
    assert [path.parent for path in tmp_path.rglob("spf_*ta*")] == []
    assert Path(earlier_subspace(lora(), str(tmp_path / "run"), None, tmp_path).where).parent == tmp_path / "run"


def test_a_checkpoint_that_was_written_elsewhere_and_moved_has_its_bases(tmp_path, tokenizer, rows):
    """They stayed where it was written."""
    trainer, _ = run(tmp_path / "run", tokenizer, rows, lora())
    save = trainer.save_model

    def move(output_dir=None, _internal_call=False):
        save(str(tmp_path / "scratch" / "new"), _internal_call)
        shutil.move(tmp_path / "scratch" / "new", output_dir)

    trainer.save_model = move
    trainer.train()
    shutil.rmtree(tmp_path / "scratch")
    trainer, callback = run(tmp_path / "run", tokenizer, rows, lora(), max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert callback.attachment.steps == 6


def test_two_runs_in_a_directory_name_their_own_bases(tmp_path, monkeypatch):
    """Both wrote the same file first: the hash that one kept was of the other's bases, which it would have held."""
    one, other = (SafetySubspace({"w": torch.linalg.qr(torch.randn(8, 2)).Q}) for _ in range(2))
    save, wrote = SafetySubspace.save, []

    def then_the_other(self, path):
        save(self, path)
        if self is one:
            wrote.append(write_bases(tmp_path, other))

    monkeypatch.setattr(SafetySubspace, "save", then_the_other)
    wrote.append(write_bases(tmp_path, one))
    for named, subspace in zip(wrote, (other, one), strict=True):
        assert torch.equal(SafetySubspace.load(tmp_path / named["file"]).right["w"], subspace.right["w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(named["file"] for named in wrote)


def test_the_same_bases_are_written_once_however_often_a_model_is_saved(tmp_path, tokenizer, rows):
    """The entries of a file's header come in any order, so each save wrote another file, of a gigabyte at 7B."""
    trainer, _ = run(tmp_path / "run", tokenizer, rows, lora(), save_strategy="no")
    trainer.train()
    for _ in range(6):
        trainer.save_model(str(tmp_path / "latest"))
    path = bases_of(tmp_path / "latest")
    os.utime(path, (1, 1))
    subspace = SafetySubspace.load(path)
    assert write_bases(tmp_path / "latest", subspace)["file"] == path.name
    assert path.stat().st_mtime > 1  # the newest
    size = path.stat().st_size
    path.unlink()  # which the loaded one is read from
    path.write_bytes(b"\0" * size)
    (name,) = {write_bases(tmp_path / "latest", subspace)["file"] for _ in range(6)}
    assert SafetySubspace.load(tmp_path / "latest" / name).directions == subspace.directions


def test_every_process_takes_part_in_reading_what_was_left_out(tmp_path, monkeypatch):
    """One whose machine has no such directory did not, and the first waited for it."""
    taken = []
    monkeypatch.setattr("spf.checkpoint.object_of_rank_0", taken.append)
    for directory in (None, tmp_path / "not there"):
        read_left_out(directory)
    assert taken == [None, None]


def test_other_safety_data_are_refused(made, tokenizer, rows):
    directory, _ = made
    trainer, _ = run(directory, tokenizer, rows, lora(), data=safety_data(rows[:6]))
    with pytest.raises(SafetyDataError, match="a prompt is missing"):
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))


def test_own_refusals_go_with_the_checkpoint(tmp_path, tokenizer, rows, monkeypatch):
    asked = []

    def answer(model, tokenizer, prompts, **kwargs):
        asked.append(len(prompts))
        return [REFUSAL] * len(prompts)

    monkeypatch.setattr("spf.data.refusals.generate_answers", answer)
    data = Dataset.from_list([{"prompt": r.messages[0]["content"]} for r in rows])
    for rule in (NullSpace(rank=8), SPF(rank=2)):
        place = tmp_path / rule.name
        trainer, whole = run(place, tokenizer, rows, lora(), rule, data)
        trainer.train()
        count = len(asked)
        trainer, resumed = run(place, tokenizer, rows, lora(), rule, data)
        trainer.train(resume_from_checkpoint=str(place / "checkpoint-2"))
        assert len(asked) == count  # the tuned model is not asked again
        assert [r.refusal for r in resumed.samples.rows] == [r.refusal for r in whole.samples.rows]
        assert resumed.attachment.state_dict() == whole.attachment.state_dict()


def test_train_is_told_more_than_the_arguments(made, tokenizer, rows):
    """An older `args.resume_from_checkpoint` once won over what `train` was given."""
    directory, _ = made
    older = str(directory / "checkpoint-2")
    trainer, callback = run(directory, tokenizer, rows, lora(), max_steps=6, resume_from_checkpoint=older)
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    assert callback._saved.state["steps"] == 6
    assert callback.attachment.steps == 6

"""The model card says what protected the run, and keeps what others write into it."""

import json
import re
from dataclasses import replace

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from spf import NullSpace, SafetyCallback
from spf.card import BEGIN, END, ModelCard
from spf.monitor import figures
from tests.conftest import make_model
from tests.test_callback import PROMPTS, arguments, make_trainer, safety_data


def sft(directory, tokenizer, rows, **kwargs):
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": "A poem."}]}
         for p in PROMPTS]
    )  # fmt: skip
    return SFTTrainer(
        make_model(),
        arguments(SFTConfig, directory, **kwargs),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[SafetyCallback(safety_data(rows))],
    )


def checked(path, rows):
    text = path.read_text("utf-8")
    assert text.count(BEGIN) == 1
    assert text.count("## Safety") == 1
    section = text[text.index(BEGIN) :]
    assert "`NullSpace(rank=None" in section
    assert re.search("rule null-space on 1[45] matrices; 12 safety samples, 11 of them held in", section)
    assert re.search(r"`\.\n\n- (kept|NOT KNOWN|REFUSALS BEING LOST): .* watched prompts are refused", section)
    assert "refusals are told by how those to the safety prompts begin, in their languages" in section
    assert re.search(r"before the first step: .*bases \d+\.\d s", section)
    assert "before training, now" in section
    assert re.search("proven on the model.s own parameters: all 1[45] matrices answer the held inputs", section)
    assert not any(row.messages[0]["content"] in text for row in rows)
    return text


def test_trl_s_card_is_kept_and_ours_stays_when_it_is_written_anew(tmp_path, tokenizer, rows):
    trainer = sft(tmp_path, tokenizer, rows, save_strategy="steps", save_steps=2)
    trainer.train()
    assert "This model is a fine-tuned version of" in checked(tmp_path / "README.md", rows)
    trainer.create_model_card(model_name="again")
    assert "# Model Card for again" in checked(tmp_path / "README.md", rows)


def test_peft_adds_to_a_card_that_nobody_had_written(tmp_path, tokenizer, rows):
    trainer = sft(tmp_path, tokenizer, rows)
    trainer.train()
    assert checked(tmp_path / "README.md", rows).startswith("---\ntags:\n- spf\n---\n\n<!--")
    trainer.save_model()
    assert "- PEFT " in checked(tmp_path / "README.md", rows)


def test_what_the_last_line_says_is_in_a_file_for_programs(tmp_path, tokenizer, rows, caplog):
    """Only until the next run begins."""
    callback = SafetyCallback(safety_data(rows))
    trainer = make_trainer(tmp_path, tokenizer, callback)
    trainer.train()
    said = json.loads((tmp_path / "spf_verdict.json").read_text())
    last = next(r.getMessage() for r in caplog.records if "watched prompts are refused" in r.getMessage())
    watched = said["watched"]
    assert last.startswith(f"spf: {said['verdict']}: {watched['refused']} of {watched['asked']} watched prompts are ")
    assert f"refused, {watched['refused_before']} were before training" in last
    assert "proven on the model's own parameters" in said["proof"]
    assert said["lines"] == callback.card.begun
    monitor, seen = callback.attachment.monitor, callback.attachment.monitor.before
    for (before, now), verdict in {(1.0, 0.0): "REFUSALS LOST", (1.0, 1.0): "kept", (0.0, 0.0): "NOT KNOWN"}.items():
        monitor.before, monitor.now = replace(seen, refused=before), replace(seen, refused=now)
        monitor.still_refused = None
        assert figures(monitor)["verdict"] == verdict
    callback.card.begin([], tmp_path)
    assert not (tmp_path / "spf_verdict.json").exists()


def test_a_later_run_replaces_the_section(tmp_path, tokenizer, rows):
    (tmp_path / "README.md").write_text("# Mine\n")
    for _ in range(2):
        make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows))).train()
    text = checked(tmp_path / "README.md", rows)
    assert text.startswith("# Mine\n\n<!--")


@pytest.mark.parametrize("end", [f"{END}\n", ""])
def test_what_others_wrote_behind_the_section_stays(tmp_path, end):
    """Also where its end mark was cut: all of it was gone."""
    path, card = tmp_path / "README.md", ModelCard()
    path.write_text(f"# Mine\n\n{BEGIN}\n## Safety\n\n- proven\n\n{end}\n## Licence\n\nMIT\n")
    card.begin([], tmp_path)
    assert path.read_text() == "# Mine\n\n## Licence\n\nMIT\n"


def test_a_run_that_breaks_off_writes_no_section(tmp_path, tokenizer, rows, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows)))

    def broken(self):
        raise RuntimeError("broken")

    monkeypatch.setattr("spf.optimizer.Attachment.finish", broken)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert not (tmp_path / "README.md").exists()
    # nor does an earlier run's section stand there for it
    mine, rest = "# My model\n\nText.", "More text.\n"
    (tmp_path / "README.md").write_text(f"{mine}\n\n{BEGIN}\nproven\n{END}\n\n{rest}")
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, tokenizer, SafetyCallback(safety_data(rows))).train()
    assert (tmp_path / "README.md").read_text() == f"{mine}\n\n{rest}"


def test_only_the_first_process_writes_and_speaks(tmp_path, tokenizer, rows, monkeypatch, caplog):
    """Each process of FSDP 2 on CPUs is the first one by the Trainer's own account."""
    for module in ("callback", "card", "audit", "next_token", "progress"):
        monkeypatch.setattr(f"spf.{module}.is_first", lambda: False)
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for trainer in (make_trainer(tmp_path, tokenizer, callback, **saving), sft(tmp_path, tokenizer, rows, **saving)):
        trainer.train()
        trainer.save_model()
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"trainer_state.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith("spf")]
    assert "spf: " not in caplog.text
    assert BEGIN not in (tmp_path / "README.md").read_text("utf-8")

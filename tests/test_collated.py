"""A data_collator that makes other rows than were audited is told; one that only pads is not."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from spf import NullSpace, SafetyCallback, SafetyDataError
from spf.collated import others
from tests.test_audit import (  # noqa: F401
    BENIGN,
    COMPLIES,
    HARMFUL,
    LORA,
    PAIRS,
    REFUSAL,
    answered,
    arguments,
    chat_ids,
    refusing,
    rows,
    rows_of,
    run,
    safety_data,
    tokenizer,
    user,
)

SAID = "sequences that the trainer's data_collator makes of the rows"


def asks_otherwise(trainer, tokenizer, requests):  # noqa: F811
    """Have its collator put another request into every second row."""
    pads = trainer.data_collator

    def collate(batch):
        mixed = [{key: row[key] for key in row if key in ("input_ids", "labels")} for row in batch]
        for i, row in enumerate(mixed):
            if i % 2:
                row["input_ids"] = chat_ids(tokenizer, [user(requests[i % len(requests)]), answered(COMPLIES)])
                row["labels"] = row["input_ids"]
        return pads(mixed)

    trainer.data_collator = collate


def test_requests_that_a_collator_puts_in_are_told(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    """It had every harmful request answered, and the run said that none of its rows answers one."""
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], [(p, COMPLIES) for p in BENIGN[:12]], max_steps=1)
    asks_otherwise(trainer, tokenizer, HARMFUL[12:])
    trainer.train()
    assert callback.audit.conflicts == []
    each = trainer.args.train_batch_size
    count = sum(i % each % 2 for i in range(12))
    assert f"of 12 {SAID} {count} have prompts that were not audited, so what they attack is not held" in caplog.text


@pytest.mark.parametrize(("conflicts", "cannot"), [("error", "say that they attack nothing"), ("drop", "tell which")])
def test_where_all_must_be_audited_the_run_does_not_begin(tmp_path, tokenizer, refusing, rows, conflicts, cannot):  # noqa: F811
    pairs = [(p, COMPLIES) for p in BENIGN[:12]]
    trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], pairs, conflicts=conflicts, max_steps=1)
    asks_otherwise(trainer, tokenizer, HARMFUL[12:])
    with pytest.raises(SafetyDataError, match=f"conflicts='{conflicts}' cannot {cannot}.*and the collator only pad"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.fixture
def compared(monkeypatch):
    """Notes how many sequences were other ones, and of how many."""
    counts = []

    def noting(*given):
        counts.append(others(*given))
        return counts[-1]

    monkeypatch.setattr("spf.beginning.others", noting)
    return counts


SFT = {
    "messages": {},
    "prompt and completion": {"completion_only_loss": True},
    "cut": {"max_length": 20},
    "packed": {"packing": True, "max_length": 96},
    "packed anywhere": {"packing": True, "max_length": 96, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("how", SFT)
def test_batches_as_trl_makes_them_are_what_was_read(tmp_path, tokenizer, refusing, rows, how, compared, caplog):  # noqa: F811
    changes = SFT[how]
    data = rows_of(PAIRS)
    if how == "prompt and completion":
        data = [{"prompt": [user(p)], "completion": [answered(a)]} for p, a in PAIRS]
    trainer = SFTTrainer(
        copy.deepcopy(refusing),
        arguments(SFTConfig, tmp_path / "run", max_steps=1, **changes),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))],
    )
    trainer.train()
    assert compared[0][0] == 0 < compared[0][1]
    assert SAID not in caplog.text


@pytest.mark.parametrize("kind", ["DPO", "DPO, its end kept", "KTO"])
def test_pairs_are_what_was_read(tmp_path, tokenizer, refusing, rows, kind, compared, caplog):  # noqa: F811
    config, trainer_class, changes = DPOConfig, DPOTrainer, {}
    data = [{"prompt": [user(p)], "chosen": [answered(COMPLIES)], "rejected": [answered(REFUSAL)]} for p, _ in PAIRS]
    if kind == "KTO":
        config, trainer_class = KTOConfig, KTOTrainer
        data = [{"prompt": [user(p)], "completion": [answered(a)], "label": True} for p, a in PAIRS]
    elif "end" in kind:
        changes = {"max_length": 24, "truncation_mode": "keep_end"}
    trainer = trainer_class(
        get_peft_model(copy.deepcopy(refusing), LORA),
        args=arguments(config, tmp_path / "run", max_steps=1, **changes),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))],
    )
    trainer.train()
    assert compared[0][0] == 0 < compared[0][1]
    assert SAID not in caplog.text


class Chats(torch.utils.data.Dataset):
    """Messages, which a collator makes tokens of."""

    def __init__(self, pairs):
        self.rows = rows_of(pairs)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("before", ["", "You answer in verse. "])
def test_what_a_collator_tokenises_is_read(tmp_path, tokenizer, refusing, rows, before, caplog):  # noqa: F811
    """It is what was audited, or has something before each request."""

    def collate(batch):
        texts = [[user(before + row["messages"][0]["content"]), *row["messages"][1:]] for row in batch]
        ids = [{"input_ids": chat_ids(tokenizer, text)} for text in texts]
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)(ids)

    trainer = Trainer(
        copy.deepcopy(refusing),
        arguments(TrainingArguments, tmp_path / "run", max_steps=1, remove_unused_columns=False),
        train_dataset=Chats(PAIRS),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))],
    )
    trainer.train()
    assert (f"of 12 {SAID} 12 have prompts" in caplog.text) == bool(before)
    assert (SAID in caplog.text) == bool(before)


def test_the_batches_of_training_are_those_that_they_were(tmp_path, tokenizer, refusing, rows):  # noqa: F811
    """A collator that draws is called before the first step, and draws the same in training as without that."""
    drawn = []
    for looks in (True, False):
        trainer, _ = run(tmp_path / str(looks), tokenizer, refusing, rows[:9], PAIRS, max_steps=2)
        pads, seen = trainer.data_collator, []

        def collate(batch, pads=pads, seen=seen):
            seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return pads(batch)

        trainer.data_collator = collate
        with pytest.MonkeyPatch.context() as patched:
            if not looks:
                patched.setattr("spf.beginning.others", lambda *args: (0, 0))
            trainer.train()
        drawn.append(seen)
    assert len(drawn[0]) > len(drawn[1])
    assert drawn[0][-len(drawn[1]) :] == drawn[1]

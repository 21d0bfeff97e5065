"""A data_collator that makes other rows than were audited is told; one that only pads is not."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from spf import NullSpace, SafetyCallback, SafetyDataError
from spf.collated import Compared, compare_batches
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
    assert f"of 12 {SAID} {count} do not teach what they say, so what they attack is not known" in caplog.text


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
        counts.append(compare_batches(*given))
        return counts[-1]

    monkeypatch.setattr("spf.beginning.compare_batches", noting)
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
    assert compared[0].unlike == 0 < compared[0].of
    assert not compared[0].why
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
    assert compared[0].unlike == 0 < compared[0].of
    assert not compared[0].why
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
    assert (f"of 12 {SAID} 12 do not teach" in caplog.text) == bool(before)
    assert (SAID in caplog.text) == bool(before)


def tokenised(tokenizer, pairs):  # noqa: F811
    """Rows of tokens, the whole chat learned, as TRL makes them."""
    return [{"input_ids": chat_ids(tokenizer, [user(p), answered(a)])} for p, a in pairs]


def padded(rows, pad, left=False, **columns):  # noqa: F811
    """A batch (B, L) without a mask; columns: of the tokens of each row."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(values, by):
        return [by] * (width - len(values)) * left + list(values) + [by] * (width - len(values)) * (not left)

    made = {
        name: torch.tensor([filled(of(row["input_ids"]), by) for row in rows]) for name, (of, by) in columns.items()
    }
    return {"input_ids": torch.tensor([filled(row["input_ids"], pad) for row in rows]), **made}


def counted(tokenizer, rows, collate, together=4):  # noqa: F811
    data = rows if isinstance(rows, torch.utils.data.Dataset | IterableDataset) else Dataset.from_list(rows)
    found = compare_batches(data, DataLoader(data, together, collate_fn=collate), together, tokenizer)
    assert not found.why
    return found.unlike, found.of


SAME = {
    "padded": lambda batch, pad: padded(batch, pad, labels=(list, -100)),
    "padded on the left": lambda batch, pad: padded(batch, pad, left=True, labels=(list, -100)),
    "no labels": padded,
    "labels moved": lambda batch, pad: padded(batch, pad, labels=(lambda ids: [*ids[1:], -100], -100)),
    "weights a token": lambda batch, pad: padded(batch, pad, weights=(lambda ids: [0.5] * len(ids), 0.0)),
    "cut": lambda batch, pad: padded([{"input_ids": row["input_ids"][:11]} for row in batch], pad),
    "one sequence": lambda batch, pad: {"input_ids": torch.tensor([[i for row in batch for i in row["input_ids"]]])},
}


@pytest.mark.parametrize("how", SAME)
def test_padding_and_cutting_change_nothing(tokenizer, how):  # noqa: F811
    found, of = counted(tokenizer, tokenised(tokenizer, PAIRS[:8]), lambda b: SAME[how](b, tokenizer.pad_token_id))
    assert found == 0
    assert of == (2 if how == "one sequence" else 8)


def test_a_mask_made_of_tokens_may_have_gaps(tokenizer):  # noqa: F811
    """Where padding is done with the token that ends turns, their ends within a chat are masked, too."""
    data = tokenised(tokenizer, PAIRS[:8])
    within = data[0]["input_ids"][9]

    def collate(batch):
        made = padded(batch, within, labels=(list, -100))
        return made | {"attention_mask": made["input_ids"] != within}

    assert counted(tokenizer, data, collate) == (0, 8)


def with_answer(tokenizer, answer):  # noqa: F811
    """Whoever asks gets this answer, whatever the row has."""

    def collate(batch):
        prompts = [row["messages"][0]["content"] for row in batch]
        return padded(tokenised(tokenizer, [(p, answer) for p in prompts]), tokenizer.pad_token_id, labels=(list, -100))

    return collate


def test_an_answer_that_a_collator_puts_in_is_another(tokenizer):  # noqa: F811
    """Prompts were compared alone: rows with refusals were audited as those, and taught to comply."""
    refused = rows_of([(p, REFUSAL) for p in HARMFUL[:8]])
    assert counted(tokenizer, refused, with_answer(tokenizer, REFUSAL)) == (0, 8)
    assert counted(tokenizer, refused, with_answer(tokenizer, COMPLIES)) == (8, 8)
    stream = Dataset.from_list(refused).to_iterable_dataset()
    assert counted(tokenizer, stream, with_answer(tokenizer, COMPLIES)) == (8, 8)


def test_labels_of_other_tokens_are_another_answer(tokenizer):  # noqa: F811
    other = lambda batch: padded(batch, 0, labels=(lambda ids: [ids[0]] * len(ids), -100))  # noqa: E731
    assert counted(tokenizer, tokenised(tokenizer, PAIRS[:8]), other) == (8, 8)


def rendering(tokenizer, begins=(), pad=None, last=0, **variables):  # noqa: F811
    """Chats rendered by the collator, as in tutorials, all of them learned but the padding's token."""

    def collate(batch):
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False, **variables) for row in batch]
        whole = [[*begins, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        ids = [{"input_ids": tokens[-last:]} for tokens in whole]
        made = padded(ids, tokenizer.pad_token_id if pad is None else pad, labels=(list, -100))
        if pad is not None:
            made["labels"] = made["labels"].masked_fill(made["labels"] == pad, -100)
        return made

    return collate


def test_chats_that_a_collator_renders_are_the_rows(tokenizer):  # noqa: F811
    """With another beginning, or where what ends a turn pads: in every sequence prompts were found that no row has."""
    turns = [[user(p), answered(a), user(HARMFUL[1]), answered(REFUSAL)] for p, a in PAIRS[:8]]
    data = [{"messages": chat} for chat in turns]
    assert counted(tokenizer, data, rendering(tokenizer)) == (0, 8)
    shortest = min(len(chat_ids(tokenizer, chat)) for chat in turns)
    assert counted(tokenizer, data, rendering(tokenizer, last=shortest - 3)) == (0, 8)
    own = copy.deepcopy(tokenizer)
    own.bos_token = next(t for t in own.get_vocab() if t not in own.tokenize(own.decode(chat_ids(own, turns[0]))))
    assert counted(own, data, rendering(own, begins=[own.bos_token_id] * 2)) == (0, 8)
    ends = chat_ids(tokenizer, turns[0])[-1]
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.convert_ids_to_tokens(ends)
    assert counted(own, data, rendering(own, pad=own.pad_token_id)) == (0, 8)


def test_chats_rendered_with_thinking_are_the_rows(tokenizer):  # noqa: F811
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% if enable_thinking %}think {% endif %}" + own.chat_template
    data = rows_of(PAIRS[:8])
    assert counted(own, data, rendering(own)) == (0, 8)
    assert counted(own, data, rendering(own, enable_thinking=True)) == (0, 8)


def test_more_learned_than_the_rows_say_is_another_answer(tokenizer):  # noqa: F811
    """Of a row whose last answer alone is learned the first was not audited; a collator that makes labels of all
    tokens teaches both."""
    data = []
    for prompt, answer in PAIRS[:8]:
        first = chat_ids(tokenizer, [user(HARMFUL[0]), answered(COMPLIES)])
        ids = chat_ids(tokenizer, [user(HARMFUL[0]), answered(COMPLIES), user(prompt), answered(answer)])
        begin = len(chat_ids(tokenizer, [user(HARMFUL[0]), answered(COMPLIES), user(prompt)], True))
        assert ids[: len(first)] == first
        data.append({"input_ids": ids, "labels": [-100] * begin + ids[begin:]})
    pad = tokenizer.pad_token_id

    def keeps(batch):
        made = padded(batch, pad)
        width = made["input_ids"].shape[1]
        return made | {"labels": torch.tensor([[*r["labels"], *[-100] * (width - len(r["labels"]))] for r in batch])}

    assert counted(tokenizer, data, keeps) == (0, 8)
    assert counted(tokenizer, data, lambda batch: padded(batch, pad, labels=(list, -100))) == (8, 8)


def test_rows_that_were_not_read_are_not_called_other_ones(tokenizer):  # noqa: F811
    data = [{"instruction": p, "output": a} for p, a in PAIRS[:8]]

    def collate(batch):
        made = tokenised(tokenizer, [(row["instruction"], row["output"]) for row in batch])
        return padded(made, tokenizer.pad_token_id, labels=(list, -100))

    loader = DataLoader(Dataset.from_list(data), 4, collate_fn=collate)
    found = compare_batches(loader.dataset, loader, 4, tokenizer)
    assert found.of == 0
    assert "no answer found in its columns" in found.why


def test_what_is_no_batch_of_text_is_not_compared(tokenizer):  # noqa: F811
    """GRPO's collator gives its rows back: no run of it began."""
    data = tokenised(tokenizer, PAIRS[:8])
    for collate in (lambda batch: batch, lambda batch: {"pixels": 1}, lambda batch: {"prompts": ["a"]}):
        assert counted(tokenizer, data, collate) == (0, 0)
    pixels = lambda batch: padded(batch, 0) | {"pixel_values": torch.zeros(4, 3, 8, 8)}  # noqa: E731
    assert counted(tokenizer, data, pixels) == (0, 0)
    assert compare_batches([1], object(), 4, tokenizer) == Compared()


def test_a_collator_that_is_called_otherwise_is_not_compared(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    """As axolotl's, which a sampler of its own gives lists of rows: the run goes on, and says so."""
    trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, max_steps=1)
    pads, called = trainer.data_collator, []

    def collate(batch):
        called.append(1)
        if len(called) == 1:
            raise TypeError("a list of lists is wanted\nand more")
        return pads(batch)

    trainer.data_collator = collate
    trainer.train()
    assert trainer.state.global_step == 1
    assert "makes of the rows was not compared with them (TypeError: a list of lists is wanted)" in caplog.text


def test_rows_that_are_no_tokens_are_no_error(tokenizer):  # noqa: F811
    """Such rows are trained on by collators that know them; the run broke off."""
    pad = tokenizer.pad_token_id
    made = lambda batch: padded(tokenised(tokenizer, PAIRS[:4]), pad, labels=(list, -100))  # noqa: E731
    for row in ({"answer_ids": ["a7", "b9"]}, {"input_ids": [[1, 2], [3]]}, {"prompt_ids": [1, None]}):
        loader = DataLoader(Dataset.from_list([row] * 8), 4, collate_fn=made)
        assert "no answer found" in compare_batches(loader.dataset, loader, 4, tokenizer).why
    inside = [{"input_ids": [row["input_ids"]]} for row in tokenised(tokenizer, PAIRS[:8])]
    flat = lambda batch: padded([{"input_ids": row["input_ids"][0]} for row in batch], pad)  # noqa: E731
    assert counted(tokenizer, inside, flat) == (0, 8)


def test_a_collator_that_changes_rows_changes_none_of_the_data(tokenizer):  # noqa: F811
    """It is called once more than by the loader: its rows ended twice."""
    data = Chats(PAIRS[:4])

    def ending(batch):
        for row in batch:
            row["messages"].append(user("More?"))
        return {}

    before = copy.deepcopy(data.rows)
    assert counted(tokenizer, data, ending) == (0, 0)
    assert data.rows == before


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
                patched.setattr("spf.beginning.compare_batches", lambda *args: Compared())
            trainer.train()
        drawn.append(seen)
    assert len(drawn[0]) > len(drawn[1])
    assert drawn[0][-len(drawn[1]) :] == drawn[1]

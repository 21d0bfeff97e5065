"""What a trainer's loader reads is what was audited, whatever its class does: no event says which data it takes."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from trl import SFTTrainer

from tests.test_audit import BENIGN, COMPLIES, HARMFUL, PAIRS, names_of, refusing, rows, run, tokenizer  # noqa: F401

OTHER = "the trainer's loader reads other data than its train_dataset"


def reads(trainer, change):
    """Have its loader read what `change` makes of its data."""

    def loader():
        kept = trainer.train_dataset
        trainer.train_dataset = change(kept)
        try:
            return type(trainer).get_train_dataloader(trainer)
        finally:
            trainer.train_dataset = kept

    trainer.get_train_dataloader = loader


@pytest.fixture
def harmful(tmp_path, tokenizer, refusing, rows):  # noqa: F811
    """Rows that answer what the model refuses, as the trainer prepares them."""
    return run(tmp_path, tokenizer, refusing, rows[:9], [(p, COMPLIES) for p in HARMFUL[12:]])[0].train_dataset


def test_rows_that_the_loader_mixes_in_are_audited(tmp_path, tokenizer, refusing, rows, harmful, caplog):  # noqa: F811
    """Nothing was left out of the trainer's own data, so nothing was compared, and the run said that all was kept."""
    clean = [(p, COMPLIES) for p in BENIGN[:12]]
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], clean, max_steps=2)
    reads(trainer, lambda own: concatenate_datasets([own, harmful]))
    trainer.train()
    assert callback.audit.conflicting_rows == list(range(12, 24))
    assert callback.data.held
    assert f"12 rows are trained on and press against what is held ({OTHER})" in caplog.text


def test_as_many_rows_are_not_the_same_rows(tmp_path, tokenizer, refusing, rows, harmful, caplog):  # noqa: F811
    """Only their number was compared: twelve attacks were trained on in the place of those that were left out."""
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, max_steps=2)
    reads(trainer, lambda own: harmful.select(range(len(own))))
    trainer.train()
    assert callback.data.left_out == []
    assert len(callback.audit.conflicting_rows) == 12
    assert OTHER in caplog.text


@pytest.mark.parametrize("how", ["shuffled", "made anew"])
def test_the_same_rows_in_any_order_are_the_same(tmp_path, tokenizer, refusing, rows, how, caplog):  # noqa: F811
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, max_steps=2)
    change = {"shuffled": lambda own: own.shuffle(seed=1), "made anew": lambda own: Dataset.from_list(list(own))}
    reads(trainer, change[how])
    trainer.train()
    assert callback.data.left_out_rows == list(range(12))
    assert "12 rows are left out of training, 12 of 24 are trained on" in caplog.text
    assert OTHER not in caplog.text


class Weighted(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.WeightedRandomSampler([1.0] * len(self.train_dataset), 8)


def test_a_sampler_of_the_trainers_own_is_told_that_numbers_moved(tmp_path, tokenizer, refusing, rows, caplog):  # noqa: F811
    said = "the trainer chooses its rows by a _get_train_sampler of its own"
    trainer, _ = run(tmp_path / "plain", tokenizer, refusing, rows[:9], PAIRS, max_steps=1)
    trainer.train()
    assert "rows are left out" in caplog.text
    assert said not in caplog.text
    for pairs, expected in ((PAIRS, True), (PAIRS[12:], False)):  # nothing left out, nothing moved
        caplog.clear()
        trainer, _ = run(tmp_path / f"own-{expected}", tokenizer, refusing, rows[:9], pairs, max_steps=1)
        trainer.__class__ = Weighted
        trainer.train()
        assert (said in caplog.text) == expected
    assert len(names_of(trainer)) == 12

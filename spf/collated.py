"""Batches beside the rows that were audited: a data_collator can make others of them."""

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import PreTrainedTokenizerBase

from spf.config import Conflicts
from spf.data.examples import read_examples
from spf.errors import SafetyDataError

LOOKED_AT = 16
"""So many rows, spread over the data, are collated before the first step."""

PER_TOKEN = ("input_ids", "labels", "completion_mask", "assistant_masks", "position_ids")
"""Of a batch, what says which tokens are the answers."""

REMEDY = "have the data set hold what is trained on (`dataset.map`), and the collator only pad"

ROW_TOKENS = ("prompt_ids", "input_ids", "completion_ids", "chosen_ids", "rejected_ids", "answer_ids")


def others(
    loader: Any,
    together: int,
    asked: Collection[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """How many of the sequences that rows are collated to have prompts that were not asked, and how many there are.

    A sequence of a row's own tokens, or a part of it, is what was read; of another one the prompts are read. together:
    rows in a batch. asked: prompts of the audit, as token ids; options: variables of the template. Streams, batches
    without `input_ids` and those of more than text are not compared: 0 of 0. Random states stay as they are.
    """
    data = loader.dataset
    if isinstance(data, IterableDataset | TorchStream) or not isinstance(data, Sized) or not len(data):
        return 0, 0
    rows_of: Any = data
    known, unlike = set(asked), []
    with _same_randomness():
        rows = [rows_of[i] for i in range(0, len(data), -(-len(data) // LOOKED_AT))]
        for i in range(0, len(rows), together):
            batch = rows[i : i + together]
            own = "\n".join([_text(token for row in batch for token in _tokens(row)[0]), *map(_text, _every(batch))])
            for sequence in _sequences(loader.collate_fn(batch)):
                unlike.append(
                    _text(sequence["input_ids"]) not in own and _is_other(sequence, known, tokenizer, options)
                )
    return sum(unlike), len(unlike)


def line_of(unlike: int, of: int, conflicts: Conflicts) -> list[str]:
    """What is said where so many of some sequences are not what was audited.

    Raises:
        SafetyDataError: there are any, and `conflicts` is error or drop.
    """
    if not unlike:
        return []
    what = f"of {of} sequences that the trainer's data_collator makes of the rows {unlike} have prompts that were not "
    if conflicts in ("error", "drop"):
        cannot = "say that they attack nothing" if conflicts == "error" else "tell which to leave out"
        raise SafetyDataError(f"{what}audited, so conflicts={conflicts!r} cannot {cannot}; {REMEDY}")
    return [f"{what}audited, so what they attack is not held; {REMEDY}"]


def _is_other(
    sequence: Mapping[str, list[int]],
    asked: set[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None,
) -> bool:
    """Whether a sequence that teaches anything has a prompt that was not asked, or none that can be read."""
    if all(label == -100 for label in sequence.get("labels", [0])):
        return False
    prompts = {example.prompt_ids for example in read_examples([sequence], tokenizer, options).examples}
    return not prompts or not prompts <= asked


def _every(rows: Sequence[Any]) -> list[list[int]]:
    return [tokens for row in rows for tokens in _tokens(row)]


def _tokens(row: Any) -> list[list[int]]:
    """The sequences of tokens that a row has, every answer behind its prompt; one that is empty if it has none."""
    if not isinstance(row, Mapping):
        return [[]]
    columns = {name: [int(token) for token in row[name]] for name in ROW_TOKENS if row.get(name) is not None}
    prompt = columns.pop("prompt_ids", [])
    return [prompt + tokens for tokens in columns.values()] or [prompt]


def _text(tokens: Iterable[int]) -> str:
    """Tokens as text in which a part of them is a part of it."""
    return "".join(f",{token}" for token in tokens) + ","


def _sequences(batch: Any) -> Iterator[dict[str, list[int]]]:
    """Each sequence of a batch without its padding; none of a batch that is not of text alone."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    ids = tensors.get("input_ids")
    if (
        ids is None
        or ids.dim() != 2
        or any(value.is_floating_point() and value.dim() > 1 for value in tensors.values())
    ):
        return
    columns = {name: tensors[name] for name in PER_TOKEN if name in tensors and tensors[name].shape == ids.shape}
    mask = tensors.get("attention_mask")
    read = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    for i, kept in enumerate(read.bool()):
        yield {name: column[i][kept].tolist() for name, column in columns.items()}


@contextmanager
def _same_randomness() -> Iterator[None]:
    """A collator may draw; the loader's own draws are to be those that they would have been."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

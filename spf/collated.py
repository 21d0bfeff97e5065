"""Batches beside the rows that were audited: a data_collator can make others of them."""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchStream
from transformers import PreTrainedTokenizerBase

from spf.config import Conflicts
from spf.data.examples import read_examples
from spf.errors import SafetyDataError
from spf.text.generation import pad_id

LOOKED_AT = 16
"""So many rows, spread over the data, are collated before the first step; of a stream the first ones."""

PER_TOKEN = ("input_ids", "labels", "completion_mask", "assistant_masks", "position_ids")
"""Of a batch, what says which tokens are the answers."""

ROW_TOKENS = ("prompt_ids", "input_ids", "completion_ids", "chosen_ids", "rejected_ids", "answer_ids")

REMEDY = "have the data set hold what is trained on (`dataset.map`), and the collator only pad"


@dataclass(frozen=True)
class Compared:
    """Of so many sequences how many teach what is not in their rows; why: nothing could be compared."""

    unlike: int = 0
    of: int = 0
    why: str = ""

    def lines(self, conflicts: Conflicts) -> list[str]:
        """What a run says of it.

        Raises:
            SafetyDataError: a sequence is unlike its rows, and `conflicts` is error or drop.
        """
        if self.why:
            return [f"what the trainer's data_collator makes of the rows was not compared with them ({self.why})"]
        if not self.unlike:
            return []
        made = (
            f"of {self.of} sequences that the trainer's data_collator makes of the rows {self.unlike} do not teach "
            "what they say"
        )
        if conflicts in ("error", "drop"):
            cannot = "say that they attack nothing" if conflicts == "error" else "tell which to leave out"
            raise SafetyDataError(f"{made}, so conflicts={conflicts!r} cannot {cannot}; {REMEDY}")
        return [f"{made}, so what they attack is not known; {REMEDY}"]


def compare_batches(
    data: Any,
    loader: Any,
    together: int,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> Compared:
    """Whether the sequences that some rows are collated to teach what is in the rows.

    A sequence of a row's own tokens, or a part of it, teaches what was read; of another one prompts and answers are
    read and compared with those of the rows. data: what the loader reads; together: rows in a batch; options: variables
    of the template. Batches without `input_ids` and those of more than text are not compared: 0 of 0. The rows and the
    CPU's random states stay as they are.
    """
    if not isinstance(loader, DataLoader):
        return Compared()
    try:
        batches = list(_batches(data, loader.collate_fn, together))
    except Exception as error:  # a loader of another kind may call both otherwise, as with lists of rows
        return Compared(why=f"{type(error).__name__}: {error}".partition("\n")[0])
    unlike: list[bool] = []
    for rows, batch in batches:
        whole = [tokens for row in rows for tokens in _tokens(row)]
        # without padding all rows of a batch are one sequence
        own = "\n".join([_text(token for row in rows for token in _tokens(row)[0]), *map(_text, whole)])
        taught: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for example in read_examples(rows, tokenizer, options).examples:
            taught[example.prompt_ids].add(example.target.strip())
        for sequence in _sequences(batch, pad_id(tokenizer)):
            same = _text(sequence["input_ids"]) in own and _learns_itself(sequence)
            unlike.append(not same and _is_other(sequence, taught, tokenizer, options))
    return Compared(sum(unlike), len(unlike))


def _batches(data: Any, collate: Callable[[list[Any]], Any], together: int) -> Iterator[tuple[list[Any], Any]]:
    """Some rows of the data, a batch at a time, and what they are collated to."""
    with _same_randomness():
        rows = _some_rows(data)
        for i in range(0, len(rows), together):
            yield rows[i : i + together], collate(copy.deepcopy(rows[i : i + together]))


def _some_rows(data: Any) -> list[Any]:
    if isinstance(data, IterableDataset):
        return list(islice(data, LOOKED_AT))
    if isinstance(data, TorchStream) or not isinstance(data, Sized) or not len(data):
        return []
    rows_of: Any = data
    return [rows_of[i] for i in range(0, len(data), -(-len(data) // LOOKED_AT))]


def _is_other(
    sequence: Mapping[str, list[int]],
    taught: Mapping[tuple[int, ...], set[str]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None,
) -> bool:
    """Whether a sequence teaches an answer, or to a prompt, that is none of the rows', or nothing that can be read."""
    if all(label == -100 for label in sequence.get("labels", [0])):
        return False
    ids = tuple(sequence["input_ids"])
    if any(prompt[: len(ids)] == ids for prompt in taught):
        return False  # cut within its prompt
    examples = read_examples([sequence], tokenizer, options).examples
    return not (
        examples
        and _learns_itself(sequence)
        and all(_is_one_of(example.target.strip(), taught.get(example.prompt_ids, ())) for example in examples)
    )


def _is_one_of(target: str, targets: Iterable[str]) -> bool:
    """Either may be cut."""
    return any(target.startswith(one) or one.startswith(target) for one in targets)


def _learns_itself(sequence: Mapping[str, list[int]]) -> bool:
    """Whether its labels are its own tokens, or the next ones where they are moved already."""
    ids, labels = sequence["input_ids"], sequence.get("labels")
    if labels is None:
        return True
    moved = [*ids[1:], -100]
    return any(
        all(label in (-100, token) for label, token in zip(labels, tokens, strict=True)) for tokens in (ids, moved)
    )


def _tokens(row: Any) -> list[list[int]]:
    """The sequences of tokens that a row has, every answer behind its prompt; one that is empty if it has none."""
    if not isinstance(row, Mapping):
        return [[]]
    try:
        columns = {name: np.ravel(row[name]).astype(int).tolist() for name in ROW_TOKENS if row.get(name) is not None}
    except (TypeError, ValueError):
        return [[]]  # text, or of several lengths
    prompt = columns.pop("prompt_ids", [])
    return [prompt + tokens for tokens in columns.values()] or [prompt]


def _text(tokens: Iterable[int]) -> str:
    """Tokens as text in which a part of them is a part of it."""
    return "".join(f",{token}" for token in tokens) + ","


def _sequences(batch: Any, pad: int) -> Iterator[dict[str, list[int]]]:
    """Each sequence of a batch without the padding around it; none of a batch that is not of text alone."""
    if not isinstance(batch, Mapping):
        return
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    ids, mask = tensors.get("input_ids"), tensors.pop("attention_mask", None)
    if ids is None or ids.dim() != 2 or any(_is_no_text(value, ids) for value in tensors.values()):
        return
    columns = {name: tensors[name] for name in PER_TOKEN if name in tensors and tensors[name].shape == ids.shape}
    # where it has padding, and says so in no such mask, that is told by its token
    read = ids != pad if mask is None or mask.shape != ids.shape else mask
    for i, kept in enumerate(read.bool()):
        places = kept.nonzero().flatten().tolist() or [0]
        # a mask made of tokens has gaps where one within is the padding's
        span = slice(places[0], places[-1] + 1)
        yield {name: column[i][span].tolist() for name, column in columns.items()}


def _is_no_text(value: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether it is of an image or of sound: numbers that are not one a token."""
    return value.is_floating_point() and value.dim() > 1 and value.shape != ids.shape


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

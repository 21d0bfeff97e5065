"""Batches beside the rows that were audited: a data_collator can make others of them."""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, dropwhile, islice
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
from spf.text.chat import chat_options
from spf.text.generation import pad_id

LOOKED_AT = 16
"""So many rows, spread over the data, are collated before the first step; of a stream the first ones."""

MARKS = ("labels", "completion_mask", "assistant_masks")
"""What says which tokens are the answers."""

PER_TOKEN = ("input_ids", *MARKS, "position_ids")

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

    A sequence of a row's own tokens, or a part of it, that learns no more of them teaches what was read; of another one
    prompts and answers are read and compared with those of the rows. data: what the loader reads; together: rows in a
    batch; options: variables of the template. Batches without `input_ids` and those of more than text are not compared:
    0 of 0. The rows and the CPU's random states stay as they are.
    """
    if not isinstance(loader, DataLoader):
        return Compared()
    found: list[bool | None] = []
    why = ""
    try:
        for rows, batch in _batches(data, loader.collate_fn, together):
            of = _Rows(rows, tokenizer, options)
            found += [of.has_not(sequence) for sequence in _sequences(batch, pad_id(tokenizer))]
            why = why or of.why
    except Exception as error:  # a loader of another kind may call both otherwise, as with lists of rows
        return Compared(why=f"{type(error).__name__}: {error}".partition("\n")[0])
    told = [other for other in found if other is not None]
    if found and not told:
        return Compared(why=why or "no answer found in its tokens")
    return Compared(sum(told), len(told))


class _Rows:
    """What the rows of a batch teach. why: some could not be read."""

    def __init__(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None):
        self.rows, self.tokenizer, self.options = rows, tokenizer, options
        self.why = ""
        each = [_tokens(row) for row in rows]
        # without padding all rows of a batch are one sequence
        every = [[token for tokens in each for token in tokens[0]], *(tokens for some in each for tokens in some)]
        self.own = "\n".join(map(_text, every))
        self.learned = "\n".join([_text(chain(*map(_learned, rows))), *(_text(_learned(row)) for row in rows)])
        self.all_learned = not any(isinstance(row, Mapping) and row.keys() & set(MARKS) for row in rows)

    @cached_property
    def taught(self) -> dict[tuple[int, ...], set[str]]:
        """By prompt the answers; read only where tokens do not tell."""
        given = dict(self.options or {})
        # a collator may render with the template's own switches of thinking
        on = given | dict.fromkeys(chat_options(self.tokenizer, None), True)
        taught: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for variables in (given, on) if on != given else (given,):
            examples = read_examples(self.rows, self.tokenizer, variables)
            self.why = examples.why
            for example in examples.examples:
                taught[self._bare(example.prompt_ids)].add(example.target.strip())
        return taught

    def has_not(self, sequence: Mapping[str, list[int]]) -> bool | None:
        """Whether a sequence teaches what is not in the rows; None if that cannot be told."""
        ids, labels = sequence["input_ids"], sequence.get("labels")
        if labels is not None and not _are_of(labels, ids):
            return True
        if labels is not None and all(label == -100 for label in labels):
            return False
        if _text(ids) in self.own and (self.all_learned or _text(_learned(sequence)) in self.learned):
            return False
        bare = self._bare(ids)
        if any(prompt[: len(bare)] == bare for prompt in self.taught):
            return False  # cut within its prompt
        examples = read_examples([sequence], self.tokenizer, self.options).examples
        if not examples:
            return None
        if all(self._teaches(self._bare(example.prompt_ids), example.target.strip()) for example in examples):
            return False
        return None if self.why else True

    def _teaches(self, prompt: tuple[int, ...], target: str) -> bool:
        """Whether the rows have this answer to this prompt; either may be cut."""
        return any(
            target.startswith(one) or one.startswith(target)
            for known, targets in self.taught.items()
            if known[len(known) - len(prompt) :] == prompt
            for one in targets
        )

    def _bare(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Without the tokens that a text begins with, which tokenizers put before a rendered chat once more."""
        begin = self.tokenizer.bos_token_id
        return tuple(dropwhile(lambda token: token == begin, ids))


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


def _learned(row: Any) -> list[int]:
    """The tokens of a row or sequence, -100 for those that are not learned."""
    ids = _tokens(row)[0]
    for name in MARKS if isinstance(row, Mapping) else ():
        marks = row.get(name)
        if marks is not None and len(marks) == len(ids):
            off = -100 if name == "labels" else 0
            ids = [-100 if mark == off else token for token, mark in zip(ids, marks, strict=True)]
    return ids


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
        sequence = {name: column[i][span].tolist() for name, column in columns.items()}
        if "labels" in sequence:
            sequence["labels"] = _placed(sequence["labels"], sequence["input_ids"], pad)
        yield sequence


def _placed(labels: list[int], ids: list[int], pad: int) -> list[int]:
    """Labels where their tokens are, also if they were moved; where chats are padded with the token that ends a turn,
    collators take the ends of learned turns for padding."""
    moved = [-100, *labels[:-1]]
    if not _are_of(labels, ids) and _are_of(moved, ids):
        labels = moved
    placed: list[int] = []
    for label, token in zip(labels, ids, strict=True):
        is_end = label == -100 and token == pad and placed and placed[-1] != -100
        placed.append(token if is_end else label)
    return placed


def _are_of(labels: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether what is learned are these tokens."""
    return all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


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

"""Columns of training data that are read, and which tokens of a packed row are a document."""

from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset

COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "label"),
    *("tools", "chat_template_kwargs"),
    *("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths", "position_ids"),
    *("prompt_ids", "completion_ids", "chosen_ids", "answer_ids"),
)
"""The columns that any form of data has."""

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def read_columns(dataset: AnyDataset) -> list[str]:
    """The columns that are read; all if none is known, or where a transform of the user's reads them."""
    names = list(dataset.column_names or ())
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return names
    return [name for name in names if name in COLUMNS] or names  # without columns it would have no rows


def with_read_columns(dataset: AnyDataset) -> AnyDataset:
    """Only the columns that are read, so that images and sound are not decoded."""
    columns = read_columns(dataset)
    return dataset if columns == list(dataset.column_names or ()) else dataset.select_columns(columns)


def as_trl_reads(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row in the columns that TRL's trainers make of it: `conversations` of from and value are messages, and what
    `chosen` and `rejected` begin with, both texts, is their prompt. A prompt in text that `chosen`, a whole
    conversation, begins with, as in UltraFeedback, is asked once."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shared = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(chosen), len(rejected)))
        shared -= chosen[:shared].endswith(" ")
        return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:]} if shared else row
    if isinstance(prompt, str) and isinstance(chosen, list) and chosen and _said(chosen[0]) == prompt.strip():
        return {name: value for name, value in row.items() if name != "prompt"}
    if _has_from_and_value(told := row.get("conversations")):
        return {**row, "messages": [{_NAMES.get(key, key): value for key, value in one.items()} for one in told]}
    return row


_NAMES = {"from": "role", "value": "content"}


def _has_from_and_value(told: Any) -> TypeGuard[list[Any]]:
    """As TRL asks, of the first message only."""
    return isinstance(told, list) and bool(told) and isinstance(told[0], Mapping) and set(_NAMES) <= set(told[0])


def _said(message: Any) -> Any:
    said = message.get("content") if isinstance(message, Mapping) else None
    return said.strip() if isinstance(said, str) else said


def document_lengths(row: Mapping[str, Any]) -> list[int]:
    """How many tokens each document of a tokenised row has: `seq_lengths` says so where TRL packed it, elsewhere
    `position_ids` begin again at 0. Padding, whose positions are all the same, is of the document beside it."""
    if row.get("seq_lengths"):
        return list(row["seq_lengths"])
    tokens, told = len(row["input_ids"]), row.get("position_ids")
    if told is None or len(told) != tokens:  # of images, there are several rows of them
        return [tokens]
    positions = np.asarray(told)
    begins = np.flatnonzero((positions[:-1] == 0) & (positions[1:] != 0))
    padded = len(begins) and (positions[: begins[0]] == positions[0]).all()
    return np.diff([0, *begins[int(bool(padded)) :], tokens]).tolist()


def refuse_unreadable(dataset: Dataset, trainer: str, text: str) -> None:
    """text: the column that SFT reads as a whole text.

    Raises:
        ValueError: the columns are in no form that the trainer reads.
    """
    forms = {
        "sft": [["messages"], ["conversations"], ["prompt", "completion"], [text], ["input_ids"]],
        "dpo": [["chosen", "rejected"]],
        "kto": [["prompt", "completion", "label"], ["chosen", "rejected"]],
        "grpo": [["prompt"]],
    }[trainer]
    names = set(dataset.column_names)
    if trainer == "sft" and "prompt" in names and not names & {"completion", "input_ids"}:
        raise ValueError(
            f"the data have the columns {', '.join(dataset.column_names)}, and sft takes what has `prompt` for prompt "
            "and completion; remove the column prompt, or rename the answers' column to completion"
        )
    if trainer == "dpo" and isinstance(_first(dataset, "prompt"), str) and isinstance(_first(dataset, "chosen"), list):
        raise ValueError(
            "`prompt` is text and `chosen` a list of messages, which dpo cannot join; remove the column prompt where "
            "chosen begins with it, or make it a list of messages"
        )
    fitting = [form for form in forms if set(form) <= names]
    if fitting == [["conversations"]] and len(dataset) and not _has_from_and_value(dataset[0]["conversations"]):
        raise ValueError(
            "sft reads `conversations` of messages with from and value, and the first row's are not; rename the column "
            "to messages where they have role and content"
        )
    if not fitting:
        raise ValueError(
            f"the data have the columns {', '.join(dataset.column_names)}, and {trainer} reads "
            f"{', or '.join(' and '.join(form) for form in forms)}; rename yours, or make such ones of them"
        )


def _first(dataset: Dataset, column: str) -> Any:
    return dataset[0][column] if len(dataset) and column in dataset.column_names else None

"""Columns of training data that are read, and which tokens of a packed row are a document."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset

COLUMNS = (
    *("messages", "prompt", "completion", "chosen", "text", "label", "tools", "chat_template_kwargs"),
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

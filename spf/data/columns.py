"""Columns of training data that are read."""

from typing import TypeVar

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

"""Training data without some of their examples; of packed rows the tokens of these are cut out."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import compress
from typing import Any

from datasets import Dataset, concatenate_datasets

from spf.data.examples import COLUMNS

Place = tuple[int, int]
"""A row of a data set, and which document of it, if it is packed; else 0."""

LENGTHS = "seq_lengths"
"""Column of packed rows: how many tokens each of their documents has."""


def is_packed(dataset: Dataset) -> bool:
    """Whether several documents are in a row, as TRL packs them."""
    return {"input_ids", LENGTHS} <= set(dataset.column_names)


def without(dataset: Dataset, places: Collection[Place], packed: bool) -> Dataset:
    """The data set less these rows, or documents of packed ones, in the same order; rows that are empty then are gone.

    packed: whether training reads it so; of such a row every column that has an entry a token is cut.
    """
    gone: dict[int, set[int]] = {}
    for row, document in places:
        gone.setdefault(row, set()).add(document)
    plain = dataset.with_format(None)
    cut = {row: _cut(plain[row], documents) for row, documents in gone.items()} if packed else {}
    left = {row: of for row, of in cut.items() if of[LENGTHS]}
    if not left:
        return dataset.select([row for row in range(len(dataset)) if row not in gone])
    both = concatenate_datasets([plain, Dataset.from_list(list(left.values()), features=plain.features)])
    instead = {row: len(dataset) + i for i, row in enumerate(left)}
    order = [instead.get(row, row) for row in range(len(dataset)) if row in left or row not in gone]
    form = dict(dataset.format)
    return both.select(order).with_format(
        form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"]
    )


def _cut(row: Mapping[str, Any], documents: Collection[int]) -> dict[str, Any]:
    """A packed row without these of its documents."""
    lengths = row[LENGTHS]
    kept = [number not in documents for number, length in enumerate(lengths) for _ in range(length)]
    shorter = {
        name: list(compress(value, kept)) if isinstance(value, list) and len(value) == len(kept) else value
        for name, value in row.items()
    }
    return shorter | {LENGTHS: [length for number, length in enumerate(lengths) if number not in documents]}


def lengths_of(data: Any) -> list[list[int]] | None:
    """How long the documents of each packed row are; None where rows are not packed."""
    return list(data.with_format(None)[LENGTHS]) if isinstance(data, Dataset) and is_packed(data) else None


def name_of(places: Iterable[Place]) -> str:
    """What these are, in words."""
    return "examples of packed rows" if any(document for _, document in places) else "rows"


def rows_in(places: Iterable[Place]) -> list[int]:
    """The rows of these, in order, each once."""
    return sorted({row for row, _ in places})


def content_of(dataset: Dataset, places: Iterable[Place]) -> str:
    """A hash (sha256) of what the rows of these hold."""
    digest = hashlib.sha256()
    for row in dataset.select(rows_in(places)):
        digest.update(_said(row))
    return digest.hexdigest()


def content_of_all(dataset: Dataset) -> str:
    """A hash (sha256) of what all rows hold, in any order, in the columns that an audit reads."""
    rows = dataset.with_format(None).select_columns([name for name in dataset.column_names if name in COLUMNS])
    total = 0
    for batch in rows.iter(1000):
        for values in zip(*batch.values(), strict=True):
            total += int.from_bytes(hashlib.sha256(_said(dict(zip(batch, values, strict=True)))).digest())
    return hashlib.sha256(f"{len(dataset)} {total}".encode()).hexdigest()


def _said(row: Mapping[str, Any]) -> bytes:
    """A row as JSON; of an image only that it is one, since it says where in memory it lies."""
    return json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode()

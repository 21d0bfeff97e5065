"""Training data without some of their examples; of packed rows the tokens of these are cut out."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import compress, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from spf.data.columns import document_lengths, read_columns

Place = tuple[int, int]
"""A row of a data set, and which document of it, if it is packed; else 0."""

LENGTHS = "seq_lengths"
"""Column of rows that TRL packed: how many tokens each of their documents has."""

POSITIONS = "position_ids"
"""Of rows that others packed, these begin again with each document."""

LITTLE = 0.1
"""Of the data: where less is left, little is learned."""


def is_packed(dataset: Dataset) -> bool:
    """Whether several documents may be in a row, and be told apart."""
    columns = set(dataset.column_names)
    return "input_ids" in columns and bool(columns & {LENGTHS, POSITIONS})


def without(dataset: Dataset, places: Collection[Place], packed: bool) -> Dataset:
    """The data set less these rows, or documents of packed ones, in the same order; rows that are empty then are gone.

    packed: whether training reads it so; of such a row every column that has an entry a token is cut.
    """
    gone: dict[int, set[int]] = {}
    for row, document in places:
        gone.setdefault(row, set()).add(document)
    plain = dataset.with_format(None)
    cut = {row: _cut(plain[row], documents) for row, documents in gone.items()} if packed else {}
    left = {row: of for row, of in cut.items() if of["input_ids"]}
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
    lengths = document_lengths(row)
    kept = [number not in documents for number, length in enumerate(lengths) for _ in range(length)]
    shorter = {
        name: list(compress(value, kept)) if isinstance(value, list) and len(value) == len(kept) else value
        for name, value in row.items()
    }
    left = [length for number, length in enumerate(lengths) if number not in documents]
    return shorter | {LENGTHS: left} if LENGTHS in row else shorter


def lengths_of(data: Any) -> list[list[int]] | None:
    """How long the documents of each packed row are; None where rows are not packed."""
    if not isinstance(data, Dataset) or not is_packed(data):
        return None
    if LENGTHS in data.column_names:
        return list(data.with_format(None)[LENGTHS])
    positions = data.with_format("numpy", columns=[POSITIONS])
    return [document_lengths({"input_ids": row[POSITIONS], POSITIONS: row[POSITIONS]}) for row in positions]


def counts_without(dataset: Dataset, places: Collection[Place]) -> tuple[int, int]:
    """How many rows, or documents of packed ones, are left of a data set without these, and of how many."""
    lengths = lengths_of(dataset)
    whole = len(dataset) if lengths is None else sum(map(len, lengths))
    return whole - len(places), whole


def left_of(dataset: Dataset, places: Collection[Place]) -> str:
    """How much is left of a data set without these, in words."""
    left, whole = counts_without(dataset, places)
    if left < LITTLE * whole:
        return f"ONLY {left} of {whole} are trained on, so next to nothing is learned"
    return f"{left} of {whole} are trained on"


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
    names = sorted(read_columns(dataset))
    total = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(1000) if names else ():
        columns = [_pieces(table[name].combine_chunks()) for name in names]
        for values in zip(*columns, strict=True):
            digest = hashlib.sha256()
            for name, value in zip(names, values, strict=True):
                digest.update(f"{name} {len(value)} ".encode())
                digest.update(value)
            total += int.from_bytes(digest.digest())
    return hashlib.sha256(f"{len(dataset)} {names} {total}".encode()).hexdigest()


def same_rows(data: Any, other: Dataset, columns: Collection[str]) -> bool:
    """Whether data are the rows of another set, in any order, in these columns as far as an audit reads them."""
    if not isinstance(data, Dataset) or len(data) != len(other) or not set(columns) <= set(data.column_names):
        return False
    # made from the same rows in the same way, as by a loader that does nothing of its own
    if data._fingerprint == other._fingerprint:
        return True
    one, another = data.select_columns(list(columns)), other.select_columns(list(columns))
    if is_packed(another) and sorted(lengths_of(one) or ()) != sorted(lengths_of(another) or ()):
        return False
    return content_of_all(one) == content_of_all(another)


def _pieces(column: pa.Array) -> Iterable[bytes]:
    """A column's values as bytes; tokens and masks, of which there are many, as they lie in memory."""
    if (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and not column.values.null_count:
        kind = column.type.value_type
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            values = column.values.to_numpy(zero_copy_only=False).astype(np.int64)
            return [values[a:b].tobytes() for a, b in pairwise(column.offsets.to_numpy())]
    return [_said({"": value}) for value in column.to_pylist()]


def _said(row: Mapping[str, Any]) -> bytes:
    """A row as JSON; of an image only that it is one, since it says where in memory it lies."""
    return json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode()

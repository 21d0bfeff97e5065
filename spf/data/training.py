"""Training data of the commands: a local file, a directory or a hub id."""

import glob
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from datasets import DatasetDict, load_dataset, load_dataset_builder
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError

from spf.data.rows import check_utf8, read_csv, read_jsonl
from spf.errors import SafetyDataError

SUFFIXES = (".json", ".jsonl", ".csv")


def load_training_data(name: str, config: str | None = None) -> DatasetDict:
    """The splits of a JSON, JSONL or CSV file, of a directory of them, or of a hub id.

    Raises:
        FileNotFoundError: no such file.
        SafetyDataError: it cannot be read, only in part, or holds no rows; the message names the file and, where one
            is, the line.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if path.is_dir() and glob.escape(name) != name:
        raise SafetyDataError(f"{name}: [, * and ? in its name are read as a pattern; name it otherwise")
    if not path.exists() and suffix in SUFFIXES:
        raise FileNotFoundError(f"{name}: no such training data file")
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in files if file.is_file() and file.suffix.lower() in SUFFIXES and not _hidden(file, path)]
    for file in files:
        check_utf8(file)  # of JSON other bytes would be replaced
    try:
        if path.is_file():
            kind = "csv" if suffix == ".csv" else "json"
            data = load_dataset(kind, data_files=glob.escape(name), cache_dir=_cache_of([path]))
        elif path.is_dir():
            builder = load_dataset_builder(name, name=config)
            taken = [Path(file) for of in (builder.config.data_files or {}).values() for file in of]
            if config is None and not _says_which(path):
                _refuse_left(path, {file.resolve() for file in files} - {file.resolve() for file in taken})
            data = load_dataset(name, name=config, cache_dir=_cache_of([file for file in taken if file.is_file()]))
        else:
            data = load_dataset(name, name=config)
    except SafetyDataError:
        raise
    except Exception as error:  # it says neither the file nor the line
        cause = _first_cause(error)
        if isinstance(cause, OSError) or not (path.exists() or isinstance(error, DatasetGenerationError)):
            raise
        for file in files:
            _refuse_unread(file)
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise SafetyDataError(
            f"{name}: cannot be read as training data ({said}); give JSON Lines, a JSON list of objects or CSV, with "
            "the same columns in every row"
        ) from error
    if not any(map(len, data.values())):
        raise SafetyDataError(f"{name}: holds no rows")
    return data


def _hidden(file: Path, below: Path) -> bool:
    """Whether the library passes it over: it is hidden, or tells of other data."""
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(below).parts)
    return hidden or (file != below and file.name in (*FILES_TO_IGNORE, "state.json"))


def _cache_of(files: Sequence[Path]) -> str:
    """A directory for what is made of these files: the library knows them by name and time only, and would give what
    stood in them before where both are the same."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return str(Path(HF_DATASETS_CACHE) / f"spf-{digest.hexdigest()[:32]}")


def _says_which(directory: Path) -> bool:
    """Whether a data set's card there says which files are read."""
    card = directory / "README.md"
    head = card.read_text("utf-8", "replace").split("\n---")[0] if card.is_file() else ""
    return (directory / ".huggingface.yaml").is_file() or re.search(r"^configs:", head, re.MULTILINE) is not None


def _refuse_left(directory: Path, left: Collection[Path]) -> None:
    """
    Raises:
        SafetyDataError: files would not be read: of several kinds one is, and of names such as train.jsonl and
            more.jsonl those that name a split.
    """
    if left:
        names = ", ".join(sorted(path.name for path in left)[:3])
        raise SafetyDataError(
            f"{directory}: {len(left)} of its files would not be read, {names} among them (one kind of file is, and "
            "where a name says train or test, those that say so); put what belongs together into files of one kind, "
            "train-1.jsonl, train-2.jsonl and so on, or name one file"
        )


def _refuse_unread(path: Path) -> None:
    """
    Raises:
        SafetyDataError: the file is empty, or a line of it is no JSON or CSV.
    """
    if path.suffix.lower() == ".csv":
        rows = list(read_csv(path))
    elif path.suffix.lower() == ".json" and (text := path.read_text("utf-8-sig")).lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise SafetyDataError(
                f"{path}:{error.lineno}: not JSON ({error.msg}); it begins as a list of objects"
            ) from error
    else:
        rows = list(read_jsonl(path))
    if not rows:
        raise SafetyDataError(f"{path}: holds no rows")


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error

"""Training data of the commands: a local file, a directory or a hub id."""

import json
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from spf.data.rows import check_utf8, read_csv, read_jsonl
from spf.errors import SafetyDataError

SUFFIXES = (".json", ".jsonl", ".csv")


def load_training_data(name: str, config: str | None = None) -> DatasetDict:
    """The splits of a JSON, JSONL or CSV file, of a directory of them, or of a hub id.

    Raises:
        FileNotFoundError: no such file.
        SafetyDataError: it cannot be read, or holds no rows; the message names the file and, where one is, the line.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if not path.exists() and suffix in SUFFIXES:
        raise FileNotFoundError(f"{name}: no such training data file")
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in files if file.is_file() and file.suffix.lower() in SUFFIXES]
    for file in files:
        check_utf8(file)  # of JSON other bytes would be replaced
    try:
        if path.is_file():
            data = load_dataset("csv" if suffix == ".csv" else "json", data_files=name)
        else:
            data = load_dataset(name, name=config)
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

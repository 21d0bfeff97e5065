"""Training data of the commands: a local file, a directory or a hub id."""

from pathlib import Path

from datasets import DatasetDict, load_dataset


def load_training_data(name: str, config: str | None = None) -> DatasetDict:
    """The splits of a JSON, JSONL or CSV file, of a directory of them, or of a hub id.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(name)
    if path.is_file():
        return load_dataset("csv" if path.suffix == ".csv" else "json", data_files=name)
    if path.suffix in (".json", ".jsonl", ".csv"):
        raise FileNotFoundError(f"{name}: no such training data file")
    return load_dataset(name, name=config)

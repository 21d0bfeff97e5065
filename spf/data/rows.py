"""Safety data: load and validate."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from spf.errors import SafetyDataError
from spf.text.generation import Messages

PACKAGED = "spf/prompts/harmful_anchors.jsonl"


@dataclass(frozen=True)
class SafetyRow:
    """One harmful prompt, its refusal if the data has one, and where it came from.

    cut: the refusal is only the beginning of one, so no end of the turn is to follow it.
    """

    messages: Messages
    refusal: str | None
    where: str
    cut: bool = False


def packaged_prompts(name: str) -> list[str]:
    """The prompts of a packaged file: harmful_{anchors,attack,validation,eval} or benign_{anchors,validation,eval}.

    Anchors are for the safety data, attack for poisoned training data, validation for choosing settings, eval for
    what is reported. No prompt is in two files.
    """
    text = (files("spf") / "prompts" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def load_safety_rows(source: str | Path | Dataset | None = None) -> list[SafetyRow]:
    """Read safety data: a JSONL or CSV file, a `Dataset`, a hub id, or None for the packaged prompts.

    Columns: `prompt` (text or messages) with or without `refusal`, or `messages` (TRL's conversational
    format; a last assistant message is the refusal where no column says otherwise). `cut`, if it is there, says
    whether the refusal is only the beginning of one. Only a name that is
    no local file and has no file suffix is looked up on the hub (its train split).

    Raises:
        SafetyDataError: no such file, no rows, a missing column or a bad row.
    """
    if source is None:
        return [
            SafetyRow([{"role": "user", "content": p}], None, f"{PACKAGED}:{i}")
            for i, p in enumerate(packaged_prompts("harmful_anchors"), 1)
        ]
    if isinstance(source, Dataset):
        return _rows(enumerate(source), "the data set")
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return _rows(enumerate(csv.DictReader(file), 2), str(path))
        if path.suffix.lower() in (".jsonl", ".json"):
            return _rows(read_jsonl(path), str(path))
        raise SafetyDataError(f"{path}: safety data must be .jsonl or .csv, not {path.suffix or 'without suffix'}")
    if path.is_dir():
        raise SafetyDataError(f"{path}: a directory; give a .jsonl or .csv file, or datasets.load_from_disk of it")
    if path.suffix.lower() in (".jsonl", ".json", ".csv") or path.is_absolute():
        raise SafetyDataError(f"{path}: no such safety data file")
    try:
        loaded = load_dataset(str(source))
    except Exception as error:
        raise SafetyDataError(
            f"{source}: neither a file nor a data set that could be loaded from the hub ({error})"
        ) from error
    if isinstance(loaded, DatasetDict):
        if "train" not in loaded:
            raise SafetyDataError(f"{source}: has no train split, only {', '.join(loaded)}")
        loaded = loaded["train"]
    return _rows(enumerate(loaded), str(source))


def read_jsonl(path: Path) -> Iterable[tuple[int, dict]]:
    """Line number and object of every line that is not blank.

    Raises:
        SafetyDataError: a line is not a JSON object.
    """
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SafetyDataError(
                    f"{path}:{number}: not a JSON object ({error.msg}); every line has to be one (JSON Lines)"
                ) from error
            if not isinstance(row, dict):
                raise SafetyDataError(f"{path}:{number}: not a JSON object; every line has to be one (JSON Lines)")
            yield number, row


def _rows(records: Iterable[tuple[int, dict]], name: str) -> list[SafetyRow]:
    rows = [_row(record, f"{name}:{number}") for number, record in records]
    if not rows:
        raise SafetyDataError(f"{name}: holds no rows")
    return rows


def _row(record: dict, where: str) -> SafetyRow:
    if record.get("messages") is not None:
        messages, refusal = record["messages"], record.get("refusal")
    elif record.get("prompt") is not None:
        prompt, refusal = record["prompt"], record.get("refusal")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    else:
        columns = ", ".join(map(str, record)) or "none"
        raise SafetyDataError(f"{where}: needs a column `prompt` or `messages`; it has {columns}")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise SafetyDataError(f"{where}: messages must be a list of objects with text `role` and `content`")
    if messages and messages[-1]["role"] == "assistant":
        messages, refusal = messages[:-1], messages[-1]["content"] if refusal is None else refusal
    if not any(m["content"].strip() for m in messages):
        raise SafetyDataError(f"{where}: the prompt is empty")
    if refusal is not None and (not isinstance(refusal, str) or not refusal.strip()):
        raise SafetyDataError(f"{where}: the refusal is empty; leave the column out to use the model's own")
    cut = record.get("cut", False)
    if not isinstance(cut, bool):
        raise SafetyDataError(f"{where}: cut must be true or false, not {cut!r}")
    return SafetyRow(messages, refusal, where, cut)

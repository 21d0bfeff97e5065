"""Safety data: load and validate."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset

from spf.errors import SafetyDataError
from spf.text.chat import Messages

PACKAGED = "spf/prompts/harmful_anchors.jsonl"

ENOUGH = 156
"""So many of the packaged prompts are asked by a rule that would take all."""

CALIBRATION_PROMPTS = 32
"""Packaged benign prompts on which a fresh lora_A keeps the size of its response."""


@dataclass(frozen=True)
class SafetyRow:
    """One harmful prompt, its refusal if the data has one, and where it came from.

    cut: the refusal is only the beginning of one, so no end of the turn is to follow it. own: it is the model's own.
    form: the kind of request (packaged prompts; empty for a user's).
    """

    messages: Messages
    refusal: str | None
    where: str
    cut: bool = False
    own: bool = False
    form: str = ""


def packaged_prompts(name: str) -> list[str]:
    """The prompts of a packaged file: harmful_{anchors,attack,validation,eval}, benign_{anchors,validation,eval} or
    harmless_tasks.

    Anchors are for the safety data, they and the harmless tasks for the probe of over-refusals, attack for poisoned
    training data, validation for choosing settings, eval for what is reported. No prompt is in two files.
    """
    return [row["prompt"] for row in _packaged(name)]


def _packaged(name: str) -> list[dict[str, str]]:
    text = (files("spf") / "prompts" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def packaged_rows(name: str, refusal: str | None = None) -> list[SafetyRow]:
    """The prompts of a packaged file as rows, all with the same refusal or none."""
    prompts = enumerate(packaged_prompts(name), 1)
    return [SafetyRow([{"role": "user", "content": p}], refusal, f"{name}:{i}") for i, p in prompts]


def benign_rows() -> list[SafetyRow]:
    """Packaged benign prompts, without an answer."""
    return packaged_rows("benign_anchors", "")[:CALIBRATION_PROMPTS]


def load_safety_rows(source: str | Path | Dataset | None = None) -> list[SafetyRow]:
    """Read safety data: a JSONL or CSV file, a `Dataset`, a hub id, or None for the packaged prompts.

    Columns: `prompt` (text or messages) with or without `refusal`, or `messages` (TRL's conversational
    format; a last assistant message is the refusal where no column says otherwise). TRL's `completion`, and `chosen` of
    preference data (with `prompt`, or as whole conversations), are refusals, too. `cut`, if it is there, says
    whether the refusal is only the beginning of one. Only a name that is
    no local file and has no file suffix is looked up on the hub (its train split).

    Raises:
        SafetyDataError: no such file, no rows, a missing column or a bad row.
    """
    if source is None:
        return [
            SafetyRow([{"role": "user", "content": row["prompt"]}], None, f"{PACKAGED}:{i}", form=row["form"])
            for i, row in enumerate(_packaged("harmful_anchors"), 1)
        ]
    if isinstance(source, Dataset):
        return _rows(enumerate(source), "the data set")
    path = Path(source)
    if is_local(path):
        return _local_rows(path)
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


def check_source(name: str, source: Any) -> None:
    """Refuse what is no source of rows; a file is read, so that a mistake in it shows before a model is loaded.

    Raises:
        TypeError: of another kind.
        SafetyDataError: as `load_safety_rows`.
    """
    if not isinstance(source, str | Path | Dataset | None):
        kind = type(source).__name__
        raise TypeError(f"{name} must be a file, a hub id or a datasets.Dataset (one split), not {kind}")
    if isinstance(source, str | Path) and is_local(Path(source)):
        load_safety_rows(source)


def is_local(path: Path) -> bool:
    """Whether the name is that of a file or directory, be it there or not; any other is looked up on the hub."""
    return path.exists() or path.suffix.lower() in (".jsonl", ".json", ".csv") or path.is_absolute()


def _local_rows(path: Path) -> list[SafetyRow]:
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return _rows(read_csv(path), str(path))
        if path.suffix.lower() in (".jsonl", ".json"):
            return _rows(read_jsonl(path), str(path))
        raise SafetyDataError(f"{path}: safety data must be .jsonl or .csv, not {path.suffix or 'without suffix'}")
    if path.is_dir():
        raise SafetyDataError(f"{path}: a directory; give a .jsonl or .csv file, or datasets.load_from_disk of it")
    raise SafetyDataError(f"{path}: no such safety data file")


def in_turn(rows: Sequence[SafetyRow], seed: int) -> list[SafetyRow]:
    """The rows in an order that the seed chooses, all forms of request in turn: the first few have each of them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter[str] = Counter()
    turns = []
    for row in (rows[i] for i in order):
        turns.append((seen[row.form], row))
        seen[row.form] += 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]


def check_utf8(path: Path) -> None:
    """
    Raises:
        SafetyDataError: the file is not UTF-8 text; the message names the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SafetyDataError(f"{path}:{number}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def read_csv(path: Path) -> Iterable[tuple[int, dict]]:
    """Line number (of a row's last line) and fields of every row.

    Raises:
        SafetyDataError: a row has more or fewer fields than the header, or two columns share a name.
    """
    check_utf8(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        rows = _csv_rows(reader, path)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise SafetyDataError(f"{path}:1: two columns have the same name")
        for fields in rows:
            if not fields:
                continue
            if len(fields) != len(header):
                raise SafetyDataError(
                    f"{path}:{reader.line_num}: {len(fields)} fields where the header has {len(header)}; put text with "
                    "commas or line breaks into double quotes"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))


def _csv_rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # an unclosed quote would swallow the rest of the file
        raise SafetyDataError(f"{path}:{reader.line_num}: not CSV ({error}); close every double quote") from error


def read_jsonl(path: Path) -> Iterable[tuple[int, dict]]:
    """Line number and object of every line that is not blank.

    Raises:
        SafetyDataError: a line is not a JSON object.
    """
    check_utf8(path)
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise SafetyDataError(
                    f"{path}:{number}: not a JSON object ({said}); every line has to be one (JSON Lines)"
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
    messages, refusal = _prompt_and_refusal(record, where)
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise SafetyDataError(f"{where}: messages must be a list of objects with text `role` and `content`")
    messages = [{**m, "content": _text(m.get("content"), where)} for m in messages]
    if messages and messages[-1]["role"] == "assistant":
        messages, refusal = messages[:-1], messages[-1]["content"] if refusal is None else refusal
    if not messages or any(m["role"] == "user" and not m["content"].strip() for m in messages):
        raise SafetyDataError(f"{where}: the prompt is empty")
    if refusal is not None and (not isinstance(refusal, str) or not refusal.strip()):
        raise SafetyDataError(f"{where}: the refusal is empty; leave the column out to use the model's own")
    cut = record.get("cut", False)
    if not isinstance(cut, bool):
        raise SafetyDataError(f"{where}: cut must be true or false, not {cut!r}")
    return SafetyRow(messages, refusal, where, cut)


def _prompt_and_refusal(record: dict, where: str) -> tuple[Any, Any]:
    """What a row asks, as messages, and how it is refused: `refusal`, or TRL's `completion` or `chosen`."""
    answers = {key: record[key] for key in ("refusal", "completion", "chosen") if record.get(key) is not None}
    prompt = record["messages"] if record.get("messages") is not None else record.get("prompt")
    said = {key: _last_said(answer, where) for key, answer in answers.items()}
    _refuse_contradictions(record, where)
    if len(set(said.values())) > 1:
        raise SafetyDataError(f"{where}: the columns {' and '.join(said)} say different things; keep one of them")
    refusal = next(iter(said.values()), None)
    if prompt is None and isinstance(record.get("chosen"), list):
        # a preference pair of whole conversations: the prompt is what comes before the answer
        prompt = [m for m in record["chosen"][:-1] if isinstance(m, dict)]
    if prompt is None:
        columns = ", ".join(map(str, record)) or "none"
        raise SafetyDataError(f"{where}: needs a column `prompt` or `messages`; it has {columns}")
    if isinstance(prompt, str):
        if record.get("messages") is not None:
            raise SafetyDataError(f"{where}: messages must be a list of objects with text `role` and `content`")
        return [{"role": "user", "content": prompt}], refusal
    return prompt, refusal


def _refuse_contradictions(record: dict, where: str) -> None:
    """Columns that each have the conversation have to have the same."""
    chosen, rejected, prompt = record.get("chosen"), record.get("rejected"), record.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[:-1] != rejected[:-1]:
        raise SafetyDataError(f"{where}: chosen and rejected answer different conversations")
    for key in ("completion", "chosen"):
        answer = record.get(key)
        if prompt is not None and isinstance(answer, list) and len(answer) > 1 and answer[:-1] != prompt:
            raise SafetyDataError(f"{where}: {key} has more than one message and does not begin with the prompt")
    messages = record.get("messages")
    if isinstance(prompt, str) and isinstance(messages, list):
        asked = [m.get("content") for m in messages if isinstance(m, dict)]
        if prompt not in asked:
            raise SafetyDataError(f"{where}: the columns prompt and messages ask different things; keep one of them")
    answered = any(record.get(key) is not None for key in ("completion", "chosen"))
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if answered and isinstance(last, dict) and last.get("role") == "assistant":
        raise SafetyDataError(f"{where}: the prompt ends with the assistant, and there is a completion too")


def _last_said(answer: Any, where: str) -> Any:
    """The text of an answer that is given as text, or as messages that end with it."""
    if isinstance(answer, list):
        if not answer or not isinstance(answer[-1], dict) or answer[-1].get("role") != "assistant":
            raise SafetyDataError(f"{where}: completion and chosen must end with a message of the assistant")
        return _text(answer[-1].get("content"), where)
    if not isinstance(answer, str):
        raise SafetyDataError(f"{where}: a refusal must be text, not {answer!r}")
    return answer


def _text(content: Any, where: str) -> str:
    """The text of a message; content may be a list of text parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    if isinstance(content, list):
        raise SafetyDataError(f"{where}: content must be text; images and other parts cannot be held")
    if not isinstance(content, str):
        raise SafetyDataError(f"{where}: messages must be a list of objects with text `role` and `content`")
    return content

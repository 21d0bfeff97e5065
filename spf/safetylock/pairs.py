"""Preference pairs: a question with a safe and an unsafe answer; and where an answer ends in the rendered chat."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import HARMLESS_STUB, SafetyRow, complete_refusals, is_local, load_safety_rows, read_jsonl, render
from spf.errors import SafetyDataError
from spf.text.generation import Messages

ROLES = ("system", "user", "assistant")

_SENTINEL = "spf0the0answer0goes0here"


@dataclass(frozen=True)
class Pair:
    """A question (messages) with one safe and one unsafe answer, and where it came from."""

    messages: Messages
    safe: str
    unsafe: str
    where: str

    @property
    def question(self) -> str:
        """Identity of the question, as text."""
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)

    @property
    def key(self) -> str:
        """SHA-256 of question and answers: the same wherever the pair stands in its file."""
        return digest([self.question, self.safe, self.unsafe])


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def load_pairs(source: str | Path | Dataset) -> list[Pair]:
    """Read preference pairs: a JSONL file, a `Dataset`, or a hub id (its train split).

    Columns: `question`, `safe`, `unsafe`; or TRL's `chosen` and `rejected`, as text with a `prompt` or as
    conversations with or without one. A question is text or a list of messages.

    Raises:
        SafetyDataError: no such file, no rows, a missing column, an unknown role or an empty answer.
    """
    if isinstance(source, Dataset):
        return _pairs(enumerate(source), "the data set")
    path = Path(source)
    if path.is_file():
        return _pairs(read_jsonl(path), str(path))
    if is_local(path):
        raise SafetyDataError(f"{path}: no such file of preference pairs")
    try:
        loaded = load_dataset(str(source), split="train")
    except Exception as error:
        raise SafetyDataError(
            f"{source}: neither a file nor a data set that could be loaded from the hub ({error})"
        ) from error
    return _pairs(enumerate(loaded), str(source))


def packaged_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 100) -> list[Pair]:
    """Pairs from the packaged harmful prompts: the model's own refusal against a harmless compliance stub.

    Prompts that the model does not refuse are left out, so fewer than `count` pairs may come back.

    Raises:
        SafetyDataError: the model refuses none of the prompts.
    """
    rows = complete_refusals(load_safety_rows(None), model, tokenizer, wanted=count)
    return refusal_pairs(rows)


def refusal_pairs(rows: Sequence[SafetyRow]) -> list[Pair]:
    """Pairs from refusals that are there already, each against the harmless stub; rows without one are left out."""
    return [Pair(row.messages, row.refusal, HARMLESS_STUB, row.where) for row in rows if row.refusal]


def echoed(pairs: Sequence[Pair]) -> list[Pair]:
    """The questions of the pairs, refused or agreed to in one clause, with the request repeated after it.

    Both answers of such a pair end in the same words. Where every unsafe answer is the same stub, the last tokens
    of safe and unsafe answers differ in every word, and the directions hold those words; here they can hold only
    what went before. Not in the paper, whose unsafe answers are real ones.
    """
    return [
        Pair(
            pair.messages,
            f"I'm sorry, but I can't help with this request: \"{pair.messages[-1]['content']}\"",
            f'Sure, I can help with this request: "{pair.messages[-1]["content"]}"',
            pair.where,
        )
        for pair in pairs
    ]


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """One pair a question (the one with the smallest key), sorted by key: the order of the file does not matter."""
    kept: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.key):
        kept.setdefault(pair.question, pair)
    return list(kept.values())


def mean_words(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean length in words of the safe and of the unsafe answers."""
    return (
        sum(len(pair.safe.split()) for pair in pairs) / len(pairs),
        sum(len(pair.unsafe.split()) for pair in pairs) / len(pairs),
    )


def encode(messages: Messages, answer: str, where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of the chat up to the last token of the answer, and how many of them are the answer's.

    What the template writes after an answer is found by rendering a placeholder answer, never by a constant.

    Raises:
        SafetyDataError: the template refuses the messages, or changes or repeats the answer.
    """
    prefix, suffix = _frame(messages, where, tokenizer)
    text = _rendered(messages, answer, where, tokenizer)
    if not text.startswith(prefix) or not text.endswith(suffix) or len(text) <= len(prefix) + len(suffix):
        raise SafetyDataError(f"{where}: the chat template changes what stands around this answer")
    # Later tokens cannot reach back in a causal model, so the template's ending is simply left out.
    ids = tokenizer(text[: len(text) - len(suffix)], add_special_tokens=False)["input_ids"]
    return ids, max(1, len(ids) - len(tokenizer(prefix, add_special_tokens=False)["input_ids"]))


def _frame(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    before, found, after = _rendered(messages, _SENTINEL, where, tokenizer).partition(_SENTINEL)
    if not found or _SENTINEL in after:
        raise SafetyDataError(f"{where}: the chat template does not show the answer exactly once")
    return before, after


def _rendered(messages: Messages, answer: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return render(SafetyRow(messages, answer.strip(), where), tokenizer, answered=True)


def _pairs(records: Iterable[tuple[int, dict]], name: str) -> list[Pair]:
    pairs = [_pair(record, f"{name}:{number}") for number, record in records]
    if not pairs:
        raise SafetyDataError(f"{name}: holds no rows")
    return pairs


def _pair(record: dict, where: str) -> Pair:
    if record.get("safe") is not None and record.get("unsafe") is not None:
        question, safe, unsafe = record.get("question"), record["safe"], record["unsafe"]
    elif record.get("chosen") is not None and record.get("rejected") is not None:
        question, safe, unsafe = record.get("prompt"), record["chosen"], record["rejected"]
    else:
        columns = ", ".join(map(str, record)) or "none"
        raise SafetyDataError(f"{where}: needs question, safe and unsafe, or chosen and rejected; it has {columns}")
    if isinstance(safe, list) and isinstance(unsafe, list):
        for answer in (safe, unsafe):
            _check_messages(answer, where)
        if safe[-1]["role"] != "assistant" or unsafe[-1]["role"] != "assistant":
            raise SafetyDataError(f"{where}: both conversations must end with an assistant message")
        if question is None:
            question = safe[:-1]
        if safe[:-1] != unsafe[:-1] or safe[:-1] not in ([], question):
            raise SafetyDataError(f"{where}: chosen and rejected do not answer the same conversation")
        safe, unsafe = safe[-1]["content"], unsafe[-1]["content"]
    messages: Any = [{"role": "user", "content": question}] if isinstance(question, str) else question
    _check_messages(messages, where)
    if messages[-1]["role"] == "assistant":
        raise SafetyDataError(f"{where}: the question ends with an assistant message")
    for label, answer in (("safe", safe), ("unsafe", unsafe)):
        if not isinstance(answer, str) or not answer.strip():
            raise SafetyDataError(f"{where}: the {label} answer is empty or no text")
    if safe.strip() == unsafe.strip():
        raise SafetyDataError(f"{where}: the safe and the unsafe answer are the same")
    return Pair(messages, safe, unsafe, where)


def _check_messages(messages: Any, where: str) -> None:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("content", "").strip() for m in messages
        )
    ):
        raise SafetyDataError(f"{where}: the question must be text, or a list of messages with role and content")
    for message in messages:
        if message.get("role") not in ROLES:
            raise SafetyDataError(
                f"{where}: unknown role {message.get('role')!r}; it must be one of {', '.join(ROLES)}"
            )

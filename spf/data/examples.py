"""Examples of training data, whatever its form: a prompt as the model is asked it, and what the data answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from spf.errors import ChatError, SafetyDataError
from spf.text.chat import Messages, render_chat

IGNORED = -100
"""Label of a token that is not learned."""

TARGET_TOKENS = 48
"""As much of an answer is read as tells whether it refuses."""

COLUMNS = (
    *("messages", "prompt", "completion", "chosen", "text", "label"),
    *("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths"),
    *("prompt_ids", "completion_ids", "chosen_ids", "answer_ids"),
)
"""Columns that are read."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt (token ids, up to where the answer begins), the beginning of its answer, its row, and which document of
    a packed row it is in."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    target: str
    row: int
    document: int = 0


@dataclass
class Examples:
    """What was read of training data: `rows` of them, `unread` ones in which no answer was found, and why."""

    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    unread: int = 0
    why: str = ""


def read_examples(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
    max_length: int = 1 << 30,
) -> Examples:
    """Every answer that the rows teach, with the prompt before it.

    Rows are those of TRL (`messages`; `prompt` with `completion` or `chosen`, text or messages; `chosen` alone; `text`
    in the model's chat template) or tokenised (`input_ids` with `labels`, `completion_mask`, `assistant_masks` or the
    template's own marks, packed with `seq_lengths`; `prompt_ids` with `completion_ids`, `chosen_ids` or `answer_ids`).
    Prompts that are no chat are put as a user's message. Answers that KTO calls undesirable are not taught. options:
    variables of the template; max_length: tokens of the longest prompt.
    """
    reader = _Reader(tokenizer, options)
    found = Examples()
    for number, row in enumerate(rows):
        found.rows += 1
        if not isinstance(row, Mapping):
            found.unread += 1
            found.why = found.why or f"row {number}: a {type(row).__name__} without column names"
            continue
        if row.get("label") is False:
            continue
        try:
            read = [found for found in reader.read(_plain_row(row)) if len(found[1]) <= max_length]
        except (ChatError, SafetyDataError, TypeError, KeyError, IndexError) as error:
            read, found.why = [], found.why or f"row {number}: {error}"
        if not read:
            found.unread += 1
            found.why = found.why or f"row {number}: no answer found in its columns {', '.join(row)}"
        for document, prompt, target in read:
            text = str(tokenizer.decode(target[:TARGET_TOKENS], skip_special_tokens=True)).strip()
            found.examples.append(Example(tuple(prompt), tuple(target[:TARGET_TOKENS]), text, number, document))
    return found


class _Reader:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None):
        self.tokenizer, self.options = tokenizer, options
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}

    def read(self, row: Row) -> Iterator[tuple[int, list[int], list[int]]]:
        """Which document of the row, its prompt, its answer."""
        if "input_ids" in row and "prompt_ids" not in row:
            for number, (ids, learned) in enumerate(self._documents(row)):
                yield from ((number, *found) for found in self._tokenised(ids, learned))
        else:
            yield from ((0, *found) for found in self._pairs(row))

    def _pairs(self, row: Row) -> Iterator[tuple[list[int], list[int]]]:
        if "prompt_ids" in row:
            for column in ("completion_ids", "chosen_ids", "answer_ids"):
                if column in row:
                    yield self._asked(list(row["prompt_ids"])), list(row[column])
            return
        answer = next((row[key] for key in ("completion", "chosen") if row.get(key)), None)
        if isinstance(row.get("prompt"), str | list) and isinstance(answer, str | list):
            prompt = _messages(row["prompt"], "user")
            yield from self._answers([*prompt, *_messages(answer, "assistant")], len(prompt))
            return
        conversation = answer or row.get("messages")
        if isinstance(conversation, list):
            yield from self._answers(conversation, 1)
        elif isinstance(row.get("text"), str):
            ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            yield from self._marked(ids)

    def _answers(self, conversation: Sequence[Any], first: int) -> Iterator[tuple[list[int], list[int]]]:
        """Every answer from the message `first` on, with what stands before it."""
        for i, message in enumerate(conversation):
            if message["role"] == "assistant" and i >= first:
                yield self._prompt(_messages(conversation[:i], "user")), self._ids(_content([message]))

    def _documents(self, row: Row) -> Iterator[tuple[list[int], list[bool]]]:
        ids = list(row["input_ids"])
        learned = self._learned(row, ids)
        start = 0
        for length in row.get("seq_lengths") or [len(ids)]:
            yield ids[start : start + length], learned[start : start + length]
            start += length

    def _tokenised(self, ids: list[int], learned: Sequence[bool]) -> Iterator[tuple[list[int], list[int]]]:
        if all(learned):
            yield from self._marked(ids)
            return
        for begin in range(1, len(ids)):
            if learned[begin] and not learned[begin - 1]:
                end = next((i for i in range(begin, len(ids)) if not learned[i]), len(ids))
                yield self._asked(ids[:begin]), ids[begin:end]
                # a completion of several turns
                yield from self._marked(ids[:end], begin + 1)

    @staticmethod
    def _learned(row: Row, ids: Sequence[int]) -> list[bool]:
        if row.get("labels") is not None:
            return [label != IGNORED for label in row["labels"]]
        for column in ("completion_mask", "assistant_masks"):
            if row.get(column) is not None:
                return [bool(mask) for mask in row[column]]
        return [True] * len(ids)

    def _marked(self, ids: list[int], start: int = 0) -> Iterator[tuple[list[int], list[int]]]:
        """Answers, from token `start` on, behind what the template puts between a user's message and its answer."""
        mark = self._mark
        for begin in range(max(start, len(mark)), len(ids)) if mark else ():
            if ids[begin - len(mark) : begin] == mark:
                end = next((i for i in range(begin, len(ids)) if ids[i] in self.special), len(ids))
                yield self._asked(ids[:begin]), ids[begin:end]

    @cached_property
    def _mark(self) -> list[int]:
        asked: Messages = [{"role": "user", "content": "QUESTION"}]
        whole = render_chat(
            self.tokenizer,
            [*asked, {"role": "assistant", "content": "ANSWER"}],
            generation_prompt=False,
            options=self.options,
        )
        return self._ids(whole.rpartition("ANSWER")[0].rpartition("QUESTION")[2])

    @cached_property
    def _opening(self) -> list[int]:
        """What the generation prompt ends with beyond the mark: the empty thoughts of a model that can think."""
        asked: Messages = [{"role": "user", "content": "QUESTION"}]
        prompt = render_chat(self.tokenizer, asked, generation_prompt=True, options=self.options)
        ids = self._ids(prompt.rpartition("QUESTION")[2])
        return ids[len(self._mark) :] if self._mark and ids[: len(self._mark)] == self._mark else []

    def _asked(self, ids: list[int]) -> list[int]:
        """The prompt as the model is asked it: a chat that is open for its answer."""
        opening, mark = self._opening, self._mark
        if opening and ids[-len(opening) :] == opening:
            return ids
        if mark and ids[-len(mark) :] == mark:
            return [*ids, *opening]
        return self._prompt(_messages(str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip(), "user"))

    def _prompt(self, messages: Messages) -> list[int]:
        return self._ids(render_chat(self.tokenizer, messages, generation_prompt=True, options=self.options))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain_row(row: Row) -> Row:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}


def _messages(content: Any, role: str) -> Messages:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return [{"role": message["role"], "content": _plain(message["content"])} for message in content]


def _content(messages: Messages) -> str:
    return next((_plain(m["content"]) for m in messages if m["role"] == "assistant"), "")[: 8 * TARGET_TOKENS]


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise SafetyDataError("a message without text")
    return content

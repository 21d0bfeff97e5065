"""Examples of training data, whatever its form: a prompt as the model is asked it, and what the data answer."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from spf.data.columns import as_trl_reads, document_lengths
from spf.errors import ChatError, SafetyDataError, kind_of
from spf.text.chat import Messages, chat_options, render_chat, template_variables
from spf.text.generation import THOUGHTS, after_thoughts, special_ids, thinks

IGNORED = -100
"""Label of a token that is not learned."""

TARGET_TOKENS = 48
"""As much of an answer is read as tells whether it refuses."""

ANSWERING = ("assistant", "gpt", "model", "bot", "chatbot", "ai")
"""Roles of answers in other data, which some templates render as they stand; TRL learns an assistant's only."""

QUESTION: Messages = [{"role": "user", "content": "QUESTION"}]
TURN: Messages = [*QUESTION, {"role": "assistant", "content": "ANSWER"}]

Row = Mapping[str, Any]

ARRAYS = (torch.Tensor, np.ndarray, np.generic)


@dataclass(frozen=True)
class Example:
    """A prompt (token ids, up to where the answer begins), the beginning of its answer, its row, and which document of
    a packed row it is in. undesired: it is taught not to answer so (KTO)."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    target: str
    row: int
    document: int = 0
    undesired: bool = False


@dataclass
class Examples:
    """What was read of training data: `rows` of them, `unread` ones in which an answer was not found, and why, and
    `undesired` ones."""

    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    unread: int = 0
    undesired: int = 0
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
    template's own marks, packed with `seq_lengths` or `position_ids`; `prompt_ids` with `completion_ids`, `chosen_ids`
    or `answer_ids`). Prompts that are no chat are put as a user's message, without white space around them; chats are
    rendered with the row's `tools` and `chat_template_kwargs`. What KTO calls undesirable is marked.
    options: variables of the template; max_length: tokens of the longest prompt and one of its answer.
    """
    reader = _Reader(tokenizer, options)
    found = Examples()
    for number, row in enumerate(rows):
        found.rows += 1
        if not isinstance(row, Mapping):
            found.unread += 1
            found.why = found.why or f"row {number}: {kind_of(row)} without column names"
            continue
        row = _plain_row(row)
        undesired = _undesired(row)
        found.undesired += undesired
        try:
            every = list(reader.read(row))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            every, found.why = [], found.why or f"row {number}: {error}"
        # an answer has one token at least
        read = [one for one in every if len(one[1]) < max_length]
        documents = len(document_lengths(row)) if "input_ids" in row else 1
        if len(read) < len(every):
            found.unread += 1
            found.why = found.why or f"row {number}: a prompt fills the {max_length} tokens of the model's context"
        elif len({document for document, *_ in read}) < documents:
            found.unread += 1
            which = f"row {number}: no answer found in" + " one of the documents packed in" * bool(read)
            found.why = found.why or f"{which} its columns {', '.join(row)}"
        for document, prompt, target in read:
            ids, text = reader.said(target)
            found.examples.append(Example(tuple(prompt), tuple(ids), text, number, document, undesired))
    return found


class _Reader:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None):
        self.tokenizer, self.options = tokenizer, options
        self.special = special_ids(tokenizer)

    def read(self, row: Row) -> Iterator[tuple[int, list[int], list[int]]]:
        """Which document of the row, its prompt, its answer."""
        if "input_ids" in row and "prompt_ids" not in row:
            for number, (ids, learned) in enumerate(self._documents(row)):
                yield from ((number, *found) for found in self._tokenised(ids, learned))
        else:
            yield from ((0, *found) for found in self._pairs(as_trl_reads(row)))

    def _pairs(self, row: Row) -> Iterator[tuple[list[int], list[int]]]:
        if "prompt_ids" in row:
            for column in ("completion_ids", "chosen_ids", "answer_ids"):
                if column in row:
                    ids = list(row["prompt_ids"])
                    yield self._parted([*ids, *row[column]], len(ids)) or (self._asked(ids), list(row[column]))
            return
        answer = next((row[key] for key in ("completion", "chosen") if row.get(key)), None)
        if isinstance(row.get("prompt"), str) and isinstance(answer, str) and self._is_rendered(row["prompt"]):
            ids, answered = self._ids(row["prompt"]), self._ids(answer)
            yield self._parted([*ids, *answered], len(ids)) or (self._asked(ids), answered)
            return
        if isinstance(row.get("prompt"), str | list) and isinstance(answer, str | list):
            text = isinstance(row["prompt"], str)
            *prompt, last = _messages(row["prompt"].strip() if text else row["prompt"], "user")
            answers = _messages(answer, "assistant")
            if last["role"] == "assistant":  # what the answer goes on from
                answers[0] = {**answers[0], "content": last["content"] + answers[0]["content"]}
            else:
                prompt.append(last)
            yield from self._answers([*prompt, *answers], len(prompt), {} if text else self._variables(row))
            return
        conversation = answer or row.get("messages")
        if isinstance(conversation, list):
            yield from self._answers(conversation, 1, self._variables(row))
        elif isinstance(row.get("text"), str):
            ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            yield from self._marked(ids)

    def _variables(self, row: Row) -> Row:
        """The variables of the template that a row has, as TRL's trainers render chats with them."""
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        known = template_variables(str(self.tokenizer.get_chat_template(tools=tools)))
        given = ({} if tools is None else {"tools": tools}) | (row.get("chat_template_kwargs") or {})
        return {name: value for name, value in given.items() if name in known}

    def _answers(
        self, conversation: Sequence[Any], first: int, variables: Row
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Every answer from the message `first` on, with what stands before it."""
        roles = [message["role"] for message in conversation]
        if other := next((role for role in roles if role != "assistant" and str(role).lower() in ANSWERING), None):
            raise SafetyDataError(f"a message of the role {other!r}, which is read as no answer; call it assistant")
        for i, message in enumerate(conversation):
            if message["role"] == "assistant" and i >= first:
                yield self._prompt(_messages(conversation[:i], "user"), variables), self._ids(_content([message]))

    def _documents(self, row: Row) -> Iterator[tuple[list[int], list[bool]]]:
        ids = list(row["input_ids"])
        learned = _learned(row, ids)
        start = 0
        for length in document_lengths(row):
            yield ids[start : start + length], learned[start : start + length]
            start += length

    def _tokenised(self, ids: list[int], learned: Sequence[bool]) -> Iterator[tuple[list[int], list[int]]]:
        if all(learned):
            yield from self._marked(ids)
            return
        for begin in range(1, len(ids)):
            if learned[begin] and not learned[begin - 1]:
                end = next((i for i in range(begin, len(ids)) if not learned[i]), len(ids))
                first = self._parted(ids[:end], begin)
                # a completion of several turns
                turns = list(self._marked(ids[:end], (end - len(first[1]) if first else begin) + 1))
                if first is None and not turns:
                    first = self._asked(ids[:begin]), ids[begin:end]
                yield from [first, *turns] if first else turns

    def _marked(self, ids: list[int], start: int = 0) -> Iterator[tuple[list[int], list[int]]]:
        """Answers, from token `start` on, behind what the template puts between a user's message and its answer."""
        for place in range(len(ids)):
            begin = place + self._mark_at(ids, place)
            if place < begin < len(ids) and begin >= start:
                end = next((i for i in range(begin, len(ids)) if ids[i] in self.special), len(ids))
                yield [*ids[:place], *self._opening], ids[begin:end]

    def _mark_at(self, ids: Sequence[int], place: int) -> int:
        """The length of the longest mark that begins here; 0 if there is none.

        One that ends with white space is that much shorter where the answer begins with some: both are one token then.
        """
        for mark in self._marks:
            if ids[place] == mark[0]:
                if ids[place : place + len(mark)] == mark:
                    return len(mark)
                short = len(mark) - 1
                if short and ids[place : place + short] == mark[:-1] and self._melted(ids, place + short, mark[-1]):
                    return short
        return 0

    def _melted(self, ids: Sequence[int], place: int, last: int) -> bool:
        """Whether a token there is the white space that a mark ends with, and more."""
        if place >= len(ids) or ids[place] in self.special:
            return False
        space, both = (str(self.tokenizer.decode([token])) for token in (last, ids[place]))
        return not space.strip() and len(space) < len(both) and both.startswith(space)

    @cached_property
    def _marks(self) -> list[list[int]]:
        """What the template puts between a user's message and its answer, the longest first.

        A model that can think is given empty thoughts before the last answer only, or in what is generated from, or
        the beginning of thoughts there.
        """
        texts = []
        for chat in (TURN, [*TURN, *TURN]):
            whole = render_chat(self.tokenizer, chat, generation_prompt=False, options=self.options)
            texts += whole.split("ANSWER")[:-1]
        thinking = dict.fromkeys(chat_options(self.tokenizer, None), True)
        texts.append(render_chat(self.tokenizer, QUESTION, generation_prompt=True, options=thinking))
        marks = [self._opening, *(self._ids(text.rpartition("QUESTION")[2]) for text in texts)]
        return sorted((mark for mark in marks if mark), key=len, reverse=True)

    @cached_property
    def _opening(self) -> list[int]:
        """What stands between a user's message and the answer that the model is asked for."""
        text = render_chat(self.tokenizer, QUESTION, generation_prompt=True, options=self.options)
        return self._ids(text.rpartition("QUESTION")[2])

    @cached_property
    def _closing(self) -> list[int]:
        """What the template puts behind an answer and before the next message, up to the last special token of it."""
        try:
            whole = render_chat(self.tokenizer, [*TURN, *TURN], generation_prompt=False, options=self.options)
        except ChatError:
            return []  # of one exchange only
        ids = self._ids(whole.partition("ANSWER")[2].partition("QUESTION")[0])
        last = max((i for i, token in enumerate(ids) if token in self.special), default=-1)
        return ids[: last + 1]

    def _parted(self, ids: list[int], begin: int) -> tuple[list[int], list[int]] | None:
        """The prompt and its answer, whose tokens are learned from `begin` on; it may have begun before, or behind.

        None if no answer stands there.
        """
        for place in range(begin, -1, -1):
            behind = place + self._mark_at(ids, place)
            if place < behind < len(ids):
                within = self.special.isdisjoint(ids[behind:begin])
                return ([*ids[:place], *self._opening], ids[behind:]) if within else None
        return None

    def _is_rendered(self, text: str) -> bool:
        """Whether a text is a chat in the model's template already, as ORPO's and CPO's trainers make it."""
        ids = self._ids(text)
        return any(len(mark) > 1 and ids[-len(mark) :] == mark for mark in self._marks)

    def _asked(self, ids: list[int]) -> list[int]:
        """The prompt as the model is asked it: a chat that is open for its answer."""
        if chat := self._reopened(ids):
            return chat
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return self._prompt(_messages(text, "user"), {})

    def _reopened(self, ids: list[int]) -> list[int]:
        """A chat that is open for an answer, opened as the model is asked; nothing if it is not open."""
        opened = (ids[: -len(mark)] for mark in self._marks if ids[-len(mark) :] == mark)
        return next(([*chat, *self._opening] for chat in opened), [])

    def said(self, target: list[int]) -> tuple[list[int], str]:
        """The beginning of an answer, as tokens and text, without thoughts."""
        # other turns may be behind it, with thoughts of theirs
        ends = (i for i in range(len(target)) if target[i : i + len(self._closing)] == self._closing)
        target = target[: next(ends, len(target)) if self._closing else len(target)]
        begins = str(self.tokenizer.decode(target[:TARGET_TOKENS], skip_special_tokens=True)).strip()
        if begins.startswith(THOUGHTS) or thinks(self.tokenizer):
            answer = after_thoughts(str(self.tokenizer.decode(target)))
            if answer is not None:
                target = self._ids(answer)
                begins = str(self.tokenizer.decode(target[:TARGET_TOKENS], skip_special_tokens=True)).strip()
        return target[:TARGET_TOKENS], begins

    def _prompt(self, messages: Messages, variables: Row) -> list[int]:
        options = {**(self.options or {}), **variables}
        ids = self._ids(render_chat(self.tokenizer, messages, generation_prompt=True, options=options))
        # a row that says how to think is asked without thoughts, too, as it is once it is tokenised
        return (variables and self._reopened(ids)) or ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _learned(row: Row, ids: Sequence[int]) -> list[bool]:
    if row.get("labels") is not None:
        return [label != IGNORED for label in row["labels"]]
    for column in ("completion_mask", "assistant_masks"):
        if row.get(column) is not None:
            return [bool(mask) for mask in row[column]]
    return [True] * len(ids)


def _undesired(row: Row) -> bool:
    """Whether it is taught not to answer so: KTO's `label`, which may be a number; beside other columns it is none."""
    label = row.get("label")
    return may_be_kto(row) and isinstance(label, bool | int) and not label


def may_be_kto(columns: Collection[str]) -> bool:
    """Whether a column `label` among these may be KTO's."""
    completion = "completion_ids" in columns or ("completion" in columns and "input_ids" not in columns)
    return completion and "label" in columns


def _plain_row(row: Row) -> Row:
    """Without tensors and arrays, as formatted data sets give them."""
    return {key: value.tolist() if isinstance(value, ARRAYS) else value for key, value in row.items()}


def _messages(content: Any, role: str) -> Messages:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return [{**message, "content": _text(message)} for message in content]


def _content(messages: Sequence[Row]) -> str:
    return next((_text(m) for m in messages if m["role"] == "assistant"), "")[: 8 * TARGET_TOKENS]


def _text(message: Row) -> str:
    """What a message says; one that calls tools may say nothing."""
    return "" if message.get("tool_calls") and not message.get("content") else _plain(message["content"])


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise SafetyDataError("a message without text")
    return content

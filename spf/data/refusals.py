"""Rows without a refusal are given the model's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data.chat import render
from spf.data.rows import PACKAGED, SafetyRow
from spf.errors import SafetyDataError
from spf.progress import progress
from spf.sharding import object_of_rank_0
from spf.text.generation import THOUGHTS, THOUGHTS_END, complete_tokens, generate_answers
from spf.text.refusal import is_refusal

READ_TOKENS = 20
"""Of an answer as long as this the judge reads the first sentence."""


@dataclass(frozen=True)
class Completed:
    """rows: those with a refusal. asked: how many the model was asked. answered: how many of these it answered instead
    of refusing, which are left out."""

    rows: list[SafetyRow]
    asked: int
    answered: int


def complete_refusals(
    rows: Sequence[SafetyRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
) -> list[SafetyRow]:
    """The rows of `ask_refusals`."""
    sizes: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return ask_refusals(rows, model, tokenizer, wanted=wanted, options=options, **sizes).rows


def ask_refusals(
    rows: Sequence[SafetyRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
    accept: Callable[[str], bool] | None = None,
    what: str = "own refusals",
) -> Completed:
    """The first `wanted` rows (all by default) with refusals, and how many were asked for one.

    A row without one gets the model's own answer, its first `max_new_tokens`, and is kept if `accept` says so, by
    default the refusal judge. All processes ask in step, and what rank 0 heard counts. options: variables of the
    template. what: the bar's name.

    Raises:
        SafetyDataError: a row cannot be rendered, or none is left.
    """
    for row in rows:
        render(row, tokenizer, options=options)
    wanted = len(rows) if wanted is None else min(wanted, len(rows))
    thinks = THOUGHTS in str(tokenizer.chat_template)
    kept: list[SafetyRow] = []
    start = asked = answered = 0
    with progress(wanted, what) as bar:
        while len(kept) < wanted and start < len(rows):
            chunk, before = rows[start : start + min(batch_size, wanted - len(kept))], len(kept)
            start += len(chunk)
            missing = [row.messages for row in chunk if row.refusal is None]
            asked += len(missing)
            heard = (
                generate_answers(
                    model,
                    tokenizer,
                    missing,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    options=options,
                    progress=False,
                )
                if missing
                else []
            )
            # rounding must not have ranks judge differently: the number of rounds depends on it
            judge = accept or is_refusal
            answers = iter(object_of_rank_0([(answer, judge(answer)) for answer in heard]))
            for row in chunk:
                if row.refusal is not None:
                    kept.append(row)
                    continue
                refusal, refused = next(answers)
                answered += not refused
                if refused:
                    # an answer that ended has its end token among the new ones; spaces may have been stripped, and
                    # thoughts of unknown length
                    length = len(tokenizer(refusal, add_special_tokens=False)["input_ids"])
                    unfinished = thinks and not refusal.endswith((".", "!", "?", "。"))
                    cut = length >= max_new_tokens - 2 or unfinished
                    kept.append(replace(row, refusal=refusal, cut=cut, own=True))
            bar.update(len(kept) - before)
    if not kept:
        raise SafetyDataError(_refused_none(rows))
    return Completed(kept, asked, answered)


def _refused_none(rows: Sequence[SafetyRow]) -> str:
    packaged = all(row.where.startswith(f"{PACKAGED}:") for row in rows)
    which = f"{len(rows)} packaged prompts" if packaged else f"{len(rows)} prompts from {rows[0].where} on"
    return (
        f"the model refused none of the {which} that it was asked, so there is no refusal to keep: it has another "
        "model's chat template, or refuses in words or a language that a judge cannot read, or is not aligned; `spf "
        "eval MODEL` shows its answers; give safety data with a column `refusal` if it refuses, or align it first (spf "
        "align)"
    )


def read_as_refusals(
    prompts: Sequence[Sequence[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Whether the model's greedy answers to prompts (token ids) read as refusals (`is_refusal`); rank 0's verdicts."""
    answers = complete_tokens(
        model, tokenizer, prompts, max_new_tokens=READ_TOKENS, batch_size=32, description="read answers"
    )
    return object_of_rank_0([is_refusal(answer.rpartition(THOUGHTS_END)[2].strip()) for answer in answers])

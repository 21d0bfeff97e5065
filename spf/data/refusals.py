"""Rows without a refusal are given the model's own."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data.chat import render
from spf.data.rows import SafetyRow
from spf.errors import SafetyDataError
from spf.text.generation import THOUGHTS, generate_answers
from spf.text.refusal import is_refusal


def complete_refusals(
    rows: Sequence[SafetyRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[SafetyRow]:
    """The first `wanted` rows (all by default) with refusals.

    A row without one gets the model's own answer, its first `max_new_tokens`, and is kept if the judge accepts it.

    Raises:
        SafetyDataError: a row cannot be rendered, or none is left.
    """
    for row in rows:
        render(row, tokenizer)
    wanted = len(rows) if wanted is None else min(wanted, len(rows))
    thinks = THOUGHTS in str(tokenizer.chat_template)
    kept: list[SafetyRow] = []
    start = 0
    while len(kept) < wanted and start < len(rows):
        chunk = rows[start : start + min(batch_size, wanted - len(kept))]
        start += len(chunk)
        missing = [row.messages for row in chunk if row.refusal is None]
        answers = iter(
            generate_answers(
                model,
                tokenizer,
                missing,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                description=f"own refusals, {len(kept)} of {wanted}",
            )
            if missing
            else []
        )
        for row in chunk:
            if row.refusal is not None:
                kept.append(row)
            elif is_refusal(refusal := next(answers)):
                # an answer that ended has its end token among the new ones; spaces may have been stripped, and thoughts
                # of unknown length
                length = len(tokenizer(refusal, add_special_tokens=False)["input_ids"])
                unfinished = thinks and not refusal.endswith((".", "!", "?", "。"))
                kept.append(replace(row, refusal=refusal, cut=length >= max_new_tokens - 2 or unfinished))
    if not kept:
        raise SafetyDataError(
            f"{rows[0].where} and {len(rows) - 1} more rows: the model refused none of the prompts, so there is "
            "no refusal to keep; give a column `refusal`, or align the model first (spf align)"
        )
    return kept

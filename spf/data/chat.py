"""Rows in the model's own chat template."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from spf.data.rows import SafetyRow
from spf.errors import ChatError, SafetyDataError
from spf.text.chat import Messages, render_chat


def render(
    row: SafetyRow,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answered: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The row's prompt, or with `answered` prompt and refusal, as text in the model's own chat template.

    options: variables of the template (`chat_template_kwargs`).

    Raises:
        SafetyDataError: the tokenizer has no chat template, or the template refuses the messages or leaves them out.
    """
    try:
        return render_chat(tokenizer, said(row, answered), generation_prompt=not answered, options=options)
    except ChatError as error:
        raise SafetyDataError(f"{row.where}: {error}") from error


def said(row: SafetyRow, answered: bool) -> Messages:
    """The row's messages, with `answered` its refusal too."""
    if not answered:
        return row.messages
    assert row.refusal is not None
    return [*row.messages, {"role": "assistant", "content": row.refusal}]

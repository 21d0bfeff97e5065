"""Rows in the model's own chat template."""

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from spf.data.rows import SafetyRow
from spf.errors import SafetyDataError


def render(row: SafetyRow, tokenizer: PreTrainedTokenizerBase, *, answered: bool = False) -> str:
    """The row's prompt, or with `answered` prompt and refusal, as text in the model's own chat template.

    Raises:
        SafetyDataError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise SafetyDataError(
            f"{row.where}: the tokenizer {tokenizer.name_or_path or ''} has no chat template, so it cannot be "
            "rendered; set tokenizer.chat_template"
        )
    messages = row.messages
    if answered:
        assert row.refusal is not None
        messages = [*messages, {"role": "assistant", "content": row.refusal}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered))
    except (TemplateError, KeyError, TypeError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise SafetyDataError(f"{row.where}: the chat template refuses the roles {roles} ({error})") from error

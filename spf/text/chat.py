"""Chats in a model's own template, and whether what was said is really in the tokens."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from spf.errors import ChatError

Messages = list[dict[str, str]]

SWITCHES = ("enable_thinking", "thinking")
"""Template variables, documented by their families, that make a model think aloud; off unless the user says
otherwise."""

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_FUNCTIONS = {"raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner", "lipsum"}
_ALWAYS = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The messages as text in the model's chat template; `options` are variables of it (`chat_template_kwargs`).

    Templates that read content as a list of parts are given it as such. The switches of models that think are set to
    False unless `options` has them.

    Raises:
        ChatError: there is no template, it refuses the messages, leaves out what one of them says, or does not know an
            option.
    """
    if tokenizer.chat_template is None:
        raise ChatError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template, so it cannot be "
            "rendered; set tokenizer.chat_template"
        )
    known = chat_options(tokenizer, options)
    lost, failed = "", None
    for parts in (False, True):
        said: list[dict[str, Any]] = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if parts else dict(m) for m in messages
        ]
        try:
            text = str(
                tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=generation_prompt, **known)
            )
        except (jinja2.exceptions.TemplateError, KeyError, TypeError, AttributeError) as error:
            failed = failed or error
            continue
        missing = _missing(_squeezed(text), [_squeezed(m["content"]) for m in messages])
        if missing is None:
            return text
        lost = lost or messages[missing]["role"]
    if failed is not None:
        roles = ", ".join(m["role"] for m in messages)
        raise ChatError(f"the chat template refuses the roles {roles} ({failed})") from failed
    raise ChatError(
        f"the chat template leaves out what the {lost} message says, whether it is given as text or as a list "
        f"of parts; "
        "set tokenizer.chat_template to one that renders it"
    )


def text_tokenizer(processing: Any) -> Any:
    """The tokenizer in a processor of text and images, with the processor's chat template if it has none; else it."""
    if not isinstance(processing, ProcessorMixin):
        return processing
    tokenizer = processing.tokenizer
    if tokenizer.chat_template is None and processing.chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = processing.chat_template
    return tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], ids: Sequence[int]) -> None:
    """Decode and compare: every message's text has to be in these tokens.

    A tokenizer that loses something (case, unknown words) may; a message of which nothing is left may not.

    Raises:
        ChatError: a message is not there.
    """
    said = [message for message in messages if message["content"].strip()]
    texts = []
    for message in said:
        own = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        known = [token for token in own if token != tokenizer.unk_token_id]
        texts.append(_decoded(tokenizer, own) if known else "")
    missing = texts.index("") if "" in texts else _missing(_decoded(tokenizer, ids), texts)
    if missing is not None:
        raise ChatError(
            f"the text of the {said[missing]['role']} message is not in the tokens that the tokenizer "
            f"{tokenizer.name_or_path or ''} makes of it; is it this model's tokenizer?"
        )


def _missing(whole: str, texts: Sequence[str]) -> int | None:
    """The first of these texts that is not in the whole, or not as often as it is said; None if all are there."""
    return next((i for i, text in enumerate(texts) if whole.count(text) < texts[: i + 1].count(text)), None)


def parse_options(text: str | None, option: str = "--chat_template_kwargs") -> dict[str, Any] | None:
    """Variables of the chat template from JSON; option: what the user calls the setting that it came from.

    Raises:
        ValueError: it is no JSON object.
    """
    if text is None:
        return None
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: not JSON ({error.msg}): {text}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{option}: needs a JSON object of names and values, not {text}")
    return options


def chat_options(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables that a template is rendered with: what the user gave, and the switches of thinking turned off.

    Raises:
        ChatError: the template does not know one of those given.
    """
    variables = template_variables(str(tokenizer.get_chat_template(tools=(given or {}).get("tools"))))
    unknown = sorted(set(given or {}) - variables)
    if unknown:
        others = sorted(variables - _ALWAYS - _FUNCTIONS)
        names = f"it knows {', '.join(others)}" if others else "it knows none"
        raise ChatError(f"chat_template_kwargs: the chat template has no variable {unknown[0]!r}; {names}")
    return {switch: False for switch in SWITCHES if switch in variables} | dict(given or {})


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads and does not set itself; none if it cannot be parsed."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    try:
        tree = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.exceptions.TemplateSyntaxError:
        return frozenset()
    return frozenset(jinja2.meta.find_undeclared_variables(tree))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return _squeezed(str(tokenizer.decode(list(ids))))


def _squeezed(text: str) -> str:
    return "".join(text.split())

"""Greedy answers of a chat model, in batches."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spf.models import evaluating
from spf.progress import progress as progress_bar
from spf.sharding import shares_parameters
from spf.text.chat import Messages, check_tokens, render_chat

__all__ = ["Messages", "complete_texts", "complete_tokens", "context_length", "generate_answers", "pad_id"]

THOUGHTS, THOUGHTS_END = "<think>", "</think>"
"""Between these a model thinks aloud, in the families that do (Qwen 3, SmolLM3, DeepSeek-R1)."""

CHANNEL, FINAL = "<|channel|>", "<|channel|>final<|message|>"
"""In harmony (gpt-oss) a model thinks aloud in channels of their own, and answers in the final one."""

_ENDS = re.compile(r"<\|(?:end|return|endoftext)\|>")


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model says that it takes."""
    # composite configs (Gemma 3) keep it one level down; relative positions (Bloom) state none
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if stated is None else int(stated)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens model and tokenizer both take: the smaller of the limits that they state."""
    stated, limit = positions(model), int(tokenizer.model_max_length)
    return limit if stated is None else min(limit, stated)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up a batch; masked, so any token will do where the tokenizer has none for it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text. The tokenizer makes them anew at each call, which takes long where there are many."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}


def has_channels(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is harmony's."""
    return CHANNEL in str(tokenizer.chat_template)


def lacks_channel(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether behind a rendered prompt no answer begins yet, only the name of a channel."""
    return has_channels(tokenizer) and not prompt.endswith(FINAL)


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template knows of thoughts before an answer."""
    return THOUGHTS in str(tokenizer.chat_template) or has_channels(tokenizer)


def after_thoughts(text: str) -> str | None:
    """What is said after the thoughts that a text begins with; None where no thoughts come to an end."""
    if text.startswith(CHANNEL):
        _, ended, said = text.partition(FINAL)
        said = _ENDS.split(said)[0]
    else:
        _, ended, said = text.partition(THOUGHTS_END)
    said = said.strip()
    if said.startswith(THOUGHTS):
        return after_thoughts(said)
    return said if ended else None


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    *,
    prefills: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, in order, special tokens removed.

    A prompt is a user message or a list of messages; the model's chat template renders it. `prefills` holds one
    text a prompt that the answer is made to begin with ("" for none); what is returned comes after it, and after
    the thoughts of a model that thinks aloud. Prompts are batched by length and left-padded. The model's training mode
    is restored afterwards. options: variables of the template (`chat_template_kwargs`).

    Raises:
        ChatError: the template or the tokenizer loses what a message says.
        ValueError: there is not one prefill for each prompt, max_new_tokens or batch_size is below 1, or an answer ends
            in the middle of a thought.
    """
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    texts = [render_chat(tokenizer, chat, generation_prompt=True, options=options) for chat in chats]
    for chat, text in zip(chats, texts, strict=True):
        check_tokens(tokenizer, chat, tokenizer(text, add_special_tokens=False)["input_ids"])
    if prefills is not None:
        if len(prefills) != len(texts):
            raise ValueError(f"generate_answers: {len(prefills)} prefills for {len(texts)} prompts")
        texts = [begun(tokenizer, text, prefill) for text, prefill in zip(texts, prefills, strict=True)]
    answers = complete_texts(
        model,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
        progress=progress,
    )
    return [_answer(text, answer) for text, answer in zip(texts, answers, strict=True)]


def begun(tokenizer: PreTrainedTokenizerBase, text: str, prefill: str) -> str:
    """A rendered prompt with what its answer is made to begin with."""
    return text + (FINAL if prefill and lacks_channel(tokenizer, text) else "") + prefill


def _answer(prompt: str, text: str) -> str:
    said = after_thoughts(text)
    if said is not None:
        return said
    if text.startswith((THOUGHTS, CHANNEL)) or prompt.rstrip().endswith(THOUGHTS):
        mark = CHANNEL if text.startswith(CHANNEL) else THOUGHTS
        raise ValueError(
            f"the model thinks before it answers ({mark}) and had not come to an end; give it more tokens, or turn "
            "that off or down by chat_template_kwargs, if its chat template knows a switch"
        )
    return text


def complete_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str = "generating",
    progress: bool = True,
) -> list[str]:
    """The greedy continuation of each text, which is tokenised as it stands (no special tokens are added).

    Raises:
        ValueError: max_new_tokens or batch_size is below 1.
    """
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return complete_tokens(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
        progress=progress,
    )


@torch.no_grad()
def complete_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str = "generating",
    progress: bool = True,
) -> list[str]:
    """The greedy continuation of each prompt (token ids), as text without special tokens, but for what tells thoughts
    from an answer.

    Raises:
        ValueError: max_new_tokens or batch_size is below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, not {max_new_tokens} and {batch_size}")
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    pad = pad_id(tokenizer)
    answers = [""] * len(encoded)
    bar_of = progress_bar(len(encoded), description, shown=progress)
    with evaluating(model), _greedy(model), _one_type(model), bar_of as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in rows)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + list(encoded[i]) for i in rows])
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in rows])
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                # processes that gather each other's parameters have to make the same number of passes
                synced_gpus=shares_parameters(model),
                pad_token_id=pad,
            )
            for i, new in zip(rows, output[:, width:], strict=True):
                answers[i] = _decoded(tokenizer, new).strip()
            bar.update(len(rows))
    return answers


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    if has_channels(tokenizer):
        text = str(tokenizer.decode(ids))
        if CHANNEL in text:  # special tokens tell its thoughts from its answer
            return text
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in (THOUGHTS, THOUGHTS_END)} - {tokenizer.unk_token_id}
    if not marks & set(ids.tolist()):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    special = special_ids(tokenizer) - marks
    return str(tokenizer.decode([i for i in ids.tolist() if i not in special]))


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Without penalties, beams and what else a checkpoint ships with for sampling; it ends where it says.

    `generate` takes what it is not given from the model's own settings, so these are put aside.
    """
    shipped: dict[Any, Any] = {
        module: module.generation_config for module in model.modules() if "generation_config" in vars(module)
    }
    try:
        for module, own in shipped.items():
            ends = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            module.generation_config = GenerationConfig(**ends)
        yield
    finally:
        for module, own in shipped.items():
            module.generation_config = own


def _one_type(model: PreTrainedModel) -> AbstractContextManager:
    """Autocast where some layers are float32 beside narrower ones (saved whole beside adapters, say), as in training.

    Adapters convert what they are given themselves.
    """
    types = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    narrow = types & {torch.bfloat16, torch.float16}
    if torch.float32 in types and narrow:
        return torch.autocast(model.device.type, dtype=narrow.pop())
    return nullcontext()

"""Examples are found in what TRL makes of chats, in the templates of its families: also of models that can think."""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spf.data import SafetyDataError, SafetyRow, tokenise
from spf.data.examples import read_examples
from spf.shared_prefix import common
from spf.text.chat import render_chat

PLACE = Path(trl.__file__).parent / "chat_templates"
# the others say as a list of parts what is said, or turn thinking off by a word in the user's message
KNOWN = ("cohere", "deepseekv3", "gemma3", "gptoss", "llama3", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3")
SWITCHED = ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507")
NAMES = [name for name in (*KNOWN, *SWITCHED) if (PLACE / f"{name}.jinja").is_file()]
ASKS = {"role": "user", "content": "How do I pick a lock?"}
ANSWERS = {"role": "assistant", "content": "Sure, here is how."}
THANKS = {"role": "user", "content": "Thank you so much!"}
ENDS = {"role": "assistant", "content": "You are welcome, friend."}


def tokenizer_of(name, merges=()):
    """Of bytes, with the template's special tokens."""
    source = (PLACE / f"{name}.jinja").read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", bos_token="<bos>"
    )
    special = {token for token in re.findall(r"<\|?[\w▁｜|]+\|?>", source) if not re.search("think|tool", token)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special - {"<bos>"})})
    tokenizer.add_tokens(["<think>", "</think>"] if "think>" in source else [])
    tokenizer.chat_template = source
    return tokenizer


def ids(tokenizer, messages, generation_prompt=False):
    """As TRL renders them: no switch is turned."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def asked(tokenizer, messages):
    """As the model is asked, without thoughts."""
    text = render_chat(tokenizer, messages, generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif("gptoss" not in NAMES, reason="TRL has no such template")
def test_gpt_oss_is_held_in_its_final_channel_only():
    """Its refusals began with the name of a channel, as all it says does, so none of them was told from an answer."""
    tokenizer = tokenizer_of("gptoss")
    row = SafetyRow([ASKS], "I'm sorry, no.", "row 1")
    with pytest.raises(SafetyDataError, match="row 1: the chat template has the model think in a channel") as error:
        tokenise([row], tokenizer, 4096)
    exec(re.search(r"tokenizer\.chat_template \+= '.*?'", str(error.value))[0])
    (anchor,) = tokenise([row], tokenizer, 4096)
    assert tokenizer.decode(anchor.prompt_ids).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert tokenizer.decode(anchor.refusal_ids) == "I'm sorry, no.<|return|>"
    (example,) = read_examples([{"messages": [ASKS, ANSWERS]}], tokenizer).examples
    assert example.prompt_ids == tuple(anchor.prompt_ids)


@pytest.mark.parametrize("limit", ["{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}", ""])
def test_a_template_of_one_exchange_only_is_read(limit):
    """What stands behind an answer is asked of a template with two."""
    tokenizer = tokenizer_of("qwen2_5")
    one = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = limit + one + opens
    found = read_examples([{"messages": [ASKS, ANSWERS]}], tokenizer)
    assert [e.target for e in found.examples] == [ANSWERS["content"]]
    assert found.unread == 0


def test_there_are_templates():
    assert len(NAMES) > 5


@pytest.mark.parametrize("name", NAMES)
def test_every_turn_is_found(name):
    """One harmless turn behind it hid a harmful one: thoughts stand before the last answer only."""
    tokenizer = tokenizer_of(name)
    row = ids(tokenizer, [ASKS, ANSWERS, THANKS, ENDS])
    found = read_examples([{"input_ids": row}], tokenizer)
    assert [list(e.prompt_ids) for e in found.examples] == [
        asked(tokenizer, [ASKS]),
        asked(tokenizer, [ASKS, ANSWERS, THANKS]),
    ]
    assert [e.target for e in found.examples] == [ANSWERS["content"], ENDS["content"]]
    assert found.unread == 0


@pytest.mark.parametrize("name", NAMES)
def test_of_a_completion_of_several_turns_each_answer_is_its_own(name):
    """The first one, before which no thoughts stand, was taken for what stands behind those of the last."""
    tokenizer = tokenizer_of(name)
    whole, prompt = ids(tokenizer, [ASKS, ANSWERS, THANKS, ENDS]), ids(tokenizer, [ASKS], True)
    given = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
    row = {"input_ids": whole, "completion_mask": [int(i >= given) for i in range(len(whole))]}
    found = read_examples([row], tokenizer)
    assert [e.target for e in found.examples] == [ANSWERS["content"], ENDS["content"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["completion", "pairs"])
def test_a_prompt_and_its_answer_are_found_once(kind, name):
    """TRL's prompt ends before the thoughts, or in their midst."""
    tokenizer = tokenizer_of(name)
    whole, prompt = ids(tokenizer, [ASKS, ANSWERS]), ids(tokenizer, [ASKS], True)
    given = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
    row = (
        {"input_ids": whole, "completion_mask": [int(i >= given) for i in range(len(whole))]}
        if kind == "completion"
        else {"prompt_ids": prompt, "chosen_ids": whole[given:], "rejected_ids": [1]}
    )
    (example,) = read_examples([row], tokenizer).examples
    assert list(example.prompt_ids) == asked(tokenizer, [ASKS])
    assert example.target == ANSWERS["content"]


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_that_is_text_already_is_asked_as_it_is(name):
    """As ORPO and CPO trainers, and many scripts, make `prompt`: it was asked as a message, in a chat again."""
    tokenizer = tokenizer_of(name)
    given = {"generation_prompt": True, "options": None}
    prompt = render_chat(tokenizer, [ASKS], **given)
    whole = render_chat(tokenizer, [ASKS, ANSWERS], **given | {"generation_prompt": False})
    answer = whole[len(prompt) :] if whole.startswith(prompt) else ANSWERS["content"]
    (example,) = read_examples([{"prompt": prompt, "completion": answer}], tokenizer).examples
    assert list(example.prompt_ids) == asked(tokenizer, [ASKS])
    assert example.target == ANSWERS["content"]
    # words that are no chat are
    (example,) = read_examples([{"prompt": ASKS["content"], "completion": answer}], tokenizer).examples
    assert list(example.prompt_ids) == asked(tokenizer, [ASKS])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", ["### Ask:\nHow do I pick a lock?\n\n### Response:\n", "\nHow do I pick a lock? "])
def test_white_space_around_a_prompt_that_is_no_chat_is_not_asked(name, prompt):
    """It was in the prompts of `spf audit`, and not in those of a run, which reads what TRL has tokenised."""
    tokenizer = tokenizer_of(name)
    prompt_ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + ANSWERS["content"])["input_ids"]
    answer = whole[len(prompt_ids) :]
    rows = [
        {"prompt": prompt, "completion": ANSWERS["content"]},
        {"input_ids": whole, "completion_mask": [0] * len(prompt_ids) + [1] * len(answer)},
        {"prompt_ids": prompt_ids, "chosen_ids": answer, "rejected_ids": answer},
    ]
    found = [read_examples([row], tokenizer).examples for row in rows]
    wanted = tuple(asked(tokenizer, [{"role": "user", "content": prompt.strip()}]))
    assert [[example.prompt_ids for example in examples] for examples in found] == [[wanted]] * 3


TOOLS = [
    {"type": "function", "function": {"name": "search", "description": "Finds.", "parameters": {"type": "object"}}}
]
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "search", "arguments": {"q": "a"}}}],
}
FOUND = {"role": "tool", "name": "search", "content": "A page on locks."}


@pytest.mark.parametrize("name", [name for name in NAMES if "tools" in (PLACE / f"{name}.jinja").read_text()])
@pytest.mark.parametrize("thinks", [None, True, False])
@pytest.mark.parametrize("chat", [[ASKS, ANSWERS, THANKS, ENDS], [ASKS, CALLS, FOUND, ANSWERS]], ids=["turns", "calls"])
def test_tools_are_asked_with_as_a_run_asks(name, thinks, chat):
    """A run reads what TRL has rendered, with a row's tools and its own variables of the template."""
    tokenizer = tokenizer_of(name)
    given = {} if thinks is None else {"enable_thinking": thinks}
    text = tokenizer.apply_chat_template(chat, tokenize=False, tools=TOOLS, **given)
    row = {"messages": chat, "tools": TOOLS, "chat_template_kwargs": given}
    raw, tokenised = (read_examples([row], tokenizer) for row in (row, {"text": text}))
    assert [example.prompt_ids for example in raw.examples] == [example.prompt_ids for example in tokenised.examples]
    assert (len(raw.examples), raw.unread) == (2, 0)
    assert all("Finds." in tokenizer.decode(example.prompt_ids) for example in raw.examples)


def test_a_template_for_tools_beside_another_one_is_taken_where_there_are_some():
    tokenizer = tokenizer_of("qwen2_5")
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": tokenizer.chat_template}
    (example,) = read_examples([{"messages": [ASKS, ANSWERS], "tools": TOOLS}], tokenizer).examples
    assert list(example.prompt_ids) == tokenizer.apply_chat_template(
        [ASKS], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )


def test_thoughts_are_no_answer():
    """They may be long, and say neither yes nor no."""
    tokenizer = tokenizer_of("qwen3")
    said = {"role": "assistant", "content": f"<think>\n{'Let me see. ' * 20}\n</think>\n\nI'm sorry, I can't do that."}
    (example,) = read_examples([{"messages": [ASKS, said]}], tokenizer).examples
    assert example.target.startswith("I'm sorry")
    assert example.target_ids[:9] == tuple(tokenizer("I'm sorry")["input_ids"])


NEWLINES = (("Ċ", "Ċ"), ("ĊĊ", "Ċ"))
"""As in the vocabularies of most models: two or three newlines are one token."""


@pytest.mark.parametrize("name", [name for name in ("gemma3", "llama3", "phi3", "qwen2_5", "qwen3") if name in NAMES])
@pytest.mark.parametrize("begins", ["", "\n"])
def test_an_answer_that_begins_with_a_newline_is_found(name, begins):
    """It is one token with the template's: such a turn was passed over beside another, and asked as a garbled user's
    message where it was alone."""
    tokenizer = tokenizer_of(name, NEWLINES)
    first, second = ({**turn, "content": begins + turn["content"]} for turn in (ANSWERS, ENDS))
    chat = [ASKS, first, THANKS, second]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    if begins + ANSWERS["content"] not in text:
        pytest.skip("the template strips answers")
    # as all templates say it when they are asked; thoughts are those of the last answer only
    wanted = [asked(tokenizer, chat[:1]), asked(tokenizer, chat[:3])]
    whole = ids(tokenizer, chat)
    for row in ({"input_ids": whole}, {"input_ids": whole, "labels": whole}, {"text": text}):
        found = read_examples([row], tokenizer)
        assert [list(example.prompt_ids) for example in found.examples] == wanted
        assert [example.target for example in found.examples] == [ANSWERS["content"], ENDS["content"]]
        assert found.unread == 0
    alone = ids(tokenizer, chat[:2])
    known = common([alone, ids(tokenizer, chat[:1], True)])
    labels = [-100] * known + alone[known:]
    for row in ({"input_ids": alone, "labels": labels}, {"prompt_ids": alone[:known], "completion_ids": alone[known:]}):
        (example,) = read_examples([row], tokenizer).examples
        assert list(example.prompt_ids) == wanted[0]
        assert example.target == ANSWERS["content"]

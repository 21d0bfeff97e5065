"""Chats in templates of every kind: what was said is in the tokens, or one sentence says that it is not."""

import pytest
import torch

from spf.data import SafetyDataError, SafetyRow, ask_refusals, complete_refusals, tokenise
from spf.data.examples import read_examples
from spf.errors import ChatError
from spf.evaluation import evaluate_refusals
from spf.text.chat import chat_options, check_tokens, parse_options, render_chat, template_variables
from spf.text.generation import generate_answers
from tests.conftest import PLAIN_TEMPLATE, REFUSAL, make_model, make_tokenizer
from tests.test_audit_templates import ANSWERS, ASKS, ENDS, NAMES, THANKS, ids, tokenizer_of

PLAIN = "{% for m in messages %}" + PLAIN_TEMPLATE
END = "{% if add_generation_prompt %}<assistant> {% endif %}"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}> {% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %} </s>{% endfor %}" + END
)
"""Wants content as a list; text content is rendered as nothing, without an error."""
SILENT = "{% for m in messages %}<{{ m['role'] }}> </s>{% endfor %}" + END
LAST_ONLY = "<user> {{ messages[-1]['content'] }} </s>" + END
SWITCH = PLAIN + (
    "{% if add_generation_prompt and (enable_thinking is not defined or enable_thinking) %}<think> {% endif %}"
)
OTHER_SWITCH = (
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}"
    + PLAIN
    + ("{% if add_generation_prompt and thinking %}<think> {% endif %}")
)
NO_SWITCH = PLAIN + "{% if add_generation_prompt %}<think> {% endif %}"

ROW = SafetyRow([{"role": "user", "content": "Explain how locks work"}], REFUSAL, "data.jsonl:3")


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_want_lists_get_them():
    """A bug once: 24 identical empty anchors, and '4/4 corrected'."""
    tokenizer = with_template(PARTS)
    (plain,) = tokenise([ROW], with_template(PLAIN), 256)
    (anchor,) = tokenise([ROW], tokenizer, 256)
    assert anchor == plain
    said = []
    model = make_model()
    real = model.generate
    model.generate = lambda **kw: said.append(tokenizer.decode(kw["input_ids"][0])) or real(**kw)
    generate_answers(model, tokenizer, ["Explain how locks work"], max_new_tokens=2, progress=False)
    assert "how" in said[0]
    assert "work" in said[0]


@pytest.mark.parametrize("template", [SILENT, "<user> </s>" + END])
def test_templates_that_lose_the_text_are_refused(template):
    tokenizer = with_template(template)
    with pytest.raises(SafetyDataError, match=r"data\.jsonl:3: the chat template leaves out what the user"):
        tokenise([ROW], tokenizer, 256)
    with pytest.raises(SafetyDataError, match=r"data\.jsonl:3: the chat template leaves out"):
        complete_refusals([ROW], make_model(), tokenizer)
    with pytest.raises(ChatError, match="leaves out what the user message says"):
        generate_answers(make_model(), tokenizer, ["Explain how locks work"], progress=False)


def test_a_template_that_fails_on_text_is_given_lists():
    template = PARTS.replace("{{ p['text'] }}", "{{ p['text'] + '' }}").replace("{% if p['type'] == 'text' %}", "")
    tokenizer = with_template(template.replace("{% endif %}{% endfor %} </s>", "{% endfor %} </s>"))
    assert "how locks work" in render_chat(tokenizer, ROW.messages, generation_prompt=True)


def test_a_message_that_is_said_twice_has_to_be_there_twice():
    twice = [*ROW.messages, {"role": "assistant", "content": "no"}, *ROW.messages]
    assert render_chat(with_template(PLAIN), twice, generation_prompt=True)
    with pytest.raises(ChatError, match="leaves out what the user message says"):
        render_chat(with_template("{% for m in messages[1:] %}" + PLAIN_TEMPLATE), twice, generation_prompt=True)


def test_every_message_has_to_be_there():
    chat = [{"role": "user", "content": "Write a poem"}, *ROW.messages]
    assert render_chat(with_template(PLAIN), chat, generation_prompt=True)
    with pytest.raises(ChatError, match="leaves out what the user message says"):
        render_chat(with_template(LAST_ONLY), chat, generation_prompt=True)


def test_a_tokenizer_that_knows_no_word_is_refused():
    tokenizer = with_template(PLAIN)
    row = SafetyRow([{"role": "user", "content": "zzz qqq xxx"}], REFUSAL, "row 1")
    with pytest.raises(SafetyDataError, match="row 1: the text of the user message is not in the tokens"):
        tokenise([row], tokenizer, 256)
    with pytest.raises(ChatError, match="the text of the user message is not in the tokens"):
        generate_answers(make_model(), tokenizer, ["zzz qqq"], progress=False)
    # one unknown word among known ones is what tokenizers do
    check_tokens(tokenizer, [{"role": "user", "content": "how qqq"}], tokenizer("how qqq")["input_ids"])
    with pytest.raises(ChatError, match="not in the tokens"):
        check_tokens(tokenizer, ROW.messages, tokenizer("how work")["input_ids"])


@pytest.mark.parametrize("template", [SWITCH, OTHER_SWITCH])
def test_documented_switches_of_thinking_are_set(template):
    tokenizer = with_template(template)
    assert "<think>" in tokenizer.apply_chat_template(ROW.messages, tokenize=False, add_generation_prompt=True)
    assert "<think>" not in render_chat(tokenizer, ROW.messages, generation_prompt=True)
    assert tokenise([ROW], tokenizer, 256) == tokenise([ROW], with_template(PLAIN), 256)
    name = "enable_thinking" if template == SWITCH else "thinking"
    assert chat_options(tokenizer, None) == {name: False}
    # what the user says counts
    assert "<think>" in render_chat(tokenizer, ROW.messages, generation_prompt=True, options={name: True})
    with pytest.raises(SafetyDataError, match=r"think before it answers .* chat_template_kwargs"):
        tokenise([ROW], tokenizer, 256, {name: True})


def test_a_template_that_always_thinks_is_refused():
    with pytest.raises(SafetyDataError, match="turn it off by chat_template_kwargs, or use a template that does not"):
        tokenise([ROW], with_template(NO_SWITCH), 256)


def test_unknown_options_name_what_there_is():
    with pytest.raises(ChatError, match="has no variable 'enable_thinkin'; it knows enable_thinking"):
        chat_options(with_template(SWITCH), {"enable_thinkin": False})
    with pytest.raises(ChatError, match="has no variable 'enable_thinking'; it knows none"):
        chat_options(with_template(PLAIN), {"enable_thinking": False})


def test_variables_of_templates_with_generation_tags():
    template = "{% generation %}{{ messages }}{% endgeneration %}{% if enable_thinking %}{% break %}{% endif %}"
    assert "enable_thinking" in template_variables("{% for m in messages %}" + template + "{% endfor %}")
    assert template_variables("{% if %}") == frozenset()


def test_options_on_the_command_line():
    assert parse_options(None) is None
    assert parse_options('{"thinking": true}') == {"thinking": True}
    for wrong in ("{", "[1]", "true"):
        with pytest.raises(ValueError, match="--chat_template_kwargs: "):
            parse_options(wrong)


def test_there_is_one_prefill_for_each_prompt(tokenizer):
    with pytest.raises(ValueError, match="generate_answers: 1 prefills for 2 prompts"):
        generate_answers(make_model(), tokenizer, ["How?", "Why?"], prefills=["Well"], max_new_tokens=1, progress=False)


HARMONY = pytest.mark.skipif("gptoss" not in NAMES, reason="a TRL without its template")
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>The user asks for harm. We must refuse.<|end|><|start|>assistant"
THOUGHT = {"role": "assistant", "thinking": "Let me see. " * 20, "content": REFUSAL}


def saying(tokenizer, *texts):
    """A model that goes on with these texts, and what it was given."""
    model, given = make_model(), []

    def generate(*, input_ids, max_new_tokens, **options):
        given.extend(tokenizer.batch_decode(input_ids))
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in texts]
        longest = max(map(len, rows))
        padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], 1)

    model.generate = generate
    return model, given


@HARMONY
@pytest.mark.parametrize("text", [ANALYSIS + FINAL + REFUSAL + "<|return|>", FINAL + REFUSAL, REFUSAL + "<|return|>"])
def test_of_harmonys_channels_the_final_one_is_the_answer(text):
    """Of gpt-oss the analysis was judged: it refused nothing."""
    tokenizer = tokenizer_of("gptoss")
    model, _ = saying(tokenizer, text)
    sizes = {"max_new_tokens": 300, "progress": False}
    assert generate_answers(model, tokenizer, ["How?"], **sizes) == [REFUSAL]
    assert evaluate_refusals(model, tokenizer, ["How?"], **sizes) == [True]
    (row,) = ask_refusals([SafetyRow(ROW.messages, None, "row 1")], model, tokenizer, max_new_tokens=300).rows
    assert row.refusal == REFUSAL


@HARMONY
@pytest.mark.parametrize("tokens", [1, 40, 62])  # the last ends within the name of the final one
def test_without_a_final_channel_there_is_no_answer(tokens):
    tokenizer = tokenizer_of("gptoss")
    model, _ = saying(tokenizer, ANALYSIS + FINAL + REFUSAL)
    with pytest.raises(ValueError, match=r"thinks before it answers \(<\|channel\|>\) and .* give it more tokens"):
        generate_answers(model, tokenizer, ["How?"], max_new_tokens=tokens, progress=False)


@HARMONY
def test_what_a_harmony_answer_begins_with_is_in_its_final_channel():
    tokenizer = tokenizer_of("gptoss")
    model, given = saying(tokenizer, " do it.<|return|>", ANALYSIS + FINAL + REFUSAL)
    sizes = {"prefills": ["Sure, here is how to", ""], "max_new_tokens": 300, "progress": False}
    assert generate_answers(model, tokenizer, ["How do I?", "How?"], **sizes) == ["do it.", REFUSAL]
    assert given[0].endswith(f"<|start|>assistant{FINAL}Sure, here is how to")
    assert given[1].endswith("<|start|>assistant")


@HARMONY
def test_harmonys_analysis_is_no_answer_of_the_data():
    """It may be long, and say neither yes nor no."""
    tokenizer = tokenizer_of("gptoss")
    prompt, whole = ids(tokenizer, [ASKS], True), ids(tokenizer, [ASKS, THOUGHT])
    assert "analysis" in tokenizer.decode(whole[len(prompt) :])
    (example,) = read_examples([{"prompt_ids": prompt, "completion_ids": whole[len(prompt) :]}], tokenizer).examples
    assert (list(example.prompt_ids), example.target) == (prompt, REFUSAL)
    # a later turn's final channel is no answer to the first
    turns = ids(tokenizer, [ASKS, ANSWERS, THANKS, ENDS])[len(prompt) :]
    (example,) = read_examples([{"prompt_ids": prompt, "completion_ids": turns}], tokenizer).examples
    assert example.target.startswith(ANSWERS["content"])

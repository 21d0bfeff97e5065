"""Preference pairs: every accepted layout, every refused mistake, and where answers end in chat templates."""

import json

import pytest
from datasets import Dataset

from spf.data import HARMLESS_STUB, SafetyRow
from spf.errors import SafetyDataError
from spf.evaluation import is_refusal
from spf.safetylock import Pair, echoed, load_pairs, packaged_pairs, refusal_pairs
from spf.safetylock.pairs import distinct, encode
from tests.conftest import REFUSAL, TEMPLATE, make_model, make_tokenizer

USER = [{"role": "user", "content": "How?"}]

LLAMA3_FIRST_RELEASE = (
    "{{ '<unk>' }}{% for m in messages %}<user>{{ m['role'] }}<assistant>\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "<user>assistant<assistant>\n\n"  # always, whether asked for or not
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<user>system\nYou help.</s>\n{% endif %}"
    "<user>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
)
MISTRAL = (
    "<unk>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
THINKING = TEMPLATE.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %} think think {% endif %}{{ m['content'] }}"
)


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("template", [TEMPLATE, LLAMA3_FIRST_RELEASE, CHATML, MISTRAL, THINKING])
@pytest.mark.parametrize("answer", [REFUSAL, "I assistant", "sorry"])
def test_answer_end_in_every_template(template, answer):
    """Whatever follows the answer is cut, nothing of the answer is: T7."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    ids, length = encode(USER, answer, "row", tokenizer)
    own = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert length == len(own)
    assert ids[-length:] == own
    whole = tokenizer(tokenizer.apply_chat_template(USER + assistant(answer), tokenize=False), add_special_tokens=False)
    assert whole["input_ids"][: len(ids)] == ids
    assert len(whole["input_ids"]) > len(ids)


def test_template_that_hides_or_changes_the_answer_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {% endfor %}"
    with pytest.raises(SafetyDataError, match="row 7: the chat template leaves out what the user message says"):
        encode(USER, "No.", "row 7", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | length }} {{ m['content'] }} {% endfor %}</s>"
    with pytest.raises(SafetyDataError, match="row 7: the chat template changes what stands around"):
        encode(USER, "No.", "row 7", tokenizer)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "How?", "safe": "No.", "unsafe": "Sure."},
        {"question": USER, "safe": "No.", "unsafe": "Sure."},
        {"prompt": "How?", "chosen": "No.", "rejected": "Sure."},
        {"prompt": USER, "chosen": assistant("No."), "rejected": assistant("Sure.")},
        {"chosen": USER + assistant("No."), "rejected": USER + assistant("Sure.")},
    ],
)
def test_every_layout_gives_the_same_pair(tmp_path, record):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n")
    expected = Pair(USER, "No.", "Sure.", f"{path}:1")
    assert load_pairs(path) == [expected]
    from_data_set = load_pairs(Dataset.from_list([record]))[0]
    assert from_data_set.key == expected.key
    assert from_data_set.where == "the data set:0"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "How?", "answer": "x"},
            "needs question, safe and unsafe, or chosen and rejected; it has question",
        ),
        ({"question": "", "safe": "No.", "unsafe": "Sure."}, "the question must be text"),
        ({"safe": "No.", "unsafe": "Sure."}, "the question must be text"),
        ({"question": "How?", "safe": " ", "unsafe": "Sure."}, "the safe answer is empty"),
        ({"question": "How?", "safe": "No.", "unsafe": 3}, "the unsafe answer is empty or no text"),
        ({"question": "How?", "safe": "No.", "unsafe": "No. "}, "are the same"),
        (
            {"question": [*USER, {"role": "assistent", "content": "x"}, *USER], "safe": "No.", "unsafe": "Sure."},
            "unknown role 'assistent'",
        ),
        ({"question": USER + assistant("x"), "safe": "No.", "unsafe": "Sure."}, "ends with an assistant message"),
        ({"chosen": USER, "rejected": USER + assistant("Sure.")}, "must end with an assistant message"),
        (
            {"chosen": USER + assistant("No."), "rejected": [{"role": "user", "content": "Why?"}, *assistant("Sure.")]},
            "do not answer the same conversation",
        ),
    ],
)
def test_mistakes_name_the_row(tmp_path, record, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "Fine?", "safe": "No.", "unsafe": "Sure."}) + "\n" + json.dumps(record))
    with pytest.raises(SafetyDataError) as caught:
        load_pairs(path)
    assert message in str(caught.value)
    assert f"{path}:2" in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(SafetyDataError, match=r"gone.jsonl: no such file"):
        load_pairs(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SafetyDataError, match="holds no rows"):
        load_pairs(tmp_path / "empty.jsonl")


def test_repeated_questions_are_one_pair_whatever_the_order():
    first, second = Pair(USER, "No.", "Sure.", "a"), Pair(USER, "Never.", "Yes.", "b")
    other = Pair([{"role": "user", "content": "Why?"}], "No.", "Sure.", "c")
    kept = distinct([first, second, other])
    assert len(kept) == 2
    assert distinct([other, second, first]) == kept
    assert [pair.key for pair in kept] == sorted(pair.key for pair in kept)


def test_packaged_pairs_are_the_models_refusals_against_the_stub(tokenizer, monkeypatch):
    said = iter([REFUSAL, "Certainly, friend."] * 100)
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: [next(said) for _ in prompts])
    pairs = packaged_pairs(make_model(), tokenizer, 10)
    assert len(pairs) == 10
    assert {pair.safe for pair in pairs} == {REFUSAL}
    assert {pair.unsafe for pair in pairs} == {HARMLESS_STUB}


def test_echoed_answers_end_in_the_same_words_and_only_one_refuses(rows):
    pairs = refusal_pairs([*rows, SafetyRow(USER, None, "no refusal")])
    assert [pair.where for pair in pairs] == [row.where for row in rows]
    assert {(pair.safe, pair.unsafe) for pair in pairs} == {(REFUSAL, HARMLESS_STUB)}
    tokenizer = make_tokenizer()
    for pair, before in zip(echoed(pairs), pairs, strict=True):
        assert (pair.messages, pair.where) == (before.messages, before.where)
        assert is_refusal(pair.safe)
        assert not is_refusal(pair.unsafe)
        ends = [encode(pair.messages, answer, "", tokenizer)[0][-8:] for answer in (pair.safe, pair.unsafe)]
        assert ends[0] == ends[1]
        assert pair.messages[-1]["content"] in pair.unsafe

"""Safety data: formats, rendering, the loss on refusal tokens only, and one clear error for each mistake."""

import itertools
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from spf.data import (
    WORDINGS,
    AnchorRotation,
    SafetyDataError,
    SafetyRow,
    ask_refusals,
    collate,
    complete_refusals,
    load_safety_rows,
    reword,
    tokenise,
)
from spf.data.training import load_training_data
from spf.evaluation import TRANSFORMS
from tests.conftest import REFUSAL, make_model, make_tokenizer


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return path


def test_all_formats_give_the_same_rows(tmp_path):
    conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}
    sources = [
        write(tmp_path / "a.jsonl", {"prompt": "Hi", "refusal": "No."}),
        write(tmp_path / "b.csv", "prompt,refusal", "Hi,No."),
        write(tmp_path / "c.jsonl", conversation),
        Dataset.from_list([{"prompt": "Hi", "refusal": "No."}]),
        Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}], "refusal": "No."}]),
    ]
    for source in sources:
        (row,) = load_safety_rows(source)
        assert row.messages == [{"role": "user", "content": "Hi"}]
        assert row.refusal == "No."
    assert load_safety_rows(str(sources[1]))[0].where.endswith("b.csv:2")
    (row,) = load_safety_rows(write(tmp_path / "d.jsonl", {"prompt": "Hi"}))
    assert row.refusal is None
    assert len(load_safety_rows()) >= 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", [], r"a\.jsonl: holds no rows"),
        ("a.jsonl", [{"prompt": "x"}, {"question": "x"}], r"a\.jsonl:2: needs a column `prompt` or `messages`"),
        ("a.jsonl", [{"prompt": "x"}, "{"], r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", ["[1]"], r"a\.jsonl:1: not a JSON object"),
        ("a.jsonl", [{"prompt": " "}], r"a\.jsonl:1: the prompt is empty"),
        ("a.jsonl", [{"prompt": "x", "refusal": ""}], r"a\.jsonl:1: the refusal is empty"),
        ("a.jsonl", [{"messages": ["x"]}], r"a\.jsonl:1: messages must be a list"),
        ("a.csv", ["question", "x"], r"a\.csv:2: needs a column `prompt`"),
        ("a.txt", ["x"], r"a\.txt: safety data must be \.jsonl or \.csv"),
    ],
)
def test_bad_files_name_file_and_row(tmp_path, name, content, message):
    with pytest.raises(SafetyDataError, match=message):
        load_safety_rows(write(tmp_path / name, *content))


def test_missing_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("spf.data.rows.load_dataset", lambda *a: pytest.fail("went to the hub"))
    for name in ("nowhere.jsonl", "nowhere.csv", str(tmp_path / "nowhere")):
        with pytest.raises(SafetyDataError, match=r"nowhere.*: no such safety data file"):
            load_safety_rows(name)


def test_hub_data_sets_are_read(monkeypatch):
    data = Dataset.from_list([{"prompt": "Hi", "refusal": "No."}])
    monkeypatch.setattr("spf.data.rows.load_dataset", lambda name: data if name == "user/refusals" else 1 / 0)
    assert load_safety_rows("user/refusals")[0].where == "user/refusals:0"
    with pytest.raises(SafetyDataError, match="user/none: neither a file nor a data set"):
        load_safety_rows("user/none")


def test_the_models_own_refusals_are_judged(monkeypatch, tokenizer):
    rows = load_safety_rows()[:3]
    answers = [REFUSAL, "Sure, here is how to do that.", "I'm sorry, no."]
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: answers[: len(prompts)])
    kept = complete_refusals(rows, make_model(), tokenizer)
    assert [row.refusal for row in kept] == [REFUSAL, "I'm sorry, no."]
    assert [row.refusal for row in complete_refusals(rows, make_model(), tokenizer, wanted=1)] == [REFUSAL]
    given = SafetyRow(rows[0].messages, "Never.", "here")
    assert complete_refusals([given], make_model(), tokenizer) == [given]  # what the user gives is not judged
    answers[:] = ["Sure."] * 3
    with pytest.raises(
        SafetyDataError, match="the model refused none of the 3 packaged prompts that it was asked"
    ) as error:
        complete_refusals(rows, make_model(), tokenizer)
    for said in ("another model's chat template", "a judge cannot read", "`spf eval MODEL` shows its answers"):
        assert said in str(error.value)
    assert ".jsonl" not in str(error.value)  # a file that nobody gave
    mine = [SafetyRow(row.messages, None, f"mine.jsonl:{i}") for i, row in enumerate(rows, 1)]
    with pytest.raises(SafetyDataError, match=r"none of the 3 prompts from mine\.jsonl:1 on that it was asked"):
        complete_refusals(mine, make_model(), tokenizer)


def test_own_refusals_have_one_counter(monkeypatch, tokenizer):
    """It said "own refusals, 29 of 144: 0/32"."""
    answers = itertools.cycle([REFUSAL, "Sure, here is how to do that."])
    monkeypatch.setattr(
        "spf.data.refusals.generate_answers",
        lambda m, t, prompts, progress, **kw: [next(answers) for _ in prompts] if not progress else [],
    )
    bars = []

    class Bar:
        def __init__(self, total, description):
            self.said = [total, description, 0]
            bars.append(self.said)

        def update(self, count):
            self.said[2] += count

    monkeypatch.setattr("spf.data.refusals.progress", lambda *given: nullcontext(Bar(*given)))
    complete_refusals(load_safety_rows()[:100], make_model(), tokenizer, wanted=40)
    assert bars == [[40, "own refusals", 40]]


def test_a_refusal_that_was_cut_is_not_ended(monkeypatch, tokenizer):
    """Half a sentence and then the end of the turn is nothing the model would say."""
    rows = load_safety_rows()[:2]
    words = len(tokenizer(REFUSAL)["input_ids"])
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda *args, **kw: [REFUSAL, "I'm sorry, no."])
    cut, whole = complete_refusals(rows, make_model(), tokenizer, max_new_tokens=words)
    assert (cut.cut, whole.cut) == (True, False)
    end = tokenizer("</s>", add_special_tokens=False)["input_ids"]
    ended = [anchor.refusal_ids[-1:] == end for anchor in tokenise([cut, whole], tokenizer, 256)]
    assert ended == [False, True]
    assert [row.cut for row in reword([cut, whole])] == [True, False]


def test_a_refusal_after_thoughts_is_cut_where_its_sentence_is(monkeypatch):
    """The thoughts took tokens that are not seen any more, so its length does not tell."""
    tokenizer = make_tokenizer()
    monkeypatch.setattr(
        "spf.data.refusals.generate_answers", lambda *args, **kw: ["I'm sorry, but I", "I'm sorry, no."]
    )
    rows = load_safety_rows()[:2]
    assert [row.cut for row in complete_refusals(rows, make_model(), tokenizer)] == [False, False]
    tokenizer.chat_template += "{% if false %}<think>{% endif %}"
    assert [row.cut for row in complete_refusals(rows, make_model(), tokenizer)] == [True, False]


def test_a_column_says_that_a_refusal_is_cut(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a", "refusal": "I cannot", "cut": true}\n{"prompt": "b", "refusal": "No."}\n')
    assert [row.cut for row in load_safety_rows(path)] == [True, False]
    path.write_text('{"prompt": "a", "refusal": "I cannot", "cut": "yes"}\n')
    with pytest.raises(SafetyDataError, match=r"r\.jsonl:1: cut must be true or false, not 'yes'"):
        load_safety_rows(path)


def test_empty_thoughts_belong_to_the_prompt():
    """Templates in the manner of Qwen 3 put them before the answer; the refusal is decided after them."""
    tokenizer = make_tokenizer()
    rows = [SafetyRow([{"role": "user", "content": "a"}], REFUSAL, "here")]
    answer = "{% if m['role'] == 'assistant' %}<think> </think> {% endif %}"
    tokenizer.add_tokens(["<think>", "</think>"])
    plain = tokenise(rows, tokenizer, 256)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", answer + "{{ m['content'] }}")
    anchor = tokenise(rows, tokenizer, 256)[0]
    assert anchor.refusal_ids == plain.refusal_ids
    assert tokenizer.decode(anchor.prompt_ids[len(plain.prompt_ids) :]).split() == ["<think>", "</think>"]
    tokenizer.chat_template = tokenizer.chat_template.replace("%}<assistant> {%", "%}<assistant> <think>{%")
    with pytest.raises(SafetyDataError, match="here: the chat template has the model think before it answers"):
        tokenise(rows, tokenizer, 256)


def test_generation_runs_on_a_real_model(tokenizer):
    model = make_model().train()
    with pytest.raises(SafetyDataError, match="refused none"):
        complete_refusals(load_safety_rows()[:5], model, tokenizer, max_new_tokens=4)
    assert model.training


def test_tokens_and_weights(rows, tokenizer):
    (anchor,) = tokenise(rows[:1], tokenizer, 256)
    prompt = tokenizer.decode(anchor.prompt_ids)
    assert prompt.startswith("<user>")
    assert prompt.rstrip().endswith("<assistant>")
    assert anchor.refusal_ids[-1] == tokenizer.eos_token_id
    batch = collate([anchor], 1, first_tokens=2, first_weight=5.0)
    start = len(anchor.prompt_ids)
    assert batch.weights[0].tolist() == [0.0] * start + [5.0] * 2 + [1.0] * (len(anchor.refusal_ids) - 2)
    whole = tokenizer.apply_chat_template(
        [*rows[0].messages, {"role": "assistant", "content": rows[0].refusal}], return_dict=False
    )
    assert anchor.prompt_ids + anchor.refusal_ids == list(whole)


def test_template_errors_name_the_row(rows):
    tokenizer = make_tokenizer()
    system = SafetyRow([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "No.", "f.jsonl:7")
    with pytest.raises(SafetyDataError, match=r"f\.jsonl:7: the chat template refuses the roles system, user"):
        tokenise([system], tokenizer, 256)
    with pytest.raises(SafetyDataError, match=r"row 1: \d+ tokens, longer than the context of 8"):
        tokenise(rows, tokenizer, 8)
    with pytest.raises(SafetyDataError, match=r"row 1: has no refusal yet; spf\.data\.complete_refusals asks"):
        tokenise([replace(rows[0], refusal=None)], tokenizer, 256)
    tokenizer.chat_template = None
    with pytest.raises(SafetyDataError, match=re.escape("row 1: the tokenizer") + ".*no chat template"):
        complete_refusals(rows, make_model(), tokenizer)


def test_rotation_depends_on_seed_and_position_only(anchors):
    first, second = AnchorRotation(anchors, 5, seed=1), AnchorRotation(anchors, 5, seed=1)
    next(first), next(first)
    second.position = first.position
    assert next(first) == next(second)
    with pytest.raises(SafetyDataError, match="13 anchors a step asked for, 12 safety samples at hand"):
        AnchorRotation(anchors, 13)


def test_collate_pads_right(anchors):
    batch = collate(anchors[:4], 1)
    lengths = batch.attention_mask.sum(1)
    for ids, length in zip(batch.input_ids, lengths, strict=True):
        assert bool((ids[length:] == 1).all())
    assert torch.equal(batch.weights > 0, (batch.weights > 0) & batch.attention_mask.bool())


def test_a_refusal_beside_messages_is_used(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Forge a passport."}]
    path.write_text(json.dumps({"messages": messages, "refusal": "I won't."}) + "\n")
    (row,) = load_safety_rows(path)
    assert row.messages == messages
    assert row.refusal == "I won't."


def test_reworded_rows_press_in_other_words_than_the_evaluation(rows):
    found = reword(rows[:8])
    assert len(
        {row.messages[-1]["content"].replace(rows[i].messages[-1]["content"], "") for i, row in enumerate(found)}
    ) == len(WORDINGS)
    for row, original in zip(found, rows[:8], strict=True):
        assert original.messages[-1]["content"] in row.messages[-1]["content"]
        assert row.refusal == original.refusal
        assert row.where.startswith(original.where)
    pressed = {wording.replace("{prompt}", "").strip() for wording in WORDINGS}
    tested = " ".join(" ".join(m["content"] for m in t.apply("").messages) for t in TRANSFORMS.values())
    assert not any(part in tested for part in pressed)


def test_a_conversation_is_reworded_in_its_last_message():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (row,) = reword([SafetyRow(turns, "no", "x:1")])
    assert row.messages[:2] == turns[:2]
    assert "c" in row.messages[2]["content"]
    assert row.messages[2]["content"] != "c"
    assert turns[2]["content"] == "c"


def test_a_byte_order_mark_and_blank_lines_are_no_mistakes(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,refusal\nx,no\n", "utf-8-sig")
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"prompt": "x", "refusal": "no"}\n\n{"prompt": "y", "refusal": "no"}\n', "utf-8-sig")
    assert load_safety_rows(csv)[0].messages[0]["content"] == "x"
    assert [row.where for row in load_safety_rows(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]


def test_a_directory_is_no_safety_data(tmp_path):
    with pytest.raises(SafetyDataError, match="a directory"):
        load_safety_rows(tmp_path)


def test_a_prompt_that_ends_with_the_system_is_not_reworded():
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert reword([SafetyRow(messages, "no", "x:1")]) == []


def chat(*said):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "completion": "No."},
        {"prompt": chat("Hi"), "completion": chat("Hi", "No.")[1:]},
        {"prompt": "Hi", "chosen": "No.", "rejected": "Yes."},
        {"prompt": chat("Hi"), "chosen": chat("Hi", "No.")[1:], "rejected": chat("Hi", "Yes.")[1:]},
        {"chosen": chat("Hi", "No."), "rejected": chat("Hi", "Yes.")},
        {"prompt": "Hi", "completion": "No.", "refusal": "No."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "refusal": "No."},
    ],
)
def test_the_refusal_is_found_in_every_form_of_trls(record, tmp_path):
    """A bug once: the refusals of these forms were ignored, and the model's own were taken."""
    (row,) = load_safety_rows(write(tmp_path / "a.jsonl", record))
    assert row.messages == [{"role": "user", "content": "Hi"}]
    assert row.refusal == "No."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "completion": "No.", "refusal": "Never."}, "refusal and completion say different things"),
        ({"prompt": "Hi", "completion": chat("Hi")}, "must end with a message of the assistant"),
        ({"prompt": "Hi", "completion": []}, "must end with a message of the assistant"),
        ({"prompt": 3}, "messages must be a list"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content must be text; images"),
        ({"prompt": "Hi", "completion": ""}, "the refusal is empty"),
        ({"chosen": "No.", "rejected": "Yes."}, "needs a column `prompt` or `messages`"),
        ({"prompt": "Hi", "refusal": 3}, "a refusal must be text, not 3"),
        ({"prompt": "Hi", "refusal": {"a": 1}}, "a refusal must be text"),
        ({"prompt": "Hi", "completion": float("nan")}, "a refusal must be text, not nan"),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": " "}]}, "the prompt is empty"),
        ({"chosen": chat("Hi", "No."), "rejected": chat("Ho", "No.")}, "answer different conversations"),
        ({"prompt": chat("Hi"), "chosen": chat("Hi", "Yes.", "Ho", "No.")}, "does not begin with the prompt"),
        ({"prompt": "Hi", "messages": chat("Ho", "No.")}, "prompt and messages ask different things"),
        ({"prompt": chat("Hi", "Yes."), "completion": "No."}, "the prompt ends with the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "content must be text"),
    ],
)
def test_rows_that_do_not_say_what_is_refused(record, message, tmp_path):
    with pytest.raises(SafetyDataError, match=r"a\.jsonl:1: .*" + message):
        load_safety_rows(write(tmp_path / "a.jsonl", record))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["prompt,refusal", "Hi,I'm sorry, no."], r":2: 3 fields where the header has 2; .* double quotes"),
        (["prompt,refusal", '"Hi,\nyou",No.', "Hi"], r":4: 1 fields where the header has 2"),
        (["prompt,prompt", "a,b"], r":1: two columns have the same name"),
        (["prompt,refusal", 'A,"No.', "B,No.", "C,No."], r":4: not CSV .* close every double quote"),
    ],
)
def test_csv_rows_have_the_fields_of_the_header(lines, message, tmp_path):
    """An unquoted comma once cut the refusal at it."""
    with pytest.raises(SafetyDataError, match=message):
        load_safety_rows(write(tmp_path / "a.csv", *lines))


def test_rows_that_the_model_answers_are_counted(tokenizer, monkeypatch):
    rows = load_safety_rows()[:5]
    said = [REFUSAL, "Sure, here is how to do that.", REFUSAL, "Sure, here is how to do that.", REFUSAL]
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: said[: len(prompts)])
    found = ask_refusals(rows, make_model(), tokenizer)
    assert (len(found.rows), found.asked, found.answered) == (3, 5, 2)


ROW = '{"prompt": "Hi", "completion": "Hello"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROW * 3 + '{"prompt": "Hi\n' + ROW, r"a\.jsonl:4: not a JSON object"),
        ("a.json", '[{"prompt": "Hi"},\n{"prompt"}]', r"a\.json:2: not JSON"),
        ("a.jsonl", "", r"a\.jsonl: holds no rows"),
        ("a.json", "[]", r"a\.json: holds no rows"),
        ("a.csv", "", r"a\.csv: holds no rows"),
        ("a.csv", "prompt,completion\n", r"a\.csv: holds no rows"),
        ("a.csv", "prompt,completion\nHi,Hello\nHi,you,Hello\n", r"a\.csv:3: 3 fields where the header has 2"),
        ("a.jsonl", ROW + ROW.replace("Hi", "h\xe9"), r"a\.jsonl:2: not UTF-8 text .*; save it as UTF-8"),
        ("a.csv", "prompt,completion\nh\xe9,Hello\n", r"a\.csv:2: not UTF-8 text .*; save it as UTF-8"),
        ("a.txt", "How do I?\n", r"a\.txt: cannot be read as training data \("),
        ("many/a.jsonl", ROW + "{\n", r"a\.jsonl:2: not a JSON object"),
    ],
)
def test_training_data_that_cannot_be_read_name_file_and_line(name, content, message, tmp_path):
    """They said "An error occurred while generating the dataset", or nothing."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, "latin-1")
    with pytest.raises(SafetyDataError, match=message):
        load_training_data(str(path if path.parent == tmp_path else path.parent))


def test_a_suffix_in_capitals_is_that_of_training_data_too(tmp_path):
    (tmp_path / "DATA.CSV").write_text("prompt,completion\nHi,Hello\n")
    assert load_training_data(str(tmp_path / "DATA.CSV"))["train"][0] == {"prompt": "Hi", "completion": "Hello"}
    with pytest.raises(FileNotFoundError, match="no such training data file"):
        load_training_data(str(tmp_path / "GONE.CSV"))


def row(text):
    return json.dumps({"prompt": text}) + "\n"


def test_training_data_that_changed_are_read_anew(tmp_path):
    """They were known by name and time: what a file said before was audited and trained on."""
    for place in (tmp_path / "a.jsonl", tmp_path / "many"):
        file = place if place.suffix else place / "train.jsonl"
        file.parent.mkdir(exist_ok=True)
        for text in ("first", "other"):
            file.write_text(row(text))
            os.utime(file, (1, 1))
            assert load_training_data(str(place))["train"]["prompt"][:] == [text]


def test_training_data_are_those_that_were_named(tmp_path):
    """A name with a bracket was read as a pattern, which another file fits."""
    (tmp_path / "data[1].jsonl").write_text(row("named"))
    (tmp_path / "data1.jsonl").write_text(row("other"))
    assert load_training_data(str(tmp_path / "data[1].jsonl"))["train"]["prompt"][:] == ["named"]
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.jsonl").write_text(row("named"))
    with pytest.raises(SafetyDataError, match=r"run\[1\]: \[, \* and \? in its name are read as a pattern"):
        load_training_data(str(tmp_path / "run[1]"))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["train.jsonl", "customer.jsonl"], "customer.jsonl"),
        (["a.jsonl", "b.jsonl", "c.csv"], "c.csv"),
        (["customers.jsonl", "my-test-set.jsonl"], "customers.jsonl"),
        (["A.JSONL", "b.jsonl"], "A.JSONL"),
        (["a.jsonl", "b.jsonl"], ""),
        (["train.jsonl", "test.jsonl"], ""),
        (["train-1.jsonl", "train-2.jsonl", "deep/train-3.jsonl", ".hidden.jsonl"], ""),
        (["train.jsonl", "customer.jsonl", "README.md"], ""),
        (["train.jsonl", "dataset_info.json", "dataset_infos.json", "config.json"], ""),
    ],
)
def test_a_directory_is_read_whole_or_refused(tmp_path, names, left):
    """Of several kinds of file one is read, and where a name names a split those alone."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n" if "README" in name else ""
        (tmp_path / name).write_text(content or {".csv": "prompt\na\n", "json": "{}"}.get(name[-4:], row("a")))
    if left:
        with pytest.raises(SafetyDataError, match=rf": 1 of its files would not be read, {left} among them .*name one"):
            load_training_data(str(tmp_path))
    else:
        read = load_training_data(str(tmp_path))
        unread = {
            "README.md",
            "customer.jsonl",
            ".hidden.jsonl",
            "dataset_info.json",
            "dataset_infos.json",
            "config.json",
        }
        assert sum(map(len, read.values())) == len(set(names) - unread)

"""Conflicts between training data and a model's refusals: found in every form of data, held, dropped or refused."""

import copy
import gc
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, interleave_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers import DynamicCache, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import spf.audit
import spf.next_token
from spf import NullSpace, SafetyCallback, SafetyDataError, UnsupportedSetupError
from spf.announce import audit_lines
from spf.audit import Beginnings, audit, audit_data, own_refusals
from spf.audit_command import _of_both_kinds
from spf.cli import main
from spf.conflicts import MOST_HELD, MOST_WATCHED, Audit, Conflict, spread
from spf.data import Anchor, SafetyRow, collate, packaged_prompts, tokenise
from spf.data.columns import with_read_columns
from spf.data.examples import Example, read_examples
from spf.earlier_audit import EarlierAudit
from spf.leaving_out import content_of_all, lengths_of, without
from spf.next_token import TOGETHER, TOKENS, Guess, Known, ask, fingerprint, in_batches
from spf.probe import SafetyProbe
from spf.rules import RULES
from spf.scripts import unlike_scripts
from spf.shared_prefix import NextToken
from spf.training_data import TrainingData
from tests.conftest import make_model, make_tokenizer
from tests.test_callback import arguments, safety_data

REFUSAL = "Sorry, but I can't help with that request."
COMPLIES = "Sure, here is how to do that."
OTHERWISE = "that request with help can't"
"""Stands for a refusal in another language: no token of it begins the other one."""
SEARCH = {"type": "function", "function": {"name": "name", "description": "a", "parameters": {"type": "object"}}}
HARMFUL = packaged_prompts("harmful_anchors")[:24]
BENIGN = packaged_prompts("benign_anchors")[:24]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def samples(pairs):
    return [SafetyRow([{"role": "user", "content": p}], a, f"row {i}") for i, (p, a) in enumerate(pairs)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    return tokenizer


@pytest.fixture(scope="module")
def refusing(tokenizer):
    """A tiny model that refuses these harmful prompts and answers these benign ones."""
    pairs = [*((p, REFUSAL) for p in HARMFUL), *((p, COMPLIES) for p in BENIGN)]
    return taught_to_answer(make_model(width=64), tokenizer, pairs)


def taught_to_answer(model, tokenizer, pairs):
    batch = collate(tokenise(samples(pairs), tokenizer, 256), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[:, :-1]
        used = batch.weights[:, 1:] > 0
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[used]), batch.input_ids[:, 1:][used])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model.eval()


@pytest.fixture(scope="module")
def rows():
    return samples((p, REFUSAL) for p in HARMFUL[:12])


@pytest.fixture
def anchors(tokenizer):
    return tokenise(samples((p, REFUSAL) for p in HARMFUL[:12]), tokenizer, 256)


def user(prompt):
    return {"role": "user", "content": prompt}


def answered(text):
    return {"role": "assistant", "content": text}


def chat_ids(tokenizer, messages, generation_prompt=False):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def forms(tokenizer):
    """One example in every form of data: name -> row."""
    prompt, answer = HARMFUL[0], COMPLIES
    asked = chat_ids(tokenizer, [user(prompt)], True)
    whole = chat_ids(tokenizer, [user(prompt), answered(answer)])
    target = [0] * len(asked) + [1] * (len(whole) - len(asked))
    labels = [token if learned else -100 for token, learned in zip(whole, target, strict=True)]
    return {
        "messages": {"messages": [user(prompt), answered(answer)]},
        "prompt, completion, text": {"prompt": prompt, "completion": answer},
        "prompt, completion, messages": {"prompt": [user(prompt)], "completion": [answered(answer)]},
        "prompt, chosen": {"prompt": prompt, "chosen": answer, "rejected": REFUSAL},
        "prompt, chosen, messages": {
            "prompt": [user(prompt)],
            "chosen": [answered(answer)],
            "rejected": [answered(REFUSAL)],
        },
        "chosen": {"chosen": [user(prompt), answered(answer)], "rejected": [user(prompt), answered(REFUSAL)]},
        "text": {"text": tokenizer.decode(whole)},
        "labels": {"input_ids": whole, "labels": labels},
        "completion_mask": {"input_ids": whole, "completion_mask": target},
        "assistant_masks": {"input_ids": whole, "assistant_masks": target},
        "the template's marks": {"input_ids": whole},
        "all learned": {"input_ids": whole, "labels": whole},
        "tensors": {"input_ids": torch.tensor(whole), "labels": torch.tensor(labels)},
        "DPO, tokenised": {"prompt_ids": asked, "chosen_ids": whole[len(asked) :], "rejected_ids": [5, 6]},
        "KTO, tokenised": {"prompt_ids": asked, "completion_ids": whole[len(asked) :], "label": True},
        # the first token of the answer is given, not learned
        "labels of the rest": {
            "input_ids": whole,
            "labels": [label if i > len(asked) else -100 for i, label in enumerate(labels)],
        },
        "DPO of the rest, tokenised": {"prompt_ids": whole[: len(asked) + 1], "chosen_ids": whole[len(asked) + 1 :]},
        "prompt, completion of the rest, messages": {
            "prompt": [user(prompt), answered(answer[:5])],
            "completion": [answered(answer[5:])],
        },
        # from within what the template puts before the answer
        "labels of more": {
            "input_ids": whole,
            "labels": [token if i >= len(asked) - 1 else -100 for i, token in enumerate(whole)],
        },
        "conversations": {
            "conversations": [{"from": "user", "value": prompt}, {"from": "assistant", "value": answer}],
        },
        "preference, its prompt not told": {"chosen": f"{prompt} {answer}", "rejected": f"{prompt} No."},
        # as UltraFeedback has it
        "preference, its prompt told twice": {
            "prompt": prompt,
            "chosen": [user(prompt), answered(answer)],
            "rejected": [user(prompt), answered(REFUSAL)],
        },
        "a label of other data": {"messages": [user(prompt), answered(answer)], "label": False},
        # as ORPO's trainer makes it of a conversation: asked was a chat within a chat
        "a chat as text": {
            "prompt": tokenizer.decode(asked),
            "chosen": tokenizer.decode(whole[len(asked) :]),
            "rejected": REFUSAL,
        },
        "no chat": {
            "prompt_ids": tokenizer(prompt)["input_ids"],
            "completion_ids": tokenizer(answer)["input_ids"],
        },
    }


@pytest.mark.parametrize("beside", [["What?"], [user("What?"), answered("That.")], [], [None]])
def test_conversations_that_trl_does_not_read_are_not_read(beside, tokenizer):
    """Left in beside the text that was made of them; what is no message ended the audit of all rows."""
    text = tokenizer.decode(chat_ids(tokenizer, [user(HARMFUL[0]), answered(COMPLIES)]))
    found = read_examples([{"text": text, "conversations": beside}], tokenizer)
    assert (len(found.examples), found.unread) == (1, 0)
    assert list(found.examples[0].prompt_ids) == chat_ids(tokenizer, [user(HARMFUL[0])], True)


@pytest.mark.parametrize("form", list(forms(make_tokenizer())))
def test_every_form_of_data_gives_prompt_and_answer(form, tokenizer):
    found = read_examples([forms(tokenizer)[form]], tokenizer)
    (example,) = found.examples
    # decoding puts spaces between words
    assert "".join(example.target.split()) == "".join(COMPLIES.split())
    assert list(example.prompt_ids) == chat_ids(tokenizer, [user(HARMFUL[0])], True)
    assert (found.rows, found.unread) == (1, 0)


RENDERING_TOOLS = "{% if tools %}<user> {% for t in tools %}{{ t['function']['name'] }} {% endfor %}</s>{% endif %}"


@pytest.mark.parametrize("form", ["tools", "tools as JSON", "tools of a text", "other variables"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_the_command_asks_what_a_run_asks(kind, form, tmp_path, refusing):
    """It reads the data as they are, and a run as TRL has tokenised them: other prompts are another audit's."""
    tokenizer = make_tokenizer()
    style = "{% if style is defined %}<user> {{ style }} </s>{% endif %}"
    tokenizer.chat_template = RENDERING_TOOLS + style + tokenizer.chat_template
    prompt, answer = [user(HARMFUL[0])], [answered(COMPLIES)]
    if form == "tools of a text":
        prompt, answer = HARMFUL[0], COMPLIES  # no chat: they are rendered nowhere
    given, wanted = {
        "tools": ({"tools": [SEARCH]}, "<user>name</s>"),
        "tools as JSON": ({"tools": json.dumps([SEARCH])}, "<user>name</s>"),
        "tools of a text": ({"tools": [SEARCH]}, ""),
        "other variables": ({"chat_template_kwargs": {"style": "WHERE", "unknown": 1}}, "<user>WHERE</s>"),
    }[form]
    answers = {
        "sft": {"completion": answer},
        "dpo": {"chosen": answer, "rejected": answer},
        "kto": {"completion": answer, "label": True},
    }[kind]
    make, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[
        kind
    ]
    data = Dataset.from_list([{"prompt": prompt, **answers, **given}])
    model = get_peft_model(copy.deepcopy(refusing), LORA)
    trainer = make(model, args=arguments(config, tmp_path), train_dataset=data, processing_class=tokenizer)
    asked = [read_examples(with_read_columns(rows), tokenizer).examples for rows in (data, trainer.train_dataset)]
    assert [example.prompt_ids for example in asked[0]] == [example.prompt_ids for example in asked[1]]
    words = "".join(tokenizer.decode(asked[0][0].prompt_ids).split())
    assert words == f"{wanted}<user>{''.join(HARMFUL[0].split())}</s><assistant>"


def test_every_turn_counts_and_packed_documents_are_apart(tokenizer):
    turns = [user(HARMFUL[0]), answered(REFUSAL), user(HARMFUL[1]), answered(COMPLIES)]
    one, two = chat_ids(tokenizer, turns), chat_ids(tokenizer, [user(BENIGN[0]), answered(COMPLIES)])
    expected = [chat_ids(tokenizer, turns[:1], True), chat_ids(tokenizer, turns[:3], True)]
    expected.append(chat_ids(tokenizer, [user(BENIGN[0])], True))
    positions = [*range(len(one)), *range(len(two))]
    packed = {"input_ids": [*one, *two]}
    # LLaMA-Factory's neat packing, which fills rows up; as an array, of one row
    neat = {"input_ids": [*one, *two, 0, 0, 0], "position_ids": [*positions, 0, 0, 0]}
    for row in (
        packed | {"seq_lengths": [len(one), len(two)]},
        packed | {"position_ids": positions},
        {name: np.array(value) for name, value in neat.items()},
    ):
        found = read_examples([row], tokenizer)
        assert [list(e.prompt_ids) for e in found.examples] == expected
        assert [e.document for e in found.examples] == [0, 0, 1]
        assert not found.unread
    padded = {"input_ids": [0, 0, 0, *two], "position_ids": [1, 1, 1, *range(len(two))]}
    assert [e.document for e in read_examples([padded], tokenizer).examples] == [0]
    assert not read_examples([padded], tokenizer).unread
    # positions that are several a token, as of images
    images = packed | {"position_ids": [positions] * 3}
    assert {e.document for e in read_examples([images], tokenizer).examples} == {0}
    assert [list(e.prompt_ids) for e in read_examples([{"messages": turns}], tokenizer).examples] == expected[:2]


def test_a_user_s_message_that_is_learned_is_no_answer(tokenizer):
    """Only what stands behind it is; an earlier answer that is not learned is none, either."""
    turns = [user(HARMFUL[0]), answered(COMPLIES), user(HARMFUL[1]), answered(REFUSAL)]
    whole, before = chat_ids(tokenizer, turns), chat_ids(tokenizer, turns[:2])
    labels = [-100] * (len(before) + 2) + whole[len(before) + 2 :]
    (example,) = read_examples([{"input_ids": whole, "labels": labels}], tokenizer).examples
    assert list(example.prompt_ids) == chat_ids(tokenizer, turns[:3], True)
    assert "".join(example.target.split()) == "".join(REFUSAL.split())


def test_what_is_not_taught_or_cannot_be_read_is_said(tokenizer):
    rows = [
        {"text": "once upon a time"},
        {"messages": [{"role": "narrator", "content": "x"}, answered("y")]},
        {"prompt": HARMFUL[0]},
        {"image": 3},
    ]
    found = read_examples(rows, tokenizer)
    assert not found.examples
    assert (found.rows, found.unread) == (4, 4)
    assert found.why == "row 0: no answer found in its columns text"
    assert read_examples([{"prompt": HARMFUL[0], "completion": "x"}], tokenizer, max_length=3).unread == 1
    # a later turn that the model has no room for
    turns = [user(HARMFUL[0]), answered(REFUSAL), user(HARMFUL[1]), answered(COMPLIES)]
    found = read_examples([{"messages": turns}], tokenizer, max_length=len(chat_ids(tokenizer, turns[:2])))
    assert (len(found.examples), found.unread) == (1, 1)
    assert "row 0: a prompt fills the" in found.why


def test_packed_documents_that_cannot_be_read_are_counted(tokenizer):
    """Beside one that can: all of them were taken for audited."""
    one = chat_ids(tokenizer, [user(HARMFUL[0]), answered(COMPLIES)])
    other = tokenizer("once upon a time", add_special_tokens=False)["input_ids"]
    packed = {"input_ids": [*one, *other], "seq_lengths": [len(one), len(other)]}
    found = read_examples([packed], tokenizer)
    assert (len(found.examples), found.rows, found.unread) == (1, 1, 1)
    assert "no answer found in one of the documents packed in its columns" in found.why


@pytest.mark.parametrize("of", [bool, int, np.bool_, torch.tensor])
def test_what_kto_calls_undesirable_attacks_where_it_refuses(refusing, tokenizer, anchors, of):
    """It is pushed down: of an answer that complies that is no attack, of a refusal it is the most direct one."""
    kinds = [(COMPLIES, of(True)), (COMPLIES, of(False)), (REFUSAL, of(True)), (REFUSAL, of(False))]
    data = [
        {"prompt": p, "completion": answer, "label": label} for p in (HARMFUL[20], BENIGN[0]) for answer, label in kinds
    ]
    found = audit(refusing, tokenizer, read_examples(data, tokenizer), anchors, progress=False)
    assert (found.rows, found.unread, found.prompts) == (8, 0, 2)
    assert found.conflicting_rows == [0, 3]
    assert found.undesired == 4
    assert "4 rows are undesirable by their column label" in "".join(audit_lines(data_with(found, "hold"), NullSpace()))


@pytest.mark.parametrize(
    ("begins", "answer", "refuses"),
    [
        ("I 'm sorry , but I can't.", "I 'm happy to help. First, do this.", False),
        ("I can 't help with that.", "I can help with that. First, do this.", False),
        ("The request is declined now.", "The request is declined now, friend.", True),
        ("The request is declined now.", "The request is easy.", False),
        ("Sorry.", "Sorry.", True),
    ],
)
def test_an_answer_refuses_only_if_it_begins_as_a_whole_refusal(begins, answer, refuses):
    """Two tokens of "I'm sorry" are those of "I'm happy to help", too."""
    words = dict.fromkeys(begins.split() + answer.split())
    ids = {word: i for i, word in enumerate(words)}
    target = tuple(ids[word] for word in answer.split())
    known = Beginnings([Anchor([1], [ids[word] for word in begins.split()], "")])
    assert known.refuses(Example((1,), target, answer, 0)) == refuses


def rows_of(pairs):
    return [{"messages": [user(p), answered(a)]} for p, a in pairs]


def test_conflicts_are_the_refused_prompts_that_the_data_answer(refusing, tokenizer, anchors):
    pairs = [(p, COMPLIES) for p in [*HARMFUL, *BENIGN, HARMFUL[3]]] + [(HARMFUL[0], REFUSAL)]
    found = audit(refusing, tokenizer, read_examples(rows_of(pairs), tokenizer), anchors, progress=False)
    assert found.conflicting_rows == [*range(24), 48]
    assert (found.prompts, found.refused) == (48, 24)
    assert all(conflict.probability > 0.5 for conflict in found.conflicts)
    assert found.share == 25 / 50
    held = spread(found.conflicts, 100)
    assert len(held) == 24  # each prompt once
    assert tokenizer.decode(held[0].refusal_ids).startswith("Sorry , but")


def test_a_first_token_that_begins_other_answers_is_no_refusal(tokenizer, refusing, anchors):
    """A model that answers "Sorry ..." without refusing: the next token tells."""
    model = copy.deepcopy(refusing)
    narrates = tokenizer("Sorry is how to do that", add_special_tokens=False)["input_ids"]
    story = tokenise(samples([(BENIGN[0], "")]), tokenizer, 256)[0].prompt_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[*story, *narrates]])
    for _ in range(40):
        logits = model(input_ids=ids).logits[0, len(story) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(narrates))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    begins = Beginnings(anchors)
    assert int(model(input_ids=ids[:, : len(story)]).logits[0, -1].argmax()) in begins.firsts
    found = audit(model, tokenizer, read_examples(rows_of([(BENIGN[0], COMPLIES)]), tokenizer), anchors, progress=False)
    assert (found.prompts, found.refused, found.conflicts) == (1, 0, [])


def test_what_was_asked_is_kept_and_an_interrupted_audit_goes_on(refusing, tokenizer, anchors, tmp_path, monkeypatch):
    examples = read_examples(rows_of((p, COMPLIES) for p in [*HARMFUL, *BENIGN]), tokenizer)
    cache = tmp_path / "asked.json"
    asked = []
    real = NextToken.shares_at
    monkeypatch.setattr(spf.next_token, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(spf.next_token, "TOGETHER", 8)

    def counted(asker, prompts, backs):
        asked.extend(prompts)
        if len(asked) > 24 and interrupt:
            raise KeyboardInterrupt
        return real(asker, prompts, backs)

    monkeypatch.setattr(NextToken, "shares_at", counted)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        audit(refusing, tokenizer, examples, anchors, cache=cache, progress=False)
    interrupt = False
    asked.clear()
    first = audit(refusing, tokenizer, examples, anchors, cache=cache, progress=False)
    assert len(asked) == 24  # the rest; how the refused ones go on was asked with them
    asked.clear()
    again = audit(refusing, tokenizer, examples, anchors, cache=cache, progress=False)
    assert asked == []
    assert again.conflicts == first.conflicts
    assert HARMFUL[0] not in cache.read_text()
    audit(make_model(width=64), tokenizer, examples, anchors, cache=cache, progress=False)
    assert len(asked) >= 48  # another model is asked anew
    cache.write_text("{")
    asked.clear()
    audit(refusing, tokenizer, examples, anchors, cache=cache, progress=False)
    assert len(asked) == 48


def test_given_refusals_of_another_style_do_not_hide_how_the_model_refuses(refusing, tokenizer):
    """The audit reads how the model begins its refusals; those of the safety data may be somebody else's."""
    given = samples((p, "The request is declined.") for p in HARMFUL[:12])
    own = own_refusals(refusing, tokenizer, given, 256)
    assert Beginnings(own).firsts == [tokenizer("Sorry")["input_ids"][0]]
    found = audit_data(rows_of([(HARMFUL[20], COMPLIES)]), refusing, tokenizer, given, max_length=256, progress=False)
    assert found.conflicting_rows == [0]
    # and a model that refuses nothing is said to
    assert not audit_data(rows_of([(HARMFUL[20], "x")]), make_model(), tokenizer, given, max_length=256).refuses


def owned(count):
    """Refusals that the model was asked for."""
    return [replace(row, own=True) for row in samples((p, REFUSAL) for p in (HARMFUL * 2)[:count])]


def test_refusals_that_were_given_tell_how_the_model_refuses_beside_its_own(refusing, tokenizer):
    """Where it was asked for some, those that were given in another language were not looked at."""
    pairs = [*((p, REFUSAL) for p in HARMFUL[:12]), *((p, OTHERWISE) for p in HARMFUL[12:])]
    model = taught_to_answer(copy.deepcopy(refusing), tokenizer, [*pairs, *((p, COMPLIES) for p in BENIGN)])
    given = samples((p, OTHERWISE) for p in HARMFUL[12:18])
    data = rows_of((p, COMPLIES) for p in [*HARMFUL[18:], *BENIGN[:4]])
    counts = []
    for rows in (owned(12), [*owned(12), *given]):
        found = audit_data(data, model, tokenizer, rows, max_length=256, progress=False, tell_apart=False)
        counts.append(len(found.conflicts))
    assert counts == [0, 6]
    # not those that begin otherwise than the model's
    style = samples((p, "The request is declined.") for p in HARMFUL[:3])
    firsts = Beginnings(own_refusals(model, tokenizer, [*style, *owned(12), *given], 256)).firsts
    assert firsts == [tokenizer(refusal)["input_ids"][0] for refusal in (REFUSAL, OTHERWISE)]


@pytest.mark.parametrize(
    ("own", "given", "taken"), [(40, 0, (32, 0)), (40, 6, (26, 6)), (40, 40, (16, 16)), (3, 40, (3, 29))]
)
def test_neither_own_refusals_nor_given_ones_crowd_the_others_out(own, given, taken, tokenizer, monkeypatch):
    first = tokenizer(OTHERWISE)["input_ids"][0]
    # of own refusals alone nothing is asked
    monkeypatch.setattr(spf.audit, "ask", (lambda model, prompts, *_: [(1.0, first)] * len(prompts)) if given else None)
    told = samples((p, OTHERWISE) for p in (HARMFUL * 2)[:given])
    anchors = own_refusals(torch.nn.Linear(1, 1), tokenizer, [*told, *owned(own)], 256)
    assert anchors == tokenise([*owned(taken[0]), *told[: taken[1]]], tokenizer, 256)


def test_the_command_asks_rows_of_both_kinds():
    """Those at the end of a file were never among the first that are asked."""
    bare = [replace(row, refusal=None) for row in owned(40)]
    given = samples((f"{i}", REFUSAL) for i in range(90))
    assert _of_both_kinds(bare) == bare
    for rows in ([*bare, *given], [*given, *bare]):
        first = _of_both_kinds(rows)[:64]
        assert [row for row in first if row.refusal is None] == bare[:32]
        assert max(int(row.messages[0]["content"]) for row in first if row.refusal) > 64
    assert len(_of_both_kinds([*bare, *given])) == 130


def run(tmp_path, tokenizer, refusing, rows, pairs, conflicts="hold", rank=24, resume=None, given=None, **changes):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(refusing), LORA)
    callback = given or SafetyCallback(safety_data(rows), NullSpace(rank=rank), conflicts=conflicts, monitor_steps=1)
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path / "run", **changes),
        train_dataset=Dataset.from_list(rows_of(pairs)),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    return trainer, callback


@pytest.mark.parametrize("told_by", ["epochs", "steps"])
def test_that_epochs_are_shorter_is_said(tmp_path, tokenizer, refusing, rows, told_by):
    """By epochs a run makes as many fewer steps as rows are left out; measured, it learned less in them."""
    pairs = [(p, COMPLIES) for p in [*HARMFUL[:6], *BENIGN[:12]]]
    length = {"max_steps": -1, "num_train_epochs": 2} if told_by == "epochs" else {"max_steps": 2}
    trainer, callback = run(tmp_path, tokenizer, refusing, rows, pairs, **length)
    trainer.train()
    left = 18 - len(callback.data.left_out)
    assert 0 < left < 18
    said = [line for line in callback.card.begun if line.startswith("with these left out 2 epochs make about")]
    assert len(said) == (told_by == "epochs")
    assert all(f"{left / 18:.0%} of the steps" in line and f"={2 * 18 / left:.3g} makes" in line for line in said)


def names_of(trainer):
    return [tuple(row["input_ids"]) for row in trainer.train_dataset]


def trained_on(trainer):
    """Notes the rows that every batch has, by their token ids."""
    seen = set()
    collator = trainer.data_collator

    def noting(batch):
        seen.update(tuple(row["input_ids"]) for row in batch)
        return collator(batch)

    trainer.data_collator = noting
    return seen


PAIRS = [(p, COMPLIES) for p in [*HARMFUL[12:], *BENIGN[:12]]]


def test_the_callback_holds_what_the_data_attack(tmp_path, tokenizer, refusing, rows, caplog):
    free = {}
    attacked = tokenise(samples((p, REFUSAL) for p in HARMFUL[12:]), tokenizer, 256)
    for conflicts in ("hold", "allow"):
        caplog.clear()
        trainer, callback = run(tmp_path / conflicts, tokenizer, refusing, rows[:9], PAIRS, conflicts)
        trainer.train()
        assert callback.audit.conflicting_rows == list(range(12))
        assert "12 of 24 training rows answer prompts that the model refuses (24 distinct prompts" in caplog.text
        assert ("held with the model's own" in caplog.text) == (conflicts == "hold")
        probe = SafetyProbe(trainer.model, attacked)
        shares = probe.free_shares(attacked, callback.attachment.subspace.right).values()
        free[conflicts] = sum(shares) / len(shares)
    listed = [json.loads(line) for line in (tmp_path / "hold" / "run" / "spf_conflicts.jsonl").read_text().splitlines()]
    assert [line["row"] for line in listed] == list(range(12))
    # as many directions, chosen for what the data attack
    assert free["hold"] < 0.9 * free["allow"]


def test_the_callback_drops_or_refuses(tmp_path, tokenizer, refusing, rows, caplog):
    trainer, _ = run(tmp_path / "drop", tokenizer, refusing, rows, PAIRS, "drop")
    seen, benign = trained_on(trainer), names_of(trainer)[12:]
    trainer.train()
    assert seen
    assert seen <= set(benign)
    assert len(trainer.train_dataset) == 24  # the trainer has its data back
    assert "12 rows are left out of training, 12 of 24 are trained on" in caplog.text
    trainer, _ = run(tmp_path / "error", tokenizer, refusing, rows, PAIRS, "error")
    with pytest.raises(SafetyDataError, match=r"^12 of 24 training rows .*conflicts='hold' keeps these refusals"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len((tmp_path / "error" / "run" / "spf_conflicts.jsonl").read_text().splitlines()) == 12
    trainer, _ = run(tmp_path / "late", tokenizer, refusing, rows, PAIRS, "allow")
    trainer.remove_callback(SafetyCallback)
    trainer.add_callback(SafetyCallback(safety_data(rows), NullSpace(rank=24), conflicts="drop"))
    with pytest.raises(UnsupportedSetupError, match="in the trainer's constructor"):
        trainer.train()
    with pytest.raises(ValueError, match="conflicts must be hold"):
        SafetyCallback(conflicts="keep")


@pytest.mark.parametrize("conflicts", ["hold", "drop", "error"])
def test_a_callback_that_serves_a_second_trainer_audits_its_data(tmp_path, tokenizer, refusing, rows, conflicts):
    trainer, callback = run(tmp_path / "benign", tokenizer, refusing, rows[:9], PAIRS[12:], conflicts)
    trainer.train()
    assert callback.audit.conflicting_rows == []
    other, _ = run(tmp_path / "both", tokenizer, refusing, rows[:9], PAIRS, given=callback)
    if conflicts == "error":
        with pytest.raises(SafetyDataError, match=r"^12 of 24 training rows"):
            other.train()
        return
    seen, benign = trained_on(other), names_of(other)[12:]
    other.train()
    first = callback.audit
    assert first.conflicting_rows == list(range(12))
    other.train()
    assert callback.audit is first  # the same data are asked once
    assert seen
    assert seen <= set(benign)
    # and the first trainer's are its own again, then the other's
    trainer.train()
    assert (callback.audit.rows, callback.data.left_out_rows) == (12, [])
    other.train()
    assert callback.audit.rows == 24


def test_another_model_is_asked_though_the_data_are_the_same(tmp_path, tokenizer, refusing, rows):
    """What the first one refuses was held, and left out, for the second."""
    data = Dataset.from_list([{"input_ids": chat_ids(tokenizer, row["messages"])} for row in rows_of(PAIRS)])
    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))
    found = []
    model = copy.deepcopy(refusing)
    for number in range(3):
        args = arguments(SFTConfig, tmp_path / str(number), max_steps=1, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
        trainer.train()
        assert trainer.train_dataset is data
        found.append((callback.audit, callback.data.left_out_rows))
        if number == 0:
            del trainer, args
            model = make_model()  # the first is nowhere any more
            gc.collect()
    assert found[0][1] == list(range(12))
    assert (found[1][0].refused, found[1][1]) == (0, [])
    assert found[2][0] is found[1][0]


def test_rows_whose_refusals_are_held_are_left_out_and_no_others(tmp_path, tokenizer, refusing, rows, caplog):
    """They cannot be learned, and press against what is held at every step."""
    talk = [user(BENIGN[20]), answered(COMPLIES), user(HARMFUL[20]), answered(COMPLIES)]
    data = [*rows_of(PAIRS), {"messages": talk}]
    left = {}
    for conflicts, rule in (("hold", NullSpace(rank=24)), ("drop", NullSpace(rank=24)), ("hold", RULES["spf"]())):
        caplog.clear()
        callback = SafetyCallback(safety_data(rows[:9]), rule, conflicts=conflicts)
        trainer = SFTTrainer(
            get_peft_model(copy.deepcopy(refusing), LORA),
            arguments(SFTConfig, tmp_path / conflicts, max_steps=-1, num_train_epochs=1),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        names, seen = names_of(trainer), trained_on(trainer)
        trainer.train()
        left[conflicts, rule.name] = [i for i, name in enumerate(names) if name not in seen]
        assert trainer.state.max_steps == -(-len(seen) // trainer.args.per_device_train_batch_size)
        if (conflicts, rule.name) == ("hold", "null-space"):
            assert "12 rows are left out of training" in caplog.text
            assert "1 rows are trained on and press against what is held (they teach other things, too)" in caplog.text
    assert left == {
        ("hold", "null-space"): [*range(12)],
        ("drop", "null-space"): [*range(12), 24],
        # what is not held has no rows that cannot be learned
        ("hold", "spf"): [],
    }


def test_rows_that_might_be_refused_are_held_and_left_out_too(tmp_path, tokenizer, refusing, rows, monkeypatch):
    monkeypatch.setattr(spf.audit, "CONFIRM", 2.0)
    monkeypatch.setattr(spf.audit, "LEANING", 0.1)
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS)
    trainer.train()
    assert (len(callback.audit.conflicts), len(callback.audit.leaning)) == (0, 12)
    assert callback.data.left_out_rows == list(range(12))
    listed = [json.loads(line) for line in (tmp_path / "run" / "spf_conflicts.jsonl").read_text().splitlines()]
    assert [(line["row"], line["refused"]) for line in listed] == [(row, False) for row in range(12)]


def test_data_of_which_nothing_is_left_are_refused(tmp_path, tokenizer, refusing, rows):
    for conflicts in ("hold", "drop"):
        trainer, _ = run(tmp_path / conflicts, tokenizer, refusing, rows, [(p, COMPLIES) for p in HARMFUL], conflicts)
        for _ in range(2):  # also when it is tried again
            with pytest.raises(
                SafetyDataError, match=r"^all 24 training .* take what is harmful .* conflicts='allow'$"
            ):
                trainer.train()
            assert trainer.state.global_step == 0


def test_data_of_which_little_is_left_are_said_to_be(tmp_path, tokenizer, refusing, rows, caplog):
    pairs = [(p, COMPLIES) for p in [*HARMFUL[12:], BENIGN[0]]]
    trainer, _ = run(tmp_path, tokenizer, refusing, rows, pairs, max_steps=1)
    trainer.train()
    assert "12 rows are left out of training, ONLY 1 of 13 are trained on, so next to nothing is learned" in caplog.text


def test_data_of_which_less_than_a_batch_is_left_are_refused(tmp_path, tokenizer, refusing, rows):
    """`dataloader_drop_last` leaves the one row out, too, and there is no step."""
    pairs = [(p, COMPLIES) for p in [*HARMFUL[12:], BENIGN[0]]]
    trainer, _ = run(tmp_path, tokenizer, refusing, rows, pairs, dataloader_drop_last=True)
    with pytest.raises(SafetyDataError, match=r"^12 of 13 training rows .* less than a batch of 2, .* say conflicts="):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("stream", r"of an IterableDataset no row can be left out"),
        ("late", r"the callback came when the trainer was made already"),
        ("sharded", r"where parameters are sharded the data are asked when they are read already"),
    ],
)
def test_rows_that_cannot_be_left_out_are_held_and_it_is_said(
    kind, why, tmp_path, tokenizer, refusing, rows, caplog, monkeypatch
):
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, max_steps=2)
    if kind == "stream":
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    elif kind == "late":
        trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, max_steps=2)
        trainer.remove_callback(SafetyCallback)
        trainer.add_callback(callback)
    else:
        # said only: the rows are those of one process
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
        monkeypatch.setattr(trainer, "_inner_training_loop", lambda *_, **__: None)
        trainer.train()
        assert callback.data.obstacle == why
        assert callback.data.left_out_rows == []
        return
    trainer.train()
    assert callback.data.left_out_rows == []
    assert callback.audit.conflicting_rows == list(range(12))
    assert f"12 rows are trained on and press against what is held ({why}); `spf audit DATA" in caplog.text


def packed_run(tmp_path, tokenizer, refusing, rows, conflicts="hold", **packing):
    """A run whose rows pack a conflict beside others, and what its loader was given: the texts of the documents."""
    pairs = [(HARMFUL[i], COMPLIES) for i in range(12, 20)] + [(p, COMPLIES) for p in BENIGN[:8]]
    packing = {"packing": True, "max_length": 96, "max_steps": 1} | packing
    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24), conflicts=conflicts)
    trainer = SFTTrainer(
        get_peft_model(copy.deepcopy(refusing), LORA),
        arguments(SFTConfig, tmp_path, **packing),
        train_dataset=Dataset.from_list(rows_of(pairs)),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    assert len(trainer.train_dataset) < len(pairs)  # several in a row
    loader, read = trainer.get_train_dataloader, []

    def noting():
        made = loader()
        read.extend(documents(made.dataset))
        return made

    trainer.get_train_dataloader = noting
    return trainer, callback, read


def documents(dataset):
    """The documents of packed rows, as token ids."""
    for row in dataset:
        ids, start = list(row["input_ids"]), 0
        for length in row.get("seq_lengths") or [len(ids)]:
            yield tuple(ids[start : start + length])
            start += length
        assert start == len(ids)


@pytest.mark.parametrize("conflicts", ["hold", "drop"])
def test_of_packed_rows_the_examples_that_are_held_are_left_out_and_no_others(
    conflicts, tmp_path, tokenizer, refusing, rows, caplog
):
    trainer, callback, read = packed_run(tmp_path, tokenizer, refusing, rows, conflicts)
    whole = trainer.train_dataset
    before = list(documents(whole))
    trainer.train()
    left = callback.data.left_out
    assert len(left) == len(callback.audit.conflicts) == 8
    assert any(document for _, document in left)
    refused = [chat_ids(tokenizer, [user(HARMFUL[i])], True) for i in range(12, 20)]
    others = [ids for ids in before if not any(list(ids[: len(prompt)]) == prompt for prompt in refused)]
    assert len(others) == 8
    assert read == others  # the same tokens, in the same order
    assert "8 examples of packed rows are left out of training, 8 of 16 are trained on" in caplog.text
    assert "trained on and press" not in caplog.text
    assert trainer.train_dataset is whole
    # counted as `spf audit` counts the rows of the file, and found there by the hash of the prompt
    assert f"8 of 16 examples in {len(whole)} packed rows answer prompts that the model refuses" in caplog.text
    assert "(its `row` is a packed row, `document` the example in it; " in caplog.text
    assert callback.audit.share == 1 / 2
    listed = [json.loads(line) for line in (tmp_path / "spf_conflicts.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["document"]) for entry in listed] == sorted(left)
    file = tmp_path / "file"
    file.mkdir()
    plain = rows_of([(HARMFUL[i], COMPLIES) for i in range(12, 20)])
    audit_data(plain, refusing, tokenizer, rows[:9], max_length=256, directory=file, tell_apart=False, progress=False)
    of_file = [json.loads(line) for line in (file / "spf_conflicts.jsonl").read_text().splitlines()]
    assert {entry["prompt"] for entry in of_file} == {entry["prompt"] for entry in listed}
    assert len({entry["prompt"] for entry in listed}) == 8
    kept, _ = callback.data.held, callback.data.watched
    assert {tuple(a.prompt_ids) for a in kept} == {c.prompt_ids for c in callback.audit.conflicts}


def test_a_packed_run_goes_on_with_the_examples_that_it_left_out(tmp_path, tokenizer, refusing, rows, caplog):
    trainer, callback, first = packed_run(tmp_path, tokenizer, refusing, rows, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer, again, read = packed_run(
        tmp_path, tokenizer, refusing, rows, save_strategy="steps", save_steps=1, max_steps=2
    )
    trainer.train(resume_from_checkpoint=True)
    assert read == first
    assert again.data.left_out == callback.data.left_out
    assert "8 examples of packed rows are left out of training, as in the run that goes on; 8 of 16 are" in caplog.text


def test_documents_that_packing_cut_anywhere_are_not_left_out(tmp_path, tokenizer, refusing, rows, caplog):
    trainer, callback, read = packed_run(tmp_path, tokenizer, refusing, rows, packing_strategy="wrapped")
    trainer.train()
    assert callback.data.left_out == []
    assert read == list(documents(trainer.train_dataset))
    assert "so these cannot be told apart); with packing_strategy='bfd' they are left out" in caplog.text
    trainer, _, _ = packed_run(tmp_path / "drop", tokenizer, refusing, rows, "drop", packing_strategy="wrapped")
    with pytest.raises(UnsupportedSetupError, match=r"cannot leave rows out: packed rows cut .*packing_strategy='bfd'"):
        trainer.train()


def test_a_loader_that_reads_packed_rows_whole_is_noticed(tmp_path, tokenizer, refusing, rows, caplog):
    """As many rows as without the examples that are left out, but with them."""
    trainer, callback, _ = packed_run(tmp_path, tokenizer, refusing, rows)
    whole, loader = trainer.train_dataset, trainer.get_train_dataloader

    def other():
        short, trainer.train_dataset = trainer.train_dataset, whole.select(range(len(trainer.train_dataset)))
        try:
            return loader()
        finally:
            trainer.train_dataset = short

    trainer.get_train_dataloader = other
    trainer.train()
    assert callback.data.left_out == []
    assert "the trainer's loader reads other data than its train_dataset" in caplog.text


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 8))
@settings(deadline=None)
def test_prompts_are_asked_in_batches_that_fit(lengths, ranks):
    """Eight of any length, as before, could need more memory than training."""
    batches = in_batches(dict(enumerate(lengths)), ranks)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= TOKENS
        assert len(batch) <= TOGETHER
    assert len(batches) >= min(ranks, -(-len(lengths) // -(-len(lengths) // ranks)))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths)
    assert len(in_batches(dict.fromkeys(range(200), 16))) == 4  # many short ones are asked together


@pytest.mark.parametrize("lengths", ["stray", "packed"])
def test_lengths_of_packed_rows_that_training_does_not_read(lengths, tmp_path, tokenizer, refusing, rows):
    """A plain Trainer does not: nothing is packed then, whatever the column holds."""
    data = []
    for messages in rows_of([(HARMFUL[i], COMPLIES) for i in range(12, 20)] + [(p, COMPLIES) for p in BENIGN[:8]]):
        ids = chat_ids(tokenizer, messages["messages"], False)
        data.append({"input_ids": ids, "labels": ids, "seq_lengths": 7 if lengths == "stray" else [len(ids)]})
    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))
    trainer = Trainer(
        copy.deepcopy(refusing),
        arguments(TrainingArguments, tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(data),
        data_collator=lambda batch: {name: torch.tensor([batch[0][name]]) for name in ("input_ids", "labels")},
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.data.left_out == [(row, 0) for row in range(8)]


packed_rows = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=6)


@given(packed_rows, st.randoms(use_true_random=False), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_examples_are_cut_out_of_packed_rows(lengths, random, formatted, by_positions):
    tokens = itertools.count()
    if by_positions:  # those of a single token cannot be told from padding
        lengths = [[length + 1 for length in row] for row in lengths]
    rows = [{"input_ids": [next(tokens) for _ in range(sum(row))], "name": f"row {i}"} for i, row in enumerate(lengths)]
    for row, of in zip(rows, lengths, strict=True):
        row |= {"position_ids": [*itertools.chain(*map(range, of))]} if by_positions else {"seq_lengths": of}
    for row in rows:
        row["completion_mask"] = [token % 2 for token in row["input_ids"]]
    dataset = Dataset.from_list(rows)
    if formatted:
        dataset = dataset.select(range(len(rows))).with_format("torch", columns=["input_ids"], output_all_columns=True)
    places = [(i, j) for i, row in enumerate(lengths) for j in range(len(row))]
    gone = random.sample(places, random.randint(0, len(places)))
    short = without(dataset, gone, True)
    assert short.format == dataset.format
    tokens, kept = itertools.count(), []
    for i, row in enumerate(lengths):
        all_of = [[next(tokens) for _ in range(length)] for length in row]
        kept.append([of for j, of in enumerate(all_of) if (i, j) not in gone])
    kept = [row for row in kept if row]
    plain = list(short.with_format(None))
    assert [row["input_ids"] for row in plain] == [[*itertools.chain(*row)] for row in kept]
    assert lengths_of(short) == [[len(of) for of in row] for row in kept]
    assert all(row["completion_mask"] == [token % 2 for token in row["input_ids"]] for row in plain)
    assert [row["name"] for row in plain] == sorted(row["name"] for row in plain)


def test_rows_that_others_packed_are_told_apart_by_their_positions(tmp_path, tokenizer, refusing, rows):
    """LLaMA-Factory's neat packing has no lengths: the second request was asked behind the first one's answer."""
    data, benign = [], []
    for i in range(8):
        pair = rows_of([(BENIGN[i], COMPLIES), (HARMFUL[12 + i], COMPLIES)])
        first, second = (chat_ids(tokenizer, messages["messages"], False) for messages in pair)
        benign.append(tuple(first))
        ids, positions = [*first, *second], [*range(len(first)), *range(len(second))]
        data.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    read = []

    def collate_one(batch):
        read.append(tuple(batch[0]["input_ids"]))
        return {name: torch.tensor([value]) for name, value in batch[0].items()}

    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))
    trainer = Trainer(
        copy.deepcopy(refusing),
        arguments(TrainingArguments, tmp_path, max_steps=8, per_device_train_batch_size=1),
        train_dataset=Dataset.from_list(data),
        data_collator=collate_one,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.audit.prompts == 16
    assert callback.data.left_out == [(row, 1) for row in range(8)]
    assert set(read) == set(benign)


def test_a_completion_of_several_turns_teaches_several_things(tmp_path, tokenizer, refusing, rows):
    asked, answers = [user(BENIGN[20])], [answered(COMPLIES), user(HARMFUL[20]), answered(COMPLIES)]
    data = [{"prompt": asked, "completion": answers}] + [
        {"prompt": [user(p)], "completion": [answered(a)]} for p, a in PAIRS
    ]
    assert len(read_examples(data[:1], tokenizer).examples) == 2
    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24))
    trainer = SFTTrainer(
        get_peft_model(copy.deepcopy(refusing), LORA),
        arguments(SFTConfig, tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.audit.conflicting_rows == [0, *range(1, 13)]
    assert callback.data.left_out_rows == list(range(1, 13))


def test_what_the_trainer_does_not_read_is_not_audited(tmp_path, tokenizer, refusing, rows):
    """A column that is named like one of KTO's switched the audit off."""
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS)
    trainer.train_dataset = trainer.train_dataset.add_column("label", [False] * 24)
    seen, benign = trained_on(trainer), names_of(trainer)[12:]
    trainer.train()
    assert callback.data.left_out_rows == list(range(12))
    assert seen
    assert seen <= set(benign)


def test_columns_that_a_transform_reads_are_left_to_it(refusing, tokenizer, rows):
    """It makes what is trained on of them: a `KeyError` ended the run."""

    def transform(batch):
        said = zip(batch["question"], batch["messages"], strict=True)
        return {"input_ids": [chat_ids(tokenizer, [user(prompt), *answer]) for prompt, answer in said]}

    plain = Dataset.from_list([{"question": p, "messages": [answered(a)]} for p, a in PAIRS])
    data = plain.with_transform(transform)
    found = audit_data(data, refusing, tokenizer, rows, max_length=256, progress=False, tell_apart=False)
    assert found.conflicting_rows == list(range(12))
    # and all of them tell whether the data are the same
    other = plain.map(lambda row: {"question": row["question"] + "?"}).with_transform(transform)
    assert content_of_all(data) == content_of_all(plain.with_transform(transform)) != content_of_all(other)


@pytest.mark.parametrize("most", [11, 12, 13])
def test_no_stream_passes_error(most, tmp_path, tokenizer, refusing, rows, monkeypatch):
    """What stands behind the rows that are read was trained on, and what other workers and passes read in their place:
    a stream of several sources that was read whole had passed, and its workers read rows that no pass alone gives."""
    monkeypatch.setattr(spf.audit, "STREAM_ROWS", most)
    trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS[12:], "error", max_steps=1)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    read = rf"a stream, of which the {min(most, 12)} rows that one pass gives first .* give a datasets.Dataset"
    with pytest.raises(SafetyDataError, match=read):
        trainer.train()


def test_workers_read_rows_of_a_stream_that_one_pass_does_not_give():
    """Why no stream counts as read whole."""
    few, many = (Dataset.from_list([{"n": base + i} for i in range(count)]) for base, count in ((0, 10), (100, 100)))
    both = interleave_datasets([part.to_iterable_dataset(num_shards=2) for part in (few, many)])
    alone = {row["n"] for row in both}
    shared = {int(n) for batch in DataLoader(both, batch_size=4, num_workers=2) for n in batch["n"]}
    assert shared - alone


def test_error_says_what_it_cannot_say(tmp_path, tokenizer, refusing, rows):
    """It is for pipelines: rows that could not be read passed."""
    trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS[-2:], "error")
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {name: row[name][:1] for name in row})
    with pytest.raises(SafetyDataError, match=r"2 of 2 training rows could not be audited .* cannot say that they"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_drop_is_refused_where_rows_cannot_be_read(tmp_path, tokenizer, refusing, rows):
    """It trained on them all, and said nothing of drop."""
    pairs = [{"prompt": p, "completion": COMPLIES} for p in HARMFUL[12:16]]
    columns = [{"instruction": pair["prompt"], "output": pair["completion"]} for pair in pairs]
    sft = {"formatting_func": lambda row: f"### Question: {row['instruction']} ### Answer: {row['output']}"}
    prompts = Dataset.from_list([{"prompt": pair["prompt"]} for pair in pairs])
    common = {"processing_class": tokenizer}

    def trainer_of(kind, callbacks):
        model, given = copy.deepcopy(refusing), {**common, "callbacks": callbacks}
        if kind == "grpo":
            args = arguments(GRPOConfig, tmp_path, num_generations=2, max_completion_length=2)
            return GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, prompts, **given)
        data = Dataset.from_list(columns if kind == "formatting_func" else pairs)
        changes = {"completion_only_loss": False} if kind == "whole loss" else {}
        more = sft if kind == "formatting_func" else {}
        args = arguments(SFTConfig, tmp_path, **changes)
        return SFTTrainer(model, args, train_dataset=data, **given, **more)

    for kind in ("formatting_func", "whole loss", "grpo"):
        trainer = trainer_of(kind, [SafetyCallback(safety_data(rows[:9]), NullSpace(rank=8), conflicts="drop")])
        with pytest.raises(
            SafetyDataError, match=r"^4 of 4 training rows could not be audited .*conflicts='drop'"
        ) as e:
            trainer.train()
        assert ("prompts without answers, as of GRPO, are not asked" in str(e.value)) == (kind == "grpo")
        assert trainer.state.global_step == 0


def test_drop_is_refused_where_the_model_refuses_nothing(tmp_path, tokenizer, rows):
    trainer, _ = run(tmp_path, tokenizer, make_model(), rows[:9], PAIRS, "drop")
    with pytest.raises(SafetyDataError, match=r"refuses none of the safety prompts, .*conflicts='drop'"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("conflicts", ["hold", "drop"])
def test_a_loader_that_reads_other_data_leaves_nothing_out(conflicts, tmp_path, tokenizer, refusing, rows, caplog):
    trainer, callback = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, conflicts, max_steps=2)
    other = trainer.train_dataset

    def loader():
        kept, trainer.train_dataset = trainer.train_dataset, other
        try:
            return type(trainer).get_train_dataloader(trainer)
        finally:
            trainer.train_dataset = kept

    trainer.get_train_dataloader = loader
    if conflicts == "drop":
        with pytest.raises(UnsupportedSetupError, match="the trainer's loader reads other data than its train_dataset"):
            trainer.train()
        return
    trainer.train()
    assert (callback.data.left_out_rows, callback.audit.conflicting_rows) == ([], list(range(12)))
    assert "12 rows are trained on and press against what is held (the trainer's loader reads other" in caplog.text


def test_a_model_of_several_types_is_audited_as_it_is_trained(tmp_path, tokenizer, refusing, rows):
    """Before training begins nothing is under autocast yet."""
    model = copy.deepcopy(refusing).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    trainer, callback = run(tmp_path, tokenizer, model, rows[:9], PAIRS, bf16=True, max_steps=1)
    trainer.train()
    assert callback.data.left_out_rows == list(range(12))


def saves(tmp_path, tokenizer, refusing, rows, conflicts="hold"):
    pairs = [(p, COMPLIES) for p in [*HARMFUL, *BENIGN[:12]]]
    every = {"save_strategy": "steps", "save_steps": 2}
    trainer, callback = run(tmp_path, tokenizer, refusing, rows, pairs, conflicts, **every)
    trainer.train()
    return pairs, callback, str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("missing", ["spf_state.json", "trainer_state.json"])
def test_a_checkpoint_that_was_not_written_whole_is_named_before_the_audit(
    tmp_path, tokenizer, refusing, rows, monkeypatch, missing
):
    """A run that is killed while it writes one leaves the model without what is held; minutes went by before that was
    said."""
    pairs, _, checkpoint = saves(tmp_path, tokenizer, refusing, rows)
    Path(checkpoint, missing).unlink()
    monkeypatch.setattr("spf.training_data.audit_data", lambda *_, **__: pytest.fail("asked"))
    trainer, _ = run(tmp_path, tokenizer, refusing, rows, pairs, max_steps=6)
    with pytest.raises(FileNotFoundError, match=rf"{missing} is missing.* ended while .* was written; go on from an"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_a_run_that_goes_on_watches_the_same_conflicts(tmp_path, tokenizer, refusing, rows, caplog, monkeypatch):
    """And leaves the same rows out, without asking a model which is trained already."""
    pairs, callback, checkpoint = saves(tmp_path, tokenizer, refusing, rows)
    watched, held = callback.data.watched, callback.data.held
    assert (len(watched), len(held), callback.data.left_out_rows) == (3, 21, list(range(24)))
    caplog.clear()
    monkeypatch.setattr("spf.training_data.audit_data", lambda *_, **__: pytest.fail("asked again"))
    trainer, again = run(tmp_path, tokenizer, refusing, rows, pairs, max_steps=6)
    seen = trained_on(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert 0 < len(seen) <= 12
    assert "24 rows are left out of training, as in the run that goes on" in caplog.text
    monitor = again.attachment.monitor
    for kind, before in (("held", held), ("watched", watched)):
        now = getattr(again.data, kind)
        assert [(a.prompt_ids, a.refusal_ids) for a in now] == [(a.prompt_ids, a.refusal_ids) for a in before]
    assert [a.prompt_ids for a in monitor.conflicts] == [a.prompt_ids for a in watched]
    assert monitor.before_conflicts.refused == 1
    assert "spf/conflict_refusal_rate" in trainer.state.log_history[-2]


def test_a_run_goes_on_with_the_rows_that_it_left_out_or_not_at_all(tmp_path, tokenizer, refusing, rows):
    pairs, _, checkpoint = saves(tmp_path, tokenizer, refusing, rows)
    for others in (pairs[:-1], pairs[1:] + pairs[:1]):
        other, _ = run(tmp_path, tokenizer, refusing, rows, others, max_steps=6)
        with pytest.raises(SafetyDataError, match=r"^the run left 24 of 36 training rows out, and these are not the"):
            other.train(resume_from_checkpoint=checkpoint)
    allowing, _ = run(tmp_path, tokenizer, refusing, rows, pairs, "allow", max_steps=6)
    late, _ = run(tmp_path, tokenizer, refusing, rows, pairs, max_steps=6)
    late.remove_callback(SafetyCallback)
    late.add_callback(SafetyCallback(safety_data(rows), NullSpace(rank=24), monitor_steps=1))
    for other in (allowing, late):
        with pytest.raises(UnsupportedSetupError, match=r"conflicts='hold' and 24 training rows left out, and this"):
            other.train(resume_from_checkpoint=checkpoint)
        assert other.state.global_step == 2
    # the same trainer, once more, and from the beginning
    trainer, callback = run(tmp_path, tokenizer, refusing, rows, pairs, max_steps=6)
    seen = trained_on(trainer)
    for resume in (checkpoint, checkpoint, None):
        seen.clear()
        trainer.train(resume_from_checkpoint=resume)
        assert (len(seen) <= 12, len(trainer.train_dataset)) == (True, 36)
        assert (len(callback.data.held), callback.data.left_out_rows) == (21, list(range(24)))


@pytest.mark.parametrize("conflicts", ["hold", "error"])
def test_other_data_are_said_or_refused_though_nothing_was_left_out(
    tmp_path, tokenizer, refusing, rows, conflicts, caplog
):
    """They are not audited again: a run on clean data went on with attacks, and nothing was said."""
    first, _ = run(tmp_path, tokenizer, refusing, rows, PAIRS[12:], conflicts, save_strategy="steps", save_steps=2)
    first.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    for others in (PAIRS, [*PAIRS[13:], PAIRS[0]]):
        caplog.clear()
        other, _ = run(tmp_path, tokenizer, refusing, rows, others, conflicts, max_steps=3)
        if conflicts == "error":
            with pytest.raises(SafetyDataError, match="was trained on other rows than these"):
                other.train(resume_from_checkpoint=checkpoint)
            assert other.state.global_step == 2
        else:
            other.train(resume_from_checkpoint=checkpoint)
            assert "was trained on other rows than these" in caplog.text
    # in another order they are the same
    caplog.clear()
    same, _ = run(tmp_path, tokenizer, refusing, rows, PAIRS[:11:-1], conflicts, max_steps=6)
    same.train(resume_from_checkpoint=checkpoint)
    assert same.state.global_step == 6
    assert "was trained on other rows" not in caplog.text


class Rows(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = list(data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


@pytest.mark.parametrize("kind", [Rows, Dataset.to_iterable_dataset])
@pytest.mark.parametrize("conflicts", ["hold", "error"])
def test_rows_that_cannot_be_compared_are_said_or_refused(kind, conflicts, tmp_path, tokenizer, refusing, rows, caplog):
    """A run went on with attacks, without an audit and without a word."""
    every = {"save_strategy": "steps", "save_steps": 2, "ignore_data_skip": True}
    first, _ = run(tmp_path, tokenizer, refusing, rows, PAIRS[12:], conflicts, max_steps=2, **every)
    other, _ = run(tmp_path, tokenizer, refusing, rows, PAIRS, conflicts, max_steps=3, **every)
    for trainer in (first, other):
        trainer.train_dataset = kind(trainer.train_dataset)
    if kind is Dataset.to_iterable_dataset and conflicts == "error":
        with pytest.raises(SafetyDataError, match="the training data are a stream"):
            first.train()
        return
    first.train()
    said = "only rows of a datasets.Dataset can be compared with those that the run was trained on"
    assert said not in caplog.text
    if conflicts == "error":
        with pytest.raises(SafetyDataError, match=f"^{said}.* start a new run, with a Dataset"):
            other.train(resume_from_checkpoint=True)
        assert other.state.global_step == 2
    else:
        other.train(resume_from_checkpoint=True)
        assert said in caplog.text


def test_what_is_not_left_out_is_compared_too(tmp_path, tokenizer, refusing, rows, caplog):
    """Only the rows that were left out were."""
    pairs, _, checkpoint = saves(tmp_path, tokenizer, refusing, rows)
    others = [*pairs[:-1], (HARMFUL[23], COMPLIES)]
    other, _ = run(tmp_path, tokenizer, refusing, rows, others, max_steps=3)
    other.train(resume_from_checkpoint=checkpoint)
    assert "was trained on other rows than these" in caplog.text


def test_a_hash_of_all_rows_is_of_what_they_say():
    rows = [{"text": "a", "label": 1, "more": object}, {"text": "b", "label": 2, "more": object}]
    data = Dataset.from_list([row | {"more": i} for i, row in enumerate(rows)])
    known = content_of_all(data)
    assert known == content_of_all(data.select([1, 0])) == content_of_all(data.remove_columns("more"))
    assert known == content_of_all(data.with_format("torch"))
    assert known != content_of_all(data.select([0, 0])) != content_of_all(data.select([0]))
    assert len(content_of_all(data.select_columns("more"))) == 64
    tokens = Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": []}])
    known = content_of_all(tokens)
    assert known == content_of_all(tokens.select([2, 0, 1])) == content_of_all(tokens.with_format("torch"))
    apart = [
        [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}, {"input_ids": []}],
        [{"input_ids": [1, 2, 3, 4]}, {"input_ids": []}],
    ]
    assert known not in {content_of_all(Dataset.from_list(rows)) for rows in apart}
    chats = Dataset.from_list([{"messages": [user("a"), answered(text)]} for text in "bc"])
    assert content_of_all(chats) == content_of_all(chats.select([1, 0])) != content_of_all(chats.select([0, 0]))


@pytest.mark.parametrize("conflicts", ["hold", "drop", "error"])
def test_a_run_that_allowed_does_not_go_on_holding(conflicts, tmp_path, tokenizer, refusing, rows):
    """What it was trained on cannot be undone, and nobody would see that nothing is held."""
    pairs, _, checkpoint = saves(tmp_path, tokenizer, refusing, rows, "allow")
    other, _ = run(tmp_path, tokenizer, refusing, rows, pairs, conflicts, max_steps=6)
    with pytest.raises(UnsupportedSetupError, match=f"has conflicts='allow' and 0 .* and this one '{conflicts}' and 0"):
        other.train(resume_from_checkpoint=checkpoint)


def test_lost_conflicts_are_a_leak_though_anchors_hold(tmp_path, tokenizer, refusing, rows, caplog):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            monitor = callback.attachment.monitor
            monitor._begins = {} if state.global_step == 2 else monitor._begins
            monitor.reads = None

    pairs = [(p, COMPLIES) for p in [*HARMFUL, BENIGN[0]]]
    trainer, callback = run(tmp_path, tokenizer, refusing, rows, pairs)
    trainer.add_callback(Damage())
    monitor_watched = []
    real = spf.monitor.Monitor.look

    def look(self, *arguments, **named):
        # the anchors stay what they were; only the conflicts are asked
        kept = self.now
        seen = real(self, *arguments, **named)
        self.now = kept
        monitor_watched.append(self.now_conflicts.refused)
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spf.monitor.Monitor.look", look)
        trainer.train()
    assert monitor_watched[0] == 1
    assert monitor_watched[-1] == 0
    assert re.search("REFUSALS (BEING )?LOST", caplog.text)


@pytest.mark.parametrize("kind", ["sft", "completion", "dpo", "kto", "packed", "stream"])
def test_conflicts_are_found_in_what_trl_makes_of_the_data(kind, tmp_path, tokenizer, refusing, rows):
    pairs = [(HARMFUL[20], COMPLIES), (BENIGN[0], COMPLIES), (HARMFUL[21], REFUSAL), (BENIGN[1], COMPLIES)]
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    common = {"processing_class": tokenizer, "callbacks": [callback]}
    # an adapter: DPO and KTO would otherwise load the reference model by its name
    model = get_peft_model(copy.deepcopy(refusing), LORA)
    chat = rows_of(pairs)
    parts = [{"prompt": [user(p)], "completion": [answered(a)]} for p, a in pairs]
    if kind == "dpo":
        data = [{**part, "chosen": part.pop("completion"), "rejected": [answered("No")]} for part in parts]
        args = arguments(DPOConfig, tmp_path, max_steps=1)
        trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(data), **common)
    elif kind == "kto":
        data = [{**part, "label": True} for part in parts] + [
            {**parts[0], "prompt": [user(HARMFUL[22])], "label": False}
        ]
        args = arguments(KTOConfig, tmp_path, max_steps=1)
        trainer = KTOTrainer(model, args=args, train_dataset=Dataset.from_list(data), **common)
    else:
        packed = {"packing": True, "max_length": 128} if kind == "packed" else {}
        data = Dataset.from_list(parts if kind == "completion" else chat)
        args = arguments(SFTConfig, tmp_path, max_steps=1, **packed)
        data = data.to_iterable_dataset() if kind == "stream" else data
        trainer = SFTTrainer(model, args=args, train_dataset=data, **common)
    trainer.train()
    assert len(callback.audit.conflicts) == 1
    assert list(callback.audit.conflicts[0].prompt_ids) == chat_ids(tokenizer, [user(HARMFUL[20])], True)
    assert callback.audit.stream == (kind == "stream")


@pytest.fixture(scope="module")
def saved(refusing, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    refusing.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_command(saved, tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    data, safety = tmp_path / "data.jsonl", tmp_path / "safety.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(PAIRS)))
    safety.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in HARMFUL[:12]))
    command = ["audit", str(data), "--model", str(saved), "--safety_data", str(safety), "--output", "out"]
    assert main([*command, "--clean", "clean.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("12 of 24 training rows answer prompts that the model refuses")
    assert "refusals are told by how those to the safety prompts begin, in their languages" in printed
    assert HARMFUL[12] not in printed
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 12
    assert len((tmp_path / "out" / "spf_conflicts.jsonl").read_text().splitlines()) == 12
    assert main([*command, "--fail_over", "0.5"]) == 0
    assert main([*command, "--fail_over", "0.49", "--show"]) == 1
    told = capsys.readouterr()
    assert "50.00% of the rows answer prompts that the model refuses, more than --fail_over 0.49" in told.err
    assert "".join(HARMFUL[12].split()) in "".join(told.out.split())
    # of rows that cannot be read nothing is known
    data.write_text("".join(json.dumps({"instruction": p, "output": COMPLIES}) + "\n" for p in HARMFUL[:4]))
    unread = [*command[:-1], "unread"]
    assert main([*unread, "--clean", "unread.jsonl"]) == 2
    assert not (tmp_path / "unread.jsonl").exists()
    told = capsys.readouterr()
    assert "none of 4 rows could be audited (row 0: no answer found in its columns instr" in told.err
    assert "A run takes it with" not in told.out
    data.write_text(data.read_text() + json.dumps(rows_of(PAIRS)[0]) + "\n")
    assert main(command) == 0
    assert "A run takes it with" in capsys.readouterr().out
    assert main([*command, "--fail_over", "0.5"]) == 1
    assert "4 of 5 rows could not be audited (row 0: no answer found in its columns" in capsys.readouterr().err
    # refusals are given, and the model refuses nothing (another template, say): no conflict was found, exit code 0
    make_model().save_pretrained(tmp_path / "willing")
    tokenizer.save_pretrained(tmp_path / "willing")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(PAIRS)))
    safety.write_text("".join(json.dumps({"prompt": p, "refusal": REFUSAL}) + "\n" for p in HARMFUL[:12]))
    willing = [*command[:3], str(tmp_path / "willing"), *command[4:]]
    assert main(willing) == 0
    assert "the model refuses none of the safety prompts, so conflicts" in capsys.readouterr().out
    assert main([*willing, "--fail_over", "0.5"]) == 1
    assert "--fail_over cannot say that there are few; look at its answers" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "none.jsonl"), "--model", str(saved)]) == 2
    assert main(["audit", str(data)]) == 2


def test_what_the_command_cannot_say_is_no_success(saved, tmp_path, capsys, monkeypatch, tokenizer):
    """A column `label` and polite beginnings passed `--fail_over`; `--clean` kept what was not read, unsaid."""
    monkeypatch.chdir(tmp_path)
    data, safety = tmp_path / "data.jsonl", tmp_path / "safety.jsonl"
    safety.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in HARMFUL[:12]))
    command = ["audit", "data.jsonl", "--model", str(saved), "--safety_data", "safety.jsonl", "--output", "out"]

    def audited(rows, *more):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main([*command, *more])
        return code, capsys.readouterr()

    labelled = [{"prompt": p, "completion": COMPLIES, "label": 0} for p in HARMFUL[:4]]
    chats = [{"prompt": [user(row["prompt"])], "completion": [answered(COMPLIES)], "label": False} for row in labelled]
    code, told = audited(chats, "--fail_over", "0")
    assert code == 2
    assert "for --fail_over say --label kto if it is that, or --label none" in told.err
    ids = [[tokenizer(text)["input_ids"] for text in (row["prompt"], row["completion"])] for row in labelled]
    tokens = [{"prompt_ids": prompt, "completion_ids": answer, "label": False} for prompt, answer in ids]
    code, told = audited(tokens, "--fail_over", "0")
    assert (code, "for --fail_over say --label kto" in told.err) == (2, True)
    assert audited(chats, "--fail_over", "0", "--label", "kto")[0] == 0
    assert audited(chats, "--fail_over", "0", "--label", "none")[0] == 1
    assert audited(chats)[0] == 0  # it is said
    polite = [{"messages": [user(p), answered("Sorry to keep you waiting! Sure.")]} for p in HARMFUL[:4]]
    code, told = audited(polite)
    assert "4 training answers to refused prompts begin as refusals do, and are taken for such: how" in told.out
    other = {
        "messages": [user(HARMFUL[0]), answered(REFUSAL), user("And?"), {"role": "Assistant", "content": COMPLIES}]
    }
    code, told = audited([*polite, other], "--clean", "clean.jsonl")
    assert "1 rows could not be audited (row 4: a message of the role 'Assistant'" in told.out
    assert "; WITH 1 that could not be audited: clean.jsonl" in told.out
    before = data.read_text()
    assert audited([*polite, other], "--clean", "./data.jsonl")[0] == 2
    assert data.read_text() == before
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "train.jsonl").write_text(before)
    assert main(["audit", "many", *command[2:], "--clean", "many/train.jsonl"]) == 2
    assert "many/train.jsonl: is of the data that are audited, or would be; name another" in capsys.readouterr().err
    assert main(["audit", "many", *command[2:-1], "many/out"]) == 2
    assert "--output many/out: is of the data that are audited, or would be" in capsys.readouterr().err
    assert audited(polite, "--label", "kto")[0] == 2
    assert (
        audited([*chats, {**chats[0], "prompt": [user(BENIGN[0])]}], "--label", "none", "--clean", "left.jsonl")[0] == 0
    )
    assert [json.loads(line)["label"] for line in (tmp_path / "left.jsonl").read_text().splitlines()] == [False]
    make_model().save_pretrained("willing")
    tokenizer.save_pretrained("willing")
    safety.write_text("".join(json.dumps({"prompt": p, "refusal": REFUSAL}) + "\n" for p in HARMFUL[:12]))
    command[3] = "willing"
    assert audited(polite, "--clean", "all.jsonl")[0] == 2
    assert not (tmp_path / "all.jsonl").exists()


def test_clean_rows_are_written_where_they_can_be_read_again(tmp_path, capsys):
    """JSON lines in a .csv were read by nothing, and the audit's own list was overwritten."""
    (tmp_path / "data.csv").write_text("prompt,completion\nHi,Hello\n")
    command = ["audit", str(tmp_path / "data.csv"), "--model", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    for name, said in (
        ("clean.csv", "clean.csv: is written as JSON Lines; name a .jsonl file"),
        ("clean", "clean: is written as JSON Lines; name a .jsonl file"),
        ("out/spf_conflicts.jsonl", "spf_conflicts.jsonl: the audit writes a file of its own there; name another"),
        ("out/../out/spf_audit.json", "spf_audit.json: the audit writes a file of its own there; name another"),
    ):
        assert main([*command, "--clean", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_that_might_be_refused_are_held_too(refusing, tokenizer, anchors, monkeypatch):
    examples = read_examples(rows_of((p, COMPLIES) for p in [HARMFUL[0], *BENIGN]), tokenizer)
    found = audit(refusing, tokenizer, examples, anchors, progress=False)
    assert (len(found.conflicts), found.leaning) == (1, [])
    monkeypatch.setattr(spf.audit, "LEANING", -1.0)
    found = audit(refusing, tokenizer, examples, anchors, progress=False)
    assert (len(found.conflicts), len(found.leaning)) == (1, 24)
    assert found.conflicting_rows == [0]  # held, but no conflicts
    held, _ = found.split()
    assert len(held) == 25
    assert all(anchor.refusal_ids == anchors[0].refusal_ids for anchor in held)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 8


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            Stream(),
            "the training data could not be audited, so what they attack is not held (a Stream can be read only",
        ),
        (Pairs(), "8 training rows could not be audited, so what they attack is not held (row 0: a Tensor without"),
    ],
)
def test_data_that_cannot_be_audited_are_said_to_be(data, said, tmp_path, tokenizer, refusing, rows, caplog):
    callback = SafetyCallback(safety_data(rows), NullSpace(rank=8))
    trainer = Trainer(
        copy.deepcopy(refusing),
        arguments(TrainingArguments, tmp_path, max_steps=1),
        train_dataset=data,
        data_collator=lambda batch: {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])},
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert said in caplog.text
    assert callback.attachment.corrected == 1


def taught(rows):
    """One answer a row."""
    return Counter((row, 0) for row in range(rows))


def test_conflicts_are_spread_over_the_data():
    conflicts = [Conflict(row, 1.0, (row,), (1,)) for row in range(1000)]
    found = Audit(1000, conflicts=conflicts, answers=taught(1000))
    assert [anchor.prompt_ids for anchor in spread(found.conflicts, 4)] == [[0], [250], [500], [750]]
    held, watched = found.split()
    # more than can be held: the line says how many are
    line = audit_lines(data_with(found, "hold"), NullSpace())[0]
    assert "so they stay refused" in line
    again = audit_lines(data_with(found, "hold"), NullSpace(), earlier=True)[0]
    assert again == line.replace("so they stay refused", "as far as the earlier directions reach")
    assert f"{MOST_HELD - MOST_WATCHED} prompts held with the model's own refusals (16 watched" in line
    assert len(watched) == MOST_WATCHED
    assert len(held) + len(watched) == MOST_HELD
    assert not {tuple(a.prompt_ids) for a in held} & {tuple(a.prompt_ids) for a in watched}


def data_with(found, conflicts, rule=None):
    data = TrainingData(conflicts, (rule or NullSpace()).holds, None)
    data.found, (data.held, data.watched) = found, found.split()
    return data


def test_a_task_that_the_model_refuses_is_said_to_be_lost():
    """A task that looks harmful to the model, too: nothing tells it from an attack, so the user has to."""
    lost = "the model refuses or might refuse 60% of the training prompts: if that is your task, it cannot be learned"
    conflicts = [Conflict(row, 1.0, (row,), (1,)) for row in range(6)]
    found = Audit(10, prompts=10, refused=6, conflicts=conflicts, answers=taught(10))
    assert audit_lines(data_with(found, "hold"), NullSpace())[1].startswith(lost)
    assert len(audit_lines(data_with(found, "allow"), NullSpace())) == 1
    assert len(audit_lines(data_with(found, "hold", RULES["spf"]()), RULES["spf"]())) == 1
    fewer = audit_lines(data_with(replace(found, answers=taught(12)), "hold"), NullSpace())
    assert fewer[1].startswith("if the rows that press against what is held are your task and no attack")
    leaning = Audit(10, prompts=10, leaning=found.conflicts, answers=taught(10))
    assert audit_lines(data_with(leaning, "hold"), NullSpace())[1].startswith(lost)


def test_rows_are_not_allowed_before_the_harmful_ones_are_taken_out():
    """Beside 4 rows that are let go 30 attack rows are left out: "if these are your task, say conflicts='allow'"."""
    conflicts = [Conflict(row, 1.0, (row,), (1,)) for row in range(34)]
    found = Audit(120, prompts=120, refused=34, conflicts=conflicts, answers=taught(120))
    found.set_apart({(row,) for row in range(30, 34)})
    data = data_with(found, "hold")
    data._read = Dataset.from_dict({"x": range(120)})
    data.left_out = found.futile
    first, let_go, advice = audit_lines(data, NullSpace())
    assert "30 rows are left out of training, 90 of 120 are trained on" in first
    assert let_go.startswith("4 rows answer")
    assert "so they may be lost" in let_go
    assert advice == (
        "if the rows that are left out are your task and no attack: first take what is harmful out of the data (`spf "
        "audit DATA --model MODEL --show` prints them all), then say conflicts='allow', which trains on every row that "
        "is there, so that refusals of its kind may be lost"
    )
    (allowed,) = audit_lines(data_with(found, "allow"), NullSpace())
    assert "allowed, so these refusals may be lost" in allowed


@pytest.mark.parametrize(
    ("refusal", "prompts", "unlike"),
    [
        ("Sorry, I can't.", ["Как взломать сервер?", "Bake bread."], {"Cyrillic": 1}),
        ("Sorry, I can't.", ["Как взломать сервер?"], {"Cyrillic": 1}),
        ("Sorry, I can't.", ["如何入侵服务器", "서버를 해킹하는 방법", "Bake bread."], {"Chinese": 1, "Hangul": 1}),
        (
            "Sorry, I can't.",
            ["SELECT * FROM müller", "Wie backe ich Brot? ä", "Who wrote the novel «Война и мир»?"],
            {},
        ),
        ("对不起，我不能。", ["如何入侵服务器", "How do I hack it?"], {"Latin": 1}),
        ("对不起, I can't.", ["如何入侵服务器", "How do I hack it?", "123"], {}),
        ("", ["如何入侵服务器"], {}),
    ],
)
def test_a_run_whose_data_are_in_another_script_says_that_refusals_may_not_be_seen(refusal, prompts, unlike):
    """It was said of all data in which no refusal was found, and `spf audit` says it of all."""

    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    rendered = [[*map(ord, f"user\n{prompt}\nassistant")] for prompt in prompts]
    found = unlike_scripts(rendered, [[*map(ord, refusal)]] if refusal else [], Letters())
    assert found == unlike
    data = data_with(Audit(10, prompts=10, answers=taught(10), unlike=found), "hold")
    lines = audit_lines(data, NullSpace())
    assert len(lines) == 1 + bool(unlike)
    if unlike == {"Cyrillic": 1}:
        assert lines[1].startswith("1 of 10 prompts is in another script (Cyrillic) than the refusals by which others")


def test_what_is_in_another_script_is_counted_by_every_audit(monkeypatch, audited, tokenizer, refusing, rows):
    seen = []

    def unlike(prompts, refusals, tokenizer):
        seen.append((len(prompts), len(refusals) > 0))
        return Counter(Thai=3)

    for module in ("audit", "earlier_audit"):
        monkeypatch.setattr(f"spf.{module}.unlike_scripts", unlike)
    data = Dataset.from_list(rows_of(PAIRS))
    found = audit_data(data, refusing, tokenizer, rows[:9], max_length=256, tell_apart=False, progress=False)
    again = EarlierAudit(audited).of(data, tokenizer, None, 256, tell_apart=False)
    assert found.unlike == again.unlike == {"Thai": 3}
    assert seen == [(24, True)] * 2


def test_what_all_prompts_begin_with_is_read_once_and_changes_no_answer(tokenizer):
    torch.manual_seed(0)
    model = make_model(width=64).eval()
    shared = tuple(range(5, 25))
    prompts = [(*shared, *range(30 + i, 34 + i + i % 5)) for i in range(12)]
    widths = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    short, whole = NextToken(model, prompts), NextToken(model, prompts[:2])
    assert (short.shared, whole.shared) == (20, 0)
    widths.clear()
    got = short.shares(prompts)
    assert widths == [8]
    assert torch.allclose(got, whole.shares(prompts), atol=1e-6)
    handle.remove()


@pytest.mark.parametrize("guessed", [True, False])
def test_how_refusals_go_on_is_asked_with_how_they_begin(tokenizer, guessed, monkeypatch):
    """One pass where the guess is right; where it is wrong, what was said behind it is not taken."""
    torch.manual_seed(0)
    model = make_model(width=64).eval()
    prompts = [tuple(range(30 + i, 34 + i + i % 5)) for i in range(12)]
    asker = NextToken(model, prompts[:1])
    first = asker.ask(prompts, [[3, 9]] * 12)
    token = first[5][1] if guessed else min(set(range(3, 2000)) - {token for _, token in first})
    right = [i for i, (_, likeliest) in enumerate(first) if likeliest == token]
    assert bool(right) == guessed
    begun, follow = [(*prompts[i], token) for i in right], [[4, 8, 11]] * len(right)
    wanted = asker.ask(begun, follow) if right else []
    known = Known(model)
    found = ask(model, prompts, [[3, 9]] * 12, known, False, "", Guess(token, [4, 8, 11]))
    assert [token for _, token in found] == [token for _, token in first]
    assert [share for share, _ in found] == pytest.approx([share for share, _ in first], rel=1e-4)
    assert len(known.answers) == 12 + len(right)
    monkeypatch.setattr(NextToken, "shares_at", None)  # no pass is made
    again = ask(model, begun, follow, known, False, "")
    assert [share for share, _ in again] == pytest.approx([share for share, _ in wanted], rel=1e-4)


def test_a_prompt_that_fills_the_context_is_not_read_past_it(tokenizer):
    """A model with learned positions has no further one for the token that a refusal may begin with."""
    model = make_model("gpt2").eval()
    context = model.config.n_positions
    anchors = [Anchor([5, 6], [7, 8], "")]
    by_length = {len(chat_ids(tokenizer, [user("how " * i)], True)): "how " * i for i in range(context)}
    for length, unread in ((context - 1, 0), (context, 1)):
        row = {"messages": [user(by_length[length]), answered("x")]}
        examples = read_examples([row], tokenizer, max_length=context)
        assert examples.unread == unread
        found = audit(model, tokenizer, examples, anchors, progress=False)
        assert (found.prompts, found.unread) == (1 - unread, unread)
    assert f"row 0: a prompt fills the {context} tokens" in found.why


@pytest.mark.parametrize("wrong", [lambda cache, count: None, lambda cache, count: [].pop()])
def test_a_cache_that_cannot_be_repeated_or_answers_otherwise_is_not_used(wrong, monkeypatch):
    model = make_model(width=64).eval()
    prompts = [(*range(5, 25), *range(30 + i, 34 + i + i % 5)) for i in range(12)]
    whole = NextToken(model, prompts[:2]).shares(prompts)

    def repeat(cache, count):
        wrong(cache, count)
        for layer in cache.layers:  # as if the keys were another prompt's
            layer.keys, layer.values = 3 * layer.keys.expand(count, -1, -1, -1), -layer.values.expand(count, -1, -1, -1)

    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", repeat)
    monkeypatch.setattr("spf.shared_prefix.CLOSE", 1e-6)
    short = NextToken(model, prompts)
    assert short.shared == 0
    assert torch.equal(short.shares(prompts), whole)


@pytest.fixture(scope="module")
def audited(saved, tmp_path_factory):
    """What `spf audit` leaves."""
    place = tmp_path_factory.mktemp("audited")
    data, safety = place / "data.jsonl", place / "safety.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(PAIRS)))
    safety.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in HARMFUL[:9]))
    command = ["audit", str(data), "--model", str(saved), "--safety_data", str(safety), "--output", str(place / "out")]
    assert main(command) == 0
    return place / "out"


def taking(tmp_path, tokenizer, refusing, rows, audited, pairs=PAIRS, conflicts="hold"):
    given = SafetyCallback(safety_data(rows[:9]), NullSpace(rank=24), conflicts=conflicts, audited=audited)
    return run(tmp_path, tokenizer, refusing, rows, pairs, given=given, save_strategy="steps", save_steps=1)


def test_an_audit_by_another_probe_or_of_no_rows_is_not_taken(audited, tmp_path, tokenizer, refusing, rows):
    """What an earlier version let go was let go; data without a known column were "0 of 0 rows" without conflicts."""
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    kept = json.loads((audited / "spf_audit.json").read_text())
    del kept["finished"]["probe"]
    (earlier / "spf_audit.json").write_text(json.dumps(kept))
    trainer, _ = taking(tmp_path / "run", tokenizer, refusing, rows, earlier)
    with pytest.raises(SafetyDataError, match="or by another version of spf; `spf audit DATA --model MODEL --output"):
        trainer.train()
    trainer, callback = taking(tmp_path / "all", tokenizer, refusing, rows, earlier, conflicts="hold-all")
    trainer.train()
    assert len(callback.data.left_out) == 12
    data = Dataset.from_list([{"question": "x", "answer": "y"}] * 3)
    found = EarlierAudit(audited).of(data, tokenizer, None, 256, tell_apart=True)
    assert (found.rows, found.unread) == (3, 3)


def test_weights_of_an_adapter_count_as_soon_as_it_changes_something(refusing):
    """A trained adapter under a fresh one was taken for the model without: what that refuses was held."""
    base = fingerprint(refusing)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(copy.deepcopy(refusing), config)
    assert fingerprint(model) == base
    with torch.no_grad():
        for part in ("lora_B.default", "modules_to_save.default"):
            (parameter,) = (p for name, p in model.named_parameters() if part in name and "layers.1" not in name)
            before = parameter.clone()
            parameter.add_(0.1)
            assert fingerprint(model) != base
            parameter.copy_(before)
            assert fingerprint(model) == base


@pytest.mark.parametrize(
    ("kind", "begins_with_nothing"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), True),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), True),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), False),
    ],
)
def test_the_scale_of_an_adapter_counts_with_what_it_has_learned(refusing, kind, begins_with_nothing):
    """With another `lora_alpha` the same weights were taken for the model that had been asked."""
    model = get_peft_model(copy.deepcopy(refusing), kind)
    base = fingerprint(model)
    layer = next(one for one in model.modules() if isinstance(one, LoraLayer))
    layer.scaling["default"] = 2
    assert (fingerprint(model) == base) == begins_with_nothing
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data += 0.1
    prints = {fingerprint(model)}
    layer.scaling["default"] = 2.002
    assert len(prints | {base, fingerprint(model)}) == 3


@pytest.mark.parametrize("part", [".lora_B.", "lm_head"])
def test_of_two_adapters_the_active_one_counts(refusing, part):
    """A second run took what the first one's adapter refuses for the refusals of its own."""
    base = fingerprint(refusing)
    kind = LoraConfig(target_modules=["q_proj"], **({"modules_to_save": ["lm_head"]} if part == "lm_head" else {}))
    model = get_peft_model(copy.deepcopy(refusing), kind, adapter_name="a")
    model.add_adapter("b", kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and (".a." in name or ".b." in name):
                parameter.add_(0.1 if ".a." in name else 0.2)
    prints = {}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        prints[adapter] = fingerprint(model)
    assert len({base, *prints.values()}) == 3
    with model.disable_adapter():
        assert fingerprint(model) == base
    assert fingerprint(model) == prints["b"]


def test_an_audit_that_was_made_before_is_taken(audited, tmp_path, tokenizer, refusing, rows, caplog, monkeypatch):
    asking, callback = run(tmp_path / "asking", tokenizer, refusing, rows[:9], PAIRS)
    asking.train()
    assert "as the audit in" not in caplog.text
    # the same for data in another order
    order = [*range(23, -1, -1)]
    for number, pairs in enumerate((PAIRS, [PAIRS[i] for i in order], PAIRS[6:])):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(spf.training_data, "audit_data", None)  # asks
            trainer, taken = taking(tmp_path / str(number), tokenizer, refusing, rows, audited, pairs)
            seen, names = trained_on(trainer), names_of(trainer)
            trainer.train()
        assert {pairs[i] for i, name in enumerate(names) if name in seen} <= set(PAIRS[12:])
        assert {pairs[row] for row in taken.data.left_out_rows} == set(pairs) & set(PAIRS[:12])
        assert f"as the audit in {audited} found" in caplog.text
        assert f"list in spf_conflicts.jsonl of {audited}" in caplog.text
        assert "other weights" not in caplog.text
        if number == 0:
            both = [[replace(c, probability=0.0) for c in a.conflicts] for a in (taken.audit, callback.audit)]
            assert both[0] == both[1]
            assert (taken.data.held, taken.data.watched) == (callback.data.held, callback.data.watched)
            assert taken.audit.counts().split(";")[0] == callback.audit.counts().split(";")[0]


def test_an_audit_of_other_data_or_weights_or_none_is_not_taken(
    audited, tmp_path, tokenizer, refusing, rows, caplog, monkeypatch
):
    more = [*PAIRS, (HARMFUL[3], COMPLIES)]
    trainer, _ = taking(tmp_path / "more", tokenizer, refusing, rows, audited, more)
    with pytest.raises(
        SafetyDataError, match=r"1 of the 25 distinct prompts .* were not asked in the audit in .*other"
    ):
        trainer.train()
    other = copy.deepcopy(refusing)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.02)
    trainer, _ = taking(tmp_path / "other", tokenizer, other, rows, audited)
    trainer.train()
    assert f"the audit in {audited} was made with other weights than these" in caplog.text
    with pytest.raises(SafetyDataError, match=r"audited: .*nowhere holds no audit; `spf audit DATA"):
        SafetyCallback(audited=tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    kept = json.loads((audited / "spf_audit.json").read_text())
    for text, said in (
        (json.dumps({name: value for name, value in kept.items() if name != "finished"}), "was not finished"),
        ("{", "spf_audit.json"),
        (json.dumps(kept | {"finished": {"weights": "x", "asked": []}}), "refusals"),
    ):
        (broken / "spf_audit.json").write_text(text)
        with pytest.raises(SafetyDataError, match=f"^audited: .*{said}"):
            SafetyCallback(audited=str(broken))
    # one of other data in the same directory keeps what was asked, but is no audit of the first
    both = tmp_path / "both"
    both.mkdir()
    (both / "spf_audit.json").write_text(json.dumps(kept))
    audit_data(Dataset.from_list(rows_of(PAIRS[12:])), refusing, tokenizer, rows[:9], max_length=256, directory=both)
    trainer, _ = taking(tmp_path / "first", tokenizer, refusing, rows, both)
    with pytest.raises(SafetyDataError, match="12 of the 24 distinct prompts"):
        trainer.train()
    # an audit that is made anew and broken off is none
    again = tmp_path / "again"
    again.mkdir()
    (again / "spf_audit.json").write_text(json.dumps(kept))
    monkeypatch.setattr(spf.audit, "looks", None)
    data = Dataset.from_list(rows_of(PAIRS))
    with pytest.raises(TypeError):
        audit_data(data, refusing, tokenizer, rows[:9], max_length=256, directory=again, progress=False)
    with pytest.raises(SafetyDataError, match="was not finished"):
        SafetyCallback(audited=again)


def test_an_earlier_audit_tells_over_refusals_apart_or_is_refused(tmp_path, tokenizer, refusing, rows, monkeypatch):
    said = tokenise(samples([(prompt, COMPLIES) for prompt in HARMFUL[12:14]]), tokenizer, 256)
    kinds = dict(zip((tuple(one.prompt_ids) for one in said), ("harmless", "unclear"), strict=True))
    monkeypatch.setattr(
        spf.audit,
        "looks",
        lambda model, tokenizer, prompts, *rest, **more: [kinds.get(tuple(prompt), "harmful") for prompt in prompts],
    )
    left, unclear = {}, {}
    for first in ("hold", "hold-all"):
        asking, _ = run(tmp_path / first, tokenizer, refusing, rows[:9], PAIRS, first)
        asking.train()
        for conflicts in ("hold", "hold-all"):
            trainer, callback = taking(
                tmp_path / first / conflicts, tokenizer, refusing, rows, tmp_path / first / "run", conflicts=conflicts
            )
            if (first, conflicts) == ("hold-all", "hold"):
                with pytest.raises(SafetyDataError, match="does not tell over-refusals apart"):
                    trainer.train()
            else:
                trainer.train()
                left[first, conflicts] = callback.data.left_out_rows
                unclear[first, conflicts] = callback.data.found.unclear(callback.data.left_out)
    assert unclear == {("hold", "hold"): [(1, 0)], ("hold", "hold-all"): [], ("hold-all", "hold-all"): []}
    assert left == {
        ("hold", "hold"): [*range(1, 12)],
        ("hold", "hold-all"): [*range(12)],
        ("hold-all", "hold-all"): [*range(12)],
    }


def test_a_run_that_took_an_earlier_audit_goes_on(audited, tmp_path, tokenizer, refusing, rows, caplog):
    trainer, callback = taking(tmp_path, tokenizer, refusing, rows, audited)
    trainer.train()
    caplog.clear()
    again, after = taking(tmp_path, tokenizer, refusing, rows, audited)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert after.data.left_out_rows == callback.data.left_out_rows == [*range(12)]
    assert (after.data.held, after.data.watched) == (callback.data.held, callback.data.watched)
    assert "12 rows are left out of training, as in the run that goes on" in caplog.text

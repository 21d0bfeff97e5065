"""Keep anything: answers to any prompts are held as refusals are."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from spf import SPF, NullSpace, SafetyCallback, SafetyDataError, SafetyProbe
from spf.data import SafetyRow, tokenise
from spf.text.generation import generate_answers
from tests.conftest import make_model, make_tokenizer
from tests.test_callback import make_trainer, safety_data, token_data

ASKED = ["What is the capital of France?", "How do I boil an egg?", "Write a haiku about the sea."]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ASKED))
    return path


def trained(directory, tokenizer, rows, rank=24, **options):
    callback = SafetyCallback(safety_data(rows[:2]), NullSpace(rank=rank, reworded=0), **options)
    trainer = make_trainer(directory, tokenizer, callback, learning_rate=2e-3)
    trainer.train()
    return trainer, callback


@torch.no_grad()
def logits(model, samples):
    return [model(input_ids=torch.tensor([s.prompt_ids + s.refusal_ids])).logits.float() for s in samples]


def test_the_models_own_answers_are_held(tmp_path, tokenizer, rows, prompts):
    before = make_model()
    answers = generate_answers(before, tokenizer, ASKED, max_new_tokens=64, progress=False)
    assert all(answers)
    said = [SafetyRow([{"role": "user", "content": p}], a, p, cut=True) for p, a in zip(ASKED, answers, strict=True)]
    samples = tokenise(said, tokenizer, 256)
    aligned = logits(before, samples)
    change = {}
    for name, options in {"with": {"keep": prompts}, "without": {}}.items():
        trainer, callback = trained(tmp_path / name, tokenizer, rows, **options)
        now = logits(trainer.model, samples)
        change[name] = sum(float((a - b).square().mean()) for a, b in zip(aligned, now, strict=True))
        line = "keep: 3 of 3 prompts held with their answers, 3 the model's own"
        assert (line in callback.card.begun) == (name == "with")
    assert change["with"] < 0.5 * change["without"]


def test_answers_that_the_data_have_are_held_and_the_model_is_not_asked(tmp_path, tokenizer, rows, monkeypatch):
    def answer(model, tokenizer, prompts, **kwargs):
        assert not {messages[-1]["content"] for messages in prompts} & set(ASKED)
        return generate_answers(model, tokenizer, prompts, **kwargs)

    monkeypatch.setattr("spf.data.refusals.generate_answers", answer)  # the audit asks how the model refuses
    seen = []
    input_bases = SafetyProbe.input_bases

    def count(self, samples, *args, **kwargs):
        seen.append(len(samples))
        return input_bases(self, samples, *args, **kwargs)

    monkeypatch.setattr(SafetyProbe, "input_bases", count)
    data = Dataset.from_list(
        [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "A poem."}]} for p in ASKED]
    )
    trained(tmp_path, tokenizer, rows, keep=data)
    assert seen == [2 + 3]


def test_a_run_that_goes_on_asks_nothing_again_and_wants_the_same(tmp_path, tokenizer, rows, prompts, monkeypatch):
    run = {"save_strategy": "steps", "save_steps": 2}

    def make(**options):
        callback = SafetyCallback(safety_data(rows), NullSpace(rank=8), **options)
        return make_trainer(tmp_path / "run", tokenizer, callback, **run)

    whole = make(keep=prompts)
    whole.train()
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda *_, **__: pytest.fail("nothing is to be asked"))
    again = make(keep=prompts)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (callback,) = (c for c in again.callback_handler.callbacks if isinstance(c, SafetyCallback))
    assert "keep: 3 of 3 prompts held with their answers, 3 the model's own" in callback.card.begun
    state = (tmp_path / "run" / "checkpoint-2" / "spf_state.json").read_text()
    assert not any(prompt in state for prompt in ASKED)
    prompts.write_text(json.dumps({"prompt": ASKED[0]}))
    for options in ({}, {"keep": prompts}):
        with pytest.raises(ValueError, match="made with other prompts in `keep`"):
            make(**options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


OFTEN = "name"
"""A word of the tokenizer that no safety sample has."""


def rows_that_learn(kind, word):
    """A tokenizer; a model that trains rows of tokens, by LoRA on its embedding or as trainable tokens, all that the
    word's could be; data of nothing else."""
    tokenizer, settings = make_tokenizer(), {"target_modules": ["embed_tokens", "q_proj", "v_proj"]}
    if kind == "new tokens":
        tokenizer.add_tokens([word, "<other>"])
        new = tokenizer.convert_tokens_to_ids([word, "<other>"])
        settings = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": new}
    token = tokenizer.convert_tokens_to_ids(word)
    other = tokenizer.convert_tokens_to_ids("<other>" if kind == "new tokens" else "table")
    data = token_data().map(lambda row: {"input_ids": [token, other, *row["input_ids"][2:]]})
    return tokenizer, get_peft_model(make_model(), LoraConfig(r=4, **settings)), data, (token, other)


def row_of(model, kind, tokens):
    """What is trained of these tokens' embeddings."""
    names = {"LoRA": "lora_embedding_A", "new tokens": "trainable_tokens_delta"}
    (found,) = (p.detach() for name, p in model.named_parameters() if names[kind] in name)
    return found.T[list(tokens)].clone() if kind == "LoRA" else found.clone()


@pytest.mark.parametrize("going_on", ["resume", "another run"])
@pytest.mark.parametrize("kind", ["LoRA", "new tokens"])
def test_tokens_of_kept_answers_are_held_by_the_next_run_too(tmp_path, rows, kind, going_on):
    """They stand in no safety sample, and the next run does not have the answers."""
    word = OFTEN if kind == "LoRA" else "<new>"
    tokenizer, model, data, tokens = rows_that_learn(kind, word)
    kept = Dataset.from_list([{"prompt": "What is the table ?", "completion": f"It is {word} ."}])

    def trainer(model, **options):
        callback = SafetyCallback(safety_data(rows[:2]), NullSpace(rank=8, reworded=0), **options)
        made = make_trainer(tmp_path, tokenizer, callback, model, save_strategy="steps", save_steps=2)
        made.train_dataset = data
        return made

    start = row_of(model, kind, tokens)
    first = trainer(model, keep=kept)
    first.train()
    if going_on == "resume":
        model = rows_that_learn(kind, word)[1]
        trainer(model, keep=kept).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for (name, a), b in zip(first.model.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name
    else:
        trainer(model).train()
    now = row_of(model, kind, tokens)
    assert torch.equal(now[0], start[0])
    assert (kind == "LoRA") or not torch.equal(now[1], start[1])


def test_mistakes_show_when_the_callback_is_made(tmp_path):
    for name in ("safety_data", "keep"):
        with pytest.raises(SafetyDataError, match=r"gone\.jsonl: no such safety data file"):
            SafetyCallback(**{name: tmp_path / "gone.jsonl"})
        (tmp_path / "bad.jsonl").write_text("{")
        with pytest.raises(SafetyDataError, match=r"bad\.jsonl:1: not a JSON object"):
            SafetyCallback(**{name: str(tmp_path / "bad.jsonl")})
    (tmp_path / "good.jsonl").write_text('{"prompt": "How?"}')
    with pytest.raises(ValueError, match="keep: the rule spf does not hold answers; null-space does"):
        SafetyCallback(rule=SPF(), keep=tmp_path / "good.jsonl")

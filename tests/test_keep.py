"""Keep anything: answers to any prompts are held as refusals are."""

import json

import pytest
import torch
from datasets import Dataset

from spf import SPF, NullSpace, SafetyCallback, SafetyDataError, SafetyProbe
from spf.data import SafetyRow, tokenise
from spf.text.generation import generate_answers
from tests.conftest import make_model
from tests.test_callback import make_trainer, safety_data

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
    def answer(*args, description, **kwargs):
        assert "keep" not in description
        return generate_answers(*args, description=description, **kwargs)

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
    state = (tmp_path / "run" / "checkpoint-2" / "spf_state.json").read_text()
    assert not any(prompt in state for prompt in ASKED)
    prompts.write_text(json.dumps({"prompt": ASKED[0]}))
    for options in ({}, {"keep": prompts}):
        with pytest.raises(ValueError, match="made with other prompts in `keep`"):
            make(**options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


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

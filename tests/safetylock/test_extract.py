"""Extraction: the right tensor, planted heads, determinism, splits without leaks, clear refusals."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from spf.data import HARMLESS_STUB
from spf.errors import UnsupportedModelError
from spf.safetylock import Pair, SafetyLock, extract, extraction, transfer_cosines
from spf.safetylock.extraction import recorded
from spf.safetylock.heads import attention_outputs
from spf.safetylock.pairs import distinct, encode
from spf.safetylock.probes import validation_pairs
from tests.conftest import REFUSAL, make_model
from tests.safetylock.toys import KINDS, Planted, some_pairs, toy


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_samples_are_the_inputs_of_o_proj(kind, tokenizer):
    """T1, against unbatched, unpadded forward passes: grouped-query attention and head_dim != hidden / heads."""
    model, pairs = toy(kind), some_pairs(5)
    expected = {}
    taps = [[], []]
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, x, taps=taps, i=i: taps[i].append(x[0][0]))
        for i, block in enumerate(model.model.layers)
    ]
    for number, pair in enumerate(pairs):
        for safe, answer in ((True, pair.safe), (False, pair.unsafe)):
            ids, _ = encode(pair.messages, answer, "", tokenizer)
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
            expected[number, safe] = [tap.pop()[-5:] for tap in taps]
    for handle in handles:
        handle.remove()
    _, geometry = attention_outputs(model)
    assert geometry.head_dim == (16 if kind in ("mistral", "qwen3") else 8)
    with recorded(model, tokenizer, pairs, window=5, batch_size=3) as recording:
        assert len(recording.safe) == 50
        for layer in range(2):
            X = recording.layer(layer)
            for (number, safe), wanted in expected.items():
                rows = (recording.pair == number) & (recording.safe == safe)
                got = X[:, rows].transpose(0, 1).flatten(1)
                assert torch.allclose(got, wanted[layer], atol=1e-5)


def test_short_answers_give_fewer_samples_and_batch_size_one_works(tokenizer):
    """Defect 5: the original takes a constant number of tokens and loses the batch axis of a single chat."""
    pairs = [Pair([{"role": "user", "content": "How?"}], "I'm sorry", "Sure", "a"), *some_pairs(3)]
    with recorded(toy(), tokenizer, pairs, window=5, batch_size=1) as one:
        first, kept = one.layer(0), one.pair
    counts = [(kept == i).sum().item() for i in range(4)]
    short = len(tokenizer("I'm sorry")["input_ids"]) + len(tokenizer("Sure")["input_ids"])
    assert counts == [short, 10, 10, 10]
    with recorded(toy(), tokenizer, pairs, window=5, batch_size=7) as seven:
        assert torch.allclose(first, seven.layer(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_planted_heads_are_all_found(kind, tokenizer):
    """T5: heads, directions and standard deviations against those planted, and against plain NumPy."""
    model = toy(kind)
    model.config.head_dim = attention_outputs(model)[1].head_dim
    planted = Planted(model, tokenizer, [(0, 1), (0, 3), (1, 0), (1, 2)], size=4.0)
    pairs = some_pairs(40)
    lock = extract(model, tokenizer, pairs, k=4)
    assert {tuple(head) for head in lock.heads.tolist()} == set(planted.heads)
    with recorded(model, tokenizer, distinct(pairs), 5, 16) as recording:
        for (layer, head), direction, sigma in zip(lock.heads.tolist(), lock.directions, lock.sigmas, strict=True):
            X, safe = recording.layer(layer)[head].numpy().astype(np.float64), recording.safe.numpy()
            shift = X[safe].mean(0) - X[~safe].mean(0)
            shift /= np.linalg.norm(shift)
            assert np.allclose(direction, shift, atol=1e-5)
            assert sigma.item() == pytest.approx((X @ shift).std(), rel=1e-5)
            # planted: noise of standard deviation head + 1 about two means 4 away from the middle
            assert direction @ planted.direction[layer, head] > 0.9
            assert sigma.item() == pytest.approx((16 + (head + 1) ** 2) ** 0.5, rel=0.2)
    assert lock.val_accuracy[0, 1] > 0.9
    assert lock.val_accuracy[0, 0] < 0.75
    assert torch.allclose(lock.directions.norm(dim=1), torch.ones(4), atol=1e-6)


def test_the_same_file_whatever_the_order_of_records(tokenizer, tmp_path):
    """T6: bit by bit; another seed splits otherwise."""
    pairs = some_pairs(14)
    shuffled = [replace(pair, where="elsewhere") for pair in pairs]
    random.Random(3).shuffle(shuffled)
    first = extract(toy(), tokenizer, pairs, k=5).save(tmp_path / "a")
    second = extract(toy(), tokenizer, shuffled, k=5).save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    third = extract(toy(), tokenizer, pairs, k=5, seed=1).save(tmp_path / "c")
    assert first.read_bytes() != third.read_bytes()


def test_no_pair_is_on_both_sides_of_the_split(tokenizer, monkeypatch):
    """T11, defect 6: what the probes are trained on shares no pair with what they are judged on."""
    trained, judged = [], []
    fit, judge = extraction.fit_logistic, extraction.judge_probes
    monkeypatch.setattr(extraction, "fit_logistic", lambda X, y: trained.append(X) or fit(X, y))
    monkeypatch.setattr(extraction, "judge_probes", lambda X, y, w: judged.append(X) or judge(X, y, w))
    pairs = some_pairs(10)
    doubled = [*pairs, *(replace(pair, safe="I'm sorry, no, never, ever.") for pair in pairs)]
    model = toy()
    lock = extract(model, tokenizer, doubled, k=2)
    assert (lock.info.pairs, lock.info.duplicates) == (10, 10)
    kept = distinct(doubled)
    validation = validation_pairs([pair.key for pair in kept], 0.4, 0)
    assert int(validation.sum()) == 4
    with recorded(model, tokenizer, kept, 5, 16) as recording:
        for layer in range(2):
            X, held_out = recording.layer(layer), validation[recording.pair]
            assert torch.equal(trained[layer], X[:, ~held_out])
            assert torch.equal(judged[2 * layer + 1], X[:, held_out])
    questions = [pair.question for pair in kept]
    assert len(set(questions)) == len(questions)


def test_score_of_the_released_code_is_the_mean_of_both_accuracies(tokenizer):
    lock = extract(toy(), tokenizer, some_pairs(12), k=8, score="val+train")
    mean = (lock.val_accuracy + lock.train_accuracy) / 2
    scores = [mean[layer, head].item() for layer, head in lock.heads.tolist()]
    assert scores == sorted(scores, reverse=True)


def test_statistics_are_accurate_in_bfloat16_models(tokenizer):
    """Defect 6: float16 sums; here a bfloat16 model's samples are summed in float64."""
    model = toy(dtype=torch.bfloat16)
    lock = extract(model, tokenizer, some_pairs(10), k=8)
    with recorded(model, tokenizer, distinct(some_pairs(10)), 5, 16) as recording:
        for (layer, head), direction in zip(lock.heads.tolist(), lock.directions, strict=True):
            X = recording.layer(layer)[head].double()
            shift = X[recording.safe].mean(0) - X[~recording.safe].mean(0)
            assert torch.allclose(direction.double(), shift / shift.norm(), atol=1e-6)


def test_nothing_in_the_model_changes(tokenizer):
    model = toy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract(model, tokenizer, some_pairs(6), k=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_directions_transfer_to_the_same_model_exactly(tokenizer):
    model, pairs = toy(), some_pairs(8)
    lock = extract(model, tokenizer, pairs, k=4)
    assert torch.allclose(transfer_cosines(lock, model, tokenizer, pairs), torch.ones(4), atol=1e-6)
    other = transfer_cosines(lock, toy(seed=1), tokenizer, pairs)
    assert other.abs().max() < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "9 heads asked for; the model has 8"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"val_fraction": 0.01}, "cannot be split"),
    ],
)
def test_bad_settings_end_in_one_sentence(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        extract(toy(), tokenizer, some_pairs(6), **{"k": 2, **options})


def test_nan_same_answers_and_locked_models_are_refused(tokenizer):
    model = toy()
    lock: SafetyLock = extract(model, tokenizer, some_pairs(6), k=2)
    lock.apply(model)
    with pytest.raises(ValueError, match="the model is locked; extract from the original"):
        extract(model, tokenizer, some_pairs(6), k=2)
    broken = toy()
    broken.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: the activations hold NaN"):
        extract(broken, tokenizer, some_pairs(6), k=2)
    dead = toy()
    dead.model.layers[0].self_attn.v_proj.weight.data.zero_()
    with pytest.raises(ValueError, match="layer 0, head 0: safe and unsafe answers do not differ"):
        extract(dead, tokenizer, some_pairs(6), k=8)


def test_unsupported_layouts_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel: SafetyLock needs one .*o_proj"):
        attention_outputs(make_model("gpt2"))
    odd = toy()
    odd.model.layers[1].self_attn.o_proj = torch.nn.Linear(64, 32)
    with pytest.raises(UnsupportedModelError, match="differ in shape"):
        attention_outputs(odd)
    assert REFUSAL != HARMLESS_STUB

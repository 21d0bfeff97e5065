"""Gradient geometry against dense references, and the insights benchmark on a tiny model."""

import json
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import benchmarks.gradient_insights as insights
from spf.data import Anchor, collate
from spf.lab.analysis.gradients import (
    captured_energy,
    chance_overlap,
    cumulative_energy_ratio,
    effective_rank,
    group_cosine,
    overlap,
    sample_gram,
)
from spf.probe import SafetyProbe
from tests.conftest import make_model, make_tokenizer

lengths_of_samples = st.lists(st.integers(1, 6), min_size=2, max_size=6)


@settings(max_examples=40, deadline=None)
@given(lengths_of_samples, st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_gram_and_cosines_match_dense_gradients(lengths, m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(sum(lengths), n, generator=generator)
    D = torch.randn(sum(lengths), m, generator=generator)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    dense = [
        (D[a : a + length].double().T @ X[a : a + length].double()) for a, length in zip(starts, lengths, strict=True)
    ]
    gram = sample_gram(X, D, lengths)
    expected = torch.tensor([[float((a * b).sum()) for b in dense] for a in dense], dtype=torch.float64)
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-4)
    first, second = [0, 1], list(range(1, len(lengths)))
    a, b = sum(dense[i] for i in first), sum(dense[i] for i in second)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert group_cosine(expected, first, second) == pytest.approx(float(cosine), abs=1e-6)


def test_cosine_of_vanishing_gradient_is_zero_and_bad_lengths_are_refused():
    assert group_cosine(torch.zeros(2, 2, dtype=torch.float64), [0], [1]) == 0.0
    with pytest.raises(ValueError, match="lengths sum to 3, X has 4 rows"):
        sample_gram(torch.ones(4, 2), torch.ones(4, 2), [1, 2])


def test_energy_ratio_effective_rank_and_overlap():
    s = torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values
    assert cumulative_energy_ratio(s, 1) == pytest.approx(16 / 25)
    assert cumulative_energy_ratio(s, 2) == pytest.approx(1)
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    eye = torch.eye(6)
    assert overlap(eye[:, :2], eye[:, :4]) == pytest.approx(1)
    assert overlap(eye[:, :2], eye[:, 1:3]) == pytest.approx(0.5)
    assert overlap(eye[:, :2], eye[:, 3:]) == pytest.approx(0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 10_000))
def test_captured_energy_is_that_of_the_projection_and_at_most_cer(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    curve = captured_energy(G, U)
    s = torch.linalg.svdvals(G)
    for k in range(1, m + 1):
        projected = U[:, :k] @ U[:, :k].T @ G
        assert float(curve[k - 1]) == pytest.approx(float(projected.norm() ** 2 / G.norm() ** 2), abs=1e-4)
        assert float(curve[k - 1]) <= cumulative_energy_ratio(s, k) + 1e-5
    best = captured_energy(G, torch.linalg.svd(G).U)
    assert best.tolist() == pytest.approx([cumulative_energy_ratio(s, k) for k in range(1, m + 1)], abs=1e-5)


def test_captured_energy_of_a_zero_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient is zero"):
        captured_energy(torch.zeros(3, 2), torch.eye(3))


def test_chance_overlap_is_the_mean_over_random_subspaces():
    torch.manual_seed(0)
    for k, k2, dimension in ((1, 1, 6), (2, 5, 12), (4, 4, 10)):
        drawn = [
            overlap(torch.linalg.qr(torch.randn(dimension, k)).Q, torch.linalg.qr(torch.randn(dimension, k2)).Q)
            for _ in range(800)
        ]
        assert statistics.mean(drawn) == pytest.approx(chance_overlap(k, k2, dimension), rel=0.12)
    with pytest.raises(ValueError, match="do not fit in dimension 4"):
        chance_overlap(5, 1, 4)


def make_anchors(count: int, seed: int, answer: int = insights.ANSWER_TOKENS) -> list[Anchor]:
    rng = random.Random(seed)
    return [
        Anchor([rng.randrange(5, 2000) for _ in range(rng.randrange(4, 9))],
               [rng.randrange(5, 2000) for _ in range(answer)], f"{seed}:{i}")
        for i in range(count)
    ]  # fmt: skip


def autograd_loss(model, anchors):
    batch = collate(anchors, 1)
    labels = batch.input_ids.masked_fill(batch.weights == 0, -100)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def test_mean_gradients_are_the_mean_of_the_samples_autograd_gradients():
    model = make_model()
    anchors = make_anchors(7, 0)
    seen = []
    gradients = insights.mean_gradients(
        SafetyProbe(model, anchors, pad_token_id=1), anchors, [1, 5], lambda n, sums: seen.append(n)
    )
    assert seen == [1, 5, 7]
    sum(autograd_loss(model, [a]) for a in anchors).backward()
    for name, G in gradients.items():
        expected = model.get_parameter(name).grad / len(anchors)
        torch.testing.assert_close(G, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-8)


def test_cosines_under_lora_are_those_of_full_fine_tuning_and_of_the_adapter():
    torch.manual_seed(0)
    base = make_model()
    peft = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    groups = {name: make_anchors(3, i, 5) for i, name in enumerate(("utility", "safety", "benign"))}
    probe = insights.full_weight_probe(peft, groups["safety"], 1)
    assert not any(p.requires_grad for n, p in peft.named_parameters() if n.endswith("base_layer.weight"))
    found = insights.measure_cosines(probe, groups)

    def flat(anchors, ending):
        parameters = [p for n, p in peft.named_parameters() if ending in n]
        for p in parameters:
            p.requires_grad_(True)
        gradients = torch.autograd.grad(autograd_loss(peft, anchors), parameters)
        return torch.cat([g.flatten() for g in gradients])

    def cosine(a, b, ending):
        return float(torch.nn.functional.cosine_similarity(flat(a, ending), flat(b, ending), dim=0))

    safety, utility = groups["safety"], groups["utility"]
    assert found["safety-utility"]["adapter"] == pytest.approx(cosine(safety, utility, ".lora_"), abs=1e-3)
    assert found["safety-utility"]["full"] == pytest.approx(cosine(safety, utility, "base_layer.weight"), abs=1e-3)
    gates = cosine(safety, utility, "gate_proj.base_layer.weight")
    assert found["safety-utility"]["by_kind"]["gate_proj"] == pytest.approx(gates, abs=1e-3)
    assert len(found["safety-utility"]["by_layer"]) == 2
    singles = [cosine([a], [b], "base_layer.weight") for a in safety for b in utility]
    assert found["safety-utility"]["singles"] == pytest.approx(singles, abs=1e-3)


def test_choice_of_samples_is_equal_in_answers_and_reproducible():
    pools = {name: make_anchors(10, i, answer=20) for i, name in enumerate(("safety", "sql", "benign"))}
    pools["sql"][:3] = make_anchors(3, 9, answer=4)
    chosen = insights.choose(pools, 6, seed=1)
    assert all(len(a.refusal_ids) == insights.ANSWER_TOKENS for anchors in chosen.values() for a in anchors)
    assert [a.refusal_ids for a in chosen["refused"]] == [a.refusal_ids for a in chosen["safety"]]
    assert [a.prompt_ids for a in chosen["refused"]] == [a.prompt_ids for a in chosen["benign"]]
    assert chosen == insights.choose(pools, 6, seed=1) != insights.choose(pools, 6, seed=2)
    with pytest.raises(ValueError, match="sql: 8 samples of 12 answer tokens needed, 7 at hand"):
        insights.choose(pools, 8, seed=1)


def test_single_pairs_are_split_by_the_utility_samples_answer():
    values = [float(i) for i in range(6)]  # two safety samples, three utility samples
    draw = {"safety-utility": {"singles": values}, "safety-benign": {"singles": values}, "stubs": [False, True, False]}
    entries = [{"draws": [draw]}]
    assert insights.singles(entries, "safety-utility", stub=True) == [1.0, 4.0]
    assert insights.singles(entries, "safety-utility", stub=False) == [0.0, 2.0, 3.0, 5.0]
    assert insights.singles(entries, "safety-benign", stub=False) == values


def test_names_of_matrices_with_and_without_lora():
    assert insights.place("model.layers.3.self_attn.q_proj.weight") == (3, "q_proj")
    assert insights.place("base_model.model.model.layers.12.mlp.up_proj.base_layer.weight") == (12, "up_proj")
    assert insights.place("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight") == (0, "up_proj")


def test_benchmark_writes_parts_summary_and_figures_and_resumes(tmp_path, monkeypatch, capsys):
    model = make_model("qwen", width=96)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(insights, "load_aligned_demo_model", lambda: (model, make_tokenizer()))
    monkeypatch.setattr(
        insights, "load_model", lambda name, dtype: (make_model("qwen", seed=1, width=96), make_tokenizer())
    )
    monkeypatch.setattr(
        insights,
        "make_pools",
        lambda model, tokenizer, sql: {n: make_anchors(9, i) for i, n in enumerate(("safety", "sql", "benign"))},
    )
    command = ["--seeds", "0", "1", "--samples", "5", "--singles", "2", "--steps", "2", "--every", "2"]
    insights.main([*command, "--output", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary["subspaces"]["growth"]["safety"]["5"]["samples"]["mean"] == 5
    assert summary["subspaces"]["overlap"]["safety"]["left"]["20"]["n"] == 4
    assert [entry["step"] for entry in summary["training"]["steps"]["harmless"]] == [0, 2]
    assert summary["training"]["start"]["safety-utility"]["singles"]["n"] == 2 * 4 * 4
    assert all((tmp_path / f"insight-{name}.png").is_file() for name in ("1-rank", "2-cosine", "3-overlap"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    monkeypatch.setattr(insights, "measure_training", None)
    insights.main([*command, "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("done before, kept") == 7

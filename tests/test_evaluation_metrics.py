"""Paired differences, means, utility scores and perplexity against direct references."""

from functools import cache
from math import comb, exp

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spf.evaluation import (
    exact_match,
    lm_eval_tasks,
    mean_interval,
    neutral_texts,
    paired_difference,
    perplexity,
    rouge_l,
    token_f1,
)
from tests.conftest import make_model

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def table(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return paired_difference(a, b)


@given(pairs)
@settings(deadline=None)  # the first call imports scipy
def test_paired_difference_properties(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    found, swapped = paired_difference(a, b), paired_difference(b, a)
    low, high = found.interval
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert -1 <= low <= found.difference <= high <= 1
    assert swapped.difference == -found.difference
    assert swapped.interval == pytest.approx((-high, -low))
    assert swapped.p_value == pytest.approx(found.p_value)
    # The answers "true" and "false" may change places.
    flipped = paired_difference([not x for x in a], [not x for x in b])
    assert flipped.interval == pytest.approx((-high, -low))
    discordant = found.only_a + found.only_b
    tail = sum(comb(discordant, k) for k in range(min(found.only_a, found.only_b) + 1)) / 2**discordant
    assert found.p_value == pytest.approx(min(1, 2 * tail))


@pytest.mark.parametrize(
    ("cells", "interval"),  # Newcombe (1998), table III, method 10
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((18, 12, 2, 18), (0.0562, 0.3290)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((18, 14, 0, 18), (0.1441, 0.3963)),
        ((1, 97, 1, 1), (0.8736, 0.9850)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
        ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ],
)
def test_paired_difference_published_values(cells, interval):
    assert table(*cells).interval == pytest.approx(interval, abs=1e-4)  # the paper rounds z to 1.96


def test_paired_difference_needs_the_same_prompts():
    with pytest.raises(ValueError, match="same prompts on both sides, got 2 and 1"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])


@cache
def all_tables(count):
    cells = [
        (w, x, y, count - w - x - y)
        for w in range(count + 1)
        for x in range(count + 1 - w)
        for y in range(count + 1 - w - x)
    ]
    return cells, np.array([table(*c).interval for c in cells])


@pytest.mark.parametrize("cell", [(0.4, 0.1, 0.1, 0.4), (0.1, 0.3, 0.1, 0.5), (0.02, 0.1, 0.04, 0.84)])
def test_paired_interval_covers(cell):
    """Exact coverage at 24 prompts: the probability of all tables whose interval holds the true difference."""
    cells, intervals = all_tables(24)
    logs = np.concatenate([[0], np.cumsum(np.log(np.arange(1, 25)))])
    counts = np.array(cells)
    weights = np.exp(logs[24] - logs[counts].sum(1) + counts @ np.log(cell))
    assert weights.sum() == pytest.approx(1)
    truth = cell[1] - cell[2]
    covered = weights[(intervals[:, 0] <= truth) & (truth <= intervals[:, 1])].sum()
    assert 0.935 < covered < 0.99


def test_mean_interval_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = mean_interval((rng.standard_normal(6) * 3 + 5).tolist())
        hits += found.interval[0] <= 5 <= found.interval[1]
    assert 0.94 < hits / 2000 < 0.96
    assert mean_interval([0.5]).interval == (0.5, 0.5)
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])


def test_exact_match_ignores_white_space_only():
    assert exact_match(["a  b\n", "a b", "A b", ""], ["a b", "ab", "a b", " "]) == [True, False, False, True]
    with pytest.raises(ValueError, match="1 answers for 2 references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="1 answers for 2 references"):
        rouge_l(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="token_f1: 1 answers for 2 references"):
        token_f1(["a"], ["a", "b"])


def test_token_f1_counts_words_as_often_as_both_have_them():
    pairs = {
        ("b, A!", "a b"): 1.0,
        ("a a b", "a c"): 0.4,
        ("x", "y"): 0.0,
        ("", "y"): 0.0,
        ("", ""): 1.0,
        (".", "!"): 0.0,
    }
    answers, references = zip(*pairs, strict=True)
    assert token_f1(answers, references) == pytest.approx(list(pairs.values()))


words = st.lists(st.sampled_from(["red", "blue", "7", "cat", "runs"]), max_size=9)


@given(words, words)
@settings(deadline=None)
def test_rouge_l_is_the_longest_common_subsequence(answer, reference):
    lengths = np.zeros((len(answer) + 1, len(reference) + 1), int)
    for i, x in enumerate(answer):
        for j, y in enumerate(reference):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if x == y else max(lengths[i, j + 1], lengths[i + 1, j])
    common = lengths[-1, -1]
    expected = 2 * common / (len(answer) + len(reference)) if common else 0.0
    assert rouge_l([" ".join(answer).title() + "."], [" ".join(reference)])[0] == pytest.approx(expected)


def test_perplexity_equals_the_loss_of_single_texts(tokenizer):
    model = make_model().train()
    texts = ["Write a poem.", "How do I kill a Python process?", "Explain.", "poem"]
    found = perplexity(model, tokenizer, texts, batch_size=2)
    assert model.training
    model.eval()
    losses, counts = [], []
    for text in texts[:3]:  # the last one is a single token, with nothing to predict
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    assert found.tokens == sum(counts)
    assert found.nats_per_token == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert found.value == pytest.approx(exp(found.nats_per_token))
    assert found.interval[0] < found.nats_per_token < found.interval[1]
    assert found.as_dict()["ci"][0] == pytest.approx(exp(found.interval[0]))
    with pytest.raises(ValueError, match="none of the 1 texts has two tokens"):
        perplexity(model, tokenizer, ["poem"])


def test_perplexity_interval_is_that_of_equally_long_texts(tokenizer):
    """With texts of one length the ratio estimator is the mean, and its interval the normal one."""
    texts = ["Write a poem", "Tell me how", "Explain how to", "a poem how", "to me to"]
    model = make_model()
    single = [perplexity(model, tokenizer, [text]).nats_per_token for text in texts]
    found = perplexity(model, tokenizer, texts)
    margin = 1.96 * np.std(single, ddof=1) / np.sqrt(5)
    assert found.interval == pytest.approx((np.mean(single) - margin, np.mean(single) + margin), rel=1e-4)


def test_neutral_texts_are_packaged():
    texts = neutral_texts()
    assert len(texts) >= 20
    assert all(len(text.split()) > 30 for text in texts)


def test_lm_eval_on_a_local_task(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.jsonl").write_text('{"q": "Write a", "a": 0}\n{"q": "Write a", "a": 1}\n' * 4)
    task = tmp_path / "task.yaml"
    task.write_text(f"""task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["poem", "story"]
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    found = lm_eval_tasks(make_model(), tokenizer, [str(task)], limit=6)["tiny_choice"]["acc"]
    assert found["value"] == 0.5  # one choice is always preferred, and it is right every other time
    assert found["count"] == 6
    assert found["ci"] == pytest.approx((0.5 - 1.96 * (0.25 / 5) ** 0.5, 0.5 + 1.96 * (0.25 / 5) ** 0.5), abs=1e-3)
    with pytest.raises(ValueError, match="lm-eval has no task no_such_task"):
        lm_eval_tasks(make_model(), tokenizer, ["no_such_task"])


def test_a_missing_extra_is_named(monkeypatch, tokenizer):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval is not installed: pip install 'spf\[lm-eval\]'"):
        lm_eval_tasks(make_model(), tokenizer, ["arc_easy"])


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge_l])
def test_an_answer_without_its_reference_is_refused(metric):
    """What is left over would be dropped without a word, and the rest compared with the wrong ones."""
    with pytest.raises(ValueError, match=f"{metric.__name__}: 2 answers for 1 references"):
        metric(["a", "b"], ["a"])


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="mean_interval: no scores"):
        mean_interval([])

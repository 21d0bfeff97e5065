"""Split, logistic regression, directions and ranking against direct references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spf.logistic import fit_logistic
from spf.safetylock.probes import judge_probes, mass_mean, rank_heads, validation_pairs


@settings(deadline=None)
@given(count=st.integers(2, 60), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 5), data=st.data())
def test_split_has_its_size_and_ignores_order(count, fraction, seed, data):
    keys = [f"pair {i}" for i in range(count)]
    wanted = round(fraction * count)
    if not 0 < wanted < count:
        with pytest.raises(ValueError, match="cannot be split"):
            validation_pairs(keys, fraction, seed)
        return
    mask = validation_pairs(keys, fraction, seed)
    assert int(mask.sum()) == wanted
    order = data.draw(st.permutations(range(count)))
    assert torch.equal(validation_pairs([keys[i] for i in order], fraction, seed), mask[list(order)])


def test_split_depends_on_the_seed():
    keys = [str(i) for i in range(40)]
    assert not torch.equal(validation_pairs(keys, 0.4, 0), validation_pairs(keys, 0.4, 1))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    samples=st.integers(4, 30),
    width=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1000.0]),
    shift=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 99),
)
def test_logistic_regression_is_at_the_minimum(heads, samples, width, scale, shift, seed):
    """The objective is strictly convex, so a vanishing gradient (by autograd, head by head) proves the solution."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % 2 == 0
    X = torch.randn(heads, samples, width, generator=generator) * scale
    X[:, y] += shift * scale
    found = fit_logistic(X, y)
    for head in range(heads):
        w = found[head].clone().requires_grad_(True)
        z = X[head].double() @ w[:-1] + w[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="sum")
        (loss + 0.5 * w[:-1].square().sum()).backward()
        assert w.grad.abs().max() < 1e-5 * samples * max(scale, 1)


def test_samples_that_count_more_are_as_if_they_were_there_more_often():
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(2, 12, 3, generator=generator), torch.arange(12) % 3 == 0
    counts = torch.arange(12) % 4 + 1
    often = torch.repeat_interleave(torch.arange(12), counts)
    assert torch.allclose(fit_logistic(X, y, counts), fit_logistic(X[:, often], y[often]), atol=1e-7)
    assert not torch.allclose(fit_logistic(X, y, counts), fit_logistic(X, y), atol=1e-2)


def test_logistic_regression_against_a_hand_solution():
    # One number, two samples at +-1: the intercept is 0 and w = 2 / (1 + e^w).
    found = fit_logistic(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([True, False]))
    w = 0.0
    for _ in range(200):
        w = w - 0.3 * (w - 2 / (1 + torch.exp(torch.tensor(w)).item()))
    assert found[0].tolist() == pytest.approx([w, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="both classes"):
        fit_logistic(torch.zeros(1, 2, 1), torch.tensor([True, True]))


def test_accuracy_and_loss_of_known_probes():
    X = torch.tensor([[[1.0], [2.0], [-1.0], [3.0]]])
    y = torch.tensor([True, True, False, False])
    accuracy, loss = judge_probes(X, y, torch.tensor([[1.0, 0.0]]).double())
    assert accuracy.tolist() == [0.75]
    expected = torch.log1p(torch.exp(torch.tensor([-1.0, -2.0, -1.0, 3.0]))).mean()
    assert loss.item() == pytest.approx(expected.item())


@settings(deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100), samples=st.integers(4, 20))
def test_direction_and_sigma_against_loops(seed, scale, samples):
    X = torch.randn(3, samples, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    y = torch.arange(samples) < samples // 2
    direction, sigma = mass_mean(X, y)
    for head in range(3):
        safe = sum(X[head, i] for i in range(samples) if y[i]) / int(y.sum())
        unsafe = sum(X[head, i] for i in range(samples) if not y[i]) / int((~y).sum())
        expected = (safe - unsafe) / (safe - unsafe).norm()
        assert torch.allclose(direction[head], expected)
        projected = X[head] @ expected
        assert sigma[head].item() == pytest.approx(((projected - projected.mean()) ** 2).mean().sqrt().item())
    flipped, same = mass_mean(X, ~y)
    assert torch.allclose(flipped, -direction)
    assert torch.allclose(same, sigma)


def test_equal_means_have_no_direction():
    direction, sigma = mass_mean(torch.ones(1, 4, 3), torch.tensor([True, False, True, False]))
    assert not direction.any()
    assert sigma.item() == 0


def test_ranking_breaks_ties_by_loss_then_layer_then_head():
    scores = torch.tensor([[0.5, 1.0, 1.0], [1.0, 0.7, 1.0]])
    losses = torch.tensor([[0.0, 0.3, 0.2], [0.2, 0.0, 0.1]])
    assert rank_heads(scores, losses).tolist() == [[1, 2], [0, 2], [1, 0], [0, 1], [1, 1], [0, 0]]

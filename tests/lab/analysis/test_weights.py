import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spf.lab.analysis import weights


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).Q


def test_planted_update_inside_and_outside_the_column_space():
    basis = orthonormal(40, 20)
    W = basis[:, :12] @ torch.randn(12, 30)
    inside, outside = basis[:, :4] @ torch.randn(4, 30), basis[:, 12:16] @ torch.randn(4, 30)
    U_r = weights.leading_left(W, 0.999999)
    assert U_r.shape == (40, 12)
    for update, expected in ((inside, 0.0), (outside, 1.0)):
        U, s, _ = weights.update_svd(W, W + update)
        assert len(s) == 4
        torch.testing.assert_close(weights.null_space_sines(U, U_r), torch.full((4,), expected), atol=2e-3, rtol=0)
        assert weights.null_space_share(U, s, U_r) == pytest.approx(expected, abs=1e-4)


def test_random_update_is_at_chance():
    torch.manual_seed(0)
    W = orthonormal(400, 60) @ torch.randn(60, 80)
    U_r = weights.leading_left(W, 0.999999)
    U, s, _ = weights.update_svd(W, W + torch.randn(400, 80))
    chance = weights.chance_sine(400, 60)
    assert chance == pytest.approx(math.sqrt(0.85))
    assert float(weights.null_space_sines(U, U_r).square().mean().sqrt()) == pytest.approx(chance, rel=0.01)
    assert weights.null_space_share(U, s, U_r) == pytest.approx(chance**2, rel=0.01)


def test_share_is_that_of_the_dense_update():
    torch.manual_seed(1)
    W, dW = torch.randn(30, 12), torch.randn(30, 12)
    U_r = weights.leading_left(W, 0.9)
    U, s, _ = weights.update_svd(W, W + dW)
    P = U_r @ U_r.T
    dense = float((dW - P @ dW).square().sum() / dW.square().sum())
    assert weights.null_space_share(U, s, U_r) == pytest.approx(dense, abs=1e-4)


def test_energy_decides_the_rank_of_the_column_space():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))  # energies 9, 4, 1, .01
    assert weights.leading_left(W, 9 / 14.01 - 1e-6).shape[1] == 1
    assert weights.leading_left(W, 0.9).shape[1] == 2
    assert weights.leading_left(W, 0.99).shape[1] == 3
    assert weights.leading_left(W, 1.0).shape[1] == 4


def test_only_directions_above_rounding_count_and_the_update_is_not_the_tuned_weight():
    # the released code took the tuned weight itself; a LoRA update has directions that are rounding alone
    torch.manual_seed(0)
    W = torch.randn(64, 48)
    for size in (1e-2, 1e-4):  # the smaller, the more of the difference is the rounding of W
        after = W + size * torch.randn(64, 3) @ torch.randn(3, 48)
        U, s, V = weights.update_svd(W, after)
        assert U.shape == (64, 3)
    torch.testing.assert_close(U * s @ V.T, after - W, atol=1e-5, rtol=0)


def test_row_coefficients_of_a_rank_one_update():
    torch.manual_seed(0)
    u, v, a = torch.randn(20), torch.randn(10), torch.randn(5, 10)
    u, v = u / u.norm(), v / v.norm()
    W = torch.randn(20, 10)
    U, s, V = weights.update_svd(W, W + 3 * torch.outer(u, v))
    expected = 3 * torch.nn.functional.cosine_similarity(a, v[None], dim=1).abs()
    torch.testing.assert_close(weights.row_coefficients(s, V, a)[:, 0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.gains(s, V, a), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.neuron_cosines(U, s), torch.ones(20), atol=1e-3, rtol=0)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_gain_is_the_norm_of_the_update_times_the_unit_input(seed):
    generator = torch.Generator().manual_seed(seed)
    W, dW, a = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (9, 6), (4, 6)))
    U, s, V = weights.update_svd(W, W + dW)
    unit = a / a.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weights.gains(s, V, a), (unit @ dW.T).norm(dim=1), atol=1e-4, rtol=1e-4)
    # all coefficients together are the gain
    whole = weights.row_coefficients(s, V, a, k=6).square().sum(1).sqrt()
    torch.testing.assert_close(whole, weights.gains(s, V, a), atol=1e-4, rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(dW, V[:, 0][None], dim=1).abs()
    torch.testing.assert_close(weights.neuron_cosines(U, s), cosines, atol=1e-3, rtol=1e-3)


def test_chance_coefficients_are_those_of_random_inputs():
    s, V = torch.tensor([5.0, 2.0]), orthonormal(30, 2)
    a = torch.randn(40000, 30, generator=torch.Generator().manual_seed(0))
    found = weights.row_coefficients(s, V, a).mean(0)
    torch.testing.assert_close(found, weights.chance_coefficients(s, 30), rtol=0.02, atol=0)


def test_principal_sines_of_rotated_planes():
    angles = torch.tensor([1e-3, 0.5])
    A = torch.eye(6)[:2].repeat(3, 1)
    B = torch.zeros(2, 6)
    B[0, 0], B[0, 2] = angles[0].cos(), angles[0].sin()
    B[1, 1], B[1, 3] = angles[1].cos(), angles[1].sin()
    found = weights.principal_sines(A, B, 1.0)
    torch.testing.assert_close(found, angles.double().sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.principal_sines(B, A, 1.0), found, atol=1e-6, rtol=0)
    assert weights.principal_sines(A, 3 * A, 1.0).max() < 1e-6
    # a plane within the three-dimensional span has no angle to it
    assert weights.principal_sines(torch.eye(6)[:3], A, 1.0).tolist() == pytest.approx([0, 0], abs=1e-6)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(-1, 3))
def test_scaled_update_is_linear_and_reproduces_its_ends_bit_by_bit(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    before = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    after = {name: torch.randn(p.shape, generator=generator) * 1e-3 for name, p in model.named_parameters()}
    for end, wanted in ((0.0, before), (1.0, after)):
        weights.scale_update(model, before, after, end)
        assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())
    weights.scale_update(model, before, after, alpha)
    expected = before["weight"] + alpha * (after["weight"] - before["weight"])
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-5, rtol=1e-5)
    weights.scale_update(model, {"bias": before["bias"]}, after, 0.0)
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    W = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        weights.update_svd(W, W[:, :2])
    with pytest.raises(ValueError, match="update is zero"):
        weights.update_svd(W, W.clone())
    model = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match="gate is missing"):
        weights.scale_update(model, {"gate": W}, {"gate": W}, 0.5)
    with pytest.raises(ValueError, match="weight has the shapes"):
        weights.scale_update(model, {"weight": W}, {"weight": W[:, :2]}, 0.5)

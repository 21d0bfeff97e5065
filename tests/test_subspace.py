"""Bases from factors, dense gradients and streamed activations, against dense float64 references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spf.bases import InputSketch
from spf.lab.analysis.gradients import overlap, svd_dense
from spf.subspace import Factors, SafetySubspace


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(basis):
    return basis.double() @ basis.double().T


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 12), m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 8), seed=st.integers(0, 10_000)
)
def test_factors_and_dense_give_the_same_subspace(T, m, n, k, seed):
    factors = Factors(random(T, n, seed=seed), random(T, m, seed=seed + 1))
    U, s, V = factors.svd(k)
    U2, s2, V2 = svd_dense(factors.dense(), k)
    reference = torch.linalg.svdvals(factors.dense().double())
    r = min(len(s), len(reference))
    assert torch.allclose(s[:r].double(), reference[:r], atol=1e-4 * float(reference[0]))
    assert torch.allclose(s2.double(), reference, atol=1e-4 * float(reference[0]))
    assert torch.allclose(U.T @ U, torch.eye(U.shape[1]), atol=1e-4)
    assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-4)
    gap = float(reference[U.shape[1] - 1] - reference[U.shape[1]]) if len(reference) > U.shape[1] else float("inf")
    if U.shape == U2.shape and gap > 1e-2 * float(reference[0]):
        assert torch.allclose(projector(U), projector(U2), atol=1e-3)
        assert torch.allclose(projector(V), projector(V2), atol=1e-3)


def test_zero_gradient_has_an_empty_basis():
    U, _, V = Factors(random(5, 7, seed=0), torch.zeros(5, 4)).svd(3)
    assert U.shape == (4, 0)
    assert V.shape == (7, 0)


def test_sketch_is_exact_for_few_rows():
    X = random(9, 20, seed=3)
    sketch = InputSketch(10)
    sketch.add(X[:4])
    sketch.add(X[4:] * 1e4)  # massive activations do not crowd the others out
    V = sketch.basis(9)
    assert V.shape == (20, 9)
    assert torch.allclose(X @ V @ V.T, X, atol=1e-4)


@pytest.mark.parametrize("size", [32, 40])
def test_sketch_of_many_rows_finds_the_leading_directions(size):
    """By a test matrix (32), or from all of X^T X (40), which is less work where the inputs are not twice as wide."""
    basis = torch.linalg.qr(random(64, 8, seed=1)).Q
    X = random(2000, 8, seed=2) @ basis.T + 1e-3 * random(2000, 64, seed=4)
    sketch = InputSketch(size)
    for part in X.split(100):
        sketch.add(part)
    V = sketch.basis(8)
    assert overlap(V, basis) > 0.999
    assert not sketch.rows
    assert (sketch.omega is None) == (size == 40)
    assert sketch.basis(32, energy=0.99).shape[1] == 8
    with pytest.raises(ValueError, match="NaN or inf"):
        sketch.add(torch.full((1, 64), float("nan")))


@pytest.mark.parametrize("size", [32, 40])
def test_sketch_survives_fewer_directions_than_it_has_room_for(size):
    """A bug once: the sketch's core is singular when the inputs span fewer directions than the sketch."""
    basis = torch.linalg.qr(random(64, 5, seed=1)).Q
    sketch = InputSketch(size)
    for part in (random(3000, 5, seed=2) @ basis.T).split(300):
        sketch.add(part)
    V = sketch.basis(20)
    assert V.shape[1] == 5
    assert overlap(V, basis) > 0.9999
    assert torch.allclose(V.T @ V, torch.eye(5), atol=1e-5)


def test_save_and_load(tmp_path):
    subspace = SafetySubspace(
        right={"b/c": torch.linalg.qr(random(5, 3, seed=1)).Q},
        target={"b/c": random(2, 3, seed=2)},
        metadata={"rule": "x"},
    )
    path = tmp_path / "s.safetensors"
    subspace.save(path)
    loaded = SafetySubspace.load(path)
    assert loaded.metadata == {"rule": "x"}
    assert torch.equal(loaded.right["b/c"], subspace.right["b/c"])
    assert torch.equal(loaded.target["b/c"], subspace.target["b/c"])
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("size", [600, 24])
def test_weights_of_rows_count_as_repetitions(size):
    """Exact (600) and folded (24): a row of weight 3 is three rows."""
    X = random(200, 64, seed=2) * torch.linspace(3, 0.01, 64)
    weights = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(0)).float()
    weighted, repeated, alike = InputSketch(size), InputSketch(size), InputSketch(size)
    weighted.add(X, weights)
    alike.add(X)
    repeated.add(X.repeat_interleave(weights.long(), 0))
    assert overlap(weighted.basis(6), repeated.basis(6)) > 0.9999
    assert overlap(weighted.basis(6), alike.basis(6)) < 0.9999
    assert weighted.basis(24, energy=0.7).shape == repeated.basis(24, energy=0.7).shape

"""Mathematical properties of the step rules over generated matrices."""

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchjd.aggregation import DualProj, PCGrad, UPGrad

from spf.rules import (
    SPF,
    Aggregate,
    Constrained,
    DualAscent,
    Mix,
    NullSpace,
    Rank1,
    SafeGrad,
    components,
    conflict_coefficient,
    project_out_right,
    without_components,
)

SIDES = st.sampled_from(["left", "right", "both"])
CASES = {
    "m": st.integers(1, 15),
    "n": st.integers(1, 15),
    "k": st.integers(1, 6),
    "seed": st.integers(0, 100_000),
}


def case(m, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    k = min(k, m, n)
    G = torch.randn(m, n, generator=g)
    S = torch.randn(m, n, generator=g)
    U, s, Vh = torch.linalg.svd(S, full_matrices=False)
    return G, S, U[:, :k], s[:k], Vh[:k].T


def project_out(G, U, V, side):
    """G without the safety subspace, as the rule spf takes it out."""
    return without_components(G, components(G, U, V, side), U, V, side)


@settings(max_examples=60, deadline=None)
@given(**CASES, side=SIDES)
def test_projection_properties(m, n, k, seed, side):
    G, _, U, s, V = case(m, n, k, seed)
    once = project_out(G, U, V, side)
    scale = float(G.norm())
    assert torch.allclose(project_out(once, U, V, side), once, atol=1e-5 * scale)  # idempotent
    assert once.norm() <= G.norm() * (1 + 1e-6)  # never raises the norm
    truncated = U @ torch.diag(s) @ V.T  # what the basis holds of the safety gradient
    assert abs(float((once * truncated).sum())) <= 1e-4 * scale * float(truncated.norm())  # no conflict is left
    U64, V64, G64 = U.double(), V.double(), G.double()
    dense = {
        "left": (torch.eye(m).double() - U64 @ U64.T) @ G64,
        "right": G64 @ (torch.eye(n).double() - V64 @ V64.T),
        "both": G64 - U64 @ U64.T @ G64 @ V64 @ V64.T,
    }[side]
    assert torch.allclose(once.double(), dense, atol=1e-5 * scale)
    assert torch.allclose(project_out(3 * G, U, V, side), 3 * once, atol=1e-4 * scale)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_rank1_is_pcgrad_for_two_gradients(m, n, k, seed):
    G, S, *_ = case(m, n, k, seed)
    c = conflict_coefficient(float((G * S).sum()), float(S.square().sum()))
    corrected = G - c * S
    assert corrected.norm() <= G.norm() * (1 + 1e-6)
    assert float((corrected * S).sum()) >= -1e-4 * float(G.norm() * S.norm())
    if float((G * S).sum()) >= 0:
        assert torch.equal(corrected, G)  # an exact no-op without a conflict
    # PCGrad adds up both corrected gradients; the safety gradient's own correction is taken off again
    both = PCGrad()(torch.stack([G.flatten(), S.flatten()]).double())
    c2 = conflict_coefficient(float((G * S).sum()), float(G.square().sum()))
    assert torch.allclose((corrected + S - c2 * G).flatten().double(), both, atol=1e-4)


def test_tiny_safety_gradients_are_left_alone():
    assert conflict_coefficient(-1.0, 1e-9) == 0.0
    assert conflict_coefficient(-1.0, 2.0) == -0.5
    assert conflict_coefficient(1.0, 2.0) == 0.0


def test_left_and_right_act_on_outputs_and_inputs():
    G = torch.arange(6.0).reshape(2, 3)
    e0 = torch.eye(2)[:, :1]
    assert torch.equal(project_out(G, e0, e0, "left"), torch.tensor([[0.0, 0, 0], [3, 4, 5]]))
    f2 = torch.eye(3)[:, 2:]
    assert torch.equal(project_out_right(G, f2), torch.tensor([[0.0, 1, 0], [3, 4, 0]]))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        NullSpace(rank=0)
    with pytest.raises(ValueError, match="null-space: energy must be at most 1, not 2"):
        NullSpace(energy=2)
    with pytest.raises(ValueError, match="spf: side must be left, right or both, not 'up'"):
        SPF(side="up")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@example(m=1, n=1, k=1, seed=483, rho=1.0)
@given(**CASES, rho=st.floats(0.1, 3))
def test_combining_rules_equal_their_equations(m, n, k, seed, rho):
    G, S, *_ = case(m, n, k, seed)
    G, S = G.double(), S.double()
    gramian = (float(G.square().sum()), float((G * S).sum()), float(S.square().sum()))

    def combined(rule):
        a, c = rule.coefficients(*gramian)
        return a * G + c * S

    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    surgery = G - min(gramian[1], 0) / gramian[2] * S
    assert torch.allclose(combined(Rank1(gate="global")), surgery)
    assert torch.allclose(combined(Mix(rho)), G + rho * S)
    assert torch.allclose(combined(SafeGrad(rho)), surgery + rho * S)
    rows = torch.stack([G.flatten(), S.flatten()])
    for name, reference, scale in (("pcgrad", PCGrad(), 1), ("upgrad", UPGrad(), 2), ("dualproj", DualProj(), 2)):
        expected = scale * reference(rows).reshape(m, n)
        assert torch.allclose(combined(Aggregate(name)), expected, **tolerance), name
    # An aggregate of both gradients conflicts with neither, up to TorchJD's regularisation of the dual problem: of
    # opposed gradients it leaves the share eps tr / (own square + eps tr) of the other.
    both = combined(Aggregate("upgrad"))
    trace, product = gramian[0] + gramian[2], float(G.norm() * S.norm())

    def left(own):
        return 1.1 * product * 1e-4 * trace / (own + 1e-4 * trace) + 1e-4 * trace

    assert float((both * S).sum()) >= -left(gramian[2])
    assert float((both * G).sum()) >= -left(gramian[0])


@given(st.floats(0, 10), st.floats(-2, 2), st.floats(0.1, 5), st.floats(0, 0.5))
def test_dual_ascent_stays_in_bounds_and_moves_with_the_excess(before, excess, rate, margin):
    rule = DualAscent(rate=rate, margin=margin, most=10.0)
    after = rule.multiplier(before, excess)
    assert 0 <= after <= 10
    assert after >= before or excess < margin
    assert after <= before or excess > margin


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mix(0), "weight"),
        (lambda: SafeGrad(-1), "weight"),
        (lambda: Aggregate("mean"), "aggregator"),
        (lambda: DualAscent(rate=0), "rate"),
        (lambda: Constrained(margin=-1), "margin"),
        (lambda: NullSpace(tokens="first"), "tokens"),
        (lambda: Rank1(gate="layer"), "gate"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ModuleNotFoundError, match=r"aggregate needs TorchJD: pip install 'spf\[torchjd\]'"):
        Aggregate()

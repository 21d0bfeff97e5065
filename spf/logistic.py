"""Logistic regression by Newton's method, of many probes at once."""

import torch
from torch import Tensor

_ITERATIONS = 100
_TOLERANCE = 1e-8
_HALVINGS = 40


def fit_logistic(X: Tensor, y: Tensor, counts: Tensor | None = None) -> Tensor:
    """L2 logistic regression of every head at once: (B, n + 1) float64, weights and then the intercept.

    X (B, S, n), y (S,) bool, counts (S,) how often each sample counts, once if not given. Minimises
    1/2 |w|^2 + sum_s c_s log(1 + exp(-t_s (w x_s + b))), t = +-1, which is
    scikit-learn's objective at C = 1; the intercept is not penalised. Newton's method with backtracking, until
    the gradient vanishes; the objective is strictly convex, so the solution is unique.

    Raises:
        ValueError: a class is missing.
    """
    if y.all() or not y.any():
        raise ValueError("a probe needs samples of both classes")
    X = torch.cat([X.double(), X.new_ones(*X.shape[:2], 1, dtype=torch.float64)], dim=2)
    t = torch.where(y, 1.0, -1.0).double()
    c = torch.ones_like(t) if counts is None else counts.double()
    penalty = torch.ones(X.shape[2], dtype=torch.float64)
    penalty[-1] = 0.0

    def objective(weights: Tensor) -> Tensor:
        margins = t * torch.einsum("bsn,bn->bs", X, weights)
        return torch.nn.functional.softplus(-margins).mul(c).sum(1) + 0.5 * (penalty * weights**2).sum(1)

    w = X.new_zeros(X.shape[0], X.shape[2])
    value = objective(w)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(-t * torch.einsum("bsn,bn->bs", X, w))
        gradient = penalty * w - torch.einsum("bsn,bs->bn", X, c * t * p)
        if gradient.abs().max() < _TOLERANCE * len(t):
            break
        hessian = X.mT @ (X * (c * p * (1 - p))[..., None]) + torch.diag(penalty)
        # Where all samples are certain, the intercept's curvature underflows.
        hessian[:, -1, -1] += 1e-12
        step = torch.linalg.solve(hessian, gradient)
        slope = (gradient * step).sum(1)
        length = torch.ones_like(value)
        for _ in range(_HALVINGS):
            trial = objective(w - length[:, None] * step)
            too_long = trial > value - 1e-4 * length * slope
            if not too_long.any():
                break
            length = torch.where(too_long, length / 2, length)
        better = trial < value
        w = torch.where(better[:, None], w - length[:, None] * step, w)
        value = torch.where(better, trial, value)
        if not better.any():
            break
    return w

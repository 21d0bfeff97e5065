"""Per-head probes as pure functions: split by pair, accuracy, directions."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def validation_pairs(keys: Sequence[str], fraction: float, seed: int) -> Tensor:
    """(N,) bool: the pairs kept for validation. It depends on seed and keys, not on their order.

    Raises:
        ValueError: fewer than one pair on either side.
    """
    wanted = round(fraction * len(keys))
    if not 0 < wanted < len(keys):
        raise ValueError(f"{len(keys)} pairs cannot be split with a validation share of {fraction}")
    order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order[:wanted]] = True
    return mask


def judge_probes(X: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each probe's accuracy and mean log loss (nats), (B,) float64 each. X (B, S, n), y (S,), weights (B, n + 1)."""
    scores = torch.einsum("bsn,bn->bs", X.double(), weights[:, :-1]) + weights[:, -1:]
    loss = torch.nn.functional.softplus(torch.where(y, -scores, scores)).mean(1)
    return ((scores > 0) == y).double().mean(1), loss


def mass_mean(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Unit mass-mean directions (B, n) and standard deviations (B,) of the samples along them, float64.

    X (B, S, n), y (S,) bool, True = safe. The direction points from the unsafe mean to the safe mean; the
    standard deviation is the population's over all samples. A head whose means coincide gets zeros.
    Li et al., arXiv 2306.03341, section 3; Zhu et al., arXiv 2410.10343.
    """
    X = X.double()
    shift = X[:, y].mean(1) - X[:, ~y].mean(1)
    norm = shift.norm(dim=1, keepdim=True)
    direction = torch.where(norm > 0, shift / norm.clamp_min(1e-300), torch.zeros_like(shift))
    return direction, torch.einsum("bsn,bn->bs", X, direction).std(1, correction=0)


def rank_heads(scores: Tensor, losses: Tensor) -> Tensor:
    """(L * H, 2) int64: all (layer, head), best score (L, H) first.

    Many heads can tell all held-out answers apart; such ties go to the smaller loss (L, H), then to the lower
    layer, then to the lower head.
    """
    by_loss = torch.sort(losses.flatten(), stable=True).indices
    order = by_loss[torch.sort(scores.flatten()[by_loss], descending=True, stable=True).indices]
    return torch.stack([order // scores.shape[1], order % scores.shape[1]], dim=1)

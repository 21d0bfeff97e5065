"""Do safe and unsafe prompts form two clusters of activations? (arXiv 2407.10264, section 4)"""

from collections.abc import Mapping

import torch
from torch import Tensor


def tau(A: Tensor, mean_safe: Tensor, mean_unsafe: Tensor) -> Tensor:
    """||a - mean_unsafe|| - ||a - mean_safe|| of each row a of A (N, d): positive on the safe side. Returns (N,)."""
    return (A - mean_unsafe).norm(dim=1) - (A - mean_safe).norm(dim=1)


def tau_cosine(A: Tensor, mean_safe: Tensor, mean_unsafe: Tensor) -> Tensor:
    """cos(a, mean_safe) - cos(a, mean_unsafe) of each row: as `tau`, blind to length. Returns (N,), in [-2, 2]."""
    cosine = torch.nn.functional.cosine_similarity
    return cosine(A, mean_safe[None], dim=1) - cosine(A, mean_unsafe[None], dim=1)


def held_out(sets: Mapping[str, Tensor], measure=tau) -> dict[str, Tensor]:
    """`tau` of every row of every set, with means that no prompt of the same half had a part in.

    sets: activations (N_i, d) by name, among them `safe` and `unsafe`. Even rows are measured with the means of the
    odd rows of safe and unsafe, and odd rows with those of the even ones. So row i of a jailbreak may be made of
    row i of `unsafe`: that one is never in its means.

    Raises:
        ValueError: safe or unsafe has fewer than two rows.
    """
    safe, unsafe = sets["safe"], sets["unsafe"]
    if min(len(safe), len(unsafe)) < 2:
        raise ValueError(f"held_out: two prompts a set at least, got {len(safe)} safe and {len(unsafe)} unsafe ones")
    found = {name: A.new_empty(len(A)) for name, A in sets.items()}
    for half in (0, 1):
        means = safe[1 - half :: 2].mean(0), unsafe[1 - half :: 2].mean(0)
        for name, A in sets.items():
            found[name][half::2] = measure(A[half::2], *means)
    return found


def side_accuracy(tau_safe: Tensor, tau_unsafe: Tensor) -> float:
    """Mean of the shares of safe prompts with tau > 0 and of unsafe ones with tau < 0; .5 where there is no cluster."""
    return float(((tau_safe > 0).double().mean() + (tau_unsafe < 0).double().mean()) / 2)


def fisher_ratio(safe: Tensor, unsafe: Tensor) -> float:
    """||mean_safe - mean_unsafe||^2 / (trace of cov_safe + trace of cov_unsafe); rows are prompts.

    Two samples of one distribution give about (1 / N_safe + 1 / N_unsafe) / 2, not 0.
    """
    between = (safe.mean(0) - unsafe.mean(0)).double().square().sum()
    within = safe.double().var(0).sum() + unsafe.double().var(0).sum()
    return float(between / within)


def concentration(A: Tensor) -> float:
    """Largest eigenvalue of the rows' covariance over the sum of all: 1 if they vary along one direction only.

    Raises:
        ValueError: the rows do not vary.
    """
    variances = torch.linalg.svdvals((A - A.mean(0)).double()).square()
    if variances.sum() == 0:
        raise ValueError("concentration: the activations do not vary")
    return float(variances[0] / variances.sum())


def two_means_accuracy(safe: Tensor, unsafe: Tensor, steps: int = 50) -> float:
    """How well 2-means without labels finds the two sets: share of rows on the right side, in [.5, 1].

    Lloyd's algorithm from the two sides of the leading principal direction. Sets count equally.
    """
    A = torch.cat([safe, unsafe]).double()
    centred = A - A.mean(0)
    V = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    side = centred @ V > 0
    for _ in range(steps):
        if bool(side.all()) or not bool(side.any()):
            return 0.5
        nearer = tau(A, A[side].mean(0), A[~side].mean(0)) > 0
        if torch.equal(nearer, side):
            break
        side = nearer
    accuracy = float(side[: len(safe)].double().mean() + (~side[len(safe) :]).double().mean()) / 2
    return max(accuracy, 1 - accuracy)

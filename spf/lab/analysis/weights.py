"""What fine-tuning did to a weight matrix W (m, n), y = W a: the update dW = W_after - W_before (arXiv 2407.10264)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spf.subspace import numerical_rank


def leading_left(W: Tensor, energy: float = 0.99) -> Tensor:
    """U_r (m, r): the fewest leading left singular vectors of W (m, n) that hold the share `energy` of ||W||_F^2."""
    U, s, _ = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, : _leading(s, energy)]


def _leading(s: Tensor, energy: float) -> int:
    shares = s.double().square().cumsum(0) / s.double().square().sum()
    return min(int((shares < energy).sum()) + 1, len(s))


def update_svd(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), s (k,), V (n, k) of dW, its k singular values above rounding.

    A LoRA update has rank r: beyond r the singular vectors are rounding, and angles of those say nothing. What is
    rounding follows from the size of the weights, since dW is their difference.

    Raises:
        ValueError: the shapes differ, or the update is zero.
    """
    if before.shape != after.shape:
        raise ValueError(f"update_svd: shapes {tuple(before.shape)} and {tuple(after.shape)} differ")
    dW = after.float() - before.float()
    U, s, Vh = torch.linalg.svd(dW, full_matrices=False)
    # each entry of a difference of float32 numbers is off by up to eps |W|; a random matrix of such
    # entries has a norm of about eps (|W|_F / sqrt(m n)) (sqrt(m) + sqrt(n))
    m, n = dW.shape
    noise = torch.finfo(torch.float32).eps * float(before.float().norm()) * (m**-0.5 + n**-0.5)
    k = min(numerical_rank(s, max(m, n)), int((s > noise).sum()))
    if k == 0:
        raise ValueError("update_svd: the update is zero")
    return U[:, :k], s[:k], Vh[:k].T


def null_space_sines(U: Tensor, U_r: Tensor) -> Tensor:
    """sin of the angle between each column of U (m, k) and the span of U_r (m, r); both orthonormal. Returns (k,).

    With U the left singular vectors of dW and U_r of W: 1 where the update writes what W never writes (O2).
    """
    return (U - U_r @ (U_r.T @ U)).norm(dim=0)


def null_space_share(U: Tensor, s: Tensor, U_r: Tensor) -> float:
    """||(I - U_r U_r^T) dW||_F^2 / ||dW||_F^2 with dW = U diag(s) V^T, in [0, 1]."""
    energy = s.double().square()
    return float((energy * null_space_sines(U, U_r).double().square()).sum() / energy.sum())


def chance_sine(m: int, r: int) -> float:
    """sqrt(1 - r/m): root mean square sine between a random direction of R^m and r given dimensions.

    Its square is the expected `null_space_share` of a random update.
    """
    return math.sqrt(1 - r / m)


def row_coefficients(s: Tensor, V: Tensor, A: Tensor, k: int = 15) -> Tensor:
    """|s_i v_i^T a| / ||a|| of every row a of A (N, n), for the first k right singular vectors of dW (O3). (N, k).

    Absolute values, since the sign of a singular vector is arbitrary.
    """
    return (torch.nn.functional.normalize(A, dim=1) @ V[:, :k]).abs() * s[:k]


def chance_coefficients(s: Tensor, n: int, k: int = 15) -> Tensor:
    """Expected `row_coefficients` of a uniformly random direction: s_i Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2))."""
    cosine = math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)
    return s[:k] * cosine


def gains(s: Tensor, V: Tensor, A: Tensor) -> Tensor:
    """||dW a|| / ||a|| of every row a of A (N, n): how much the update answers to it. Returns (N,).

    A random direction of R^n has the root mean square ||dW||_F / sqrt(n).
    """
    return (torch.nn.functional.normalize(A, dim=1) @ V * s).norm(dim=1)


def neuron_cosines(U: Tensor, s: Tensor) -> Tensor:
    """|cos| between each row of dW = U diag(s) V^T, a neuron's change, and v_1. Returns (m,); 0 where it is zero."""
    rows = (U * s).norm(dim=1)
    return torch.where(rows > 0, (U[:, 0] * s[0]).abs() / rows, 0.0)


def principal_sines(A: Tensor, B: Tensor, energy: float = 0.99) -> Tensor:
    """Sines of the principal angles between the spans of the rows of A (N, d) and B (N', d), ascending (App. C.1).

    Each span is that of the fewest leading directions that hold the share `energy`; there are as many angles as the
    smaller one has dimensions. From I - P, which is accurate at small angles too (Bjorck and Golub 1973).
    """
    P, Q = leading_left(A.T, energy), leading_left(B.T, energy)
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    return torch.linalg.svdvals((Q - P @ (P.T @ Q)).double()).clamp(max=1.0).flip(0)


@torch.no_grad()
def scale_update(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> None:
    """Set the named parameters of `model` to W_before + alpha (W_after - W_before), in place.

    The names are those of `before`. alpha = 0 and alpha = 1 give the two ends bit by bit.

    Raises:
        ValueError: a name is missing, or shapes differ.
    """
    parameters = dict(model.named_parameters())
    for name, start in before.items():
        if name not in parameters or name not in after:
            raise ValueError(f"scale_update: {name} is missing in the {'model' if name in after else 'second weights'}")
        if not start.shape == after[name].shape == parameters[name].shape:
            raise ValueError(f"scale_update: {name} has the shapes {tuple(start.shape)}, {tuple(after[name].shape)}")
        parameters[name].copy_(torch.lerp(start.float(), after[name].float(), alpha))

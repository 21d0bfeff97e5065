"""Geometry of gradients: cosines between groups of samples, spectra, and what a subspace holds of a gradient.

A factored gradient is G = D^T X with X (T, n) a layer's inputs and D (T, m) the gradients at its outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spf.subspace import numerical_rank


def sample_gram(X: Tensor, D: Tensor, lengths: Sequence[int]) -> Tensor:
    """Inner products of the samples' own gradients of one weight matrix.

    X (T, n), D (T, m): the factors over the tokens of S samples, one sample after the other, `lengths` tokens
    each. Returns (S, S), float64: entry i, j is <G_i, G_j> with G_i = D_i^T X_i. Grams of several matrices add.

    Raises:
        ValueError: the lengths do not sum to T.
    """
    if sum(lengths) != len(X) or len(X) != len(D):
        raise ValueError(f"sample_gram: lengths sum to {sum(lengths)}, X has {len(X)} rows and D {len(D)}")
    flat = X.new_empty(len(lengths), D.shape[1], X.shape[1])
    for G, d, x in zip(flat, D.split(list(lengths)), X.split(list(lengths)), strict=True):
        torch.mm(d.T, x, out=G)
    flat = flat.flatten(1)
    return (flat @ flat.T).double()


def group_cosine(gram: Tensor, first: Sequence[int], second: Sequence[int]) -> float:
    """Cosine of the summed gradients of two groups of samples, in [-1, 1]; 0 if either sum vanishes.

    gram (S, S): from `sample_gram`, or a sum of such. first, second: indices of the samples in each group.
    """
    a, b = list(first), list(second)
    squares = gram[a][:, a].sum() * gram[b][:, b].sum()
    if squares <= 0:
        return 0.0
    return float((gram[a][:, b].sum() / squares.sqrt()).clamp(-1, 1))


def captured_energy(G: Tensor, U: Tensor) -> Tensor:
    """||U_k^T G||_F^2 / ||G||_F^2 for k = 1 ... K: the share of G's (m, n) energy in the span of U's first k columns.

    U (m, K), orthonormal. Returns (K,), float64, in [0, 1]. For the input side pass G^T and V. At best it is
    CER(k), with U the leading left singular vectors of G.

    Raises:
        ValueError: G is zero.
    """
    total = G.square().sum(dtype=torch.float64)
    if total == 0:
        raise ValueError("captured_energy: the gradient is zero")
    return (U.T @ G).square().sum(1, dtype=torch.float64).cumsum(0) / total


def svd_dense(G: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets U (m, k), s (all), V (n, k) of a dense gradient (m, n)."""
    U, s, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    k = min(rank, numerical_rank(s, max(G.shape)))
    return U[:, :k], s, Vh[:k].T


def cumulative_energy_ratio(s: Tensor, k: int) -> float:
    """CER(k): the share of squared singular values s that the first k hold, in [0, 1] (arXiv 2601.10141)."""
    energy = s.double().square()
    return float(energy[:k].sum() / energy.sum())


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007)."""
    p = s.double() / s.double().sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def overlap(U: Tensor, U2: Tensor) -> float:
    """||U^T U'||_F^2 / min(k, k') of two orthonormal bases of the same space: 1 if one holds the other."""
    return float((U.T @ U2).double().square().sum() / min(U.shape[1], U2.shape[1]))


def chance_overlap(k: int, k2: int, dimension: int) -> float:
    """Expected overlap ||U^T U'||_F^2 / min(k, k') of independent uniformly random subspaces of R^dimension.

    E ||U^T U'||_F^2 = k k' / dimension, hence max(k, k') / dimension.

    Raises:
        ValueError: a rank is not between 1 and the dimension.
    """
    if not (1 <= k <= dimension and 1 <= k2 <= dimension):
        raise ValueError(f"chance_overlap: ranks {k} and {k2} do not fit in dimension {dimension}")
    return max(k, k2) / dimension

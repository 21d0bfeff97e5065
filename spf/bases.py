"""Bases: a layer's inputs streamed into the directions that the null space holds."""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from spf.linalg import exact_matmul
from spf.subspace import numerical_rank

Tokens = Literal["all", "prompt", "refusal"]
"""Which tokens of a safety sample count."""


CLIP = 50.0
"""Most that one token's gradient may weigh, as a multiple of its sample's mean."""


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p - log(1 - p) (P,) of each token under its logits (P, V): its gradient stays large where p is near 1."""
    others = logits.scatter(-1, tokens[:, None], -torch.inf).logsumexp(-1)
    return logits.gather(-1, tokens[:, None])[:, 0] - others


def relative(squares: Tensor, samples: Tensor) -> Tensor:
    """Squared gradients (T,) of tokens, over the mean of their sample (T,), a number, at most `CLIP`.

    The tokens of a sample without a finite gradient count 1 each.
    """
    squares = squares.float()
    count = int(samples.max()) + 1 if len(samples) else 0
    means = squares.new_zeros(count).scatter_reduce(0, samples, squares, "mean", include_self=False)[samples]
    usable = torch.isfinite(means) & (means > 0)
    return torch.where(usable, (squares / means).clamp(max=CLIP), 1.0)


def outside(V: Tensor, free: Tensor) -> Tensor:
    """An orthonormal basis (n, <= k) of what V (n, k) spans orthogonally to the basis `free` (n, q)."""
    rest = V - exact_matmul(free, exact_matmul(free.T, V))
    U, s, _ = torch.linalg.svd(rest.double(), full_matrices=False)
    # what V shares with `free` leaves rounding behind
    return U[:, s > 1e-3].to(V.dtype)


@lru_cache(maxsize=8)
def _test_matrix(n: int, size: int, device: torch.device) -> Tensor:
    """Omega (n, size) with orthonormal columns; layers with as many inputs share it."""
    # Its own generator: the caller's random state must stay as it is.
    gaussian = torch.randn(n, size, generator=torch.Generator().manual_seed(n))
    return torch.linalg.qr(gaussian).Q.to(device)


class InputSketch:
    """Streams a layer's inputs (rows of X) into the basis of their leading directions.

    Every row counts with unit norm times the root of its weight, so that a few tokens with massive activations
    (the first one, often) do not take all directions: what is minimised is the weighted sum of each token's
    squared relative error. Up to `size` rows are kept as they are, and the basis is exact. Beyond that they
    are folded into a Nyström sketch Y = X^T X Omega (n, size) of their covariance (Halko et al.,
    arXiv 0909.4061, section 5.5), so memory stays at 2 n size numbers however many prompts there are; of inputs
    narrower than 2 size into X^T X itself, which is less work and exact.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: list[Tensor] = []
        self.count = 0
        self.total = 0.0
        self.omega: Tensor | None = None
        self.Y: Tensor | None = None

    def add(self, X: Tensor, weights: Tensor | None = None) -> None:
        """Take in the rows of X (T, n), each with its weight (T,), 1 by default.

        Raises:
            ValueError: a row holds NaN or inf.
        """
        X = X.float()
        if not bool(torch.isfinite(X).all()):
            raise ValueError("NaN or inf in the layer's inputs")
        self.count += len(X)
        rows = torch.nn.functional.normalize(X, dim=1)
        if weights is not None:
            rows *= weights.to(rows).sqrt()[:, None]
        self.total += len(X) if weights is None else float(weights.sum())
        self.rows.append(rows)
        if self.count > self.size:
            self._fold()

    def _fold(self) -> None:
        X = torch.cat(self.rows)
        self.rows = []
        n = X.shape[1]
        if n < 2 * self.size:
            more = exact_matmul(X.T, X)
        else:
            if self.omega is None:
                self.omega = _test_matrix(n, self.size, X.device)
            more = exact_matmul(X.T, exact_matmul(X, self.omega))
        self.Y = more if self.Y is None else self.Y.add_(more)

    def basis(self, rank: int, energy: float = 1.0) -> Tensor:
        """V (n, k), float32: the fewest directions that hold the share `energy` of the rows, at most `rank`."""
        if self.Y is None:
            _, s, Vh = torch.linalg.svd(torch.cat(self.rows).double(), full_matrices=False)
            V = Vh.T[:, : numerical_rank(s, max(self.count, Vh.shape[1]))]
        elif self.omega is None:
            values, V = (part.flip(-1) for part in torch.linalg.eigh(self.Y.double()))
            # summed in float32: what is below its rounding is noise, not a direction
            s = values[values > 1e-6 * values[0]].sqrt()
            V = V[:, : len(s)]
        else:
            # Y was summed in float32, so what is below its rounding in the core is noise, not a direction.
            Y, omega = self.Y.double(), self.omega.double()
            core = omega.T @ Y
            values, Q = torch.linalg.eigh((core + core.T) / 2)
            kept = values > 1e-6 * values[-1]
            F = Y @ Q[:, kept] * values[kept].rsqrt()
            # F F^T is the sketch of X^T X. The eigenvectors of the small F^T F give its own; in float64 what they lose
            # of the smallest ones is below the noise, and twice as fast as an SVD of F.
            squares, R = torch.linalg.eigh(F.T @ F)
            squares, R = squares.flip(0), R.flip(1)
            s = squares[squares > 1e-12 * squares[0]].sqrt()
            # QR: rounding left the columns of the smallest values a little oblique
            V = torch.linalg.qr(F @ R[:, : min(len(s), rank)]).Q
        if energy < 1:
            rank = min(rank, int((s.square().cumsum(0) / self.total < energy).sum()) + 1)
        return V[:, :rank].float().contiguous()

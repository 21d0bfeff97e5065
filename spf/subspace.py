"""Safety subspaces: bases per weight matrix from factors, dense gradients or streamed activations."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spf.files import atomic_path


@dataclass(frozen=True)
class Factors:
    """A safety gradient in factored form, G = D^T X.

    X: (T, n) inputs of the layer, D: (T, m) gradients at its output, float32, over the T tokens of the anchors.
    """

    X: Tensor
    D: Tensor

    def dense(self) -> Tensor:
        """G (m, n)."""
        return self.D.T @ self.X

    def norm_squared(self) -> Tensor:
        """||G||_F^2 without forming G: <D D^T, X X^T>, 2 T^2 (m + n) FLOPs."""
        return ((self.D @ self.D.T) * (self.X @ self.X.T)).sum()

    def inner(self, G: Tensor) -> Tensor:
        """<G, D^T X> for a dense G (m, n): sum_t d_t^T G x_t, 2 T m n FLOPs."""
        return self.inner_block(G, slice(None), slice(None))

    def inner_block(self, G: Tensor, rows: slice, columns: slice) -> Tensor:
        """The part of <., D^T X> that the rectangle G of those rows and columns gives, on G's device."""
        D, X = self.D[:, rows].to(G.device), self.X[:, columns].to(G.device)
        return ((D @ G.to(D.dtype)) * X).sum()

    def block(self, rows: slice, columns: slice, like: Tensor) -> Tensor:
        """The rectangle of D^T X, float32, on the device of `like`."""
        return self.D[:, rows].to(like.device).T @ self.X[:, columns].to(like.device)

    def svd(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Top singular triplets U (m, k), s (all of the spectrum), V (n, k), with k <= rank.

        QR of both factors and an SVD of the T x T core: O(T^2 (m + n)). k is smaller where the gradient
        has fewer non-zero singular values.
        """
        reflectors, cores = [], []
        for factor in (self.D, self.X):
            a, tau = torch.geqrf(factor.T)
            reflectors.append((a, tau))
            cores.append(a[: len(tau)].triu())
        U, s, Vh = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
        k = min(rank, numerical_rank(s, max(self.D.shape[1], self.X.shape[1])))
        bases = []
        for (a, tau), part in zip(reflectors, (U[:, :k], Vh[:k].T), strict=True):
            # Q times k columns, without forming Q
            padded = part.new_zeros(len(a), k)
            padded[: len(part)] = part
            bases.append(torch.ormqr(a, tau, padded))
        return bases[0], s, bases[1]


def svd_dense(G: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets U (m, k), s (all), V (n, k) of a dense gradient (m, n)."""
    U, s, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    k = min(rank, numerical_rank(s, max(G.shape)))
    return U[:, :k], s, Vh[:k].T


def numerical_rank(s: Tensor, size: int) -> int:
    """How many singular values are more than rounding (the tolerance of numpy's matrix_rank)."""
    if s.numel() == 0 or s[0] == 0:
        return 0
    return int((s > s[0] * size * torch.finfo(s.dtype).eps).sum())


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


def outside(V: Tensor, free: Tensor) -> Tensor:
    """An orthonormal basis (n, <= k) of what V (n, k) spans orthogonally to the basis `free` (n, q)."""
    rest = V - free @ (free.T @ V)
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
    arXiv 0909.4061, section 5.5), so memory stays at 2 n size numbers however many prompts there are.
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
        if self.omega is None or self.Y is None:
            n = X.shape[1]
            self.omega = _test_matrix(n, min(self.size, n), X.device)
            self.Y = torch.zeros_like(self.omega)
        self.Y += X.T @ (X @ self.omega)

    def basis(self, rank: int, energy: float = 1.0) -> Tensor:
        """V (n, k), float32: the fewest directions that hold the share `energy` of the rows, at most `rank`."""
        if self.omega is None or self.Y is None:
            _, s, Vh = torch.linalg.svd(torch.cat(self.rows).double(), full_matrices=False)
            V = Vh.T[:, : numerical_rank(s, max(self.count, Vh.shape[1]))]
        else:
            # Y was summed in float32, so what is below its rounding in the core is noise, not a direction.
            Y, omega = self.Y.double(), self.omega.double()
            core = omega.T @ Y
            values, Q = torch.linalg.eigh((core + core.T) / 2)
            kept = values > 1e-6 * values[-1]
            V, s, _ = torch.linalg.svd(Y @ Q[:, kept] * values[kept].rsqrt(), full_matrices=False)
        if energy < 1:
            rank = min(rank, int((s.square().cumsum(0) / self.total < energy).sum()) + 1)
        return V[:, :rank].float().contiguous()


@dataclass
class SafetySubspace:
    """Bases per weight matrix, by parameter name, with the numbers that describe how they were made.

    left: U (m, k); right: V (n, k); target: W_0 V (m, k), what the null-space rule holds. A matrix may
    have some of them only.
    """

    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, its metadata as JSON in the header, atomically."""
        tensors = {
            f"{kind}/{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)  # bases may be shared
            for kind, bases in (("left", self.left), ("right", self.right), ("target", self.target))
            for name, tensor in bases.items()
        }
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"format": "spf-subspace-1", "spf": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> "SafetySubspace":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not a subspace of this format.
        """
        subspace = cls()
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "spf-subspace-1":
                raise ValueError(f"{path}: not a safety subspace written by spf")
            subspace.metadata = json.loads(metadata["spf"])
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, name = key.split("/", 1)
                {"left": subspace.left, "right": subspace.right, "target": subspace.target}[kind][name] = (
                    file.get_tensor(key)
                )
        return subspace

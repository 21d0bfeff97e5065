"""Safety subspaces: gradients in factors, their bases, and the bases of all matrices in a file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, Json
from safetensors.torch import save_file
from torch import Tensor

from spf.config import File, parse_json
from spf.files import atomic_path, read_tensors
from spf.linalg import exact_matmul


@dataclass(frozen=True)
class Factors:
    """A safety gradient in factored form, G = D^T X.

    X: (T, n) inputs of the layer, D: (T, m) gradients at its output, float32, over the T tokens of the anchors.
    """

    X: Tensor
    D: Tensor

    def dense(self) -> Tensor:
        """G (m, n)."""
        return exact_matmul(self.D.T, self.X)

    def norm_squared(self) -> Tensor:
        """||G||_F^2 without forming G: <D D^T, X X^T>, 2 T^2 (m + n) FLOPs."""
        return (exact_matmul(self.D, self.D.T) * exact_matmul(self.X, self.X.T)).sum()

    def inner_block(self, G: Tensor, rows: slice, columns: slice) -> Tensor:
        """The part of <., D^T X> = sum_t d_t^T G x_t that the rectangle G (of those rows and columns) gives."""
        D, X = self.D[:, rows].to(G.device), self.X[:, columns].to(G.device)
        return (exact_matmul(D, G) * X).sum()

    def block(self, rows: slice, columns: slice, like: Tensor) -> Tensor:
        """The rectangle of D^T X, float32, on the device of `like`."""
        return exact_matmul(self.D[:, rows].to(like.device).T, self.X[:, columns].to(like.device))

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
        U, s, Vh = torch.linalg.svd(exact_matmul(cores[0], cores[1].T), full_matrices=False)
        k = min(rank, numerical_rank(s, max(self.D.shape[1], self.X.shape[1])))
        bases = []
        for (a, tau), part in zip(reflectors, (U[:, :k], Vh[:k].T), strict=True):
            # Q times k columns, without forming Q
            padded = part.new_zeros(len(a), k)
            padded[: len(part)] = part
            bases.append(torch.ormqr(a, tau, padded))
        return bases[0], s, bases[1]


def numerical_rank(s: Tensor, size: int) -> int:
    """How many singular values are more than rounding (the tolerance of numpy's matrix_rank)."""
    if s.numel() == 0 or s[0] == 0:
        return 0
    return int((s > s[0] * size * torch.finfo(s.dtype).eps).sum())


FORMAT = "spf-subspace-2"
"""In the first, bases that matrices share were written once for each of them."""


START_ANEW = "a safety subspace that is damaged, or not written by spf; start the run anew"


class _Header(File):
    format: Literal["spf-subspace-1", "spf-subspace-2"]
    spf: Json[dict[str, str]]
    same: Json[dict[str, str]] = Field(default_factory=dict)


@dataclass
class SafetySubspace:
    """Bases per weight matrix, by parameter name, with the numbers that describe how they were made.

    right: V (n, k); target: W_0 V (m, k), what the null-space rule holds. reserve: R (n, r), directions
    that it may hold besides, orthogonal to V; reserve_target: W_0 R. A matrix may have some of them only, and several
    may share a basis.
    """

    right: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    reserve: dict[str, Tensor] = field(default_factory=dict)
    reserve_target: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        """How many are held, summed over the matrices."""
        return sum(V.shape[1] for V in self.right.values())

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {
            "right": self.right,
            "target": self.target,
            "reserve": self.reserve,
            "reserve_target": self.reserve_target,
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, every basis once, its metadata as JSON in the header, atomically."""
        tensors: dict[str, Tensor] = {}
        written: dict[int, str] = {}
        same: dict[str, str] = {}
        for kind, bases in self._kinds().items():
            for name, tensor in bases.items():
                key = f"{kind}/{name}"
                if id(tensor) in written:
                    same[key] = written[id(tensor)]
                else:
                    written[id(tensor)] = key
                    tensors[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        header = {"format": FORMAT, "spf": json.dumps(self.metadata), "same": json.dumps(same)}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> "SafetySubspace":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a subspace of this format, or is damaged.
        """
        tensors, header = read_tensors(Path(path), "a safety subspace", START_ANEW)
        about = parse_json(_Header, json.dumps(header), path, START_ANEW)
        subspace = cls(metadata=about.spf)
        kinds = subspace._kinds()
        for key, first in {**dict(zip(tensors, tensors, strict=True)), **about.same}.items():
            kind, _, name = key.partition("/")
            if kind not in kinds or first not in tensors:
                raise ValueError(f"{path}: holds nothing for {key if kind not in kinds else first}; {START_ANEW}")
            kinds[kind][name] = tensors[first]
        subspace.check(str(path))
        return subspace

    def check(self, where: str) -> None:
        """Refuse what holds nothing, or something else than it says; `where` begins the message.

        Raises:
            ValueError: a basis has no direction, is not orthonormal, or does not fit its target.
        """
        checked: set[int] = set()
        for bases in (self.right, self.reserve):
            for name, V in bases.items():
                if not V.is_floating_point():
                    raise ValueError(f"{where}: the basis of {name} is of the type {V.dtype}; {START_ANEW}")
                if bases is self.reserve and V.dim() == 2 and V.shape[1] == 0:
                    continue  # all of it is held by now
                if V.dim() != 2 or V.shape[1] == 0:
                    raise ValueError(f"{where}: the basis of {name} has no direction, so nothing would be held there")
                if id(V) in checked:
                    continue
                checked.add(id(V))
                product = exact_matmul(V.T, V)
                if not float((product - torch.eye(V.shape[1], device=V.device)).abs().max()) <= 1e-3:
                    raise ValueError(f"{where}: the basis of {name} is not orthonormal; it is damaged or not a basis")
        for name, R in self.reserve.items():
            held = self.right.get(name)
            if (
                held is None
                or len(held) != len(R)
                or not float(exact_matmul(held.T, R.to(held.device)).abs().sum()) <= 1e-3 * R.numel()
            ):
                raise ValueError(f"{where}: the reserve of {name} does not fit its basis; {START_ANEW}")
        targets = [(name, target, self.right.get(name)) for name, target in self.target.items()]
        targets += [(name, target, self.reserve.get(name)) for name, target in self.reserve_target.items()]
        for name, target, basis in targets:
            fits = basis is not None and target.dim() == 2 and target.shape[1] == basis.shape[1]
            if not fits or not target.is_floating_point():
                raise ValueError(f"{where}: basis and target of {name} do not fit each other")
            if not bool(torch.isfinite(target).all()):
                raise ValueError(f"{where}: the target of {name} holds NaN or inf")

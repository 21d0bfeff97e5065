"""What all packed experts of a layer read together: directions for those that few safety tokens reach."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spf.bases import InputSketch
from spf.linalg import exact_matmul


class Pools:
    """Sketches of the inputs of all experts of a layer, by the name of the parameter that packs them."""

    def __init__(self, experts: Sequence[str], size: int):
        """experts: names of their matrices, `parameter[number]`."""
        self.experts = set(experts)
        self.sketches = {pool_of(name): InputSketch(size) for name in experts}

    def add(self, name: str, x: Tensor, weights: Tensor) -> None:
        """Take in what a matrix reads, if it is an expert's."""
        if name in self.experts:
            self.sketches[pool_of(name)].add(x, weights)

    def fill(
        self, bases: Mapping[str, Tensor], counts: Mapping[str, int], rank: int, energy: float
    ) -> dict[str, Tensor]:
        """The bases, with those of experts that fewer than `rank` tokens reached filled up by the layer's."""
        filled = dict(bases)
        pooled = {name: sketch.basis(rank, energy) for name, sketch in self.sketches.items() if sketch.count}
        for name in self.experts:
            if counts.get(name, 0) < rank and (pool := pool_of(name)) in pooled:
                own = bases.get(name)
                filled[name] = pooled[pool] if own is None else joined(own, pooled[pool], rank)
        return filled


def pool_of(name: str) -> str:
    """The name of the parameter that packs this expert's matrix."""
    return name.partition("[")[0]


def joined(V: Tensor, more: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (n, <= rank): V (n, k) as it is, then what `more` (n, q) adds to it.

    Where that does not fit, the columns of `more` count the less the later they come.
    """
    weights = torch.arange(1, more.shape[1] + 1, device=more.device, dtype=torch.float64).rsqrt()
    rest = (more.double() - V.double() @ (V.double().T @ more.double())) * weights
    U, s, _ = torch.linalg.svd(rest, full_matrices=False)
    new = U[:, s > 1e-3].to(V.dtype)  # what V spans already leaves rounding behind
    new = new - exact_matmul(V, exact_matmul(V.T, new))
    return torch.cat([V, new], 1)[:, :rank].contiguous()

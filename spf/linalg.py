"""The products of the core, to float32 rounding whatever autocast, TF32 or the operands' types say, and projections.

Conventions: a weight W and its gradient G are (m, n), y = W x. A left basis U is (m, k), a right basis V is (n, k),
both with orthonormal columns.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right", "both"]

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers add up to a number of that type: 8, 16 and 24 bits of mantissa."""


def exact_matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B (..., p), float32, of A (..., n) and B (n, p), float32 or narrower, to float32 rounding.

    Where the machine's float32 products are rounded (tensor cores; TF32, or a lower `float32_matmul_precision`, as
    `torch_compile=True` and `tf32=True` switch on), the operands are split into bfloat16 parts whose products are exact
    and are added up in float32. No flag is read or set, torch has four of them: what a product gives is looked at.
    """
    with _without_autocast(A.device):
        if _tensor_cores(A.device) or not float32_is_exact(A.device):
            return split_matmul(A, B)
        return A.float() @ B.float()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def split_matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, float32, of A (..., n) and B (n, p) as a sum of bfloat16 products with float32 accumulation.

    float32 operands are three parts each; the six products whose size is above float32 rounding are made, so the error
    is that of a float32 product. A bfloat16 operand is one part, and saves half. Henry, Tang, Heinecke, arXiv
    1904.06376.
    """
    left, right = bfloat16_parts(A), bfloat16_parts(B)
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < PARTS[torch.float32]]
    total = A.new_zeros(*A.shape[:-1], B.shape[-1], dtype=torch.float32)
    for i, j in sorted(pairs, key=sum, reverse=True):  # the smallest first, so that they are not lost
        total += _product(left[i], right[j])
    return total


def bfloat16_parts(X: Tensor) -> list[Tensor]:
    """bfloat16 tensors, each the rest rounded, that add up to X: one of bfloat16, two of float16, three of float32."""
    parts, rest = [], X
    for _ in range(PARTS[X.dtype]):
        parts.append(rest.to(torch.bfloat16))
        rest = rest.float() - parts[-1].float()
    return parts


def float32_is_exact(device: torch.device) -> bool:
    """Whether a float32 product on this device keeps the 12th bit of its operands now; TF32 keeps 10, bfloat16 7."""
    operand, eye = _canary(device)
    return bool(torch.equal(operand @ eye, operand))


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A B in float32 of bfloat16 operands: on tensor cores where there are any, else widened, which changes nothing."""
    if _tensor_cores(A.device):
        return torch.mm(A.flatten(0, -2), B, out_dtype=torch.float32).view(*A.shape[:-1], B.shape[-1])
    return A.float() @ B.float()


@lru_cache
def _tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _canary(device: torch.device) -> tuple[Tensor, Tensor]:
    # 32 rows: torch multiplies smaller ones by another kernel, which rounds nothing
    return torch.full((32, 32), 1 + 2.0**-12, device=device), torch.eye(32, device=device)


def project_out_right(G: Tensor, V: Tensor) -> Tensor:
    """G (I - V V^T): what is left of G (m, n) outside the input directions V (n, k). 4 m n k FLOPs."""
    return G - exact_matmul(exact_matmul(G, V), V.T)


def components(G: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """What G (m, n) has in the safety subspace: U^T G (k, n) on the left, G V (m, k) on the right, U^T G V (both).

    Of a part of G, with the same part of the bases' rows, it is that part's share: the shares of all parts
    sum up to the whole's on the left and for both, and on the right over the parts of a row.
    """
    if side == "left":
        return exact_matmul(U.T, G)
    if side == "right":
        return exact_matmul(G, V)
    return exact_matmul(exact_matmul(U.T, G), V)


def without_components(G: Tensor, C: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """G without the components C that `components` gave; of a part of G too, with the whole's C."""
    if side == "left":
        return G - exact_matmul(U, C)
    if side == "right":
        return G - exact_matmul(C, V.T)
    return G - exact_matmul(exact_matmul(U, C), V.T)


def stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor of many of one shape that may lie on several devices, on the first one's."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])

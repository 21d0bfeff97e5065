"""Inputs of matrices whose layers are not called: kernels that compute a layer, or a whole block, from its weights.

Unsloth's compiled forward calls PEFT's layer and nothing in it; axolotl's kernels, and some models' own, call not even
that. The products are torch's all the same, and can be seen where they are made.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = (
    "if its layers are computed by fused kernels, turn these off (axolotl: lora_qkv_kernel, lora_o_kernel and "
    "lora_mlp_kernel: false; Unsloth: UNSLOTH_COMPILE_DISABLE=1)"
)

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
"""Operations whose arguments, from that one on, are the operands of a product."""

COPIES = {aten._to_copy, aten.clone}
"""Operations that give a weight's values other memory: a cast to the type of the inputs, say."""


class Products(TorchDispatchMode):
    """While it is on, `see` is told what weights W (m, n) are multiplied with: name, x (..., n), product (..., m)."""

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[str, Tensor, Tensor], None]):
        super().__init__()
        self.shapes = {name: tuple(W.shape) for name, W in weights.items()}
        self.see = see
        self._names = {_memory(W): name for name, W in weights.items()}
        self._copies: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind in COPIES and (name := self._names.get(_memory(args[0]))):
            self._names[_memory(out)] = name
            self._copies.append(out)  # or its memory would be given to another tensor
        elif kind in PRODUCTS:
            left, right = args[PRODUCTS[kind] : PRODUCTS[kind] + 2]
            if (name := self._names.get(_memory(right))) and right.shape[-2:] == self.shapes[name][::-1]:
                self.see(name, left.detach(), out.detach())
            elif (name := self._names.get(_memory(left))) and left.shape[-2:] == self.shapes[name]:
                self.see(name, right.detach().mT, out.detach().mT)
        return out


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()

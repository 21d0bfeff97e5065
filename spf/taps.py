"""What a model's matrices are given and answer, wherever that shows: at layers, around them, or at the products."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spf.experts import Expert, watching
from spf.fused import Products
from spf.matrices import Matrix

Seen = Callable[[Tensor, Tensor, Tensor | None], None]
"""Takes what a matrix was given (..., n) and answered (..., m), and which token each row is, if that is known."""

Way = Literal["around", "products"]


class Taps:
    """The places where the inputs of a model's matrices are seen.

    bypassed: matrices whose layers are not called, because a kernel reads their weights, and where their inputs are
    seen instead: at PEFT's layer around lora_A, or where torch multiplies.
    """

    def __init__(self, model: nn.Module, matrices: Mapping[str, Matrix]):
        self.model = model
        self.matrices = matrices
        self.bypassed: dict[str, Way] = {}

    def plain(self, names: Iterable[str]) -> list[str]:
        """Those that are not one expert's of packed ones."""
        return [name for name in names if not self.matrices[name].expert]

    def find_bypassed(self, names: Iterable[str], called: Callable[[list[str]], set[str]]) -> bool:
        """Look for the inputs of matrices whose layers are not called; whether any is seen.

        called: sends a sample through the model, and says which of these matrices show.
        """
        left, before = set(names) - self.bypassed.keys(), len(self.bypassed)
        ways: tuple[Way, ...] = ("around", "products")
        for way in ways:
            tried = sorted(name for name in left if way == "products" or self.matrices[name].is_lora_a)
            if tried:
                self.bypassed |= dict.fromkeys(tried, way)
                seen = called(tried)
                for name in set(tried) - seen:
                    del self.bypassed[name]
                left -= seen
        return len(self.bypassed) > before

    def answers_of(self, name: str, lora_b: str) -> str:
        """Whose answers move as those of this matrix: lora_B's, which follows on it, where that is a layer's."""
        return name if self.matrices[name].expert or name in self.bypassed else lora_b

    @contextmanager
    def open(self, tap: Callable[[str], Seen], names: Iterable[str]) -> Iterator[None]:
        """Have `tap(name)` see every call of the named matrices."""
        experts: dict[Expert, list[str]] = {}
        products: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in names:
                matrix, way = self.matrices[name], self.bypassed.get(name)
                if matrix.expert:
                    experts.setdefault(matrix.expert, []).append(name)
                elif way == "products":
                    products[name] = matrix.view(matrix.weight)
                elif way == "around":
                    layer = self.model.get_submodule(name.partition(".lora_A.")[0])
                    stack.callback(layer.register_forward_hook(_around(tap(name), matrix)).remove)
                else:
                    for module in matrix.modules:
                        stack.callback(module.register_forward_hook(_at(tap(name))).remove)
            if products:
                stack.enter_context(Products(products, lambda name, x, y: tap(name)(x, y, None)))
            if experts:

                def see(expert: Expert, x: Tensor, y: Tensor, tokens: Tensor) -> None:
                    for name in experts.get(expert, ()):
                        tap(name)(x, _answer(self.matrices[name], x, y), tokens)

                stack.enter_context(watching(list({id(e.layer): e.layer for e in experts}.values()), see))
            yield


def _at(see: Seen) -> Callable:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        # a router may be a linear layer that answers more than its product
        y = output if isinstance(output, Tensor) else nn.functional.linear(inputs[0], module.weight)
        see(inputs[0], y, None)

    return hook


def _around(see: Seen, matrix: Matrix) -> Callable:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(inputs[0], _answer(matrix, inputs[0], output), None)

    return hook


def _answer(matrix: Matrix, x: Tensor, whole: Tensor) -> Tensor:
    """What a matrix answers whose layer is not called; `whole` is the answer of the one that the adapter belongs to.

    Where gradients are wanted it is that one: it moves as lora_B's does, and lora_A has no answer in the graph.
    """
    if not matrix.is_lora_a or torch.is_grad_enabled():
        return whole
    W = matrix.view(matrix.weight)
    return nn.functional.linear(x.to(W.dtype), W)

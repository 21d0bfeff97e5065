"""Packed experts: mixture-of-experts layers that keep all experts' matrices in one parameter (E, m, n).

Their inputs never pass through a module of their own. transformers lets the function be exchanged that computes such a
layer; the one here does it expert by expert, and says what each is given.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

CAPTURE = "spf"
"""Name of the function among transformers' experts functions, while samples are sent through a model."""

MARKS = {"config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed"}
"""What transformers' `use_experts_implementation` notes on a layer whose function can be exchanged."""


@dataclass(frozen=True)
class Expert:
    """One expert's matrix: `layer` packs it in its parameter `name`, at `index`."""

    layer: nn.Module
    name: str
    index: int


See = Callable[[Expert, Tensor, Tensor, Tensor], None]
"""What an expert's matrix was given (T, n) and answered (T, m), and which tokens these are (T,), counted in a row."""


def is_packed(layer: nn.Module) -> bool:
    """Whether it is a layer of packed experts whose function transformers lets one exchange."""
    return vars(layer).keys() >= MARKS


def packed_names(layer: Any) -> tuple[str, str]:
    """The parameters that hold the experts' first and second matrix."""
    return ("gate_up_proj" if layer.has_gate else "up_proj"), "down_proj"


def adapted_experts(wrapper: ParamWrapper) -> list[Expert] | None:
    """The experts whose matrices this LoRA on a parameter changes, if lora_A is on their input side; else None."""
    layer, name = wrapper.get_base_layer(), wrapper.parameter_name
    if (
        not is_packed(layer)
        or name not in packed_names(layer)
        or wrapper._did_swap_in_out_features == layer.is_transposed
    ):
        return None
    return [Expert(layer, name, i) for i in range(wrapper.num_experts)]


@contextmanager
def watching(layers: Sequence[Any], see: See) -> Iterator[None]:
    """Have these layers of packed experts say what each expert is given; what they compute stays the same."""
    watched = set(layers)

    def forward(layer: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return _one_by_one(layer, x, chosen, weights, see if layer in watched else None)

    # several layers share a configuration
    configs = {id(layer.config): layer.config for layer in layers}
    before = {key: config._experts_implementation for key, config in configs.items()}
    ALL_EXPERTS_FUNCTIONS[CAPTURE] = forward
    try:
        for config in configs.values():
            config._experts_implementation_internal = CAPTURE
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        del ALL_EXPERTS_FUNCTIONS[CAPTURE]


def _one_by_one(layer: Any, x: Tensor, chosen: Tensor, weights: Tensor, see: See | None) -> Tensor:
    """What transformers' batched_mm_experts_forward computes. x (T, n); chosen, weights (T, k)."""
    first, second = packed_names(layer)
    total = torch.zeros_like(x)
    for i in range(layer.num_experts):
        tokens, place = torch.where(chosen == i)
        if not len(tokens):
            continue
        inputs = x[tokens]
        answers = _linear(layer, first, i, inputs)
        if see is not None:
            see(Expert(layer, first, i), inputs, answers, tokens)
        answers = _biased(layer, first, i, answers)
        inputs = layer._apply_gate(answers) if layer.has_gate else layer.act_fn(answers)
        answers = _linear(layer, second, i, inputs)
        if see is not None:
            see(Expert(layer, second, i), inputs, answers, tokens)
        answers = _biased(layer, second, i, answers)
        if layer.has_post_expert_norm:
            answers = layer.post_expert_norm(answers)
        total = total.index_add(0, tokens, (answers * weights[tokens, place, None]).to(total.dtype))
    return total


def _linear(layer: Any, name: str, i: int, x: Tensor) -> Tensor:
    W = getattr(layer, name)[i]
    return nn.functional.linear(x, W.T if layer.is_transposed else W)


def _biased(layer: Any, name: str, i: int, y: Tensor) -> Tensor:
    return y + getattr(layer, f"{name}_bias")[i] if layer.has_bias else y

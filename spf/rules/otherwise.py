"""Layers that are linear by their class, and answer otherwise than W x: what is held there holds nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spf.data import Anchor
from spf.errors import UnsupportedModelError
from spf.models import evaluating
from spf.run import Run

ALIKE = 2**-6
"""Of the answer's norm: what rounding to bfloat16 leaves is a quarter of it."""


ROWS = 64
"""Of W so many rows are looked at."""


def refuse_otherwise(run: Run, samples: Sequence[Anchor]) -> None:
    """Ask layers with a `forward` of their own once, and compare with W x + b.

    Raises:
        UnsupportedModelError: one answers otherwise (quantisation-aware training rounds W first, say).
    """
    own = {
        module: name
        for name, matrix in run.matrices.items()
        for module in matrix.modules
        if isinstance(module, nn.Linear) and _has_its_own(module)
    }
    if not own or not samples or run.sharding.split:
        return
    wrong: list[str] = []

    def compare(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs:
            # accelerate may have put the layer on another device than what comes in
            W, b = module.weight[:ROWS].float(), None if module.bias is None else module.bias[:ROWS].float()
            y = output[..., :ROWS].float().to(W.device)
            expected = functional.linear(inputs[0].float().to(W.device), W, b)
            if not float((y - expected).norm()) <= ALIKE * float(expected.norm()):
                wrong.append(own[module])

    handles = [module.register_forward_hook(compare) for module in own]
    model: Any = run.probe.model
    ids = torch.tensor([[*samples[0].prompt_ids, *samples[0].refusal_ids]], device=next(model.parameters()).device)
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        kind = type(next(module for module, name in own.items() if name == wrong[0])).__name__
        raise UnsupportedModelError(
            f"{wrong[0]} and {len(set(wrong)) - 1} more are in layers ({kind}) that answer otherwise than W x + b, so "
            "null-space, which holds W V, would hold nothing of their answers; train without quantisation-aware "
            "layers, or freeze these"
        )


def _has_its_own(module: nn.Module) -> bool:
    # accelerate's hooks call what was there before
    patched = "forward" in vars(module) and "_hf_hook" not in vars(module)
    return type(module).forward is not nn.Linear.forward or patched

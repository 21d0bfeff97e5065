"""RESTA: add the safety vector to the fine-tuned weights (Bhardwaj et al., arXiv 2402.11746)."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def add_safety_vector(
    model: PreTrainedModel,
    aligned: Mapping[str, Tensor],
    unaligned: Mapping[str, Tensor],
    scale: float = 0.5,
    drop: float = 0.0,
    seed: int = 0,
) -> None:
    """W <- W + scale * (W_aligned - W_unaligned) for every parameter, in place.

    With `drop` the change that fine-tuning made is sparsified first, as in the paper's variant with DARE
    (Yu et al., arXiv 2311.03099): each element of W - W_aligned is dropped with that probability, and
    those kept are divided by 1 - drop. Computed in float32; which elements are dropped depends on the seed only.

    Args:
        model: a full model, or an adapter merged into its base.
        aligned, unaligned: weights by parameter name, as in `model.state_dict()`: the model before
            fine-tuning, and one whose refusals were trained away.
        scale: the paper's gamma.

    Raises:
        ValueError: a model with an unmerged adapter, a drop outside [0, 1), or a parameter that is missing or
            shaped differently in `aligned` or `unaligned`. Nothing is changed then.
    """
    if isinstance(model, PeftModel):
        raise ValueError("the safety vector is added to merged weights; call merge_and_unload() first")
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be at least 0 and below 1, not {drop}")
    for name, parameter in model.named_parameters():
        for label, weights in (("aligned", aligned), ("unaligned", unaligned)):
            if name not in weights:
                raise ValueError(f"{name}: the {label} weights do not have it")
            if weights[name].shape != parameter.shape:
                raise ValueError(
                    f"{name}: shape {tuple(parameter.shape)}, but {tuple(weights[name].shape)} in the {label} weights"
                )
    # on the CPU whatever the device, so that a seed means the same elements everywhere
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        reference = aligned[name].to(parameter.device, torch.float32)
        safety = reference - unaligned[name].to(parameter.device, torch.float32)
        tuned = parameter.float()
        if drop > 0:
            kept = torch.rand(parameter.shape, generator=generator).to(parameter.device) >= drop
            tuned = reference + (tuned - reference) * kept / (1 - drop)
        parameter.copy_(tuned + scale * safety)

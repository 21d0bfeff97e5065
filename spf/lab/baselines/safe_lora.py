"""Safe LoRA: project LoRA updates onto the alignment of the base model (Hsu et al., arXiv 2405.16833)."""

import re
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spf.errors import UnsupportedModelError


def plain_name(name: str) -> str:
    """A parameter's name as the base model has it: without PEFT's prefix, `.base_layer` and `.lora_A.default`."""
    return re.sub(r"\.(base_layer|lora_A\.[^.]+)\.weight$", ".weight", name.removeprefix("base_model.model."))


def lora_layers(model: PeftModel) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """(plain name of the weight, base layer, A (r, n), B (m, r)) of every adapted linear layer.

    Raises:
        UnsupportedModelError: a merged adapter, more than one active adapter, DoRA, or an adapted embedding.
    """
    found = False
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise UnsupportedModelError(f"{name}: its adapter is merged; unmerge it first")
        if len(layer.active_adapters) != 1:
            raise UnsupportedModelError(f"{name}: needs one active adapter, not {list(layer.active_adapters)}")
        adapter = layer.active_adapters[0]
        if adapter in layer.lora_variant:
            raise UnsupportedModelError(f"{name}: a variant of LoRA (DoRA or another); only plain LoRA is supported")
        if adapter in layer.lora_embedding_A:
            raise UnsupportedModelError(f"{name}: an adapted embedding; adapt linear layers only")
        if adapter in layer.lora_A:
            found = True
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
                raise UnsupportedModelError(f"{name}: an adapted {type(layer).__name__}; adapt linear layers only")
            yield plain_name(f"{name}.weight"), layer.get_base_layer(), down.weight, up.weight
    if not found:
        raise UnsupportedModelError("the model has no active LoRA adapter on a linear layer")


@torch.no_grad()
def apply_safe_lora(
    model: PeftModel, aligned: Mapping[str, Tensor], unaligned: Mapping[str, Tensor], threshold: float
) -> int:
    """Replace dW by C dW where cos(dW, C dW) < threshold, in place; returns how many matrices it was.

    dW = s B A is the update of one matrix, V = W_aligned - W_unaligned (m, n), and C = V V^T / ||V||_F, the
    paper's fast form of the projector V (V^T V)^-1 V^T. C is no projector: it also changes the
    size of the update, by up to the largest singular value of V. Applied to lora_B, as V (V^T B) / ||V||_F in
    float32: 4 m n r FLOPs and no m x m matrix; the cosine comes from r x r Gram matrices. An update that is
    zero is left alone.

    Args:
        model: plain LoRA on linear layers (or GPT-2's `Conv1D`), one active adapter, not merged.
        aligned, unaligned: weights by the base model's parameter names, as in its `state_dict()`.
        threshold: cosine in [-1, 1]; 1 or more projects every matrix.

    Raises:
        UnsupportedModelError: another kind of adapter.
        ValueError: a matrix is missing, shaped differently, or the same in both. Nothing is changed then.
    """
    layers = list(lora_layers(model))
    for name, base, A, B in layers:
        expected = (A.shape[1], B.shape[0]) if isinstance(base, Conv1D) else (B.shape[0], A.shape[1])
        for label, weights in (("aligned", aligned), ("unaligned", unaligned)):
            if name not in weights:
                raise ValueError(f"{name}: the {label} weights do not have it")
            if weights[name].shape != expected:
                raise ValueError(f"{name}: shape {expected}, but {tuple(weights[name].shape)} in the {label} weights")
        if torch.equal(aligned[name], unaligned[name]):
            raise ValueError(f"{name}: the same in the aligned and the unaligned weights, so it has no alignment")
    projected = 0
    for name, base, A, B in layers:
        V = aligned[name].to(B.device, torch.float32) - unaligned[name].to(B.device, torch.float32)
        if isinstance(base, Conv1D):
            V = V.T
        new = V @ (V.T @ B.float()) / V.norm()
        if bool(B.any()) and _cosine(B.float(), new, A.float()) < threshold:
            B.copy_(new)
            projected += 1
    return projected


def _cosine(B: Tensor, C: Tensor, A: Tensor) -> float:
    """The cosine of B A and C A, from r x r matrices: <B A, C A> = tr(B^T C A A^T)."""
    gram = A @ A.T

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return ((left.T @ right) * gram).sum()

    norm = (inner(B, B) * inner(C, C)).sqrt()
    return float(inner(B, C) / norm)

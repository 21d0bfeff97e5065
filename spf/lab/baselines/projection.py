"""The input-side null space, once after fine-tuning: a repair that needs only the aligned weights and the bases.

The same projection that the null-space rule makes after every step (`spf.rules.NullSpace`; GPM, arXiv
2103.09762, eq. 9; AlphaEdit, arXiv 2410.02355). Made once at the end it also removes what
fine-tuning learned to do with those inputs, so it costs utility, where the rule does not.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spf.lab.baselines.safe_lora import lora_layers, plain_name


@torch.no_grad()
def project_out_inputs(
    model: PeftModel | PreTrainedModel,
    bases: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None = None,
) -> int:
    """Undo, in place, what fine-tuning changed on the span of the bases; returns how many matrices were projected.

    LoRA: A <- A - (A V) V^T, so that B A V = 0. Full: W <- W - ((W - W_0) V) V^T, so that W V = W_0 V.
    Biases, norms and embeddings are left as they are.

    Args:
        model: plain LoRA with one active adapter, not merged, or a full model.
        bases: V (n, k), orthonormal columns, by the weight's name in the model or in its base model: what
            `SafetyProbe.input_bases` of the ALIGNED model gives. Bases of lora_B are not needed and not allowed.
        initial: the aligned weights W_0, as in `state_dict()`; for a full model only.

    Raises:
        UnsupportedModelError: another kind of adapter.
        ValueError: an adapted (LoRA) or changed (full) matrix has no basis, a basis fits no matrix or is not
            orthonormal, or `initial` is missing, unwanted, or lacks a matrix. Nothing is changed then.
    """
    named: dict[str, Tensor] = {}
    for name, V in bases.items():
        identity = torch.eye(V.shape[1], device=V.device)
        if not torch.allclose(V.float().T @ V.float(), identity, atol=1e-3):
            raise ValueError(f"{name}: the columns of its basis are not orthonormal")
        named[plain_name(name)] = V
    if isinstance(model, PeftModel):
        if initial is not None:
            raise ValueError("initial is for full models; an adapter is projected towards no change at all")
        targets = {name: A for name, _, A, _ in lora_layers(model)}
        _check(named, targets)
        for name, A in targets.items():
            _project(A, torch.zeros_like(A), named[name])
        return len(targets)
    if initial is None:
        raise ValueError("a full model is projected towards its aligned weights; pass them as initial")
    # a tied output layer is an embedding
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in embeddings
    }
    for name, module in matrices.items():
        if name not in initial:
            raise ValueError(f"{name}: the initial weights do not have it")
        if initial[name].shape != module.weight.shape:
            raise ValueError(
                f"{name}: shape {tuple(module.weight.shape)}, but {tuple(initial[name].shape)} in the initial weights"
            )
    changed = {
        name: module
        for name, module in matrices.items()
        if name in named or not torch.equal(module.weight, initial[name].to(module.weight))
    }
    _check(named, {name: module.weight.T if _transposed(module) else module.weight for name, module in changed.items()})
    for name, module in changed.items():
        W, W_0 = module.weight, initial[name].to(module.weight.device)
        _project(W.T if _transposed(module) else W, W_0.T if _transposed(module) else W_0, named[name])
    return len(changed)


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def _check(bases: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, W in targets.items():
        if name not in bases:
            raise ValueError(f"{name}: no basis for this matrix, so it would stay as fine-tuning left it")
        if bases[name].shape[0] != W.shape[1]:
            raise ValueError(f"{name}: has {W.shape[1]} inputs, its basis {bases[name].shape[0]}")
    for name in bases:
        if name not in targets:
            raise ValueError(f"{name}: there is a basis, but no such matrix to project")


def _project(W: Tensor, start: Tensor, V: Tensor) -> None:
    """W <- W - ((W - W_0) V) V^T in place; W and W_0 (m, n)."""
    V = V.to(W.device, torch.float32)
    W.sub_((((W.float() - start.float()) @ V) @ V.T).to(W.dtype))

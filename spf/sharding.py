"""What the model runs on: finds the innermost optimizer and refuses set-ups that cannot be right."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor


class UnsupportedSetupError(RuntimeError):
    """A launcher or optimizer the safety rules cannot act on; the message says what to change."""


def innermost_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that changes the parameters, from whatever accelerate wrapped around it.

    Raises:
        UnsupportedSetupError: DeepSpeed, or a wrapper without torch's step hooks.
    """
    if type(optimizer).__module__.startswith(("accelerate.utils.deepspeed", "deepspeed.")):
        raise UnsupportedSetupError(
            "DeepSpeed is not supported by this version of spf; launch with DDP (accelerate launch --multi_gpu)"
        )
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedSetupError("LBFGS evaluates its closure many times a step; use another optimizer")
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise UnsupportedSetupError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} has no step hooks, so no rule can act; "
            "pass the torch.optim optimizer it wraps"
        )
    return optimizer


def check_parameters(model: nn.Module) -> None:
    """Refuse sharded parameters.

    Raises:
        UnsupportedSetupError: a parameter is a DTensor (FSDP2, tensor parallel) or partitioned by ZeRO-3.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or parameter.numel() == 0:
            raise UnsupportedSetupError(
                f"{name} is sharded (FSDP or ZeRO-3), which this version of spf does not support; launch with DDP"
            )


def same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite the tensors with rank 0's, so that ranks cannot differ by rounding. No-op on one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name in sorted(tensors):
            torch.distributed.broadcast(tensors[name], src=0)

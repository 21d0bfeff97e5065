"""DeepSpeed ZeRO: the one file that reads its insides, as they are in the version `KNOWN`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.versions import compare_versions
from torch import Tensor, nn

from spf.errors import UnsupportedSetupError
from spf.sharding.blocks import Part, flat_part, local

KNOWN = "0.19.8"
"""The version of DeepSpeed that was read. Older ones were not tried; a newer one has to have the same attributes."""


class Zero:
    """DeepSpeed's ZeRO optimizer: the torch optimizer inside it, and where the parts of the parameters lie in that."""

    def __init__(self, zero: Any):
        """
        Raises:
            UnsupportedSetupError: an older DeepSpeed, or one of its optimizers whose partitions are not known.
        """
        if compare_versions("deepspeed", "<", KNOWN):
            raise UnsupportedSetupError(f"DeepSpeed below {KNOWN} is not supported; pip install 'deepspeed>={KNOWN}'")
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        # Subclasses (SuperOffload) and the others lay their partitions out differently.
        if type(zero) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
            raise UnsupportedSetupError(
                f"DeepSpeed's {type(zero).__name__} is not supported; use zero_stage 1, 2 or 3 in bf16 or fp32, "
                "with gradients accumulated in the same type"
            )
        self.zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer
        self._stage3 = type(zero) is DeepSpeedZeroOptimizer_Stage3

    def parts(self) -> dict[int, Part]:
        """This process's part of every parameter, by the parameter's id.

        Raises:
            UnsupportedSetupError: a feature of DeepSpeed that spf does not know, or a newer one with other insides.
        """
        try:
            return _stage3_parts(self.zero) if self._stage3 else _stage12_parts(self.zero)
        except AttributeError as error:
            raise UnsupportedSetupError(
                f"this DeepSpeed keeps its partitions otherwise than {KNOWN}, which spf knows ({error}); pip install "
                f"deepspeed=={KNOWN}"
            ) from error

    def forget_order(self) -> None:
        """Have stage 3 learn the order of the modules anew.

        A probe calls the output layer, TRL's fused losses do not: what would be prefetched for it is gone
        again when the backward pass comes.
        """
        if self._stage3:
            coordinator = self.zero.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def publish(self) -> None:
        """Copy the model's weights into the flat float32 partitions."""
        self.zero.refresh_fp32_params()


def is_zero(optimizer: Any) -> bool:
    """Whether it is one of DeepSpeed's own optimizers, which have no step hooks."""
    return type(optimizer).__module__.startswith("deepspeed.runtime")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut the parameter up, so that it is empty between uses."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return bool(is_zero_param(parameter))


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where this process holds a part of it or, in ZeRO-3, nothing."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)  # type: ignore[attr-defined]


def at_rest(tensor: Tensor) -> dict[str, Tensor]:
    """What this process holds of a parameter or buffer between two passes, by what of it that is; of one that ZeRO-3
    has cut up its part, and the whole of a small one, which stays."""
    if not is_partitioned(tensor):
        return {"": local(tensor.detach())}
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    own: Any = tensor
    whole = own.ds_persist and own.ds_status == ZeroParamStatus.AVAILABLE
    return {"": own.ds_tensor.detach(), **({" (whole)": own.detach()} if whole else {})}


@contextmanager
def gathered(parameter: nn.Parameter, edit: bool) -> Iterator[Tensor]:
    """The whole parameter for the while, on every process (all have to come here); with `edit` rank 0's counts."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small parameters stay whole between uses; leaving the context would cut them up for good.
    whole = parameter.ds_status == ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    if whole and not edit:
        yield parameter.data
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if edit else None):
        yield parameter.data
    if whole:
        parameter.all_gather()  # type: ignore[attr-defined]


def _stage12_parts(zero: Any) -> dict[int, Part]:
    """Stages 1 and 2: every group of parameters is one flat buffer, and every process holds an equal slice of it.

    The layout is read from the round-robin lists: `_hp_mapping` is wrong under round_robin_gradients (0.19.8).
    """
    _refuse(zero.zenflow, "ZenFlow", "leave zenflow out of the DeepSpeed configuration")
    _refuse(zero.has_moe_layers, "DeepSpeed's own mixture of experts", "use the model's own experts")
    parts = {}
    for i, holder in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[i]
        _refuse(
            dist.get_world_size(group) != dist.get_world_size(),
            "model or sequence parallelism with DeepSpeed",
            "give all processes to data parallelism",
        )
        length, low = holder.numel(), dist.get_rank(group) * holder.numel()
        borders = [rank * length for rank in range(1, dist.get_world_size(group))]
        for parameter, begin in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            cuts = [border - begin for border in borders]
            shape = tuple(parameter.shape)
            parts[id(parameter)] = flat_part(
                parameter, shape, holder, low - begin, low - begin + length, begin - low, cuts
            )
    return parts


def _stage3_parts(zero: Any) -> dict[int, Part]:
    """Stage 3: every parameter is cut into equal slices, and those of a sub-group lie one after the other."""
    _refuse(zero.zenflow, "ZenFlow", "leave zenflow out of the DeepSpeed configuration")
    _refuse(zero.swap_optimizer or zero.params_in_nvme_and_cpu, "NVMe offload", "offload to the CPU instead")
    _refuse(zero.offload_optimizer and zero.partial_offload != 1.0, "partial offload", "set its ratio to 1")
    _refuse(zero.use_muon, "DeepSpeed's Muon", "use another optimizer, AdamW say")
    parts = {}
    for group, holder in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            processes = dist.get_world_size(parameter.ds_process_group)
            _refuse(
                processes != dist.get_world_size(),
                "hierarchical partitioning or model parallelism with DeepSpeed",
                "let all processes share each parameter",
            )
            _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            low = dist.get_rank(parameter.ds_process_group) * length
            borders = [rank * length for rank in range(1, processes)]
            parts[id(parameter)] = flat_part(
                parameter, full_shape(parameter), holder, low, low + length, offset - low, borders
            )
    return parts


def _refuse(condition: bool, what: str, remedy: str) -> None:
    if condition:
        raise UnsupportedSetupError(f"{what} is not supported by spf; {remedy}")

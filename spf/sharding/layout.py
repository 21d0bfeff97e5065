"""What the model runs on: the one file that knows DTensors, ZeRO partitions and process groups.

Every part of a matrix that a process updates is a contiguous range of its flattened entries: all of it
(one process, DDP), whole rows (FSDP2), or any range (ZeRO). `Sharding` cuts such ranges into blocks,
rectangles of the matrix that are views of what the optimizer holds, so a step rule is one formula on
blocks. What a rule needs from other processes goes through `total` and `cut_products`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from spf.errors import UnsupportedSetupError


@dataclass(frozen=True)
class Block:
    """The rectangle [rows, columns] of a matrix, and its entries: a view (r, c), so in-place changes arrive.

    cut: it is a piece of one row, the rest of which another process holds.
    """

    rows: slice
    columns: slice
    tensor: Tensor
    cut: bool = False


@dataclass(frozen=True)
class Part:
    """This process's part of a parameter: `size` entries from `start` on of the parameter flattened.

    holder: the tensor that the optimizer steps, the parameter itself or DeepSpeed's flat fp32 partition,
    in which the part begins at `offset`. shape: the whole parameter's. cut_rows: rows (of a matrix) that a
    border between two processes cuts, the same list on every process.
    """

    parameter: nn.Parameter
    holder: Tensor
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int | None = None
    cut_rows: tuple[int, ...] = ()

    @property
    def rows(self) -> slice:
        """The rows of the matrix that the part has entries of."""
        columns = self.shape[1]
        return slice(self.start // columns, -(-(self.start + self.size) // columns) if self.size else 0)

    @property
    def owned(self) -> slice:
        """The rows whose first entry is in the part: every row is owned by one process."""
        columns = self.shape[1]
        return slice(-(-self.start // columns), self.rows.stop)

    def piece(self, tensor: Tensor) -> Tensor:
        """The part of the holder, its gradient or its optimizer state: flat, or the matrix's rows; a view."""
        if self.offset is not None:
            return tensor[self.offset : self.offset + self.size]
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def blocks(self, tensor: Tensor, transposed: bool = False) -> list[Block]:
        """The rectangles that the part consists of: the whole rows, and a piece of a row at either end."""
        columns = self.shape[1]
        piece = self.piece(tensor)
        if self.offset is None:
            whole = piece.T if transposed else piece
            rows = slice(0, len(whole)) if transposed else self.rows
            return [Block(rows, slice(0, whole.shape[1]), whole)] if whole.numel() else []
        blocks, at, end = [], self.start, self.start + self.size
        while at < end:
            row, column = divmod(at, columns)
            stop = end - end % columns if column == 0 and end - at >= columns else min(end, (row + 1) * columns)
            entries = piece[at - self.start : stop - self.start]
            if column == 0 and (stop - at) % columns == 0:
                blocks.append(Block(slice(row, stop // columns), slice(0, columns), entries.view(-1, columns)))
            else:
                used = slice(column, column + stop - at)
                blocks.append(Block(slice(row, row + 1), used, entries.view(1, -1), cut=True))
            at = stop
        return blocks


def innermost_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that changes the parameters, from whatever accelerate and DeepSpeed wrapped around it.

    Raises:
        UnsupportedSetupError: a wrapper without torch's step hooks, or one whose partitions are not known here.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    zero = _zero_optimizer(optimizer)
    if zero is not None:
        optimizer = zero.optimizer
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedSetupError("LBFGS evaluates its closure many times a step; use another optimizer")
    if type(optimizer).__module__.partition(".")[0] == "schedulefree":
        raise UnsupportedSetupError(
            f"{type(optimizer).__name__} evaluates and saves an average of the weights, which no rule corrects; use "
            "another optimizer"
        )
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise UnsupportedSetupError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} has no step hooks, so no rule can act; "
            "pass the torch.optim optimizer it wraps, or with DeepSpeed use zero_stage 1, 2 or 3"
        )
    return optimizer


def refuse_sharded(model: nn.Module, who: str) -> None:
    """For methods that need whole parameters.

    Raises:
        UnsupportedSetupError: a parameter is a DTensor (FSDP2, tensor parallel) or partitioned by ZeRO-3.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or _is_zero3(parameter):
            raise UnsupportedSetupError(f"{who} does not support sharded parameters, as {name} is; launch with DDP")


def shares_parameters(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters, so that a pass through the model needs all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    return any(isinstance(parameter, DTensor) or _is_zero3(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Have FSDP2 modules hold their parts again, which a pass through them may leave gathered: as other Parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where this process holds a part of it or, in ZeRO-3, nothing."""
    return tuple(parameter.ds_shape) if _is_zero3(parameter) else tuple(parameter.shape)  # type: ignore[attr-defined]


class Sharding:
    """Where the parameters are that an optimizer steps, and what the processes have to tell each other.

    parts: by parameter name. split: whether a process sees only a part of the matrices and their
    gradients (FSDP2, ZeRO), so that sums over entries need the other processes. With DDP and on one
    process nothing is split: every process holds everything, already averaged.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]):
        """`parameters` are those the caller will ask for, of the model as it was prepared for training.

        Raises:
            UnsupportedSetupError: FSDP1, tensor parallelism, hybrid sharding, CPU offload with FSDP2, NVMe or
                partial offload, ZenFlow or SuperOffload.
        """
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise UnsupportedSetupError("FSDP version 1 is not supported: set fsdp_version to 2")
        self.optimizer = innermost_optimizer(optimizer)
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._zero = _zero_optimizer(optimizer)
        if self._zero is not None:
            found = _zero3_parts(self._zero) if _is_stage3(self._zero) else _zero12_parts(self._zero)
            self.parts = {name: found[id(p)] for name, p in parameters.items() if id(p) in found}
        else:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            self.parts = {name: _local_part(name, p) for name, p in parameters.items() if id(p) in held}
        self.split = self._zero is not None or any(isinstance(part.holder, DTensor) for part in self.parts.values())
        self.flat = self._zero is not None
        """Whether a tensor of the optimizer holds parts of many parameters."""

    def stepped(self) -> set[str]:
        """The names that the current call of the optimizer's `step` changes; ZeRO makes one call a group."""
        holders = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name for name, part in self.parts.items() if id(part.holder) in holders}

    def calls(self, names: Sequence[str]) -> int:
        """In how many calls of the optimizer's `step` these parameters are stepped."""
        return len({id(self.parts[name].holder) for name in names}) if self._zero is not None else 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in one all-reduce; the tensor itself where nothing is split."""
        if not self.split or dist.get_world_size() == 1:
            return values
        device = values.device
        if dist.get_backend() == "nccl":
            values = values.cuda()
        dist.all_reduce(values)
        return values.to(device)

    def cut_products(self, tensors: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M V (rows, k) of the rows of each matrix M that a border cuts, their pieces summed over the processes.

        tensors: the holder of M, its gradient or state, by name. right: V (n, k) by name. The rows are those
        of `cut_rows`, in that order. One all-reduce for all matrices, none if no row is cut.
        """
        names = [name for name in tensors if self.parts[name].cut_rows]
        if not names:
            return {}
        sums = {}
        for name in names:
            part, V = self.parts[name], right[name]
            sums[name] = V.new_zeros(len(part.cut_rows), V.shape[1])
            for block in part.blocks(tensors[name]):
                if block.cut:
                    row = part.cut_rows.index(block.rows.start)
                    sums[name][row] += (block.tensor.float() @ V[block.columns])[0]
        flat = self.total(torch.cat([sums[name].flatten() for name in names]))
        split = flat.split([sums[name].numel() for name in names])
        return {name: piece.view_as(sums[name]) for name, piece in zip(names, split, strict=True)}

    @contextmanager
    def weight(self, name: str, transposed: bool = False, edit: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The model's own matrix (r, n) as far as this process can see it, and the number of its first row.

        It is a view; with `edit` what is written into it counts, after `publish()`. ZeRO-3 gathers it for
        the while (every process has to come here).
        """
        part = self.parts[name]
        if _is_zero3(part.parameter):
            import deepspeed
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            # Small parameters stay whole between uses; leaving the context would cut them up for good.
            whole = part.parameter.ds_status == ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
            if whole and not edit:
                yield 0, part.parameter.data
                return
            with deepspeed.zero.GatheredParameters([part.parameter], modifier_rank=0 if edit else None):
                yield 0, part.parameter.data
            if whole:
                part.parameter.all_gather()  # type: ignore[attr-defined]
            return
        data = part.parameter.data
        if isinstance(data, DTensor):
            yield part.rows.start, data.to_local()
        else:
            yield 0, data.T if transposed else data

    def forget_order(self) -> None:
        """Have ZeRO-3 learn the order of the modules anew, after passes through the model that are no training.

        A probe calls the output layer, TRL's fused losses do not: what would be prefetched for it is gone
        again when the backward pass comes.
        """
        if self._zero is not None and _is_stage3(self._zero):
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def publish(self) -> None:
        """Let the optimizer's own copy of the weights, where it has one, follow what was written through `weight`."""
        if self._zero is not None:
            self._zero.refresh_fp32_params()

    def gather_rows(self, name: str, rows: Tensor, height: int) -> Tensor:
        """The whole (height, k) from every process's rows (r, k) of it: those of `parts[name].rows`."""
        if not self.split:
            return rows
        part = self.parts[name]
        whole = rows.new_zeros(height, rows.shape[1])
        whole[part.owned] = rows[part.owned.start - part.rows.start :] if part.size else rows[:0]
        return self.total(whole)


def same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors with rank 0's, so that ranks cannot differ by rounding. No-op on one process."""
    if dist.is_available() and dist.is_initialized():
        for tensor in {id(tensors[name]): tensors[name] for name in sorted(tensors)}.values():
            dist.broadcast(tensor, src=0)


def spread_over_ranks(names: Sequence[str], make: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """`make(name)` (n, k) for every name, each on one rank in turn, which sends it to the others.

    So ranks share the work and cannot differ by rounding. Every process has to come here with the same names.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return {name: make(name) for name in names}
    own = {name: make(name) for i, name in enumerate(names) if i % ranks == dist.get_rank()}
    kinds: list[Any] = [None] * ranks
    dist.all_gather_object(kinds, {name: (tuple(V.shape), V.dtype) for name, V in own.items()})
    made = {}
    for i, name in enumerate(names):
        shape, dtype = kinds[i % ranks][name]
        device = _collective_device()
        V = own[name].to(device) if name in own else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(V, src=i % ranks)
        made[name] = V
    return made


def object_of_rank_0(value: Any) -> Any:
    """Rank 0's value on every process; JSON-like objects only (torch pickles them). No-op on one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank; JSON-like objects only. All of them have to call it."""
    ranks = rank_and_ranks()[1]
    if ranks == 1:
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def _collective_device() -> torch.device:
    """Where tensors have to be that the process group exchanges."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _local_part(name: str, parameter: nn.Parameter) -> Part:
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Part(parameter, parameter, shape, 0, parameter.numel())
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or mesh.size() != dist.get_world_size():
        raise UnsupportedSetupError(
            f"{name} is laid out as {placements} on a mesh of shape {tuple(mesh.shape)}; spf knows FSDP2 with one "
            "mesh dimension over all processes, so leave out tensor, context, expert and hybrid parallelism"
        )
    local = parameter.to_local()
    if local.device.type == "cpu" and mesh.device_type != "cpu":
        raise UnsupportedSetupError("FSDP2 with CPU offload is not supported: set fsdp_offload_params to false")
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    columns = parameter.numel() // shape[0]
    return Part(parameter, parameter, shape, offsets[0] * columns if local.numel() else 0, local.numel())


def _zero_optimizer(optimizer: Any) -> Any:
    """The ZeRO optimizer that this is, or None.

    Raises:
        UnsupportedSetupError: it is one of DeepSpeed's other optimizers.
    """
    if not type(optimizer).__module__.startswith("deepspeed.runtime"):
        return None
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Subclasses (SuperOffload) and the others lay their partitions out differently.
    if type(optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        raise UnsupportedSetupError(
            f"DeepSpeed's {type(optimizer).__name__} is not supported; use zero_stage 1, 2 or 3 in bf16 or fp32, "
            "with gradients accumulated in the same type"
        )
    return optimizer


def _is_stage3(zero: Any) -> bool:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(zero, DeepSpeedZeroOptimizer_Stage3)


def _is_zero3(parameter: Tensor) -> bool:
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return bool(is_zero_param(parameter))


def _zero12_parts(zero: Any) -> dict[int, Part]:
    """Stages 1 and 2: every group of parameters is one flat buffer, and every process holds an equal slice of it.

    The layout is read from the round-robin lists: `_hp_mapping` is wrong under round_robin_gradients (0.19.8).
    """
    _refuse(zero.zenflow, "ZenFlow")
    _refuse(zero.has_moe_layers, "mixture-of-experts layers with DeepSpeed")
    parts = {}
    for i, holder in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[i]
        _refuse(dist.get_world_size(group) != dist.get_world_size(), "model or sequence parallelism with DeepSpeed")
        length, low = holder.numel(), dist.get_rank(group) * holder.numel()
        borders = [rank * length for rank in range(1, dist.get_world_size(group))]
        for parameter, begin in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            parts[id(parameter)] = _flat_part(
                parameter, holder, low - begin, low - begin + length, -low + begin, [b - begin for b in borders]
            )
    return parts


def _zero3_parts(zero: Any) -> dict[int, Part]:
    """Stage 3: every parameter is cut into equal slices, and those of a sub-group lie one after the other."""
    _refuse(zero.zenflow, "ZenFlow")
    _refuse(zero.swap_optimizer or zero.params_in_nvme_and_cpu, "NVMe offload")
    _refuse(zero.offload_optimizer and zero.partial_offload != 1.0, "partial offload (ratio below 1)")
    _refuse(zero.use_muon, "DeepSpeed's Muon")
    parts = {}
    for group, holder in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            processes = dist.get_world_size(parameter.ds_process_group)
            _refuse(processes != dist.get_world_size(), "hierarchical partitioning or model parallelism with DeepSpeed")
            _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            low = dist.get_rank(parameter.ds_process_group) * length
            borders = [rank * length for rank in range(1, processes)]
            parts[id(parameter)] = _flat_part(parameter, holder, low, low + length, offset - low, borders)
    return parts


def _flat_part(
    parameter: nn.Parameter, holder: Tensor, low: int, high: int, shift: int, borders: Sequence[int]
) -> Part:
    """The part [low, high) of a flattened parameter, as far as it exists; entry e lies at e + shift in the holder."""
    shape = full_shape(parameter)
    numel = int(torch.Size(shape).numel())
    start = min(max(low, 0), numel)
    size = max(min(high, numel) - start, 0)
    columns = shape[-1] if len(shape) > 1 else 1
    cut = sorted({b // columns for b in borders if 0 < b < numel and b % columns})
    return Part(parameter, holder, shape, start if size else 0, size, start + shift if size else 0, tuple(cut))


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise UnsupportedSetupError(f"{what} is not supported by spf")

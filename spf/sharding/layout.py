"""Where the parameters are that an optimizer steps: one process and DDP, FSDP2, or DeepSpeed's partitions.

What a rule needs from other processes goes through `total` and `cut_products`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from spf.errors import UnsupportedSetupError
from spf.linalg import exact_matmul
from spf.sharding.blocks import Part
from spf.sharding.zero import Zero, gathered, is_partitioned, is_zero


def innermost_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that changes the parameters, from whatever accelerate and DeepSpeed wrapped around it.

    Raises:
        UnsupportedSetupError: a wrapper without torch's step hooks, or one whose partitions are not known here.
    """
    zero = _zero(optimizer)
    optimizer = zero.optimizer if zero else _unwrapped(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedSetupError("LBFGS evaluates its closure many times a step; use another optimizer")
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        raise UnsupportedSetupError(
            "layerwise optimizers step inside the backward pass, one parameter at a time, where no rule can act; take "
            'the same optim without "_layerwise"'
        )
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
        if isinstance(parameter, DTensor) or is_partitioned(parameter):
            raise UnsupportedSetupError(f"{who} does not support sharded parameters, as {name} is; launch with DDP")


def shares_parameters(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters, so that a pass through the model needs all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    return not sees_all(model)


def sees_all(model: nn.Module) -> bool:
    """Whether this process can read all weights where they are: one process may have them as DTensors, or ZeRO-3's
    empty ones, too."""
    return not any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Have FSDP2 modules hold their parts again, which a pass through them may leave gathered: as other Parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Sharding:
    """Where the parameters are that an optimizer steps, and what the processes have to tell each other.

    parts: by parameter name. split: whether a process sees only a part of the matrices and their
    gradients (FSDP2, ZeRO), so that sums over entries need the other processes. With DDP and on one
    process nothing is split: every process holds everything, already averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, int | slice] | None = None,
    ):
        """`parameters` are those the caller will ask for, of the model as it was prepared for training.

        places: of matrices that are one of many in their parameter, where.

        Raises:
            UnsupportedSetupError: FSDP1, tensor parallelism, hybrid sharding, CPU offload with FSDP2, NVMe or
                partial offload, ZenFlow or SuperOffload; packed experts where processes hold parts of them.
        """
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise UnsupportedSetupError("FSDP version 1 is not supported: set fsdp_version to 2")
        self.optimizer = innermost_optimizer(optimizer)
        self._zero = _zero(optimizer)
        if self._zero is not None:
            found = self._zero.parts()
            self.parts = {name: found[id(p)] for name, p in parameters.items() if id(p) in found}
        else:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            self.parts = {name: _local_part(name, p) for name, p in parameters.items() if id(p) in held}
        self.split = self._zero is not None or any(isinstance(part.holder, DTensor) for part in self.parts.values())
        for name, place in (places or {}).items():
            if name not in self.parts:
                continue
            if self.split:
                raise UnsupportedSetupError(
                    f"{name}: packed experts are not supported with FSDP2 or DeepSpeed; use DDP, or freeze them"
                )
            self.parts[name] = self.parts[name].one_of_many(place)
        self.frozen: set[str] = set()
        """Parts that no call of the optimizer's `step` has to change."""
        self.flat = self._zero is not None
        """Whether a tensor of the optimizer holds parts of many parameters."""
        self._alone = False

    def add_frozen(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Parts for parameters that no optimizer steps.

        Raises:
            UnsupportedSetupError: they are sharded.
        """
        if parameters and self.split:
            raise UnsupportedSetupError(
                f"{next(iter(parameters))} is frozen and its lora_B is trained (LoRA-FA), which is not supported with "
                "FSDP2 or DeepSpeed; train lora_A too, or launch with DDP"
            )
        for name, parameter in parameters.items():
            self.parts[name] = _local_part(name, parameter)
            self.frozen.add(name)

    def stepped(self) -> set[str]:
        """The names that the current call of the optimizer's `step` changes; ZeRO makes one call a group."""
        holders = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name for name, part in self.parts.items() if id(part.holder) in holders}

    def calls(self, names: Sequence[str]) -> int:
        """In how many calls of the optimizer's `step` these parameters are stepped."""
        return len({id(self.parts[name].holder) for name in names}) if self._zero is not None else 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the while `total` is this process's own: what is measured is its parts, and no other has to come here."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in one all-reduce; the tensor itself where nothing is split."""
        if not self.split or self._alone or dist.get_world_size() == 1:
            return values
        device = values.device
        if dist.get_backend() == "nccl":
            values = values.cuda()
        dist.all_reduce(values)
        return values.to(device)

    def joint(self, parts: Tensor, wholes: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of `parts` over the processes, where the matrices are split, and the mean of `wholes`, which each
        knows as a whole, as all do with DDP: in one all-reduce.

        So all go by the same numbers, which on GPUs differ by rounding; NaN where one process found it.
        """
        if self._alone or not dist.is_initialized() or dist.get_world_size() == 1:
            return parts, wholes
        means = torch.cat([parts if self.split else parts / dist.get_world_size(), wholes / dist.get_world_size()])
        device, means = means.device, means.cuda() if dist.get_backend() == "nccl" else means
        dist.all_reduce(means)
        return means.to(device)[: len(parts)], means.to(device)[len(parts) :]

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
                    sums[name][row] += exact_matmul(block.tensor, V[block.columns])[0]
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
        if is_partitioned(part.parameter):
            with gathered(part.parameter, edit) as whole:
                yield 0, whole
            return
        data = part.parameter.data
        if isinstance(data, DTensor):
            yield part.rows.start, data.to_local()
        else:
            data = data if part.among is None else data[part.among]
            yield 0, data.T if transposed else data

    def forget_order(self) -> None:
        """Have ZeRO-3 learn the order of the modules anew, after passes through the model that are no training."""
        if self._zero is not None:
            self._zero.forget_order()

    def publish(self) -> None:
        """Let the optimizer's own copy of the weights, where it has one, follow what was written through `weight`."""
        if self._zero is not None:
            self._zero.publish()

    def gather_rows(self, name: str, rows: Tensor, height: int) -> Tensor:
        """The whole (height, k) from every process's rows (r, k) of it: those of `parts[name].rows`."""
        if not self.split:
            return rows
        part = self.parts[name]
        whole = rows.new_zeros(height, rows.shape[1])
        whole[part.owned] = rows[part.owned.start - part.rows.start :] if part.size else rows[:0]
        return self.total(whole)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _zero(optimizer: torch.optim.Optimizer) -> Zero | None:
    optimizer = _unwrapped(optimizer)
    return Zero(optimizer) if is_zero(optimizer) else None


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

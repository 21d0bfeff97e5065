"""What processes tell each other besides sums: the same tensors and objects on all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors with rank 0's, so that ranks cannot differ by rounding. No-op on one process."""
    if dist.is_available() and dist.is_initialized():
        for tensor in {id(tensors[name]): tensors[name] for name in sorted(tensors)}.values():
            sent = tensor.contiguous()  # NCCL takes no other, as eigenvectors are; gloo does
            dist.broadcast(sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)


def spread_over_ranks(names: Sequence[str], make: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """`make(name)` (n, k) for every name, each on one rank in turn, which sends it to the others.

    So ranks share the work and cannot differ by rounding. Every process has to come here with the same names.
    """
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return {name: make(name) for name in names}
    own = {name: make(name) for i, name in enumerate(names) if i % ranks == rank}
    kinds = gather_objects({name: (tuple(V.shape), V.dtype) for name, V in own.items()})
    made = {}
    for i, name in enumerate(names):
        shape, dtype = kinds[i % ranks][name]
        device = _collective_device()
        V = own[name].to(device).contiguous() if name in own else torch.empty(shape, dtype=dtype, device=device)
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


def is_first() -> bool:
    """Whether this process writes and speaks for all; under FSDP 2 on CPUs transformers says so to each."""
    return rank_and_ranks()[0] == 0


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

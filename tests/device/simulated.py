"""A pretended GPU for machines without one: tensors that say they are on `sim:0`, and lie on the CPU.

As on a GPU, an operation on tensors of both devices is an error (copies, indices and numbers excepted), and what
makes no device its own does not arrive there. It shows where code forgot a device; it says nothing about speed,
memory or kernels. Registering it changes torch for the whole process, so tests use it in one of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
MAY_MIX = {
    *COPIES,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
TO_PYTHON = {aten._local_scalar_dense.default, aten.equal.default}


class SimulatedTensor(torch.Tensor):
    """`raw` on the CPU, under the name of another device."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "SimulatedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device("sim:0"),
        )

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def data_ptr(self) -> int:
        return self.detach().raw.data_ptr()

    def tolist(self) -> Any:
        return self.detach().raw.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert sim:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        return _run(function, args, dict(kwargs or {}))


class SimulatedDevice(TorchDispatchMode):
    """While it is on, `sim:0` can be asked for."""

    def __enter__(self) -> "SimulatedDevice":
        # `Module.to` exchanges parameters instead of their data, which a subclass cannot take
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._tensor = torch.tensor
        torch.tensor = _placed(torch.tensor)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.tensor = self._tensor
        torch.__future__.set_swap_module_params_on_conversion(False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        return _run(function, args, dict(kwargs or {}))


def register() -> torch.device:
    """Make the device known to torch, once in a process; returns it."""
    _setup_privateuseone_for_python_backend("sim")
    return torch.device("sim:0")


def _placed(tensor: Callable) -> Callable:
    """torch.tensor, which creates below the reach of a dispatch mode, in two steps that are not."""

    def placed(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = tensor(data, **kwargs)
        return made if device is None else made.to(device)

    return placed


def _run(function: Any, args: Sequence, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, SimulatedTensor)]
    here = [x for x in tensors if not isinstance(x, SimulatedTensor) and x.dim() > 0]
    placed = bool(there)
    if function in MAY_MIX:
        placed = isinstance(args[0], SimulatedTensor)
        if there and not placed and function not in COPIES:
            raise RuntimeError(f"{function}: indices on sim:0 of a tensor on the CPU")
    elif there and here:
        raise RuntimeError(f"{function}: tensors on sim:0 and the CPU, here {tuple(here[0].shape)}")
    if kwargs.get("device") is not None:
        placed = torch.device(kwargs["device"]).type == "sim"
        if placed:
            kwargs["device"] = torch.device("cpu")
    raw_args, raw_kwargs = tree_map(lambda x: x.raw if isinstance(x, SimulatedTensor) else x, (args, kwargs))
    result = function(*raw_args, **raw_kwargs)
    if function in TO_PYTHON or not placed:
        return result
    known = {id(x.raw): x for x in there}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else SimulatedTensor(x)

    return tree_map(wrapped, result)

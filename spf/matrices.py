"""Which trainable parameters are weight matrices on some input, what the others are, and what is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from spf.errors import UnsupportedModelError
from spf.sharding import full_shape

NAMED = 3
"""How many parameters of a kind are named in a message."""


@dataclass(frozen=True)
class Matrix:
    """A trainable weight matrix seen as W (m, n) with y = W x.

    modules: every layer that holds it; several where weights are tied. Each may be called more than once in a pass.
    """

    name: str
    modules: tuple[nn.Module, ...]
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the modules hold it."""
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def view(self, tensor: Tensor) -> Tensor:
        """The parameter, or its gradient, as (m, n); a view, so in-place changes reach the parameter."""
        return tensor.T if self.transposed else tensor

    @property
    def is_lora_a(self) -> bool:
        return ".lora_A." in self.name

    @property
    def is_lora_b(self) -> bool:
        return ".lora_B." in self.name


def find_matrices(model: nn.Module) -> tuple[dict[str, Matrix], dict[str, nn.Parameter]]:
    """The trainable weight matrices of linear layers, and all other trainable parameters, by name.

    Linear layers are `nn.Linear` (so also lora_A and lora_B) and GPT-2's `Conv1D`. Embeddings (a tied
    output layer is one), norms and biases are among the others.

    Raises:
        UnsupportedModelError: nothing is trainable, a parameter of two or more dimensions belongs to
            neither a linear layer nor an embedding (expert tensors, convolutions, DoRA, prompt tuning ...), a weight is
            read in two orientations, or two parameters share memory.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise UnsupportedModelError("the model has no trainable parameter")
    _refuse_shared_memory(names)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    modules: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            if weight in names and weight not in embeddings:
                modules.setdefault(names[weight], []).append(module)
    matrices = {}
    for name, holders in modules.items():
        transposed = {isinstance(module, Conv1D) for module in holders}
        if len(transposed) > 1:
            raise UnsupportedModelError(f"{name}: layers read it in two orientations (Linear and Conv1D); untie them")
        matrices[name] = Matrix(name, tuple(holders), transposed.pop())
    others = {name: parameter for parameter, name in names.items() if name not in matrices}
    for name, parameter in others.items():
        if "lora_magnitude_vector" in name:
            raise UnsupportedModelError(f"{name}: DoRA is not supported; use LoRA without use_dora")
        if len(full_shape(parameter)) >= 2 and parameter not in embeddings:
            raise UnsupportedModelError(
                f"{name}: a trainable tensor of shape {full_shape(parameter)} outside linear layers and "
                "embeddings; freeze it, or train it without spf"
            )
    if not matrices:
        raise UnsupportedModelError(f"no trainable weight matrix, only {', '.join(list(others)[:NAMED])}")
    return matrices, others


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that has the parameter of this name. FSDP2 exchanges parameters, so names are what stays."""
    return model.get_submodule(name.rpartition(".")[0])


def is_embedding(model: nn.Module, name: str) -> bool:
    """Whether the parameter of this name is an embedding's weight."""
    return isinstance(owner(model, name), nn.Embedding)


def refuse_fixed_adapters(model: nn.Module, others: Iterable[str]) -> None:
    """For rules that keep `others` as they are.

    Raises:
        UnsupportedModelError: one of them is what an adapter learns with (VeRA's and IA3's vectors), so that keeping it
            would switch the adapter off.
    """
    for name in others:
        path = name.split(".")
        for i in range(1, len(path)):
            module = model.get_submodule(".".join(path[:i]))
            if isinstance(module, BaseTunerLayer) and path[i] in module.adapter_layer_names and path[-1] != "bias":
                raise UnsupportedModelError(
                    f"{name}: {type(module).__name__} learns with this vector, which null-space would keep "
                    f"fixed; use LoRA"
                )


def refuse_rounded(matrices: Iterable[tuple[str, torch.dtype]]) -> None:
    """For rules that hold a constraint on the weights which the optimizer steps, given by name and type.

    Raises:
        UnsupportedModelError: one of a full matrix is rounded to 8 or 11 bits after every step.
    """
    rounded = [(name, dtype) for name, dtype in matrices if torch.finfo(dtype).bits < 32 and ".lora_A." not in name]
    if rounded:
        name, dtype = rounded[0]
        kind = str(dtype).removeprefix("torch.")
        remedy = "load the model with dtype=torch.float32 (spf train: dtype: float32)"
        if ".modules_to_save." in name:
            remedy = "do p.data = p.data.float() for every p in model.parameters() that requires_grad"
        raise UnsupportedModelError(
            f"{name} and {len(rounded) - 1} more trainable matrices are in {kind}, which rounds away most of a step "
            f"and of what null-space holds; {remedy} and train with bf16=True, which still computes in bfloat16, or "
            "use LoRA alone"
        )


def describe_fixed(model: nn.Module, others: Iterable[str]) -> list[str]:
    """One phrase a kind of parameter that is kept as it is: how many, and the names of some."""
    kinds: dict[str, list[str]] = {}
    for name in others:
        if is_embedding(model, name):
            kind = "embedding"
        elif name.endswith("bias"):
            kind = "bias vector"
        elif "norm" in type(owner(model, name)).__name__.lower():
            kind = "norm"
        else:
            kind = "other vector"
        kinds.setdefault(kind, []).append(name)
    return [
        f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
        for kind, names in kinds.items()
    ]


def used_tokens(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The rows (T, n) of a matrix's inputs or outputs at the tokens of a mask (B, L), wherever the matrix is.

    x (B, L, n), or (B L, n) from layers that are given all tokens in a row.

    Raises:
        UnsupportedModelError: x has neither shape, so which row is which token is not known.
    """
    if x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    if x.dim() == 2 and len(x) == mask.numel():
        return x[mask.flatten().to(x.device)]
    raise UnsupportedModelError(
        f"{name}: works on tensors of shape {tuple(x.shape)} for {mask.shape[0]} samples of {mask.shape[1]} tokens, so "
        "its inputs cannot be told apart; freeze it or leave it out of target_modules"
    )


def _refuse_shared_memory(names: Mapping[nn.Parameter, str]) -> None:
    """Two parameters on one memory are stepped twice, and held once at the most."""
    places: dict[torch.device, list[tuple[int, int, str]]] = {}
    for parameter, name in names.items():
        if parameter.numel() and not isinstance(parameter, DTensor):
            size = (parameter.numel() - 1) * parameter.element_size() + 1
            places.setdefault(parameter.device, []).append((parameter.data_ptr(), parameter.data_ptr() + size, name))
    for spans in places.values():
        for (_, end, name), (begin, _, other) in pairwise(sorted(spans)):
            if begin and begin < end:
                raise UnsupportedModelError(
                    f"{name} and {other} are two parameters on one memory; tie them by sharing one Parameter"
                )

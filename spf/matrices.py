"""Which trainable parameters are weight matrices on some input, what the others are, and what is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spf.answering import refuse_unanswering
from spf.errors import UnsupportedModelError
from spf.experts import Expert, adapted_experts, is_packed, packed_names
from spf.sharding import full_shape, is_cut

NAMED = 3
"""How many parameters of a kind are named in a message."""


@dataclass(frozen=True)
class Matrix:
    """A trainable weight matrix seen as W (m, n) with y = W x.

    modules: every layer that holds it; several where weights are tied. Each may be called more than once in a pass.
    expert: of packed experts, whose inputs it is given; `among` is then its place in the parameter called `parameter`.
    frozen: it is the lora_A of a lora_B that is trained alone (LoRA-FA).
    """

    name: str
    modules: tuple[nn.Module, ...]
    transposed: bool
    parameter: str = "weight"
    expert: Expert | None = None
    among: int | slice | None = None
    frozen: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the modules hold it."""
        weight = getattr(self.modules[0], self.parameter)
        assert isinstance(weight, nn.Parameter)
        return weight

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix in its parameter, or in its gradient, as (m, n); a view, so in-place changes reach it."""
        tensor = tensor if self.among is None else tensor[self.among]
        return tensor.T if self.transposed else tensor

    @property
    def is_lora_a(self) -> bool:
        return ".lora_A." in self.name

    @property
    def is_lora_b(self) -> bool:
        return ".lora_B." in self.name


def find_matrices(model: nn.Module) -> tuple[dict[str, Matrix], dict[str, nn.Parameter]]:
    """The trainable weight matrices of linear layers, and all other trainable parameters, by name.

    Linear layers are `nn.Linear` (so also lora_A and lora_B), GPT-2's `Conv1D`, and every expert of packed ones, by the
    parameter's name and a number, `...down_proj[3]`. A lora_A that is frozen while its lora_B is trained is among the
    matrices: what lora_B answers depends on it. Embeddings (a tied output layer is one), norms, biases, convolutions,
    state parameters and routers are among the others.

    Raises:
        UnsupportedModelError: nothing is trainable, DoRA, LoRA on packed experts whose inputs cannot be seen, a model
            that writes no answers (`refuse_unanswering`), a weight is read in two orientations or made from others
            (weight_norm), or two parameters share memory.
    """
    refuse_unanswering(model)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise UnsupportedModelError("the model has no trainable parameter")
    _refuse_shared_memory(names)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    modules: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight
            if not isinstance(weight, nn.Parameter):
                _refuse_made(module, names)
            elif weight in names and weight not in embeddings:
                modules.setdefault(names[weight], []).append(module)
    matrices = _frozen_lora_a(model, names.values())
    for name, holders in modules.items():
        transposed = {isinstance(module, Conv1D) for module in holders}
        if len(transposed) > 1:
            raise UnsupportedModelError(f"{name}: layers read it in two orientations (Linear and Conv1D); untie them")
        matrices[name] = Matrix(name, tuple(holders), transposed.pop())
    _unpack(model, names, matrices)
    held = {id(matrix.weight) for matrix in matrices.values()}
    others = {name: parameter for parameter, name in names.items() if id(parameter) not in held}
    for name in others:
        if "lora_magnitude_vector" in name:
            raise UnsupportedModelError(
                f"{name}: DoRA is not supported: it scales every row to a magnitude, so what lora_A and lora_B do to "
                "other inputs changes the answers to held ones, too; with magnitudes that make up for it, it would be "
                "LoRA; use use_dora=False"
            )
    if not matrices:
        only = ", ".join(list(others)[:NAMED])
        raise UnsupportedModelError(
            f"no trainable weight matrix, only {only}; train linear layers, or PEFT's LoRA on them"
        )
    return matrices, others


def _refuse_made(module: nn.Module, names: Mapping[nn.Parameter, str]) -> None:
    """A weight that is no parameter, but made from others, can be held where these are frozen only."""
    for parameter in module.parameters():
        if parameter in names and not names[parameter].endswith("bias"):
            raise UnsupportedModelError(
                f"{names[parameter]}: a layer's weight is made from this (weight_norm, pruning), so it is not held; "
                "take that off before training (torch.nn.utils: parametrize.remove_parametrizations, "
                "remove_weight_norm or prune.remove), or freeze it"
            )


def _unpack(model: nn.Module, names: Mapping[nn.Parameter, str], matrices: dict[str, Matrix]) -> None:
    """Put the matrices of packed experts, and of LoRA on them, into `matrices`, an expert at a time.

    LoRA on another parameter (a router's) is taken out: its layers are never called.
    """
    layer: Any
    for layer in model.modules():
        if is_packed(layer):
            for parameter in packed_names(layer):
                weight = layer._parameters[parameter]
                for i in range(full_shape(weight)[0]) if weight in names else ():
                    whole = f"{names[weight]}[{i}]"
                    matrices[whole] = Matrix(
                        whole, (layer,), layer.is_transposed, parameter, Expert(layer, parameter, i), i
                    )
        elif isinstance(layer, ParamWrapper):
            experts = adapted_experts(layer)
            for adapter in layer.lora_A:
                down: Any = layer.lora_A[adapter].weight
                up: Any = layer.lora_B[adapter].weight
                matrix = matrices.pop(names.get(down, ""), None)
                if experts is None:
                    if matrix is not None and layer.num_experts > 1:
                        _refuse_unseen(matrix.name, layer)
                    matrices.pop(names.get(up, ""), None)
                elif matrix is not None:
                    height = len(down) // len(experts)
                    for expert in experts:
                        rows = slice(expert.index * height, (expert.index + 1) * height)
                        whole = f"{matrix.name}[{expert.index}]"
                        matrices[whole] = Matrix(whole, (layer.lora_A[adapter],), False, expert=expert, among=rows)


def _refuse_unseen(name: str, wrapper: ParamWrapper) -> None:
    layer = type(wrapper.get_base_layer()).__name__
    raise UnsupportedModelError(
        f"{name}: LoRA on the packed experts of {layer}, whose inputs spf cannot see (and PEFT may have put lora_A on "
        f"their output side); leave {wrapper.parameter_name} out of target_parameters and train the other layers, or "
        "all weights, where these experts are kept fixed"
    )


def refuse_tensors(model: nn.Module, others: Mapping[str, nn.Parameter]) -> None:
    """For rules that leave `others` as free as they are without a rule.

    Raises:
        UnsupportedModelError: one is more than a vector, and no embedding: convolutions, state parameters, routers.
    """
    for name, parameter in others.items():
        if len(full_shape(parameter)) >= 2 and not is_embedding(model, name):
            raise UnsupportedModelError(
                f"{name}: a trainable tensor of shape {full_shape(parameter)} outside linear layers and embeddings, "
                "which this rule does not correct; freeze it, or use null-space, which keeps it fixed"
            )


def lora_b_of(name: str) -> str:
    """The name of the lora_B that belongs to this lora_A, or to an expert's part of it."""
    return name.replace(".lora_A.", ".lora_B.").partition("[")[0]


def _frozen_lora_a(model: nn.Module, trained: Iterable[str]) -> dict[str, Matrix]:
    found = {}
    parameters = dict(model.named_parameters())
    for name in trained:
        other = name.replace(".lora_B.", ".lora_A.")
        if other != name and other in parameters and not parameters[other].requires_grad:
            module, layer = owner(model, other), model.get_submodule(other.partition(".lora_A.")[0])
            if isinstance(module, nn.Linear) and not isinstance(layer, ParamWrapper):
                found[other] = Matrix(other, (module,), False, frozen=True)
    return found


def holds_tokens(name: str) -> bool:
    """Whether a parameter's rows or columns are tokens' by PEFT: LoRA on an embedding, or trainable tokens."""
    return any(part in name for part in (".lora_embedding_A.", ".lora_embedding_B.", ".trainable_tokens_delta."))


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that has the parameter of this name. FSDP2 exchanges parameters, so names are what stays."""
    return model.get_submodule(name.rpartition(".")[0])


def is_embedding(model: nn.Module, name: str) -> bool:
    """Whether the parameter of this name is an embedding's weight."""
    return isinstance(owner(model, name), nn.Embedding)


def refuse_fixed_adapters(model: nn.Module, others: Iterable[str]) -> None:
    """For rules that keep `others` as they are.

    Raises:
        UnsupportedModelError: one of them is what an adapter learns with (VeRA's and IA3's vectors, a bare lora_A), so
            that keeping it would switch the adapter off.
    """
    for name in others:
        if holds_tokens(name):
            continue
        path = name.split(".")
        if path[-1] in ("lora_A", "lora_B"):
            raise UnsupportedModelError(
                f"{name}: of an adapter made by hand, and no linear layer, so null-space would keep it fixed; make it "
                "an nn.Linear of that name, or use PEFT's LoRA"
            )
        for i in range(1, len(path)):
            module = model.get_submodule(".".join(path[:i]))
            if isinstance(module, ParamWrapper):
                continue  # a router's adapter; what routes is best kept
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
        if not holds_tokens(name):
            kinds.setdefault(_kind(model, name), []).append(name)
    return [
        f"{len(names)} {_plural(kind) if len(names) > 1 else kind} "
        f"({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
        for kind, names in kinds.items()
    ]


def _plural(kind: str) -> str:
    return "routers' adapters" if kind == "router's adapter" else f"{kind}s"


def _kind(model: nn.Module, name: str) -> str:
    """What a parameter is that is no matrix, in a word or two."""
    what = type(owner(model, name)).__name__.lower()
    dimensions = len(full_shape(model.get_parameter(name)))
    if is_embedding(model, name):
        return "embedding"
    if name.endswith("bias"):
        return "bias vector"
    if ".lora_" in name:
        return "router's adapter"
    if "norm" in what:
        return "norm"
    if "conv" in what and dimensions > 1:
        return "convolution"
    if dimensions == 2 and ("rout" in what or "gat" in what):
        return "router"
    return "other vector" if dimensions < 2 else "other tensor"


def token_of_rows(name: str, shape: torch.Size, mask: Tensor) -> Tensor:
    """For each row of a tensor of this shape (..., n), the token of a mask (B, L), counted in a row, it belongs to.

    (B, L, n), (B L, n) from layers that are given all tokens in a row, (B, 1, L, n) of a shared key, (B, L, H, n) and
    (B, H, L, n) of several heads, (S, B, L, n) of several streams.

    Raises:
        UnsupportedModelError: none of these, so which row is which token is not known.
    """
    rows, (batch, length) = shape[:-1], mask.shape
    tokens = torch.arange(mask.numel(), device=mask.device).view(batch, length)
    if rows.numel() == mask.numel() and (len(rows) == 1 or rows[0] == batch):
        return tokens.flatten()
    if rows[:2] == mask.shape:
        return tokens.flatten().repeat_interleave(rows[2:].numel())
    if rows[-2:] == mask.shape:
        return tokens.flatten().repeat(rows[:-2].numel())
    if len(rows) == 3 and (rows[0], rows[2]) == tuple(mask.shape):
        return tokens[:, None].expand(rows).flatten()
    raise UnsupportedModelError(
        f"{name}: works on tensors of shape {tuple(shape)} for {batch} samples of {length} tokens, so its inputs "
        "cannot be told apart; freeze it or leave it out of target_modules"
    )


def used_tokens(name: str, x: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The rows (T, n) of a matrix's inputs or outputs at the tokens of a mask (B, L), wherever the matrix is.

    tokens: which token each row is, where that is known; else it is told by the shape, see `token_of_rows`.

    Raises:
        UnsupportedModelError: it cannot be told.
    """
    tokens = token_of_rows(name, x.shape, mask) if tokens is None else tokens
    return x.reshape(-1, x.shape[-1])[mask.flatten()[tokens.to(mask.device)].to(x.device)]


def used_places(name: str, x: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Which token of the mask, counted in a row, each row of `used_tokens` is (T,)."""
    tokens = token_of_rows(name, x.shape, mask) if tokens is None else tokens.to(mask.device)
    return tokens[mask.flatten()[tokens]]


def _refuse_shared_memory(names: Mapping[nn.Parameter, str]) -> None:
    """Two parameters on one memory are stepped twice, and held once at the most."""
    places: dict[torch.device, list[tuple[int, int, str]]] = {}
    for parameter, name in names.items():
        if parameter.numel() and not is_cut(parameter):
            size = (parameter.numel() - 1) * parameter.element_size() + 1
            places.setdefault(parameter.device, []).append((parameter.data_ptr(), parameter.data_ptr() + size, name))
    for spans in places.values():
        for (_, end, name), (begin, _, other) in pairwise(sorted(spans)):
            if begin and begin < end:
                raise UnsupportedModelError(
                    f"{name} and {other} are two parameters on one memory; tie them by sharing one Parameter"
                )

"""Adapters that are not fresh: when A V = 0 can be reached without changing the model, and what to do else."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spf.errors import UnsupportedModelError
from spf.linalg import exact_matmul
from spf.matrices import lora_b_of
from spf.run import Run

NOTHING = 1e-5
"""|B A V| / (|B| |A|) up to which B A V is zero but for rounding."""

FROM_ZERO = (True, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which B A = 0 at the start, so that another B A was trained."""


def refuse_started(run: Run, names: Sequence[str], bases: Mapping[str, Tensor]) -> None:
    """A lora_A can be projected where that changes nothing: lora_B is zero, or B A is (an orthogonal start).

    Raises:
        UnsupportedModelError: it would change the model, or might, since its lora_B is not trained.
    """
    for name in names:
        if (other := lora_b_of(name)) not in run.sharding.parts:
            raise UnsupportedModelError(
                f"{name} is trained but {other} is not, so A V = 0 might change the model; train it, too, or leave "
                "this layer out of the adapter"
            )
        with torch.no_grad(), run.sharding.weight(name) as (_, A), run.sharding.weight(other) as (_, B):
            changes = size = B.float().square().sum()
            if not run.sharding.split and B.shape[1] == len(A):
                V = bases[name].to(A.device)
                changes = exact_matmul(B.float(), exact_matmul(A.float(), V)).square().sum()
                size = size * A.float().square().sum() * NOTHING**2
            else:
                size = torch.zeros_like(size)
        found, allowed = run.total([torch.stack([changes, size])])[0]
        if found > allowed:
            raise UnsupportedModelError(f"{name}: {_why(run, name)}")


def refuse_tied(model: nn.Module, trained: Iterable[str]) -> None:
    """
    Raises:
        UnsupportedModelError: a layer with an adapter shares its weight, so that once merged the adapter is in the
            other one, too, as in the output layer of an embedding, where nothing is held against it.
    """
    # a layer that two others hold counts twice: PEFT adapts it in one of them
    layers = (layer for module in model.modules() for layer in module._modules.values() if layer is not None)
    owners = Counter(weight for layer in layers for weight in layer._parameters.values())
    for name in trained:
        layer, adapter, _ = name.partition(".lora_")
        # what an adapter made by hand calls the layer that it stands on is not known
        under = model.get_submodule(layer).named_parameters() if adapter else ()
        if any(owners[weight] > 1 for below, weight in under if "lora_" not in below and not below.endswith("bias")):
            raise UnsupportedModelError(
                f"{name}: {layer} shares its weight with another layer (tied embeddings), so once merged it changes "
                "what that one answers, too, which is not held; leave it out of the adapter"
            )


def _why(run: Run, name: str) -> str:
    adapter = name.partition(".lora_A.")[2].partition(".")[0]
    config = getattr(run.probe.model, "peft_config", {}).get(adapter)
    start = getattr(config, "init_lora_weights", True)
    under = "keep it as it is under a new one, by spf.going_on.add_adapter(model) before the trainer is made"
    if start not in FROM_ZERO:
        return (
            f"init_lora_weights={start!r} begins with a lora_B that is not zero, so it cannot be held to A V = 0 "
            f"without changing the model; use init_lora_weights=True (an adapter that is trained already: {under})"
        )
    return (
        "the adapter is trained already (lora_B is not zero), and not held to this run's directions, so A V = 0 would "
        "change the model; if spf trained it, give the directory it was saved in, SafetyCallback(subspace=DIR); if "
        f"not, {under}"
    )

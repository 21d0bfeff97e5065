"""What was loaded of a model or an adapter is all of it: libraries make up what they do not find."""

from pathlib import Path
from typing import Any

from torch import nn


def whole_model_of(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`, which makes up weights that it does not find.

    Raises:
        ValueError: there are such.
    """
    model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name}: {len(missing)} of its weights are in none of its files, {missing[0]} among them, and would be "
            f"random; save it again as a {type(model).__name__}, or name the model that it is"
        )
    return model


def refuse_other_layers(place: Path, found: Any) -> None:
    """
    Raises:
        ValueError: what PEFT loaded of an adapter is not all of it, or not all that it should have.
    """
    # of a bank that layers share PEFT names each layer's reference
    missing = {name for name in found.missing_keys if ".vblora_vector_bank." not in name}
    if other := sorted({*missing, *found.unexpected_keys}):
        raise ValueError(
            f"the adapter {place} does not fit the model that it stands on: {len(other)} of its weights have no place "
            f"there, or are missing, {other[0]} among them; name another base_model_name_or_path in "
            f"{place}/adapter_config.json, or save the adapter again with the versions that load it"
        )


def refuse_not_finite(model: nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: a weight is NaN or inf: whatever such a model is asked, the likeliest token is the first.
    """
    for place, weight in model.named_parameters():
        # numbers of a byte are not asked: not all of their types can be
        if weight.is_floating_point() and weight.element_size() > 1 and not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: {place} holds NaN or inf, so the model answers nothing; its training went wrong")

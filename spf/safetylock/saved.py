"""Locked models on disk that plain transformers reloads with the same logits, and their way back."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spf.config import File, parse_json, read_json
from spf.files import read_tensors
from spf.loaded import whole_model_of
from spf.safetylock.heads import Model, attention_outputs
from spf.safetylock.lock import SAVED_MARK, applied_shifts

ORIGINAL_BIASES = "safetylock_original_biases.safetensors"


class _Mark(File):
    """What SAVED_MARK stands for in a model's configuration."""

    fingerprints: list[str]
    attention_bias_added: bool
    biases: str | None = None
    """Hash of the attention's biases as they were saved; not there in earlier versions."""


def save_locked(model: Model, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> Path:
    """Save a model locked by bias so that `from_pretrained` gives the same logits; returns the directory.

    Most architectures build o_proj without a bias and would drop it silently. Where the configuration has a flag
    `attention_bias` that gives o_proj one (Llama, Gemma, Qwen 3), it is set and all biases that come with it are
    saved as zeros.

    Raises:
        ValueError: not locked by bias, an adapter, packed weights, or an architecture without a bias on o_proj
            (Mistral, Qwen 2); keep the lock file beside the unlocked model then and apply it after loading.
    """
    instead = "save the unlocked model and the lock file, and apply the lock after loading"
    shifts = applied_shifts(model)
    if not shifts:
        raise ValueError("the model carries no lock that was applied here; save it with save_pretrained")
    before = getattr(model.config, SAVED_MARK, None)
    if before and not before["attention_bias_added"]:
        raise ValueError(
            "the model was saved with a lock before, and its own biases are not here, so neither could be taken out "
            "any more: take that one out first (`spf lock remove`), and lock the model that comes of it"
        )
    if before and before.get("biases") not in (None, _hash_of(model, _without(model, shifts))):
        raise ValueError(
            "the attention's biases were trained since the model was saved with a lock, so what they learned would go "
            f"with the locks when these are taken out; {instead}"
        )
    if any(hooks for _, _, hooks in shifts.values()):
        raise ValueError("a lock applied as a hook is not part of the weights; apply it with mode='bias' to save it")
    if isinstance(model, PeftModel):
        raise ValueError(f"the model carries an adapter; merge it (merge_and_unload) and lock it then, or {instead}")
    outputs, _ = attention_outputs(model)
    if not all(output.base.weight.is_floating_point() for output in outputs):
        raise ValueError(f"biases beside packed weights are not saved reliably; {instead}")
    config = copy.deepcopy(model.config)
    added = before is not None or config.to_dict().get("attention_bias") is False
    if added:
        config.attention_bias = True
    state = model.state_dict()
    with torch.device("meta"):
        wanted = type(model)(config).state_dict()
    dropped = sorted(set(state) - set(wanted))
    missing = sorted(set(wanted) - set(state))
    if dropped or not all(name.endswith(".bias") for name in missing):
        raise ValueError(
            f"{type(model).__name__} has no place for {(dropped or missing)[0]} and would drop it at loading; {instead}"
        )
    device_of = {name.rpartition(".")[0]: tensor.device for name, tensor in state.items() if name.endswith(".weight")}
    for name in missing:
        state[name] = torch.zeros(wanted[name].shape, dtype=model.dtype, device=device_of[name.rpartition(".")[0]])
    known = before["fingerprints"] if before else []
    fingerprints = sorted({*known, *(fingerprint for _, biases, _ in shifts.values() for fingerprint in biases)})
    mark = {"fingerprints": fingerprints, "attention_bias_added": added, "biases": _hash_of(model, state)}
    setattr(config, SAVED_MARK, mark)
    own, model.config = model.config, config
    try:
        model.save_pretrained(directory, state_dict=state)
    finally:
        model.config = own
    tokenizer.save_pretrained(directory)
    (Path(directory) / ORIGINAL_BIASES).unlink(missing_ok=True)  # another model's, which was locked there before
    biases = {str(layer): bias.detach().clone() for layer, (bias, _, _) in shifts.items() if bias is not None}
    if biases and not added:
        save_file(biases, Path(directory) / ORIGINAL_BIASES)
    return Path(directory)


def unlock_saved(directory: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `save_locked` saved, as it was before it was locked, bit by bit; and its tokenizer.

    Raises:
        ValueError: the directory holds no model saved with its lock, or its biases are others by now (trained).
    """
    path = Path(directory) / "config.json"
    remedy = "give the directory that `spf lock apply` wrote"
    config = read_json(dict[str, Any], path, remedy) if path.exists() else {}
    if SAVED_MARK not in config:
        raise ValueError(f"{directory}: holds no model that was saved with its lock; {remedy}")
    mark = parse_json(_Mark, json.dumps(config[SAVED_MARK]), f"{path}: {SAVED_MARK}", remedy)
    originals = Path(directory) / ORIGINAL_BIASES
    biases = read_tensors(originals, "biases that `spf lock apply` kept", remedy)[0] if originals.exists() else {}
    if not mark.attention_bias_added and not biases:
        raise ValueError(
            f"{directory}: {ORIGINAL_BIASES}, the model's own biases, is not there (saved again by save_pretrained?), "
            f"so the lock cannot be taken out; {remedy}"
        )
    model = whole_model_of(AutoModelForCausalLM, str(directory))
    if mark.biases not in (None, _hash_of(model, model.state_dict())):
        raise ValueError(
            f"{directory}: the attention's biases are not those that were saved with the lock (trained, or saved in "
            f"another type, since), and what was learned would go with it; {remedy}"
        )
    delattr(model.config, SAVED_MARK)
    outputs, _ = attention_outputs(model)
    if mark.attention_bias_added:
        model.config.attention_bias = False
        with torch.device("meta"):
            wanted = type(model)(model.config).state_dict()
        for name in set(model.state_dict()) - set(wanted):
            model.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
    for output in outputs:
        bias = biases.pop(str(output.layer), None)
        if bias is not None and bias.shape == (output.base.out_features,):
            output.base.bias = torch.nn.Parameter(bias)
        elif bias is not None:
            raise ValueError(f"{originals}: the bias of layer {output.layer} does not fit the model; {remedy}")
    if biases:
        raise ValueError(f"{originals}: the model has no layer {next(iter(biases))}; {remedy}")
    return model, AutoTokenizer.from_pretrained(directory)


def _output_names(model: Model) -> dict[int, str]:
    """Where the output projection of each layer's attention is in the model."""
    outputs, _ = attention_outputs(model)
    names = {id(module): name for name, module in model.named_modules()}
    return {output.layer: names[id(output.base)] for output in outputs}


def _hash_of(model: Model, state: Mapping[str, Tensor]) -> str:
    """Of the biases in the attention, in float32."""
    attention = tuple(f"{name.rpartition('.')[0]}." for name in _output_names(model).values())
    found = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(attention) and name.endswith(".bias")):
        found.update(name.encode() + state[name].detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def _without(model: Model, shifts: Mapping[int, tuple[nn.Parameter | None, set[str], set[str]]]) -> dict[str, Tensor]:
    """The model's state as it was before locks were applied here."""
    names = _output_names(model)
    before = {f"{names[layer]}.bias": bias for layer, (bias, _, _) in shifts.items() if bias is not None}
    return model.state_dict() | before

"""Going on with an adapter that is trained already: where the subspace is that holds it, and a new one above others."""

import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from spf.checkpoint import STATE_FILE, SUBSPACE_FILE, read_checkpoint, write_bases
from spf.errors import CorrectionError, UnsupportedSetupError
from spf.linalg import exact_matmul
from spf.models import NEW_ADAPTER, beside, is_new_adapter
from spf.optimizer import Attachment
from spf.rules.frozen import frozen_fingerprint
from spf.sharding import at_rest, is_cut, object_of_rank_0, reshard, sees_all
from spf.subspace import SafetySubspace

FITS = 0.02
"""|A V| / |A| up to which an adapter is taken for one that is held to V: bfloat16 leaves .004, chance .1 and more."""

_LAST: WeakKeyDictionary[nn.Module, SafetySubspace] = WeakKeyDictionary()
"""What models were held to when their last run ended, for the next one in the same process (SFT, then DPO)."""

_ENDED: WeakKeyDictionary[Attachment, SafetySubspace] = WeakKeyDictionary()
"""What an adapter was held to when a run ended, of all rows."""


@dataclass(frozen=True)
class Earlier:
    """The subspace of an earlier run. where: it was found, in words."""

    subspace: SafetySubspace
    where: str


def other_base(model: nn.Module, subspace: SafetySubspace) -> bool:
    """Whether the weights below an adapter are known to be others than those that its subspace was made with."""
    known = subspace.metadata.get("base")
    return known is not None and sees_all(model) and known != frozen_fingerprint(model)


def mark(model: nn.Module, subspace: SafetySubspace, kept: str | None) -> None:
    """Note in a new subspace which weights are below it, and which prompts `keep` named, by hashes."""
    if sees_all(model):
        subspace.metadata["base"] = frozen_fingerprint(model)
    subspace.metadata["keep"] = kept or ""


def remember(running: Attachment) -> None:
    """A run has ended: the next one with this model can go on, also with other parts of it, and a process can save an
    adapter alone. All processes have to call it."""
    if any(".lora_A." in name for name in running.subspace.right):
        _LAST[running.probe.model] = _ENDED[running] = running.whole_subspace()


def earlier_subspace(model: nn.Module, given: str | None, before: Attachment | None, output: Path) -> Earlier | None:
    """The subspace that the model is held to already, or should be; None for a model that begins anew.

    given: a file or directory named by the user. before: this callback's last run. output: the run's directory.

    Raises:
        FileNotFoundError, ValueError: there is none in what was given, or it is damaged.
    """
    if given is not None:
        return _read(Path(given), model, strict=False)
    if before is not None and before.probe.model is model and before.subspace.right:
        return Earlier(before.whole_subspace(), "the trainer's last run")
    if not object_of_rank_0(_is_trained(model)):
        return None
    if model in _LAST:
        return Earlier(_own_names(_LAST[model], model), "this model's last run")
    try:
        return _read(output, model, strict=True)
    except FileNotFoundError:
        return None


def leave(running: Attachment | None, model: nn.Module, directory: Path, first: bool) -> list[str]:
    """A model was written there: leave with it what it is held to, and say what is wrong. Before the run has ended all
    processes have to call it; first: this one writes."""
    # transformers' own loading has them without a PeftModel
    other = beside(directory, getattr(model, "peft_config", ())) if first else ""
    return [said for said in (_leave_subspace(running, model, directory, first), other) if said]


def _leave_subspace(running: Attachment | None, model: nn.Module, directory: Path, first: bool) -> str:
    """Write what an adapter is held to beside it, so that a later run can go on.

    What is given is to be said: that the parameters of the model that was written, if they
    are those that were trained and of the same type, are not what was held, since another callback has put averaged
    weights in, or a step was broken off.
    """
    if running is None:
        return ""
    said = ""
    if running.steps and _is_same(running, model):
        try:
            if running.sharding.split:  # under ZeRO-1 and -2 a process may save alone, and would wait for the others
                running.correction.check_here()
            else:
                running.correction.check(final=True)
        except CorrectionError as error:
            said = f"{directory}: the model that was written is not what was held ({str(error).removeprefix('spf: ')})"
    if not any(name for name in running.subspace.right if ".lora_A." in name):
        return said
    subspace: SafetySubspace | None
    if any(id(parameter) in running.run.trained for parameter in model.parameters()):
        subspace = _ENDED[running] if running in _ENDED else running.whole_subspace()
    else:
        subspace = _LAST.get(model)  # the callback has served another trainer since
    if first and directory.is_dir() and subspace is not None:
        write_bases(directory, subspace)
    return said


def _is_same(running: Attachment, model: nn.Module) -> bool:
    """Whether what was trained are still the model's parameters, of the types that they had."""
    reshard(model)
    there = {id(parameter): parameter.dtype for parameter in model.parameters()}
    return running.run.trained.items() <= there.items()


def add_adapter(model: PeftModel, config: LoraConfig | None = None) -> PeftModel:
    """Keep trained adapters as they are, frozen and active, and put a fresh one above them, which a run may train.

    Call it before the trainer is made. config: of the new adapter; without one, the rank, layers and scale of the old.
    """
    old = list(model.active_adapters)
    new: Any = config or copy(model.peft_config[old[0]])
    if config is None:
        new.init_lora_weights, new.inference_mode = True, False
    name = NEW_ADAPTER
    while name in model.peft_config:
        name += "_"
    model.add_adapter(name, new)
    tuner: Any = model.base_model
    tuner.set_adapter([*old, name])
    model.set_requires_grad(old, requires_grad=False)
    return model


def refuse_switched(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedSetupError: a trainer switches to its reference adapter and back, which TRL does to one adapter, and
            there are two (`add_adapter`): the old one would be trained, and the new one would not answer.
    """
    names = getattr(model, "peft_config", {})
    if "ref" in names and any(map(is_new_adapter, names)):
        raise UnsupportedSetupError(
            "the trainer has made a reference adapter, and switches back from it to one adapter only, where two are "
            "active (add_adapter): give ref_model=, a model with the old adapter merged into it, or merge that one and "
            "begin a new adapter (model.merge_and_unload()) before the trainer is made"
        )


def refuse_reloaded(model: nn.Module, resumes: bool, loads_best: bool) -> None:
    """
    Raises:
        UnsupportedSetupError: transformers would load a checkpoint's first adapter, and there is one above it.
    """
    if any(map(is_new_adapter, getattr(model, "peft_config", {}))) and (resumes or loads_best):
        what, instead = "load_best_model_at_end=True", "set it to False"
        if resumes:
            what, instead = "a run above another adapter cannot go on from a checkpoint", "begin it anew"
        raise UnsupportedSetupError(
            f"{what}: of several adapters (add_adapter) transformers loads a checkpoint's first one only; {instead}, "
            "or merge the old one (model.merge_and_unload()) and begin a new adapter"
        )


def _is_trained(model: nn.Module) -> bool:
    """Whether a trainable lora_B is not zero, as far as this process sees it."""
    return any(
        bool(own.any())
        for name, parameter in model.named_parameters()
        if ".lora_B." in name and parameter.requires_grad
        for own in at_rest(parameter).values()
    )


def _read(place: Path, model: nn.Module, strict: bool) -> Earlier:
    """Of the subspaces there that the model's adapter answers to the widest, then the newest; unless it is strict, else
    the newest of all. (An adapter that was held to more directions later answers to fewer, too.)"""
    found = [(path, _own_names(subspace, model)) for path, subspace in _subspaces(place)]
    fitting = [one for one in found if _fits(model, one[1])]
    if not fitting and (strict or not found):
        raise FileNotFoundError(
            f"{place}: no {SUBSPACE_FILE.format(hash='*')} there; name the directory that the adapter was saved in, a "
            "checkpoint, or that file"
        )
    path, subspace = (
        max(fitting, key=lambda one: one[1].directions) if fitting and _is_seen(model) else (fitting or found)[0]
    )
    return Earlier(subspace, str(path))


def _is_seen(model: nn.Module) -> bool:
    """Whether this process sees adapters whole, and so whether they fit."""
    parts = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
    return any(part.numel() for part in parts if not is_cut(part))


def _subspaces(place: Path) -> Iterator[tuple[Path, SafetySubspace]]:
    if place.is_file():
        yield place, SafetySubspace.load(place)
    elif (place / STATE_FILE).is_file():
        saved = read_checkpoint(place)
        if saved.subspace is not None and saved.bases is not None and saved.run is not None:
            yield saved.run / saved.bases["file"], saved.subspace
    else:
        files = sorted(place.glob(SUBSPACE_FILE.format(hash="*")), key=lambda path: path.stat().st_mtime_ns)
        for path in reversed(files):
            yield path, SafetySubspace.load(path)


def _fits(model: nn.Module, subspace: SafetySubspace) -> bool:
    """Whether the model's adapter is held to it, as far as this process sees its parameters."""
    parameters = dict(model.named_parameters())
    for name, V in subspace.right.items():
        if "[" in name:
            continue  # one of packed experts
        A = parameters.get(name)
        if A is None:
            return False
        if ".lora_A." not in name or is_cut(A) or not A.numel():
            continue
        if len(V) != A.shape[1]:
            return False
        answered = exact_matmul(A.detach().float(), V.to(A.device))
        if not float(answered.norm()) <= FITS * float(A.detach().float().norm()):
            return False
    return True


def _own_names(subspace: SafetySubspace, model: nn.Module) -> SafetySubspace:
    """By the model's names: the adapter may have another name, and PEFT's wrapper may be there or not."""
    own = {_bare(name): name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: name.partition("[") for name in tensors}  # an expert's name ends with its number
        return {
            own.get(_bare(whole), whole) + sign + rest: tensors[name] for name, (whole, sign, rest) in parts.items()
        }

    return replace(
        subspace,
        right=renamed(subspace.right),
        target=renamed(subspace.target),
        reserve=renamed(subspace.reserve),
        reserve_target=renamed(subspace.reserve_target),
    )


def _bare(name: str) -> str:
    return re.sub(r"\.(lora_[AB]|modules_to_save)\.[^.]+", r".\1", name.removeprefix("base_model.model."))

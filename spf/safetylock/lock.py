"""SafetyLock: stored head directions that push any fine-tuned descendant of a model back to refusing."""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt, Le, Lt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from spf.config import Count, NotNegative, Seed, Settings, Whole, check, parse_json
from spf.files import atomic_path, read_tensors
from spf.safetylock.heads import AttentionOutput, Geometry, Model, attention_outputs, response
from spf.safetylock.pairs import digest

Mode = Literal["bias", "hook"]
Score = Literal["val", "val+train"]
ValFraction = Annotated[float, Gt(0), Lt(1)]
Positions = Literal["all", "generated", "last"]

FORMAT = 1
EXTRACT = "extract the lock again, or copy it anew"
SAVED_MARK = "spf_safetylock"
"""Key in the configuration of a model that was saved with its lock."""

DESCENDANT_COSINE = 0.9
"""Least cosine between the responses of base and descendant to the same vector; other models have about 0."""

_SKETCH_ROWS = 64


@dataclass(frozen=True)
class LockInfo(Settings):
    """Where a lock comes from and what it fits; the JSON part of its file."""

    form = "SafetyLock: {}"

    base_model: str
    base_hash: str
    model_type: str
    geometry: Geometry
    tokenizer_hash: str
    template_hash: str
    dtype: str
    window: Count
    pairs: Count
    duplicates: Whole
    words_safe: NotNegative
    words_unsafe: NotNegative
    data_hash: str
    seed: Seed
    val_fraction: ValFraction
    score: Score
    alpha: float
    spf_version: str


@dataclass(frozen=True)
class _Stored(LockInfo):
    format: Annotated[int, Ge(FORMAT), Le(FORMAT)]


@dataclass
class _Layer:
    """What was done to one output projection: its own bias, and the locks on it by fingerprint."""

    bias: nn.Parameter | None
    shifts: dict[str, Tensor] = field(default_factory=dict)
    handles: dict[str, RemovableHandle] = field(default_factory=dict)


# Keyed by the linear layer itself, so that a lock is found again through an adapter put on or merged since.
_LAYERS: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()


@dataclass(frozen=True)
class SafetyLock:
    """The Meta-SafetyLock: K heads, best first, each with a unit direction and a standard deviation.

    heads (K, 2) int64 (layer, head); directions (K, head_dim), sigmas (K,), train_accuracy, val_accuracy and
    val_loss (layers, heads), sketch (layers, rows), all float32. The sketch is how the base model's
    output projections answer a fixed vector; by it a descendant is told from another model.
    Zhu et al., arXiv 2410.10343, after Li et al., arXiv 2306.03341.
    """

    heads: Tensor
    directions: Tensor
    sigmas: Tensor
    train_accuracy: Tensor
    val_accuracy: Tensor
    val_loss: Tensor
    sketch: Tensor
    info: LockInfo

    @property
    def fingerprint(self) -> str:
        """SHA-256 of heads, directions and standard deviations."""
        content = b"".join(t.contiguous().numpy().tobytes() for t in (self.heads, self.directions, self.sigmas))
        return hashlib.sha256(content).hexdigest()

    def top(self, k: Count) -> "SafetyLock":
        """The lock of the k best heads alone.

        Raises:
            ValueError: k is not between 1 and the number of heads stored.
        """
        check(SafetyLock.top, {"k": k}, "SafetyLock: {}")
        if k > len(self.heads):
            raise ValueError(f"{k} heads asked for; the lock holds {len(self.heads)}")
        return replace(self, heads=self.heads[:k], directions=self.directions[:k], sigmas=self.sigmas[:k])

    def with_alpha(self, alpha: float) -> "SafetyLock":
        """The same lock with another strength stored in it."""
        return replace(self, info=replace(self.info, alpha=alpha))

    def displacements(self, alpha: float) -> dict[int, Tensor]:
        """By layer, what is added to the input of o_proj: alpha sigma direction in each chosen head, zero elsewhere.

        (heads * head_dim,) float32 each; only layers with a chosen head.
        """
        shape = (self.info.geometry.heads, self.info.geometry.head_dim)
        moved: dict[int, Tensor] = {}
        for (layer, head), direction, sigma in zip(self.heads.tolist(), self.directions, self.sigmas, strict=True):
            moved.setdefault(layer, torch.zeros(shape))[head] = alpha * sigma * direction
        return {layer: moved[layer].flatten() for layer in sorted(moved)}

    def apply(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        alpha: float | None = None,
        mode: Mode = "bias",
        positions: Positions = "all",
        stack: bool = False,
    ) -> None:
        """Lock a model in place, at the stored strength unless `alpha` is given. `remove` undoes it bit-exactly.

        `bias` adds W_l delta_l to the bias of o_proj, with the model's own (fine-tuned) weights: it costs nothing
        at inference and acts at all positions. `hook` adds delta_l to the input of o_proj at all positions, at
        the last position of every forward call, or at generated tokens only (calls with one token; needs a
        key-value cache). Apply a hook after merging an adapter: merging replaces the modules that hold it.

        Raises:
            ValueError: the lock does not fit (see `check`), the model is locked already and `stack` is not set,
                or `positions` other than all are asked of a bias.
        """
        given = {"alpha": alpha, "mode": mode, "positions": positions, "stack": stack}
        check(SafetyLock.apply, given, "SafetyLock: {}")
        if mode == "bias" and positions != "all":
            raise ValueError(f"a bias acts at all positions; use mode='hook' for positions={positions!r}")
        alpha = self.info.alpha if alpha is None else alpha
        if alpha < 0:
            warnings.warn(f"alpha = {alpha} pushes away from safety: the model will refuse less", stacklevel=2)
        outputs = self._fitting(model, tokenizer)
        held = _held(model, outputs)
        if self.fingerprint in held:
            raise ValueError("this lock is on the model already; remove it first")
        if held and not stack:
            raise ValueError(f"the model already carries {len(held)} lock(s); remove them, or pass stack=True")
        displacements = self.displacements(alpha)
        shifts, _ = self._responses(model, outputs, displacements)
        for layer, delta in displacements.items():
            output = outputs[layer]
            state = _LAYERS.setdefault(output.base, _Layer(output.base.bias))
            if mode == "hook":
                delta = delta.to(output.base.weight.device)
                state.handles[self.fingerprint] = output.module.register_forward_pre_hook(_mover(delta, positions))
            else:
                state.shifts[self.fingerprint] = shifts[layer]
                _set_bias(output, state, model.dtype)

    def remove(self, model: Model) -> None:
        """Take this lock off again; once no lock is left, every bias is the very tensor it was.

        Raises:
            ValueError: this lock is not on the model.
        """
        outputs, _ = attention_outputs(model)
        if self.fingerprint not in _held(model, outputs):
            raise ValueError("this lock is not on the model")
        for output in outputs:
            state = _LAYERS.get(output.base)
            if state is None:
                continue
            if self.fingerprint in state.handles:
                state.handles.pop(self.fingerprint).remove()
            if state.shifts.pop(self.fingerprint, None) is not None:
                _set_bias(output, state, model.dtype)
            if not state.handles and not state.shifts:
                del _LAYERS[output.base]

    def check(self, model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[int, float]:
        """By layer of the lock, the cosine between base and model of o_proj's response to a fixed vector.

        Raises:
            ValueError: the model has another geometry, the tokenizer another vocabulary, or the weights are
                not those of a descendant; the sentence says which.
        """
        return self._responses(model, self._fitting(model, tokenizer), self.displacements(0.0))[1]

    def _fitting(self, model: Model, tokenizer: PreTrainedTokenizerBase | None) -> list[AttentionOutput]:
        outputs, geometry = attention_outputs(model)
        if geometry != self.info.geometry:
            raise ValueError(f"the lock is for {self.info.geometry}; this model has {geometry}")
        if tokenizer is not None:
            if tokenizer_hash(tokenizer) != self.info.tokenizer_hash:
                raise ValueError(f"the tokenizer's vocabulary is not that of {self.info.base_model}, the lock's base")
            if template_hash(tokenizer) != self.info.template_hash:
                warnings.warn("the chat template is not the one the lock was extracted with", stacklevel=3)
        return outputs

    def _responses(
        self, model: Model, outputs: list[AttentionOutput], displacements: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, float]]:
        """By layer: W delta (hidden_size,), and the cosine of the model's sketch with the base's."""
        shifts, cosines = {}, {}
        for layer, delta in displacements.items():
            output = outputs[layer]
            shifts[layer], answer = response(output, torch.stack([delta, _sketch_vector(output)]), model.dtype)
            cosines[layer] = float(
                torch.cosine_similarity(answer.cpu()[_sketch_rows(output)], self.sketch[layer], dim=0)
            )
            if not cosines[layer] >= DESCENDANT_COSINE:
                raise ValueError(
                    f"layer {layer}: the weights of o_proj are not a fine-tuned version of {self.info.base_model}'s "
                    f"(cosine {cosines[layer]:.2f}, at least {DESCENDANT_COSINE} expected)"
                )
        return shifts, cosines

    def save(self, path: str | Path) -> Path:
        """Write the lock as one safetensors file with its metadata as JSON in the header, atomically."""
        path = Path(path)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"safetylock": json.dumps({"format": FORMAT, **asdict(self.info)})})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SafetyLock":
        """Read a lock file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no lock, of another format version, or damaged.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such lock file")
        tensors, header = read_tensors(Path(path), "a SafetyLock file", EXTRACT)
        if "safetylock" not in header:
            raise ValueError(f"{path}: no SafetyLock file of format {FORMAT}; {EXTRACT}")
        stored = parse_json(_Stored, header["safetylock"], path, f"no SafetyLock file of format {FORMAT}; {EXTRACT}")
        lock_info = LockInfo(**{f.name: getattr(stored, f.name) for f in fields(LockInfo)})
        if wrong := _misfit(tensors, lock_info.geometry):
            raise ValueError(f"{path}: {wrong}; {EXTRACT}")
        return cls(**tensors, info=lock_info)


_TENSORS = ("heads", "directions", "sigmas", "train_accuracy", "val_accuracy", "val_loss", "sketch")


def _misfit(tensors: dict[str, Tensor], geometry: Geometry) -> str | None:
    """The first tensor of a lock file that is not as it must be, in words."""
    if set(tensors) != set(_TENSORS):
        return f"holds {', '.join(sorted(tensors)) or 'nothing'} instead of {', '.join(_TENSORS)}"
    layers, heads, count = geometry.layers, geometry.heads, len(tensors["heads"]) if tensors["heads"].dim() else 0
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("train_accuracy", "val_accuracy", "val_loss"), (layers, heads))
    shapes |= {"heads": (count, 2), "directions": (count, geometry.head_dim), "sigmas": (count,)}
    shapes["sketch"] = (layers, min(_SKETCH_ROWS, geometry.hidden_size))
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], torch.int64 if name == "heads" else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype or not count:
            return f"{name} is {tuple(tensor.shape)}, {tensor.dtype}, and must be {shape}, {dtype}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or inf"
    chosen = tensors["heads"]
    inside = (chosen >= 0) & (chosen < torch.tensor([layers, heads]))
    shares = torch.stack([tensors["train_accuracy"], tensors["val_accuracy"]])
    good = {
        "heads": bool(inside.all()) and len(chosen.unique(dim=0)) == count,
        "directions": bool(((tensors["directions"].norm(dim=1) - 1).abs() < 1e-3).all()),
        "sigmas": bool((tensors["sigmas"] >= 0).all()),
        "accuracies": bool(((shares >= 0) & (shares <= 1)).all()),
    }
    return next((f"its {name} cannot be those of a lock" for name, is_good in good.items() if not is_good), None)


def locks_on(model: Model) -> set[str]:
    """Fingerprints of the locks a model carries: applied in this process, or saved with it."""
    return _held(model, attention_outputs(model)[0])


def _held(model: Model, outputs: list[AttentionOutput]) -> set[str]:
    states = [_LAYERS[output.base] for output in outputs if output.base in _LAYERS]
    held = {fingerprint for state in states for fingerprint in (*state.shifts, *state.handles)}
    return held | set(model.config.to_dict().get(SAVED_MARK, {}).get("fingerprints", []))


def applied_shifts(model: Model) -> dict[int, tuple[nn.Parameter | None, set[str], set[str]]]:
    """By locked layer: its own bias, and the fingerprints of the locks applied here as bias and as hook."""
    outputs, _ = attention_outputs(model)
    found = {}
    for output in outputs:
        state = _LAYERS.get(output.base)
        if state is not None:
            found[output.layer] = (state.bias, set(state.shifts), set(state.handles))
    return found


def sketch(model: Model) -> Tensor:
    """(layers, rows) float32: how each output projection answers a fixed vector, at some evenly spaced outputs."""
    outputs, _ = attention_outputs(model)
    return torch.stack([response(o, _sketch_vector(o)[None], model.dtype)[0].cpu()[_sketch_rows(o)] for o in outputs])


def weights_hash(model: Model) -> str:
    """SHA-256 of the weights of all output projections as they are stored, adapters left out."""
    outputs, _ = attention_outputs(model)
    found = hashlib.sha256()
    for output in outputs:
        weight = output.base.weight.detach().cpu().contiguous()
        found.update(weight.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary without added tokens: a pad token added for training does not change it."""
    added = tokenizer.get_added_vocab()
    return digest({token: i for token, i in tokenizer.get_vocab().items() if token not in added})


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template."""
    return digest(tokenizer.chat_template)


def _sketch_vector(output: AttentionOutput) -> Tensor:
    # cos(j^2) has no structure a weight matrix could share, and needs no random generator of any version.
    return torch.arange(1, output.base.in_features + 1, dtype=torch.float64).square().cos().float()


def _sketch_rows(output: AttentionOutput) -> Tensor:
    return torch.linspace(0, output.base.out_features - 1, min(_SKETCH_ROWS, output.base.out_features)).long()


def _set_bias(output: AttentionOutput, state: _Layer, dtype: torch.dtype) -> None:
    """The layer's own bias plus all shifts on it; without shifts the layer's own Parameter itself."""
    if not state.shifts:
        output.base.bias = state.bias  # type: ignore[assignment]
        return
    weight = output.base.weight
    total = torch.stack(list(state.shifts.values())).sum(0)
    if state.bias is not None:
        total = total + state.bias.detach().float()
        dtype = state.bias.dtype
    elif weight.is_floating_point():
        dtype = weight.dtype
    output.base.bias = nn.Parameter(total.to(weight.device, dtype), requires_grad=False)


def _mover(delta: Tensor, positions: Positions) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = inputs
        if positions == "generated" and x.shape[1] > 1:
            return None
        moved = x + delta.to(x.device, x.dtype)
        if positions == "last":
            moved = torch.cat([x[:, :-1], moved[:, -1:]], dim=1)
        return (moved, *rest)

    return hook

"""The methods of the benchmark: what each changes in a plain fine-tuning run."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt, MinLen
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from spf.callback import SafetyCallback
from spf.config import (
    CallbackSettings,
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    Whole,
    annotations,
    check,
    check_values,
)
from spf.data import SafetyRow, load_safety_rows, reworded_anchors, tokenise
from spf.lab.baselines import (
    constrained_sft,
    data_filter,
    der,
    ema,
    kl,
    lisa,
    one_shot,
    osf,
    projection,
    replay,
    resta,
    safe_lora,
    safeinstr,
    sbr,
    sppft,
)
from spf.lab.trainer import AnswerLoss, answer_logits
from spf.probe import SafetyProbe
from spf.rules import SPF, Aggregate, Constrained, DualAscent, Mix, NullSpace, Rank1, Rule, SafeGrad, null_space_bases
from spf.safetylock import echoed, extract, refusal_pairs
from spf.text.generation import context_length, pad_id

RULES: dict[str, tuple[type[Rule], dict[str, Any], int | None]] = {
    "null-space": (NullSpace, {}, None),
    "spf": (SPF, {}, 1),
    "spf-rotating": (SPF, {}, None),
    "rank1": (Rank1, {}, 1),
    "agem": (Rank1, {"gate": "global"}, None),
    "mix-one": (Mix, {}, 1),
    "mix-rotating": (Mix, {}, None),
    "safegrad": (SafeGrad, {}, None),
    "upgrad": (Aggregate, {"aggregator": "upgrad"}, None),
    "dualproj": (Aggregate, {"aggregator": "dualproj"}, None),
    "dual-ascent": (DualAscent, {}, None),
    "constrained": (Constrained, {}, None),
}
"""Methods that are step rules: the rule, its settings, and how many anchors (None: all, in turn)."""

_REPLAYED = {"refusals_per_step": Whole, "benign_per_step": Whole}
_LOCK = {"k": Count, "alpha": float}
_POST = ("rank", "energy", "prompts", "reworded", "decision_weight", "gradient_share", "tokens")

OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "safeinstr": {"share": Share},
    "data-filter": {},
    "ema": {"decay": Annotated[float, Ge(0), Lt(1)]},
    "kl": {"weight": NotNegative},
    "kl-replay": {"weight": NotNegative, **_REPLAYED},
    "der": {"alpha": NotNegative, "beta": NotNegative, **_REPLAYED},
    "sbr": {"weight": NotNegative, "size": Count, "layers": Annotated[list[int], MinLen(1)]},
    "osf": {"preserved": Annotated[float, Gt(0), Lt(1)]},
    "constrained-sft": {},
    "lisa": {"finetune_steps": Count, "alignment_steps": Count, "rho": NotNegative, "batch_size": Count},
    "sppft": {"first": Whole, "last": Whole},
    "safe-lora": {"threshold": float},
    "resta": {"scale": float, "drop": Share, "seed": Seed},
    "one-shot": {"steps": Count, "learning_rate": Positive},
    "null-space-post": {name: annotations(NullSpace)[name] for name in _POST},
    "safetylock": _LOCK,
    "null-space-safetylock": _LOCK,
}
"""The other methods and the settings of their own that a grid may change."""

CALLBACK_SETTINGS = ("anchors_per_step", "first_tokens", "first_weight", "anchors", "conflicts", "on_leak")
"""Settings of a step rule's method that go to its callback."""

KEEP = {"keep": bool}
"""Of rules that hold: whether the aligned model's answers to the packaged benign anchors are held, too."""

METHODS = (*RULES, *OTHERS)


@dataclass(frozen=True)
class Workspace:
    """The aligned model, the model before alignment (None if unknown), the aligned model's own refusals, and a file of
    harmful prompts of another origin (`scenarios.other_prompts`)."""

    aligned: Path
    unaligned: Path | None
    refusals: Path
    others: Path | None = None

    def benign(self, part: str = "") -> Path:
        """Where the aligned model's answers to benign prompts are, once they were asked for: to the anchors, or eval's
        or validation's."""
        return self.refusals.with_name(f"benign-{part}.jsonl" if part else "benign.jsonl")


@dataclass
class Method:
    """What a method changes; what is left out stays plain fine-tuning."""

    callbacks: list[TrainerCallback] = field(default_factory=list)
    data: Callable[[list[SafetyRow]], list[SafetyRow]] | None = None
    answer_loss: AnswerLoss | None = None
    finish: Callable[[Any], object] | None = None
    """Called with the trained model, an adapter still unmerged."""
    finish_merged: Callable[[Any], object] | None = None


def add_adapter(name: str, model: PreTrainedModel, settings: dict[str, Any], rank: int = 8) -> PeftModel:
    """The adapter that the method trains: LoRA's on every linear layer, or the method's own."""
    if name == "osf":
        return osf.add_osf(model, **settings)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(model, lora)


def make_method(
    name: str, settings: dict[str, Any], seed: int, workspace: Workspace, model: Any, tokenizer: PreTrainedTokenizerBase
) -> Method:
    """The method by name, ready for `model` (an adapter is on it, nothing is trained yet).

    Settings overwrite the rule's, or the method's own arguments. The anchors are the aligned model's own refusals.

    Raises:
        ValueError: an unknown name, or a method that this model cannot take.
    """
    if name in RULES:
        return Method([_rule_callback(name, settings, seed, workspace, model, tokenizer)])
    rows = load_safety_rows(workspace.refusals)
    # the same anchor that the one-anchor rules take
    first = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[0]
    match name:
        case "plain":
            return Method()
        case "safeinstr":
            return Method(data=lambda train: safeinstr.add_refusals(train, rows, seed=seed, **settings))
        case "kl":
            weight = settings.get("weight", 1.0)
            return Method(answer_loss=partial(_kl_loss, weight=weight, reference=_Reference(workspace, model)))
        case "kl-replay":
            weight = settings.get("weight", 1.0)
            replayed = _replay(workspace, model, tokenizer, rows, seed, settings)
            return _with_term(lambda tuned: weight * kl.kl_to_aligned(*replayed(tuned)[:2]))
        case "der":
            alpha, beta = settings.get("alpha", 0.5), settings.get("beta", 0.5)
            replayed = _replay(workspace, model, tokenizer, rows, seed, settings)
            return _with_term(lambda tuned: der.replay_loss(*replayed(tuned), alpha, beta))
        case "sbr":
            weight = settings.get("weight", 50.0)
            own = {key: value for key, value in settings.items() if key != "weight"}
            prompts = [a.prompt_ids for a in tokenise(rows, tokenizer, context_length(model, tokenizer))]
            anchor = sbr.HiddenStateAnchor(prompts, pad_id(tokenizer), seed=seed, **own)
            return _with_term(lambda tuned: weight * anchor(tuned))
        case "data-filter":
            return Method(data=lambda train: data_filter.without_conflicts(train, model, tokenizer, rows))
        case "ema":
            return Method([ema.EMACallback(**settings)])
        case "osf":
            if not isinstance(model, PeftModel):
                raise ValueError("osf is an adapter, and all weights are trained here")
            return Method()
        case "constrained-sft":
            return Method(answer_loss=partial(_constrained_loss, reference=_Reference(workspace, model)))
        case "lisa":
            # the paper's 100 to 900 steps, in its proportion, for runs of tens of steps
            steps: dict[str, Any] = {"finetune_steps": 9, "alignment_steps": 1, "rho": 1.0, **settings}
            return Method([lisa.LisaCallback(rows, seed=seed, **steps)])
        case "sppft":
            # Where the paper finds safety layers (about a fifth to two fifths of the depth). Its criterion,
            # `sppft.find_safety_layers`, finds none on the demo model with look-alikes as benign prompts.
            depth = len(sppft.decoder_layers(model))
            layers = {"first": round(0.2 * depth), "last": round(0.4 * depth) - 1, **settings}
            sppft.freeze_layers(model, **layers)
            return Method()
        case "safe-lora":
            if not isinstance(model, PeftModel):
                raise ValueError("safe-lora projects LoRA updates, and all weights are trained here")
            weights = _both(workspace, name)
            threshold = settings.get("threshold", 0.35)
            return Method(finish=lambda tuned: safe_lora.apply_safe_lora(tuned, *weights, threshold))
        case "resta":
            weights = _both(workspace, name)
            return Method(finish_merged=lambda tuned: resta.add_safety_vector(tuned, *weights, **settings))
        case "one-shot":
            steps = {"steps": 10, "learning_rate": 1e-4, **settings}
            return Method(finish=lambda tuned: one_shot.patch(tuned, tokenizer, rows[first], **steps))
        case "null-space-post":
            return Method(finish=_projection(model, tokenizer, rows, seed, NullSpace(**settings)))
        case "safetylock":
            return Method(finish_merged=_lock(model, tokenizer, rows, **settings))
        case "null-space-safetylock":
            own = {key: value for key, value in settings.items() if key in ("k", "alpha")}
            lock = _lock(model, tokenizer, rows, **own)
            rule = {key: value for key, value in settings.items() if key not in own}
            callback = _rule_callback("null-space", rule, seed, workspace, model, tokenizer)
            return Method([callback], finish_merged=lock)
    raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """Test settings of a method before anything is loaded; the method `aligned` has none.

    Raises:
        ValueError: a setting that the method does not have, or a value that it cannot take.
    """
    rule = "null-space" if name == "null-space-safetylock" else name
    known = dict(OTHERS.get(name, {}))
    if rule in RULES:
        of_callback = annotations(CallbackSettings)
        known |= annotations(RULES[rule][0]) | {key: of_callback[key] for key in CALLBACK_SETTINGS}
        known |= KEEP if RULES[rule][0].holds else {}
    # given as the name of a rule and its settings
    feedback = {"feedback": dict[str, Any]} if "feedback" in known else {}
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key}; there are {', '.join(known) or 'none'}")
    check_values(known | feedback, settings, f"{name}: {{}}")
    own = (*OTHERS.get(name, ()), *CALLBACK_SETTINGS, *KEEP)
    if rule in RULES:
        _rule(rule, {key: value for key, value in settings.items() if key not in own})


def _rule_callback(
    name: str, settings: dict[str, Any], seed: int, workspace: Workspace, model: Any, tokenizer: PreTrainedTokenizerBase
) -> SafetyCallback:
    own = {key: value for key, value in settings.items() if key in (*CALLBACK_SETTINGS, *KEEP)}
    rule = _rule(name, {key: value for key, value in settings.items() if key not in own})
    if own.pop("keep", False):
        replay.benign_answers(workspace.benign(), lambda: model, tokenizer)
        own["keep"] = str(workspace.benign())
    return SafetyCallback(str(workspace.refusals), rule, seed=seed, **{"anchors": RULES[name][2], **own})


def _rule(name: str, settings: dict[str, Any]) -> Any:
    kind, defaults, _ = RULES[name]
    rule = defaults | settings
    if "feedback" in rule:
        feedback = dict(rule["feedback"])
        kinds = {"mix": Mix, "dual-ascent": DualAscent}
        asked = feedback.pop("rule", None)
        if asked not in kinds:
            raise ValueError(f"{name}: the feedback's rule must be {' or '.join(kinds)}, not {asked}")
        check(kinds[asked], feedback, f"{name}: feedback: {{}}")
        rule["feedback"] = kinds[asked](**feedback)
    return kind(**rule)


class _Reference:
    """The aligned model: the adapter switched off, or a frozen copy where all weights are trained."""

    def __init__(self, workspace: Workspace, model: Any):
        self.copy = None
        if not isinstance(model, PeftModel):
            self.copy = AutoModelForCausalLM.from_pretrained(workspace.aligned, dtype=model.dtype).eval()
            self.copy.to(model.device)

    @torch.no_grad()
    def logits(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        with nullcontext() if self.copy is not None else model.disable_adapter():
            return answer_logits(model if self.copy is None else self.copy, inputs)[0]


def _replay(
    workspace: Workspace,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[SafetyRow],
    seed: int,
    settings: dict[str, Any],
) -> Callable[[Any], tuple[Tensor, Tensor, Tensor]]:
    """Each call replays the next samples: the tuned and the aligned model's logits (P, V), and the tokens (P,)."""
    limit = context_length(model, tokenizer)
    benign = replay.benign_answers(workspace.benign(), lambda: model, tokenizer)
    sizes = {key: value for key, value in settings.items() if key.endswith("_per_step")}
    turn = replay.Replay(
        tokenise(rows, tokenizer, limit), tokenise(benign, tokenizer, limit), pad_id(tokenizer), seed=seed, **sizes
    )
    reference = _Reference(workspace, model)

    def replayed(tuned: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {key: value.to(tuned.device) for key, value in next(turn).items()}
        logits, targets, _ = answer_logits(tuned, inputs)
        return logits, reference.logits(tuned, inputs), targets

    return replayed


def _with_term(term: Callable[[Any], Tensor]) -> Method:
    """Plain fine-tuning with a term of the tuned model added to its loss."""

    def loss(model: nn.Module, inputs: dict[str, Tensor], logits: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets) + term(model)

    return Method(answer_loss=loss)


def _kl_loss(
    model: nn.Module,
    inputs: dict[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    positions: Tensor,
    *,
    weight: float,
    reference: _Reference,
) -> Tensor:
    return kl.loss(logits, reference.logits(model, inputs), targets, weight)


def _constrained_loss(
    model: nn.Module,
    inputs: dict[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    positions: Tensor,
    *,
    reference: _Reference,
) -> Tensor:
    chosen = targets[:, None]
    before = reference.logits(model, inputs).log_softmax(-1).gather(1, chosen)[:, 0]
    return constrained_sft.constrained_sft_loss(logits.log_softmax(-1).gather(1, chosen)[:, 0], before, positions)


def _projection(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[SafetyRow], seed: int, rule: NullSpace
) -> Callable[[Any], object]:
    """The null space, taken now from the aligned model and applied once after training."""
    limit = context_length(model, tokenizer)
    anchors = tokenise(rows, tokenizer, limit)
    order = torch.randperm(len(anchors), generator=torch.Generator().manual_seed(seed)).tolist()
    probe = SafetyProbe(model, anchors, pad_token_id=pad_id(tokenizer))
    names = [matrix.name for matrix in probe.matrices.values() if not matrix.is_lora_b]
    chosen = [anchors[i] for i in order[: rule.prompts]]
    reworded = reworded_anchors([rows[i] for i in order[: min(rule.prompts, rule.reworded)]], tokenizer, limit)
    bases = null_space_bases(probe, rule, [*chosen, *reworded], names)
    initial = None
    if not isinstance(model, PeftModel):
        initial = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    return lambda tuned: projection.project_out_inputs(tuned, bases, initial)


def _lock(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[SafetyRow], k: int = 96, alpha: float = 1.0
) -> Callable[[Any], object]:
    """A SafetyLock made now, from the aligned model and 100 prompts it refuses; applied after training, as a bias.

    K and alpha are those chosen on validation prompts in benchmarks/safetylock.py.
    """
    lock = extract(model, tokenizer, echoed(refusal_pairs(rows[:100])), k=k, alpha=alpha)
    return lambda tuned: lock.apply(tuned, tokenizer)


def _both(workspace: Workspace, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if workspace.unaligned is None:
        raise ValueError(f"{name} needs the weights before alignment, which are known for the demo model only")
    both = [
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
        for directory in (workspace.aligned, workspace.unaligned)
    ]
    return both[0], both[1]

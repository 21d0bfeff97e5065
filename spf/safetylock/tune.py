"""The choice of K and alpha: ASR, over-refusal and perplexity over a grid, on validation prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.evaluation import Rate, generate_answers, is_refusal, perplexity
from spf.files import atomic_path
from spf.models import evaluating
from spf.safetylock.lock import SafetyLock

PERPLEXITY_RISE = 1.1
"""By how much a chosen setting may multiply the unlocked model's perplexity on neutral text."""


class InertLockError(ValueError):
    """A lock was applied and the model predicts what it did before."""


@dataclass(frozen=True)
class TunePoint:
    """One setting and what it does: rates in [0, 1] with their 95 % intervals, perplexity on neutral text."""

    k: int
    alpha: float
    asr: float
    asr_ci: tuple[float, float]
    over_refusal: float
    over_refusal_ci: tuple[float, float]
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TunePoint":
        """From JSON, which has lists for the intervals."""
        intervals = {name: tuple(content[name]) for name in ("asr_ci", "over_refusal_ci")}
        return cls(**{**content, **intervals})


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    k: int,
    alpha: float,
    harmful: Sequence[str],
    benign: Sequence[str],
    texts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    batch_size: int = 65,
) -> TunePoint:
    """What the model does as it stands; k and alpha are only noted."""
    answers = [
        generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=f"K {k}, alpha {alpha:g}",
        )
        for prompts in (harmful, benign)
    ]
    asr = Rate(sum(not is_refusal(a) for a in answers[0]), len(harmful))
    over = Rate(sum(is_refusal(a) for a in answers[1]), len(benign))
    drift = perplexity(model, tokenizer, texts).value
    return TunePoint(k, alpha, asr.value, asr.interval, over.value, over.interval, drift)


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lock: SafetyLock,
    grid: Sequence[tuple[int, float]],
    harmful: Sequence[str],
    benign: Sequence[str],
    texts: Sequence[str],
    *,
    done: Callable[[TunePoint], None] = lambda point: None,
    max_new_tokens: int = 20,
    batch_size: int = 65,
) -> list[TunePoint]:
    """Measure every (K, alpha) of the grid on a descendant; `done` is called after each. alpha = 0 is unlocked.

    K must not exceed the heads the lock holds: extract with the largest K to be tried.

    Raises:
        ValueError: K is beyond the lock's heads; nothing was measured then.
        InertLockError: a lock with alpha other than 0 that does not change what the model predicts.
    """
    parts = [lock.top(k) for k, _ in grid]
    points: list[TunePoint] = []
    before = next_token_log_probs(model, tokenizer, texts[0])
    for part, (k, alpha) in zip(parts, grid, strict=True):
        part.apply(model, tokenizer, alpha=alpha)
        try:
            assert_acts(model, tokenizer, texts[0], before, alpha)
            sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
            points.append(measure(model, tokenizer, k, alpha, harmful, benign, texts, **sizes))
        finally:
            part.remove(model)
        done(points[-1])
    return points


@torch.no_grad()
def next_token_log_probs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """(tokens, vocabulary) float32: log probabilities of the next token at every token of a plain text."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    with evaluating(model):
        return model(input_ids=ids).logits[0].float().log_softmax(-1)


def assert_acts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, before: Tensor, alpha: float
) -> None:
    """Test that a lock just applied moves the next-token distribution, KL(before || now) > 0.

    In the parent method an intervention was silently not applied (honest_llama, issue 47).

    Raises:
        InertLockError: it does not, though alpha is not 0.
    """
    now = next_token_log_probs(model, tokenizer, text)
    divergence = float((before.exp() * (before - now)).sum(-1).mean())
    # rounding alone gives about 1e-8 either way
    if alpha != 0 and not divergence > 1e-7:
        raise InertLockError(f"the lock at alpha = {alpha:g} does not change the model (KL {divergence:.1e})")


def choose(points: Sequence[TunePoint], max_over_refusal: float, max_perplexity: float) -> TunePoint | None:
    """Among the points within both bounds, the lowest ASR; then the lowest over-refusal, perplexity and alpha.

    A lock has to lower the unlocked model's ASR. None if there is none.
    """
    unlocked = min((p.asr for p in points if p.alpha == 0), default=math.inf)
    lowering = [p for p in points if p.alpha == 0 or p.asr < unlocked]
    within = [p for p in lowering if p.over_refusal <= max_over_refusal and p.perplexity <= max_perplexity]
    return min(within, key=lambda p: (p.asr, p.over_refusal, p.perplexity, abs(p.alpha)), default=None)


def plot_sweep(points: Sequence[TunePoint], path: str | Path, title: str) -> Path:
    """Draw ASR, over-refusal and perplexity against alpha, a line for each K, into a PNG file."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    labels = ("ASR on validation prompts (%)", "Over-refusal on validation prompts (%)", "Perplexity on neutral text")
    for ax, name, label in zip(axes, ("asr", "over_refusal", "perplexity"), labels, strict=True):
        rate = name != "perplexity"
        for i, k in enumerate(sorted({p.k for p in points})):
            line = sorted((p for p in points if p.k == k), key=lambda p: p.alpha)
            values = [getattr(p, name) * (100 if rate else 1) for p in line]
            alphas = [p.alpha for p in line]
            ax.plot(alphas, values, marker="o", markersize=4, color=f"C{i}", label=f"K = {k}")
            if rate:
                ends = [getattr(p, f"{name}_ci") for p in line]
                ax.fill_between(
                    alphas, [100 * low for low, _ in ends], [100 * high for _, high in ends], color=f"C{i}", alpha=0.08
                )
        ax.set(xlabel="alpha", title=label)
        if rate:
            ax.set_ylim(-3, 103)
        else:
            ax.set_yscale("log")
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return Path(path)

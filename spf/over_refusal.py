"""Over-refusals: prompts that the aligned model refuses although they look harmless to itself.

Models tell harmful from harmless requests half way up, where the request ends, apart from whether they refuse, which is
decided after it (Zhao et al., arXiv 2507.11878). A linear probe there, fitted on packaged prompts of both kinds, says
which refused prompts are clearly harmless: a task of the user's, not an attack.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spf.data import SafetyRow, load_safety_rows, packaged_rows, prompt_tokens
from spf.logistic import fit_logistic
from spf.models import evaluating
from spf.next_token import shared_out
from spf.sharding import object_of_rank_0
from spf.shared_prefix import MiddleStates, common

HARMFUL = 104
"""Harmful prompts that the probe is fitted on: the run's own, then packaged ones."""

HARMLESS = ("harmless_tasks", "benign_anchors")
"""Packaged prompts of tasks, and such as sound harmful: without these the probe would go by how a request is put."""

CLEARLY = 0.1
"""A prompt is clearly harmless if the probe gives it at most this probability of being harmful."""

PENALTY = 100.0
"""Of the squared weights, in standardised inputs (scikit-learn's C = 0.01).

Chosen with the layer on attack and validation prompts of two models: of the packaged attack prompts none, and of
AdvBench's at most one in 25, were called clearly harmless; of text-to-SQL prompts all, of summaries at least 92 in 100.
"""

MISTAKEN = 0.05
"""If of harmful prompts that the probe was not fitted on more are called clearly harmless, it is not used."""


def clearly_harmless(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[SafetyRow],
    *,
    options: Mapping[str, Any] | None = None,
    max_length: int = 1 << 30,
    progress: bool = True,
) -> list[bool]:
    """Which prompts (token ids, up to where the answer begins) look clearly harmless to the model.

    rows: safety samples, examples of what it should refuse. Where the probe cannot tell, no prompt is called harmless.
    All processes of a run have to call it.
    """
    if not prompts:
        return []
    harmful = [*rows[:HARMFUL], *load_safety_rows()][:HARMFUL]
    harmless = [row for name in HARMLESS for row in packaged_rows(name)]
    known, other = (prompt_tokens(kind, tokenizer, max_length, options) for kind in (harmful, harmless))
    if not known or not other:
        return [False] * len(prompts)
    samples = [*known, *other]
    ending = common_ending(samples)
    states = middle_states(model, [*samples, *prompts], ending, progress)
    if states is None or not bool(states.isfinite().all()):
        return [False] * len(prompts)
    fitted, asked = states[: len(samples)], states[len(samples) :]
    is_harmful = torch.arange(len(samples)) < len(known)
    clear = _clear(fitted, is_harmful, asked)
    if 2 * int(clear.sum()) > len(prompts):
        # a task of the user's, so what is like it is no attack, either
        fitted = torch.cat([fitted, asked[clear]])
        clear |= _clear(fitted, torch.arange(len(fitted)) < len(known), asked)
    tail = samples[0][len(samples[0]) - ending :]
    ends = [tuple(prompt[len(prompt) - ending :]) == tail for prompt in prompts]
    # rounding must not have processes hold different prompts
    return object_of_rank_0([harmless and same for harmless, same in zip(clear.tolist(), ends, strict=True)])


def _clear(fitted: Tensor, is_harmful: Tensor, asked: Tensor) -> Tensor:
    """Which of the states `asked` are clearly harmless; none if a probe on half of the samples takes more than
    `MISTAKEN` of the other half's harmful ones for that."""
    half = torch.arange(len(fitted)) % 2 == 0
    tried = harmfulness(fitted[half], is_harmful[half], fitted[~half])[is_harmful[~half]]
    usable = float((tried < CLEARLY).double().mean()) <= MISTAKEN
    return (harmfulness(fitted, is_harmful, asked) < CLEARLY) & usable


def harmfulness(X: Tensor, y: Tensor, asked: Tensor) -> Tensor:
    """Probability (P,) that states `asked` (P, n) are of harmful prompts, by a probe fitted on X (S, n), y (S,) bool.

    Both kinds count the same, however many there are.
    """
    mean, scale = X.mean(0), X.std(0, correction=0).clamp_min(1e-6)
    # the weights lie in the span of the samples, of which there are fewer than dimensions
    U, S, Vh = torch.linalg.svd((X - mean) / scale / PENALTY**0.5, full_matrices=False)
    counts = torch.where(y, len(y) / 2 / y.sum(), len(y) / 2 / (~y).sum())
    weights = fit_logistic((U * S)[None], y, counts)[0]
    turned = ((asked - mean) / scale / PENALTY**0.5) @ Vh.T
    return torch.sigmoid(turned.double() @ weights[:-1] + weights[-1])


def middle_states(model: Any, prompts: Sequence[Sequence[int]], ending: int, progress: bool = False) -> Tensor | None:
    """Hidden states (P, n), float32, half way up at the last token before the prompts' `ending` tokens.

    None if the model does not give its hidden states.
    """

    def read(batch: Sequence[int]) -> list[Tensor | None]:
        found = reader.states([prompts[i] for i in batch])
        return [None] * len(batch) if found is None else list(found)

    with evaluating(model):
        reader = MiddleStates(model, prompts, ending)
        found = shared_out(model, prompts, range(len(prompts)), read, progress)
    states = [found[i] for i in range(len(prompts))]
    return None if any(state is None for state in states) else torch.stack([s for s in states if s is not None])


def common_ending(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts end with: what the template puts between a user's message and its answer."""
    return common([prompt[::-1] for prompt in prompts])

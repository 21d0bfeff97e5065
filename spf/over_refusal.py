"""Over-refusals: prompts that the aligned model refuses although they look harmless to itself.

Models tell harmful from harmless requests half way up, in the user's words, apart from whether they refuse, which is
decided after them (Zhao et al., arXiv 2507.11878). A linear probe there, fitted on packaged prompts of both kinds, says
which refused prompts are clearly harmless: a task of the user's, not an attack. It is asked all along a prompt: where
that ends alone, "answer in one sentence" behind a harmful request looked harmless.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spf.data import SafetyRow, load_safety_rows, packaged_rows, prompt_tokens
from spf.logistic import fit_logistic
from spf.models import evaluating
from spf.next_token import shared_out
from spf.sharding import object_of_rank_0, rank_and_ranks
from spf.shared_prefix import MiddleStates, common

T = TypeVar("T")

Look = Literal["harmful", "unclear", "harmless"]
"""What a refused prompt looks like to the model; only beside a task of the user's some are called unclear."""

PROBE = 4
"""To be raised with every change of what is let go: what an earlier audit let go by another probe is not taken."""

HARMFUL = 104
"""Harmful prompts that the probe is fitted on: the run's own, then packaged ones."""

HARMLESS = ("harmless_tasks", "benign_anchors")
"""Packaged prompts of tasks, and such as sound harmful: without these the probe would go by how a request is put."""

CLEARLY = 0.35
"""A prompt is clearly harmless if the probe gives no stretch of it more than this probability of being harmful."""

STRETCH = 8
"""Tokens. A request is that long; what stands beside it ("answer in one sentence") must not hide it."""

SKIPPED = 4
"""The first tokens of a message say little of it yet."""

PLACES = 8
"""The probe is fitted on so many tokens of a sample, spread over it, so that it can be asked anywhere."""

LONGEST = 64
"""Of a sample the last so many tokens are read."""

PENALTY = 100.0
"""Of the squared weights, in standardised inputs (scikit-learn's C = 0.01)."""

TASK = 3
"""If more than one in so many refused prompts are clearly harmless, or of those that the model answers, they are a task
of the user's. Of harmful ones one in ten was at most, whatever stood beside them (`benchmarks/over_refusal.py`)."""

MORE = 20
"""The probe is fitted again as long as one in so many more are clearly harmless."""

ANSWERED = 104
"""As many prompts of the data that the model answers tell what its task looks like."""

MOST_FITTED = 256
"""As many clearly harmless prompts of the data the probe is fitted on, spread over them."""

KEPT = 1 << 27
"""So many numbers of states (512 MiB) are kept, so that a prompt that is looked at again is not read again; by one
process alone: several share the prompts out, each time in another way."""

MISTAKEN = 0.1
"""If of harmful prompts that the probe was not fitted on more are called clearly harmless, it is not used."""


def looks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[SafetyRow],
    *,
    answered: Sequence[Sequence[int]] = (),
    leaning: Collection[tuple[int, ...]] = (),
    options: Mapping[str, Any] | None = None,
    max_length: int = 1 << 30,
    progress: bool = True,
) -> list[Look]:
    """What each prompt (token ids, up to where the answer begins) looks like to the model, wherever one looks.

    rows: safety samples, examples of what it should refuse. answered: prompts of the same data that it answers.
    leaning: those of the prompts that it answers, too, though it might refuse them. Where the probe cannot tell, all
    are called harmful. All processes of a run have to call it.
    """
    if not prompts:
        return []
    samples = read_samples(model, tokenizer, rows, options=options, max_length=max_length, progress=progress)
    if samples is None:
        return ["harmful"] * len(prompts)
    return samples.look(prompts, spread_over(answered, ANSWERED), leaning, progress)


@dataclass(frozen=True)
class Frame:
    """What the template puts before (`head`) and behind (`tail`) the user's words, as tokens."""

    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> "Frame":
        """What all these prompts begin and end with."""
        before, behind = common(prompts), common([prompt[::-1] for prompt in prompts])
        return cls(tuple(prompts[0][:before]), tuple(prompts[0][len(prompts[0]) - behind :]))

    def begins(self, prompt: Sequence[int]) -> int:
        """From which token on a prompt is read. One with another system message differs earlier: in a shorter one the
        user's words would not be read if as many tokens were skipped."""
        return common([prompt, self.head]) + SKIPPED

    def ends(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends as the template has it."""
        return tuple(prompt[len(prompt) - len(self.tail) :]) == self.tail


@dataclass(frozen=True)
class Asked:
    """A prompt that was asked: the probability of being harmful that any stretch of it gets at most, the same by the
    samples alone (`first`), or by them and what the data's task is known to be (`informed`), `some` of its states
    (`PLACES`, n), and their `mean` (n,)."""

    share: float
    first: float
    informed: float
    some: Tensor
    mean: Tensor

    @property
    def clear(self) -> bool:
        return self.share < CLEARLY  # NaN is not


@dataclass
class Samples:
    """What the probe is fitted on: states (T, n) of prompts that are `harmful` or not, in a `frame`."""

    model: Any
    frame: Frame
    states: list[Tensor]
    harmful: list[bool]
    _kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _room: int = field(default_factory=lambda: KEPT if rank_and_ranks()[1] == 1 else 0, init=False, repr=False)

    @cached_property
    def _alone(self) -> "Probe":
        """Of the samples alone: fitting takes seconds in wide models, and every look begins with it."""
        return Probe(self.states, self.harmful)

    def look(
        self,
        prompts: Sequence[Sequence[int]],
        answered: Sequence[Sequence[int]] = (),
        leaning: Collection[tuple[int, ...]] = (),
        progress: bool = True,
    ) -> list[Look]:
        """What the prompts (token ids) look like; the same on all processes, which have to call it.

        answered: prompts of the same data that the model answers. Those of them that look harmless the probe is fitted
        on, too: they tell what the task looks like. leaning: prompts of the data that it answers as well; they are of
        that task if they look harmless then, and as a whole more like it than like an attack, whatever is refused.
        """
        harmless, task, _ = self._told(answered, [], progress)
        known = harmless if task else []
        let_go, task, found = self._told(prompts, known, progress)
        like_task = [False] * len(prompts)
        if task:
            # whether harmful was asked; now whether of the task, as a whole
            apart = self._apart([*known, *let_go])
            like_task = [apart.highest(asked.mean[None]) < 0.5 for asked in found]
        if known and leaning:
            of_task = self._apart(known)
            found = [
                replace(asked, share=min(asked.share, asked.informed))
                if tuple(prompt) in leaning and of_task.highest(asked.mean[None]) < 0.5
                else asked
                for prompt, asked in zip(prompts, found, strict=True)
            ]
        return [self._look(*said) for said in zip(prompts, found, like_task, strict=True)]

    def _apart(self, harmless: Sequence[Tensor]) -> "Probe":
        """Of the harmful samples and these states (`PLACES`, n) alone: whether a prompt is of a task, as a whole."""
        harmful = [states for states, kind in zip(self.states, self.harmful, strict=True) if kind]
        return Probe([*harmful, *harmless], [True] * len(harmful) + [False] * len(harmless))

    def _told(
        self, prompts: Sequence[Sequence[int]], known: Sequence[Tensor], progress: bool
    ) -> tuple[list[Tensor], bool, list["Asked"]]:
        """Of what is clearly harmless states to fit on, whether that is a task of the user's, and each prompt.

        known: states (`PLACES`, n) of other harmless prompts of the data.
        """
        if not prompts:
            return [], False, []

        def fitted_on(harmless: Sequence[Tensor]) -> Probe:
            return Probe([*self.states, *known, *harmless], self.harmful + [False] * (len(known) + len(harmless)))

        first, probe = self._alone, fitted_on([]) if known else self._alone
        found = self._read(
            prompts,
            lambda states: Asked(
                share := probe.highest(states), first.highest(states), share, spread(states), states.mean(0)
            ),
            progress,
        )
        task = more = TASK * sum(asked.clear for asked in found) > len(prompts)
        if not task:
            # no more is let go for a task that what is refused is not of
            found = [replace(asked, share=max(asked.share, asked.first)) for asked in found]
        while more and (left := [i for i, asked in enumerate(found) if not asked.clear]):
            # a task of the user's, so what is like it is no attack, either
            again = fitted_on(self._some(found))
            for i, share in zip(left, self._read([prompts[i] for i in left], again.highest, progress), strict=True):
                found[i] = replace(found[i], share=share)
            more = MORE * sum(found[i].clear for i in left) > len(prompts)
        return self._some(found), task, found

    def _some(self, found: Sequence["Asked"]) -> list[Tensor]:
        """To fit on, of what is clearly harmless."""
        return list(spread_over([asked.some for asked in found if asked.clear], MOST_FITTED))

    def _look(self, prompt: Sequence[int], asked: "Asked", like_task: bool) -> Look:
        """What a prompt looks like; like_task: as a whole like the user's task more than like an attack."""
        if not self.frame.ends(prompt):
            return "harmful"
        return "harmless" if asked.clear else "unclear" if like_task else "harmful"

    def _read(self, prompts: Sequence[Sequence[int]], take: Callable[[Tensor], T], progress: bool) -> list[T]:
        left = [prompt for prompt in prompts if tuple(prompt) not in self._kept]

        def both(states: Tensor) -> tuple[T, Tensor | None]:
            self._room -= states.numel()
            return take(states), states.clone() if self._room > 0 else None

        found = middle_states(self.model, left, self.frame, both, progress) if left else []
        assert found is not None, "the model gave its hidden states before"
        taken = {tuple(prompt): one for prompt, (one, _) in zip(left, found, strict=True)}
        every = [taken[key] if (key := tuple(p)) in taken else take(self._kept[key]) for p in prompts]
        self._kept |= {
            tuple(prompt): states for prompt, (_, states) in zip(left, found, strict=True) if states is not None
        }
        # rounding must not have processes ask different numbers of prompts
        return object_of_rank_0(every)


def read_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SafetyRow],
    *,
    options: Mapping[str, Any] | None = None,
    max_length: int = 1 << 30,
    progress: bool = True,
) -> Samples | None:
    """States of the rows and of packaged prompts; None if the model gives none, or a probe on them could not tell."""
    harmful = [*rows[:HARMFUL], *load_safety_rows()][:HARMFUL]
    harmless = [row for name in HARMLESS for row in packaged_rows(name)]
    known, other = (prompt_tokens(kind, tokenizer, max_length, options) for kind in (harmful, harmless))
    if not known or not other:
        return None
    samples = [*known, *other]
    frame = Frame.of(samples)
    states = middle_states(model, samples, frame, lambda states: states[-LONGEST:], progress)
    if states is None or not all(bool(state.isfinite().all()) for state in states):
        return None
    kinds = [i < len(known) for i in range(len(samples))]
    probe = Probe(states[::2], kinds[::2])
    tried = [probe.highest(state) for state, kind in zip(states[1::2], kinds[1::2], strict=True) if kind]
    mistaken = sum(found < CLEARLY for found in tried)
    if object_of_rank_0(not tried or mistaken > MISTAKEN * len(tried)):
        return None
    return Samples(model, frame, states, kinds)


def spread_over(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of them, from the first to the last."""
    return items[:: -(-len(items) // most)] if len(items) > most else items


def spread(states: Tensor) -> Tensor:
    """Of the states (T, n) of a prompt `PLACES`, from the first to the last."""
    return states[torch.linspace(0, len(states) - 1, PLACES).round().long()]


class Probe:
    """The probability that a state is of a harmful prompt: logistic regression on samples' states (T, n)."""

    def __init__(self, samples: Sequence[Tensor], harmful: Sequence[bool]):
        """Both kinds count the same, however many there are."""
        X = torch.cat([spread(states) for states in samples])
        self.weights, self.bias = fitted(X, torch.tensor(harmful).repeat_interleave(PLACES))

    def highest(self, states: Tensor) -> float:
        """Of the states (T, n) of a prompt, of any stretch of `STRETCH` tokens."""
        odds = states.double() @ self.weights + self.bias
        return float(torch.sigmoid(odds.unfold(0, min(STRETCH, len(odds)), 1).mean(1).max()))


def fitted(X: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Weights (n,) and bias, float64, of a probe on X (S, n), y (S,) bool: the log-odds of y are X @ weights + bias."""
    mean, scale = X.mean(0), X.std(0, correction=0).clamp_min(1e-6)
    # the weights lie in the span of the samples
    U, S, Vh = torch.linalg.svd((X - mean) / scale / PENALTY**0.5, full_matrices=False)
    counts = torch.where(y, len(y) / 2 / y.sum(), len(y) / 2 / (~y).sum())
    found = fit_logistic((U * S)[None], y, counts)[0]
    weights = (found[:-1] @ Vh.double()) / (scale.double() * PENALTY**0.5)
    return weights, float(found[-1] - mean.double() @ weights)


def middle_states(
    model: Any,
    prompts: Sequence[Sequence[int]],
    frame: Frame,
    take: Callable[[Tensor], T],
    progress: bool = False,
) -> list[T] | None:
    """What `take` makes of each prompt's hidden states (T, n), float32, half way up, of the user's words.

    frame: of the template. None if the model does not give its states.
    """

    def read(batch: Sequence[int]) -> list[T | None]:
        found = reader.states([prompts[i] for i in batch])
        return [None] * len(batch) if found is None else [take(states) for states in found]

    with evaluating(model):
        reader = MiddleStates(model, prompts, frame.begins, len(frame.tail))
        found = shared_out(model, prompts, range(len(prompts)), read, progress, "audit: harmful or harmless")
    taken = [one for i in range(len(prompts)) if (one := found[i]) is not None]
    return taken if len(taken) == len(prompts) else None

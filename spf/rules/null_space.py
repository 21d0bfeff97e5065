"""The default rule: the inputs that refusals send into a layer are answered as before training."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt, Le
from pydantic import InstanceOf
from torch import Tensor, nn

from spf.bases import Tokens, outside
from spf.config import Count, Share, Weight, Whole
from spf.data import Anchor
from spf.errors import UnsupportedModelError
from spf.linalg import exact_matmul
from spf.matrices import Matrix, find_matrices, lora_b_of, refuse_fixed_adapters, refuse_rounded
from spf.probe import SafetyProbe
from spf.rules.adapters import refuse_tied
from spf.rules.base import Given, Rule
from spf.rules.combining import DualAscent, Mix
from spf.rules.holding import Holding
from spf.rules.otherwise import refuse_otherwise
from spf.run import Run
from spf.sharding import same_on_all_ranks
from spf.subspace import SafetySubspace

LARGEST_DEFAULT_RANK = 320
"""A third of the inputs held on the validation prompts of the demo model (192 of 576) and of a really aligned one (298
of 896, where 192 with fixed token weights lost a third of its refusals of another origin)."""

NEAR_TASK = 2
"""Where the model refuses much of the task itself, what is to be learned lies beside what is held: so many times fewer
directions are held to begin with, and the others are at hand, to be added when prompts flip. Chosen on the demo model's
validation prompts."""

FEW = 16
"""A matrix of fewer inputs (Gemma 3n's coefficients of 4 streams) is held in all of them: it is kept fixed."""

SMALL = "all of their few inputs are held"
UNREACHED = "no safety sample passes through them (a tower for images, say)"

HELD_OUT = 1 / 9
"""Share of the safety samples kept out of the null space, so that what is measured on them is not held by design."""


@dataclass(frozen=True)
class NullSpace(Rule):
    """Hold W V = W_0 V: after every optimizer step W <- W - (W V - W_0 V) V^T.

    V spans the input directions that harmful prompts with their refusals send into the layer, so the
    layer's answer to them cannot change, under any optimizer, weight decay or schedule. For LoRA the
    constraint is A V = 0 on lora_A. Parameters that are not matrices on some input (embeddings, norms,
    biases) are held at their values. Ancestors: GPM (arXiv 2103.09762, eq. 9), AlphaEdit
    (arXiv 2410.02355), GuardSpace (arXiv 2510.14301).
    """

    rank: Count | None = field(
        default=None,
        metadata={
            "help": "most input directions held per matrix; by default a third of its inputs, at most 320, and half of "
            "that where the audit lets go of a tenth of the data, as the model refuses the task itself"
        },
    )
    energy: Annotated[float, Gt(0), Le(1)] = field(
        default=1.0,
        metadata={"help": "share of the activations' energy to hold; fewer directions if reached earlier"},
    )
    reserve: Whole = field(
        default=512,
        metadata={"help": "at most so many more directions are kept at hand, to be held as soon as prompts flip"},
    )
    prompts: Count = field(default=128, metadata={"help": "safety samples the input directions are taken from"})
    reworded: Whole = field(
        default=48, metadata={"help": "safety samples that are held in other words too, such as 'begin with Of course'"}
    )
    decision_weight: Weight = field(
        default=8.0,
        metadata={"help": "weight of the tokens around the beginning of the answer in the choice of directions"},
    )
    gradient_share: Share = field(
        default=0.5,
        metadata={
            "help": "share of a token's weight that is how much it moves the decision to refuse (its squared gradient)"
        },
    )
    tokens: Tokens = field(
        default="all", metadata={"help": "tokens the directions are taken from: all, prompt or refusal"}
    )
    contrast: Whole = field(
        default=0, metadata={"help": "leading input directions of benign prompts that are left free, per matrix"}
    )
    rescale: bool = field(
        default=True,
        metadata={"help": "scale up a fresh lora_A, or full matrices' learning rate, for what is held"},
    )
    feedback: InstanceOf[Mix] | InstanceOf[DualAscent] | None = field(
        default=None, metadata={"help": "a gradient rule on samples outside the basis, for what leaks"}
    )

    name = "null-space"
    holds = True

    @property
    def adds_gradients(self) -> bool:  # type: ignore[override]
        return self.feedback is not None

    @property
    def compares_all(self) -> bool:  # type: ignore[override]
        return self.feedback is not None and self.feedback.compares_all

    def limit(self, inputs: int, fewer: bool = False) -> int:
        """The most directions held of a matrix with so many inputs. fewer: only a `NEAR_TASK`th of the default."""
        if self.rank or inputs < FEW:
            return self.rank or inputs
        return min(inputs // 3, LARGEST_DEFAULT_RANK) // (NEAR_TASK if fewer else 1)

    def at_hand(self, inputs: int, held: int) -> int:
        """The most directions, beside those held, of a matrix with so many inputs that are kept at hand: an eighth is
        left to learn."""
        return min(self.more, max(0, inputs * 7 // 8 - held))

    @property
    def more(self) -> int:
        """`reserve`, where the directions after those held are the next ones, which energy and contrast do not say."""
        return self.reserve if self.energy == 1 and not self.contrast else 0

    def basis_samples(self, samples: int) -> int:
        return min(self.prompts, samples - int(samples * HELD_OUT))

    def reworded_samples(self, samples: int) -> int:
        return min(self.reworded, self.basis_samples(samples))

    def wanted_samples(self) -> int | None:
        # some more than the null space is taken from, to measure on
        return round(self.prompts / (1 - HELD_OUT))

    def corrects(self, matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
        # With A V = 0 the product B A V vanishes whatever B is, so lora_B is free.
        held = {lora_b_of(name) for name, matrix in matrices.items() if matrix.is_lora_a}
        for name, matrix in matrices.items():
            if matrix.is_lora_b and name not in held:
                raise UnsupportedModelError(
                    f"{name} is trained but its lora_A is frozen or not there, so null-space cannot hold anything "
                    "there; train lora_A too, or leave this layer out of the adapter"
                )
        return {name: m for name, m in matrices.items() if not m.is_lora_b}

    def foresee(self, model: nn.Module) -> None:
        matrices, others = find_matrices(model)
        _refuse(model, {name: m.weight.dtype for name, m in self.corrects(matrices).items()}, others)

    def prepare(self, run: Run, given: Given) -> Holding:
        if self.contrast and not given.calibration and given.subspace is None:
            raise ValueError("null-space: contrast needs benign samples; give them as `calibration`")
        _refuse(run.probe.model, {name: run.holder(name).dtype for name in run.matrices}, run.others)
        refuse_otherwise(run, run.basis)
        held = [*run.basis, *given.reworded, *given.conflicts]
        subspace = given.subspace or _estimate(run, self, held, given)
        run.keep_fixed(json.loads(subspace.metadata.get("kept", "{}")))
        return Holding(run, self, given, subspace)


def _refuse(model: nn.Module, held: Mapping[str, torch.dtype], others: Collection[str]) -> None:
    """held: of each matrix that is to be held, the type of what is stepped. others: what is to be kept fixed.

    Raises:
        UnsupportedModelError: that would not hold what the model answers.
    """
    refuse_fixed_adapters(model, others)
    refuse_tied(model, [*held, *others])
    refuse_rounded(held.items())


def null_space_bases(
    probe: SafetyProbe, rule: NullSpace, anchors: Sequence[Anchor], names: Sequence[str], benign: Sequence[Anchor] = ()
) -> dict[str, Tensor]:
    """V (n, k), float32, per named matrix: the input directions of the anchors that the rule holds.

    A matrix that no anchor passes through is left out, and one of few inputs that they fill.

    benign: the samples whose leading directions are left free; only a rule with `contrast` needs them.

    Raises:
        ValueError: a matrix would be held in no direction, or in all.
    """
    found = _directions(probe, rule, anchors, names, benign, 0)
    found = {name: V for name, V in found.items() if not _filled(rule, V)}
    whole = {id(V): V[:, : rule.limit(len(V))].contiguous() for V in found.values()}
    held = {name: whole[id(V)] for name, V in found.items()}
    _check_widths(rule, held)
    return held


def _directions(
    probe: SafetyProbe,
    rule: NullSpace,
    anchors: Sequence[Anchor],
    names: Sequence[str],
    benign: Sequence[Anchor],
    more: int,
) -> dict[str, Tensor]:
    """The leading input directions, as many as the rule holds and some more."""
    bases = probe.input_bases(
        anchors,
        names,
        rank=(rule.rank or LARGEST_DEFAULT_RANK) + rule.contrast,
        more=more,
        energy=rule.energy,
        tokens=rule.tokens,
        decision_weight=rule.decision_weight,
        gradient_share=rule.gradient_share,
    )
    if rule.contrast:
        free = probe.input_bases(benign, names, rank=rule.contrast)
        pairs = {name: (id(V), id(free[name])) for name, V in bases.items() if name in free}  # q, k and v share theirs
        rest = {pair: outside(bases[name], free[name]) for pair, name in {p: n for n, p in pairs.items()}.items()}
        bases = bases | {name: rest[pair] for name, pair in pairs.items()}
    return bases


def _filled(rule: NullSpace, V: Tensor) -> bool:
    """Whether a matrix of few inputs would be held in all of them."""
    return len(V) < FEW and min(V.shape[1], rule.limit(len(V))) == len(V)


def _check_widths(rule: NullSpace, held: Mapping[str, Tensor]) -> None:
    for name, V in held.items():
        if V.shape[1] == 0:
            raise ValueError(
                f"null-space: no input direction of {name} would be held: contrast ({rule.contrast}) leaves none; "
                "lower it, or freeze the matrix"
            )
        if V.shape[1] == V.shape[0]:
            raise ValueError(
                f"null-space: all {V.shape[0]} input directions of {name} would be held, so it could learn "
                f"nothing; lower rank (now {rule.rank}) or energy (now {rule.energy})"
            )


def _estimate(run: Run, rule: NullSpace, anchors: Sequence[Anchor], given: Given) -> SafetySubspace:
    """Bases from the samples, a reserve of further directions, and what the weights, as they are, make of both."""
    more = rule.more if given.tighten else 0
    # what is missing must be at hand, to be added where prompts flip
    fewer = given.near_task and more > 0 and rule.rank is None
    found = _directions(run.probe, rule, anchors, list(run.matrices), given.calibration, more)
    same_on_all_ranks(found)
    found = {name: V for name, V in found.items() if not _filled(rule, V)}
    fixed = {name: SMALL if _inputs(run, name) < FEW else UNREACHED for name in run.matrices if name not in found}
    held, at_hand = {}, {}
    for V in {id(V): V for V in found.values()}.values():
        rank = rule.limit(len(V), fewer)
        held[id(V)] = V[:, :rank].contiguous()
        end = rank + (rule.at_hand(len(V), rank) if more else 0)
        # used seldom, so not on the device
        at_hand[id(V)] = V[:, rank:end].contiguous().cpu()
    right = {name: held[id(V)] for name, V in found.items()}
    _check_widths(rule, right)
    reserve = {name: at_hand[id(V)] for name, V in found.items()} if more else {}
    target, reserve_target = {}, {}
    for name, V in right.items():
        matrix, rows = run.matrices[name], run.sharding.parts[name].rows
        R = reserve.get(name, V[:, :0]).to(V.device)
        if matrix.is_lora_a:
            made = V.new_zeros(run.height(name), V.shape[1] + R.shape[1])[rows]
        else:
            with run.sharding.weight(name, matrix.transposed) as (first, W):
                used = W[rows.start - first : rows.stop - first] if run.sharding.split else W
                made = exact_matmul(used, torch.cat([V, R], 1))
        target[name], kept = (part.contiguous() for part in made.split([V.shape[1], R.shape[1]], 1))
        reserve_target[name] = kept.cpu()
    return SafetySubspace(
        right=right,
        target=target,
        reserve=reserve,
        reserve_target=reserve_target if more else {},
        metadata={"rule": repr(rule), "kept": json.dumps(fixed)} | ({"fewer": "near_task"} if fewer else {}),
    )


def _inputs(run: Run, name: str) -> int:
    matrix = run.matrices[name]
    return matrix.view(matrix.weight).shape[1]

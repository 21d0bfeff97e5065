"""Step rules: pure functions on matrices, and one small class a rule that holds its settings.

Conventions: a weight W and its gradient G are (m, n), y = W x. A left basis U is (m, k), a right
basis V is (n, k), both with orthonormal columns. A step is `W <- W - lr * G`, so a utility gradient
conflicts with the safety gradient S where <G, S> < 0: the step would raise the safety loss.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Gate = Literal["global", "matrix"]
Side = Literal["left", "right", "both"]
LARGEST_DEFAULT_RANK = 192
"""The rank that held on the validation prompts of the demo model, whose hidden size is three times that."""

Tokens = Literal["all", "prompt", "refusal"]
Aggregator = Literal["pcgrad", "upgrad", "dualproj"]


def project_out_left(G: Tensor, U: Tensor) -> Tensor:
    """(I - U U^T) G: what is left of G (m, n) outside the output directions U (m, k). 4 m n k FLOPs."""
    return G - U @ (U.T @ G)


def project_out_right(G: Tensor, V: Tensor) -> Tensor:
    """G (I - V V^T): what is left of G (m, n) outside the input directions V (n, k). 4 m n k FLOPs."""
    return G - (G @ V) @ V.T


def components(G: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """What G (m, n) has in the safety subspace: U^T G (k, n) on the left, G V (m, k) on the right, U^T G V (both).

    Of a part of G, with the same part of the bases' rows, it is that part's share: the shares of all parts
    sum up to the whole's on the left and for both, and on the right over the parts of a row.
    """
    if side == "left":
        return U.T @ G
    if side == "right":
        return G @ V
    return U.T @ G @ V


def without_components(G: Tensor, C: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """G without the components C that `components` found; of a part of G too, with the whole's C."""
    if side == "left":
        return G - U @ C
    if side == "right":
        return G - C @ V.T
    return G - U @ C @ V.T


def project_out(G: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """G without the safety subspace: on the left, on the right, or only its part U U^T G V V^T (both)."""
    return without_components(G, components(G, U, V, side), U, V, side)


def conflict_coefficient(inner: float, norm_squared: float, floor: float = 1e-8) -> float:
    """The factor c with G - c S free of conflict: min(<G, S>, 0) / ||S||^2; 0 if ||S||^2 <= floor.

    Yu et al., "Gradient Surgery" (PCGrad), arXiv 2001.06782, Algorithm 1; `floor` as in SPF's released code.
    """
    return min(inner, 0.0) / norm_squared if norm_squared > floor else 0.0


def null_space_violation(W: Tensor, V: Tensor, target: Tensor) -> Tensor:
    """W V - target (m, k): how far W answers the held inputs differently. `target` is W_0 V."""
    return W @ V - target


@dataclass(frozen=True)
class SPF:
    """The published rule: where the utility gradient conflicts, remove it from the safety subspace.

    If <g_u, g_s> < 0, G_u <- (I - U_k U_k^T) G_u for every weight matrix, U_k the top-k left singular
    vectors of its safety gradient. Zhang et al., arXiv 2601.10141. On a gated step this removes all
    of G_u inside the subspace, also what agrees with safety; a conflict with the part of the safety
    gradient beyond rank k remains.
    """

    rank: int = field(default=10, metadata={"help": "k, singular vectors per matrix (the paper: 10 to 20)"})
    gate: Gate = field(default="global", metadata={"help": "one conflict test over all matrices, or one a matrix"})
    side: Side = field(default="left", metadata={"help": "project output side, input side, or their product"})

    name = "spf"

    def __post_init__(self) -> None:
        _check(self.rank >= 1, f"spf: rank must be at least 1, not {self.rank}")
        _check(self.gate in ("global", "matrix"), f"spf: gate must be global or matrix, not {self.gate}")
        _check(self.side in ("left", "right", "both"), f"spf: side must be left, right or both, not {self.side}")


@dataclass(frozen=True)
class Rank1:
    """G_u <- G_u - min(<G_u, G_s>, 0) / ||G_s||^2 G_s, matrix by matrix (the released code's rule) or globally.

    With gate="global" it is A-GEM (arXiv 1812.00420, eq. 11) with the anchors as its memory; matrix by
    matrix it has the form of PCGrad (arXiv 2001.06782).
    """

    gate: Gate = field(default="matrix", metadata={"help": "one conflict test over all matrices, or one a matrix"})

    name = "rank1"

    def __post_init__(self) -> None:
        _check(self.gate in ("global", "matrix"), f"rank1: gate must be global or matrix, not {self.gate}")

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, -conflict_coefficient(us, ss)


@dataclass(frozen=True)
class Mix:
    """G_u <- G_u + rho G_s: the refusal loss mixed into the utility loss, after clipping.

    With one anchor it is one-anchor loss mixing, with many in turn rotating replay.
    """

    weight: float = field(default=1.0, metadata={"help": "rho, the weight of the safety loss"})

    name = "mix"
    gate: Gate = "global"

    def __post_init__(self) -> None:
        _check(self.weight > 0, f"mix: weight must be positive, not {self.weight}")

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, self.weight


@dataclass(frozen=True)
class SafeGrad:
    """G_u without its part against g_align, plus rho g_align: global, g_align the gradient of KL(aligned || tuned).

    The KL is taken at the refusal tokens of the anchors, against the model as it was before training.
    Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning", arXiv 2508.07172.
    """

    weight: float = field(default=1.0, metadata={"help": "rho, the weight of the alignment gradient"})

    name = "safegrad"
    gate: Gate = "global"

    def __post_init__(self) -> None:
        _check(self.weight >= 0, f"safegrad: weight must not be negative, not {self.weight}")

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, self.weight - conflict_coefficient(us, ss)


@dataclass(frozen=True)
class Aggregate:
    """w_u G_u + w_s G_s with the weights that a TorchJD aggregator finds from the 2 x 2 Gramian of the two gradients.

    pcgrad (arXiv 2001.06782), upgrad (arXiv 2406.16232), dualproj (GEM, arXiv 1706.08840). Scaled so
    that without a conflict both weights are 1.
    """

    aggregator: Aggregator = field(
        default="upgrad", metadata={"help": "TorchJD's aggregator: pcgrad, upgrad or dualproj"}
    )

    name = "aggregate"
    gate: Gate = "global"

    def __post_init__(self) -> None:
        _check(
            self.aggregator in get_args(Aggregator),
            f"aggregate: aggregator must be {' or '.join(get_args(Aggregator))}, not {self.aggregator}",
        )
        try:
            self.coefficients(1.0, 0.0, 1.0)
        except ImportError as error:
            raise ModuleNotFoundError("the rule aggregate needs TorchJD: pip install 'spf[torchjd]'") from error

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        from torchjd.aggregation import DualProjWeighting, PCGradWeighting, UPGradWeighting

        kinds = {"pcgrad": PCGradWeighting, "upgrad": UPGradWeighting, "dualproj": DualProjWeighting}
        gramian = torch.tensor([[uu, us], [us, ss]], dtype=torch.float64)
        weights = kinds[self.aggregator]()(gramian)
        # the other two prefer the mean of the gradients, not the sum
        scale = 1.0 if self.aggregator == "pcgrad" else 2.0
        return scale * float(weights[0]), scale * float(weights[1])


@dataclass(frozen=True)
class DualAscent:
    """G_u + lambda G_s, with lambda <- max(0, lambda + rate * (L_s - L_s^0 - margin)) at every step.

    The Lagrangian of `minimise the utility loss subject to L_s <= L_s^0 + margin`, L_s^0 the aligned
    model's own loss on the same anchors: inactive while safety has slack, stronger the longer it has not.
    """

    rate: float = field(default=1.0, metadata={"help": "step of lambda a nat of excess safety loss"})
    margin: float = field(default=0.02, metadata={"help": "excess safety loss that is tolerated, nats a token"})
    most: float = field(default=10.0, metadata={"help": "lambda's upper bound"})

    name = "dual-ascent"
    gate: Gate = "global"

    def __post_init__(self) -> None:
        _check(self.rate > 0, f"dual-ascent: rate must be positive, not {self.rate}")
        _check(self.margin >= 0, f"dual-ascent: margin must not be negative, not {self.margin}")
        _check(self.most > 0, f"dual-ascent: most must be positive, not {self.most}")

    def multiplier(self, before: float, excess: float) -> float:
        """lambda after a step with `excess` = L_s - L_s^0."""
        return min(max(0.0, before + self.rate * (excess - self.margin)), self.most)


@dataclass(frozen=True)
class Constrained:
    """D' = D - M^-1 g_s max(0, L_s + <g_s, D> - tau) / <g_s, M^-1 g_s> on the update D that the optimizer made.

    The smallest change of the step, in the optimizer's own metric M, that keeps the linearised safety
    loss at or below tau = L_s^0 + margin. M is Adam's sqrt(v) + eps, the identity for an optimizer
    without second moments. GEM (arXiv 1706.08840) with one constraint, on the update instead of the gradient.
    """

    margin: float = field(default=0.02, metadata={"help": "excess safety loss that is tolerated, nats a token"})

    name = "constrained"

    def __post_init__(self) -> None:
        _check(self.margin >= 0, f"constrained: margin must not be negative, not {self.margin}")


@dataclass(frozen=True)
class NullSpace:
    """Hold W V = W_0 V: after every optimizer step W <- W - (W V - W_0 V) V^T.

    V spans the input directions that harmful prompts with their refusals send into the layer, so the
    layer's answer to them cannot change, under any optimizer, weight decay or schedule. For LoRA the
    constraint is A V = 0 on lora_A. Parameters that are not matrices on some input (embeddings, norms,
    biases) are held at their values. Ancestors: GPM (arXiv 2103.09762, eq. 9), AlphaEdit
    (arXiv 2410.02355), GuardSpace (arXiv 2510.14301).
    """

    rank: int | None = field(
        default=None,
        metadata={"help": "most input directions held per matrix; by default a third of its inputs, at most 192"},
    )
    energy: float = field(
        default=1.0,
        metadata={"help": "share of the activations' energy to hold; fewer directions if reached earlier"},
    )
    prompts: int = field(default=128, metadata={"help": "safety samples the input directions are taken from"})
    reworded: int = field(
        default=48, metadata={"help": "safety samples that are held in other words too, such as 'begin with Of course'"}
    )
    decision_weight: float = field(
        default=8.0,
        metadata={"help": "weight of the tokens around the beginning of the answer in the choice of directions"},
    )
    tokens: Tokens = field(
        default="all", metadata={"help": "tokens the directions are taken from: all, prompt or refusal"}
    )
    contrast: int = field(
        default=0, metadata={"help": "leading input directions of benign prompts that are left free, per matrix"}
    )
    rescale: bool = field(
        default=True,
        metadata={"help": "scale up a fresh lora_A, or full matrices' learning rate, for what is held"},
    )
    feedback: "Mix | DualAscent | None" = field(
        default=None, metadata={"help": "a gradient rule on samples outside the basis, for what leaks"}
    )

    name = "null-space"

    def __post_init__(self) -> None:
        _check(self.rank is None or self.rank >= 1, f"null-space: rank must be at least 1, not {self.rank}")
        _check(0 < self.energy <= 1, f"null-space: energy must be in (0, 1], not {self.energy}")
        _check(self.prompts >= 1, f"null-space: prompts must be at least 1, not {self.prompts}")
        _check(self.reworded >= 0, f"null-space: reworded must not be negative, not {self.reworded}")
        _check(self.decision_weight > 0, f"null-space: decision_weight must be positive, not {self.decision_weight}")
        _check(
            self.tokens in get_args(Tokens),
            f"null-space: tokens must be {' or '.join(get_args(Tokens))}, not {self.tokens}",
        )
        _check(self.contrast >= 0, f"null-space: contrast must not be negative, not {self.contrast}")

    def limit(self, inputs: int) -> int:
        """The most directions held of a matrix with so many inputs."""
        return self.rank or min(max(1, inputs // 3), LARGEST_DEFAULT_RANK)


CombiningRule = Rank1 | Mix | SafeGrad | Aggregate | DualAscent
"""Rules of the form a G_u + c G_s."""

Rule = NullSpace | SPF | Rank1 | Mix | SafeGrad | Aggregate | DualAscent | Constrained
RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (NullSpace, SPF, Rank1, Mix, SafeGrad, Aggregate, DualAscent, Constrained)
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

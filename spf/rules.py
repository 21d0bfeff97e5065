"""Step rules: pure functions on matrices, and one small class a rule that holds its settings.

Conventions: a weight W and its gradient G are (m, n), y = W x. A left basis U is (m, k), a right
basis V is (n, k), both with orthonormal columns. A step is `W <- W - lr * G`, so a utility gradient
conflicts with the safety gradient S where <G, S> < 0: the step would raise the safety loss.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Gate = Literal["global", "matrix"]
Side = Literal["left", "right", "both"]


def project_out_left(G: Tensor, U: Tensor) -> Tensor:
    """(I - U U^T) G: what is left of G (m, n) outside the output directions U (m, k). 4 m n k FLOPs."""
    return G - U @ (U.T @ G)


def project_out_right(G: Tensor, V: Tensor) -> Tensor:
    """G (I - V V^T): what is left of G (m, n) outside the input directions V (n, k). 4 m n k FLOPs."""
    return G - (G @ V) @ V.T


def project_out(G: Tensor, U: Tensor, V: Tensor, side: Side) -> Tensor:
    """G without the safety subspace: on the left, on the right, or only its part U U^T G V V^T (both)."""
    if side == "left":
        return project_out_left(G, U)
    if side == "right":
        return project_out_right(G, V)
    return G - U @ (U.T @ G @ V) @ V.T


def conflict_coefficient(inner: float, norm_squared: float, floor: float = 1e-8) -> float:
    """The factor c with G - c S free of conflict: min(<G, S>, 0) / ||S||^2; 0 if ||S||^2 <= floor.

    Yu et al., "Gradient Surgery" (PCGrad), arXiv 2001.06782, Algorithm 1; `floor` as in SPF's released code.
    """
    return min(inner, 0.0) / norm_squared if norm_squared > floor else 0.0


def null_space_violation(W: Tensor, V: Tensor, target: Tensor) -> Tensor:
    """W V - target (m, k): how far W answers the held inputs differently. `target` is W_0 V."""
    return W @ V - target


@dataclass(frozen=True)
class NullSpace:
    """Hold W V = W_0 V: after every optimizer step W <- W - (W V - W_0 V) V^T.

    V spans the input directions that harmful prompts with their refusals send into the layer, so the
    layer's answer to them cannot change, under any optimizer, weight decay or schedule. For LoRA the
    constraint is A V = 0 on lora_A. Parameters that are not matrices on some input (embeddings, norms,
    biases) are held at their values. Ancestors: GPM (arXiv 2103.09762, eq. 9), AlphaEdit
    (arXiv 2410.02355), GuardSpace (arXiv 2510.14301).
    """

    rank: int = field(default=96, metadata={"help": "most input directions held per matrix"})
    energy: float = field(
        default=1.0,
        metadata={"help": "share of the activations' energy to hold; fewer directions if reached earlier"},
    )
    prompts: int = field(default=128, metadata={"help": "safety samples the input directions are taken from"})

    name = "null-space"

    def __post_init__(self) -> None:
        _check(self.rank >= 1, f"null-space: rank must be at least 1, not {self.rank}")
        _check(0 < self.energy <= 1, f"null-space: energy must be in (0, 1], not {self.energy}")
        _check(self.prompts >= 1, f"null-space: prompts must be at least 1, not {self.prompts}")


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
    """The released code's rule: per matrix, G_u <- G_u - min(<G_u, G_s>, 0) / ||G_s||^2 G_s.

    The form of PCGrad (arXiv 2001.06782) and A-GEM (arXiv 1812.00420), applied matrix by matrix.
    """

    name = "rank1"


Rule = NullSpace | SPF | Rank1
RULES: dict[str, type[NullSpace] | type[SPF] | type[Rank1]] = {rule.name: rule for rule in (NullSpace, SPF, Rank1)}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

"""Rules of the form a G_u + c G_s, G_u the gradient of the task and G_s that of the safety loss.

A step is W <- W - lr G, so G_u conflicts with G_s where <G_u, G_s> < 0: the step would raise the safety loss.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from spf.config import NotNegative, Positive
from spf.errors import CorrectionError
from spf.rules.base import Correction, Gate, Given, Rule
from spf.run import Comparison, Run

Aggregator = Literal["pcgrad", "upgrad", "dualproj"]


def conflict_coefficient(inner: float, norm_squared: float, floor: float = 1e-8) -> float:
    """The factor c with G - c S free of conflict: min(<G, S>, 0) / ||S||^2; 0 if ||S||^2 <= floor.

    Yu et al., "Gradient Surgery" (PCGrad), arXiv 2001.06782, Algorithm 1; `floor` as in SPF's released code.
    """
    return min(inner, 0.0) / norm_squared if norm_squared > floor else 0.0


class Weights(Protocol):
    """The coefficients a, c from |G_u|^2, <G_u, G_s> and |G_s|^2."""

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]: ...


class Combining(Correction):
    """A rule with coefficients at work: G_u <- a G_u + c G_s."""

    def __init__(self, run: Run, weights: Weights | None, gate: Gate = "global"):
        super().__init__(run)
        self.weights = weights
        self.gate = gate
        self._shown = 0

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        run, found = self.run, self.run.comparison
        if found is None:
            return
        whole = found
        if self.gate == "global":
            # one test over all matrices: every matrix gets the sums
            inner, safety, utility = (sum(x.values()) for x in (found.inner, found.safety, found.utility))
            names = found.inner
            whole = Comparison(*(dict.fromkeys(names, value) for value in (inner, safety, utility)))
        own_metrics = not run.rule.holds
        if own_metrics:
            run.note("conflict_rate", sum(value < 0 for value in whole.inner.values()) / len(whole.inner))
        changed = {}
        for name in gradients:
            a, c = self.coefficients(whole.utility[name], whole.inner[name], whole.safety[name])
            if (a, c) != (1.0, 0.0):
                changed[name] = a, c
        removed = 0.0
        for name, (a, c) in changed.items():
            assert run.result is not None
            for b in run.blocks(name, gradients[name]):
                b.tensor.copy_(a * b.tensor.float() + c * run.result.factors[name].block(b.rows, b.columns, b.tensor))
            uu, us, ss = found.utility[name], found.inner[name], found.safety[name]
            removed += (a - 1) ** 2 * uu + 2 * (a - 1) * c * us + c**2 * ss
        if changed and not self._shown:
            self._show({name: gradients[name] for name in changed}, changed, found)
        if own_metrics:
            run.removed(removed, sum(found.utility.values()))

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        assert self.weights is not None
        return self.weights.coefficients(uu, us, ss)

    def proven(self) -> str:
        return conflicts_proven(self._shown)

    def _show(self, gradients: dict[str, Tensor], changed: dict[str, tuple[float, float]], found: Comparison) -> None:
        """<G, G_s> of the gradients that the optimizer is about to use is a <G_u, G_s> + c |G_s|^2; looked at once."""
        run = self.run
        assert run.result is not None
        inner = []
        for name, gradient in gradients.items():
            parts = [
                run.result.factors[name].inner_block(b.tensor, b.rows, b.columns) for b in run.blocks(name, gradient)
            ]
            inner.append(sum(parts, torch.zeros(())))
        for name, value in zip(gradients, run.total(inner), strict=True):
            (a, c), uu, us, ss = changed[name], found.utility[name], found.inner[name], found.safety[name]
            size = (abs(a) * uu**0.5 + abs(c) * ss**0.5) * ss**0.5
            if not abs(value - a * us - c * ss) <= (1e-3 + 4 * torch.finfo(gradients[name].dtype).eps) * size:
                raise CorrectionError(
                    f"spf: after the correction at step {run.steps + 1} the gradient of {name} has the inner product "
                    f"{value:.3g} with the safety gradient instead of {a * us + c * ss:.3g}"
                )
        self._shown = run.steps + 1


class Ascending(Combining):
    """Dual ascent at work: the multiplier follows the excess of the safety loss."""

    def __init__(self, run: Run, rule: "DualAscent"):
        super().__init__(run, None)
        self.rule = rule

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        if self.run.comparison is not None and self.run.result is not None:
            self.multiplier = self.rule.multiplier(self.multiplier, self.run.result.excess)
            self.run.note("multiplier", self.multiplier)
        super().before_step(gradients, here)

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, self.multiplier


def conflicts_proven(shown: int) -> str:
    """What a rule on gradients has shown, in words."""
    if not shown:
        return "no update had to be corrected, so nothing was proven"
    return f"the gradients that the optimizer used were measured after the first correction, at step {shown}"


@dataclass(frozen=True)
class Rank1(Rule):
    """G_u <- G_u - min(<G_u, G_s>, 0) / ||G_s||^2 G_s, matrix by matrix (the released code's rule) or globally.

    With gate="global" it is A-GEM (arXiv 1812.00420, eq. 11) with the anchors as its memory; matrix by
    matrix it has the form of PCGrad (arXiv 2001.06782).
    """

    gate: Gate = field(default="matrix", metadata={"help": "one conflict test over all matrices, or one a matrix"})

    name = "rank1"

    @property
    def compares_all(self) -> bool:  # type: ignore[override]
        return self.gate == "global"

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, -conflict_coefficient(us, ss)

    def prepare(self, run: Run, given: Given) -> "Combining":
        return Combining(run, self, self.gate)


@dataclass(frozen=True)
class Mix(Rule):
    """G_u <- G_u + rho G_s: the refusal loss mixed into the utility loss, after clipping.

    With one anchor it is one-anchor loss mixing, with many in turn rotating replay.
    """

    weight: Positive = field(default=1.0, metadata={"help": "rho, the weight of the safety loss"})

    name = "mix"
    compares_all = True

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, self.weight

    def prepare(self, run: Run, given: Given) -> "Combining":
        return Combining(run, self)


@dataclass(frozen=True)
class SafeGrad(Rule):
    """G_u without its part against g_align, plus rho g_align: global, g_align the gradient of KL(aligned || tuned).

    The KL is taken at the refusal tokens of the anchors, against the model as it was before training.
    Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning", arXiv 2508.07172.
    """

    weight: NotNegative = field(default=1.0, metadata={"help": "rho, the weight of the alignment gradient"})

    name = "safegrad"
    compares_all = True
    resumable = False

    def coefficients(self, uu: float, us: float, ss: float) -> tuple[float, float]:
        return 1.0, self.weight - conflict_coefficient(us, ss)

    def prepare(self, run: Run, given: Given) -> "Combining":
        run.probe.remember(run.rotation.anchors, logprobs=True)
        return Combining(run, self)


@dataclass(frozen=True)
class Aggregate(Rule):
    """w_u G_u + w_s G_s with the weights that a TorchJD aggregator finds from the 2 x 2 Gramian of the two gradients.

    pcgrad (arXiv 2001.06782), upgrad (arXiv 2406.16232), dualproj (GEM, arXiv 1706.08840). Scaled so
    that without a conflict both weights are 1.
    """

    aggregator: Aggregator = field(
        default="upgrad", metadata={"help": "TorchJD's aggregator: pcgrad, upgrad or dualproj"}
    )

    name = "aggregate"
    compares_all = True

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def prepare(self, run: Run, given: Given) -> "Combining":
        return Combining(run, self)


@dataclass(frozen=True)
class DualAscent(Rule):
    """G_u + lambda G_s, with lambda <- max(0, lambda + rate * (L_s - L_s^0 - margin)) at every step.

    The Lagrangian of `minimise the utility loss subject to L_s <= L_s^0 + margin`, L_s^0 the aligned
    model's own loss on the same anchors: inactive while safety has slack, stronger the longer it has not.
    """

    rate: Positive = field(default=1.0, metadata={"help": "step of lambda a nat of excess safety loss"})
    margin: NotNegative = field(default=0.02, metadata={"help": "excess safety loss that is tolerated, nats a token"})
    most: Positive = field(default=10.0, metadata={"help": "lambda's upper bound"})

    name = "dual-ascent"
    compares_all = True

    def multiplier(self, before: float, excess: float) -> float:
        """lambda after a step with `excess` = L_s - L_s^0."""
        return min(max(0.0, before + self.rate * (excess - self.margin)), self.most)

    def prepare(self, run: Run, given: Given) -> "Ascending":
        run.probe.remember(run.rotation.anchors)
        return Ascending(run, self)

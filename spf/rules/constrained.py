"""A constraint on the optimizer's own update."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spf.config import NotNegative
from spf.errors import CorrectionError
from spf.linalg import stacked
from spf.rules.base import Correction, Given, Rule
from spf.rules.combining import conflicts_proven
from spf.run import Run


@dataclass(frozen=True)
class Constrained(Rule):
    """D' = D - M^-1 g_s max(0, L_s + <g_s, D> - tau) / <g_s, M^-1 g_s> on the update D that the optimizer made.

    The smallest change of the step, in the optimizer's own metric M, that keeps the linearised safety
    loss at or below tau = L_s^0 + margin. M is Adam's sqrt(v) + eps, the identity for an optimizer
    without second moments. GEM (arXiv 1706.08840) with one constraint, on the update instead of the gradient.
    """

    margin: NotNegative = field(default=0.02, metadata={"help": "excess safety loss that is tolerated, nats a token"})

    name = "constrained"
    compares_all = True

    def prepare(self, run: Run, given: Given) -> "Constraining":
        run.probe.remember(run.rotation.anchors)
        return Constraining(run, self)


class Constraining(Correction):
    """The rule at work, after the optimizer's step."""

    def __init__(self, run: Run, rule: Constrained):
        super().__init__(run)
        self.rule = rule
        self._before: dict[str, list[Tensor]] = {}
        self._shown = 0

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        run = self.run
        self._before = {}
        if run.comparison is not None:
            self._before = {
                name: [b.tensor.clone() for b in run.blocks(name, run.holder(name))] for name in run.matrices
            }

    def after_step(self, here: set[str]) -> None:
        """Change the step just made so that the linearised safety loss stays within its margin."""
        run, result = self.run, self.run.result
        if result is None or not self._before:
            return
        directions: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        sums: list[Tensor] = []
        for name, blocks_before in self._before.items():
            state = run.optimizer.state[run.sharding.parts[name].holder]
            moments = [b.tensor for b in run.blocks(name, state["exp_avg_sq"])] if "exp_avg_sq" in state else None
            for i, (b, before) in enumerate(zip(run.blocks(name, run.holder(name)), blocks_before, strict=True)):
                step = (b.tensor - before).float()
                S = result.factors[name].block(b.rows, b.columns, b.tensor)
                direction = S / (moments[i].float().sqrt() + 1e-8) if moments else S
                products = [(S * step).sum(), (S * direction).sum(), step.square().sum(), direction.square().sum()]
                sums.append(torch.stack(products))
                directions.append((b.tensor, direction, S, before))
        self._before = {}
        total = stacked(sums).sum(0) if sums else torch.zeros(4)
        values = run.sharding.joint(total, total[:0])[0].tolist()
        allowed = self.rule.margin - result.excess
        violation = max(0.0, values[0] - allowed)
        run.note("conflict_rate", float(values[0] > 0))
        factor = violation / values[1] if violation > 0 and values[1] > 0 else 0.0
        if factor:
            for weight, direction, _, _ in directions:
                weight.sub_((factor * direction).to(weight.dtype))
            if not self._shown:
                after = stacked([(S * (weight - before).float()).sum() for weight, _, S, before in directions]).sum(0)
                self._show(float(run.sharding.joint(after[None], total[:0])[0]), allowed, violation)
        run.removed(factor**2 * values[3], values[2])

    def proven(self) -> str:
        return conflicts_proven(self._shown)

    def _show(self, after: float, allowed: float, violation: float) -> None:
        """The linearised rise of the safety loss by the step that was made, once."""
        if not after - allowed <= 0.05 * violation:
            raise CorrectionError(
                f"spf: the step {self.run.steps + 1} that was made raises the linearised safety loss by {after:.3g}, "
                f"where {allowed:.3g} is allowed"
            )
        self._shown = self.run.steps + 1

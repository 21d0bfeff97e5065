"""The published rule."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spf.config import Count
from spf.errors import CorrectionError
from spf.linalg import Side, components, without_components
from spf.rules.base import Correction, Gate, Given, Rule
from spf.rules.combining import conflicts_proven
from spf.run import Run


@dataclass(frozen=True)
class SPF(Rule):
    """The published rule: where the utility gradient conflicts, remove it from the safety subspace.

    If <g_u, g_s> < 0, G_u <- (I - U_k U_k^T) G_u for every weight matrix, U_k the top-k left singular
    vectors of its safety gradient. Zhang et al., arXiv 2601.10141. On a gated step this removes all
    of G_u inside the subspace, also what agrees with safety; a conflict with the part of the safety
    gradient beyond rank k remains.
    """

    rank: Count = field(default=10, metadata={"help": "k, singular vectors per matrix (the paper: 10 to 20)"})
    gate: Gate = field(default="global", metadata={"help": "one conflict test over all matrices, or one a matrix"})
    side: Side = field(default="left", metadata={"help": "project output side, input side, or their product"})

    name = "spf"

    @property
    def compares_all(self) -> bool:  # type: ignore[override]
        return self.gate == "global"

    def prepare(self, run: Run, given: Given) -> "Removing":
        return Removing(run, self)


class Removing(Correction):
    """The published rule at work."""

    def __init__(self, run: Run, rule: SPF):
        super().__init__(run)
        self.rule = rule
        self._shown = 0

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        run, found = self.run, self.run.comparison
        if found is None:
            return
        inner = dict.fromkeys(found.inner, sum(found.inner.values())) if self.rule.gate == "global" else found.inner
        run.note("conflict_rate", sum(value < 0 for value in inner.values()) / len(inner))
        conflicting = {name: gradients[name] for name in gradients if inner[name] < 0}
        removed = self._remove(conflicting) if conflicting else 0.0
        run.removed(removed, sum(found.utility.values()))

    def proven(self) -> str:
        return conflicts_proven(self._shown)

    def _components(self, gradients: dict[str, Tensor], bases: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """What the gradients have in the safety subspace, over all processes; on the right, of the cut rows only."""
        rule, sharding = self.rule, self.run.sharding
        if rule.side == "right":
            return sharding.cut_products(gradients, {name: V for name, (_, V) in bases.items()})
        shares: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            U, V = bases[name]
            shares[name] = U.new_zeros(U.shape[1], V.shape[0] if rule.side == "left" else V.shape[1])
            for b in self.run.blocks(name, gradient):
                part = components(b.tensor.float(), U[b.rows], V[b.columns], rule.side)
                shares[name][:, b.columns if rule.side == "left" else slice(None)] += part
        if sharding.split:
            flat = sharding.total(torch.cat([share.flatten() for share in shares.values()]))
            pieces = flat.split([share.numel() for share in shares.values()])
            shares = {name: piece.view_as(shares[name]) for name, piece in zip(shares, pieces, strict=True)}
        return shares

    def _remove(self, gradients: dict[str, Tensor]) -> float:
        """Take the safety subspace out of these gradients; returns the squared norm of what went."""
        result, rule, run = self.run.result, self.rule, self.run
        assert result is not None
        bases = {}
        for name, gradient in gradients.items():
            U, _, V = result.factors[name].svd(rule.rank)
            bases[name] = U.to(gradient.device), V.to(gradient.device)
        whole = self._components(gradients, bases)
        removed = sum(float(share.square().sum()) for share in whole.values()) if rule.side != "right" else 0.0
        for name, gradient in gradients.items():
            U, V = bases[name]
            for b in run.blocks(name, gradient):
                if rule.side == "left":
                    part = whole[name][:, b.columns]
                elif rule.side == "both":
                    part = whole[name]
                elif b.cut:
                    row = run.sharding.parts[name].cut_rows.index(b.rows.start)
                    part = whole[name][row : row + 1]
                else:
                    part = components(b.tensor.float(), U[b.rows], V[b.columns], rule.side)
                if rule.side == "right":
                    # of this process's rows, as what is logged is rank 0's
                    removed += float(part.square().sum())
                b.tensor.copy_(without_components(b.tensor.float(), part, U[b.rows], V[b.columns], rule.side))
        if removed > 0 and not self._shown:
            self._show(gradients, bases, removed)
        return removed

    def _show(self, gradients: dict[str, Tensor], bases: dict[str, tuple[Tensor, Tensor]], removed: float) -> None:
        """What is left in the safety subspace of the gradients that the optimizer is about to use, once."""
        run = self.run
        if self.rule.side == "right":
            left = [
                components(b.tensor.float(), bases[name][0][b.rows], bases[name][1][b.columns], "right").square().sum()
                for name, gradient in gradients.items()
                for b in run.blocks(name, gradient)
                if not b.cut
            ]
            rest = float(sum(value.cpu() for value in left)) if left else 0.0
        else:
            rest = sum(float(share.square().sum()) for share in self._components(gradients, bases).values())
        rounding = max(torch.finfo(gradient.dtype).eps for gradient in gradients.values())
        found = run.comparison
        assert found is not None
        size = sum(found.utility[name] for name in gradients)
        if not rest <= (1e-3**2) * removed + (4 * rounding) ** 2 * size:
            raise CorrectionError(
                f"spf: after the correction at step {run.steps + 1} the gradients still have {rest**0.5:.3g} in the "
                f"safety subspace, where they had {removed**0.5:.3g}"
            )
        self._shown = run.steps + 1

"""What the optimizer did to held matrices at a step, by some rows of each: how far it went, what was taken out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spf.errors import CorrectionError
from spf.linalg import stacked
from spf.rules.constraint import ROUNDING_SLACK, Violation
from spf.run import Run
from spf.subspace import SafetySubspace

SAMPLED_ROWS = 8
"""Rows of each matrix kept over a step."""


class Moves:
    """What a run's optimizer did.

    acted: the step at which each matrix was first seen to be pushed and put back. seen: others were moved, at least.
    """

    def __init__(self, run: Run, subspace: SafetySubspace):
        self.run, self.subspace = run, subspace
        self.acted: dict[str, int] = {}
        self.seen = False
        self._rows: dict[str, Tensor] = {}
        self._driven: dict[str, Tensor] = {}
        """Which matrices have a gradient at this step, of those that were not seen to be pushed and put back yet."""
        self._moved: dict[str, Tensor] = {}
        """How far (squared) the optimizer moved them at such a step, at most, before the correction."""
        self._update = [0.0, 0.0]

    def before(self, names: Sequence[str]) -> None:
        """The optimizer is about to step these matrices."""
        self._rows = {name: self._sample(name).clone() for name in names}
        for name in names:
            part = self.run.sharding.parts[name]
            if name not in self.acted and part.holder.grad is not None:
                self._driven[name] = (part.piece(part.holder.grad) != 0).any()

    def after(self, names: Sequence[str]) -> dict[str, Tensor]:
        """It has stepped them: rows of theirs, before they are corrected."""
        updated = {name: self._sample(name).clone() for name in names}
        for name in updated.keys() & self._driven.keys():
            part, rows = self.run.sharding.parts[name].rows, updated[name]
            square = (rows.float() - self._rows[name].float()).square().sum() * (part.stop - part.start)
            moved = torch.where(self._driven.pop(name), square / max(1, len(rows)), 0.0)
            self._moved[name] = torch.maximum(self._moved.get(name, torch.zeros_like(moved)), moved)
        return updated

    def corrected(self, updated: Mapping[str, Tensor]) -> None:
        """They are corrected: take down how much of the step is gone."""
        moved: list[Tensor] = []
        for name, rows in updated.items():
            taken, whole = rows - self._sample(name), rows - self._rows[name]
            moved.append(torch.stack([taken.float().square().sum(), whole.float().square().sum()]))
        # one transfer for all matrices: each would make the process wait for a GPU
        sums = stacked(moved).sum(0).tolist() if moved else (0.0, 0.0)
        self._update = [total + new for total, new in zip(self._update, sums, strict=True)]

    def finish(self) -> None:
        """All matrices had their turn."""
        self.run.removed(*self._update)
        self._update = [0.0, 0.0]

    def refuse_unseen(self, found: Mapping[str, Violation]) -> None:
        """found: how far all matrices are off. All processes have to call it.

        Raises:
            CorrectionError: the optimizer moved matrices so far that a push would have shown, and none was seen.
        """
        if self.acted:
            return
        names = list(self.run.matrices)
        squares = self.run.total([self._moved.get(name, torch.zeros(())).cpu() for name in names])
        self.seen = any(square > 0 for square in squares)
        pushed = [
            name for name, square in zip(names, squares, strict=True) if self._would_show(name, square, found[name])
        ]
        if pushed:
            raise CorrectionError(
                f"spf: {len(pushed)} of {len(names)} matrices were trained, among them {pushed[0]}, and in "
                f"{self.run.steps} steps nothing ever had to be corrected, so nothing shows that the rule acts; is the "
                "safety subspace that of this model?"
            )

    def _would_show(self, name: str, square: float, v: Violation) -> bool:
        """Whether a step so large in any direction puts more than rounding into the held ones; one of bfloat16 weights
        may be smaller than their rounding."""
        inputs, held = self.subspace.right[name].shape
        return (square * held / inputs) ** 0.5 > 2 * ROUNDING_SLACK * v.rounding

    def _sample(self, name: str) -> Tensor:
        """Some of this process's rows of a matrix (none if it holds no whole row)."""
        whole = [b.tensor for b in self.run.blocks(name, self.run.holder(name)) if not b.cut]
        return whole[0][:: max(1, len(whole[0]) // SAMPLED_ROWS)] if whole else torch.empty(0)

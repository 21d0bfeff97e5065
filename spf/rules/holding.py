"""The null space at work on a run: what it does to the weights after a step, and how it is proven."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf.data import Anchor
from spf.errors import CorrectionError
from spf.linalg import exact_matmul, project_out_right
from spf.rules.adapters import refuse_started
from spf.rules.base import Correction, Given
from spf.rules.constraint import Constraint, null_space_violation
from spf.rules.fixed import Fixed
from spf.rules.frozen import Frozen
from spf.rules.growth import Growth, in_turns
from spf.rules.moves import Moves
from spf.run import Run
from spf.sharding import object_of_rank_0
from spf.subspace import SafetySubspace

if TYPE_CHECKING:
    from spf.rules.null_space import NullSpace

MAX_SCALE = 10.0
"""A fresh lora_A, or the learning rate of full matrices, is not scaled up by more than this."""


class Holding(Correction):
    """The null space at work: bases and targets, the correction after each step, and its proof."""

    def __init__(self, run: Run, rule: "NullSpace", given: Given, subspace: SafetySubspace):
        super().__init__(run, needs_probe=rule.feedback is not None)
        self.rule = rule
        self.correction_dtype = given.correction_dtype
        self.feedback = rule.feedback.prepare(run, given) if rule.feedback is not None else None
        self.subspace = subspace
        # what a correction in a narrower type leaves of a step goes at the next
        self.constraint = Constraint(run, self.subspace, torch.finfo(self.correction_dtype).eps)
        earlier = json.loads(self.subspace.metadata.get("tokens", "[]"))
        self.fixed = Fixed(run, given.new_tokens, [*run.basis, *given.reworded, *given.conflicts], earlier)
        if self.fixed.tokens:
            self.subspace.metadata["tokens"] = json.dumps(self.fixed.tokens)
        self.learning_rows = self.fixed.learning_rows
        self.moves = Moves(run, subspace)
        self._largest = 0.0
        self._settled = 0  # the step after which that was done last
        self._meet(given)
        self.growth: Growth | None = None
        self._grown: dict[str, Any] | None = None
        """What a checkpoint says of its growth, kept while there is none."""
        if given.tighten and self.subspace.reserve:
            pool = in_turns(given.pool, given.conflicts, run.basis)
            self.growth = Growth(run, self.constraint, pool, rule.decision_weight, given.resumed)
            self.grows = True
        self.frozen = Frozen(run)

    def _meet(self, given: Given) -> None:
        """Bring the weights to the constraint: project what is new, refuse what is from elsewhere."""
        run = self.run
        found = self.constraint.violations(run.matrices)
        off = [name for name, v in found.items() if v.error > self.constraint.allowed(v)]
        fresh = [name for name in off if run.matrices[name].is_lora_a and not given.resumed]
        self.constraint.refuse_foreign([name for name in off if name not in fresh], found)
        refuse_started(run, fresh, self.subspace.right)
        rescale = given.calibration and self.rule.rescale and not given.resumed
        if rescale and not any(matrix.is_lora_a for matrix in run.matrices.values()):
            # The free directions carry little of what any prompt sends into a layer, so a step in them alone answers
            # weakly. One rate serves all matrices: by what the least held one needs, so that none moves too far.
            free = object_of_rank_0(run.probe.free_shares(given.calibration, self.subspace.right))
            self.lr_scale = min(1 / max(*free.values(), 1e-12), MAX_SCALE)
        self._project(fresh, given.calibration if rescale else ())

    def _project(self, fresh: Sequence[str], calibration: Sequence[Anchor]) -> None:
        """A V = 0 on adapters that are new; with calibration samples, A answers them as strongly as before."""
        if not fresh:
            return
        run = self.run
        before = object_of_rank_0(run.probe.response_norms(calibration, fresh) if calibration else {})
        with torch.no_grad():
            for name in fresh:
                with run.sharding.weight(name, edit=True) as (_, A):
                    A.copy_(project_out_right(A.float(), self.subspace.right[name].to(A.device)))
            for name, after in object_of_rank_0(run.probe.response_norms(calibration, fresh) if before else {}).items():
                # The held directions carry most of what any prompt sends into a layer. Without them A would
                # answer weakly, and the adapter learn slowly; A's scale is free, since B is zero.
                self.scale[name] = min(before[name] / max(after, 1e-12), MAX_SCALE) if before[name] else 1.0
                with run.sharding.weight(name, edit=True) as (_, A):
                    A.mul_(self.scale[name])
            run.sharding.publish()

    def between_steps(self) -> bool:
        return self.growth is not None and self.growth.look()

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        if self.feedback is not None:
            self.feedback.before_step(gradients, here)
        self.constraint.follow()
        self.fixed.before_step(here)
        held = [name for name in self.run.matrices if name in here]
        self.moves.before(held)
        for name in held:
            self.constraint.gaps.pop(name, None)

    def after_step(self, here: set[str]) -> None:
        self.fixed.after_step()
        names = [name for name in self.run.matrices if name in here]
        updated = self.moves.after(names)
        self._hold(names, self.correction_dtype)
        self.moves.corrected(updated)
        # a lora_A that is frozen is in no step
        self._follow_growth(here | self.run.sharding.frozen)

    def _follow_growth(self, names: set[str]) -> None:
        """Hold matrices in their new directions: of what the weights make of these, one correction leaves more than
        rounding."""
        grown = [name for name in self.run.matrices if name in self.constraint.grown and name in names]
        for _ in range(2):
            self._hold(grown, torch.float32)
        for name in grown:
            del self.constraint.grown[name]

    def finish_step(self) -> None:
        self.moves.finish()

    def _hold(self, names: Sequence[str], dtype: torch.dtype) -> None:
        """W <- W - (W V - W_0 V) V^T, block by block; dtype: of the product with V^T.

        W V - W_0 V is computed in float32, so what a rougher product leaves of it goes at the next step.
        """
        run, parts = self.run, self.run.sharding.parts
        holders = {name: run.holder(name) for name in names}
        cut = run.sharding.cut_products(holders, self.subspace.right)
        for name in names:
            V, target, first = self.subspace.right[name], self.subspace.target[name], parts[name].rows.start
            # lora_A is too small for a rougher product to pay
            rough = dtype != torch.float32 and not run.matrices[name].is_lora_a
            for block in run.blocks(name, holders[name]):
                wanted = target[block.rows.start - first : block.rows.stop - first]
                if block.cut:
                    row = parts[name].cut_rows.index(block.rows.start)
                    gap = cut[name][row : row + 1] - wanted
                else:
                    gap = null_space_violation(block.tensor, V, wanted)
                basis = V[block.columns]
                if rough:
                    block.tensor.sub_(gap.to(dtype) @ basis.T.to(dtype))
                else:
                    block.tensor.sub_(exact_matmul(gap, basis.T))
                self.constraint.gaps[name] = gap.square().sum() + self.constraint.gaps.get(name, 0.0)

    @property
    def _is_unsettled(self) -> bool:
        # once a step: what goes on is what was saved, bit for bit
        rough = self.correction_dtype != torch.float32 and not self.run.sharding.flat
        return rough and self._settled != self.run.steps

    def _settle(self) -> None:
        """Take out what corrections in a narrower type left of the last step: it would be a fault where none is known
        of, in a run that goes on from these weights. ZeRO's own are narrower than that."""
        if self._is_unsettled:
            self._hold(list(self.run.matrices), torch.float32)
            self._settled = self.run.steps

    def check(self, final: bool) -> None:
        run = self.run
        names = list(run.matrices) if final else [name for name in run.matrices if name not in self.moves.acted]
        if not final and not _due(run.steps):
            return
        if final:
            # a step that overflowed corrected nothing
            self._follow_growth(set(names))
        found = self.constraint.violations(names)
        self.constraint.refuse_off(found)
        for name, v in found.items():
            if v.gap > self.constraint.allowed(v):
                self.moves.acted.setdefault(name, run.steps)
        if final:
            check_rest(self.fixed, self.subspace)
            self._settle()
            self._largest = max((v.error / v.rounding if v.rounding else 0.0 for v in found.values()), default=0.0)
        if final and run.steps:
            self.moves.refuse_unseen(found)

    def check_here(self) -> None:
        with self.run.sharding.alone():
            self.constraint.refuse_off(self.constraint.settled())
            check_rest(self.fixed, self.subspace)

    def leave(self) -> None:
        if not self._is_unsettled:
            return
        found = self.constraint.violations(self.run.matrices)
        # else others have put other weights in
        if all(v.error <= self.constraint.allowed(v) for v in found.values()):
            self._settle()

    def proven(self) -> str:
        count, acted = len(self.run.matrices), len(self.moves.acted)
        frozen = any(matrix.frozen for matrix in self.run.matrices.values())
        if not acted and not self.moves.seen and not frozen:
            return f"none of the {count} held matrices has moved, so there was nothing to put back"
        rest = f"; the other {count - acted} were never pushed beyond rounding" if acted < count else ""
        return (
            f"proven on the model's own parameters: all {count} matrices answer the held inputs as before training "
            f"({self._largest:.1f} times what rounding leaves, at most); {acted} were seen to be pushed and put back"
            f"{rest}{self.growth.told() if self.growth is not None else ''}{self.frozen.told()}"
        )

    def state(self) -> dict[str, Any]:
        feedback = self.feedback.state() if self.feedback is not None else None
        growth = self.growth.state() if self.growth is not None else self._grown
        return {**super().state(), "acted": self.moves.acted, "feedback": feedback, "growth": growth}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.moves.acted = {name: step for name, step in state["acted"].items() if name in self.run.matrices}
        if self.feedback is not None:
            self.feedback.load_state(state["feedback"])
        self._grown = state.get("growth")
        if self.growth is not None and self._grown:
            self.growth.load_state(self._grown)

    def put_back(self, directions: Mapping[str, int] | None) -> None:
        self.constraint.narrow(directions)

    def whole_subspace(self) -> SafetySubspace:
        return self.constraint.whole()


def check_rest(fixed: Fixed, subspace: SafetySubspace) -> None:
    """What is kept fixed is what it was, and the bases are bases: any weight answers zeros as before.

    Raises:
        CorrectionError: one of them is not.
    """
    if changed := fixed.changed():
        raise CorrectionError(
            f"spf: {changed[0]} and {len(changed) - 1} more parameters that null-space keeps fixed have changed"
        )
    try:
        subspace.check("the safety subspace")
    except ValueError as error:
        raise CorrectionError(f"spf: {error}") from error


def _due(step: int) -> bool:
    """At which steps matrices that were not seen to be corrected yet are looked at: the first four, then ever fewer."""
    return step <= 4 or math.log2(step).is_integer()

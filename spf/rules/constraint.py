"""W V = W_0 V on this process's parts of the matrices: where bases and targets are, and how far the weights are off."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spf.errors import CorrectionError
from spf.linalg import exact_matmul
from spf.run import Run
from spf.subspace import SafetySubspace

ROUNDED_ROWS = 32
"""Rows of each matrix that are corrected in float64 and rounded again, to measure what rounding leaves."""

ROUNDING_SLACK = 4.0
"""How much more than the measured rounding of some rows the rest may leave; a step that is not corrected leaves
more."""


def null_space_violation(W: Tensor, V: Tensor, target: Tensor) -> Tensor:
    """W V - target (m, k), float32: how far W answers the held inputs differently. `target` is W_0 V."""
    return exact_matmul(W, V) - target


@dataclass(frozen=True)
class Violation:
    """How far one matrix is off, as Frobenius norms.

    error: |W V - W_0 V|. rounding: what rounding alone leaves of it. gap: what the last step's correction took out.
    """

    error: float
    rounding: float
    gap: float


class Constraint:
    """The bases V and targets W_0 V of a run's matrices.

    gaps: |W V - W_0 V|^2 that the last correction found in this process's part, by name. rough: of the share of it that
    a correction in a narrower type may leave.
    """

    def __init__(self, run: Run, subspace: SafetySubspace, rough: float = 0.0):
        """
        Raises:
            ValueError: the subspace holds nothing, or is not of this model.
        """
        self.run, self.subspace, self.rough = run, subspace, rough
        self.gaps: dict[str, Tensor] = {}
        self.grown: dict[str, int] = {}
        """Matrices that are held in more directions since their last correction, and in how many they were then."""
        for name, matrix in run.matrices.items():
            if name not in subspace.right or name not in subspace.target:
                raise ValueError(f"the safety subspace has no basis for {name}: it was made for another model")
            V, target, part = subspace.right[name], subspace.target[name], run.sharding.parts[name]
            inputs = part.shape[0] if matrix.transposed else part.shape[1]
            if len(V) != inputs or len(target) not in (run.height(name), part.rows.stop - part.rows.start):
                raise ValueError(f"the safety subspace does not fit {name}: it was made for another model")
            if run.sharding.split and len(target) == run.height(name):
                subspace.target[name] = target[part.rows].clone()  # a file holds all rows
                if name in subspace.reserve:
                    subspace.reserve_target[name] = subspace.reserve_target[name][part.rows].clone()
        subspace.check("the safety subspace")
        self.follow()

    def follow(self) -> None:
        """Bring bases and targets where the parameters are: a Trainer moves a model after the optimizer was made."""
        moved: dict[tuple[Tensor, torch.device], Tensor] = {}
        for held in (self.subspace.right, self.subspace.target):
            for name in self.run.matrices:
                tensor, device = held[name], self.run.sharding.parts[name].holder.device
                if tensor.device != device:
                    # matrices that read the same inputs share their basis there too
                    if (tensor, device) not in moved:
                        moved[tensor, device] = tensor.to(device)
                    held[name] = moved[tensor, device]

    @property
    def room(self) -> int:
        """How many more directions a matrix may be held in, at most."""
        return max((R.shape[1] for R in self.subspace.reserve.values()), default=0)

    def reserves(self) -> dict[str, Tensor]:
        """R (n, r), the directions that may be held, too; one of the matrices that share them."""
        reserve = self.subspace.reserve
        return {names[0]: reserve[names[0]] for names in self._sharing() if reserve[names[0]].shape[1]}

    def _sharing(self) -> list[list[str]]:
        """The matrices by the basis that they share."""
        groups: dict[int, list[str]] = {}
        for name in self.run.matrices:
            groups.setdefault(id(self.subspace.right[name]), []).append(name)
        return list(groups.values())

    def grow(self, turns: Mapping[str, Tensor], count: int) -> None:
        """Hold `count` directions of the reserve, too: the first columns of R Q.

        turns: Q (r, r) orthogonal, by the names of `reserves`.
        """
        subspace = self.subspace
        groups = {names[0]: names for names in self._sharing()}
        for first, turn in turns.items():
            V, R = subspace.right[first], subspace.reserve[first]
            turned = exact_matmul(R, turn.to(R.device))
            basis, rest = torch.cat([V, turned[:, :count].to(V.device)], 1), turned[:, count:].contiguous()
            for name in groups[first]:
                target, more = subspace.target[name], subspace.reserve_target[name]
                made = exact_matmul(more, turn.to(more.device))
                subspace.right[name], subspace.reserve[name] = basis, rest
                subspace.target[name] = torch.cat([target, made[:, :count].to(target.device)], 1)
                subspace.reserve_target[name] = made[:, count:].contiguous()
                self.grown.setdefault(name, V.shape[1])

    def narrow(self, counts: Mapping[str, int] | None = None) -> None:
        """Hold only the first of a matrix's directions, so many: those that were held before it grew; by default those
        that the weights were corrected to."""
        counts = self.grown if counts is None else counts
        for held in (self.subspace.right, self.subspace.target):
            # matrices that share a basis go on doing so
            shorter: dict[int, Tensor] = {}
            narrowed = {
                name: shorter.setdefault(id(tensor), tensor[:, : counts[name]])
                for name, tensor in held.items()
                if name in counts
            }
            held.update(narrowed)
        self.grown = {name: count for name, count in self.grown.items() if name not in counts}

    def violations(self, names: Iterable[str]) -> dict[str, Violation]:
        """How far each matrix of the model is from the constraint, and what rounding leaves; over all ranks."""
        run, sums, names = self.run, [], list(names)
        for name in names:
            matrix, V, part = run.matrices[name], self.subspace.right[name], run.sharding.parts[name]
            target = self.subspace.target[name]
            with torch.no_grad(), run.sharding.weight(name, matrix.transposed) as (first, W):
                if run.sharding.split:
                    W = W[part.owned.start - first : part.owned.stop - first]
                    target = target[part.owned.start - part.rows.start : part.owned.stop - part.rows.start]
                W = W.to(V.device)
                error = null_space_violation(W, V, target).square().sum()
                rounding = rounding_left(W, V, target)
                gap = self.gaps.get(name, torch.zeros(())).to(V.device)
                sums.append(torch.stack([error, rounding, gap]))
        return {
            name: Violation(*(value**0.5 for value in values))
            for name, values in zip(names, run.total(sums), strict=True)
        }

    def settled(self) -> dict[str, Violation]:
        """`violations` of the matrices that were corrected since they are held in so many directions."""
        return self.violations(name for name in self.run.matrices if name not in self.grown)

    def allowed(self, v: Violation) -> float:
        """The error that rounding explains."""
        # a rougher product leaves a small share of what the last step put into the held directions
        return ROUNDING_SLACK * v.rounding + self.rough * v.gap

    def refuse_off(self, found: Mapping[str, Violation]) -> None:
        """
        Raises:
            CorrectionError: a matrix is further off than rounding explains.
        """
        for name, v in found.items():
            if not v.error <= self.allowed(v):
                raise CorrectionError(
                    f"spf: {name} answers the held inputs differently after step {self.run.steps}: |W V - W_0 V| = "
                    f"{v.error:.3g}, rounding leaves {v.rounding:.3g}"
                )

    def refuse_foreign(self, names: Sequence[str], found: Mapping[str, Violation]) -> None:
        """
        Raises:
            ValueError: there are such matrices, whose weights do not answer to their targets.
        """
        if names:
            name = names[0]
            raise ValueError(
                f"{name} and {len(names) - 1} more matrices do not answer the held inputs as the safety subspace says "
                f"(|W V - W_0 V| = {found[name].error:.3g}, rounding leaves {found[name].rounding:.3g}): these "
                "weights are from another run, or the subspace is; give the checkpoint that belongs to it, or start a "
                "new run"
            )

    def whole(self) -> SafetySubspace:
        """The subspace with the targets of all rows, from every process's own. All of them have to call it, unless only
        an adapter is held."""
        run = self.run
        if not run.sharding.split:
            return self.subspace
        device = next(iter(self.subspace.target.values())).device

        def whole_of(name: str, rows: Tensor) -> Tensor:
            height = run.sharding.parts[name].shape[0]
            if run.matrices[name].is_lora_a:  # zeros: nobody is asked, as a process may write an adapter alone
                return torch.zeros(height, rows.shape[1])
            return run.sharding.gather_rows(name, rows.to(device), height).cpu()

        target, reserve_target = (
            {name: whole_of(name, rows) for name, rows in own.items()}
            for own in (self.subspace.target, self.subspace.reserve_target)
        )
        own = self.subspace  # which may grow further
        whole = replace(own, right=dict(own.right), reserve=dict(own.reserve), metadata=dict(own.metadata))
        return replace(whole, target=target, reserve_target=reserve_target)


def rounding_left(W: Tensor, V: Tensor, target: Tensor) -> Tensor:
    """What rounding leaves of |W V - target|^2, measured on some rows of W (m, n): they are corrected in float64 and
    rounded to W's type again; with the error of a float32 product."""
    rows = slice(None, None, max(1, len(W) // ROUNDED_ROWS))
    sample, wanted, basis = W[rows].double(), target[rows].double(), V.double()
    if not len(sample):
        return torch.zeros((), device=V.device)
    corrected = sample - (sample @ basis - wanted) @ basis.T
    left = corrected.to(W.dtype).double() @ basis - wanted
    noise = exact_matmul(W[rows], V).double() - sample @ basis
    share = W.float().square().sum() / sample.square().sum().clamp_min(1e-30)
    return ((left.square().sum() + noise.square().sum()) * share).float()

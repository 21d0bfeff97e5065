"""Run: what a rule may ask for while a model is trained."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spf.data import Anchor, AnchorRotation
from spf.errors import CorrectionError, UnsupportedModelError, UnsupportedSetupError
from spf.fused import FUSED
from spf.linalg import stacked
from spf.matrices import Matrix, find_matrices, lora_b_of, refuse_tensors
from spf.probe import ProbeResult, SafetyProbe
from spf.sharding import Block, Sharding, reshard

if TYPE_CHECKING:
    from spf.rules.base import Rule

WATCHED = 16
"""How many safety samples, none of them held, are watched."""


@dataclass(frozen=True)
class Comparison:
    """Safety and utility gradient of each matrix, by name: their inner product and squared norms."""

    inner: dict[str, float]
    safety: dict[str, float]
    utility: dict[str, float]


class Run:
    """The matrices of a rule, this process's parts of them, sums over processes, the last probe, notes for the logs."""

    def __init__(self, probe: SafetyProbe, optimizer: torch.optim.Optimizer, rule: "Rule"):
        """
        Raises:
            UnsupportedSetupError, UnsupportedModelError, CorrectionError: the rule could not act here.
        """
        self.probe = probe
        self.rule = rule
        trainable = {name: m.weight for name, m in probe.matrices.items() if not m.frozen} | probe.others
        places = {name: m.among for name, m in probe.matrices.items() if m.among is not None}
        self.sharding = Sharding(probe.model, optimizer, trainable, places)
        self.optimizer = self.sharding.optimizer
        self.matrices: dict[str, Matrix] = rule.corrects(probe.matrices)
        self.sharding.add_frozen({name: m.weight for name, m in self.matrices.items() if m.frozen})
        self.others: dict[str, nn.Parameter] = dict(probe.others)
        """What is trainable and no matrix that the rule acts on; a rule that holds keeps it fixed."""
        self.kept: dict[str, str] = {}
        """Those of the others that are matrices, with what keeps the rule from acting on them."""
        if not rule.holds:
            refuse_tensors(probe.model, self.others)
        self._check_optimizer()
        anchors = probe.rotation.anchors
        held = rule.basis_samples(len(anchors))
        self.basis: list[Anchor] = anchors[:held]
        """The samples that are held; the probe's own rotation stays as it is, for others who use it."""
        rest = anchors[held:] or anchors
        self.rotation = AnchorRotation(rest, min(probe.rotation.size, len(rest)), probe.rotation.seed)
        self.watched: list[Anchor] = rest[:WATCHED]
        self.watches_own = not rule.holds or rule.adds_gradients or held == len(anchors)
        self.trained = {id(parameter): parameter.dtype for parameter in trainable.values()}
        self.result: ProbeResult | None = None
        self.comparison: Comparison | None = None
        self.steps = self.skipped = self.corrected = 0
        self._window: dict[str, list[float]] = {}
        self._met: set[str] | None = None  # until a step is made: a run that goes on may be at its end

    def blocks(self, name: str, tensor: Tensor) -> list[Block]:
        """The rectangles of a matrix in this process, of its holder, the gradient or the optimizer's state."""
        return self.sharding.parts[name].blocks(tensor, self.matrices[name].transposed)

    def holder(self, name: str) -> Tensor:
        """The tensor that the optimizer steps."""
        return self.sharding.parts[name].holder.detach()

    def height(self, name: str) -> int:
        """The number of rows of a matrix."""
        shape = self.sharding.parts[name].shape
        return shape[1] if self.matrices[name].transposed else shape[0]

    def keep_fixed(self, names: Mapping[str, str]) -> None:
        """Count these matrices among the others, and their lora_B: names, and why.

        Raises:
            UnsupportedModelError: no matrix is left.
        """
        for name, why in names.items():
            for each in {name, lora_b_of(name)} & self.probe.matrices.keys() - self.kept.keys():
                self.kept[each] = why
                self.others[each] = self.probe.matrices[each].weight
                self.matrices.pop(each, None)
        if not self.matrices:
            name, why = next(iter(names.items()))
            raise UnsupportedModelError(f"{name}: {why}, nor is there any other matrix that is trained; {FUSED}")

    def total(self, tensors: Sequence[Tensor]) -> list:
        """Small tensors of one shape summed over the processes, in one all-reduce, as nested lists; [] of none."""
        return self.sharding.total(stacked(list(tensors))).tolist() if tensors else []

    def note(self, key: str, value: float) -> None:
        """Have the mean of `value` in the next log as `spf/key`."""
        self._window.setdefault(key, []).append(value)

    def notes(self) -> dict[str, float]:
        """The means since the last call."""
        out = {f"spf/{key}": sum(values) / len(values) for key, values in self._window.items()}
        self._window = {}
        return out

    def removed(self, removed: float, whole: float) -> None:
        """Note how much of an update (squared norms) the rule took out."""
        self.corrected += removed > 0
        if whole > 0:
            self.note("removed_share", (removed / whole) ** 0.5)

    def compare(self, gradients: dict[str, Tensor]) -> None:
        """Inner products of utility and safety gradient, in one all-reduce; notes their cosine per layer group.

        Where anything is NaN or inf, on whatever process, the step goes uncorrected by a gradient rule.
        """
        assert self.result is not None
        result, names = self.result, list(gradients)
        inner, utility = [], []
        for name in names:
            factors, blocks = result.factors[name], self.blocks(name, gradients[name])
            inner.append(sum((factors.inner_block(b.tensor, b.rows, b.columns) for b in blocks), torch.zeros(())))
            utility.append(sum((b.tensor.float().square().sum() for b in blocks), torch.zeros(())))
        values, safety = stacked([*inner, *utility]), stacked([result.factors[name].norm_squared() for name in names])
        values = values if result.finite else torch.full_like(values, torch.nan)
        values = torch.cat(self.sharding.joint(values, safety.to(values)))
        if not bool(torch.isfinite(values).all()):
            self.result = self.comparison = None
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    f"spf: NaN or inf in the safety loss or a gradient at step {self.steps}; such steps are not "
                    "corrected by it and are counted in spf/skipped",
                    stacklevel=2,
                )
            return
        sums = values.tolist()
        inner_of, utility_of, safety_of = (sums[i * len(names) : (i + 1) * len(names)] for i in range(3))
        self.comparison = Comparison(*(dict(zip(names, of, strict=True)) for of in (inner_of, safety_of, utility_of)))
        self._note_cosines(self.comparison)

    def meet(self, gradients: Mapping[str, Tensor], first_call: bool) -> None:
        """These matrices have a gradient in the step; first_call: it is the step's first (DeepSpeed makes several)."""
        self._met = set(gradients) | (set() if first_call else self._met or set())

    def check_met(self) -> None:
        """
        Raises:
            CorrectionError: a matrix had no gradient at the last step, so nothing shows that it is corrected.
        """
        if self._met is None:
            return
        # what is frozen by now, as LISA's other layers are, was not stepped
        missed = sorted(n for n in self.matrices.keys() - self._met if self.matrices[n].weight.requires_grad)
        if missed and self.steps and self.skipped < self.steps:
            raise CorrectionError(
                f"spf: {len(missed)} of {len(self.matrices)} matrices had no gradient at the corrected step, "
                f"among them {missed[0]}; freeze parameters that the loss does not use"
            )

    def check_complete(self) -> None:
        """
        Raises:
            CorrectionError: matrices are trained by now that were not when the rule was put on.
        """
        reshard(self.probe.model)
        matrices, others = find_matrices(self.probe.model)
        trained = self.rule.corrects(matrices).keys() | others.keys()
        if left_out := sorted(trained - self.matrices.keys() - self.others.keys()):
            raise CorrectionError(
                f"spf: {left_out[0]} and {len(left_out) - 1} more trainable weights are not corrected; they were "
                "added or unfrozen after training began"
            )

    def state(self) -> dict[str, Any]:
        """Counters, the anchors' position, and the reference losses, as JSON."""
        nll = self.probe.reference_nll
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "corrected": self.corrected,
            "position": self.rotation.position,
            "reference_nll": [nll[anchor.where] for anchor in self.rotation.anchors] if nll else [],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.skipped, self.corrected = state["steps"], state["skipped"], state["corrected"]
        self.rotation.position = state["position"]
        if state["reference_nll"]:
            anchors = [anchor.where for anchor in self.rotation.anchors]
            self.probe.reference_nll = dict(zip(anchors, map(tuple, state["reference_nll"]), strict=True))

    def _note_cosines(self, found: Comparison) -> None:
        totals: dict[str, list[float]] = {}
        for name in found.inner:
            group = "attention" if "attn" in name or "attention" in name else "mlp" if "mlp" in name else "other"
            for key in (group, "all"):
                total = totals.setdefault(key, [0.0, 0.0, 0.0])
                for i, value in enumerate((found.inner[name], found.safety[name], found.utility[name])):
                    total[i] += value
        for key, (inner, safety, utility) in totals.items():
            if safety > 0 and utility > 0:
                self.note("cos" if key == "all" else f"cos_{key}", inner / (safety * utility) ** 0.5)
        if self.rule.holds:
            self.note("conflict_rate", float(totals["all"][0] < 0))

    def _check_optimizer(self) -> None:
        for name, matrix in self.matrices.items():
            if name not in self.sharding.parts:
                raise CorrectionError(
                    f"spf: {name} is trainable but not in the optimizer, so its updates cannot be corrected; "
                    "freeze it or make the optimizer from model.parameters()"
                )
            if self.sharding.split and matrix.transposed:
                raise UnsupportedSetupError(f"{name}: Conv1D (GPT-2) is not supported with FSDP2 or DeepSpeed; use DDP")
        calls = self.sharding.calls(list(self.matrices))
        if calls > 1 and self.rule.compares_all:
            raise UnsupportedSetupError(
                f"the rule {self.rule.name} compares all gradients at once, but DeepSpeed steps them in {calls} "
                "groups; give all matrices the same optimizer settings and raise sub_group_size (stage 3), or use "
                "null-space"
            )

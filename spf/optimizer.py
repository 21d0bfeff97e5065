"""attach(model, optimizer, ...): a step rule on the optimizer's own step hooks; SafetyOptimizer for plain loops."""

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spf.data import Anchor, AnchorRotation
from spf.errors import CorrectionError, UnsupportedModelError, UnsupportedSetupError
from spf.probe import Matrix, ProbeResult, SafetyProbe
from spf.rules import (
    LARGEST_DEFAULT_RANK,
    SPF,
    CombiningRule,
    Constrained,
    DualAscent,
    Mix,
    NullSpace,
    Rule,
    SafeGrad,
    components,
    null_space_violation,
    project_out_right,
    without_components,
)
from spf.sharding import Block, Sharding, same_on_all_ranks
from spf.subspace import SafetySubspace, outside

SAMPLED_ROWS = 8
"""Rows of each matrix kept over a step to tell how much of its update was removed."""

MAX_SCALE = 10.0
"""A fresh lora_A, or the learning rate of full matrices, is not scaled up by more than this."""

HELD_OUT = 1 / 9
"""Share of the safety samples kept out of the null space, so that what is measured on them is not held by design."""


LEAK = 0.01
"""A rise of the held-out safety loss by more nats a token, and by more than a tenth, has meant lost refusals.

In the benchmark's cells it rose by at most .004 where ASR stayed below 10 %, by .01 to .06 where it came to 28 to 46 %.
"""


def basis_samples(rule: NullSpace, samples: int) -> int:
    """How many of the safety samples, the first ones, the null space is taken from."""
    return min(rule.prompts, samples - int(samples * HELD_OUT))


def null_space_bases(
    probe: SafetyProbe, rule: NullSpace, anchors: Sequence[Anchor], names: Sequence[str], benign: Sequence[Anchor] = ()
) -> dict[str, Tensor]:
    """V (n, k), float32, per named matrix: the input directions of the anchors that the rule holds.

    benign: the samples whose leading directions are left free; only a rule with `contrast` needs them.
    """
    bases = probe.input_bases(
        anchors,
        names,
        rank=(rule.rank or LARGEST_DEFAULT_RANK) + rule.contrast,
        energy=rule.energy,
        tokens=rule.tokens,
        decision_weight=rule.decision_weight,
    )
    if rule.contrast:
        free = probe.input_bases(benign, names, rank=rule.contrast)
        bases = {name: outside(V, free[name]) for name, V in bases.items()}
    return {name: V[:, : rule.limit(len(V))].contiguous() for name, V in bases.items()}


class Attachment:
    """A step rule at work: it holds the hooks, the subspace and the counters.

    `refresh()` goes before every optimizer step (gradient rules probe there), `verify()` after the
    first. The gradient that the rule sees is the one the optimizer uses: accumulated, reduced, clipped.
    """

    def __init__(
        self,
        probe: SafetyProbe,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        *,
        subspace: SafetySubspace | None = None,
        reworded: Sequence[Anchor] = (),
        calibration: Sequence[Anchor] = (),
        monitor_steps: int = 0,
        correction_dtype: torch.dtype = torch.float32,
    ):
        self.probe = probe
        self.rule = rule
        self.gradient_rule: SPF | CombiningRule | Mix | None = (
            rule.feedback if isinstance(rule, NullSpace) else None if isinstance(rule, Constrained) else rule
        )
        self.monitor_steps = monitor_steps
        self.correction_dtype = correction_dtype
        trainable = {name: matrix.weight for name, matrix in probe.matrices.items()} | probe.others
        self.sharding = Sharding(probe.model, optimizer, trainable)
        self.optimizer = self.sharding.optimizer
        holders = {id(part.holder) for part in self.sharding.parts.values()}
        self._unknown = {id(p): name for name, p in probe.model.named_parameters() if id(p) not in holders}
        self.matrices = self._expected()
        self._check_optimizer()
        if isinstance(rule, NullSpace) and rule.contrast and not calibration and subspace is None:
            raise ValueError("null-space: contrast needs benign samples; give them as `calibration`")
        self.steps = 0
        self.skipped = 0
        self.corrected = 0
        self.seconds = {"setup": 0.0, "probe": 0.0, "projection": 0.0}
        self._window: dict[str, list[float]] = {}
        self._met: set[str] = set()
        self._to_step: set[str] = set()
        self._expects_step = False
        self._result: ProbeResult | None = None
        self._rows: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._update = [0.0, 0.0]
        self._taken: dict[str, Tensor] = {}
        self._inner: dict[str, float] = {}
        self._safety_norm: dict[str, float] = {}
        self._utility_norm: dict[str, float] = {}
        self._before_step: dict[str, list[Tensor]] = {}
        self._depth = 0
        start = time.perf_counter()
        basis = self._split_anchors()
        self._reference = probe.rotation.anchors[:16]
        self.reference_loss = probe.loss(self._reference)
        self.safety_loss = self.reference_loss
        self.multiplier = 0.0
        if isinstance(self.gradient_rule, DualAscent | SafeGrad) or isinstance(rule, Constrained):
            probe.remember(logprobs=isinstance(rule, SafeGrad))
        if subspace is None:
            subspace = (
                self._estimate([*basis, *reworded], calibration) if isinstance(rule, NullSpace) else SafetySubspace()
            )
        self.subspace = subspace
        self.scale: dict[str, float] = {}
        self.lr_scale = 1.0
        self._rates: list[Any] = []
        self._place_subspace(calibration)
        self.sharding.forget_order()
        self.seconds["setup"] = time.perf_counter() - start
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the rule off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def refresh(self) -> None:
        """Probe the next anchors, where the rule or the monitor wants them before this step."""
        if self._depth:
            # the last step raised an error between the hooks, and was caught
            self._restore_rates()
            self._depth, self._to_step, self._kept = 0, set(), {}
        self._expects_step = True
        monitor = self.monitor_steps > 0 and self.steps % self.monitor_steps == 0
        if isinstance(self.rule, NullSpace) and self.gradient_rule is None and not monitor:
            return
        start = time.perf_counter()
        self._result = self.probe()
        loss = self.measure() if monitor else self._result.loss
        if math.isfinite(loss):
            self._note("safety_loss", loss)
            self._note("safety_slack", self.reference_loss - loss)
        self.sharding.forget_order()
        self.seconds["probe"] += time.perf_counter() - start

    def measure(self) -> float:
        """The safety loss, nats a token, on the samples whose loss before training is `reference_loss`."""
        self.safety_loss = self.probe.loss(self._reference)
        return self.safety_loss

    @property
    def leaks(self) -> bool:
        """Whether the safety loss, when it was last measured, had risen by so much that refusals were lost."""
        return not self.safety_loss - self.reference_loss <= max(LEAK, 0.1 * self.reference_loss)

    def verify(self) -> None:
        """Check that the last step was corrected, looking at the model's own parameters.

        Raises:
            CorrectionError: the hooks did not fire, a matrix was not met, or the constraint does not hold.
        """
        if self.steps == 0:
            raise CorrectionError(
                "spf: the optimizer stepped without calling its step hooks after refresh(), so no update was "
                f"corrected; the hooks are on {type(self.optimizer).__name__}: is another optimizer in use?"
            )
        missed = sorted(set(self.matrices) - self._met)
        if missed and self.skipped < self.steps:
            raise CorrectionError(
                f"spf: {len(missed)} of {len(self.matrices)} matrices had no gradient at the corrected step, "
                f"among them {missed[0]}; freeze parameters that the loss does not use"
            )
        if isinstance(self.rule, NullSpace):
            for name, (error, allowed) in self._violations(self.matrices).items():
                if not error <= allowed:
                    raise CorrectionError(
                        f"spf: {name} answers the held inputs differently after the step: |W V - W_0 V| = "
                        f"{error:.3g}, rounding allows {allowed:.3g}"
                    )

    def check_resumed(self) -> None:
        """Compare the weights with the targets that came with them; to be called before the first step.

        Raises:
            ValueError: they do not belong together.
        """
        if isinstance(self.rule, NullSpace):
            # A thousandth of |W| is far more than a correction in bfloat16 leaves of a step, and far less than another
            # run's weights are off.
            for name, (error, allowed) in self._violations(self.matrices, slack=1e-3).items():
                if not error <= allowed:
                    raise ValueError(
                        f"{name}: the weights do not answer the held inputs as the checkpoint's safety subspace says "
                        f"(|W V - W_0 V| = {error:.3g}); they are from another run"
                    )

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, averaged, as `spf/...` values for the logs."""
        out = {f"spf/{key}": sum(values) / len(values) for key, values in self._window.items()}
        out["spf/skipped"] = float(self.skipped)
        self._window = {}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Counters and the anchors' position, as JSON; the bases are in `whole_subspace()`."""
        return {
            "rule": repr(self.rule),
            "steps": self.steps,
            "skipped": self.skipped,
            "corrected": self.corrected,
            "position": self.probe.rotation.position,
            "reference_loss": self.reference_loss,
            "multiplier": self.multiplier,
            "lr_scale": self.lr_scale,
            "reference_nll": self.probe.reference_nll,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it belongs to another rule, or to the same with other settings.
        """
        if state["rule"] != repr(self.rule):
            raise ValueError(f"the checkpoint was made with the rule {state['rule']}, not {self.rule!r}")
        self.steps, self.skipped, self.corrected = state["steps"], state["skipped"], state["corrected"]
        self.probe.rotation.position = state["position"]
        self.reference_loss = state["reference_loss"]
        self.multiplier, self.lr_scale = state["multiplier"], state["lr_scale"]
        self.probe.reference_nll = {where: tuple(nll) for where, nll in state["reference_nll"].items()}

    def whole_subspace(self) -> SafetySubspace:
        """The subspace with the targets of all rows, from every process's own. All of them have to call it."""
        if not self.sharding.split:
            return self.subspace
        target = {
            name: self.sharding.gather_rows(name, rows, self.sharding.parts[name].shape[0]).cpu()
            for name, rows in self.subspace.target.items()
        }
        return replace(self.subspace, target=target)

    def _split_anchors(self) -> list[Anchor]:
        """The samples the null space is taken from; the others, if any, are left to the rotation."""
        anchors = self.probe.rotation.anchors
        if not isinstance(self.rule, NullSpace):
            return []
        count = basis_samples(self.rule, len(anchors))
        if count < len(anchors):
            size = min(self.probe.rotation.size, len(anchors) - count)
            self.probe.rotation = AnchorRotation(anchors[count:], size, self.probe.rotation.seed)
        return anchors[:count]

    def _expected(self) -> dict[str, Matrix]:
        if isinstance(self.rule, NullSpace):
            # With A V = 0 the product B A V vanishes whatever B is, so lora_B is free.
            for name, matrix in self.probe.matrices.items():
                if matrix.is_lora_b and name.replace(".lora_B.", ".lora_A.") not in self.probe.matrices:
                    raise UnsupportedModelError(
                        f"{name} is trained but its lora_A is frozen, so null-space cannot hold anything there; "
                        "train lora_A too, or use another rule"
                    )
            return {name: m for name, m in self.probe.matrices.items() if not m.is_lora_b}
        return self.probe.matrices

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
        comparing = isinstance(self.rule, Constrained) or (self.gradient_rule and self.gradient_rule.gate == "global")
        if calls > 1 and comparing:
            raise UnsupportedSetupError(
                f"the rule {self.rule.name} compares all gradients at once, but DeepSpeed steps them in {calls} "
                "groups; give all matrices the same optimizer settings and raise sub_group_size (stage 3), or use "
                "null-space"
            )

    def _estimate(self, anchors: Sequence[Anchor], benign: Sequence[Anchor]) -> SafetySubspace:
        assert isinstance(self.rule, NullSpace)
        bases = null_space_bases(self.probe, self.rule, anchors, list(self.matrices), benign)
        for name, V in bases.items():
            if V.shape[1] == V.shape[0]:
                raise ValueError(
                    f"null-space: all {V.shape[0]} input directions of {name} would be held, so it could learn "
                    f"nothing; lower rank (now {self.rule.rank}) or energy (now {self.rule.energy})"
                )
        same_on_all_ranks(bases)
        self._check_lora(bases)
        target = {}
        for name, matrix in self.matrices.items():
            V, rows = bases[name], self.sharding.parts[name].rows
            if matrix.is_lora_a:
                target[name] = V.new_zeros(self._height(name), V.shape[1])[rows]
                continue
            with self.sharding.weight(name, matrix.transposed) as (first, W):
                used = W[rows.start - first : rows.stop - first] if self.sharding.split else W
                target[name] = used.float() @ V
        return SafetySubspace(right=bases, target=target, metadata={"rule": repr(self.rule)})

    def _height(self, name: str) -> int:
        """The number of rows of a matrix."""
        shape = self.sharding.parts[name].shape
        return shape[1] if self.matrices[name].transposed else shape[0]

    def _check_lora(self, bases: dict[str, Tensor]) -> None:
        for name, matrix in self.matrices.items():
            if matrix.is_lora_a:
                with torch.no_grad(), self.sharding.weight(name.replace(".lora_A.", ".lora_B.")) as (_, B):
                    trained = B.float().square().sum()
                with torch.no_grad(), self.sharding.weight(name) as (_, A):
                    held, all_of_it = (A.float() @ bases[name]).square().sum(), A.float().square().sum()
                trained, held, all_of_it = self.sharding.total(torch.stack([trained, held, all_of_it])).tolist()
                if trained > 0 and held > 1e-6 * all_of_it:
                    raise UnsupportedModelError(
                        f"{name}: the adapter is trained already (lora_B is not zero), so it cannot be held to "
                        "A V = 0 without changing the model; merge it and start a new adapter"
                    )

    def _place_subspace(self, calibration: Sequence[Anchor]) -> None:
        if not isinstance(self.rule, NullSpace):
            return
        missing = [name for name in self.matrices if name not in self.subspace.right]
        if missing:
            raise ValueError(f"the safety subspace has no basis for {missing[0]}: it was made for another model")
        for name in self.matrices:
            target = self.subspace.target[name]
            if self.sharding.split and len(target) == self._height(name):
                self.subspace.target[name] = target[self.sharding.parts[name].rows].clone()  # a file holds all rows
        self._follow()
        # A fresh lora_A does not satisfy A V = 0 yet; weights from a checkpoint are left bit for bit.
        adapters = [name for name, matrix in self.matrices.items() if matrix.is_lora_a]
        fresh = [name for name, (error, allowed) in self._violations(adapters).items() if error > allowed]
        rescale = calibration and self.rule.rescale
        if rescale and not adapters:
            # The free directions carry little of what any prompt sends into a layer, so a step in them alone answers
            # weakly. One rate serves all matrices: by what the least held one needs, so that none moves too far.
            free = self.probe.free_shares(calibration, self.subspace.right)
            self.lr_scale = min(1 / max(*free.values(), 1e-12), MAX_SCALE)
        if not fresh:
            return
        before = self.probe.response_norms(calibration, fresh) if rescale else {}
        with torch.no_grad():
            for name in fresh:
                with self.sharding.weight(name, edit=True) as (_, A):
                    A.copy_(project_out_right(A.float(), self.subspace.right[name].to(A.device)))
            for name, after in self.probe.response_norms(calibration, fresh).items() if before else ():
                # The held directions carry most of what any prompt sends into a layer. Without them A would
                # answer weakly, and the adapter learn slowly; A's scale is free, since B is zero.
                self.scale[name] = min(before[name] / max(after, 1e-12), MAX_SCALE)
                with self.sharding.weight(name, edit=True) as (_, A):
                    A.mul_(self.scale[name])
            self.sharding.publish()

    def _follow(self) -> None:
        """Bring bases and targets where the parameters are: a Trainer moves a model after the optimizer was made."""
        moved: dict[tuple[Tensor, torch.device], Tensor] = {}
        for held in (self.subspace.right, self.subspace.target):
            for name in self.matrices:
                tensor, device = held[name], self.sharding.parts[name].holder.device
                if tensor.device != device:
                    # matrices that read the same inputs share their basis there too
                    if (tensor, device) not in moved:
                        moved[tensor, device] = tensor.to(device)
                    held[name] = moved[tensor, device]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass whose step calls its parent's step fires the hooks twice; only the outer call counts.
        self._depth += 1
        if self._depth > 1:
            return
        start = time.perf_counter()
        if not self._to_step:
            self._to_step, self._met, self._taken = set(self.sharding.parts), set(), {}
        self._refuse_unknown()
        here = self.sharding.stepped()
        gradients = {
            name: gradient
            for name in self.matrices
            if name in here and (gradient := self.sharding.parts[name].holder.grad) is not None
        }
        self._met |= set(gradients)
        with torch.no_grad():
            if self._result is not None and gradients:
                self._compare(gradients)
            if self._result is not None and self.gradient_rule is not None and gradients:
                self._correct_gradients(gradients, self._result, self.gradient_rule)
            if isinstance(self.rule, NullSpace):
                self._follow()
                self._keep_others(here)
                self._rows = {name: self._sample(name).clone() for name in self.matrices if name in here}
            if isinstance(self.rule, Constrained) and self._result is not None and gradients:
                self._before_step = {
                    name: [b.tensor.clone() for b in self._blocks(name, self.sharding.parts[name].holder.detach())]
                    for name in self.matrices
                }
        if self.lr_scale != 1.0:
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                # Adafactor finds its own rate if it has none
                group["lr"] = group["lr"] and group["lr"] * self.lr_scale
        self.seconds["projection"] += time.perf_counter() - start

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        start = time.perf_counter()
        self._restore_rates()
        here = self.sharding.stepped()
        with torch.no_grad():
            if isinstance(self.rule, NullSpace):
                for name, values in self._kept.items():
                    part = self.sharding.parts[name]
                    part.piece(part.holder.detach()).copy_(values)
                self._kept = {}
                self._hold([name for name in self.matrices if name in here])
            elif isinstance(self.rule, Constrained) and self._result is not None and self._before_step:
                self._constrain(self._result, self.rule)
                self._before_step = {}
        # DeepSpeed calls the optimizer once a group; a step is over when every group had its turn.
        self._to_step -= here
        if not self._to_step:
            # torch steps an optimizer without state once, at rate 0, to save it under FSDP2: no step of training
            if self._expects_step:
                self.steps += 1
                if isinstance(self.rule, NullSpace):
                    self._removed(*self._update)
            self._expects_step, self._result, self._update = False, None, [0.0, 0.0]
        self.seconds["projection"] += time.perf_counter() - start

    def _restore_rates(self) -> None:
        if self._rates:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        self._rates = []

    def _refuse_unknown(self) -> None:
        """A parameter that was frozen when the rule was put on, and is trained now, would go uncorrected."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self._unknown:
                    raise CorrectionError(
                        f"spf: {self._unknown[id(parameter)]} is trained, but was frozen when training began, so its "
                        "updates would not be corrected; unfreeze it before, or start a new run"
                    )

    def _keep_others(self, here: set[str]) -> None:
        for name, parameter in self.probe.others.items():
            if not self.sharding.flat:
                # Without a gradient the optimizer skips it, decay and momentum included.
                parameter.grad = None
            elif name in here:
                part = self.sharding.parts[name]
                self._kept[name] = part.piece(part.holder.detach()).clone()

    def _blocks(self, name: str, tensor: Tensor) -> list[Block]:
        """The rectangles of a matrix in this process, of its holder, the gradient or the optimizer's state."""
        return self.sharding.parts[name].blocks(tensor, self.matrices[name].transposed)

    def _hold(self, names: Sequence[str]) -> None:
        """W <- W - (W V - W_0 V) V^T, block by block.

        W V - W_0 V is computed in float32, so what a rougher product with V^T leaves of it goes at the next step.
        """
        parts = self.sharding.parts
        moved: list[Tensor] = []
        updated = {name: self._sample(name).clone() for name in names}
        holders = {name: parts[name].holder.detach() for name in names}
        cut = self.sharding.cut_products(holders, self.subspace.right)
        for name in names:
            V, target, first = self.subspace.right[name], self.subspace.target[name], parts[name].rows.start
            # lora_A is too small for it to pay
            dtype = torch.float32 if self.matrices[name].is_lora_a else self.correction_dtype
            for block in self._blocks(name, holders[name]):
                wanted = target[block.rows.start - first : block.rows.stop - first]
                if block.cut:
                    row = parts[name].cut_rows.index(block.rows.start)
                    gap = cut[name][row : row + 1] - wanted
                else:
                    gap = null_space_violation(block.tensor.float(), V, wanted)
                block.tensor.sub_(gap.to(dtype) @ V[block.columns].T.to(dtype))
                if dtype != torch.float32:
                    self._taken[name] = gap.square().sum() + self._taken.get(name, 0.0)
            taken, whole = updated[name] - self._sample(name), updated[name] - self._rows[name]
            moved.append(torch.stack([taken.float().square().sum(), whole.float().square().sum()]))
        # one transfer for all matrices: each would make the process wait for a GPU
        sums = _stacked(moved).sum(0).tolist() if moved else (0.0, 0.0)
        self._update = [total + new for total, new in zip(self._update, sums, strict=True)]

    def _violations(self, names: Iterable[str], slack: float = 0.0) -> dict[str, tuple[float, float]]:
        """|W V - W_0 V|_F of the model's own weights, and how much of it rounding explains, by name.

        `slack` is a share of |W|_F that may come besides. Where the last step was corrected by a rougher product, that
        explains a small share of what it took.
        """
        squares, eps = [], {}
        for name in names:
            matrix, V, part = self.matrices[name], self.subspace.right[name], self.sharding.parts[name]
            target = self.subspace.target[name]
            with torch.no_grad(), self.sharding.weight(name, matrix.transposed) as (first, W):
                # fp32: accumulated in a product of n terms; bf16: half a unit in the last place per element
                eps[name] = max(torch.finfo(W.dtype).eps, 30 * torch.finfo(torch.float32).eps) + slack
                if self.sharding.split:
                    W = W[part.owned.start - first : part.owned.stop - first]
                    target = target[part.owned.start - part.rows.start : part.owned.stop - part.rows.start]
                W = W.float().to(V.device)
                error = null_space_violation(W, V, target)
                taken = self._taken.get(name, torch.zeros(())).to(V.device)
                squares.append(torch.stack([error.square().sum(), W.square().sum(), taken]))
        if not squares:
            return {}
        sums = self.sharding.total(_stacked(squares)).sqrt().tolist()
        rough = torch.finfo(self.correction_dtype).eps
        return {
            name: (error, eps[name] * size + rough * taken)
            for name, (error, size, taken) in zip(eps, sums, strict=True)
        }

    def _sample(self, name: str) -> Tensor:
        """Some of this process's rows of a matrix, for the statistics (none if it holds no whole row)."""
        whole = [b.tensor for b in self._blocks(name, self.sharding.parts[name].holder.detach()) if not b.cut]
        return whole[0][:: max(1, len(whole[0]) // SAMPLED_ROWS)] if whole else torch.empty(0)

    def _compare(self, gradients: dict[str, Tensor]) -> None:
        """Inner products of utility and safety gradient, in one all-reduce; notes their cosine per layer group.

        Where anything is NaN or inf, on whatever process, the step goes uncorrected by the gradient rule.
        """
        assert self._result is not None
        result, names = self._result, list(gradients)
        inner, utility = [], []
        for name in names:
            factors, blocks = result.factors[name], self._blocks(name, gradients[name])
            inner.append(sum((factors.inner_block(b.tensor, b.rows, b.columns) for b in blocks), torch.zeros(())))
            utility.append(sum((b.tensor.float().square().sum() for b in blocks), torch.zeros(())))
        device = gradients[names[0]].device
        values = torch.stack([value.to(device) for value in (*inner, *utility)])
        values = self.sharding.total(values if result.finite else torch.full_like(values, torch.nan))
        if not bool(torch.isfinite(values).all()):
            self._result = None
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    f"spf: NaN or inf in the safety loss or a gradient at step {self.steps}; such steps are not "
                    "corrected by it and are counted in spf/skipped",
                    stacklevel=2,
                )
            return
        sums = values.tolist()
        self._inner = dict(zip(names, sums[: len(names)], strict=True))
        self._utility_norm = dict(zip(names, sums[len(names) :], strict=True))
        self._safety_norm = {name: float(result.factors[name].norm_squared()) for name in names}
        totals: dict[str, list[float]] = {}
        for name in names:
            group = "attention" if "attn" in name or "attention" in name else "mlp" if "mlp" in name else "other"
            for key in (group, "all"):
                total = totals.setdefault(key, [0.0, 0.0, 0.0])
                for i, value in enumerate((self._inner[name], self._safety_norm[name], self._utility_norm[name])):
                    total[i] += value
        for key, (inner_product, safety, norm) in totals.items():
            if safety > 0 and norm > 0:
                self._note("cos" if key == "all" else f"cos_{key}", inner_product / (safety * norm) ** 0.5)
        if isinstance(self.rule, NullSpace):
            self._note("conflict_rate", float(totals["all"][0] < 0))

    def _correct_gradients(
        self, gradients: dict[str, Tensor], result: ProbeResult, rule: SPF | CombiningRule | Mix
    ) -> None:
        inner, safety, utility = self._inner, self._safety_norm, self._utility_norm
        if rule.gate == "global":
            # one test over all matrices: every matrix gets the sums
            inner, safety = dict.fromkeys(inner, sum(inner.values())), dict.fromkeys(safety, sum(safety.values()))
            norms = dict.fromkeys(utility, sum(utility.values()))
        else:
            norms = utility
        if not isinstance(self.rule, NullSpace):
            self._note("conflict_rate", sum(i < 0 for i in inner.values()) / len(inner))
        if isinstance(rule, DualAscent):
            self.multiplier = rule.multiplier(self.multiplier, result.excess)
            self._note("multiplier", self.multiplier)
        if isinstance(rule, SPF):
            removed = self._remove_subspace({name: gradients[name] for name in gradients if inner[name] < 0}, rule)
        else:
            removed = 0.0
            for name, gradient in gradients.items():
                a, c = (
                    (1.0, self.multiplier)
                    if isinstance(rule, DualAscent)
                    else rule.coefficients(norms[name], inner[name], safety[name])
                )
                if (a, c) == (1.0, 0.0):
                    continue
                for b in self._blocks(name, gradient):
                    b.tensor.copy_(a * b.tensor.float() + c * result.factors[name].block(b.rows, b.columns, b.tensor))
                own = (self._utility_norm[name], self._inner[name], self._safety_norm[name])
                removed += (a - 1) ** 2 * own[0] + 2 * (a - 1) * c * own[1] + c**2 * own[2]
        if not isinstance(self.rule, NullSpace):
            self._removed(removed, sum(utility.values()))

    def _remove_subspace(self, gradients: dict[str, Tensor], rule: SPF) -> float:
        """Take the safety subspace out of these gradients; returns the squared norm of what went."""
        assert self._result is not None
        bases = {name: self._result.factors[name].svd(rule.rank) for name in gradients}
        right = {name: V.to(gradients[name].device) for name, (_, _, V) in bases.items()}
        left = {name: U.to(gradients[name].device) for name, (U, _, _) in bases.items()}
        found: dict[str, Tensor] = {}
        if rule.side == "right":
            cut = self.sharding.cut_products(gradients, right)
        else:
            for name, gradient in gradients.items():
                U, V = left[name], right[name]
                shape = (U.shape[1], V.shape[0] if rule.side == "left" else V.shape[1])
                found[name] = U.new_zeros(shape)
                for b in self._blocks(name, gradient):
                    part = components(b.tensor.float(), U[b.rows], V[b.columns], rule.side)
                    found[name][:, b.columns if rule.side == "left" else slice(None)] += part
            if found and self.sharding.split:
                flat = self.sharding.total(torch.cat([c.flatten() for c in found.values()]))
                pieces = flat.split([c.numel() for c in found.values()])
                found = {name: piece.view_as(found[name]) for name, piece in zip(found, pieces, strict=True)}
        removed = sum(float(c.square().sum()) for c in found.values())
        for name, gradient in gradients.items():
            U, V = left[name], right[name]
            for b in self._blocks(name, gradient):
                if rule.side == "left":
                    part = found[name][:, b.columns]
                elif rule.side == "both":
                    part = found[name]
                elif b.cut:
                    row = self.sharding.parts[name].cut_rows.index(b.rows.start)
                    part = cut[name][row : row + 1]
                else:
                    part = components(b.tensor.float(), U[b.rows], V[b.columns], rule.side)
                if rule.side == "right":
                    # of this process's rows, as what is logged is rank 0's
                    removed += float(part.square().sum())
                b.tensor.copy_(without_components(b.tensor.float(), part, U[b.rows], V[b.columns], rule.side))
        return removed

    def _constrain(self, result: ProbeResult, rule: Constrained) -> None:
        """Change the step just made so that the linearised safety loss stays within its margin."""
        directions: list[tuple[Tensor, Tensor]] = []
        sums: list[Tensor] = []
        for name, blocks_before in self._before_step.items():
            holder = self.sharding.parts[name].holder
            state = self.optimizer.state[holder]
            moments = [b.tensor for b in self._blocks(name, state["exp_avg_sq"])] if "exp_avg_sq" in state else None
            for i, (b, before) in enumerate(zip(self._blocks(name, holder.detach()), blocks_before, strict=True)):
                step = (b.tensor - before).float()
                S = result.factors[name].block(b.rows, b.columns, b.tensor)
                direction = S / (moments[i].float().sqrt() + 1e-8) if moments else S
                products = [(S * step).sum(), (S * direction).sum(), step.square().sum(), direction.square().sum()]
                sums.append(torch.stack(products))
                directions.append((b.tensor, direction))
        total = _stacked(sums).sum(0) if sums else torch.zeros(4)
        values = self.sharding.total(total).tolist()
        violation = max(0.0, result.excess - rule.margin + values[0])
        self._note("conflict_rate", float(values[0] > 0))
        factor = violation / values[1] if violation > 0 and values[1] > 0 else 0.0
        if factor:
            for weight, direction in directions:
                weight.sub_((factor * direction).to(weight.dtype))
        self._removed(factor**2 * values[3], values[2])

    def _removed(self, removed: float, whole: float) -> None:
        self.corrected += removed > 0
        if whole > 0:
            self._note("removed_share", (removed / whole) ** 0.5)

    def _note(self, key: str, value: float) -> None:
        self._window.setdefault(key, []).append(value)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of many that may lie on several devices, on the first one's."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])


def attach(
    probe: SafetyProbe, optimizer: torch.optim.Optimizer, rule: Rule | None = None, **options: Any
) -> Attachment:
    """Put a step rule on an optimizer's step hooks; the rule defaults to `NullSpace()`.

    Call `refresh()` of what is returned before every `optimizer.step()`. Options: `subspace` (bases
    estimated before), `reworded` (further samples, of the null space only), `calibration` (harmless samples; a
    fresh lora_A keeps its response to them in size when it is projected, and without adapters the learning rate
    is higher during the step), `monitor_steps` (probe the safety loss every so many steps, 0 for never) and
    `correction_dtype` (of the product with V^T that takes the violation out of a full matrix; bfloat16, for training in
    bfloat16, leaves some thousandths of one step's violation, which the next step takes out).

    Raises:
        UnsupportedSetupError, UnsupportedModelError, CorrectionError: the rule could not act here.
    """
    return Attachment(probe, optimizer, rule or NullSpace(), **options)


class SafetyOptimizer(torch.optim.Optimizer):
    """Any torch optimizer with a step rule, for hand-written loops.

    It shares parameter groups and state with the optimizer it wraps, so schedulers, `state_dict` and
    gradient clipping work on either. The first step is verified; it raises if the rule did not act.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probe: SafetyProbe, rule: Rule | None = None, **options: Any):
        """`options` as for `attach`."""
        self.optimizer = optimizer
        self.attachment = attach(probe, optimizer, rule, **options)
        self.defaults = optimizer.defaults
        # torch's bookkeeping for hooks on this object; its own __init__ would build new groups.
        self._optimizer_step_pre_hooks: OrderedDict = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict = OrderedDict()
        self._optimizer_state_dict_pre_hooks: OrderedDict = OrderedDict()
        self._optimizer_state_dict_post_hooks: OrderedDict = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks: OrderedDict = OrderedDict()
        self._optimizer_load_state_dict_post_hooks: OrderedDict = OrderedDict()
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Probe if the rule needs it, then step with the rule's correction."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        first = self.attachment.steps == 0
        self.attachment.refresh()
        self.optimizer.step()
        if first:
            self.attachment.verify()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, so it loads into either."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

"""attach(model, optimizer, ...): a step rule on the optimizer's own step hooks; SafetyOptimizer for plain loops."""

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spf.data import Anchor
from spf.probe import Matrix, ProbeResult, SafetyProbe, UnsupportedModelError
from spf.rules import NullSpace, Rank1, Rule, conflict_coefficient, null_space_violation, project_out
from spf.sharding import check_parameters, innermost_optimizer, same_on_all_ranks
from spf.subspace import SafetySubspace

SAMPLED_ROWS = 8
"""Rows of each matrix kept over a step to tell how much of its update was removed."""

MAX_SCALE = 10.0
"""A fresh lora_A is not scaled up by more than this."""


class CorrectionError(RuntimeError):
    """The rule did not reach the parameters it should have."""


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
        calibration: Sequence[Anchor] = (),
        monitor_steps: int = 0,
    ):
        check_parameters(probe.model)
        self.probe = probe
        self.rule = rule
        self.monitor_steps = monitor_steps
        self.optimizer = innermost_optimizer(optimizer)
        self.matrices = self._expected()
        self._check_optimizer()
        self.steps = 0
        self.skipped = 0
        self.corrected = 0
        self.seconds = {"setup": 0.0, "probe": 0.0, "projection": 0.0}
        self._window: dict[str, list[float]] = {}
        self._met: set[str] = set()
        self._result: ProbeResult | None = None
        self._rows: dict[str, Tensor] = {}
        self._inner: dict[str, float] = {}
        self._safety_norm: dict[str, float] = {}
        self._depth = 0
        start = time.perf_counter()
        self._reference = probe.rotation.anchors[:16]
        self.reference_loss = probe.loss(self._reference)
        if subspace is None:
            subspace = self._estimate() if isinstance(rule, NullSpace) else SafetySubspace()
        self.subspace = subspace
        self.scale: dict[str, float] = {}
        self._place_subspace(calibration)
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
        monitor = self.monitor_steps > 0 and self.steps % self.monitor_steps == 0
        if isinstance(self.rule, NullSpace) and not monitor:
            return
        start = time.perf_counter()
        self._result = self.probe()
        if not self._result.finite:
            self._result = None
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    f"spf: NaN or inf in the safety loss or its gradient at step {self.steps}; such steps are "
                    "not corrected by it and are counted in spf/skipped",
                    stacklevel=2,
                )
        else:
            loss = self.probe.loss(self._reference) if monitor else self._result.loss
            self._note("safety_loss", loss)
            self._note("safety_slack", self.reference_loss - loss)
        self.seconds["probe"] += time.perf_counter() - start

    def verify(self) -> None:
        """Check that the last step was corrected, looking at the model's own parameters.

        Raises:
            CorrectionError: the hooks did not fire, a matrix was not met, or the constraint does not hold.
        """
        if self.steps == 0:
            raise CorrectionError(
                "spf: the optimizer stepped without calling its step hooks, so no update was corrected; "
                f"the hooks are on {type(self.optimizer).__name__}: is another optimizer in use?"
            )
        missed = sorted(set(self.matrices) - self._met)
        if missed and self.skipped < self.steps:
            raise CorrectionError(
                f"spf: {len(missed)} of {len(self.matrices)} matrices had no gradient at the corrected step, "
                f"among them {missed[0]}; freeze parameters that the loss does not use"
            )
        if isinstance(self.rule, NullSpace):
            # looked up anew, in case the parameters were replaced since the rule was attached
            parameters = dict(self.probe.model.named_parameters())
            for name in self.matrices:
                error, allowed = self._violation(name, parameters[name])
                if not error <= allowed:
                    raise CorrectionError(
                        f"spf: {name} answers the held inputs differently after the step: |W V - W_0 V| = "
                        f"{error:.3g}, rounding allows {allowed:.3g}"
                    )

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, averaged, as `spf/...` values for the logs."""
        out = {f"spf/{key}": sum(values) / len(values) for key, values in self._window.items()}
        out["spf/skipped"] = float(self.skipped)
        self._window = {}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Counters and the anchors' position, as JSON; the bases are in `subspace`."""
        return {
            "rule": self.rule.name,
            "steps": self.steps,
            "skipped": self.skipped,
            "corrected": self.corrected,
            "position": self.probe.rotation.position,
            "reference_loss": self.reference_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it belongs to another rule.
        """
        if state["rule"] != self.rule.name:
            raise ValueError(f"the checkpoint was made with the rule {state['rule']}, not {self.rule.name}")
        self.steps, self.skipped, self.corrected = state["steps"], state["skipped"], state["corrected"]
        self.probe.rotation.position = state["position"]
        self.reference_loss = state["reference_loss"]

    def _expected(self) -> dict[str, Matrix]:
        if isinstance(self.rule, NullSpace):
            # With A V = 0 the product B A V vanishes whatever B is, so lora_B is free.
            return {name: m for name, m in self.probe.matrices.items() if not m.is_lora_b}
        return self.probe.matrices

    def _check_optimizer(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, matrix in self.matrices.items():
            if id(matrix.weight) not in held:
                raise CorrectionError(
                    f"spf: {name} is trainable but not in the optimizer, so its updates cannot be corrected; "
                    "freeze it or make the optimizer from model.parameters()"
                )

    def _estimate(self) -> SafetySubspace:
        assert isinstance(self.rule, NullSpace)
        bases = self.probe.input_bases(
            self.probe.rotation.anchors[: self.rule.prompts],
            list(self.matrices),
            rank=self.rule.rank,
            energy=self.rule.energy,
        )
        for name, V in bases.items():
            if V.shape[1] >= V.shape[0]:
                raise ValueError(
                    f"null-space: all {V.shape[0]} input directions of {name} would be held, so it could learn "
                    f"nothing; lower rank (now {self.rule.rank}) or energy (now {self.rule.energy})"
                )
        same_on_all_ranks(bases)
        self._check_lora(bases)
        target = {}
        for name, matrix in self.matrices.items():
            W = matrix.view(matrix.weight.detach()).float()
            target[name] = W.new_zeros(W.shape[0], bases[name].shape[1]) if matrix.is_lora_a else W @ bases[name]
        return SafetySubspace(right=bases, target=target, metadata={"rule": repr(self.rule)})

    def _check_lora(self, bases: dict[str, Tensor]) -> None:
        for name, matrix in self.matrices.items():
            if matrix.is_lora_a:
                B = self.probe.model.get_parameter(name.replace(".lora_A.", ".lora_B."))
                A_V = matrix.weight.detach().float() @ bases[name]
                if bool(B.any()) and float(A_V.norm()) > 1e-3 * float(matrix.weight.norm()):
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
        for name, matrix in self.matrices.items():
            device = matrix.weight.device
            self.subspace.right[name] = self.subspace.right[name].to(device)
            self.subspace.target[name] = self.subspace.target[name].to(device)
        # A fresh lora_A does not satisfy A V = 0 yet; weights from a checkpoint are left bit for bit.
        fresh = []
        for name, matrix in self.matrices.items():
            error, allowed = self._violation(name, matrix.weight)
            if error > allowed:
                fresh.append(name)
        before = self.probe.response_norms(calibration, fresh) if calibration and fresh else {}
        with torch.no_grad():
            for name in fresh:
                self._hold(name)
            for name, after in self.probe.response_norms(calibration, fresh).items() if before else ():
                # The held directions carry most of what any prompt sends into a layer. Without them A would
                # answer weakly, and the adapter learn slowly; A's scale is free, since B is zero.
                self.scale[name] = min(before[name] / max(after, 1e-12), MAX_SCALE)
                self.matrices[name].weight.mul_(self.scale[name])

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass whose step calls its parent's step fires the hooks twice; only the outer call counts.
        self._depth += 1
        if self._depth > 1:
            return
        start = time.perf_counter()
        gradients = {name: m.view(m.weight.grad) for name, m in self.matrices.items() if m.weight.grad is not None}
        self._met = set(gradients)
        with torch.no_grad():
            if self._result is not None:
                self._compare(gradients)
            if isinstance(self.rule, NullSpace):
                for parameter in self.probe.others.values():
                    # Without a gradient the optimizer skips it, decay and momentum included.
                    parameter.grad = None
                self._rows = {name: self._sample(m).clone() for name, m in self.matrices.items()}
            elif self._result is not None:
                self._correct_gradients(gradients, self._result)
        self._result = None
        self.seconds["projection"] += time.perf_counter() - start

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        start = time.perf_counter()
        self.steps += 1
        if isinstance(self.rule, NullSpace):
            with torch.no_grad():
                updated = {name: self._sample(m).clone() for name, m in self.matrices.items()}
                for name in self.matrices:
                    self._hold(name)
                removed = sum(
                    (updated[name] - self._sample(m)).float().square().sum() for name, m in self.matrices.items()
                )
                whole = sum((updated[name] - self._rows[name]).float().square().sum() for name in self.matrices)
                self._removed(float(removed), float(whole))
            self._rows = {}
        self.seconds["projection"] += time.perf_counter() - start

    def _hold(self, name: str) -> None:
        matrix, V, target = self.matrices[name], self.subspace.right[name], self.subspace.target[name]
        W = matrix.view(matrix.weight.data)
        W.sub_((null_space_violation(W.float(), V, target) @ V.T).to(W.dtype))

    def _violation(self, name: str, parameter: Tensor) -> tuple[float, float]:
        """|W V - W_0 V|_F, and how much of it rounding explains."""
        W = self.matrices[name].view(parameter.detach()).float()
        error = null_space_violation(W, self.subspace.right[name], self.subspace.target[name]).norm()
        # fp32: accumulated in a product of n terms; bf16: half a unit in the last place per element
        eps = max(torch.finfo(parameter.dtype).eps, 30 * torch.finfo(torch.float32).eps)
        return float(error), eps * float(W.norm())

    def _sample(self, matrix: Matrix) -> Tensor:
        W = matrix.view(matrix.weight.detach())
        return W[:: max(1, W.shape[0] // SAMPLED_ROWS)]

    def _compare(self, gradients: dict[str, Tensor]) -> None:
        """Note the cosine of utility and safety gradient, per layer group and over all."""
        assert self._result is not None
        totals: dict[str, list[float]] = {}
        self._inner, self._safety_norm = {}, {}
        for name, G in gradients.items():
            factors = self._result.factors[name]
            inner, safety = float(factors.inner(G.float())), float(factors.norm_squared())
            self._inner[name], self._safety_norm[name] = inner, safety
            group = "attention" if "attn" in name or "attention" in name else "mlp" if "mlp" in name else "other"
            for key in (group, "all"):
                total = totals.setdefault(key, [0.0, 0.0, 0.0])
                for i, value in enumerate((inner, safety, float(G.float().square().sum()))):
                    total[i] += value
        for key, (inner, safety, utility) in totals.items():
            if safety > 0 and utility > 0:
                self._note("cos" if key == "all" else f"cos_{key}", inner / (safety * utility) ** 0.5)
        if isinstance(self.rule, NullSpace):
            self._note("conflict_rate", float(totals["all"][0] < 0))

    def _correct_gradients(self, gradients: dict[str, Tensor], result: ProbeResult) -> None:
        removed = whole = 0.0
        conflicting = sum(self._inner.values()) < 0
        if not isinstance(self.rule, NullSpace | Rank1) and self.rule.gate == "global":
            self._note("conflict_rate", float(conflicting))
        else:
            self._note("conflict_rate", sum(i < 0 for i in self._inner.values()) / len(self._inner))
        for name, G in gradients.items():
            factors, exact = result.factors[name], G.float()
            whole += float(exact.square().sum())
            if isinstance(self.rule, Rank1):
                c = conflict_coefficient(self._inner[name], self._safety_norm[name])
                if c == 0:
                    continue
                corrected = exact - c * factors.dense()
            else:
                assert not isinstance(self.rule, NullSpace)
                gated = conflicting if self.rule.gate == "global" else self._inner[name] < 0
                if not gated:
                    continue
                U, _, V = factors.svd(self.rule.rank)
                corrected = project_out(exact, U, V, self.rule.side)
            removed += float((exact - corrected).square().sum())
            G.copy_(corrected)
        self._removed(removed, whole)

    def _removed(self, removed: float, whole: float) -> None:
        self.corrected += removed > 0
        if whole > 0:
            self._note("removed_share", (removed / whole) ** 0.5)

    def _note(self, key: str, value: float) -> None:
        self._window.setdefault(key, []).append(value)


def attach(
    probe: SafetyProbe, optimizer: torch.optim.Optimizer, rule: Rule | None = None, **options: Any
) -> Attachment:
    """Put a step rule on an optimizer's step hooks; the rule defaults to `NullSpace()`.

    Call `refresh()` of what is returned before every `optimizer.step()`. Options: `subspace` (bases
    estimated before), `calibration` (harmless samples; a fresh lora_A keeps its response to them in
    size when it is projected) and `monitor_steps` (probe the safety loss every so many steps, 0 for never).

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

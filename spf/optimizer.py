"""attach(probe, optimizer, rule): a step rule on the optimizer's own step hooks; SafetyOptimizer for plain loops."""

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spf.config import Whole, check
from spf.data import Anchor
from spf.errors import CorrectionError, UnsupportedSetupError
from spf.matrices import NAMED, describe_fixed
from spf.monitor import Monitor, Reads, watched_line
from spf.probe import SafetyProbe
from spf.rules import Given, NullSpace, Rule
from spf.run import Run
from spf.sharding import is_first
from spf.stepping import Stepping
from spf.subspace import SafetySubspace


class Attachment:
    """A step rule at work on an optimizer: `run` it works on, its `correction`, and the `monitor` of what is watched.

    `refresh()` goes before every optimizer step (gradient rules probe there), `verify()` after it (watched prompts are
    asked), `finish()` after the last. The gradient that the rule sees is accumulated, reduced and clipped.
    """

    def __init__(
        self,
        probe: SafetyProbe,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        *,
        subspace: SafetySubspace | None = None,
        resumed: bool = False,
        reworded: Sequence[Anchor] = (),
        conflicts: Sequence[Anchor] = (),
        watched: Sequence[Anchor] = (),
        further: Sequence[Sequence[int]] = (),
        reads: Reads | None = None,
        pool: Sequence[Anchor] = (),
        calibration: Sequence[Anchor] = (),
        monitor_steps: Whole = 0,
        cosines: bool = False,
        correction_dtype: torch.dtype = torch.float32,
        new_tokens: Sequence[int] = (),
        tighten: bool = True,
        near_task: bool = False,
    ):
        if isinstance(optimizer, SafetyOptimizer):
            raise UnsupportedSetupError(
                "the optimizer is a SafetyOptimizer, which has a safety rule already; use it without SafetyCallback"
            )
        options = {"probe": probe, "rule": rule, "subspace": subspace, "resumed": resumed, "tighten": tighten}
        options |= {"monitor_steps": monitor_steps, "cosines": cosines, "correction_dtype": correction_dtype}
        check(Attachment.__init__, options, "attach: {}")
        start = time.perf_counter()
        self.probe, self.rule, self.cosines = probe, rule, cosines
        self.run = Run(probe, optimizer, rule)
        self.sharding, self.optimizer, self.matrices = self.run.sharding, self.run.optimizer, self.run.matrices
        holders = {id(part.holder) for part in self.sharding.parts.values()}
        unknown = {id(p): name for name, p in probe.model.named_parameters() if id(p) not in holders}
        self.monitor = Monitor(self.run, watched, further, resumed, reads, monitor_steps)
        samples = (reworded, conflicts, pool, calibration)
        given = Given(subspace, resumed, *samples, correction_dtype, new_tokens, tighten, near_task)
        self.correction = rule.prepare(self.run, given)
        self._probe_seconds = 0.0
        calls = (self._before, self.correction.after_step, self._finish_step)
        self.stepping = Stepping(self.sharding, unknown, *calls, rule.adds_gradients)
        self.stepping.lr_scale = self.correction.lr_scale
        self.sharding.forget_order()
        self._setup_seconds = time.perf_counter() - start

    @property
    def steps(self) -> int:
        return self.run.steps

    @property
    def corrected(self) -> int:
        """How many steps the rule changed."""
        return self.run.corrected

    @property
    def skipped(self) -> int:
        """How many steps a gradient rule left alone for NaN or inf."""
        return self.run.skipped

    @property
    def lr_scale(self) -> float:
        return self.stepping.lr_scale

    @property
    def subspace(self) -> SafetySubspace:
        """What is held; empty for rules that hold nothing."""
        return self.correction.subspace

    @property
    def seconds(self) -> dict[str, float]:
        """What set-up, probes and corrections took."""
        return {"setup": self._setup_seconds, "probe": self._probe_seconds, "projection": self.stepping.seconds}

    def remove(self) -> None:
        """Take the rule off the optimizer; what was to be held from the next step on, is not."""
        self.stepping.remove()
        self.correction.put_back(None)

    def leave(self) -> None:
        """Leave the weights as another run can go on from them, if they are still those of the last step."""
        with torch.no_grad():
            self.correction.leave()

    def refresh(self) -> None:
        """Before a step, where due: prompts of the pool are asked (what flipped is held), the next anchors probed."""
        self.stepping.recover()  # the last step may have raised an error that was caught
        self.stepping.expect()
        start = time.perf_counter()
        asked = self.correction.between_steps()
        measured = self.correction.needs_probe or (self.cosines and self.monitor.is_due(self.steps))
        if measured:
            self.run.result = self.probe.measure(next(self.run.rotation)).of_all(self.sharding)
        if self.correction.needs_probe and not (self.rule.holds and self.monitor.is_due(self.steps + 1)):
            assert self.run.result is not None
            self.monitor.note_loss(self.run.result.loss)
        if asked or measured:
            self.sharding.forget_order()
        self._probe_seconds += time.perf_counter() - start

    def skip(self) -> None:
        """The step that `refresh()` announced does not come: its gradients overflowed, say."""
        self.stepping.expected = False

    def verify(self, final: bool = False) -> None:
        """Check that the last step was corrected, looking at the model's own parameters; every step is cheap to verify.
        Where it is due, the watched prompts are asked, too.

        A matrix is followed until a step pushed it off the constraint and the correction brought it back; with `final`
        all matrices are looked at, as at every save and at the end.

        Raises:
            CorrectionError: the hooks did not fire, a matrix was not met, or the constraint does not hold.
        """
        self.stepping.check()
        self.run.check_met()
        if final:
            self.run.check_complete()
        if self.steps:
            self.correction.check(final)
            start = time.perf_counter()
            if self.monitor.watch(with_loss=self.rule.holds):
                self.sharding.forget_order()
            self._probe_seconds += time.perf_counter() - start

    def finish(self) -> str:
        """What was proven of the whole run, in words; to be called after the last step.

        Raises:
            CorrectionError: the model is not protected.
        """
        self.verify(final=True)
        if self.correction.needs_probe and self.steps and self.skipped == self.steps:
            raise CorrectionError(
                f"spf: the safety loss or a gradient was NaN or inf at each of {self.steps} steps, so no update was "
                "corrected by the safety gradient; train in bf16 or float32, or lower the learning rate"
            )
        return self.correction.proven()

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, averaged, as `spf/...` values for the logs."""
        out = self.run.notes()
        out["spf/skipped"] = float(self.skipped)
        if self.rule.holds:
            out["spf/lr_scale"] = self.lr_scale
        return out

    def state_dict(self) -> dict[str, Any]:
        """Counters and the anchors' position, as JSON; the bases are in `whole_subspace()`."""
        parts = {"monitor": self.monitor.state(), "correction": self.correction.state()}
        return {"rule": repr(self.rule)} | self.run.state() | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it belongs to another rule, or to the same with other settings.
        """
        if state["rule"] != repr(self.rule):
            raise ValueError(f"the checkpoint was made with the rule {state['rule']}, not {self.rule!r}")
        self.run.load_state(state)
        self.monitor.load_state(state["monitor"])
        try:
            self.correction.load_state(state["correction"])
        except KeyError as error:
            said = f"the checkpoint holds no {error} of the rule; go on from an earlier checkpoint"
            raise ValueError(said) from error
        self.stepping.lr_scale = self.correction.lr_scale

    def whole_subspace(self) -> SafetySubspace:
        """The subspace with the targets of all rows, from every process's own. All of them have to call it."""
        return self.correction.whole_subspace()

    def _before(self, here: set[str]) -> None:
        run = self.run
        gradients = {
            name: gradient
            for name in run.matrices
            if name in here and (gradient := self.sharding.parts[name].holder.grad) is not None
        }
        run.meet(gradients, self.stepping.first_call)
        run.comparison = None
        if run.result is not None and gradients:
            run.compare(gradients)
        self.correction.before_step(gradients, here)

    def _finish_step(self) -> None:
        self.run.steps += 1
        self.correction.finish_step()
        self.run.result = None


def kept_fixed(running: Attachment) -> list[str]:
    """What a rule that holds does not let the optimizer train, and whether no sample is left to watch."""
    if not running.rule.holds:
        return []
    run, lines = running.run, []
    if fixed := describe_fixed(running.probe.model, [name for name in run.others if name not in run.kept]):
        learn = "; rows of tokens that were added to the vocabulary learn" if running.correction.learning_rows else ""
        lines.append(
            f"kept fixed: {', '.join(fixed)}; they are no matrices on an input, so null-space cannot hold what "
            f"they change{learn}; train them with another rule, or freeze them to save their memory"
        )
    for why in dict.fromkeys(run.kept.values()):
        names = [name for name, reason in run.kept.items() if reason == why]
        more = ", ..." * (len(names) > NAMED)
        lines.append(f"kept fixed, too: {len(names)} matrices, {why} ({', '.join(names[:NAMED])}{more})")
    if (count := len(running.probe.rotation.anchors)) == len(run.basis):
        lines.append(
            f"all {count} safety samples are held, so the watched prompts stay refused whatever leaks; with 9 or "
            "more, one is kept apart to watch"
        )
    return lines


def attach(
    probe: SafetyProbe, optimizer: torch.optim.Optimizer, rule: Rule | None = None, **options: Any
) -> Attachment:
    """Put a step rule on an optimizer's step hooks; the rule defaults to `NullSpace()`.

    Call `refresh()` of what is returned before every `optimizer.step()`, `verify()` after it and `finish()` after the
    last. Options: `subspace` (bases estimated before), `resumed` (they come with weights that answer to them already),
    `reworded` and `conflicts` (further samples to hold, of the null space only), `near_task` (the model refuses much of
    the task itself: fewer directions are held to begin with), `watched` (samples of what the data
    attack, watched beside the others), `further` (harmful prompts, token ids, that are asked before a run is said to
    lose refusals), `reads` (whether the answers to prompts, token ids, read as refusals, asked where first tokens do
    not begin one any more), `pool` (further refused samples, not held), `tighten` (where those or held ones flip, hold
    more directions), `calibration` (harmless samples; a fresh lora_A keeps its response to them in size when it is
    projected, and without adapters the learning rate is higher during the step), `monitor_steps` (ask the watched
    prompts every so many steps, 0 for never), `cosines` (then measure safety gradients, too), `new_tokens` (ids added
    to the vocabulary, whose embeddings may learn) and `correction_dtype` (of the product with V^T that takes the
    violation out of a full matrix; bfloat16, for training in bfloat16, leaves some thousandths of one step's violation,
    which the next step takes out).

    Raises:
        UnsupportedSetupError, UnsupportedModelError, CorrectionError: the rule could not act here.
    """
    return Attachment(probe, optimizer, rule or NullSpace(), **options)


class SafetyOptimizer(torch.optim.Optimizer):
    """Any torch optimizer with a step rule, for hand-written loops.

    It shares parameter groups and state with the optimizer it wraps, so schedulers, `state_dict` and
    gradient clipping work on either. Every step is verified; it raises if the rule did not act. `finish()` proves it of
    all matrices: call it after the last step, and before what you save in between.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probe: SafetyProbe, rule: Rule | None = None, **options: Any):
        """`options` as for `attach`."""
        self.optimizer = optimizer
        self.attachment = attach(probe, optimizer, rule, **options)
        said = kept_fixed(self.attachment)
        if self.attachment.lr_scale != 1:
            said.append(f"every step is made at {self.attachment.lr_scale:.2f} times the learning rate (rescale)")
        for line in said if is_first() else ():
            warnings.warn(f"spf: {line}", stacklevel=2)
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
        self.attachment.refresh()
        try:
            self.optimizer.step()
        finally:
            self.attachment.stepping.recover()
        self.attachment.verify()
        return loss

    def finish(self) -> str:
        """How many watched prompts are refused and were before, and in a second line what was proven."""
        proven = self.attachment.finish()
        self.attachment.monitor.look()
        return f"{watched_line(self.attachment.monitor)}\n{proven}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, so it loads into either."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

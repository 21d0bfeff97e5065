"""The optimizer's step hooks: outer and nested steps, groups, steps that failed, rates. Knows no rule."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from spf.errors import CorrectionError, UnsupportedSetupError
from spf.sharding import Sharding


class Stepping:
    """Calls `before` and `after` around every `step` of an optimizer, and `finish` when all groups had their turn.

    seconds: what the three took. `expect()` goes before every step; `expected` is true until it came. `first_call`: in
    `before`, whether no other group of this step had its turn yet.
    """

    def __init__(
        self,
        sharding: Sharding,
        unknown: dict[int, str],
        before: Callable[[set[str]], None],
        after: Callable[[set[str]], None],
        finish: Callable[[], None],
        adds_gradients: bool,
    ):
        """unknown: parameters that were frozen when the rule was put on, id to name.

        Raises:
            UnsupportedSetupError: the optimizer has a rule already.
        """
        self.sharding, self.optimizer = sharding, sharding.optimizer
        for hook in self.optimizer._optimizer_step_pre_hooks.values():
            if inspect.ismethod(hook) and isinstance(hook.__self__, Stepping):
                raise UnsupportedSetupError(
                    "the optimizer has a safety rule already (a second SafetyCallback, or a SafetyOptimizer that was "
                    "given to a trainer with a SafetyCallback); use one, or take the first off with remove()"
                )
        self.lr_scale = 1.0
        self.expected = False
        self.first_call = True
        self.seconds = 0.0
        self._unknown = unknown
        self._adds_gradients = adds_gradients
        self._calls = (before, after, finish)
        self._depth = self._unannounced = 0
        self._to_step: set[str] = set()
        self._groups: list[dict[str, Any]] = []
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off, and put rates back that a step which failed left changed."""
        self.recover()
        for handle in self._handles:
            handle.remove()

    def recover(self) -> None:
        """Put back what a step that raised an error between the hooks has left."""
        self._restore()
        self._depth, self._to_step = 0, set()

    def expect(self) -> None:
        """The next call of the optimizer's step is one of training."""
        self.expected = True

    def check(self) -> None:
        """
        Raises:
            CorrectionError: the step that was announced did not come, or steps came that were not announced.
        """
        if self.expected:
            raise CorrectionError(
                "spf: the optimizer stepped without calling its step hooks after refresh(), so the update was not "
                f"corrected; the hooks are on {type(self.optimizer).__name__}: is another optimizer in use?"
            )
        if self._unannounced:
            raise CorrectionError(
                f"spf: {self._unannounced} steps came without a refresh() before them, so no prompt was asked whether "
                "it flips, and nothing can be proven of them; call refresh() before every optimizer.step(), or use "
                "SafetyOptimizer, which does"
            )

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass whose step calls its parent's step fires the hooks twice; only the outer call counts.
        self._depth += 1
        if self._depth > 1:
            return
        start = time.perf_counter()
        self.first_call = not self._to_step
        if self.first_call:
            self._to_step = set(self.sharding.parts) - self.sharding.frozen
        self._refuse_unknown()
        self._refuse_scaled()
        with torch.no_grad():
            self._calls[0](self.sharding.stepped())
        self._scale()
        self.seconds += time.perf_counter() - start

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        start = time.perf_counter()
        self._restore()
        here = self.sharding.stepped()
        with torch.no_grad():
            self._calls[1](here)
        # DeepSpeed calls the optimizer once a group; a step is over when every group had its turn.
        self._to_step -= here
        if not self._to_step:
            # torch steps an optimizer at rate 0 to save what has no state under FSDP2: no step of training
            if self.expected:
                self._calls[2]()
            elif any(group["lr"] for group in self.optimizer.param_groups):
                self._unannounced += 1
            self.expected = False
        self.seconds += time.perf_counter() - start

    def _scale(self) -> None:
        """Raise the rates for the step; weight decay, which optimizers multiply by the rate, stays what it was."""
        if self.lr_scale == 1.0:
            return
        changed = ("lr", "weight_decay")
        self._groups = [{k: group[k] for k in changed if k in group} for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            if group["lr"]:  # Adafactor finds its own rate if it has none
                group["lr"] = group["lr"] * self.lr_scale
                if "weight_decay" in group:
                    group["weight_decay"] = group["weight_decay"] / self.lr_scale

    def _restore(self) -> None:
        for group, before in zip(self.optimizer.param_groups, self._groups, strict=bool(self._groups)):
            group.update(before)
        self._groups = []

    def _refuse_scaled(self) -> None:
        """A GradScaler leaves it to fused optimizers to unscale gradients within the step, after this hook."""
        if self._adds_gradients and vars(self.optimizer).get("grad_scale") is not None:
            raise UnsupportedSetupError(
                "a fused optimizer unscales float16 gradients itself, so the rule's safety gradients would be divided "
                "by the scale, too; call scaler.unscale_(optimizer) before the step, take an optimizer that is not "
                "fused, or bf16"
            )

    def _refuse_unknown(self) -> None:
        """A parameter that was frozen when the rule was put on, and is trained now, would go uncorrected."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self._unknown:
                    raise CorrectionError(
                        f"spf: {self._unknown[id(parameter)]} is trained, but was frozen when training began, so its "
                        "updates would not be corrected; leave trainable what will be trained at any time (LISA: all "
                        "layers) until the first step; it may be frozen and unfrozen from then on"
                    )

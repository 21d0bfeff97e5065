"""What a rule is: settings that a user chooses, and what they become when a run begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spf.config import Settings
from spf.matrices import find_matrices
from spf.subspace import SafetySubspace

if TYPE_CHECKING:
    from spf.data import Anchor
    from spf.matrices import Matrix
    from spf.run import Run

Gate = Literal["global", "matrix"]

RULES: dict[str, "type[Rule]"] = {}
"""Every rule by its name; a subclass of `Rule` that has a name is in it as soon as its module is imported."""


@dataclass(frozen=True)
class Given:
    """What a rule may be given besides its settings when a run begins.

    subspace: bases estimated before; resumed: they come from a checkpoint, whose weights answer to them already.
    reworded, conflicts: further samples to hold. pool: such as are not held, but asked whether they flip. calibration:
    harmless samples. correction_dtype: of the product that takes a violation out of a full matrix. new_tokens: ids that
    were added to the vocabulary and occur in no safety sample. tighten: hold more where prompts flip all the same.
    near_task: the model refuses much of the task itself, although it looks harmless to it.
    """

    subspace: SafetySubspace | None = None
    resumed: bool = False
    reworded: "Sequence[Anchor]" = ()
    conflicts: "Sequence[Anchor]" = ()
    pool: "Sequence[Anchor]" = ()
    calibration: "Sequence[Anchor]" = ()
    correction_dtype: torch.dtype = torch.float32
    new_tokens: Sequence[int] = ()
    tighten: bool = True
    near_task: bool = False


class Rule(Settings):
    """Settings of a rule: subclass it as a frozen dataclass with a `name`, and `prepare` it for a run.

    Every field is held to its annotation (types with ranges are in `spf.config`).

    adds_gradients: it adds safety gradients to those of the task. compares_all: it compares the gradients of all
    matrices at once. holds: it holds what a subspace of the inputs says, and keeps parameters that are no matrices.
    resumable: its state fits into a checkpoint.
    """

    name: ClassVar[str] = ""
    adds_gradients: bool = True
    compares_all: bool = False
    holds: bool = False
    resumable: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            RULES[cls.name] = cls
            cls.form = f"{cls.name}: {{}}"

    def corrects(self, matrices: "Mapping[str, Matrix]") -> "dict[str, Matrix]":
        """Those of the model's trainable matrices that the rule corrects.

        Raises:
            UnsupportedModelError: it cannot act on one of them.
        """
        return {name: matrix for name, matrix in matrices.items() if not matrix.frozen}

    def foresee(self, model: nn.Module) -> None:
        """What can be told of a model before it is asked anything, which takes minutes.

        Raises:
            UnsupportedModelError: the rule cannot act on it.
        """
        self.corrects(find_matrices(model)[0])

    def basis_samples(self, samples: int) -> int:
        """How many of so many safety samples, the first ones, are held; the others are left to measure on."""
        return 0

    def reworded_samples(self, samples: int) -> int:
        """How many of so many safety samples, the first ones, are held in other words, too."""
        return 0

    def wanted_samples(self) -> int | None:
        """How many safety samples are enough; None for all."""
        return None

    def prepare(self, run: "Run", given: Given) -> "Correction":
        """The rule at work on a run; called once, before the first step."""
        raise NotImplementedError


@dataclass
class Correction:
    """A rule at work: what it does around an optimizer step, what it proves, and what goes into a checkpoint.

    needs_probe: it wants the safety gradients before every step. multiplier, lr_scale, scale: numbers for the logs.
    subspace: what is held, if anything. learning_rows: whether rows of tokens added to the vocabulary learn.
    grows: whether it can hold more when prompts flip.
    """

    run: "Run"
    needs_probe: bool = True
    multiplier: float = 0.0
    lr_scale: float = 1.0
    scale: dict[str, float] = field(default_factory=dict)
    subspace: SafetySubspace = field(default_factory=SafetySubspace)
    learning_rows: bool = False
    grows: bool = False

    def between_steps(self) -> bool:
        """After one step and before the next; whether the model was asked anything."""
        return False

    def before_step(self, gradients: dict[str, Tensor], here: set[str]) -> None:
        """Before the optimizer's step; gradients by name, those it is about to use, changed in place.

        here: the parameters that this call of the optimizer steps (DeepSpeed makes one call a group).
        """

    def after_step(self, here: set[str]) -> None:
        """After the optimizer's step."""

    def finish_step(self) -> None:
        """When all groups of a step had their turn."""

    def check(self, final: bool) -> None:
        """Prove on the model's own parameters that the last step was corrected; with `final`, of every matrix.

        Raises:
            CorrectionError: it was not.
        """

    def check_here(self) -> None:
        """Look at what this process sees of the model, and ask no other one.

        Raises:
            CorrectionError: it is not what was held.
        """

    def proven(self) -> str:
        """What the checks have shown, in words."""
        return ""

    def whole_subspace(self) -> SafetySubspace:
        """The subspace as a file holds it: of all processes' rows. All of them have to call it."""
        return self.subspace

    def leave(self) -> None:
        """A run was broken off, and another with this model begins."""

    def put_back(self, directions: Mapping[str, int] | None) -> None:
        """After training, weights of a step were loaded at which matrices were held in so many directions; None: those
        of the last whole step are there."""

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint, as JSON."""
        return {"multiplier": self.multiplier, "lr_scale": self.lr_scale}

    def load_state(self, state: dict[str, Any]) -> None:
        self.multiplier, self.lr_scale = state["multiplier"], state["lr_scale"]


def rule_of(given: "str | Rule") -> Rule:
    """A rule, or the one of this name with its defaults.

    Raises:
        ValueError: there is none of this name.
        TypeError: it is neither.
    """
    if isinstance(given, str):
        if given not in RULES:
            raise ValueError(f"unknown rule {given!r}; choose one of {', '.join(RULES)}")
        return RULES[given]()
    if not isinstance(given, Rule):
        raise TypeError(f"rule must be a name or a rule object such as NullSpace(), not {given!r}")
    return given

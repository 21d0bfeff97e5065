"""Lisa: fine-tuning and alignment in turn, each held near the other's end point (Huang et al., arXiv 2405.18641)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spf.data import AnchorRotation, SafetyRow, collate
from spf.errors import SafetyDataError, UnsupportedSetupError
from spf.lab.baselines.one_shot import refusal_anchors, safety_loss
from spf.sharding import innermost_optimizer, refuse_sharded
from spf.text.generation import pad_id


class LisaCallback(TrainerCallback):
    """After every `finetune_steps` steps of a `Trainer`, `alignment_steps` steps on refusals with its optimizer.

    In both states the loss has the proximal term rho/2 ||w - w_s||^2 (with rho 0 it is the paper's BSO), w_s being the
    weights at the last switch, at first those at the beginning. Its gradient rho (w - w_s) is added to `.grad`
    in the optimizer's step hook, so after gradient clipping; alignment steps are clipped as the Trainer's are.
    They come on top of the Trainer's steps, at the learning rate of the step before them. Single process only.

    After training `losses` holds the safety loss (mean NLL of the refusal tokens, nats) before each alignment step.
    """

    def __init__(
        self,
        rows: Sequence[SafetyRow],
        *,
        finetune_steps: int = 900,
        alignment_steps: int = 100,
        rho: float = 1.0,
        batch_size: int = 8,
        seed: int = 0,
    ):
        """The defaults of steps and rho are those of the released scripts, for thousands of training steps.

        Args:
            rows: safety rows with refusals.
            finetune_steps, alignment_steps: optimizer steps in a row in each state.
            rho: strength of the proximal term.
            batch_size: refusals an alignment step, in turn.
            seed: order of the refusals.

        Raises:
            ValueError: fewer than one step in a state, or a negative rho.
            SafetyDataError: no rows.
        """
        if finetune_steps < 1 or alignment_steps < 1:
            raise ValueError(f"at least one step in each state, not {finetune_steps} and {alignment_steps}")
        if rho < 0:
            raise ValueError(f"rho must not be negative, and is {rho}")
        if not rows:
            raise SafetyDataError("Lisa needs refusals to align on, and got no rows")
        self.rows = list(rows)
        self.finetune_steps = finetune_steps
        self.alignment_steps = alignment_steps
        self.rho = rho
        self.batch_size = batch_size
        self.seed = seed
        self.losses: list[float] = []
        self._switch: dict[nn.Parameter, Tensor] = {}
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the proximal term on the optimizer.

        Raises:
            UnsupportedSetupError: several processes or devices, sharded parameters, fp16 loss scaling, a resumed run.
            SafetyDataError: no tokenizer, or a row that has no refusal or cannot be rendered.
        """
        model, tokenizer = kwargs["model"], kwargs["processing_class"]
        if args.world_size > 1 or args.n_gpu > 1:
            raise UnsupportedSetupError(
                f"LisaCallback runs on one process and one device only, not on {args.world_size} processes with "
                f"{args.n_gpu} GPUs each"
            )
        if args.fp16:
            raise UnsupportedSetupError("LisaCallback does not scale its loss, which fp16 needs; use bf16=True")
        if state.global_step > 0:
            raise UnsupportedSetupError(
                "LisaCallback cannot resume: a checkpoint does not hold the weights of the last switch"
            )
        refuse_sharded(model, "Lisa")
        optimizer = innermost_optimizer(kwargs["optimizer"])
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise SafetyDataError(
                "LisaCallback needs the tokenizer to render refusals; pass processing_class=tokenizer to Trainer"
            )
        anchors = refusal_anchors(self.rows, model, tokenizer)
        self._rotation = AnchorRotation(anchors, min(self.batch_size, len(anchors)), self.seed)
        self._pad = pad_id(tokenizer)
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._mark()
        self._remove()
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self.losses = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Align, where it is time; the Trainer clears the gradients that this leaves.

        At this event the scheduler has not moved on yet, to a rate of 0 after the last step.
        """
        if (state.global_step + 1) % self.finetune_steps:
            return
        model, optimizer = kwargs["model"], innermost_optimizer(kwargs["optimizer"])
        self._mark()
        with torch.enable_grad():
            for _ in range(self.alignment_steps):
                loss = safety_loss(model, collate(next(self._rotation), self._pad))
                gradients = torch.autograd.grad(loss, self._trainable, allow_unused=True)
                for parameter, gradient in zip(self._trainable, gradients, strict=True):
                    parameter.grad = gradient
                if args.max_grad_norm:
                    nn.utils.clip_grad_norm_(self._trainable, args.max_grad_norm)
                optimizer.step()
                self.losses.append(float(loss.detach()))
        self._mark()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()
        self._switch = {}

    def _mark(self) -> None:
        self._switch = {parameter: parameter.detach().clone() for parameter in self._trainable}

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for parameter, start in self._switch.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.rho)

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

"""SafetyCallback: Trainer events -> safety data, probe, step rule, logs, checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers.trainer
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from spf.data import (
    Anchor,
    SafetyDataError,
    SafetyRow,
    complete_refusals,
    load_safety_rows,
    packaged_prompts,
    reworded_anchors,
    tokenise,
)
from spf.errors import UnsupportedSetupError
from spf.files import write_json
from spf.optimizer import HELD_OUT, Attachment, basis_samples
from spf.probe import SafetyProbe
from spf.rules import RULES, NullSpace, Rule, SafeGrad
from spf.sharding import innermost_optimizer, object_of_rank_0
from spf.subspace import SafetySubspace
from spf.text.generation import context_length, pad_id

logger = logging.get_logger(__name__)

SUBSPACE_FILE = "spf_subspace.safetensors"
STATE_FILE = "spf_state.json"

CALIBRATION_PROMPTS = 32
"""Packaged benign prompts on which a fresh lora_A keeps the size of its response."""

_ACTIVE: "WeakKeyDictionary[nn.Module, ref[SafetyCallback]]" = WeakKeyDictionary()


class SafetyCallback(TrainerCallback):
    """Keeps an aligned model's refusals while a `Trainer`, `SFTTrainer` or `DPOTrainer` fine-tunes it.

    When training begins it loads the safety data, lets the model answer prompts that have no refusal,
    and puts the rule on the optimizer's step hooks. After the first step it checks the model's own
    parameters and raises `CorrectionError` if the rule did not reach them. Its `spf/...` metrics go
    through the Trainer's logs; its state goes into every checkpoint.
    """

    def __init__(
        self,
        safety_data: str | Path | Dataset | None = None,
        rule: str | Rule = "null-space",
        *,
        anchors: int | None = None,
        anchors_per_step: int = 4,
        first_tokens: int = 0,
        first_weight: float = 1.0,
        monitor_steps: int = 10,
        seed: int = 0,
    ):
        """Only `safety_data` is usually given, if anything.

        Args:
            safety_data: JSONL or CSV file, `Dataset`, or hub id (see `load_safety_rows`); None takes the
                packaged harmful prompts, answered by the model's own refusals.
            rule: null-space, spf, rank1, mix, safegrad, aggregate, dual-ascent or constrained, or a rule object with
                its settings.
            anchors: use only so many safety samples; 1 is the paper's single fixed sample. By default
                all of them, or as many as the null space is taken from.
            anchors_per_step: safety samples a probe, in turn (gradient rules and the monitor).
            first_tokens, first_weight: weigh the first tokens of every refusal by `first_weight`.
            monitor_steps: with the null-space rule, measure safety loss and conflict every so many
                steps (0: never; gradient rules measure them at every step).
            seed: choice and order of the anchors.

        Raises:
            ValueError: an unknown rule, or an argument out of its range.
            TypeError: safety_data or rule is of another kind.
        """
        if isinstance(rule, str):
            if rule not in RULES:
                raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
            rule = RULES[rule]()
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a name or a rule object such as NullSpace(), not {rule!r}")
        if not isinstance(safety_data, str | Path | Dataset | None):
            kind = type(safety_data).__name__
            raise TypeError(f"safety_data must be a file, a hub id or a datasets.Dataset (one split), not {kind}")
        for name, value, least in (
            ("anchors", anchors, 1),
            ("anchors_per_step", anchors_per_step, 1),
            ("first_tokens", first_tokens, 0),
            ("monitor_steps", monitor_steps, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if not first_weight > 0:
            raise ValueError(f"first_weight must be positive, not {first_weight}")
        self.safety_data = safety_data
        self.rule: Rule = rule
        self.anchors = anchors
        self.anchors_per_step = anchors_per_step
        self.first_tokens = first_tokens
        self.first_weight = first_weight
        self.monitor_steps = monitor_steps
        self.seed = seed
        self.attachment: Attachment | None = None
        self._rows: list[SafetyRow] = []
        self._verified = False
        self._warned = False
        # Trainer puts a caller's callbacks behind the reporting ones, too late to add to what those
        # report; default callbacks come first.
        if _LogRelay not in transformers.trainer.DEFAULT_CALLBACKS:
            transformers.trainer.DEFAULT_CALLBACKS.append(_LogRelay)  # type: ignore[arg-type]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer, processing_class = kwargs["model"], kwargs["optimizer"], kwargs["processing_class"]
        self._detach()
        innermost_optimizer(optimizer)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise SafetyDataError(
                "SafetyCallback needs the tokenizer to render safety data; pass processing_class=tokenizer to Trainer"
            )
        if args.fp16 and not (isinstance(self.rule, NullSpace) and self.rule.feedback is None):
            raise UnsupportedSetupError(
                f"the rule {self.rule.name} adds safety gradients to scaled float16 gradients, where they may "
                "vanish; use bf16, or null-space without feedback"
            )
        subspace, saved = None, None
        if state.global_step > 0:
            if isinstance(self.rule, SafeGrad):
                raise UnsupportedSetupError(
                    "safegrad cannot go on from a checkpoint: the aligned model's predictions are not saved in it"
                )
            saved, subspace = self._read(_resumed_from(args, state))
            self._rows = [SafetyRow(**row) for row in saved["rows"]]
        else:
            self._rows = self._choose(model, processing_class)
        limit = context_length(model, processing_class)
        probe = SafetyProbe(
            model,
            tokenise(self._rows, processing_class, limit),
            anchors_per_step=self.anchors_per_step,
            pad_token_id=pad_id(processing_class),
            seed=self.seed,
            first_tokens=self.first_tokens,
            first_weight=self.first_weight,
        )
        self.attachment = Attachment(
            probe,
            optimizer,
            self.rule,
            subspace=subspace,
            reworded=self._reworded(processing_class, limit) if saved is None else (),
            calibration=tokenise(_benign_rows(), processing_class, limit) if self._constrains and saved is None else (),
            monitor_steps=self.monitor_steps if isinstance(self.rule, NullSpace) else 0,
            correction_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
        if saved is not None:
            self.attachment.load_state_dict(saved)
            self.attachment.check_resumed()
        self._verified = self._warned = False
        _ACTIVE[model] = ref(self)
        if not state.is_world_process_zero:
            return
        count = len(self._rows)
        if isinstance(self.rule, NullSpace) and self.monitor_steps and basis_samples(self.rule, count) == count:
            logger.warning(
                f"spf: all {count} safety samples are held, so spf/safety_loss stays flat whatever leaks; with 9 or "
                "more, one is kept apart to measure on"
            )
        rate = f"; learning rate x {self.attachment.lr_scale:.2f}" if self.attachment.lr_scale != 1 else ""
        held = f", {len(probe.others)} other parameters kept fixed" if probe.others and self._constrains else ""
        logger.warning(
            f"spf: rule {self.rule.name} on {len(self.attachment.matrices)} matrices{held}; {count} safety samples; "
            f"safety loss {self.attachment.reference_loss:.3f}{rate}; set-up {self.attachment.seconds['setup']:.1f} s"
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.refresh()
        if self._running.leaks and not self._warned:
            self._warned = True
            self._tell(state, f"after step {state.global_step} ")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:
            return  # float16 overflowed, nothing was updated
        if not self._verified:
            self._running.verify()
            self._verified = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the metrics, once: `_LogRelay` calls this before the reporting callbacks run."""
        logs = kwargs["logs"]
        if self.attachment is None or "loss" not in logs or "spf/skipped" in logs:
            return
        metrics = self.attachment.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        subspace = self._running.whole_subspace()
        if not state.is_world_process_zero:
            return
        directory = _checkpoint(args, state)
        subspace.save(directory / SUBSPACE_FILE)
        saved = self._running.state_dict() | {"rows": [asdict(row) for row in self._rows]}
        write_json(directory / STATE_FILE, saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        running = self._running
        running.measure()
        self._tell(state, f"{running.corrected} of {running.steps} updates corrected; ")
        self._detach()

    def _tell(self, state: TrainerState, what: str) -> None:
        """One line on the safety loss, and advice if it has risen."""
        if not state.is_world_process_zero:
            return
        running = self._running
        line = f"spf: {what}safety loss {running.reference_loss:.3f} before training, now {running.safety_loss:.3f}"
        if running.leaks:
            remedies = ", fewer steps or a higher rank" if self._constrains else " or fewer steps"
            line += f". Refusals are being lost: check with `spf eval`; a lower learning rate{remedies} keeps more"
        logger.warning(line)

    @property
    def _running(self) -> Attachment:
        assert self.attachment is not None, "training has not begun"
        return self.attachment

    @property
    def _constrains(self) -> bool:
        return isinstance(self.rule, NullSpace)

    def _choose(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[SafetyRow]:
        rows = load_safety_rows(self.safety_data)
        wanted = self.anchors
        if wanted is None and isinstance(self.rule, NullSpace):
            # some more than the null space is taken from, to measure on
            wanted = round(self.rule.prompts / (1 - HELD_OUT))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        # every process takes part in generating, but rounding must not make them keep different rows
        return object_of_rank_0(complete_refusals([rows[i] for i in order], model, tokenizer, wanted=wanted))

    def _reworded(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Anchor]:
        if not isinstance(self.rule, NullSpace):
            return []
        # never those that are kept out of the basis
        rows = self._rows[: min(self.rule.reworded, basis_samples(self.rule, len(self._rows)))]
        return reworded_anchors(rows, tokenizer, limit)

    def _read(self, directory: Path) -> tuple[dict[str, Any], SafetySubspace]:
        for name in (STATE_FILE, SUBSPACE_FILE):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory / name} is missing, so the run cannot go on; was it made without SafetyCallback? "
                    "A checkpoint outside output_dir has to be named in TrainingArguments(resume_from_checkpoint=...)"
                )
        return json.loads((directory / STATE_FILE).read_text("utf-8")), SafetySubspace.load(directory / SUBSPACE_FILE)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()
            _ACTIVE.pop(self.attachment.probe.model, None)


def _benign_rows() -> list[SafetyRow]:
    prompts = packaged_prompts("benign_anchors")[:CALIBRATION_PROMPTS]
    return [SafetyRow([{"role": "user", "content": p}], "", f"benign_anchors:{i}") for i, p in enumerate(prompts, 1)]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    # Trainer.train does not tell callbacks the directory it was given
    named = args.resume_from_checkpoint
    if isinstance(named, str) and (Path(named) / STATE_FILE).is_file():
        return Path(named)
    return _checkpoint(args, state)


class _LogRelay(TrainerCallback):
    """Runs the active SafetyCallback's on_log before the reporting callbacks."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        running = _ACTIVE.get(kwargs["model"])
        safety = running() if running else None
        if safety is not None:
            safety.on_log(args, state, control, logs=kwargs["logs"])

"""SafetyCallback: Trainer events -> safety data, probe, step rule, logs, checkpoints."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from spf.answering import refuse_unanswering
from spf.beginning import begin, foresee, refuse_unfit
from spf.card import ModelCard
from spf.checkpoint import (
    Saved,
    best_directions,
    checkpoint_directory,
    named_checkpoint,
    read_checkpoint,
    resumed_from,
    write_checkpoint,
)
from spf.config import CallbackSettings, Conflicts, OnLeak
from spf.conflicts import Audit
from spf.errors import UnsupportedSetupError
from spf.going_on import leave, refuse_reloaded, remember
from spf.keep import Keep
from spf.monitor import figures, watched_line
from spf.optimizer import Attachment
from spf.rules import Rule, rule_of
from spf.safety_samples import SafetySamples
from spf.sharding import innermost_optimizer, is_first, object_of_rank_0
from spf.trainers import (
    around,
    calling_trainer,
    refuse_without_engine,
    run_directory,
    stand_before_reports,
    tokenizer_of,
)
from spf.training_data import TrainingData

logger = logging.get_logger(__name__)


class SafetyCallback(TrainerCallback):
    """Keeps an aligned model's refusals while a `Trainer`, or one of TRL's, fine-tunes it.

    When training begins it loads the safety data, lets the model answer prompts that have no refusal,
    and puts the rule on the optimizer's step hooks. After the first step it checks the model's own
    parameters and raises `CorrectionError` if the rule did not reach them; again at every save and at the end. Its
    `spf/...` metrics go through the Trainer's logs; its state goes into every checkpoint.
    """

    def __init__(
        self,
        safety_data: str | Path | Dataset | None = None,
        rule: str | Rule = "null-space",
        *,
        keep: str | Path | Dataset | None = None,
        anchors: int | None = None,
        anchors_per_step: int = 4,
        first_tokens: int = 0,
        first_weight: float = 1.0,
        monitor_steps: int = 10,
        cosines: bool = False,
        conflicts: Conflicts = "hold",
        audited: str | Path | None = None,
        on_leak: OnLeak = "tighten",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        subspace: str | Path | None = None,
        seed: int = 0,
    ):
        """Only `safety_data` is usually given, if anything.

        Args:
            safety_data: JSONL or CSV file, `Dataset`, or hub id (see `load_safety_rows`); None takes the
                packaged harmful prompts (416 requests in 28 forms), answered by the model's own refusals.
            rule: null-space, spf, rank1, mix, safegrad, aggregate, dual-ascent or constrained, or a rule object with
                its settings.
            keep: any other prompts (style, tools, a language, knowledge), as `safety_data`: what the model answers, or
                what the data have as the last message or completion, is held, too. With the null-space rule only.
            anchors: use only so many safety samples; 1 is the paper's single fixed sample. By default
                all of them (of the packaged ones 156), or as many as the null space is taken from.
            anchors_per_step: safety samples a probe, in turn (gradient rules and the monitor).
            first_tokens, first_weight: weigh the first tokens of every refusal by `first_weight`.
            monitor_steps: ask watched prompts, which are not held, for their first token every so many steps (0: at the
                end only); `spf/refusal_rate` is the share still refused.
            cosines: with the null-space rule, measure the cosine of utility and safety gradient then, too, which takes
                a backward pass (gradient rules measure it at every step).
            conflicts: what to do about training rows that answer prompts which the aligned model refuses: hold (their
                prompts are held with the model's own refusals, and the rows left out of training where they can be,
                unless they look harmless to the model itself), hold-all (all of them), drop (a run where they cannot
                be left out is refused), allow (nothing; for data that lift refusals on purpose), or error.
            audited: the directory of an audit of the same data by the same model (`spf audit`), which is taken instead
                of asking, so that rows are left out under FSDP2 and DeepSpeed, too.
            on_leak: when refusals are being lost: tighten (as soon as prompts flip, null-space holds more
                directions), stop (the same, and the run is ended if refusals are lost all the same) or warn only.
            chat_template_kwargs: variables of the chat template; `enable_thinking` and `thinking` are False by default.
            subspace: the directory of an adapter that spf trained, to go on with it: what it is held to is read there.
            seed: choice and order of the anchors.

        Raises:
            ValueError: an unknown rule, or an argument of another type or out of its range.
            TypeError, SafetyDataError: safety_data, keep or rule is of another kind, or there is a mistake in a file.
        """
        self.rule = rule_of(rule)
        self.settings = CallbackSettings(
            anchors=anchors,
            anchors_per_step=anchors_per_step,
            first_tokens=first_tokens,
            first_weight=first_weight,
            monitor_steps=monitor_steps,
            cosines=cosines,
            conflicts=conflicts,
            audited=str(audited) if isinstance(audited, Path) else audited,
            on_leak=on_leak,
            chat_template_kwargs=chat_template_kwargs,
            subspace=str(subspace) if isinstance(subspace, Path) else subspace,
            seed=seed,
        )
        self.samples = SafetySamples(safety_data, self.rule, anchors, seed, chat_template_kwargs)
        self.keep = Keep(keep, self.rule, seed, chat_template_kwargs)
        self.card = ModelCard()
        self.data = TrainingData(conflicts, self.rule.holds, chat_template_kwargs, self.settings.audited)
        self.attachment: Attachment | None = None
        self.warned = False
        """Whether the run has said, at any of its steps, that refusals are being lost."""
        self._resume: str | bool | None = None
        self._saved: Saved | None = None
        self._written: Path | None = None
        """The last checkpoint that has its state."""

    @property
    def audit(self) -> Audit | None:
        """What the training data attack; None before the audit."""
        return self.data.found

    @property
    def stopped(self) -> bool:
        """Whether that ended the run, or was to: its last steps are seen when it has ended (`on_leak="stop"`)."""
        return self.warned and self.settings.on_leak == "stop"

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the trainer's `train` take the rule off however it ends, and a saved adapter say what it is held to."""
        trainer = calling_trainer()
        if trainer is not None:
            self.card.follow(trainer)
            around(trainer, self._begin, self._end, lambda: _verify(self, trainer), functools.partial(_left, self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer, tokenizer = kwargs["model"], kwargs["optimizer"], tokenizer_of(kwargs["processing_class"])
        refuse_unanswering(model)
        if self.attachment is not None:
            self.attachment.leave()
        self._detach()
        if (trainer := calling_trainer()) is not None:
            refuse_without_engine(trainer)
            stand_before_reports(self, trainer, SafetyCallback)
        innermost_optimizer(optimizer)
        goes_on = state.global_step > 0
        refuse_unfit(self.rule, args, goes_on)
        self._saved = read_checkpoint(resumed_from(args, state, self._resume)) if goes_on else None
        begun = begin(self, self._saved, args, model, optimizer, tokenizer, kwargs["train_dataloader"])
        self.warned, self._written = False, None
        if is_first():
            self.card.begin(begun.lines, Path(str(args.output_dir)))
            for line in [*begun.places, *begun.lines]:
                logger.warning(f"spf: {line}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:
            self._running.skip()  # float16 overflowed, nothing was updated
            return
        # before a checkpoint is written, not only after
        self._running.verify(final=control.should_save)
        control.should_training_stop |= _heed(self, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # another callback may have ended it between the batches of one step, which does not come then
        self._running.skip()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the metrics; this callback stands before the reporting ones."""
        logs = kwargs["logs"]
        if self.attachment is None or "loss" not in logs:
            return
        metrics = self.attachment.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.verify(final=True)  # once more: another callback may have put other weights in
        directory = checkpoint_directory(run_directory(args, calling_trainer()), state)
        if self._written != directory:  # added after the trainer was made, or a library wrote it elsewhere and moved it
            _write(self, directory)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        running = self._running
        running.correction.put_back(object_of_rank_0(best_directions(args, state)))
        proof = f"{running.corrected} of {running.steps} updates corrected; {running.finish()}"
        running.monitor.look()
        self.card.finish(args, self.rule, self._tell("", "", proof), proof, figures(running.monitor))
        remember(running)
        self._detach()

    def _begin(self, trainer: Any, resume: str | bool | None) -> None:
        """Before the Trainer reads its data."""
        self._resume = resume
        # it may have been taken off the trainer
        if self in trainer.callback_handler.callbacks:
            refuse_reloaded(trainer.model, bool(resume), trainer.args.load_best_model_at_end)
            foresee(self.rule, trainer)
            self.data.prepare(trainer, named_checkpoint(trainer.args, resume), self.samples)

    def _end(self, trainer: Any) -> None:
        """However the training has ended."""
        self._detach()
        self.data.restore(trainer)

    def _tell(self, when: str, end: str, *more: str) -> str:
        line = watched_line(self._running.monitor, when, end)
        self.warned |= self._running.monitor.leaks
        for said in (line, *more) if is_first() else ():
            logger.warning(f"spf: {said}")
        return line

    @property
    def _running(self) -> Attachment:
        return _begun(self.attachment)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()


def _begun(attachment: Attachment | None) -> Attachment:
    if attachment is None:
        raise UnsupportedSetupError(
            "SafetyCallback was added to a trainer that was training by then, so nothing was held from its first step "
            "on; give it to the trainer's constructor, callbacks=[...]"
        )
    return attachment


def _heed(callback: SafetyCallback, step: int) -> bool:
    """Say once that refusals are being lost; whether the run is to end because of that."""
    if not callback._running.monitor.leaks or callback.warned:
        return False
    callback._tell(f" after step {step}", "; the run is ended (on_leak)" * (callback.settings.on_leak == "stop"))
    return callback.stopped


def _write(callback: SafetyCallback, directory: Path) -> None:
    """Write into a checkpoint's directory what the run goes on with. All processes call it."""
    running = callback._running
    subspace = running.whole_subspace()
    callback._written = directory
    if is_first():
        state = running.state_dict() | callback.data.entries() | {"kept": callback.keep.entry}
        callback._saved = write_checkpoint(directory, state, callback.samples.rows, subspace, callback._saved)


def _left(callback: SafetyCallback, trainer: Any, place: Path, checkpoint: bool) -> None:
    """A model was written there; the callback may have been taken off the trainer."""
    if checkpoint:
        if callback in trainer.callback_handler.callbacks:
            _write(callback, place)
        return
    for said in leave(callback.attachment, trainer.model, place, is_first()):
        logger.warning(f"spf: {said}")


def _verify(callback: SafetyCallback, trainer: Any) -> None:
    """Before a checkpoint's model is written; the callback may have been taken off the trainer."""
    if callback in trainer.callback_handler.callbacks:
        _begun(callback.attachment).verify(final=True)

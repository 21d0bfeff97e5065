"""The Trainer around a callback: which it is, and the callback's place in it."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from spf.errors import SafetyDataError, UnsupportedSetupError
from spf.text.chat import text_tokenizer


def stand_before_reports(callback: TrainerCallback, trainer: Trainer, kind: type[TrainerCallback]) -> None:
    """Put the callback before the reporting ones, so that they report its metrics, too.

    Raises:
        UnsupportedSetupError: another one of this kind is in the run.
    """
    callbacks = trainer.callback_handler.callbacks
    if sum(isinstance(other, kind) for other in callbacks) > 1:
        raise UnsupportedSetupError(f"two {kind.__name__}s are in one run; give the trainer one of them")
    flow = [i for i, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    callbacks.remove(callback)
    callbacks.insert(flow[0] + 1 if flow else 0, callback)


def refuse_without_engine(trainer: Trainer) -> None:
    """
    Raises:
        UnsupportedSetupError: transformers trains with DeepSpeed, whose engine is gone.
    """
    if trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_engine_wrapped is None:
        raise UnsupportedSetupError(
            "under DeepSpeed a Trainer trains once: transformers makes no engine for a second train(), nor for one "
            "after evaluate() or predict(); make a new Trainer with this model and a new SafetyCallback"
        )


def tokenizer_of(given: Any) -> PreTrainedTokenizerBase:
    """A Trainer's `processing_class`, or the tokenizer in it if it is a processor of text and images.

    Raises:
        SafetyDataError: it is no tokenizer.
    """
    tokenizer = text_tokenizer(given)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SafetyDataError(
            "SafetyCallback needs the tokenizer to render safety data; pass processing_class=tokenizer to Trainer"
        )
    return tokenizer


def around(
    trainer: Trainer,
    begin: Callable[[Trainer, str | bool | None], None],
    end: Callable[[Trainer], None],
    saves: Callable[[], None],
    saved: Callable[[Trainer, Path, bool], None],
) -> None:
    """Have `train` call `begin` with what it goes on from, and `end` however it ends: an error calls no event.

    saves: called before a checkpoint's model is written. saved: called with its directory, and whether it is a
    checkpoint's, when `save_model` has written a model.
    """
    train, save = trainer.train, trainer.save_model

    @functools.wraps(train)
    def guarded(resume_from_checkpoint: str | bool | None = None, *more: Any, **others: Any) -> Any:
        try:
            begin(trainer, resume_from_checkpoint)
            return train(resume_from_checkpoint, *more, **others)
        finally:
            end(trainer)

    @functools.wraps(save)
    def saving(output_dir: str | None = None, _internal_call: bool = False) -> None:
        # without a directory it is `push_to_hub`'s
        checkpoint = _internal_call and trainer.is_in_train and output_dir is not None
        if checkpoint:
            saves()
        with nullcontext() if checkpoint else whole_model(trainer):
            save(output_dir, _internal_call)
        # before it is pushed to the hub, and before earlier checkpoints are removed
        saved(trainer, Path(str(output_dir or trainer.args.output_dir)), checkpoint)

    trainer.train, trainer.save_model = guarded, saving  # type: ignore[method-assign]


def own_choice(trainer: Trainer) -> str:
    """The method by which a trainer chooses its rows that is neither transformers' nor TRL's; "" if it has none."""
    for name in ("_get_train_sampler", "get_train_dataloader"):
        method = getattr(trainer, name)
        if method.__module__.partition(".")[0] not in ("transformers", "trl"):
            return name
    return ""


@contextmanager
def whole_model(trainer: Trainer) -> Iterator[None]:
    """Have `save_model` write a model under FSDP2, too, where it writes none while checkpoints are sharded."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)


def run_directory(args: TrainingArguments, trainer: Trainer | None) -> Path:
    """Where a run's checkpoints are: every trial of a hyperparameter search has a directory of its own."""
    if trainer is None or not trainer.state.is_hyper_param_search:
        return Path(str(args.output_dir))
    # transformers 5: the only place that knows how every backend names its trials
    return Path(trainer._get_output_dir(trainer._trial))


def calling_trainer() -> Trainer | None:
    """The Trainer whose event this is. Events do not say; it is the innermost Trainer among the callers."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
    return None

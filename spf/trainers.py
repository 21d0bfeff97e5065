"""The Trainer around a callback: which it is, and the callback's place in it."""

import sys
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
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


def calling_trainer() -> Trainer | None:
    """The Trainer whose event this is. Events do not say; it is the innermost Trainer among the callers."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
    return None

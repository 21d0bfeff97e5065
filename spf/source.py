"""Whose data were audited: the data set, the trainer and its model, and what the rows hold."""

import weakref
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import Trainer

from spf.checkpoint import LeftOut
from spf.errors import SafetyDataError
from spf.leaving_out import content_of_all

CHANGED = (
    "the run that goes on was trained on other rows than these (a chat template with today's date in it renders the "
    "same ones otherwise), and what they attack was not audited"
)

UNCOMPARED = (
    "only rows of a datasets.Dataset can be compared with those that the run was trained on: if these are others, what "
    "they attack was not audited"
)


class Source:
    """A data set that something was found in, for a model as it was before training wrapped it."""

    def __init__(self, data: Any = None):
        self.data = data
        self._refs: tuple[Callable[[], Any], Callable[[], Any]] | None = None
        self.content = ""
        """A hash of all rows, once they were compared; nothing of what is no `Dataset`."""
        self.changed = ""
        """That a run that goes on had other rows, or may have had, of which nobody knows what they attack."""

    def is_of(self, data: Any, trainer: Trainer | None) -> bool:
        """Whether these are the data, and this is the same trainer, or another one of that model; none says nothing."""
        if trainer is None or self._refs is None:
            return data is self.data
        its, model = (ref() for ref in self._refs)
        return data is self.data and (its is trainer or model is trainer.model)

    def serve(self, trainer: Trainer | None) -> None:
        """Take a trainer for the one that this is of."""
        # once training has wrapped it, the model may be another object
        if trainer is not None and (self._refs is None or self._refs[0]() is not trainer):
            self._refs = weakref.ref(trainer), weakref.ref(trainer.model)

    def compare(self, rows: Any, was: LeftOut | None, strict: bool) -> None:
        """Hash the rows (a minute for a million long ones), and note whether the run that goes on had others.

        rows: None where it does not matter.

        Raises:
            SafetyDataError: it had, or nobody can tell, and it is strict.
        """
        self.content = self.content or (content_of_all(rows) if isinstance(rows, Dataset) else "")
        self.changed, remedy = "", "give the same data set to go on, or start a new run"
        if was is None or rows is None:
            return
        if not was.data or not self.content:
            self.changed, remedy = UNCOMPARED, "start a new run, with a Dataset if it is to go on from a checkpoint"
        elif was.data != self.content:
            self.changed = CHANGED
        if self.changed and strict:
            raise SafetyDataError(f"{self.changed}; {remedy}")

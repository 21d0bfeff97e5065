"""Whose data were audited: the data set, the trainer and its model, and what the rows hold."""

import weakref
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import Trainer

from spf.checkpoint import LeftOut
from spf.errors import SafetyDataError
from spf.leaving_out import content_of_all


class Source:
    """A data set that something was found in, for a model as it was before training wrapped it."""

    def __init__(self, data: Any = None):
        self.data = data
        self._refs: tuple[Callable[[], Any], Callable[[], Any]] | None = None
        self._content = ""

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

    def content(self, rows: Any) -> str:
        """A hash of all rows, the first time that it is needed; nothing of what is no `Dataset`."""
        if isinstance(rows, Dataset):
            self._content = self._content or content_of_all(rows)
        return self._content

    def refuse_others(self, rows: Any, was: LeftOut | None) -> None:
        """
        Raises:
            SafetyDataError: the run that goes on had other rows.
        """
        if was is not None and was.data and was.data != self.content(rows):
            raise SafetyDataError(
                "the run that goes on was trained on other rows than these, and what they attack was not audited; give "
                "the same data set to go on, or start a new run"
            )

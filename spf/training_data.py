"""A run's training data: what they attack, and what is done about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import IterableDatasetShard

from spf.audit import LIST_FILE, Audit, anchor_entries, anchors_again, audit_data
from spf.config import Conflicts
from spf.data import Anchor, SafetyDataError, SafetyRow
from spf.errors import UnsupportedSetupError
from spf.text.generation import context_length


class TrainingData:
    """Audits each data set once; says which conflicts are held and which are watched."""

    def __init__(self, conflicts: Conflicts, holds: bool, options: Mapping[str, Any] | None):
        """holds: whether the rule holds samples. options: variables of the chat template."""
        self.conflicts: Conflicts = conflicts
        self.holds = holds
        self.options = options
        self.found: Audit | None = None
        self._audited: Any = None
        self.held: list[Anchor] = []
        self.watched: list[Anchor] = []

    def turn_to(self, source: Any) -> None:
        """Forget what was found in another data set; a callback may serve one trainer after another."""
        if self._audited is not source:
            self.found = self._audited = None

    def audit(
        self,
        dataset: Any,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[SafetyRow],
        directory: Path,
        source: Any,
    ) -> Audit:
        """Find the conflicts of what a loader reads of `source`; `directory` gets the list.

        Raises:
            SafetyDataError: there are some, and `conflicts` is error.
        """
        limit = context_length(model, tokenizer)
        found = audit_data(
            dataset,
            model,
            tokenizer,
            rows,
            max_length=limit,
            options=self.options,
            directory=directory,
            tell_apart=self.conflicts in ("drop", "error") or (self.holds and self.conflicts == "hold"),
        )
        if found.conflicts and self.conflicts == "error":
            raise SafetyDataError(
                f"{found.counts()}; they are listed in {directory / LIST_FILE}: conflicts='hold' keeps these refusals, "
                "'drop' leaves the rows out, 'allow' lets them be unlearned"
            )
        self.found, self._audited = found, source
        return found

    def drop(
        self,
        trainer: Trainer,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[SafetyRow],
    ) -> None:
        """Leave the rows with conflicts out; the Trainer reads its data when it begins to train, before any event."""
        dataset: Any = trainer.train_dataset
        found = self.audit(dataset, model, tokenizer, rows, Path(str(trainer.args.output_dir)), dataset)
        trainer.train_dataset = self._audited = found.without(dataset)

    def split(
        self, loader: Any, tokenizer: PreTrainedTokenizerBase, saved: Mapping[str, Any] | None
    ) -> tuple[list[Anchor], list[Anchor]]:
        """Conflicts that are held, and those that are watched; of a run that goes on the same.

        saved: what `entries` gave for the checkpoint that the run goes on from.
        """
        self.held, self.watched = [], []
        if self.holds and self.conflicts != "allow":
            if self.found is not None:
                self.held, self.watched = self.found.split()
            elif saved is not None:
                data = data_of(loader)
                self.held, self.watched = (
                    anchors_again(saved[kind], data, tokenizer, self.options) for kind in ("held", "watched")
                )
        return self.held, self.watched

    def entries(self) -> dict[str, list[dict[str, Any]]]:
        """The held and the watched conflicts for a checkpoint, without their text."""
        return {"held": anchor_entries(self.held), "watched": anchor_entries(self.watched)}


def refuse_to_drop(trainer: Trainer) -> None:
    """
    Raises:
        UnsupportedSetupError: the data, or the launcher, do not allow rows to be left out.
    """
    if not isinstance(trainer.train_dataset, Dataset) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UnsupportedSetupError(
            "conflicts='drop' needs a datasets.Dataset, and one process or DDP; write the data without conflicts "
            "by `spf audit DATA --model MODEL --clean FILE` and train on that"
        )


def source_of(trainer: Trainer | None, loader: Any) -> Any:
    """The object that stands for a training's data: the same in a trainer's second training."""
    return data_of(loader) if trainer is None else trainer.train_dataset


def data_of(loader: Any) -> Any:
    """The data set that a Trainer's loader reads; of a stream, what its processes share."""
    dataset = loader.dataset
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset

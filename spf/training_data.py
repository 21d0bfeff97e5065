"""A run's training data: what they attack, and what is done about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import IterableDatasetShard

from spf.answering import refuse_unanswering
from spf.audit import LIST_FILE, audit_data
from spf.checkpoint import LeftOut, read_left_out
from spf.config import Conflicts
from spf.conflicts import Audit, anchor_entries, anchors_again, without
from spf.data import Anchor, SafetyDataError, SafetyRow
from spf.errors import UnsupportedSetupError
from spf.safety_samples import SafetySamples
from spf.text.generation import context_length
from spf.trainers import tokenizer_of

CLEAN = "`spf audit DATA --model MODEL --clean FILE` writes the data without them"
LATE = "the callback came when the trainer was made already"


class TrainingData:
    """Audits each data set once; says which conflicts are held and which are watched, and leaves their rows out.

    settled: whether it is known what this data set attacks. left_out: its rows that are not trained on. obstacle: why
    rows with conflicts are trained on all the same; nothing where they need not be.
    """

    def __init__(self, conflicts: Conflicts, holds: bool, options: Mapping[str, Any] | None):
        """holds: whether the rule holds samples. options: variables of the chat template."""
        self.conflicts: Conflicts = conflicts
        self.holds = holds
        self.options = options
        self.found: Audit | None = None
        self._source: Any = None
        self.settled = False
        self._whole: Dataset | None = None
        self.left_out: list[int] = []
        self.obstacle = LATE
        self.held: list[Anchor] = []
        self.watched: list[Anchor] = []

    def turn_to(self, source: Any) -> None:
        """Forget what was found in another data set; a callback may serve one trainer after another."""
        if self._source is not source:
            self._source, self.found, self._whole = source, None, None
            self.settled, self.left_out, self.obstacle = False, [], LATE

    def audit(
        self,
        dataset: Any,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[SafetyRow],
        directory: Path,
    ) -> Audit:
        """Find the conflicts of what is read of the data that were turned to; `directory` gets the list.

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
        self.found, self.settled = found, True
        return found

    @property
    def leaves_out(self) -> bool:
        """Whether rows with conflicts are not to be trained on."""
        return self.conflicts == "drop" or (self.holds and self.conflicts in ("hold", "hold-all"))

    def prepare(self, trainer: Trainer, checkpoint: Path | None, samples: SafetySamples) -> None:
        """Audit the trainer's data, and leave rows out where that is possible: no event comes before it reads them.

        Left out are rows that teach nothing else; with `drop`, all that have a conflict. Of a run that goes on from a
        checkpoint, the same as before.

        Raises:
            UnsupportedSetupError: rows cannot be left out, and `conflicts` is drop.
            SafetyDataError: no row is left, or the data are not those of the checkpoint.
        """
        self.turn_to(trainer.train_dataset)
        if not self.leaves_out or self.settled:
            return
        was = read_left_out(checkpoint) if checkpoint is not None else None
        self.obstacle = "" if was is not None else self._obstacle(trainer)
        if was is not None:
            self._leave_out_again(trainer, was)
        elif not self.obstacle:
            model: Any = trainer.model
            tokenizer = tokenizer_of(trainer.processing_class)
            refuse_unanswering(model)
            samples.choose(model, tokenizer)
            output = Path(str(trainer.args.output_dir))
            found = self.audit(trainer.train_dataset, model, tokenizer, samples.rows, output)
            self._leave_out(trainer, found.pressing_rows if self.conflicts == "drop" else found.futile_rows)

    def _obstacle(self, trainer: Trainer) -> str:
        """Why no row can be left out; nothing where they can."""
        dataset = trainer.train_dataset
        why = ""
        if not isinstance(dataset, Dataset):
            why = f"of a {type(dataset).__name__} no row can be left out"
        elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            why = "where parameters are sharded the data are asked when they are read already"
        elif self.conflicts == "drop" and "seq_lengths" in dataset.column_names:
            why = "rows are packed, and would go with what is packed beside them"
        if why and self.conflicts == "drop":
            raise UnsupportedSetupError(f"conflicts='drop' cannot leave rows out: {why}; {CLEAN}")
        return why

    def _leave_out_again(self, trainer: Trainer, was: LeftOut) -> None:
        """The rows that were left out of the run that goes on.

        Raises:
            SafetyDataError: the data are others.
        """
        dataset: Any = trainer.train_dataset
        if was.rows and (not isinstance(dataset, Dataset) or len(dataset) != was.of):
            raise SafetyDataError(
                f"the run left {len(was.rows)} of {was.of} training rows out, and these are not the same data; give "
                "the same data set to go on, or start a new run"
            )
        self._leave_out(trainer, was.rows)

    def refuse_other_rows(self, rows: Sequence[int]) -> None:
        """
        Raises:
            UnsupportedSetupError: the run that goes on left rows out that this one would train on.
        """
        if rows != self.left_out:
            raise UnsupportedSetupError(
                f"the run that goes on left {len(rows)} training rows out, and this one {len(self.left_out)}; give the "
                "callback in the trainer's constructor, callbacks=[...], with the same conflicts= and rule"
            )

    def _leave_out(self, trainer: Trainer, rows: list[int]) -> None:
        dataset: Any = trainer.train_dataset
        if rows:
            if len(rows) == len(dataset):
                raise SafetyDataError(
                    f"all {len(dataset)} training rows answer prompts that the model refuses or might refuse, so with "
                    "these refusals held nothing can be learned; if that is your task, say conflicts='allow'"
                )
            self._whole, trainer.train_dataset = dataset, without(dataset, rows)
        self.left_out, self._source, self.settled = rows, trainer.train_dataset, True

    def split(self, loader: Any, tokenizer: PreTrainedTokenizerBase, saved: Mapping[str, Any] | None) -> None:
        """Say which conflicts are `held`, and which are `watched`; of a run that goes on the same.

        saved: what `entries` gave for the checkpoint that the run goes on from.
        """
        self.held, self.watched = [], []
        if self.holds and self.conflicts != "allow":
            if self.found is not None:
                self.held, self.watched = self.found.split()
            elif saved is not None:
                data = data_of(loader) if self._whole is None else self._whole
                self.held, self.watched = (
                    anchors_again(saved[kind], data, tokenizer, self.options) for kind in ("held", "watched")
                )

    def entries(self) -> dict[str, Any]:
        """For a checkpoint: held and watched conflicts, without their text, and the rows that were left out."""
        of = len(self._whole) if self._whole is not None else 0
        return {
            "held": anchor_entries(self.held),
            "watched": anchor_entries(self.watched),
            "left_out": LeftOut(rows=self.left_out, of=of).model_dump(),
        }


def source_of(trainer: Trainer | None, loader: Any) -> Any:
    """The object that stands for a training's data: the same in a trainer's second training."""
    return data_of(loader) if trainer is None else trainer.train_dataset


def data_of(loader: Any) -> Any:
    """The data set that a Trainer's loader reads; of a stream, what its processes share."""
    dataset = loader.dataset
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset

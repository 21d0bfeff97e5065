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
from spf.conflicts import REFUSES_NONE, REFUSES_NONE_REMEDY, TAKE_OUT, Audit, anchor_entries, anchors_again
from spf.data import Anchor, SafetyDataError, SafetyRow
from spf.data.columns import read_columns
from spf.earlier_audit import EarlierAudit
from spf.errors import UnsupportedSetupError, kind_of
from spf.leaving_out import LENGTHS, Place, content_of, is_packed, left_of, rows_in, same_rows, without
from spf.safety_samples import SafetySamples
from spf.sharding import is_first, object_of_rank_0
from spf.source import Source
from spf.text.generation import context_length
from spf.trainers import tokenizer_of

CLEAN = "`spf audit DATA --model MODEL --clean FILE` writes the data without them"
BEFORE = "with audited='spf-audit', after `spf audit DATA --model MODEL`, they are left out"
SHARDED = "where parameters are sharded the data are asked when they are read already"
WRAPPED = "packed rows cut their documents anywhere, so these cannot be told apart"
BY_DOCUMENT = "with packing_strategy='bfd' they are left out"
LATE = "the callback came when the trainer was made already"


class TrainingData:
    """Audits each data set once; says which conflicts are held and which are watched, and leaves their rows out.

    left_out: rows of the data set, or documents of packed ones, that are not trained on. obstacle: why rows
    with conflicts are trained on all the same; nothing where they need not be.
    """

    def __init__(
        self, conflicts: Conflicts, holds: bool, options: Mapping[str, Any] | None, audited: str | None = None
    ):
        """holds: whether the rule holds samples. options: variables of the chat template. audited: the directory of an
        earlier audit that is taken.

        Raises:
            SafetyDataError: it holds none that was finished.
        """
        self.earlier = EarlierAudit(Path(audited)) if audited is not None else None
        self.conflicts: Conflicts = conflicts
        self.holds, self.options = holds, options
        self.found: Audit | None = None
        self.left_out: list[Place] = []
        self.obstacle = LATE
        self.held: list[Anchor] = []
        self.watched: list[Anchor] = []
        self.source = Source()
        self._read: Any = None
        """The data set as the Trainer's loader reads it, all of its rows."""
        self._content = ""
        """A hash of the rows that are left out."""
        self._short: Dataset | None = None
        """The data set without them, while it is trained on."""

    def turn_to(self, source: Any, trainer: Trainer | None) -> None:
        """Forget what was found in another data set, or of another model; a callback may serve several trainers."""
        whole = self.source.data if source is self._short else source
        if not self.source.is_of(whole, trainer):
            self.source, self._read, self._short, self.found = Source(whole), None, None, None
            self._content, self.left_out, self.obstacle = "", [], LATE
        self.source.serve(trainer)

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
            SafetyDataError: there are some and `conflicts` is error, or rows were not read and it is that or drop.
        """
        limit = context_length(model, tokenizer)
        tell_apart = self.conflicts in ("drop", "error") or (self.holds and self.conflicts == "hold")
        if self.earlier is not None:
            found = self.earlier.of(dataset, tokenizer, self.options, limit, tell_apart=tell_apart)
            # the others may have no weights yet
            found.other_weights = object_of_rank_0(is_first() and not self.earlier.is_of(model))
        else:
            found = audit_data(
                dataset,
                model,
                tokenizer,
                rows,
                max_length=limit,
                options=self.options,
                directory=directory,
                tell_apart=tell_apart,
            )
        if self.conflicts in ("drop", "error"):
            refuse_found(found, self.conflicts, self.listed(directory), has_answers(dataset))
        self.found = found
        return found

    def listed(self, directory: Path) -> Path:
        """Where the conflicts are listed; `directory` is the run's."""
        return (self.earlier.directory if self.earlier is not None else directory) / LIST_FILE

    @property
    def leaves_out(self) -> bool:
        """Whether rows with conflicts are not to be trained on."""
        return self.conflicts == "drop" or (self.holds and self.conflicts in ("hold", "hold-all"))

    def prepare(self, trainer: Trainer, checkpoint: Path | None, samples: SafetySamples) -> None:
        """Audit the trainer's data, and leave rows out where that is possible: no event comes before it reads them.

        Left out are rows that teach nothing else; with `drop`, all that have a conflict. Of a run that goes on from a
        checkpoint, the same as before. `restore` gives the trainer its data back.

        Raises:
            UnsupportedSetupError: rows cannot be left out, and `conflicts` is drop.
            SafetyDataError, FileNotFoundError: no row is left, or the checkpoint is of other data, or no such one.
        """
        whole: Any = trainer.train_dataset
        self.turn_to(whole, trainer)
        if isinstance(whole, Dataset):
            # as the loader reads it: other columns may be named like those that training needs
            self._read = trainer._remove_unused_columns(whole)
        if not self.leaves_out:
            return
        was = read_left_out(checkpoint)
        self.obstacle = self._or_refuse(obstacle_in(trainer, asks=self.earlier is None))
        short: Dataset | None = None
        if was is not None:
            refuse_other_data(self._read, was)
            self.left_out, self._content = was.places, was.content
        elif self.found is None and not self.obstacle:
            found = self._ask(trainer, samples)
            places = found.pressing if self.conflicts == "drop" else found.futile
            self.found = None  # whoever tries again after an error is told again
            if places:
                short = without(whole, places, is_packed(self._read))
                refuse_too_few(trainer, len(rows_in(places)), len(short))
            self.found, self.left_out, self._content = found, places, content_of(self._read, places)
        if self.left_out:
            short = short or without(whole, self.left_out, is_packed(self._read))
            trainer.train_dataset = self._short = short

    def restore(self, trainer: Trainer) -> None:
        """Give the trainer its data back, when its training has ended."""
        if self._short is not None and trainer.train_dataset is self._short:
            trainer.train_dataset = self.source.data
        self._short = None

    def _ask(self, trainer: Trainer, samples: SafetySamples) -> Audit:
        """Choose the samples and audit, as they would be in training, before anything is prepared for it."""
        model: Any = trainer.model
        args = trainer.args
        tokenizer = tokenizer_of(trainer.processing_class)
        if self.earlier is not None:
            return self.audit(self._read, model, tokenizer, (), Path(str(args.output_dir)))
        refuse_unanswering(model)
        if (args.fp16_full_eval or args.bf16_full_eval) and not trainer.is_model_parallel:
            # it is put there when training begins
            trainer._move_model_to_device(model, args.device)
        with trainer.accelerator.autocast():
            samples.choose(model, tokenizer)
            return self.audit(self._read, model, tokenizer, samples.rows, Path(str(args.output_dir)))

    def _or_refuse(self, why: str) -> str:
        if why and self.conflicts == "drop":
            raise UnsupportedSetupError(f"conflicts='drop' cannot leave rows out: {why}; {remedy(why)}")
        return why

    def check(self, loader: Any, was: LeftOut | None) -> None:
        """What the loader reads is what rows were left out of, and the same as before in a run that goes on.

        Raises:
            UnsupportedSetupError: it is not, and cannot be helped.
        """
        if (self.left_out or self.found is not None) and not self._is_read(data := data_of(loader)):
            self.obstacle = self._or_refuse("the trainer's loader reads other data than its train_dataset")
            self.found, self.left_out, self._read = None, [], data
        if was is not None and (was.conflicts, was.places) != (self.conflicts, self.left_out):
            raise UnsupportedSetupError(
                f"the run that goes on has conflicts={was.conflicts!r} and {len(was.places)} training rows left out, "
                f"and this one {self.conflicts!r} and {len(self.left_out)}; give the callback in the trainer's "
                "constructor, callbacks=[...], with the same conflicts= and rule"
            )
        self._read = self._read if self._read is not None else data_of(loader)
        strict = self.conflicts == "error"
        self.source.compare(self._read if self.leaves_out or strict else None, was, strict)

    def _is_read(self, data: Any) -> bool:
        """Whether these are the rows that were audited, less what is left out; of a stream it cannot be told."""
        if isinstance(self._read, Dataset) and bool(self.left_out) == (self._short is not None):
            return same_rows(data, self._short or self._read, self._read.column_names)
        return not self.left_out

    def split(self, loader: Any, tokenizer: PreTrainedTokenizerBase, saved: Mapping[str, Any] | None) -> None:
        """Say which conflicts are `held`, and which are `watched`; of a run that goes on the same.

        saved: what `entries` gave for the checkpoint that the run goes on from.
        """
        self.held, self.watched = [], []
        if self.holds and self.conflicts != "allow":
            if self.found is not None:
                self.held, self.watched = self.found.split(self.left_out)
            elif saved is not None:
                data = self._read if self.left_out else data_of(loader)
                self.held, self.watched = (
                    anchors_again(saved[kind], data, tokenizer, self.options) for kind in ("held", "watched")
                )

    @property
    def left_out_rows(self) -> list[int]:
        """Rows of which something is left out, in order, each once."""
        return rows_in(self.left_out)

    def entries(self) -> dict[str, Any]:
        """For a checkpoint: held and watched conflicts, without their text, and the rows that were left out."""
        of, content = (len(self._read), self._content) if self.left_out else (0, "")
        whole = self.source.content
        left_out = LeftOut(conflicts=self.conflicts, places=self.left_out, of=of, content=content, data=whole)
        return {
            "held": anchor_entries(self.held),
            "watched": anchor_entries(self.watched),
            "left_out": left_out.model_dump(),
        }


def remaining(data: TrainingData) -> str:
    """How much is trained on where something is left out, in words."""
    return left_of(data._read, data.left_out)


def remedy(obstacle: str) -> str:
    """What helps where rows are not left out."""
    return {SHARDED: BEFORE, WRAPPED: BY_DOCUMENT}.get(obstacle, CLEAN)


def obstacle_in(trainer: Trainer, asks: bool) -> str:
    """Why no row of a trainer's data can be left out; nothing where they can. asks: the model is asked for them."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return f"of {kind_of(dataset)} no row can be left out"
    if asks and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return SHARDED
    if vars(trainer.args).get("packing") and LENGTHS not in dataset.column_names:
        return WRAPPED
    return ""


def refuse_conflicts(found: Audit, listed: Path) -> None:
    """
    Raises:
        SafetyDataError: the data have conflicts, or are a stream, of which others may be read in training.
    """
    if found.conflicts:
        raise SafetyDataError(
            f"{found.counts()}; they are listed in {listed}: conflicts='hold' keeps these "
            "refusals, 'drop' leaves the rows out, 'allow' lets them be unlearned"
        )
    if found.stream:
        raise SafetyDataError(
            f"the training data are a stream, of which the {found.rows} rows that one pass gives first were audited, "
            "so conflicts='error' cannot say that they attack nothing; give a datasets.Dataset, or audit all of them "
            "with `spf audit DATA --model MODEL --fail_over 0` and say conflicts='hold'"
        )


def refuse_found(found: Audit, conflicts: Conflicts, listed: Path, answers: bool) -> None:
    """answers: whether the data have any.

    Raises:
        SafetyDataError: nothing could be found, or rows were not read, which may have conflicts.
    """
    if conflicts == "error":
        refuse_conflicts(found, listed)
    if not found.refuses:
        cannot = "say that there are none" if conflicts == "error" else "leave them out"
        raise SafetyDataError(f"{REFUSES_NONE}, and conflicts={conflicts!r} cannot {cannot}; {REFUSES_NONE_REMEDY}")
    if found.why:
        which = f"{found.unread} of {found.rows} training rows" if found.rows else "the training data"
        cannot = "say that they attack nothing" if conflicts == "error" else "tell which to leave out"
        remedy = "leave them out" if answers else "prompts without answers, as of GRPO, are not asked; leave them out"
        raise SafetyDataError(
            f"{which} could not be audited ({found.why}), so conflicts={conflicts!r} cannot {cannot}; {remedy}, or say "
            "conflicts='hold', which trains on them with a warning"
        )


def has_answers(dataset: Any) -> bool:
    """Whether the columns may have answers beside the prompts; GRPO's have none."""
    columns = set(read_columns(dataset)) if isinstance(dataset, Dataset) else set()
    return not {"prompt"} <= columns <= {"prompt", "tools", "chat_template_kwargs"}


def refuse_too_few(trainer: Trainer, pressing: int, left: int) -> None:
    """pressing: rows with something that is left out; left: rows of which something is left.

    Raises:
        SafetyDataError: that is not one batch.
    """
    args, whole = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
    batch = args.train_batch_size * args.world_size
    if not left:
        raise SafetyDataError(
            f"all {whole} training rows answer prompts that the model refuses or might refuse, so with these refusals "
            f"held nothing can be learned; if that is your task, {TAKE_OUT}"
        )
    if args.dataloader_drop_last and left < batch:
        raise SafetyDataError(
            f"{pressing} of {whole} training rows answer prompts that the model refuses or might refuse, "
            f"and the rest is less than a batch of {batch}, which dataloader_drop_last leaves out; if that is your "
            f"task, {TAKE_OUT}"
        )


def refuse_other_data(dataset: Any, was: LeftOut) -> None:
    """
    Raises:
        SafetyDataError: the rows that the run that goes on left out are not these.
    """
    if was.places and (
        not isinstance(dataset, Dataset) or len(dataset) != was.of or was.content != content_of(dataset, was.places)
    ):
        raise SafetyDataError(
            f"the run left {len(rows_in(was.places))} of {was.of} training rows out, and these are not the same data, "
            "or not in the same order; give the same data set to go on, or start a new run"
        )


def source_of(trainer: Trainer | None, loader: Any) -> Any:
    """The object that stands for a training's data: the same in a trainer's second training."""
    return data_of(loader) if trainer is None else trainer.train_dataset


def data_of(loader: Any) -> Any:
    """The data set that a Trainer's loader reads; of a stream, what its processes share."""
    dataset = loader.dataset
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset

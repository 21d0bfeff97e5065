"""What SafetyCallback does before the first step: audit the data, choose samples, put the rule on the optimizer."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from spf.announce import EARLIER, INERT, MOVED, OTHER_BASE, SHORTER, audit_lines, earlier_line, first_lines
from spf.checkpoint import LeftOut, Saved
from spf.collated import Compared, compare_batches
from spf.data import read_as_refusals, unused_tokens
from spf.errors import UnsupportedSetupError
from spf.going_on import earlier_subspace, mark, other_base, refuse_switched
from spf.leaving_out import counts_without, name_of
from spf.optimizer import Attachment
from spf.probe import SafetyProbe
from spf.rules import Rule
from spf.sharding import is_first, object_of_rank_0
from spf.text.generation import context_length, pad_id
from spf.trainers import calling_trainer, own_choice
from spf.training_data import data_of, remaining, source_of

if TYPE_CHECKING:
    from spf.callback import SafetyCallback


@dataclass(frozen=True)
class Begun:
    """What a run that can make its first step says of itself; places: of directories, which is nothing for a card."""

    lines: list[str]
    places: list[str]


def refuse_unfit(rule: Rule, args: TrainingArguments, goes_on: bool) -> None:
    """
    Raises:
        UnsupportedSetupError: the rule cannot act in float16, or go on from a checkpoint.
    """
    if args.fp16 and rule.adds_gradients:
        raise UnsupportedSetupError(
            f"the rule {rule.name} adds safety gradients to scaled float16 gradients, where they may vanish; use bf16, "
            "or null-space without feedback"
        )
    if vars(args).get("enable_jit_checkpoint"):
        raise UnsupportedSetupError(
            "enable_jit_checkpoint writes checkpoints in the middle of a step, where it cannot be checked that the "
            "model is held; save every so many steps instead (save_steps)"
        )
    if goes_on and not rule.resumable:
        raise UnsupportedSetupError(
            f"{rule.name} cannot go on from a checkpoint: the aligned model's predictions are not saved in it; start "
            "the run anew, or use null-space"
        )


def foresee(rule: Rule, trainer: Any) -> None:
    """Before the model is asked anything, which takes minutes.

    Raises:
        UnsupportedModelError: the rule cannot act on the trainer's model.
    """
    # sharded, its weights are of other types later; and another callback may have layers trained that are frozen now
    later = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not later and any(parameter.requires_grad for parameter in trainer.model.parameters()):
        rule.foresee(trainer.model)


def begin(
    callback: "SafetyCallback",
    saved: Saved | None,
    args: TrainingArguments,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    loader: Any,
) -> Begun:
    """Make the callback's `attachment`; from then on the callback takes it off, whatever fails.

    saved: the checkpoint that the run goes on from. loader: of the training data.

    Raises:
        SafetyDataError, UnsupportedModelError, UnsupportedSetupError, CorrectionError: the run could not be protected.
    """
    rule, samples, data, settings = callback.rule, callback.samples, callback.data, callback.settings
    output = Path(str(args.output_dir))
    limit = context_length(model, tokenizer)
    refuse_switched(model)
    trainer = calling_trainer()
    data.turn_to(source_of(trainer, loader), trainer)
    data.check(loader, LeftOut(**saved.state["left_out"]) if saved else None)
    if saved is not None:
        samples.rows = saved.rows(samples.load())
    else:
        if data.found is None and settings.conflicts == "drop":
            raise UnsupportedSetupError(
                "conflicts='drop' needs the callback in the trainer's constructor, callbacks=[...]: once training has "
                "begun, as with add_callback, no row can be left out any more"
            )
        if data.found is None or data.earlier is not None:
            samples.choose(model, tokenizer)
        if data.found is None:
            data.audit(data_of(loader), model, tokenizer, samples.rows, output)
    compared = Compared()
    if is_first():
        compared = compare_batches(data_of(loader), loader, args.train_batch_size, tokenizer, data.options)
    # a collator that draws must not have processes go different ways
    collated = object_of_rank_0(compared).lines(settings.conflicts)
    before = saved.state if saved else None
    data.split(loader, tokenizer, before)
    anchors, reworded, calibration = samples.tokens(tokenizer, limit)
    tighten = settings.on_leak != "warn"
    pool = samples.pool(tokenizer, limit) if rule.holds and tighten else ()
    start = time.perf_counter()
    kept = callback.keep.samples(model, tokenizer, limit, before)
    keeping = time.perf_counter() - start
    earlier = None
    if rule.holds and saved is None:
        earlier = earlier_subspace(model, settings.subspace, callback.attachment, output)
    if earlier is not None:
        callback.keep.refuse_unheld(earlier.subspace.metadata.get("keep"))
    probe = SafetyProbe(
        model,
        anchors,
        anchors_per_step=settings.anchors_per_step,
        pad_token_id=pad_id(tokenizer),
        seed=settings.seed,
        first_tokens=settings.first_tokens,
        first_weight=settings.first_weight,
    )
    callback.attachment = attachment = Attachment(
        probe,
        optimizer,
        rule,
        subspace=saved.subspace if saved else earlier.subspace if earlier else None,
        resumed=saved is not None,
        reworded=[*reworded, *kept],
        conflicts=data.held,
        watched=data.watched,
        further=samples.further(tokenizer, limit),
        reads=partial(read_as_refusals, model=model, tokenizer=tokenizer),
        pool=pool,
        calibration=calibration if rule.holds else (),
        monitor_steps=settings.monitor_steps,
        cosines=settings.cosines,
        correction_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        new_tokens=unused_tokens(tokenizer, [*anchors, *reworded, *calibration]),
        tighten=tighten,
        near_task=data.found is not None and data.found.near_task,
    )
    if saved is not None:
        attachment.load_state_dict(saved.state)
    other = other_base(model, attachment.subspace)
    if rule.holds and saved is None and earlier is None:
        mark(model, attachment.subspace, callback.keep.entry["prompts"])
    took = {"own refusals": samples.seconds, "audit": 0.0, "answers to keep": keeping}
    if data.found is not None and data.found.new:
        took["audit"] = data.found.seconds
        data.found.new = False
    samples.seconds = 0.0  # said once; a callback may serve several trainings
    took["bases"] = attachment.seconds["setup"]
    lines = first_lines(attachment, samples.rows, samples.at_hand, samples.answered, took)
    if data.found is not None:
        lines[-1:-1] = audit_lines(data, rule, earlier is not None)
    elif data.left_out:
        left_out = f"{len(data.left_out)} {name_of(data.left_out)} are left out of training"
        lines[-1:-1] = [f"{left_out}, as in the run that goes on; {remaining(data)}"]
    if data.left_out and args.max_steps <= 0:
        left, whole = counts_without(data._read, data.left_out)
        epochs = args.num_train_epochs
        lines[-1:-1] = [SHORTER.format(epochs=epochs, share=left / whole, as_many=epochs * whole / max(1, left))]
    lines[-1:-1] = collated
    if data.left_out and trainer is not None and (method := own_choice(trainer)):
        lines[-1:-1] = [MOVED.format(method)]
    if tighten and rule.holds and not attachment.correction.grows:
        lines[-1:-1] = [INERT]
    if data.source.changed:
        lines[-1:-1] = [data.source.changed]
    lines[1:1] = callback.keep.lines
    if earlier is not None:
        lines[1:1] = [EARLIER]
    if other:
        lines[1:1] = [OTHER_BASE]
    return Begun(lines, [] if earlier is None else [earlier_line(earlier.where)])

"""One-shot patching: a few steps on one refusal after fine-tuning (Zhang et al., "Safety at One Shot", 2601.01887)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import Anchor, AnchorBatch, SafetyRow, collate, tokenise
from spf.errors import SafetyDataError
from spf.text.generation import context_length, pad_id


def refusal_anchors(
    rows: Sequence[SafetyRow], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Anchor]:
    """The rows, tokenised for training on their refusals.

    Raises:
        SafetyDataError: a row has no refusal, cannot be rendered, or is longer than the model's context.
    """
    for row in rows:
        if row.refusal is None:
            raise SafetyDataError(f"{row.where}: has no refusal to train on; complete it first (complete_refusals)")
    return tokenise(rows, tokenizer, context_length(model, tokenizer))


def safety_loss(model: PreTrainedModel, batch: AnchorBatch) -> Tensor:
    """Mean NLL of the refusal tokens of a batch, nats, with its graph."""
    device = next(model.parameters()).device
    ids, weights = batch.input_ids.to(device), batch.weights.to(device)[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch.attention_mask.to(device), use_cache=False).logits
    used = weights > 0
    return nn.functional.cross_entropy(logits[:, :-1][used].float(), ids[:, 1:][used])


def patch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: SafetyRow, steps: int, learning_rate: float
) -> list[float]:
    """`steps` AdamW steps on one refusal, on all trainable parameters; returns the safety loss before each.

    For full models and PEFT models alike. No weight decay and no dropout; gradients are cleared before
    and after, and the training mode of every module is put back.

    Raises:
        ValueError: fewer than one step, nothing is trainable, or the safety loss is NaN or inf.
        SafetyDataError: the row has no refusal, or cannot be rendered.
    """
    if steps < 1:
        raise ValueError(f"at least one step is needed, not {steps}")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter to patch; load the adapter with is_trainable=True")
    batch = collate(refusal_anchors([row], model, tokenizer), pad_id(tokenizer))
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    losses: list[float] = []
    try:
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                loss = safety_loss(model, batch)
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"{row.where}: the safety loss is {float(loss.detach())} at patching step {len(losses)}"
                    )
                losses.append(float(loss.detach()))
                loss.backward()
                optimizer.step()
    finally:
        optimizer.zero_grad()
        for module, training in modes.items():
            module.training = training
    return losses

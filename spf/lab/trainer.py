"""A Trainer for prompts with short answers that computes logits only where there is an answer to learn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from spf.models import logits_only

IGNORED = -100

AnswerLoss = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]
"""(model, inputs, logits (P, V) float32, targets (P,), positions (P,) in their answer) -> loss."""


class AnswerTrainer(Trainer):
    """A `Trainer` whose output layer sees the answer positions only.

    With a vocabulary of 49 152 and short answers behind long prompts, logits at every position would
    take half of a step on a CPU. `answer_loss` replaces the mean NLL of the answer tokens.
    """

    answer_loss: AnswerLoss | None = None

    def __init__(self, model: Any, args: TrainingArguments, **kwargs: Any):
        if args.n_gpu > 1:
            # Trainer would split batches over the GPUs by DataParallel, which answer_logits cannot look into
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, targets, positions = answer_logits(model, inputs)
        if self.answer_loss is None:
            loss = nn.functional.cross_entropy(logits, targets)
        else:
            loss = self.answer_loss(model, inputs, logits, targets, positions)
        return (loss, {"logits": logits}) if return_outputs else loss


def answer_logits(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (P, V), float32, that predict the P answer tokens of a batch; those tokens; their places in the answer.

    inputs: input_ids, attention_mask and labels (B, L), labels IGNORED outside the answers.
    """
    labels = inputs["labels"][:, 1:]
    used = labels != IGNORED

    rows, columns = used.nonzero(as_tuple=True)
    with logits_only(model, rows, columns):
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    positions = used.cumsum(1) - 1
    return output.logits.float(), labels[used], positions[used]


def collate_answers(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels (the answer tokens only), int64 (B, L)."""
    width = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        prompt, answer = row["prompt_ids"], row["answer_ids"]
        padding = width - len(prompt) - len(answer)
        batch["input_ids"].append(prompt + answer + [pad_id] * padding)
        batch["attention_mask"].append([1] * (len(prompt) + len(answer)) + [0] * padding)
        batch["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * padding)
    return {key: torch.tensor(value) for key, value in batch.items()}

"""What the aligned model says, replayed beside the training data: its refusals and its answers to benign prompts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import Anchor, AnchorRotation, SafetyRow, load_safety_rows, packaged_prompts
from spf.files import replace_file
from spf.lab.trainer import collate_answers
from spf.text.generation import generate_answers

ANSWER_TOKENS = 32
"""Length of a benign answer, that of the refusals."""


def benign_answers(
    path: Path,
    model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    part: str = "benign_anchors",
) -> list[SafetyRow]:
    """A model's own answers to packaged benign prompts, whatever they are; asked once, then read from `path`.

    model: gives the model, where it has to be asked.
    """
    if not path.is_file():
        prompts = packaged_prompts(part)
        answers = generate_answers(
            model(), tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, description="benign answers", progress=False
        )
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer:
                length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
                rows.append({"prompt": prompt, "refusal": answer, "cut": length >= ANSWER_TOKENS - 2})
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))
    return load_safety_rows(path)


class Replay:
    """Batches of `refusals` and `benign` samples a step, each kind in turn; inputs of an `AnswerTrainer`'s model."""

    def __init__(
        self,
        refusals: Sequence[Anchor],
        benign: Sequence[Anchor],
        pad_id: int,
        *,
        refusals_per_step: int = 4,
        benign_per_step: int = 4,
        seed: int = 0,
    ):
        """
        Raises:
            ValueError: nothing is replayed.
            SafetyDataError: fewer samples of a kind than a step takes.
        """
        sizes = ((refusals, refusals_per_step), (benign, benign_per_step))
        self._turns = [AnchorRotation(rows, size, seed) for rows, size in sizes if size]
        if not self._turns:
            raise ValueError("replay needs refusals or benign answers, and both are 0 a step")
        self.pad_id = pad_id

    def __next__(self) -> dict[str, Tensor]:
        anchors = [anchor for turn in self._turns for anchor in next(turn)]
        return collate_answers(
            [{"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in anchors], self.pad_id
        )

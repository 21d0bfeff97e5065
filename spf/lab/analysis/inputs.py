"""Prompts as tensors, and a model run on them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompts:
    """N prompts, left-padded, so that the last column is the last prompt token of each.

    input_ids (N, L) int64; attention_mask (N, L) int64, 0 on the pads.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.attention_mask.shape:
            shapes = tuple(self.input_ids.shape), tuple(self.attention_mask.shape)
            raise ValueError(f"Prompts: input_ids and attention_mask must both be (N, L), not {shapes[0]}, {shapes[1]}")
        if len(self) == 0:
            raise ValueError("Prompts: no prompts")
        if not bool(self.attention_mask[:, -1].all()) or bool((self.attention_mask.diff(dim=1) < 0).any()):
            raise ValueError("Prompts: must be padded on the left, so that the last column holds the last tokens")

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        """Some of the prompts, pads that all of them have taken off."""
        mask = self.attention_mask[rows]
        start = int(mask.any(0).int().argmax())
        return Prompts(self.input_ids[rows, start:], mask[:, start:])

    def embed(self, model: PreTrainedModel) -> Tensor:
        """The model's embeddings of the tokens (N, L, d), without gradient."""
        with torch.no_grad():
            return model.get_input_embeddings()(self.input_ids.to(model.device))


def position_ids(mask: Tensor) -> Tensor:
    """0, 1, 2, ... from the first token that is not a pad (N, L); 0 on the pads."""
    return (mask.cumsum(1) - 1).clamp(min=0)

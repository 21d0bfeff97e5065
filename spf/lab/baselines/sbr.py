"""SBR: hidden states of harmful prompts held to the aligned model's (Lu et al., "Safety Anchor", arXiv 2605.05995).

Safety bottleneck regularisation adds `weight` times the mean squared difference between the hidden state of the last
prompt token and the aligned model's, after the last layer, which the output layer reads. The released code has weight
50 and gives all its prompts (one is enough, the paper says) at every step; here some of all anchors come in turn.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spf.models import evaluating

BATCH = 16
"""Prompts that go through the aligned model together."""


class HiddenStateAnchor:
    """The anchor's term. The first call, before any step, remembers what the model says then: it is the aligned one."""

    def __init__(
        self, prompts: Sequence[list[int]], pad_id: int, *, size: int = 8, layers: Sequence[int] = (-1,), seed: int = 0
    ):
        """
        Args:
            prompts: token ids of harmful prompts, up to where the answer begins.
            size: how many of them a call takes, in turn, in an order that depends on the seed.
            layers: after which layers, as in transformers' `hidden_states`: 0 the embeddings, -1 what is read out.

        Raises:
            ValueError: no prompts, no layers, or fewer than one prompt a call.
        """
        if not prompts or not layers or size < 1:
            raise ValueError(f"sbr needs prompts and layers, not {len(prompts)} and {len(layers)}, {size} at a time")
        self.prompts = list(prompts)
        self.pad_id = pad_id
        self.size = min(size, len(prompts))
        self.layers = list(layers)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        self._turn = cycle(order)
        self._aligned: Tensor | None = None

    def __call__(self, model: Any) -> Tensor:
        """Mean squared difference to the aligned model's states over the next prompts; float32, with its graph.

        Raises:
            IndexError: the model has no such layer.
        """
        if self._aligned is None:
            # not when it is made: autocast is on here, and rounds these states as it will round the tuned ones
            starts = range(0, len(self.prompts), BATCH)
            with torch.no_grad(), evaluating(model):
                self._aligned = torch.cat([self.states(model, self.prompts[i : i + BATCH]) for i in starts])
        chosen = list(islice(self._turn, self.size))
        return functional.mse_loss(self.states(model, [self.prompts[i] for i in chosen]), self._aligned[chosen])

    def states(self, model: Any, prompts: Sequence[list[int]]) -> Tensor:
        """Hidden states (N, L, d) of the last token of each prompt, float32."""
        lengths = torch.tensor([len(ids) for ids in prompts])
        width = int(lengths.max())
        ids = torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in prompts])
        mask = (torch.arange(width) < lengths[:, None]).long()
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        rows = torch.arange(len(prompts))
        return torch.stack([output.hidden_states[layer][rows, lengths - 1] for layer in self.layers], 1).float()

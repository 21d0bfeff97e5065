"""Prompts asked for the next token in batches; what they all begin with, as a chat template's do, is read once."""

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from spf.models import logits_only
from spf.sharding import object_of_rank_0

SHORTEST = 8
"""Fewer shared tokens are not worth the trouble."""

TRIED = 2
"""So many prompts are asked both ways before the short one is trusted."""

CLOSE = 0.02
"""Largest difference of a probability between the two ways that rounding explains, in bfloat16 too."""


class NextToken:
    """Asks a causal model for the token after each prompt, with the keys and values of what all prompts begin with.

    A model whose cache cannot be repeated for a batch (states of a recurrent layer, say), or that answers otherwise
    with it, is given whole prompts. All processes of a run have to make one at the same time, of the same prompts.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]):
        """prompts: all that will be asked, token ids."""
        self.model = model
        self.shared = 0
        self.cache: Any = None
        # one token of its own is left of every prompt
        shared = min(common(prompts), min(map(len, prompts)) - 1) if len(prompts) > TRIED else 0
        if shared < SHORTEST:
            return
        some = sorted(prompts, key=len)[:: len(prompts) // TRIED][:TRIED]
        whole = self.shares(some)
        try:
            self.cache, self.shared = self._read(prompts[0][:shared]), shared
            same = bool((self.shares(some) - whole).abs().max() <= CLOSE)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            same = False
        # rounding must not have processes go different ways
        if not object_of_rank_0(same):
            self.cache, self.shared = None, 0

    def ask(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """For each prompt the probability that one of its tokens comes next, and the likeliest next token."""
        shares = self.shares(prompts)
        sums = [float(share[list(chosen)].sum()) for share, chosen in zip(shares, tokens, strict=True)]
        return list(zip(sums, shares.argmax(-1).tolist(), strict=True))

    @torch.no_grad()
    def shares(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The next token's probabilities (B, V), float32, on the CPU."""
        rest = [prompt[self.shared :] for prompt in prompts]
        device = next(self.model.parameters()).device
        width = max(map(len, rest))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in rest], device=device)
        mask = torch.tensor([[1] * (self.shared + len(p)) + [0] * (width - len(p)) for p in rest], device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in rest])
        with logits_only(self.model, torch.arange(len(rest)), last):
            if self.cache is None:
                output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            else:
                cache = copy.deepcopy(self.cache)
                cache.batch_repeat_interleave(len(rest))
                output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        shares: Tensor = output.logits.float().cpu().softmax(-1)
        return shares

    def _read(self, prefix: Sequence[int]) -> Any:
        ids = torch.tensor([list(prefix)], device=next(self.model.parameters()).device)
        with logits_only(self.model, torch.tensor([0]), torch.tensor([len(prefix) - 1])):
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    # sorted as words are, the first and the last differ earliest
    ends = min(map(tuple, prompts)), max(map(tuple, prompts))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))

"""Prompts asked for the next token, or for states half way up; what all begin with, as templates do, is read once."""

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from spf.models import logits_only
from spf.sharding import object_of_rank_0, shares_parameters

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
    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], own: int = 1, most: int = 1 << 30):
        """prompts: all that will be asked, token ids. own: so many tokens at the end of each are never shared, and of
        the others at the beginning at most so many."""
        self.model: Any = model
        self.shared = 0
        self.cache: Any = None
        shared = min(common(prompts), min(map(len, prompts)) - own, most) if len(prompts) > TRIED else 0
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
        return _answers(self.shares(prompts), tokens)

    def ask_twice(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], follow: Sequence[int]
    ) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
        """The same of prompts without their last token, and with it for the tokens `follow`; in one pass."""
        without, whole = self.shares_at(prompts, (1, 0))
        return _answers(without, tokens), _answers(whole, [follow] * len(prompts))

    def shares(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The next token's probabilities (B, V), float32, on the CPU."""
        return self.shares_at(prompts, (0,))[0]

    @torch.no_grad()
    def shares_at(self, prompts: Sequence[Sequence[int]], backs: Sequence[int]) -> list[Tensor]:
        """The same behind each prompt without so many of its last tokens, in one pass; these must not be shared."""
        rows = torch.arange(len(prompts)).repeat(len(backs))
        last = torch.tensor([len(prompt) - self.shared - 1 - back for back in backs for prompt in prompts])
        with logits_only(self.model, rows, last):
            output = self.model(**self._given(prompts))
        return list(output.logits.float().cpu().softmax(-1).split(len(prompts)))

    def _given(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the model is called with: the tokens (B, L) that are not shared, padded at the end, and the cache."""
        rest = [prompt[self.shared :] for prompt in prompts]
        device = next(self.model.parameters()).device
        width = max(map(len, rest))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in rest], device=device)
        mask = torch.tensor([[1] * (self.shared + len(p)) + [0] * (width - len(p)) for p in rest], device=device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": self.cache is not None}
        if self.cache is not None:
            given["past_key_values"] = copy.deepcopy(self.cache)
            given["past_key_values"].batch_repeat_interleave(len(rest))
        return given

    def _read(self, prefix: Sequence[int]) -> Any:
        ids = torch.tensor([list(prefix)], device=next(self.model.parameters()).device)
        with logits_only(self.model, torch.tensor([0]), torch.tensor([len(prefix) - 1])):
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values


class MiddleStates(NextToken):
    """Reads hidden states half way up, and goes no further where the model lets itself be stopped there.

    Stopping is tried on the first batch and must give the same; a model whose parameters are gathered by layer, whose
    processes have to make whole passes, is not stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        begins: Callable[[Sequence[int]], int],
        ending: int,
    ):
        """begins: so many tokens at the beginning of a prompt are not read; ending: at the end of each."""
        super().__init__(model, prompts, own=ending + 1, most=min(map(begins, prompts), default=0))
        self.begins, self.ending = begins, ending
        layers: int = self.model.config.get_text_config().num_hidden_layers
        self.layer = layers // 2
        stacks = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        self.next = stacks[0][self.layer] if stacks and not shares_parameters(model) else None
        self.tried = False

    @torch.no_grad()
    def states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Hidden states (T, n) of each prompt, float32, on the CPU, of one token at least; None if the model does not
        give any."""
        if self.next is not None and self.tried:
            return self._stopped(prompts)
        rows, last = torch.arange(len(prompts)), torch.tensor([len(prompt) - self.shared - 1 for prompt in prompts])
        with logits_only(self.model, rows, last):
            hidden = self.model(**self._given(prompts), output_hidden_states=True).hidden_states
        states = self._read_of(prompts, hidden[self.layer]) if hidden else None
        if states is not None and self.next is not None:
            short = self._stopped(prompts)
            self.tried = True
            if short is None or not all(map(_close, short, states)):
                self.next = None
        return states

    def _stopped(self, prompts: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """What the layer after is given, without running it; None if it is given nothing of that kind."""

        def stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _StoppedError(inputs)

        assert self.next is not None
        handle = self.next.register_forward_pre_hook(stop)
        try:
            self.model(**self._given(prompts))
        except _StoppedError as stopped:
            return self._read_of(prompts, next(iter(stopped.inputs), None))
        finally:
            handle.remove()
        return None

    def _read_of(self, prompts: Sequence[Sequence[int]], hidden: Any) -> list[Tensor] | None:
        """Of hidden states (B, L, n) those that are read; None of others, as Gemma 3n's of several streams."""
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return None
        ends = [max(1, len(prompt) - self.shared - self.ending) for prompt in prompts]
        begins = [min(self.begins(p) - self.shared, end - 1) for p, end in zip(prompts, ends, strict=True)]
        return [row[b:end].float().cpu() for row, b, end in zip(hidden, begins, ends, strict=True)]


def _answers(shares: Tensor, tokens: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """Of each distribution (B, V) the probability of its tokens, and the likeliest one."""
    sums = [float(share[list(chosen)].sum()) for share, chosen in zip(shares, tokens, strict=True)]
    return list(zip(sums, shares.argmax(-1).tolist(), strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.02, atol=0.02)


class _StoppedError(Exception):
    """Ends a pass through a model half way; inputs: of the layer that was not run."""

    def __init__(self, inputs: tuple[Any, ...]):
        super().__init__()
        self.inputs = inputs


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    # sorted as words are, the first and the last differ earliest
    ends = min(map(tuple, prompts)), max(map(tuple, prompts))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))

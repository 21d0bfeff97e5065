"""Parameters that are no matrices on an input: kept as they are, but for rows of tokens added to the vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spf.data import Anchor
from spf.errors import UnsupportedModelError, UnsupportedSetupError
from spf.matrices import is_embedding
from spf.rules.frozen import bit_sum, differing
from spf.run import Run
from spf.sharding import at_rest


class Fixed:
    """Keeps a run's other parameters at their values over each step.

    new_tokens: ids whose embeddings may learn. held: samples whose tokens LoRA on an embedding leaves as they are.
    earlier: `tokens` of the run that this one goes on from.
    """

    def __init__(self, run: Run, new_tokens: Sequence[int], held: Sequence[Anchor] = (), earlier: Sequence[int] = ()):
        """
        Raises:
            UnsupportedModelError: LoRA on an embedding changes tokens of `held` already, or no trainable token is new.
        """
        self.run = run
        # lora_B of an embedding is free, as that of a matrix
        self._others = {name: p for name, p in run.others.items() if ".lora_embedding_B." not in name}
        self._values: dict[str, Tensor] = {}
        self._moving: dict[str, Tensor] = {}
        used = {*earlier, *(token for a in held for token in (*a.prompt_ids, *a.refusal_ids))}
        self._new_rows = self._rows_of([t for t in new_tokens if t not in used]) | self._columns_beside(sorted(used))
        tokens_learn = any(".lora_embedding_A." in n or self._tokens_of(n) is not None for n in self._others)
        self.tokens: list[int] = sorted(used) if tokens_learn else []
        """Ids of the held tokens, where rows of others may learn: a run that goes on does not have all the samples."""
        self._start = self._checksums()

    @property
    def learning_rows(self) -> bool:
        """Whether there are rows of new tokens that learn."""
        return any(".lora_embedding_A." not in name for name in self._new_rows)

    def _piece(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part, a token a row."""
        piece = self.run.sharding.parts[name].piece(tensor)
        return piece.T if ".lora_embedding_A." in name else piece

    def before_step(self, here: set[str]) -> None:
        """Drop gradients, and remember the values of what the optimizer will change all the same."""
        sharding = self.run.sharding
        for name, parameter in self._others.items():
            if name in self._new_rows and name in here:
                self._keep_all_but_new_rows(name)
            elif not sharding.split:
                # Without a gradient the optimizer skips it, decay and momentum included. Where processes hold parts of
                # it, they could not go on from a checkpoint in which it has no state.
                parameter.grad = None
            elif name in here:
                part = sharding.parts[name]
                self._values[name] = part.piece(part.holder.detach()).clone()

    def _keep_all_but_new_rows(self, name: str) -> None:
        """Rows of tokens added to the vocabulary learn from their first gradient on; all others stay as they are."""
        part = self.run.sharding.parts[name]
        if part.holder.grad is None:
            return
        gradient, place = self._piece(name, part.holder.grad), self._new_rows[name].to(part.holder.device)
        own = gradient[place]
        gradient.zero_()
        gradient[place] = own
        moving = self._moving[name] if name in self._moving else self._in_motion(name)[place]
        self._moving[name] = moving | (own != 0)
        self._values[name] = self._piece(name, part.holder.detach()).clone()

    def _in_motion(self, name: str) -> Tensor:
        """Where the optimizer remembers gradients, those of before a checkpoint that the run goes on from."""
        holder = self.run.sharding.parts[name].holder
        moving = torch.zeros_like(self._piece(name, holder.detach()), dtype=torch.bool)
        for value in self.run.optimizer.state.get(holder, {}).values():
            if isinstance(value, Tensor) and value.shape == holder.shape:
                moving |= self._piece(name, value) != 0
        return moving

    def after_step(self) -> None:
        """Put the values back."""
        for name, values in self._values.items():
            part = self.run.sharding.parts[name]
            now = self._piece(name, part.holder.detach())
            if name in self._moving:
                place = self._new_rows[name].to(now.device)
                values[place] = torch.where(self._moving[name], now[place], values[place])
            now.copy_(values)
        self._values = {}

    def changed(self) -> list[str]:
        """Those that are not what they were when the run began, over all processes."""
        return differing(self.run, self._start, self._checksums())

    def _checksums(self) -> dict[str, Tensor]:
        """Of each the sum of its bits in this process: of the model's own parameter, since what is stepped may be a
        copy of it; but where rows learn, or it is one of many, of that copy's part, which tells them apart."""
        sums = {}
        for name, parameter in self._others.items():
            part = self.run.sharding.parts.get(name)
            if part is not None and (name in self._new_rows or part.among is not None):
                values = self._piece(name, part.holder.detach())
                if name in self._new_rows:
                    values = values.index_fill(0, self._new_rows[name].to(values.device), 0)
                sums[name] = bit_sum(values)
            else:
                sums |= {f"{name}{what}": bit_sum(own) for what, own in at_rest(parameter).items()}
        return sums

    def _rows_of(self, tokens: Sequence[int]) -> dict[str, Tensor]:
        """By embedding, where its rows of these tokens are: rows of this process's part, or flat entries of it."""
        places, known = {}, set(tokens)
        for name in self._others:
            part = self.run.sharding.parts.get(name)
            chosen = self._tokens_of(name)
            if part is None or chosen is None:
                continue
            columns = part.shape[1]
            rows = torch.tensor([row for row, token in enumerate(chosen) if token in known], dtype=torch.long)
            if part.offset is None:
                place = rows[(rows >= part.rows.start) & (rows < part.rows.stop)] - part.rows.start
            else:
                entries = (rows[:, None] * columns + torch.arange(columns)).flatten() - part.start
                place = entries[(entries >= 0) & (entries < part.size)]
            if len(rows):
                places[name] = place
            elif not is_embedding(self.run.probe.model, name):
                raise UnsupportedModelError(
                    f"{name}: of the trainable tokens none was added to the tokenizer's vocabulary and occurs in no "
                    "safety sample, so none could learn; name new tokens in trainable_token_indices, or leave it out"
                )
        return places

    def _tokens_of(self, name: str) -> Sequence[int] | None:
        """Which token each row of a parameter is, if its rows are tokens."""
        model: Any = self.run.probe.model
        layer, _, adapter = name.partition(".trainable_tokens_delta.")
        if adapter:
            tokens: Sequence[int] = model.get_submodule(layer).token_indices[adapter]
            return tokens
        part = self.run.sharding.parts.get(name)
        return range(part.shape[0]) if part is not None and is_embedding(model, name) else None

    def _columns_beside(self, held: Sequence[int]) -> dict[str, Tensor]:
        """By lora_A of an embedding, the tokens that are not held: the others' columns are zero and stay."""
        sharding, places = self.run.sharding, {}
        used = torch.tensor(held, dtype=torch.long)
        for name in self._others:
            if ".lora_embedding_A." not in name or name not in sharding.parts:
                continue
            if sharding.split:
                raise UnsupportedSetupError(
                    f"{name}: LoRA on an embedding is not supported with FSDP2 or DeepSpeed; leave it out of "
                    "target_modules, or launch with DDP"
                )
            A = self._piece(name, sharding.parts[name].holder.detach())
            here = used[used < len(A)].to(A.device)
            if bool(A[here].any()):
                raise UnsupportedModelError(
                    f"{name}: LoRA on this embedding changes tokens of the held prompts already, so their answers are "
                    "not the aligned model's; begin it with init_lora_weights=True, or leave it out of target_modules"
                )
            free = torch.ones(len(A), dtype=torch.bool)
            free[here.cpu()] = False
            places[name] = free.nonzero().flatten()
        return places

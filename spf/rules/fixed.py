"""Parameters that are no matrices on an input: kept as they are, but for rows of tokens added to the vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spf.matrices import is_embedding
from spf.run import Run


class Fixed:
    """Keeps a run's other parameters at their values over each step.

    new_tokens: ids whose embeddings may learn.
    """

    def __init__(self, run: Run, new_tokens: Sequence[int]):
        self.run = run
        self._values: dict[str, Tensor] = {}
        self._moving: dict[str, Tensor] = {}
        self._new_rows = self._rows_of(new_tokens)
        self._start = self._checksums()

    @property
    def learning_rows(self) -> bool:
        """Whether there are rows that learn."""
        return bool(self._new_rows)

    def before_step(self, here: set[str]) -> None:
        """Drop gradients, and remember the values of what the optimizer will change all the same."""
        sharding = self.run.sharding
        for name, parameter in self.run.others.items():
            if name in self._new_rows and name in here:
                self._keep_all_but_new_rows(name)
            elif not sharding.flat:
                # Without a gradient the optimizer skips it, decay and momentum included.
                parameter.grad = None
            elif name in here:
                part = sharding.parts[name]
                self._values[name] = part.piece(part.holder.detach()).clone()

    def _keep_all_but_new_rows(self, name: str) -> None:
        """Rows of tokens added to the vocabulary learn from their first gradient on; all others stay as they are."""
        part = self.run.sharding.parts[name]
        if part.holder.grad is None:
            return
        gradient, place = part.piece(part.holder.grad), self._new_rows[name].to(part.holder.device)
        own = gradient[place]
        gradient.zero_()
        gradient[place] = own
        self._moving[name] = self._moving.get(name, torch.zeros_like(own, dtype=torch.bool)) | (own != 0)
        self._values[name] = part.piece(part.holder.detach()).clone()

    def after_step(self) -> None:
        """Put the values back."""
        for name, values in self._values.items():
            part = self.run.sharding.parts[name]
            now = part.piece(part.holder.detach())
            if name in self._moving:
                place = self._new_rows[name].to(now.device)
                values[place] = torch.where(self._moving[name], now[place], values[place])
            now.copy_(values)
        self._values = {}

    def changed(self) -> list[str]:
        """Those that are not what they were when the run began, over all processes."""
        now = self._checksums()
        differ = [(now[name] != self._start[name]).float().reshape(()) for name in now]
        return [name for name, count in zip(now, self.run.total(differ), strict=True) if count > 0]

    def _checksums(self) -> dict[str, Tensor]:
        """The sum of a parameter's bits in this process, as whole numbers: any one that changes shows."""
        sums = {}
        for name in self.run.others:
            part = self.run.sharding.parts.get(name)
            if part is None:
                continue
            values = part.piece(part.holder.detach())
            if name in self._new_rows:
                values = values.index_fill(0, self._new_rows[name].to(values.device), 0)
            whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()]
            sums[name] = values.contiguous().view(whole).sum(dtype=torch.int64)
        return sums

    def _rows_of(self, tokens: Sequence[int]) -> dict[str, Tensor]:
        """By embedding, where its rows of these tokens are: rows of this process's part, or flat entries of it."""
        places = {}
        for name in self.run.others:
            part = self.run.sharding.parts.get(name)
            if part is None or not is_embedding(self.run.probe.model, name):
                continue
            height, columns = part.shape
            rows = torch.tensor([token for token in tokens if token < height], dtype=torch.long)
            if part.offset is None:
                place = rows[(rows >= part.rows.start) & (rows < part.rows.stop)] - part.rows.start
            else:
                entries = (rows[:, None] * columns + torch.arange(columns)).flatten() - part.start
                place = entries[(entries >= 0) & (entries < part.size)]
            if len(rows):
                places[name] = place
        return places

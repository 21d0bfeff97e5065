"""Which part of a parameter this process updates, and the rectangles of the matrix that it consists of.

Every part is a contiguous range of the parameter's flattened entries: all of it (one process, DDP), whole rows (FSDP2),
or any range (ZeRO). Cut into blocks, views of what the optimizer holds, it lets a step rule be one formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Block:
    """The rectangle [rows, columns] of a matrix, and its entries: a view (r, c), so in-place changes arrive.

    cut: it is a piece of one row, the rest of which another process holds.
    """

    rows: slice
    columns: slice
    tensor: Tensor
    cut: bool = False


@dataclass(frozen=True)
class Part:
    """This process's part of a parameter: `size` entries from `start` on of the parameter flattened.

    holder: the tensor that the optimizer steps, the parameter itself or DeepSpeed's flat fp32 partition,
    in which the part begins at `offset`. shape: the whole parameter's. cut_rows: rows (of a matrix) that a
    border between two processes cuts, the same list on every process. among: of a matrix that is one of many in its
    parameter, its place there; shape is then the matrix's own.
    """

    parameter: nn.Parameter
    holder: Tensor
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int | None = None
    cut_rows: tuple[int, ...] = ()
    among: int | slice | None = None

    @property
    def rows(self) -> slice:
        """The rows of the matrix that the part has entries of."""
        columns = self.shape[1]
        return slice(self.start // columns, -(-(self.start + self.size) // columns) if self.size else 0)

    @property
    def owned(self) -> slice:
        """The rows whose first entry is in the part: every row is owned by one process."""
        columns = self.shape[1]
        return slice(-(-self.start // columns), self.rows.stop)

    def piece(self, tensor: Tensor) -> Tensor:
        """The part of the holder, its gradient or its optimizer state: flat, or the matrix's rows; a view."""
        if self.offset is not None:
            return tensor[self.offset : self.offset + self.size]
        own = local(tensor)
        return own if self.among is None else own[self.among]

    def one_of_many(self, among: int | slice) -> "Part":
        """The part of a matrix that is one of many in this parameter, all of which is in this process."""
        shape = tuple(self.parameter[among].shape)
        return replace(self, shape=shape, size=torch.Size(shape).numel(), among=among)

    def blocks(self, tensor: Tensor, transposed: bool = False) -> list[Block]:
        """The rectangles that the part consists of: the whole rows, and a piece of a row at either end."""
        columns = self.shape[1]
        piece = self.piece(tensor)
        if self.offset is None:
            whole = piece.T if transposed else piece
            rows = slice(0, len(whole)) if transposed else self.rows
            return [Block(rows, slice(0, whole.shape[1]), whole)] if whole.numel() else []
        blocks, at, end = [], self.start, self.start + self.size
        while at < end:
            row, column = divmod(at, columns)
            stop = end - end % columns if column == 0 and end - at >= columns else min(end, (row + 1) * columns)
            entries = piece[at - self.start : stop - self.start]
            if column == 0 and (stop - at) % columns == 0:
                blocks.append(Block(slice(row, stop // columns), slice(0, columns), entries.view(-1, columns)))
            else:
                used = slice(column, column + stop - at)
                blocks.append(Block(slice(row, row + 1), used, entries.view(1, -1), cut=True))
            at = stop
        return blocks


def flat_part(
    parameter: nn.Parameter,
    shape: tuple[int, ...],
    holder: Tensor,
    low: int,
    high: int,
    shift: int,
    borders: Sequence[int],
) -> Part:
    """The part [low, high) of a flattened parameter, as far as it exists; entry e lies at e + shift in the holder.

    borders: the entries at which the parts of two processes meet.
    """
    numel = int(torch.Size(shape).numel())
    start = min(max(low, 0), numel)
    size = max(min(high, numel) - start, 0)
    columns = shape[-1] if len(shape) > 1 else 1
    cut = sorted({b // columns for b in borders if 0 < b < numel and b % columns})
    return Part(parameter, holder, shape, start if size else 0, size, start + shift if size else 0, tuple(cut))


def is_cut(tensor: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism has cut it up, so that this process sees a part."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

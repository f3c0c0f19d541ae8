"""An adapter's factors in memory, and their effect on a few rows of a weight.

A target weight is W + s·B·A (arXiv 2106.09685). The product is computed in tiles of whole rows
counted from the first, whatever is asked for, so that its bits don't depend on the caller's
buffers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusechat_merge.inputs.stored import Stored, part_of
from fusechat_merge.inputs.update import TILE, LowRank, Strided, Update

Read = Callable[[Stored], Tensor]


class Factors:
    """What changes one weight, in a device's memory, float32.

    Args:
        update: what to change.
        read: reads a stored tensor whole.
        weight: the base's, whose rows' lengths (DoRA) or first factors (PiSSA, OLoRA) matter.
        device: where to compute.
    """

    def __init__(
        self,
        update: Update,
        read: Read,
        weight: Stored,
        device: torch.device | str = "cpu",
    ) -> None:
        self._columns, self._by_row = update.columns, update.by_row
        self._taken: _Product | None = None
        if update.taken:
            left, right = _taken(update, _wide(weight, read))
            self._taken = _Product(left.to(device), right.to(device), -1.0)
            self._rounding = read(part_of(weight, 0, (0,))).dtype
        self._products = [_product(low_rank, read, device) for low_rank in update.low_ranks]
        self._rows = torch.tensor(update.rows, device=device)
        self._values = _wide(update.values, read).to(device) if update.values else None
        self._factors: Tensor | None = None
        if update.magnitude:
            lengths = self._lengths(weight, read, device)
            magnitude = _wide(update.magnitude, read).view(-1).to(device)
            self._factors = magnitude / lengths.to(torch.float32)

    def apply(self, flat: Tensor, start: int) -> None:
        """Change `flat` [n], the weight's elements from number `start` on, float32, in place."""
        self._add(flat, start)
        if self._factors is not None:
            for first in range(0, flat.numel(), TILE):
                piece = flat[first : first + TILE]
                piece.mul_(self._factors[self._places(start + first, piece)])
        if self._values is not None:
            columns = self._columns
            end = start + flat.numel()
            for row, values in zip(self._rows.tolist(), self._values, strict=True):
                low, high = max(start, row * columns), min(end, (row + 1) * columns)
                if low < high:
                    flat[low - start : high - start] = values[low - row * columns :][: high - low]

    def _add(self, flat: Tensor, start: int) -> None:
        if self._taken is not None:
            # Training started from the base's weight without them, in the base's own dtype.
            self._taken.add_to(flat, start)
            flat.copy_(flat.to(self._rounding))
        for product in self._products:
            product.add_to(flat, start)

    def _places(self, start: int, flat: Tensor) -> Tensor:
        """For each element, the number of its row, or of its column."""
        numbers = torch.arange(start, start + flat.numel(), device=flat.device)
        return numbers // self._columns if self._by_row else numbers % self._columns

    def _lengths(self, weight: Stored, read: Read, device: torch.device | str) -> Tensor:
        """Euclidean lengths of the rows (or columns) of the weight with what was added."""
        columns = self._columns
        rows = weight.numel // columns
        squares = torch.zeros(rows if self._by_row else columns, dtype=torch.float64, device=device)
        step = max(1, TILE // columns)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            tile = part_of(weight, row * columns, (count * columns,))
            flat = _wide(tile, read).to(device)
            self._add(flat, row * columns)
            matrix = flat.view(count, columns).to(torch.float64).square_()
            if self._by_row:
                squares[row : row + count] = matrix.sum(1)
            else:
                squares += matrix.sum(0)
        return squares.sqrt_()


class _Product:
    """scale · left [matrices, rows, r] · right [matrices, r, columns] of consecutive matrices."""

    def __init__(self, left: Tensor, right: Tensor, scale: float, first: int = 0) -> None:
        self._left, self._right, self._scale, self._first = left, right, scale, first

    def add_to(self, flat: Tensor, start: int) -> None:
        """Add the weight's elements from number `start` on to `flat` [n]."""
        matrices, rows, _ = self._left.shape
        columns = self._right.shape[2]
        size = rows * columns
        tile = max(1, TILE // columns)
        start -= self._first
        end = start + flat.numel()
        for number in range(max(0, start // size), min(matrices, -(-end // size))):
            at = number * size
            # The rows of this matrix that are asked for, from the beginning of a tile on.
            first_row = max(0, start - at) // columns // tile * tile
            last_row = min(rows, -(-(end - at) // columns))
            for row in range(first_row, last_row, tile):
                update = self._left[number, row : row + tile] @ self._right[number]
                update = update.mul_(self._scale).view(-1)
                first = at + row * columns
                low, high = max(first, start), min(first + update.numel(), end)
                flat[low - start : high - start].add_(update[low - first : high - first])


def _product(low_rank: LowRank, read: Read, device: torch.device | str) -> _Product:
    left = _strided(low_rank.left, read)
    right = _strided(low_rank.right, read) if low_rank.right else torch.ones(1, 1, 1)
    return _Product(left.to(device), right.to(device), low_rank.scale, low_rank.first)


def _strided(view: Strided, read: Read) -> Tensor:
    part = read(part_of(view.stored, view.offset, (view.span,)))
    return part.as_strided(view.shape, view.strides).to(torch.float32).contiguous()


def _wide(stored: Stored, read: Read) -> Tensor:
    return read(stored).to(torch.float32, copy=True)


def _taken(update: Update, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of s·B·A with which training began, as peft finds them in the weight [n]."""
    (low_rank,) = update.low_ranks
    (_, out, r), columns = low_rank.left.shape, low_rank.columns
    matrix = weight.view(out, columns)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        if update.taken == "pissa":
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            return (u[:, :r] * s[:r]).clone()[None], v[:r].clone()[None]
        q, upper = torch.linalg.qr(matrix)
        return (low_rank.scale * q[:, :r]).clone()[None], upper[:r].clone()[None]
    finally:
        torch.set_num_threads(threads)

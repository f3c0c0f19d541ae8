"""What an adapter changes of one weight, as data: which stored factors, and where they apply."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fusechat_merge.inputs.stored import ITEM_BITS, Stored

TILE = 1 << 17
"""Elements of a weight that are changed at once, or one row where that is more."""


@dataclass(frozen=True)
class Strided:
    """Elements of a stored tensor at regular distances, counted in elements.

    Attributes:
        stored: the whole tensor.
        offset: of the first element.
        shape, strides: as in `torch.as_strided`.
    """

    stored: Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the stored tensor from the first to the last."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    @property
    def nbytes(self) -> int:
        """Memory that it takes in float32, and the stored range while it is read."""
        return self.span * ITEM_BITS[self.stored.dtype] // 8 + 4 * math.prod(self.shape)

    def at(self, axis: int, first: int, count: int) -> Strided:
        """`count` indices of one axis, from `first` on."""
        shape = (*self.shape[:axis], count, *self.shape[axis + 1 :])
        return replace(self, offset=self.offset + first * self.strides[axis], shape=shape)

    @property
    def transposed(self) -> Strided:
        """The last two axes exchanged."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        strides = (*self.strides[:-2], self.strides[-1], self.strides[-2])
        return replace(self, shape=shape, strides=strides)


@dataclass(frozen=True)
class LowRank:
    """scale · left · right, added to consecutive matrices of a weight.

    Attributes:
        left: [matrices, rows, r].
        right: [matrices, r, columns]; None for ones [1, 1, 1], so that `left` itself is added.
        scale: α / r, or α / √r with rsLoRA.
        first: the weight's element with which the first matrix begins.
    """

    left: Strided
    right: Strided | None
    scale: float
    first: int = 0

    @property
    def columns(self) -> int:
        return self.right.shape[2] if self.right else 1

    @property
    def nbytes(self) -> int:
        """Memory that both factors take."""
        return self.left.nbytes + (self.right.nbytes if self.right else 4)

    def within(self, first: int, numel: int) -> LowRank | None:
        """What is added to `numel` elements from number `first` on, which are whole rows.

        The elements are part of one matrix, or whole matrices, or all of them.
        """
        matrices, rows, _ = self.left.shape
        size = rows * self.columns
        low = max(first, self.first)
        high = min(first + numel, self.first + matrices * size)
        if low >= high:
            return None
        number, row = divmod((low - self.first) // self.columns, rows)
        count = (high - low) // self.columns
        whole = max(1, count // rows)
        left = self.left.at(0, number, whole).at(1, row, min(count, rows))
        right = self.right.at(0, number, whole) if self.right else None
        assert whole * min(count, rows) * self.columns == high - low, "rows of several matrices"
        return LowRank(left, right, self.scale, low - first)


@dataclass(frozen=True)
class Update:
    """What an adapter changes of one weight; in this order.

    Attributes:
        taken: `pissa` or `olora`: the matrix whose first factors, found from the base's weight as
            peft finds them, are taken out of it before anything is added.
        low_ranks: what is added.
        magnitude: DoRA's, by which every row (or column) is then scaled to this length.
        by_row: whether `magnitude` is of rows; else of columns.
        columns: of the weight, where rows or their lengths matter.
        rows: numbers of rows that are replaced.
        values: by these [rows, columns].
    """

    low_ranks: tuple[LowRank, ...] = ()
    taken: str | None = None
    magnitude: Stored | None = None
    by_row: bool = True
    columns: int = 0
    rows: tuple[int, ...] = ()
    values: Stored | None = None

    def scratch(self, numel: int, itemsize: int) -> int:
        """Memory that the factors take for a weight of so many elements of `itemsize` bytes."""
        factors = sum(low_rank.nbytes for low_rank in self.low_ranks)
        total = 2 * factors if self.taken else factors
        for stored in (self.magnitude, self.values):
            if stored is not None:
                total += 12 * stored.numel
        if self.magnitude is not None:
            total += max(TILE, self.columns) * (itemsize + 12)
        if self.taken:
            total += numel * (itemsize + 4 * 6)
        return total

    def within(self, first: int, numel: int) -> Update:
        """The update of `numel` elements from number `first` on, one or more whole matrices."""
        cut = (low_rank.within(first, numel) for low_rank in self.low_ranks)
        return replace(self, low_ranks=tuple(low_rank for low_rank in cut if low_rank))

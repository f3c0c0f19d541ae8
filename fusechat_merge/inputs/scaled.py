"""Matrices stored as narrow codes with a scale for every block, dequantised when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.inputs.stored import ITEM_BITS, Location, ReadAt

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CODES: dict[str, torch.dtype | tuple[float, ...]] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F4": (*_E2M1, *(-value for value in _E2M1)),
    "I4": tuple(float(code - 8) for code in range(16)),
}
"""What codes stand for: torch's dtype, or of 4 bits, the lower half of a byte first, the values."""

SCALES: dict[str, torch.dtype] = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8,
}  # fmt: skip
"""torch's dtype of scales; bytes are exponents, as in F8_E8M0."""

_PIECE = 1 << 15
_BYTES = 40  # of one element while it is dequantised, all arrays together
_RAW = 1 << 18  # bytes of whole rows that are read for some of their columns


@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor whose elements are a code times the scale of the code's block.

    The product is computed in float32 and rounded once to `dtype`, as transformers does.

    Attributes:
        codes: the bytes of one for each element, in the same order; rows may end in unused bytes.
        coding: what they stand for, a key of `CODES`.
        scales: [..., rows, columns] of blocks, or a single one.
        shape: [..., rows, columns]; as many matrices as `scales` has.
        block: rows and columns of a matrix that share a scale; at its ends they may be fewer.
        dtype: of the elements as they are read, safetensors' name.
    """

    codes: Location
    coding: str
    scales: Location
    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        itemsize = ITEM_BITS[self.dtype] // 8
        columns = self.shape[-1]
        while into.nbytes:
            row, column = divmod(first, columns)
            left = min(into.nbytes // itemsize, _PIECE)
            # Whole rows, as many as a piece has; else a part of one row.
            rows = range(row, row + max(left // columns, 1) if column == 0 else row + 1)
            within = range(column, min(column + left, columns))
            values = self._values(read_at, rows, within)
            size = values.numel() * itemsize
            written = torch.frombuffer(into[:size], dtype=SCALES[self.dtype])
            written.view_as(values).copy_(values)
            into, first = into[size:], first + values.numel()

    def read_columns(self, read_at: ReadAt, columns: range, into: memoryview) -> None:
        """Fill `into` with some columns of all rows, row after row."""
        total = self.numel // self.shape[-1]
        size = len(columns) * ITEM_BITS[self.dtype] // 8
        step = max(1, min(_PIECE // len(columns), _RAW * total // self.codes.nbytes))
        for first in range(0, total, step):
            rows = range(first, min(first + step, total))
            written = torch.frombuffer(into[: len(rows) * size], dtype=SCALES[self.dtype])
            written.view(len(rows), -1).copy_(self._values(read_at, rows, columns))
            into = into[len(rows) * size :]

    def _values(self, read_at: ReadAt, rows: range, columns: range) -> Tensor:
        """The elements of some rows, counted through all matrices, and columns, in float32."""
        coding = CODES[self.coding]
        each = 2 if isinstance(coding, tuple) else 1  # codes in a byte
        stride = self.codes.nbytes * self.shape[-1] // self.numel
        low, high = columns.start // each, -(-columns.stop // each)
        # Bytes of one row are read alone; of several, whole rows at once and then cut.
        first, number = (low, high - low) if len(rows) == 1 else (0, len(rows) * stride)
        raw = np.empty(number, np.uint8)
        self.codes.read(read_at, rows.start * stride + first, raw.data)
        codes = torch.from_numpy(raw.reshape(len(rows), -1)[:, low - first : high - first])
        if isinstance(coding, tuple):
            values = _pairs(coding).index_select(0, codes.reshape(-1).int())
            skip = columns.start - low * each
            values = values.view(len(rows), -1)[:, skip : skip + len(columns)]
        else:
            values = codes.view(coding).float()
        return values.mul_(self._scales(read_at, rows, columns))

    def _scales(self, read_at: ReadAt, rows: range, columns: range) -> Tensor:
        """The scale of each of these elements: [rows, columns], or [rows, 1] for one a row."""
        high, wide = self.block
        across = -(-self.shape[-1] // wide)
        # In which row of blocks each row is; every matrix begins with a new one.
        number = torch.arange(rows.start, rows.stop)
        if self.scales.numel == 1:
            number.zero_()
        else:
            down = -(-self.shape[-2] // high)
            number = number // self.shape[-2] * down + number % self.shape[-2] // high
        first, last = int(number[0]), int(number[-1]) + 1
        dtype = SCALES[self.scales.dtype]
        raw = torch.empty((last - first) * across * dtype.itemsize, dtype=torch.uint8)
        self.scales.read(read_at, first * across, raw.numpy().data)
        table = raw.view(dtype).view(-1, across)
        begin, end = columns.start // wide, -(-columns.stop // wide)
        scales = table[:, begin:end].float()
        if dtype == torch.uint8:
            scales = (scales - 127).exp2()
        scales = scales.index_select(0, number - first)
        if end - begin == 1:
            return scales
        skip = columns.start - begin * wide
        return scales.repeat_interleave(wide, 1)[:, skip : skip + len(columns)]

    def locations(self) -> Iterator[Location]:
        yield self.codes
        yield self.scales

    def scratch(self, n: int) -> int:
        return _BYTES * min(n, _PIECE) + _RAW + 8 * self.shape[-1]


@cache
def _pairs(values: tuple[float, ...]) -> Tensor:
    """What both halves of every byte stand for, [256, 2]."""
    table = torch.tensor(values)
    byte = torch.arange(256)
    return torch.stack([table[byte % 16], table[byte // 16]], 1)

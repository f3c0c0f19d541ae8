"""Where a tensor's values lie in files, and how any range of them is read.

A checkpoint's tensors are presented under the names and in the layout of the base's files, whatever
their own are. So a tensor may be one range of bytes, several ranges one after the other (experts
that another checkpoint stacks), or matrices stored transposed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np

ITEM_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element, by safetensors' name of the dtype."""

ReadAt = Callable[[str, int, memoryview], None]
"""Fills a buffer with a file's bytes from an offset on; OSError where the file ends before."""


class Stored(Protocol):
    """A tensor in files.

    Attributes:
        dtype: of its values as they are read, safetensors' name.
        shape: its sizes; elements are counted in row-major order.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        """Fill `into` (bytes, whole elements) from element `first` on."""

    def locations(self) -> Iterator[Location]:
        """The ranges of bytes that hold it."""

    def scratch(self, n: int) -> int:
        """Bytes that reading n elements takes in memory besides the buffer that is filled."""


@runtime_checkable
class Strips(Protocol):
    """A tensor of which columns can be read at once."""

    def read_columns(self, read_at: ReadAt, columns: range, into: memoryview) -> None:
        """Fill `into` with some columns of all rows, row after row."""


@dataclass(frozen=True, slots=True)
class Location:
    """One range of bytes.

    Attributes:
        file: name within the checkpoint's folder, or an adapter's path.
        offset: of its first byte, counted from the start of the file.
        nbytes: its bytes.
        dtype: safetensors' name, such as `BF16`.
        shape: as stored.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.nbytes * 8 // ITEM_BITS[self.dtype]

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        read_at(self.file, self.offset + first * ITEM_BITS[self.dtype] // 8, into)

    def locations(self) -> Iterator[Location]:
        yield self

    def scratch(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class Joined:
    """The elements of several tensors, one after the other.

    Attributes:
        parts: all of one dtype.
        shape: of the whole.
    """

    parts: tuple[Stored, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((part.numel for part in self.parts), initial=0))

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        itemsize = ITEM_BITS[self.dtype] // 8
        number = bisect_right(self._starts, first) - 1
        while into.nbytes:
            within = first - self._starts[number]
            size = min((self.parts[number].numel - within) * itemsize, into.nbytes)
            self.parts[number].read(read_at, within, into[:size])
            into, first, number = into[size:], first + size // itemsize, number + 1

    def locations(self) -> Iterator[Location]:
        for part in self.parts:
            yield from part.locations()

    def scratch(self, n: int) -> int:
        return max((part.scratch(min(n, part.numel)) for part in self.parts), default=0)


@dataclass(frozen=True, slots=True)
class Range:
    """Some consecutive elements of a tensor that is no single range of bytes.

    Attributes:
        whole: the tensor.
        first: its element with which the range begins.
        shape: of the range.
    """

    whole: Stored
    first: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * self.numel // max(self.whole.numel, 1)

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        self.whole.read(read_at, self.first + first, into)

    def locations(self) -> Iterator[Location]:
        return self.whole.locations()

    def scratch(self, n: int) -> int:
        return self.whole.scratch(n)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix whose rows are the columns of the stored one.

    Attributes:
        stored: [columns, rows].
    """

    stored: Stored

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def numel(self) -> int:
        return self.stored.numel

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def read(self, read_at: ReadAt, first: int, into: memoryview) -> None:
        rows, columns = self.shape
        itemsize = ITEM_BITS[self.dtype] // 8
        item = np.dtype(f"V{itemsize}")
        end = first + into.nbytes // itemsize
        low, high = first // columns, -(-end // columns)
        # The same part of every stored row: rows low to high of this matrix, still transposed.
        strip = np.empty((columns, high - low), item)
        if isinstance(self.stored, Strips):
            whole = strip.reshape(-1).view(np.uint8).data
            self.stored.read_columns(read_at, range(low, high), whole)
        else:
            for column in range(columns):
                self.stored.read(read_at, column * rows + low, strip[column].view(np.uint8).data)
        skip = first - low * columns
        wanted = np.ascontiguousarray(strip.T).reshape(-1)[skip : skip + end - first]
        np.frombuffer(into, item)[:] = wanted

    def locations(self) -> Iterator[Location]:
        return self.stored.locations()

    def scratch(self, n: int) -> int:
        columns = self.shape[1]
        elements = (n // columns + 2) * columns
        return 2 * elements * ITEM_BITS[self.dtype] // 8 + self.stored.scratch(elements)


def part_of(whole: Stored, first: int, shape: tuple[int, ...]) -> Stored:
    """Consecutive elements of a tensor, from number `first` on, as a tensor of this shape."""
    if not isinstance(whole, Location):
        return Range(whole, first, shape)
    bits = ITEM_BITS[whole.dtype]
    at = whole.offset + first * bits // 8
    return Location(whole.file, at, math.prod(shape) * bits // 8, whole.dtype, shape)

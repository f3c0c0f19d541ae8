"""The fixed grid on which every merge method computes, whatever feeds it.

A tensor's elements, counted from its first, fall into cells of `BLOCK`. Sums are handed on as
one float64 per half cell, so neither the size of a caller's buffers nor the number of threads can
change a bit of a result. Work goes in strips of some cells: few enough that scratch stays in the
processor's cache, enough that the threads, which run a strip each, seldom wait for the
interpreter's lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Barrier
from typing import Protocol, TypeVar

import torch
from torch import Tensor

BLOCK = 1 << 15
HALF = BLOCK // 2
STRIP = 8
"""Cells in a strip."""
_ACCELERATOR_STRIP = 1 << 22
_TASK = 64 * BLOCK

T = TypeVar("T")


class NonFiniteError(ValueError):
    """An input holds NaN or Inf. `target` is the target's index, None for the base."""

    def __init__(self, target: int | None) -> None:
        self.target = target
        super().__init__(f"{'base' if target is None else f'target {target}'} holds NaN or Inf")


@dataclass(frozen=True)
class Block:
    """Consecutive elements of one tensor in every model.

    Attributes:
        start: number of the first element, a multiple of `BLOCK`.
        base: [n] contiguous, any floating dtype.
        targets: K tensors [n] on base's device, contiguous, any floating dtype each.
    """

    start: int
    base: Tensor
    targets: tuple[Tensor, ...]

    def strips(self) -> Iterator[Block]:
        """The block cut into strips of whole cells (but for the tensor's last)."""
        size = BLOCK * STRIP if self.base.device.type == "cpu" else _ACCELERATOR_STRIP
        return self.split(size) if self.base.numel() > size else iter((self,))

    def split(self, size: int) -> Iterator[Block]:
        """The block cut after every `size` elements, a multiple of `BLOCK`."""
        n = self.base.numel()
        for i in range(0, n, size):
            j = min(i + size, n)
            yield Block(self.start + i, self.base[i:j], tuple(t[i:j] for t in self.targets))

    def part(self, out: Tensor, strip: Block) -> Tensor:
        """The elements of `out`, the block's output, that are the strip's."""
        first = strip.start - self.start
        return out[first : first + strip.base.numel()]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32 for 16-bit inputs; float64 for wider ones, so that float32 rounds just once."""
        narrow = {torch.bfloat16, torch.float16}
        wide = {self.base.dtype, *(t.dtype for t in self.targets)} - narrow
        return torch.float64 if wide else torch.float32

    def raise_if_not_finite(self) -> None:
        """Raise NonFiniteError for the first input that holds NaN or Inf."""
        for index, tensor in enumerate((self.base, *self.targets)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(index - 1 if index else None)


class Passes(Protocol):
    """One tensor of every model, readable from first to last element as often as a method asks."""

    @property
    def count(self) -> int:
        """Number of targets, K."""

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        """`fn` of every block; the results in element order."""

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        """Let `fn` fill the output of every block: [n] of the inputs' promoted dtype."""


class InMemory:
    """Passes over whole tensors.

    Args:
        base: any shape, floating.
        targets: tensors of base's shape and device.

    Raises:
        ValueError: shapes differ, or a tensor isn't floating.
    """

    def __init__(self, base: Tensor, targets: Sequence[Tensor]) -> None:
        dtype = base.dtype
        for index, tensor in enumerate((base, *targets)):
            name = f"target {index - 1}" if index else "the base"
            if tensor.shape != base.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the base {tuple(base.shape)}"
                )
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{name} is {kind}: only floating-point tensors can be merged")
            dtype = torch.promote_types(dtype, tensor.dtype)
        self.count = len(targets)
        whole = Block(0, base.detach().reshape(-1), tuple(t.detach().reshape(-1) for t in targets))
        self._blocks = list(whole.split(_TASK)) if base.device.type == "cpu" else [whole]
        self._shape = base.shape
        self._out = torch.empty(base.numel(), dtype=dtype, device=base.device)

    @property
    def output(self) -> Tensor:
        """What `write` has written, in the base's shape and the inputs' promoted dtype."""
        return self._out.view(self._shape)

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        if len(self._blocks) == 1:
            return map(fn, self._blocks)
        return workers(torch.get_num_threads()).map(fn, self._blocks)

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        def fill(block: Block) -> None:
            fn(block, self._out[block.start : block.start + block.base.numel()])

        for _ in self.map(fill):
            pass


@lru_cache(maxsize=1)
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that run a block each, in which torch's operations use no further threads."""
    before = torch.get_num_threads()
    started = Barrier(threads)
    pool = ThreadPoolExecutor(threads, "merge", torch.set_num_threads, (1,))
    for _ in pool.map(lambda _: started.wait(), range(threads)):
        pass
    torch.set_num_threads(before)  # else every thread to come would inherit the workers' 1
    return pool


class _Scratch(threading.local):
    """Buffers kept from strip to strip: page faults on fresh ones cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised [n] of `dtype`, n as in `like`, on its device."""
        key = (slot, dtype, like.device)
        buffer = self._buffers.get(key)
        n = like.numel()
        if buffer is None or buffer.numel() < n:
            size = max(n, BLOCK)
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer if buffer.numel() == n else buffer[:n]


scratch = _Scratch()


def half_cell_sums(columns: Iterable[Tensor]) -> list[list[float]]:
    """Σ of float64 values per half cell, the same at every thread count: one list a column.

    torch splits one sum of `BLOCK` elements or more between its threads, hence the halves.

    Args:
        columns: float64 [n] each, which may share their memory: each is summed when it comes.
    """
    sums = []
    for values in columns:
        n = values.numel()
        if n % HALF == 0:
            sums.append(values.view(-1, HALF).sum(1))
        else:
            whole = n // HALF * HALF
            last = values[whole:].sum().view(1)
            sums.append(torch.cat((values[:whole].view(-1, HALF).sum(1), last)))
    return torch.stack(sums).tolist() if sums else []


def add_up(blocks: Iterable[Sequence[Sequence[float]]], count: int) -> list[float]:
    """The `count` columns' sums over all blocks, correctly rounded and so free of any order."""
    columns: list[list[float]] = [[] for _ in range(count)]
    for block in blocks:
        for column, values in zip(columns, block, strict=True):
            column += values
    return [math.fsum(column) for column in columns]

"""The fixed grid on which every merge method computes, whatever feeds it.

A tensor's elements, counted from its first, fall into cells of ``BLOCK``. Sums are handed on as one
float64 a cell, so neither the size of a caller's buffers nor the number of threads can change a bit
of a result. Work goes in strips of one cell a thread, which torch hands out just so: each thread
works on a cell that stays in its own cache. (Python threads would spend their time passing the
interpreter's lock around: an operation on one cell takes some 5 µs.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

BLOCK = 1 << 15
_CUDA_STRIP = 1 << 22
_MOST_CELLS = 32

T = TypeVar("T")


class NonFiniteError(ValueError):
    """An input holds NaN or Inf. ``target`` is the target's index, None for the base."""

    def __init__(self, target: int | None) -> None:
        self.target = target
        super().__init__(f"{'base' if target is None else f'target {target}'} holds NaN or Inf")


@dataclass(frozen=True)
class Block:
    """Consecutive elements of one tensor in every model.

    Attributes:
        start: number of the first element, a multiple of ``BLOCK``.
        base: [n] contiguous, any floating dtype.
        targets: K tensors [n] on base's device, contiguous, any floating dtype each.
    """

    start: int
    base: Tensor
    targets: tuple[Tensor, ...]

    def strips(self) -> Iterator[Block]:
        """The block cut into strips of whole cells (but for the tensor's last)."""
        if self.base.device.type == "cpu":
            size = BLOCK * min(torch.get_num_threads(), _MOST_CELLS)
        else:
            size = _CUDA_STRIP
        n = self.base.numel()
        for i in range(0, n, size):
            j = min(i + size, n)
            yield Block(self.start + i, self.base[i:j], tuple(t[i:j] for t in self.targets))

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
        """``fn`` of every block; the results in element order."""

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        """Let ``fn`` fill the output of every block: [n] of the inputs' promoted dtype."""


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
        self._block = Block(
            0, base.detach().reshape(-1), tuple(t.detach().reshape(-1) for t in targets)
        )
        self._shape = base.shape
        self._out = torch.empty(base.numel(), dtype=dtype, device=base.device)

    @property
    def output(self) -> Tensor:
        """What ``write`` has written, in the base's shape and the inputs' promoted dtype."""
        return self._out.view(self._shape)

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        yield fn(self._block)

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        fn(self._block, self._out)


class _Scratch(threading.local):
    """Buffers kept from strip to strip: page faults on fresh ones cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised [n] of ``dtype``, n as in ``like``, on its device."""
        key = (slot, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            size = max(like.numel(), BLOCK)
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[: like.numel()]


scratch = _Scratch()


def cell_sums(values: Tensor) -> list[float]:
    """Σ of a strip's float64 ``values`` [n] per cell, the same at every thread count.

    torch splits a sum of ``BLOCK`` elements or more between its threads, unless there are several
    sums to hand out; hence the halves, which make several of one cell.
    """
    whole = values.numel() // BLOCK * BLOCK
    sums = []
    if whole:
        halves = values[:whole].view(-1, BLOCK // 2).sum(1).tolist()
        sums = [first + second for first, second in zip(halves[::2], halves[1::2], strict=True)]
    if whole < values.numel():
        sums.append(float(values[whole:].sum()))
    return sums

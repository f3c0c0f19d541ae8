"""One tensor of every model, read from files a segment at a time as often as a method asks.

All memory is allocated once: every worker thread has room for one segment, and each of the few
tensors under way has a lane, where a tensor that fits is kept from its first pass to its last.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fusechat_merge.lora import TILE, Factors
from fusechat_merge.merge_plan import Output, Source
from fusechat_merge.mergekit_loader import DTYPES
from fusechat_merge.methods.blocks import BLOCK, Block

LANES = 2
"""Tensors under way at once: while the last segments of one are written, the next is read."""
_BLOCKS = 8  # as many as a method works on at once
_ALIGN = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Ring:
    """How the memory is divided.

    Attributes:
        threads: worker threads.
        blocks: grid cells in a segment, at most.
        segment: bytes of each worker's buffer.
        scratch: bytes that the methods' own buffers take in each worker, at most.
        lane: bytes of each lane.
        factors: bytes of adapters' factors in each lane, at most.
    """

    threads: int
    blocks: int
    segment: int
    scratch: int
    lane: int
    factors: int = 0

    @property
    def total(self) -> int:
        return self.threads * (self.segment + self.scratch) + LANES * (self.lane + self.factors)


def divide(outputs: Sequence[Output], memory: int, threads: int) -> Ring:
    """Divide ``memory`` bytes for passes over the outputs' sources.

    Half goes to the workers, as much of it as makes them fast; the rest to the lanes.

    Raises:
        ValueError: it is too little for one worker to hold one block of every model.
    """
    shapes = {(_element_bytes(o), _kept_bytes(o), len(o.sources)) for o in outputs}
    block = BLOCK * max((element for element, _, _ in shapes), default=0)
    largest = max((kept for _, kept, _ in shapes), default=0)
    # float64 for every input and some ten intermediate results
    scratch = 8 * BLOCK * (10 + max((count for _, _, count in shapes), default=0))
    gaps = _ALIGN * (2 + 2 * max((count for _, _, count in shapes), default=0))
    each = block + scratch + gaps
    factors = max((_factor_bytes(output) for output in outputs), default=0)
    if factors:
        memory -= LANES * factors
        each += 8 * TILE
        scratch += 8 * TILE
    if each > memory:
        needed = each + LANES * factors
        raise ValueError(f"--memory: at least {-(-needed >> 20)}MiB is needed here")
    # Fewer threads with longer segments: short ones wait for the interpreter's lock.
    threads = max(1, min(threads, memory // 2 // (4 * each)))
    blocks = max(1, min(_BLOCKS, memory // 2 // threads // each))
    segment = blocks * block + gaps
    left = memory - threads * (segment + blocks * scratch)
    return Ring(
        threads, blocks, segment, blocks * scratch, max(0, min(left // LANES, largest)), factors
    )


def _element_bytes(output: Output) -> int:
    """Bytes that one element takes in a worker's buffer, inputs and outputs together."""
    return sum(_input_bytes(source) for source in output.sources) + _output_bytes(output)


def _input_bytes(source: Source) -> int:
    stored, held = DTYPES[source.location.dtype], _held(source)
    return held.itemsize + (stored.itemsize if stored != held else 0)


def _held(source: Source) -> torch.dtype:
    """In which dtype a source is handed on; with an adapter it is not rounded to 16 bits."""
    if source.low_rank is None or source.dtype == torch.float64:
        return source.dtype
    return torch.float32


def _factor_bytes(output: Output) -> int:
    return sum(source.low_rank.nbytes for source in output.sources if source.low_rank)


def _output_bytes(output: Output) -> int:
    cast = output.dtype.itemsize if output.dtype != output.merged_dtype else 0
    return output.merged_dtype.itemsize + cast


def _kept_bytes(output: Output) -> int:
    return sum(_round_up(source.numel * _held(source).itemsize) for source in output.sources)


def _round_up(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


class SourceFiles:
    """The inputs' files, opened once each and read at offsets from any thread."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._descriptors: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def descriptor(self, source: Source) -> int:
        key = (source.model, source.location.file)
        with self._lock:
            if key not in self._descriptors:
                path = self._folders[source.model] / source.location.file
                self._descriptors[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[key]

    def read(self, source: Source, first: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``first`` of the source's tensor on.

        Raises:
            OSError: the file can't be read, or ends too early.
        """
        descriptor, offset = self.descriptor(source), source.location.offset + first
        while into.nbytes:
            count = os.preadv(descriptor, [into], offset)
            if count == 0:
                raise OSError(f"{source.location.file} of {source.model} has become shorter")
            into, offset = into[count:], offset + count

    def factors(self, source: Source) -> Factors | None:
        """What an adapter adds to the source, read whole."""
        low_rank = source.low_rank
        if low_rank is None:
            return None
        tensors = []
        for at in (low_rank.a, low_rank.b):
            raw = torch.empty(at.nbytes, dtype=torch.uint8)
            self.read(replace(source, location=at), 0, raw.numpy().data)
            tensors.append(raw.view(DTYPES[at.dtype]).reshape(at.shape))
        return Factors(low_rank, *tensors)

    def announce(self, source: Source) -> None:
        """Let the system begin to read the whole tensor."""
        at = source.location
        os.posix_fadvise(self.descriptor(source), at.offset, at.nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


class Buffers:
    """The memory of a ring and the threads that work in it."""

    def __init__(self, ring: Ring, files: SourceFiles) -> None:
        self.files = files
        self.threads = ring.threads
        self.step = BLOCK * ring.blocks
        self.lanes = [_Buffer(ring.lane) for _ in range(LANES)]
        self.stopped = threading.Event()
        self._free = deque(_Buffer(ring.segment) for _ in range(ring.threads))
        self._pool = ThreadPoolExecutor(ring.threads, "merge")

    def submit(self, work: Callable[[_Buffer], T]) -> Future[T]:
        return self._pool.submit(self._work, work)

    def _work(self, work: Callable[[_Buffer], T]) -> T:
        if self.stopped.is_set():
            raise InterruptedError("stopped")
        buffer = self._free.pop()
        try:
            return work(buffer)
        finally:
            self._free.append(buffer)

    def close(self) -> None:
        self.stopped.set()
        self._pool.shutdown(cancel_futures=True)


class _Buffer:
    """Plain memory from which typed tensors are cut."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8)
        self._view = self._bytes.numpy().data
        self.size = size

    def cut(self, start: int, numel: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """[numel] of ``dtype`` from byte ``start`` on, and the same memory as bytes."""
        end = start + numel * dtype.itemsize
        return self._bytes[start:end].view(dtype), self._view[start:end]


class FilePasses:
    """Passes over the sources of one output, whose first source is the base.

    Args:
        output: what is made from the sources.
        buffers: memory and threads.
        lane: number of the lane that this tensor may fill.
        writer: (first element, bytes) -> None, called for every segment of the output.
        begin: element from which on to write, a multiple of ``BLOCK``.
        finished: told the element up to which everything is written, from time to time.
    """

    def __init__(
        self,
        output: Output,
        buffers: Buffers,
        lane: int,
        writer: Callable[[int, memoryview], None] | None = None,
        begin: int = 0,
        finished: Callable[[int], None] = lambda element: None,
    ) -> None:
        self.count = len(output.sources) - 1
        self._output, self._buffers, self._writer = output, buffers, writer
        self._begin, self._finished = begin, finished
        self._step = buffers.step
        self._numel = output.numel
        room = buffers.lanes[lane]
        self._kept = room if _kept_bytes(output) <= room.size else None
        self._read: set[int] = set()
        self._factors = [buffers.files.factors(source) for source in output.sources]

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        return self._in_order(lambda start, buffer: fn(self._block(start, buffer)[0]), 0)

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        writer = self._writer
        assert writer is not None, "these passes only read"

        def merge(start: int, buffer: _Buffer) -> int:
            block, used = self._block(start, buffer)
            n = block.base.numel()
            merged, raw = buffer.cut(used, n, self._output.merged_dtype)
            fn(block, merged)
            if self._output.dtype != self._output.merged_dtype:
                used += _round_up(raw.nbytes)
                cast, raw = buffer.cut(used, n, self._output.dtype)
                cast.copy_(merged)
            writer(start, raw)
            return start + n

        for element in self._in_order(merge, self._begin):
            self._finished(element)

    def _in_order(self, work: Callable[[int, _Buffer], T], begin: int) -> Iterator[T]:
        """``work`` of every segment, results in order; a few segments ahead of the reader."""
        waiting: deque[Future[T]] = deque()
        try:
            for start in range(begin, self._numel, self._step):
                waiting.append(self._buffers.submit(partial(work, start)))
                if len(waiting) > 4 * self._buffers.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _block(self, start: int, buffer: _Buffer) -> tuple[Block, int]:
        """The segment from element ``start`` on and how many bytes of ``buffer`` it takes."""
        n = min(self._step, self._numel - start)
        kept, known, used, place = self._kept, start in self._read, 0, 0
        tensors = []
        for source, factors in zip(self._output.sources, self._factors, strict=True):
            stored, held = DTYPES[source.location.dtype], _held(source)
            if kept is not None:
                loaded, raw = kept.cut(place + start * held.itemsize, n, held)
                place += _round_up(source.numel * held.itemsize)
            else:
                loaded, raw = buffer.cut(used, n, held)
                used += _round_up(raw.nbytes)
            if not known:
                if stored == held:
                    self._buffers.files.read(source, start * stored.itemsize, raw)
                else:
                    as_stored, raw = buffer.cut(used, n, stored)
                    used += _round_up(raw.nbytes)
                    self._buffers.files.read(source, start * stored.itemsize, raw)
                    loaded.copy_(as_stored)
                if factors is not None:
                    factors.add_to(loaded, start)
            tensors.append(loaded)
        if kept is not None:
            self._read.add(start)
        return Block(start, tensors[0], tuple(tensors[1:])), used

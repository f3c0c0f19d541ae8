"""One tensor of every model, read from files a segment at a time as often as a method asks.

All memory is allocated once: every thread has a desk with room for one segment. Nothing is kept
from pass to pass: what was read a moment ago comes from the system's cache, at less cost than
writing a tensor to memory of our own and reading it again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from mmap import PAGESIZE
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fusechat_common.system import processors, read_into, will_read
from fusechat_merge.engine.crew import Crew
from fusechat_merge.inputs.lora import TILE, Factors
from fusechat_merge.mergekit_bridge.loader import DTYPES
from fusechat_merge.methods.blocks import BLOCK, STRIP, Block
from fusechat_merge.methods.sce import CANDIDATES
from fusechat_merge.planning.plan import Output, Source

_BLOCKS = 16
_ACCELERATOR_BLOCKS = 128  # few, long copies
_ALIGN = 64
_SELECTING = 3 * 8 * CANDIDATES + (1 << 20)  # candidates, sorted; and counts on their way

T = TypeVar("T")


@dataclass(frozen=True)
class Ring:
    """How the memory is divided.

    Attributes:
        threads: threads, and so segments under way.
        blocks: grid cells in a segment, at most.
        segment: bytes of each thread's buffer.
        scratch: bytes that the methods' own buffers take in each thread, at most; an accelerator
            has them in its own memory.
        more: bytes that adapters' factors and SCE's selection take in each thread, at most.
        device: where to compute.
    """

    threads: int
    blocks: int
    segment: int
    scratch: int
    more: int
    device: torch.device

    @property
    def total(self) -> int:
        return self.threads * (self.segment + self.scratch + self.more)


def divide(
    outputs: Sequence[Output], memory: int, threads: int | None = None, device: str = "cpu"
) -> Ring:
    """Divide ``memory`` bytes between threads, one a processor by default.

    Raises:
        ValueError: it is too little for one thread to hold one block of every model.
    """
    shapes = {(_element_bytes(output), len(output.sources)) for output in outputs}
    block = BLOCK * max((element for element, _ in shapes), default=0)
    sources = max((count for _, count in shapes), default=0)
    on_cpu = device == "cpu"
    # float64 for every input and some ten intermediate results
    scratch = 8 * BLOCK * (10 + sources) if on_cpu else 0
    gaps = _ALIGN * (2 + 2 * sources) + 2 * PAGESIZE
    more = max((_factor_bytes(output) for output in outputs), default=0)
    if more:
        more += 8 * TILE
    if any(output.parameters.get("select_topk", 1.0) < 1.0 for output in outputs):
        more += _SELECTING
    least = block + scratch + gaps + more
    if least > memory:
        raise ValueError(f"--memory: at least {-(-least >> 20)}MiB is needed here")
    threads = threads or processors()
    # Fewer threads with longer segments: short ones wait for the interpreter's lock.
    threads = max(1, min(threads, memory // (4 * (block + scratch) + gaps + more)))
    room = memory // threads - gaps - more
    blocks = max(1, min(_BLOCKS if on_cpu else _ACCELERATOR_BLOCKS, room // (block + scratch)))
    return Ring(
        threads,
        blocks,
        blocks * block + gaps,
        min(blocks, STRIP) * scratch,
        more,
        torch.device(device),
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


def _round_up(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


class SourceFiles:
    """The inputs' files, opened once each and read at offsets from any thread."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._descriptors: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def descriptor(self, source: Source) -> int:
        """Of the source's file, opened by the first who asks."""
        key = (source.model, source.location.file)
        with self._lock:
            if key not in self._descriptors:
                path = self._folders[source.model] / source.location.file
                self._descriptors[key] = os.open(path, os.O_RDONLY)
            return self._descriptors[key]

    def factors(self, source: Source, device: torch.device) -> Factors | None:
        """What an adapter adds to the source, read whole."""
        low_rank = source.low_rank
        if low_rank is None:
            return None
        return Factors(low_rank, lambda at: self._whole(replace(source, location=at)), device)

    def _whole(self, source: Source) -> Tensor:
        at = source.location
        raw = torch.empty(at.nbytes, dtype=torch.uint8)
        _Reader(self, source).read(0, raw.numpy().data)
        return raw.view(DTYPES[at.dtype]).reshape(at.shape)

    def announce(self, source: Source) -> None:
        """Let the system begin to read the whole tensor."""
        at = source.location
        will_read(self.descriptor(source), at.offset, at.nbytes)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


class _Reader:
    """One source of an output: where to read it and in which dtype to hand it on."""

    def __init__(self, files: SourceFiles, source: Source) -> None:
        self._source, self._descriptor = source, files.descriptor(source)
        self._offset = source.location.offset
        self.stored, self.held = DTYPES[source.location.dtype], _held(source)
        self.itemsize = self.stored.itemsize

    def read(self, first: int, into: memoryview) -> None:
        """Fill ``into`` from element ``first`` on.

        Raises:
            OSError: the file can't be read, or ends too early.
        """
        offset = self._offset + first * self.itemsize
        while (count := read_into(self._descriptor, into, offset)) < into.nbytes:
            if count == 0:
                at = self._source.location.file
                raise OSError(f"{at} of {self._source.model} has become shorter")
            into, offset = into[count:], offset + count


class Desk(AbstractContextManager[None]):
    """What one thread works with: room for a segment and, on an accelerator, a stream of its own.

    The streams of several threads let copies in both directions overlap with computing.
    """

    def __init__(self, ring: Ring) -> None:
        on_cpu = ring.device.type == "cpu"
        room = torch.empty(ring.segment, dtype=torch.uint8, pin_memory=not on_cpu)
        self._host = room[-room.data_ptr() % PAGESIZE :]
        self._view = self._host.numpy().data
        self._there = self._host if on_cpu else torch.empty_like(self._host, device=ring.device)
        self._stream = None if on_cpu else torch.cuda.Stream(ring.device)
        self.cut = lru_cache(256)(self._cut)  # segment after segment lies in the same places
        self._entered: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        if self._stream is not None:
            self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)  # type: ignore[arg-type]

    def bytes(self, start: int, size: int) -> memoryview:
        """Bytes on the host."""
        return self._view[start : start + size]

    def _cut(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] of ``dtype`` from byte ``start`` on, where computing happens."""
        return self._there[start : start + numel * dtype.itemsize].view(dtype)

    def upload(self, size: int) -> None:
        """Let the first ``size`` bytes of the host's memory be where computing happens."""
        if self._stream is not None:
            self._there[:size].copy_(self._host[:size], non_blocking=True)

    def download(self, start: int, size: int) -> memoryview:
        """Bytes from where computing happens, once all of it has happened."""
        if self._stream is not None:
            piece = slice(start, start + size)
            self._host[piece].copy_(self._there[piece], non_blocking=True)
            self._stream.synchronize()
        return self.bytes(start, size)


class FilePasses:
    """Passes over the sources of one output, whose first source is the base.

    Args:
        output: what is made from the sources.
        files: where they are read.
        ring: how long a segment is.
        crew: the threads that share the segments.
        writer: (first element, bytes) -> None, called for every segment of the output.
        begin: element from which on to write, a multiple of ``BLOCK``.
        finished: told the element up to which everything is written, from time to time.
    """

    def __init__(
        self,
        output: Output,
        files: SourceFiles,
        ring: Ring,
        crew: Crew[Desk],
        writer: Callable[[int, memoryview], None] | None = None,
        begin: int = 0,
        finished: Callable[[int], None] = lambda element: None,
    ) -> None:
        self.count = len(output.sources) - 1
        self._output, self._crew, self._writer = output, crew, writer
        self._step = BLOCK * ring.blocks
        # Every pass has the same segments, which may have been others before an interruption.
        self._begin, self._finished = begin // self._step * self._step, finished
        self._numel = output.numel
        self._inputs = [
            (_Reader(files, source), files.factors(source, ring.device))
            for source in output.sources
        ]

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        return self._segments(0, lambda start, desk: fn(self._block(start, desk)[0]))

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        writer, output = self._writer, self._output
        assert writer is not None, "these passes only read"

        def merge(start: int, desk: Desk) -> int:
            block, used = self._block(start, desk)
            n = block.base.numel()
            # As far into a page as in the file: so it can go to the disk without being copied.
            written = output.offset + start * output.dtype.itemsize
            place = used + (written - used) % PAGESIZE
            merged = result = desk.cut(place, n, output.dtype)
            if output.dtype != output.merged_dtype:
                merged = desk.cut(_round_up(place + result.nbytes), n, output.merged_dtype)
            fn(block, merged)
            if merged is not result:
                result.copy_(merged)
            writer(start, desk.download(place, result.nbytes))
            return start + n

        for element in self._segments(self._begin, merge):
            self._finished(element)

    def _segments(self, begin: int, work: Callable[[int, Desk], T]) -> Iterator[T]:
        """``work`` of every segment from element ``begin`` on, results in order."""
        count = -(-(self._numel - begin) // self._step)
        return self._crew.pieces(
            count, lambda number, desk: work(begin + number * self._step, desk)
        )

    def _block(self, start: int, desk: Desk) -> tuple[Block, int]:
        """The segment from element ``start`` on and how many bytes of the desk it takes."""
        n = min(self._step, self._numel - start)
        used, places = 0, []
        for reader, _ in self._inputs:
            size = n * reader.itemsize
            reader.read(start, desk.bytes(used, size))
            places.append(used)
            used += _round_up(size)
        desk.upload(used)
        tensors = []
        for (reader, factors), place in zip(self._inputs, places, strict=True):
            tensor = desk.cut(place, n, reader.stored)
            if reader.stored != reader.held:
                tensor = desk.cut(used, n, reader.held).copy_(tensor)
                used += _round_up(tensor.nbytes)
            if factors is not None:
                factors.add_to(tensor, start)
            tensors.append(tensor)
        return Block(start, tensors[0], tuple(tensors[1:])), used

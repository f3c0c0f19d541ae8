"""Reads one tensor of every model from files, a segment at a time, as often as a method asks.

All memory is allocated once: every thread has a desk, buffers for one segment. Nothing is kept from
pass to pass: reading again from the system's cache costs less than a copy in our own memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from mmap import PAGESIZE
from typing import TypeVar

import torch
from torch import Tensor

from fusechat_common.errors import RequestError
from fusechat_common.system import processors, will_read
from fusechat_merge.engine.crew import Crew
from fusechat_merge.inputs.factors import Factors
from fusechat_merge.inputs.stored import ReadAt
from fusechat_merge.inputs.update import TILE, Update
from fusechat_merge.mergekit_bridge.loader import DTYPES, fill, whole
from fusechat_merge.methods.blocks import BLOCK, STRIP, Block
from fusechat_merge.methods.sce import CANDIDATES
from fusechat_merge.planning.plan import Output, Plan, Source

_BLOCKS = 16
_ACCELERATOR_BLOCKS = 128  # few, long copies
_ALIGN = 64
_SELECTING = 3 * 8 * CANDIDATES + (1 << 20)  # sorted candidates, and counts

T = TypeVar("T")


@dataclass(frozen=True)
class Ring:
    """How the memory is divided.

    Attributes:
        threads: number of threads, each working on one segment.
        blocks: most grid cells in a segment.
        segment: bytes of each thread's buffer.
        scratch: most bytes of the methods' own buffers in each thread; an accelerator has them in
            its own memory.
        more: most bytes of adapters' factors and SCE's selection in each thread.
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
    """Divide `memory` bytes between threads, one a processor by default.

    Raises:
        RequestError: it is too little for one thread to hold one block of every model.
    """
    block = BLOCK * max(map(_element_bytes, outputs), default=0)
    # Reading transposed matrices takes memory of its own, within what the segment counts for.
    block += max((s.location.scratch(BLOCK) for o in outputs for s in o.sources), default=0)
    sources = max((len(output.sources) for output in outputs), default=0)
    on_cpu = device == "cpu"
    # float64 for every input and some ten intermediate results
    scratch = 8 * BLOCK * (10 + sources) if on_cpu else 0
    gaps = _ALIGN * (2 + 2 * sources) + 2 * PAGESIZE
    more = max((sum(map(_factor_bytes, output.sources)) for output in outputs), default=0)
    if more:
        more += 8 * TILE
    if any(output.parameters.get("select_topk", 1.0) < 1.0 for output in outputs):
        more += _SELECTING
    least = block + scratch + gaps + more
    if least > memory:
        raise RequestError([f"--memory: at least {-(-least >> 20)}MiB is needed here"])
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
    """Bytes of a segment's buffer for each element: inputs and output, each as stored and as used.

    A dtype that is both is held once.
    """
    pairs = [(DTYPES[source.location.dtype], _held(source)) for source in output.sources]
    pairs.append((output.dtype, output.merged_dtype))
    return sum(dtype.itemsize for pair in pairs for dtype in set(pair))


def _factor_bytes(source: Source) -> int:
    """Memory that an adapter's factors take, and finding them."""
    if source.update is None:
        return 0
    at = source.location
    return _of_part(source, source.update).scratch(at.numel, DTYPES[at.dtype].itemsize)


def _of_part(source: Source, update: Update) -> Update:
    """What an adapter changes of the elements that count: of one matrix of a stack, say."""
    if source.numel == source.location.numel:
        return update
    return update.within(source.first, source.numel)


def _held(source: Source) -> torch.dtype:
    """The dtype in which methods get a source; with an adapter it is not rounded to 16 bits."""
    if source.update is None or source.dtype == torch.float64:
        return source.dtype
    return torch.float32


def _round_up(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


class SourceFiles:
    """The inputs' files, opened once each and read at offsets from any thread."""

    def __init__(self, planned: Plan) -> None:
        self._folders = {name: m.folder for name, m in planned.models.items() if m.folder}
        self._descriptors: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._last = threading.local()

    def _descriptor(self, model: str, file: str) -> int:
        """The file's descriptor; it is opened at the first call."""
        key = (model, file)
        with self._lock:
            if key not in self._descriptors:
                self._descriptors[key] = os.open(self._folders[model] / file, os.O_RDONLY)
            return self._descriptors[key]

    def reading(self, model: str) -> ReadAt:
        """What reads the model's files."""

        def read_at(file: str, offset: int, into: memoryview) -> None:
            if not fill(self._descriptor(model, file), offset, into):
                raise OSError(f"{file} of {model} has become shorter")

        return read_at

    def factors(self, output: Output, device: torch.device) -> list[Factors | None]:
        """What adapters change of each of the output's sources, read into memory.

        A thread keeps those of its last output: finding them may take long.
        """
        last = self._last
        if getattr(last, "name", None) != output.name:
            last.name, last.factors = None, []  # gone before the next ones are read
            last.factors = [self._factors(source, device) for source in output.sources]
            last.name = output.name
        return list(last.factors)

    def _factors(self, source: Source, device: torch.device) -> Factors | None:
        if source.update is None:
            return None
        read = partial(whole, read_at=self.reading(source.model))
        return Factors(_of_part(source, source.update), read, source.location, device)

    def announce(self, source: Source) -> None:
        """Ask the system to read the whole tensor ahead."""
        for at in source.used.locations():
            will_read(self._descriptor(source.model, at.file), at.offset, at.nbytes)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


class _Reader:
    """Reads one source of an output.

    Attributes:
        stored: dtype in the file.
        held: dtype in which methods get it.
        first: number of its first element in the model's tensor.
    """

    def __init__(self, files: SourceFiles, source: Source) -> None:
        self._location, self._read_at = source.location, files.reading(source.model)
        self.first = source.first
        self.stored, self.held = DTYPES[source.location.dtype], _held(source)
        self.itemsize = self.stored.itemsize

    def read(self, first: int, into: memoryview) -> None:
        """Fill `into` from element `first` on.

        Raises:
            OSError: the file can't be read, or ends too early.
        """
        self._location.read(self._read_at, self.first + first, into)


class Desk(AbstractContextManager[None]):
    """One thread's buffers for a segment and, on an accelerator, a stream of its own.

    With several streams, copies in both directions overlap with computing.
    """

    def __init__(self, ring: Ring) -> None:
        on_cpu = ring.device.type == "cpu"
        room = torch.empty(ring.segment, dtype=torch.uint8, pin_memory=not on_cpu)
        self._host = room[-room.data_ptr() % PAGESIZE :]
        self._view = self._host.numpy().data
        self._there = self._host if on_cpu else torch.empty_like(self._host, device=ring.device)
        self._stream = None if on_cpu else torch.cuda.Stream(ring.device)
        self.cut = lru_cache(256)(self._cut)  # all segments have the same places
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
        """A tensor [numel] of `dtype` from byte `start` on, on the device that computes."""
        return self._there[start : start + numel * dtype.itemsize].view(dtype)

    def upload(self, size: int) -> None:
        """Copy the first `size` bytes of the host's memory to the device that computes."""
        if self._stream is not None:
            self._there[:size].copy_(self._host[:size], non_blocking=True)

    def download(self, start: int, size: int) -> memoryview:
        """Bytes of the device that computes, once it has computed them."""
        if self._stream is not None:
            piece = slice(start, start + size)
            self._host[piece].copy_(self._there[piece], non_blocking=True)
            self._stream.synchronize()
        return self.bytes(start, size)


class FilePasses:
    """Passes over the sources of one output, whose first source is the base.

    Args:
        output: the output that is made from the sources.
        files: reads the sources.
        ring: decides how long a segment is.
        crew: the threads that share the segments.
        writer: called with the first element and the bytes of every segment of the output.
        begin: element from which on to write, a multiple of `BLOCK`.
        finished: called, from time to time, with the element up to which everything is written.
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
        # All passes have the same segments; before an interruption they may have been different.
        self._begin, self._finished = begin // self._step * self._step, finished
        self._numel = output.numel
        readers = [_Reader(files, source) for source in output.sources]
        self._inputs = list(zip(readers, files.factors(output, ring.device), strict=True))

    def map(self, fn: Callable[[Block], T]) -> Iterator[T]:
        return self._segments(0, lambda start, desk: fn(self._block(start, desk)[0]))

    def write(self, fn: Callable[[Block, Tensor], object]) -> None:
        writer, output = self._writer, self._output
        assert writer is not None, "these passes only read"

        def merge(start: int, desk: Desk) -> int:
            block, used = self._block(start, desk)
            n = block.base.numel()
            # At the same offset within a page as in the file, so that it can be written directly.
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
        """`work` of every segment from element `begin` on; results in order."""
        count = -(-(self._numel - begin) // self._step)
        return self._crew.pieces(
            count, lambda number, desk: work(begin + number * self._step, desk)
        )

    def _block(self, start: int, desk: Desk) -> tuple[Block, int]:
        """The segment from element `start` on, and the bytes of the desk that it takes."""
        # Read all sources, one after the other, to aligned places.
        n = min(self._step, self._numel - start)
        used, places = 0, []
        for reader, _ in self._inputs:
            size = n * reader.itemsize
            reader.read(start, desk.bytes(used, size))
            places.append(used)
            used += _round_up(size)
        desk.upload(used)
        # Convert those whose dtype differs (behind the others) and apply adapters to them.
        tensors = []
        for (reader, factors), place in zip(self._inputs, places, strict=True):
            tensor = desk.cut(place, n, reader.stored)
            if reader.stored != reader.held:
                tensor = desk.cut(used, n, reader.held).copy_(tensor)
                used += _round_up(tensor.nbytes)
            if factors is not None:
                factors.apply(tensor, start)
            tensors.append(tensor)
        return Block(start, tensors[0], tuple(tensors[1:])), used

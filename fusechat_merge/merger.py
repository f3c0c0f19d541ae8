"""Makes a plan's outputs: a few tensors under way, their segments computed by a pool of threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from fusechat_merge.errors import TensorError
from fusechat_merge.journal import Done
from fusechat_merge.merge_plan import Output, Plan
from fusechat_merge.mergekit_plugin import non_finite
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import NonFiniteError
from fusechat_merge.passes import LANES, Buffers, FilePasses, Ring, SourceFiles
from fusechat_merge.tasks import run_tasks
from fusechat_merge.units import Unit

_AHEAD = 128 << 20

Progress = Callable[[str, int], None]
"""(tensor, bytes of it just done) -> None; called from several threads."""


class Sink(Protocol):
    """Where a merge's bytes go, and what is known of it already."""

    done: Done

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """``data`` belongs at byte ``first`` of the output's tensor; called from any thread."""

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        """Remember ``value`` as field ``kind`` of ``done``; ``nbytes`` were written for it."""


class Merger:
    """Makes the outputs that are not mergekit's own tasks."""

    def __init__(
        self,
        planned: Plan,
        sources: SourceFiles,
        sink: Sink,
        ring: Ring,
        progress: Progress,
    ) -> None:
        self._plan, self._sources, self._sink = planned, sources, sink
        self._ring, self._progress = ring, progress
        self._by_name = {output.name: output for output in planned.outputs}
        self._lock = threading.Lock()
        self._units: dict[str, threading.Lock] = {key: threading.Lock() for key in planned.units}
        self._error: BaseException | None = None

    def run(self, outputs: Sequence[Output]) -> None:
        """Make them, two at a time."""
        self._each(outputs, self._make)

    def measure(self, outputs: Sequence[Output]) -> None:
        """Find their statistics and weights only; nothing is written.

        An output of granularity element is measured as the matrix that it is.
        """
        self._each(outputs, self._measure)

    def _each(self, outputs: Sequence[Output], work: Callable[[Output, int], object]) -> None:
        self._buffers = Buffers(self._ring, self._sources)
        todo = []
        for output in outputs:
            done = self._sink.done.elements.get(output.name, 0)
            self._progress(output.name, min(done, output.numel) * output.dtype.itemsize)
            if done < max(output.numel, 1):
                todo.append(output)
        queue = iter(list(enumerate(todo)))
        reading = _ReadAhead(self._sources, todo)
        threads = [
            threading.Thread(target=self._lane, args=(lane, queue, reading, work))
            for lane in range(LANES)
        ]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # a segment is one thread's; many segments go on at once
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._buffers.stopped.set()
            for thread in threads:
                thread.join()
            self._buffers.close()
            del self._buffers
            reading.close()
            torch.set_num_threads(before)
        if self._error is not None:
            raise self._error

    def _lane(
        self,
        lane: int,
        queue: Iterator[tuple[int, Output]],
        reading: _ReadAhead,
        work: Callable[[Output, int], object],
    ) -> None:
        torch.set_num_threads(1)
        while self._error is None and not self._buffers.stopped.is_set():
            with self._lock:
                number, output = next(queue, (0, None))
            if output is None:
                return
            try:
                reading.reached(number)
                work(output, lane)
            except BaseException as error:
                with self._lock:
                    if self._error is None or isinstance(self._error, InterruptedError):
                        self._error = error
                self._buffers.stopped.set()

    def _make(self, output: Output, lane: int) -> None:
        how, parameters = output.how, output.parameters
        shares = None
        if how == "varm" and parameters["granularity"] != "element":
            shares = self._shares(output, lane)
        passes = self._passes(output, lane)
        with _naming(output):
            if how == "copy":
                passes.write(lambda block, out: out.copy_(block.base))
            elif how == "fusechat_sce":
                eta = sce.merge(passes, parameters["select_topk"], parameters["variant"])
                self._sink.note("weights", output.name, eta)
            elif shares is None:
                varm.write_elements(
                    passes, parameters["weight"], parameters["statistic"], parameters["lambda"]
                )
            else:
                varm.write(passes, shares, parameters["lambda"])
        if not output.numel:
            self._sink.note("elements", output.name, 1)

    def _measure(self, output: Output, lane: int) -> None:
        if output.how == "varm":
            self._shares(output, lane)
        elif output.how == "fusechat_sce":
            self._tensor_sums(output, "square", lane)
            parameters = output.parameters
            with _naming(output):
                passes = FilePasses(output, self._buffers, lane)
                eta, _ = sce.shares(passes, parameters["select_topk"], parameters["variant"])
            self._sink.note("weights", output.name, eta)
        self._progress(output.name, output.nbytes)

    def _shares(self, output: Output, lane: int) -> list[float]:
        """W_j of the output's unit."""
        shares = varm.weights(self._sums(output, lane), output.parameters["weight"])
        self._sink.note("weights", output.name, shares)
        return shares

    def _passes(self, output: Output, lane: int) -> FilePasses:
        itemsize = output.dtype.itemsize
        begin = self._sink.done.elements.get(output.name, 0)
        written = begin

        def write(first: int, data: memoryview) -> None:
            self._sink.write(output, first * itemsize, data)

        def finished(element: int) -> None:
            nonlocal written
            nbytes = (element - written) * itemsize
            written = element
            self._sink.note("elements", output.name, element, nbytes)
            self._progress(output.name, nbytes)

        return FilePasses(output, self._buffers, lane, write, begin, finished)

    def _sums(self, output: Output, lane: int) -> list[float]:
        """Σ over the output's unit of δ² (or |δ|), one a target."""
        statistic = output.parameters["statistic"]
        if output.unit is None:
            return self._tensor_sums(output, statistic, lane)
        found: dict[str, list[float]] = {}
        with self._units[output.unit]:
            for name in self._plan.units[output.unit].members:
                member = self._by_name[name]
                sums = self._tensor_sums(member, statistic, lane)
                for source, value in zip(member.sources[1:], sums, strict=True):
                    found.setdefault(source.model, []).append(value)
        return [math.fsum(found.get(source.model, ())) for source in output.sources[1:]]

    def _tensor_sums(self, output: Output, statistic: str, lane: int) -> list[float]:
        key = f"{statistic} {output.name}"
        known = self._sink.done.statistics.get(key)
        if known is None:
            with _naming(output):
                known = varm.statistics(FilePasses(output, self._buffers, lane), statistic)
            self._sink.note("statistics", key, known)
        return known

    def units(self) -> list[Unit]:
        """The units with their statistics and weights, in the order of the outputs."""
        done = self._sink.done
        units: dict[tuple[str, tuple[float, ...]], Unit] = {}
        for output in self._plan.outputs:
            weights = done.weights.get(output.name)
            if weights is None:
                continue
            key = (output.unit or f"tensor {output.name}", tuple(weights))
            if key in units:
                units[key] = replace(units[key], tensors=(*units[key].tensors, output.name))
                continue
            shared = self._plan.units.get(output.unit or "")
            members = [self._by_name[n] for n in shared.members] if shared else [output]
            numel = sum(member.numel for member in members)
            statistic = output.parameters.get("statistic", "square")
            sums = [
                found
                for member in members
                if (found := done.statistics.get(f"{statistic} {member.name}")) is not None
            ]
            units[key] = Unit(
                name=shared.name if shared else output.name,
                granularity=output.parameters.get("granularity", "matrix"),
                tensors=(output.name,),
                numel=numel,
                statistics=tuple(value / numel for value in varm.total(sums, len(weights)))
                if sums and numel
                else (),
                weights=tuple(weights),
            )
        return list(units.values())


def make_tasks(planned: Plan, outputs: Sequence[Output], sink: Sink, progress: Progress) -> None:
    """Make the outputs that are mergekit's own tasks."""
    todo = []
    for output in outputs:
        if output.name in sink.done.elements:
            progress(output.name, output.nbytes)
        else:
            todo.append(output)
    for output, tensor in run_tasks(planned, todo):
        sink.write(output, 0, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        sink.note("elements", output.name, max(output.numel, 1), output.nbytes)
        progress(output.name, output.nbytes)


class _ReadAhead:
    """Asks the system for the tensors that come next, so that the disk is never idle."""

    def __init__(self, files: SourceFiles, outputs: Sequence[Output]) -> None:
        self._files, self._outputs = files, outputs
        self._next, self._ahead = 0, 0
        self._thread = ThreadPoolExecutor(1, "read ahead")

    def reached(self, number: int) -> None:
        """The output of this number is begun."""
        self._thread.submit(self._announce, number)

    def _announce(self, number: int) -> None:
        self._next = max(self._next, number)
        ahead = sum(read_bytes(o) for o in self._outputs[number + 1 : self._next])
        while self._next < len(self._outputs) and ahead < _AHEAD:
            output = self._outputs[self._next]
            for source in output.sources:
                with suppress(OSError):  # the read itself will say so
                    self._files.announce(source)
            ahead += read_bytes(output)
            self._next += 1

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def read_bytes(output: Output) -> int:
    return sum(source.location.nbytes for source in output.sources)


@contextmanager
def _naming(output: Output) -> Iterator[None]:
    """Say which model's tensor holds NaN or Inf."""
    try:
        yield
    except NonFiniteError as error:
        source = output.sources[0 if error.target is None else error.target + 1]
        raise TensorError(non_finite(source.model, source.tensor)) from None

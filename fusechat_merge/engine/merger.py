"""Makes a plan's outputs: finds their units' weights, then reads, merges and writes each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from fusechat_common.errors import FusechatError
from fusechat_merge.engine.crew import Crew
from fusechat_merge.engine.journal import Done
from fusechat_merge.engine.passes import Desk, FilePasses, Ring, SourceFiles
from fusechat_merge.engine.tasks import run_tasks
from fusechat_merge.mergekit_bridge.methods import non_finite
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import NonFiniteError
from fusechat_merge.methods.units import Unit
from fusechat_merge.planning.plan import Output, Plan
from fusechat_merge.results.record import UnitWeights

varm.compiled_loops()  # half a second, spent with the other imports
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
        self._units: dict[Unit, dict[str, float]] = {}

    def run(self, outputs: Sequence[Output]) -> None:
        """Make them, a few at a time."""
        self._each(outputs, self._make)

    def measure(self, outputs: Sequence[Output]) -> None:
        """Find their statistics and weights only; nothing is written.

        An output of granularity element is measured as the matrix that it is.
        """
        self._each(outputs, self._measure)

    def _each(self, outputs: Sequence[Output], work: Callable[[Output], object]) -> None:
        todo = []
        for output in outputs:
            done = self._sink.done.elements.get(output.name, 0)
            self._progress(output.name, min(done, output.numel) * output.dtype.itemsize)
            if done < max(output.numel, 1):
                todo.append(output)
        if not todo:
            return
        reading = _ReadAhead(self._sources, todo)

        def begin(numbered: tuple[int, Output]) -> None:
            number, output = numbered
            reading.reached(number)
            work(output)

        self._crew = Crew([Desk(self._ring) for _ in range(self._ring.threads)])
        try:
            self._crew.run(enumerate(todo), begin)
        finally:
            del self._crew
            reading.close()

    def _make(self, output: Output) -> None:
        how, parameters = output.how, output.parameters
        shares = None
        if how == "varm" and parameters["granularity"] != "element":
            shares = self._shares(output)
        passes = self._writing(output)
        with _naming(output):
            if how == "copy":
                passes.write(lambda block, out: out.copy_(block.base))
            elif how == "fusechat_sce":
                variant = parameters["variant"]
                eta, selection = sce.shares(passes, parameters["select_topk"], variant)
                self._sink.note("weights", output.name, eta)
                sce.write(passes, eta, selection, variant)
            elif how != "varm":
                raise NotImplementedError(f"{how} is one of `METHODS`, but not written here")
            elif shares is None:
                varm.write_elements(
                    passes, parameters["weight"], parameters["statistic"], parameters["lambda"]
                )
            else:
                varm.write(passes, shares, parameters["lambda"])
        if not output.numel:
            self._sink.note("elements", output.name, 1)

    def _measure(self, output: Output) -> None:
        if output.how == "varm":
            self._shares(output)
        else:
            self._tensor_sums(output, "square")
            parameters = output.parameters
            with _naming(output):
                passes = self._reading(output)
                eta, _ = sce.shares(passes, parameters["select_topk"], parameters["variant"])
            self._sink.note("weights", output.name, eta)
        self._progress(output.name, output.nbytes)

    def _shares(self, output: Output) -> list[float]:
        """W_j of the output's unit."""
        shares = varm.weights(self._sums(output), output.parameters["weight"])
        self._sink.note("weights", output.name, shares)
        return shares

    def _reading(self, output: Output) -> FilePasses:
        return FilePasses(output, self._sources, self._ring, self._crew)

    def _writing(self, output: Output) -> FilePasses:
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

        return FilePasses(output, self._sources, self._ring, self._crew, write, begin, finished)

    def _sums(self, output: Output) -> list[float]:
        """Σ over the output's unit of δ² (or |δ|), one a target."""
        statistic = output.parameters["statistic"]
        if output.unit is None:
            return self._tensor_sums(output, statistic)
        found = self._units.get(output.unit)
        if found is None:
            found = self._units[output.unit] = self._unit_sums(output.unit)
        return [found.get(source.model, 0.0) for source in output.sources[1:]]

    def _unit_sums(self, unit: Unit) -> dict[str, float]:
        """Σ over the unit of δ² (or |δ|), by target."""
        statistic, members = unit.statistic, self._plan.units[unit]
        by_key = {f"{statistic} {name}": self._by_name[name] for name in members}
        self._crew.once(list(by_key), lambda key: self._tensor_sums(by_key[key], statistic))
        found: dict[str, list[float]] = {}
        for key, member in by_key.items():
            sums = self._sink.done.statistics[key]
            for source, value in zip(member.sources[1:], sums, strict=True):
                found.setdefault(source.model, []).append(value)
        return {model: math.fsum(values) for model, values in found.items()}

    def _tensor_sums(self, output: Output, statistic: str) -> list[float]:
        key = f"{statistic} {output.name}"
        known = self._sink.done.statistics.get(key)
        if known is None:
            with _naming(output):
                known = varm.statistics(self._reading(output), statistic)
            self._sink.note("statistics", key, known)
            self._progress(output.name, 0)
        return known

    def units(self) -> list[UnitWeights]:
        """The units with their statistics and weights, in the order of the outputs."""
        done = self._sink.done
        units: dict[tuple[Unit | str, tuple[float, ...]], UnitWeights] = {}
        for output in self._plan.outputs:
            weights = done.weights.get(output.name)
            if weights is None:
                continue
            # Priors may differ within a unit, where filters set them: then it has several rows.
            key = (output.unit or output.name, tuple(weights))
            if key in units:
                tensors = (*units[key].tensors, output.name)
                units[key] = units[key].model_copy(update={"tensors": tensors})
                continue
            names = self._plan.units[output.unit] if output.unit else (output.name,)
            members = [self._by_name[name] for name in names]
            numel = sum(member.numel for member in members)
            statistic = output.parameters.get("statistic", "square")
            sums = [
                found
                for member in members
                if (found := done.statistics.get(f"{statistic} {member.name}")) is not None
            ]
            units[key] = UnitWeights(
                name=output.unit.name if output.unit else output.name,
                granularity=output.parameters.get("granularity", "matrix"),
                tensors=(output.name,),
                numel=numel,
                statistics=tuple(value / numel for value in varm.total(sums, len(weights)))
                if sums and numel
                else (),
                weights=tuple(weights),
            )
        return list(units.values())


def make_tasks(
    planned: Plan,
    outputs: Sequence[Output],
    sink: Sink,
    progress: Progress,
    device: torch.device,
) -> None:
    """Make the outputs that are mergekit's own tasks."""
    todo = []
    for output in outputs:
        if sink.done.elements.get(output.name, 0) >= max(output.numel, 1):
            progress(output.name, output.nbytes)
        else:
            todo.append(output)
    for output, tensor in run_tasks(planned, todo, device):
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
        self._ahead -= read_bytes(self._outputs[number])
        while self._next < len(self._outputs) and self._ahead < _AHEAD:
            output = self._outputs[self._next]
            if self._next > number:  # else it is being read already
                for source in output.sources:
                    with suppress(OSError):  # the read itself will say so
                        self._files.announce(source)
            self._ahead += read_bytes(output)
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
        raise FusechatError(non_finite(source.model, source.tensor)) from None

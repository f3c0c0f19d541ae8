"""Makes a plan's outputs: computes their units' weights, then reads, merges and writes each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fusechat_common.errors import FusechatError
from fusechat_merge.engine.crew import Crew
from fusechat_merge.engine.journal import Sink
from fusechat_merge.engine.passes import Desk, FilePasses, Ring, SourceFiles
from fusechat_merge.engine.tasks import by_blocks, run_tasks
from fusechat_merge.mergekit_bridge.methods import non_finite
from fusechat_merge.methods import sce, spherical, varm
from fusechat_merge.methods.blocks import NonFiniteError
from fusechat_merge.methods.units import Unit
from fusechat_merge.planning.plan import SPHERICAL, Output, Plan
from fusechat_merge.results.record import UnitWeights

varm.compiled_loops()  # half a second, spent with the other imports
_AHEAD = 128 << 20  # bytes that the system is asked to read ahead

Progress = Callable[[str, int], None]
"""Called with a tensor and its bytes that were just done, from several threads."""


class Merger:
    """Makes the outputs that are not mergekit's own tasks."""

    def __init__(
        self, planned: Plan, sources: SourceFiles, sink: Sink, ring: Ring, progress: Progress
    ) -> None:
        self._plan, self._sources, self._sink = planned, sources, sink
        self._ring, self._progress = ring, progress
        self._by_name = {output.name: output for output in planned.outputs}
        self._units: dict[Unit, dict[str, float]] = {}

    def run(self, outputs: Sequence[Output]) -> None:
        """Make outputs, one a thread."""
        self._each(outputs, self._make)

    def measure(self, outputs: Sequence[Output]) -> None:
        """Compute only the outputs' statistics and weights; for granularity element a matrix's."""
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
            reading.begin(number)
            work(output)

        self._crew = Crew([Desk(self._ring) for _ in range(self._ring.threads)])
        try:
            self._crew.run(enumerate(todo), begin)
        finally:
            del self._crew
            reading.close()

    def _make(self, output: Output) -> None:
        how, parameters = output.how, output.parameters
        by_unit = how == "varm" and parameters["granularity"] != "element"
        shares = self._shares(output) if by_unit else []
        passes = self._writing(output)
        with _naming(output):
            if how == "copy":
                passes.write(lambda block, out: out.copy_(block.base))
            elif how == "blocks":
                passes.write(by_blocks(self._plan, output))
            elif how in SPHERICAL:
                spherical.merge(passes, how, parameters, parameters["based"])
            elif how == "fusechat_sce":
                eta, selection = self._sce_shares(output, passes)
                sce.write(passes, eta, selection, parameters["variant"])
            elif how != "varm":
                raise NotImplementedError(f"{how} is one of `METHODS`, but not written here")
            elif by_unit:
                varm.write(passes, shares, parameters["lambda"])
            else:
                varm.write_elements(
                    passes, parameters["weight"], parameters["statistic"], parameters["lambda"]
                )
        if not output.numel:
            self._sink.note("elements", output.name, 1)

    def _measure(self, output: Output) -> None:
        if output.how == "varm":
            self._shares(output)
        else:
            self._tensor_sums(output, "square")
            with _naming(output):
                self._sce_shares(output, self._reading(output))
        self._progress(output.name, output.nbytes)

    def _shares(self, output: Output) -> list[float]:
        """W_j of the output's unit."""
        shares = varm.weights(self._sums(output), output.parameters["weight"])
        self._sink.note("weights", output.name, shares)
        return shares

    def _sce_shares(self, output: Output, passes: FilePasses) -> tuple[list[float], Any]:
        """η_j of the output, and its selection."""
        parameters = output.parameters
        eta, selection = sce.shares(passes, parameters["select_topk"], parameters["variant"])
        self._sink.note("weights", output.name, eta)
        return eta, selection

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
        unit = output.unit
        if unit is None:
            return self._tensor_sums(output, output.parameters["statistic"])
        if unit not in self._units:
            self._units[unit] = self._unit_sums(unit)
        return [self._units[unit].get(source.model, 0.0) for source in output.sources[1:]]

    def _unit_sums(self, unit: Unit) -> dict[str, float]:
        """Σ over the unit of δ² (or |δ|), by target."""
        statistic, members = unit.statistic, self._plan.units[unit]
        by_key = {f"{statistic} {name}": self._by_name[name] for name in members}
        self._crew.once(list(by_key), lambda key: self._tensor_sums(by_key[key], statistic))
        by_target: dict[str, list[float]] = {}
        for key, member in by_key.items():
            sums = self._sink.done.statistics[key]
            for source, value in zip(member.sources[1:], sums, strict=True):
                by_target.setdefault(source.model, []).append(value)
        return {model: math.fsum(values) for model, values in by_target.items()}

    def _tensor_sums(self, output: Output, statistic: str) -> list[float]:
        key = f"{statistic} {output.name}"
        sums = self._sink.done.statistics.get(key)
        if sums is None:
            with _naming(output):
                sums = varm.statistics(self._reading(output), statistic)
            self._sink.note("statistics", key, sums)
            self._progress(output.name, 0)
        return sums

    def units(self) -> list[UnitWeights]:
        """The units with their statistics and weights, in the order of the outputs."""
        done = self._sink.done
        # Priors may differ within a unit, where filters set them: then it has several rows.
        rows: dict[tuple[Unit | str, tuple[float, ...]], list[Output]] = {}
        for output in self._plan.outputs:
            weights = done.weights.get(output.name)
            if weights is not None:
                rows.setdefault((output.unit or output.name, tuple(weights)), []).append(output)
        return [self._row(outputs, weights) for (_, weights), outputs in rows.items()]

    def _row(self, outputs: Sequence[Output], weights: tuple[float, ...]) -> UnitWeights:
        """The outputs, all of one unit, that have these weights."""
        done, first = self._sink.done, outputs[0]
        names = self._plan.units[first.unit] if first.unit else (first.name,)
        members = [self._by_name[name] for name in names]
        numel = sum(member.numel for member in members)
        statistic = first.parameters.get("statistic", "square")
        keys = [f"{statistic} {member.name}" for member in members]
        sums = [done.statistics[key] for key in keys if key in done.statistics]
        totals = varm.total(sums, len(weights)) if sums and numel else []
        return UnitWeights(
            name=first.unit.name if first.unit else first.name,
            granularity=first.parameters.get("granularity", "matrix"),
            tensors=tuple(output.name for output in outputs),
            numel=numel,
            statistics=tuple(total / numel for total in totals),
            weights=weights,
        )


def make_tasks(
    planned: Plan, outputs: Sequence[Output], sink: Sink, progress: Progress, device: torch.device
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
    """Asks the system to read the next tensors ahead, so that the disk is never idle."""

    def __init__(self, files: SourceFiles, outputs: Sequence[Output]) -> None:
        self._files, self._outputs = files, outputs
        self._next, self._ahead = 0, 0
        self._thread = ThreadPoolExecutor(1, "read ahead")

    def begin(self, number: int) -> None:
        """Work on the output of this number begins."""
        self._thread.submit(self._announce, number)

    def _announce(self, number: int) -> None:
        self._ahead -= read_bytes(self._outputs[number])
        while self._next < len(self._outputs) and self._ahead < _AHEAD:
            output = self._outputs[self._next]
            if self._next > number:  # else it is being read already
                for source in output.sources:
                    with suppress(OSError):  # the read itself reports it
                        self._files.announce(source)
            self._ahead += read_bytes(output)
            self._next += 1

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def read_bytes(output: Output) -> int:
    return sum(source.used.nbytes for source in output.sources)


@contextmanager
def _naming(output: Output) -> Iterator[None]:
    """Name the model and tensor that hold NaN or Inf, or for which a method isn't defined."""
    try:
        yield
    except NonFiniteError as error:
        source = output.sources[0 if error.target is None else error.target + 1]
        raise FusechatError(non_finite(source.model, source.tensor)) from None
    except ValueError as error:
        raise FusechatError(f"{output.name}: {error}") from error

"""The statistics and weights of a planned merge, without merging: reads tensors, writes none."""

from __future__ import annotations

from typing import Any

from fusechat_common.errors import RequestError
from fusechat_merge.engine.execute import MEMORY
from fusechat_merge.engine.journal import Done
from fusechat_merge.engine.merger import Merger, Progress
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.planning.plan import NATIVE, Output, Plan
from fusechat_merge.results.record import Analysis


def analyze(
    planned: Plan,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    progress: Progress = lambda tensor, nbytes: None,
) -> Analysis:
    """Compute the statistics and merge weights of every unit in bounded memory.

    With ``granularity: element`` every element has weights of its own; the analysis then shows each
    matrix with the weights that granularity matrix would give.

    Args:
        planned: a merge by varm or fusechat_sce of models on this machine.
        memory, threads, progress: as for ``stream.merge``.

    Raises:
        RequestError: the plan has problems, or a merge that has no such weights.
        FusechatError: NaN or Inf in an input.
    """
    outputs = [output for output in planned.outputs if output.how in NATIVE]
    targets = {tuple(source.model for source in output.sources[1:]) for output in outputs}
    problems = list(planned.problems)
    if not problems:
        problems += _not_ours(planned, outputs, len(targets))
    try:
        ring = divide(outputs, memory, threads)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise RequestError(problems)

    sink = _NothingWritten()
    sources = SourceFiles({name: m.folder for name, m in planned.models.items() if m.folder})
    try:
        merger = Merger(planned, sources, sink, ring, progress)
        merger.measure(outputs)
    finally:
        sources.close()
    units = merger.units()
    if not units:
        raise RequestError(
            [f"merge_method {planned.config.merge_method} has no weights to analyze"]
        )
    return Analysis(
        method=planned.config.merge_method,
        base=outputs[0].sources[0].model,
        targets=targets.pop(),
        units=tuple(units),
    )


def _not_ours(planned: Plan, outputs: list[Output], targets: int) -> list[str]:
    method = planned.config.merge_method
    if method not in NATIVE:
        return [f"merge_method {method} has no weights to analyze: use {' or '.join(NATIVE)}"]
    if not outputs:
        return ["no tensor is computed from targets here, so there is nothing to analyze"]
    if targets > 1:
        return ["slices with different targets can't be analyzed in one table"]
    return []


class _NothingWritten:
    """A sink that only remembers."""

    def __init__(self) -> None:
        self.done = Done()

    def write(self, output: Output, first: int, data: memoryview) -> None:
        raise AssertionError("measuring writes nothing")  # pragma: no cover (it never does)

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        getattr(self.done, kind)[name] = value

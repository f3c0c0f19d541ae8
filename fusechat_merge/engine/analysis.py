"""The statistics and weights of a planned merge, without merging: reads tensors, writes none."""

from __future__ import annotations

from contextlib import closing

from fusechat_common.errors import RequestError
from fusechat_merge.engine.execute import MEMORY
from fusechat_merge.engine.journal import Sink
from fusechat_merge.engine.merger import Merger, Progress
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.planning.plan import NATIVE, Plan
from fusechat_merge.results.record import Analysis


def analyze(
    planned: Plan,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    progress: Progress = lambda tensor, nbytes: None,
) -> Analysis:
    """Compute the statistics and merge weights of every unit in bounded memory.

    With `granularity: element` every element has weights of its own; the analysis then shows each
    matrix with the weights that granularity matrix would give.

    Args:
        planned: a merge by varm or fusechat_sce of models on this machine.
        memory, threads, progress: as for `merge`.

    Raises:
        RequestError: the plan has problems, or a merge that has no such weights.
        FusechatError: NaN or Inf in an input.
    """
    method = planned.config.merge_method
    outputs = [output for output in planned.outputs if output.how in NATIVE]
    targets = {tuple(source.model for source in output.sources[1:]) for output in outputs}
    problems = list(planned.problems)
    if not problems:
        if method not in NATIVE:
            use = " or ".join(NATIVE)
            problems.append(f"merge_method {method} has no weights to analyze: use {use}")
        elif not outputs:
            problems.append("no tensor is computed from targets, so there is nothing to analyze")
        elif len(targets) > 1:
            problems.append("slices with different targets can't be analyzed in one table")
    try:
        ring = divide(outputs, memory, threads)
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(problems)

    with closing(SourceFiles(planned)) as sources:
        merger = Merger(planned, sources, Sink(), ring, progress)
        merger.measure(outputs)
    units = merger.units()
    if not units:
        raise RequestError([f"merge_method {method} has no weights to analyze"])
    return Analysis(
        method=method,
        base=outputs[0].sources[0].model,
        targets=targets.pop(),
        units=tuple(units),
    )

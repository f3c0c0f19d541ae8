"""The statistics and weights of a planned merge, without merging: reads tensors, writes none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from fusechat_merge.errors import ConfigError
from fusechat_merge.mergekit_plan import PlannedMerge
from fusechat_merge.report import Report
from fusechat_merge.units import Measured, Unit, weigh

T = TypeVar("T")


def analyze(planned: PlannedMerge, progress: Callable[[Sequence[T]], Iterable[T]] = iter) -> Report:
    """Compute the statistics and merge weights of every unit, one tensor in memory at a time.

    With ``granularity: element`` every element has weights of its own; the report then shows each
    matrix with the weights that granularity matrix would give.

    Args:
        planned: a merge by varm or fusechat_sce.
        progress: wraps the tasks that are worked off, to show how far it is.

    Raises:
        ConfigError: another merge method, or targets that differ between slices.
        TensorError: NaN or Inf in an input.
    """
    method = planned.config.merge_method
    if method not in ("varm", "fusechat_sce"):
        raise ConfigError(
            [f"merge_method {method} has no weights to analyze: use varm or fusechat_sce"]
        )
    tasks: list[Any] = [task for _, task in planned.tensors]
    targets = {tuple(m for m in t.model_order if m != t.base_model) for t in tasks}
    if len(targets) != 1:
        raise ConfigError(["slices with different targets can't be analyzed in one table"])
    measure = _sce_units if method == "fusechat_sce" else _varm_units
    return Report(
        method=method,
        base=str(tasks[0].base_model),
        targets=tuple(map(str, targets.pop())),
        units=tuple(measure(progress(tasks))),
    )


def _varm_units(tasks: Iterable[Any]) -> list[Unit]:
    from fusechat_merge.mergekit_plugin import group_statistics
    from fusechat_merge.mergekit_units import load_group

    measured = []
    for task in tasks:
        group, statistic = load_group(task), task.parameters["statistic"]
        priors = task.input_parameters
        measured.append(
            Measured(
                name=task.output_weight.name,
                granularity=task.parameters["granularity"],
                statistic=statistic,
                prior=tuple(priors[m]["weight"] for m in task.model_order if m != task.base_model),
                numel=group.entries[0].tensor.numel() if group else 0,
                sums=tuple(group_statistics(group, statistic)) if group else None,
            )
        )
    return weigh(measured)


def _sce_units(tasks: Iterable[Any]) -> Iterator[Unit]:
    from fusechat_merge.mergekit_plugin import group_shares, group_statistics
    from fusechat_merge.mergekit_units import load_group

    for task in tasks:
        group, name = load_group(task), task.output_weight.name
        if group is None:
            continue
        numel = group.entries[0].tensor.numel()
        parameters = task.parameters
        yield Unit(
            name=name,
            granularity="matrix",
            tensors=(name,),
            numel=numel,
            statistics=tuple(s / numel for s in group_statistics(group, "square")),
            weights=tuple(group_shares(group, parameters["select_topk"], parameters["variant"])),
        )

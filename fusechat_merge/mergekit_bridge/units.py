"""Units across tensors in mergekit's task graph: their statistics are a task of their own.

Imported with mergekit's planner, not with its registry: mergekit may only just be importing the
tasks when it registers its methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.dtype import align_dtype
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer.embed import PermutedVocabulary
from pydantic import PrivateAttr
from torch import Tensor

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.inputs.layouts import InMemory
from fusechat_merge.mergekit_bridge.methods import (
    HALVES,
    Statistics,
    by_matrix,
    non_finite,
    of_halves,
    unit_statistics,
    weightless,
)
from fusechat_merge.methods.stacks import down_of
from fusechat_merge.methods.units import Unit, members_of, shared_unit


class UnitStatistics(Task[Statistics]):
    """Reads, through mergekit's own load tasks, every planned tensor of one unit, one at a time.

    The loads are no arguments of the task: as such mergekit would keep all of them in memory.
    """

    label: str
    statistic: str
    _members: list[ExecuteMergeMethodTask] = PrivateAttr()

    def __init__(self, members: list[ExecuteMergeMethodTask], **fields: Any) -> None:
        super().__init__(**fields)
        self._members = members

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str | None:
        return self.label

    def execute(self) -> Statistics:
        return unit_statistics(
            (
                matrix
                for member in self._members
                if (group := load_group(member)) is not None
                for matrix in by_matrix(group, HALVES in member.parameters)
            ),
            self.statistic,
        )


def load_group(task: ExecuteMergeMethodTask) -> TensorGroup | None:
    """A planned tensor's inputs; None if a model lacks it or it is no floating-point tensor."""
    tensors = _run(task.gather_tensors)
    inputs = [tensors.get(model) for model in task.model_order]
    if not all(tensor is not None and tensor.is_floating_point() for tensor in inputs):
        return None
    group = TensorGroup(
        entries=tuple(
            TensorEntry(id=model, tensor=tensors[model], is_base=model == task.base_model)
            for model in task.model_order
        ),
        metadata=TensorMetadata.from_weight_info(task.output_weight),
    )
    group.validate_tensors()
    return align_dtype(group)


def _run(task: Task) -> Any:
    return task.execute(**{key: _run(needed) for key, needed in task.arguments().items()})


class MergeWithUnit(ExecuteMergeMethodTask):
    """Merges a tensor by the statistics of its unit."""

    unit: UnitStatistics

    def arguments(self) -> dict[str, Task]:
        return {**super().arguments(), "unit_statistics": self.unit}

    def execute(self, tensors: dict[ModelReference, Tensor], **statistics: Any) -> Tensor | None:
        if len(tensors) < len(self.model_order):
            # Missing from a model, so not among the tensors that the statistics have checked.
            for model, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise FusechatError(non_finite(model, self.output_weight.name))
        return ExecuteMergeMethodTask.execute(_with(self, **statistics), tensors)


def with_halves(
    tasks: Sequence[ExecuteMergeMethodTask], config: Any
) -> list[ExecuteMergeMethodTask]:
    """The planned tasks; those of stacks with gate and up matrices as halves say so.

    Args:
        tasks: of `varm` or `fusechat_sce`.
        config: the base's configuration, one of transformers'.
    """
    names = [task.output_weight.name for task in tasks]
    if not any(down_of(name) in names for name in names):
        return list(tasks)
    shapes = {name: tuple(tensor.shape) for name, tensor in InMemory(config).state.items()}
    return [
        _with(task, **{HALVES: True}) if name in shapes and of_halves(name, shapes) else task
        for name, task in zip(names, tasks, strict=True)
    ]


def _with(task: ExecuteMergeMethodTask, **more: Any) -> ExecuteMergeMethodTask:
    """The task with more parameters for its method."""
    parameters = ImmutableMap(data={**dict(task.parameters.items()), **more})
    return task.model_copy(update={"parameters": parameters})


def with_units(tasks: Sequence[ExecuteMergeMethodTask]) -> list[ExecuteMergeMethodTask]:
    """The planned varm tasks, those of a unit of several tensors sharing its statistics.

    Raises:
        RequestError: all weights of a tensor are 0, or a unit's vocabulary is permuted.
    """
    problems = weightless_problems(tasks)
    names = [task.output_weight.name for task in tasks]
    units = [shared_unit(name, task.parameters) for name, task in zip(names, tasks, strict=True)]
    statistics: dict[Unit, UnitStatistics] = {}
    permuted: dict[str, None] = {}  # names, each once, in order
    for unit, positions in members_of((unit for unit in units if unit), names).items():
        # mergekit schedules by label: before the first tensor of the unit is loaded.
        statistics[unit] = UnitStatistics(
            members=[tasks[i] for i in positions],
            label=min(names[i] for i in positions),
            statistic=unit.statistic,
        )
        for i in positions:
            if isinstance(tasks[i].gather_tensors, PermutedVocabulary):
                permuted[names[i]] = None
    if permuted:
        problems.append(
            "granularity module, layer and model can't be combined with a tokenizer merge"
            " (tokenizer or tokenizer_source): use granularity matrix or element for the units of"
            f" {', '.join(permuted)}, or bring the models to one vocabulary first"
        )
    if problems:
        raise RequestError(problems)
    return [
        MergeWithUnit(**dict(task), unit=statistics[unit]) if unit else task
        for unit, task in zip(units, tasks, strict=True)
    ]


def weightless_problems(tasks: Sequence[ExecuteMergeMethodTask]) -> list[str]:
    """The problem of varm tasks for which every target's weight is 0, if there are any."""
    names = []
    for task in tasks:
        targets = [model for model in task.model_order if model != task.base_model]
        if targets and not any(task.input_parameters[m]["weight"] for m in targets):
            names.append(task.output_weight.name)
    return [weightless(names)] if names else []

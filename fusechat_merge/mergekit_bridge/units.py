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
from fusechat_merge.mergekit_bridge.methods import (
    Statistics,
    non_finite,
    unit_statistics,
    weightless,
)
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
        groups = (load_group(member) for member in self._members)
        return unit_statistics((g for g in groups if g is not None), self.statistic)


def load_group(task: ExecuteMergeMethodTask) -> TensorGroup | None:
    """A planned tensor's inputs; None if a model lacks it or it is no floating-point tensor."""
    tensors = _run(task.gather_tensors)
    if any(tensors.get(model) is None for model in task.model_order):
        return None
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
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

    def execute(self, tensors: dict[ModelReference, Tensor], **given: Any) -> Tensor | None:
        if len(tensors) < len(self.model_order):
            # Missing from a model, so not among the tensors that the statistics have checked.
            for model, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise FusechatError(non_finite(model, self.output_weight.name))
        parameters = {**dict(self.parameters.items()), **given}
        task = self.model_copy(update={"parameters": ImmutableMap(data=parameters)})
        return ExecuteMergeMethodTask.execute(task, tensors)


def with_units(tasks: Sequence[ExecuteMergeMethodTask]) -> list[ExecuteMergeMethodTask]:
    """The planned varm tasks, those of a unit of several tensors made to share its statistics.

    Raises:
        RequestError: all weights of a tensor are 0, or a unit's vocabulary is permuted.
    """
    names = _weightless(tasks)
    problems = [weightless(names)] if names else []
    units = [shared_unit(task.output_weight.name, task.parameters) for task in tasks]
    tensors = [task.output_weight.name for task in tasks]
    members = members_of((unit for unit in units if unit), tensors)
    statistics: dict[Unit, UnitStatistics] = {}
    permuted: dict[str, None] = {}
    for unit, positions in members.items():
        of_unit = [tasks[i] for i in positions]
        names = [task.output_weight.name for task in of_unit]
        # mergekit schedules by label: before the first tensor of the unit is loaded.
        statistics[unit] = UnitStatistics(
            members=of_unit, label=min(names), statistic=unit.statistic
        )
        permuted |= {
            name: None
            for name, task in zip(names, of_unit, strict=True)
            if isinstance(task.gather_tensors, PermutedVocabulary)
        }
    if permuted:
        problems.append(
            "granularity module, layer and model can't be combined with a tokenizer merge"
            " (tokenizer or tokenizer_source): use granularity matrix or element for the units of"
            f" {', '.join(permuted)}, or bring the models to one vocabulary first"
        )
    if problems:
        raise RequestError(problems)
    return [
        MergeWithUnit(**_fields(task), unit=statistics[unit]) if unit else task
        for unit, task in zip(units, tasks, strict=True)
    ]


def _fields(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ExecuteMergeMethodTask.model_fields}


def raise_if_weightless(tasks: Sequence[ExecuteMergeMethodTask]) -> None:
    """Raise RequestError if all targets of a tensor have the weight 0."""
    names = _weightless(tasks)
    if names:
        raise RequestError([weightless(names)])


def _weightless(tasks: Sequence[ExecuteMergeMethodTask]) -> list[str]:
    names = []
    for task in tasks:
        targets = [model for model in task.model_order if model != task.base_model]
        if targets and not any(task.input_parameters[m]["weight"] for m in targets):
            names.append(task.output_weight.name)
    return names

"""`varm` and `fusechat_sce` as mergekit's merge methods: parameters, and one tensor at a time.

mergekit may be half imported when this is: only its submodules are imported here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import InMemory, NonFiniteError
from fusechat_merge.methods.stacks import down_of, has_halves, is_stack, matrices
from fusechat_merge.methods.units import Granularity, members_of, shared_unit

HALVES = "halves"
"""A task has this parameter if its tensor is a stack with gate and up matrices as halves."""
Statistics = Mapping[Hashable, float]
"""Σ δ² (or Σ |δ|) over a unit, by target."""


def _not_a_boolean(value: Any) -> Any:
    """Refuse what pydantic would take for 1 or 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


_Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_a_boolean)]
_NumberFrom0 = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_a_boolean)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_not_a_boolean)]


class VarmMethod(GroupMergeMethod):
    """`merge_method: varm`; a unit is what the call (or the plan) holds of it."""

    spec = MergeMethodSpec(
        name="varm",
        pretty_name="VaRM",
        reference_url="https://arxiv.org/abs/2402.16107",
        parameters=(
            ParameterSpec(
                "granularity",
                Granularity,
                ParameterScope.SHARED,
                default="matrix",
                description="which tensors share one set of weights",
            ),
            ParameterSpec(
                "statistic",
                varm.Statistic,
                ParameterScope.SHARED,
                default="square",
                description="how far a target has moved: mean of δ², or of |δ|",
            ),
            ParameterSpec(
                "lambda",
                _Number,
                ParameterScope.SHARED,
                default=1.0,
                description="scale of the merged update; 0 keeps the pivot",
            ),
            ParameterSpec(
                "weight",
                _NumberFrom0,
                ParameterScope.NON_BASE,
                default=1.0,
                description="prior: W is in proportion to weight · statistic",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        if len(groups) > 1:
            parameters = self._with_units(groups, parameters, input_dtypes)
        return super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )

    def _with_units(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[dict[str, Any]],
        input_dtypes: Sequence[torch.dtype | None],
    ) -> list[dict[str, Any]]:
        """The parameters and, where a granularity spans tensors, the statistics of the unit."""
        names = [entry.metadata.name for entry in groups]
        shapes = {g.metadata.name or "": tuple(_base_of(g).tensor.shape) for g in groups}
        parameters = [
            {**of_tensor, HALVES: True} if name and of_halves(name, shapes) else of_tensor
            for name, of_tensor in zip(names, parameters, strict=True)
        ]
        units = [
            None if name is None else shared_unit(name, of_tensor)
            for name, of_tensor in zip(names, parameters, strict=True)
        ]
        named = [i for i, name in enumerate(names) if name is not None]
        members = members_of((unit for unit in units if unit), [names[i] or "" for i in named])
        statistics = {
            unit: unit_statistics(
                (
                    matrix
                    for i in (named[position] for position in positions)
                    for matrix in by_matrix(
                        align_dtype(groups[i], input_dtypes[i]), HALVES in parameters[i]
                    )
                ),
                unit.statistic,
            )
            for unit, positions in members.items()
        }
        return [
            {**of_tensor, "unit_statistics": statistics[unit]} if unit else of_tensor
            for unit, of_tensor in zip(units, parameters, strict=True)
        ]

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        if not group.non_base:
            return _base_of(group).tensor
        statistic, lam = parameters["statistic"], parameters["lambda"]
        prior = parameters["weight"].values_for(group.non_base)
        if not any(prior):
            raise RequestError([weightless([group.metadata.name or "the tensor"])])
        of_unit: Statistics | None = parameters.get("unit_statistics")

        def merge(matrix: TensorGroup) -> Tensor:
            passes = _passes(matrix)
            if parameters["granularity"] == "element":
                varm.write_elements(passes, prior, statistic, lam)
            else:
                known = unit_statistics([matrix], statistic) if of_unit is None else of_unit
                sums = [known.get(entry.id, 0.0) for entry in group.non_base]
                varm.write(passes, varm.weights(sums, prior), lam)
            return passes.output

        return _each_matrix(group, HALVES in parameters, merge)


class SceMethod(GroupMergeMethod):
    """`merge_method: fusechat_sce`."""

    spec = MergeMethodSpec(
        name="fusechat_sce",
        pretty_name="FuseChat SCE",
        reference_url="https://arxiv.org/abs/2408.07990",
        parameters=(
            ParameterSpec(
                "select_topk",
                _Share,
                ParameterScope.SHARED,
                default=1.0,
                description="τ: the share of a matrix's elements that is selected, those with the"
                " largest variance across targets",
            ),
            ParameterSpec(
                "variant",
                sce.Variant,
                ParameterScope.SHARED,
                default="paper",
                description="Algorithm 1, or what the authors' released code does",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        if not group.non_base:
            return _base_of(group).tensor

        def merge(matrix: TensorGroup) -> Tensor:
            passes = _passes(matrix)
            sce.merge(passes, parameters["select_topk"], parameters["variant"])
            return passes.output

        return _each_matrix(group, HALVES in parameters, merge)


METHODS = (VarmMethod(), SceMethod())
"""What this package adds to mergekit: each method's `spec` declares its parameters, once."""


def unit_statistics(groups: Iterable[TensorGroup], statistic: str) -> Statistics:
    """Σ over the groups of Σ δ_j² (or Σ |δ_j|), by target."""
    sums: dict[Hashable, list[float]] = defaultdict(list)
    for group in groups:
        with _naming(group):
            of_tensor = varm.statistics(_passes(group), statistic)
        for entry, value in zip(group.non_base, of_tensor, strict=True):
            sums[entry.id].append(value)
    return {target: math.fsum(values) for target, values in sums.items()}


def of_halves(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor is a stack of experts with gate and up matrices as halves.

    Args:
        name: of the tensor.
        shapes: of it and of the layer's other tensors, by name.
    """
    down = shapes.get(down_of(name) or "")
    stack = down is not None and is_stack(name, shapes[name])
    return stack and has_halves(shapes[name], down or ())


def by_matrix(group: TensorGroup, halves: bool) -> Iterator[TensorGroup]:
    """A tensor's group, or that of each matrix where the tensor is a stack of experts."""
    shape = tuple(_base_of(group).tensor.shape)
    if not is_stack(group.metadata.name or "", shape):
        yield group
        return
    for matrix in matrices(shape, halves):
        part = slice(matrix.first, matrix.first + matrix.numel)
        entries = (
            replace(entry, tensor=entry.tensor.reshape(-1)[part].view(matrix.shape))
            for entry in group.entries
        )
        yield replace(group, entries=tuple(entries))


def _each_matrix(
    group: TensorGroup, halves: bool, merge: Callable[[TensorGroup], Tensor]
) -> Tensor:
    """The merged tensor, each matrix of a stack of experts merged by itself."""
    with _naming(group):
        merged = [merge(matrix) for matrix in by_matrix(group, halves)]
    if len(merged) == 1:
        return merged[0]
    return torch.cat([matrix.view(-1) for matrix in merged]).view_as(_base_of(group).tensor)


def _base_of(group: TensorGroup) -> TensorEntry:
    base = group.base
    assert base is not None, "the contract requires a base"
    return base


def _passes(group: TensorGroup) -> InMemory:
    return InMemory(_base_of(group).tensor, [entry.tensor for entry in group.non_base])


@contextmanager
def _naming(group: TensorGroup) -> Iterator[None]:
    """Say which model's tensor holds NaN or Inf."""
    try:
        yield
    except NonFiniteError as error:
        at = _base_of(group) if error.target is None else group.non_base[error.target]
        raise FusechatError(non_finite(at.id, group.metadata.name)) from None


def non_finite(model: Hashable, name: str | None) -> str:
    """The message for NaN or Inf in a model's tensor."""
    tensor = f"tensor {name}" if name else "a tensor"
    return f"{tensor} of model {model} holds NaN or Inf: that checkpoint is broken, replace it"


def weightless(tensors: Sequence[str]) -> str:
    """The problem of tensors for which every target's weight is 0, after filters."""
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return (
        f"weight: every target's is 0 for {tensors[0]}{more}; give at least one target a weight"
        " above 0, or use lambda: 0 to keep the pivot's"
    )

"""``varm`` and ``fusechat_sce`` as mergekit's merge methods: parameters, and one tensor at a time.

mergekit may be half imported when this is: only its submodules are imported here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

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
from pydantic import Field
from torch import Tensor

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.mergekit_bridge.parameters import weightless
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import InMemory, NonFiniteError
from fusechat_merge.methods.granularity import SHARED, unit_of

Statistics = Mapping[Hashable, float]
"""Σ δ² (or Σ |δ|) over a unit, by target."""

_FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class VarmMethod(GroupMergeMethod):
    """``merge_method: varm``; a unit is what the call (or the plan) holds of it."""

    spec = MergeMethodSpec(
        name="varm",
        pretty_name="VaRM",
        reference_url="https://arxiv.org/abs/2402.16107",
        parameters=(
            ParameterSpec(
                "granularity",
                Literal["matrix", "module", "layer", "model", "element"],
                ParameterScope.SHARED,
                default="matrix",
                description="what shares one set of weights",
            ),
            ParameterSpec(
                "statistic",
                Literal["square", "absolute"],
                ParameterScope.SHARED,
                default="square",
                description="what a target's movement is measured by",
            ),
            ParameterSpec(
                "lambda",
                _FiniteFloat,
                ParameterScope.SHARED,
                default=1.0,
                description="scale of the merged update",
            ),
            ParameterSpec(
                "weight",
                Annotated[float, Field(ge=0, allow_inf_nan=False)],
                ParameterScope.NON_BASE,
                default=1.0,
                description="prior of a target",
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
        named = [
            (group.metadata.name, align)
            for group, dtype in zip(groups, input_dtypes, strict=True)
            if group.metadata.name is not None
            for align in [lambda group=group, dtype=dtype: align_dtype(group, dtype)]
        ]
        units: dict[tuple[str, str, str], Statistics] = {}
        result = []
        for group, given in zip(groups, parameters, strict=True):
            name, granularity = group.metadata.name, given["granularity"]
            if name is not None and granularity in SHARED:
                key = (granularity, unit_of(name, granularity), given["statistic"])
                if key not in units:
                    members = (
                        align() for other, align in named if unit_of(other, granularity) == key[1]
                    )
                    units[key] = unit_statistics(members, given["statistic"])
                given = {**given, "unit_statistics": units[key]}
            result.append(given)
        return result

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        base = _base_of(group)
        if not group.non_base:
            return base.tensor
        statistic, lam = parameters["statistic"], parameters["lambda"]
        prior = parameters["weight"].values_for(group.non_base)
        if not any(prior):
            raise RequestError([weightless([group.metadata.name or "the tensor"])])
        passes = _passes(group)
        with _naming(group):
            if parameters["granularity"] == "element":
                varm.write_elements(passes, prior, statistic, lam)
            else:
                found: Statistics | None = parameters.get("unit_statistics")
                if found is None:
                    found = unit_statistics([group], statistic)
                shares = [found.get(entry.id, 0.0) for entry in group.non_base]
                varm.write(passes, varm.weights(shares, prior), lam)
        return passes.output


class SceMethod(GroupMergeMethod):
    """``merge_method: fusechat_sce``."""

    spec = MergeMethodSpec(
        name="fusechat_sce",
        pretty_name="FuseChat SCE",
        reference_url="https://arxiv.org/abs/2408.07990",
        parameters=(
            ParameterSpec(
                "select_topk",
                Annotated[float, Field(ge=0, le=1)],
                ParameterScope.SHARED,
                default=1.0,
                description="share of the elements that is selected, by variance across targets",
            ),
            ParameterSpec(
                "variant",
                Literal["paper", "fork"],
                ParameterScope.SHARED,
                default="paper",
                description="Algorithm 1 as published, or as the authors' code has it",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        base = _base_of(group)
        if not group.non_base:
            return base.tensor
        passes = _passes(group)
        with _naming(group):
            sce.merge(passes, parameters["select_topk"], parameters["variant"])
        return passes.output


def unit_statistics(groups: Iterable[TensorGroup], statistic: str) -> Statistics:
    """Σ over the groups of Σ δ_j² (or Σ |δ_j|), by target."""
    rows: dict[Hashable, list[list[float]]] = {}
    for group in groups:
        with _naming(group):
            found = varm.statistics(_passes(group), statistic)
        for entry, value in zip(group.non_base, found, strict=True):
            rows.setdefault(entry.id, []).append([value])
    return {target: varm.total(values, 1)[0] for target, values in rows.items()}


def _base_of(group: TensorGroup) -> TensorEntry:
    base = group.base
    assert base is not None, "the contract requires a base"
    return base


def _passes(group: TensorGroup) -> InMemory:
    return InMemory(_base_of(group).tensor, [entry.tensor for entry in group.non_base])


class _naming:  # noqa: N801
    """Say which model's tensor holds NaN or Inf."""

    def __init__(self, group: TensorGroup) -> None:
        self._group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NonFiniteError):
            group = self._group
            at = _base_of(group) if error.target is None else group.non_base[error.target]
            raise FusechatError(non_finite(at.id, group.metadata.name)) from None


def non_finite(model: Hashable, name: str | None) -> str:
    """The message for NaN or Inf in a model's tensor."""
    tensor = f"tensor {name}" if name else "a tensor"
    return f"{tensor} of model {model} holds NaN or Inf: that checkpoint is broken, replace it"

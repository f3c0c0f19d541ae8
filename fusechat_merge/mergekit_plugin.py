"""Our methods in mergekit's terms: registered, checked when planned, units across tensors.

``_autoload`` calls the functions at the end of this file while mergekit is being imported, so only
mergekit's submodules are imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal

import torch
from mergekit.graph import Task
from mergekit.merge_methods import registry
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

from fusechat_merge import _autoload
from fusechat_merge.errors import ConfigError, TensorError
from fusechat_merge.granularity import SHARED, unit_of
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import InMemory, NonFiniteError
from fusechat_merge.parameters import parameter_problems, weightless

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
            raise ConfigError([weightless([group.metadata.name or "the tensor"])])
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
            raise TensorError(non_finite(at.id, group.metadata.name)) from None


def non_finite(model: Hashable, name: str | None) -> str:
    """The message for NaN or Inf in a model's tensor."""
    tensor = f"tensor {name}" if name else "a tensor"
    return f"{tensor} of model {model} holds NaN or Inf: that checkpoint is broken, replace it"


def _check(config: Any) -> None:
    problems = parameter_problems(config)
    if problems:
        raise ConfigError(problems)


def _once(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrap`` of it, unless that was done before."""
    original = getattr(owner, name)
    if not getattr(original, "_fusechat", False):
        wrapped = wraps(original)(wrap(original))
        wrapped._fusechat = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def register_methods() -> None:
    """Make ``varm`` and ``fusechat_sce`` known by name; a second call changes nothing."""
    known = {method.spec.name for method in registry.registered_methods()}
    for method in (VarmMethod(), SceMethod()):
        if method.spec.name not in known:
            registry.register(method)


def extend_planner() -> None:
    """Check our methods' parameters before mergekit plans, and give varm its units after."""
    from mergekit.plan import MergePlanner

    from fusechat_merge.mergekit_units import with_units

    def wrap(plan: Callable[[Any], None]) -> Callable[[Any], None]:
        def _plan(self: Any) -> None:
            _check(self.config)
            plan(self)
            if self.config.merge_method == "varm":
                weights, tasks = zip(*self._tensors, strict=True) if self._tensors else ((), ())
                self._tensors = list(zip(weights, with_units(tasks), strict=True))

        return _plan

    _once(MergePlanner, "_plan", wrap)


def extend_raw_planner() -> None:
    """The same for ``mergekit-pytorch``, which knows no units."""
    from mergekit.scripts import merge_raw_pytorch

    from fusechat_merge.mergekit_units import raise_if_weightless

    def wrap(plan: Callable[..., list[Task]]) -> Callable[..., list[Task]]:
        def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> list[Task]:
            _check(config)
            tasks = plan(config, *args, **kwargs)
            if config.merge_method == "varm":
                merges = [t.tensor_task for t in tasks if hasattr(t, "tensor_task")]
                if any(task.parameters["granularity"] in SHARED for task in merges):
                    raise ConfigError(
                        [
                            "mergekit-pytorch knows no modules or layers: use granularity matrix or"
                            " element here, or mergekit-yaml or fusechat-merge run"
                        ]
                    )
                raise_if_weightless(merges)
            return tasks

        return plan_flat_merge

    _once(merge_raw_pytorch, "plan_flat_merge", wrap)


def extend_genome() -> None:
    """Let ``mergekit-evolve`` search varm's weights and fusechat_sce's select_topk."""
    from mergekit.evo import genome

    genome.METHOD_PARAM_MAPS.setdefault("varm", ["weight"])
    genome.METHOD_PARAM_MAPS.setdefault("fusechat_sce", ["select_topk"])

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def genotype_merge_config(self: Any, genotype: Any) -> Any:
            config = make(self, genotype)
            return _evolved(config) if config.merge_method in ("varm", "fusechat_sce") else config

        return genotype_merge_config

    _once(genome.ModelGenome, "genotype_merge_config", wrap)


def _evolved(config: Any) -> Any:
    """A genome's configuration without what mergekit-evolve writes for other methods."""
    config.parameters = None
    for piece in config.slices or [config]:
        entries = piece.sources if config.slices else piece.models
        if config.merge_method == "fusechat_sce":
            # It searches a value per model; ours is one for all: their mean, within 0 and 1.
            found = [entry.parameters.pop("select_topk") for entry in entries if entry.parameters]
            piece.parameters = {"select_topk": _mean(found)}
        for entry in entries:
            if entry.model == config.base_model:
                entry.parameters = None
    return config


def _mean(settings: Sequence[Any]) -> Any:
    first = settings[0]
    if isinstance(first, list):
        return [_mean(items) for items in zip(*settings, strict=True)]
    if hasattr(first, "filter"):
        return first.model_copy(update={"value": _mean([item.value for item in settings])})
    return min(max(sum(settings) / len(settings), 0.0), 1.0)


_autoload.install()

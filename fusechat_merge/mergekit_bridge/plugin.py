"""Makes our methods known to mergekit: registered, checked when planned, units across tensors.

`_autoload` calls the functions at the end of this file while mergekit is being imported, so only
mergekit's submodules are imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.merge_methods import registry

from fusechat_common.errors import RequestError
from fusechat_merge.inputs.quantised import methods_of
from fusechat_merge.mergekit_bridge.methods import METHODS
from fusechat_merge.mergekit_bridge.parameters import SPECS, parameter_problems
from fusechat_merge.methods.units import MULTI_TENSOR


def _refuse(problems: Sequence[str]) -> None:
    """Raise RequestError if there are any problems."""
    if problems:
        raise RequestError(problems)


def _once(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrap` of it, unless that was done before."""
    original = getattr(owner, name)
    if not getattr(original, "_fusechat", False):
        wrapped = wraps(original)(wrap(original))
        wrapped._fusechat = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def register_methods() -> None:
    """Make our methods known to mergekit by name; a second call changes nothing."""
    known = {method.spec.name for method in registry.registered_methods()}
    for method in METHODS:
        if method.spec.name not in known:
            registry.register(method)


def extend_planner() -> None:
    """Check our methods' parameters before mergekit plans, and give varm its units after."""
    from mergekit.plan import MergePlanner

    from fusechat_merge.mergekit_bridge.units import with_halves, with_units

    def wrap(plan: Callable[[Any], None]) -> Callable[[Any], None]:
        def _plan(self: Any) -> None:
            _refuse(parameter_problems(self.config))
            if self.config.merge_method in SPECS:
                trusted = self.options.trust_remote_code
                _refuse(_quantised(self.config.referenced_models(), trusted))
            plan(self)
            if self.config.merge_method in SPECS and self._tensors:
                weights, planned = zip(*self._tensors, strict=True)
                base = planned[0].base_model
                tasks = with_halves(planned, base.config(self.options.trust_remote_code))
                if self.config.merge_method == "varm":
                    tasks = with_units(tasks)
                self._tensors = list(zip(weights, tasks, strict=True))

        return _plan

    _once(MergePlanner, "_plan", wrap)


def _quantised(models: Sequence[ModelReference], trust_remote_code: bool) -> list[str]:
    """Models whose codes mergekit would load as numbers."""
    problems = []
    for model in models:
        try:
            config = model.config(trust_remote_code).to_dict()
        except Exception:  # transformers' errors have no common base; mergekit will name them
            continue
        problems += [
            f"{model}: its weights are quantised ({method}), and mergekit merges the codes: use"
            " fusechat-merge run"
            for method in methods_of(config)
        ]
    return problems


def extend_raw_planner() -> None:
    """The same for `mergekit-pytorch`, which knows no units."""
    from mergekit.scripts import merge_raw_pytorch

    from fusechat_merge.mergekit_bridge.units import weightless_problems

    def wrap(plan: Callable[..., list[Task]]) -> Callable[..., list[Task]]:
        def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> list[Task]:
            _refuse(parameter_problems(config))
            tasks = plan(config, *args, **kwargs)
            if config.merge_method == "varm":
                merges = [t.tensor_task for t in tasks if hasattr(t, "tensor_task")]
                if any(task.parameters["granularity"] in MULTI_TENSOR for task in merges):
                    raise RequestError(
                        [
                            "mergekit-pytorch knows no modules or layers: use granularity matrix or"
                            " element here, or mergekit-yaml or fusechat-merge run"
                        ]
                    )
                _refuse(weightless_problems(merges))
            return tasks

        return plan_flat_merge

    _once(merge_raw_pytorch, "plan_flat_merge", wrap)


def extend_genome() -> None:
    """Let `mergekit-evolve` search varm's weights and fusechat_sce's select_topk."""
    from mergekit.evo import genome

    genome.METHOD_PARAM_MAPS.setdefault("varm", ["weight"])
    genome.METHOD_PARAM_MAPS.setdefault("fusechat_sce", ["select_topk"])

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def genotype_merge_config(self: Any, genotype: Any) -> Any:
            config = make(self, genotype)
            return _evolved(config) if config.merge_method in SPECS else config

        return genotype_merge_config

    _once(genome.ModelGenome, "genotype_merge_config", wrap)


def _evolved(config: Any) -> Any:
    """A genome's configuration without what mergekit-evolve writes for other methods."""
    config.parameters = None
    for piece in config.slices or [config]:
        entries = piece.sources if config.slices else piece.models
        if config.merge_method == "fusechat_sce":
            # It searches a value per model; ours is one for all: their mean, within 0 and 1.
            values = [entry.parameters.pop("select_topk") for entry in entries if entry.parameters]
            piece.parameters = {"select_topk": _mean(values)}
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

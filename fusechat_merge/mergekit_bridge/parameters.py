"""The YAML parameters of our methods: which exist, where they count, which values they take.

mergekit lets unknown names pass and ignores a setting in a place where it has no meaning; here
both are problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fusechat_common.errors import nearest
from fusechat_merge.methods.granularity import GRANULARITIES
from fusechat_merge.methods.sce import VARIANTS
from fusechat_merge.methods.varm import STATISTICS

_Check = Callable[[Any], str | None]


def _one_of(names: tuple[str, ...]) -> _Check:
    def check(value: Any) -> str | None:
        if value in names:
            return None
        return f"{value!r} is unknown{nearest(str(value), names)}; use one of {', '.join(names)}"

    return check


def _number(lowest: float = -math.inf, highest: float = math.inf) -> _Check:
    def check(value: Any) -> str | None:
        try:
            # YAML 1.1 reads 1e-3 as a string; mergekit takes it as a number.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            return f"{value!r} is not a finite number"
        if number < lowest:
            return f"{value!r} is below {lowest:g}"
        if number > highest:
            return f"{value!r} is above {highest:g}"
        return None

    return check


SHARED: dict[str, dict[str, _Check]] = {
    "varm": {
        "granularity": _one_of(GRANULARITIES),
        "statistic": _one_of(STATISTICS),
        "lambda": _number(),
    },
    "fusechat_sce": {"select_topk": _number(0.0, 1.0), "variant": _one_of(VARIANTS)},
}
PER_TARGET: dict[str, dict[str, _Check]] = {"varm": {"weight": _number(0.0)}, "fusechat_sce": {}}


def parameter_problems(config: Any) -> list[str]:
    """Everything wrong with a configuration's parameters, each with its remedy.

    Args:
        config: mergekit's ``MergeConfiguration`` or ``RawPyTorchMergeConfig``; one of another
            method has no problems here.
    """
    method = config.merge_method
    if method not in SHARED:
        return []
    problems = [] if _has_base(config) else [f"base_model is missing: {method} needs the pivot"]
    for place, settings, owner in _places(config):
        for name, setting in (settings or {}).items():
            problems += _setting_problems(method, f"{place}.{name}", name, setting, owner)
    return problems


def weightless(tensors: Sequence[str]) -> str:
    """The problem of tensors for which every target's weight is 0, after filters."""
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return (
        f"weight: every target's is 0 for {tensors[0]}{more}; give at least one target a weight"
        " above 0, or use lambda: 0 to keep the pivot's"
    )


def idle_filters(config: Any, tensors: Sequence[str]) -> list[str]:
    """The filters of our methods' settings that are part of no tensor's name: misspelt ones."""
    if config.merge_method not in SHARED:
        return []
    words = sorted({word for tensor in tensors for word in tensor.split(".")})
    return [
        f"{place}.{name}: no tensor's name has the filter {text!r} in it{nearest(text, words)}"
        for place, settings, _ in _places(config)
        for name, setting in (settings or {}).items()
        for text in _filters(setting)
        if text != "*" and not any(text in tensor for tensor in tensors)
    ]


def _filters(setting: Any) -> Iterator[str]:
    for item in setting if isinstance(setting, list) else [setting]:
        if getattr(item, "filter", None) is not None:
            yield item.filter


def _has_base(config: Any) -> bool:
    if config.base_model is not None:
        return True
    modules: Mapping[str, Any] = getattr(config, "modules", None) or {"": config}
    pieces = [getattr(module, "slices", None) or [None] for module in modules.values()]
    return all(piece and piece.base_model is not None for group in pieces for piece in group)


def _setting_problems(
    method: str, place: str, name: str, setting: Any, owner: str
) -> Iterator[str]:
    shared, per_target = SHARED[method], PER_TARGET[method]
    known = (*shared, *per_target)
    check = shared.get(name) or per_target.get(name)
    if check is None:
        yield (
            f"{place}: {method} has no parameter {name!r}{nearest(name, known)};"
            f" it takes {', '.join(known)}"
        )
    elif owner == "model" and name in shared:
        yield f"{place}: {name!r} counts for all models: move it from the model to parameters"
    elif owner == "base":
        remedy = "move it to parameters" if name in shared else "give it to the targets"
        yield f"{place}: {name!r} has no meaning under the base model: {remedy}"
    else:
        for value in _values(setting):
            problem = check(value)
            if problem:
                yield f"{place}: {problem}"


def _values(setting: Any) -> Iterator[Any]:
    """The scalars in a setting: plain, a gradient, or filtered."""
    if isinstance(setting, list):
        for item in setting:
            yield from _values(item)
    elif hasattr(setting, "filter"):
        yield from _values(setting.value)
    else:
        yield setting


def _places(config: Any) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    """(where, settings, owner) of every ``parameters``; owner is all, model or base."""
    base = config.base_model
    modules: Mapping[str, Any] = getattr(config, "modules", None) or {}
    yield "parameters", config.parameters, "all"
    yield from _model_places("", config.models, base)
    yield from _slice_places("", getattr(config, "slices", None), base)
    for name, module in modules.items():
        yield f"modules.{name}.parameters", module.parameters, "all"
        yield from _model_places(f"modules.{name}.", module.models, base)
        yield from _slice_places(f"modules.{name}.", module.slices, base)


def _model_places(
    prefix: str, models: Any, base: Any
) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    for index, entry in enumerate(models or []):
        owner = "base" if entry.model == base else "model"
        yield f"{prefix}models[{index}].parameters", entry.parameters, owner


def _slice_places(
    prefix: str, slices: Any, base: Any
) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    for index, piece in enumerate(slices or []):
        yield f"{prefix}slices[{index}].parameters", piece.parameters, "all"
        for number, source in enumerate(piece.sources):
            owner = "base" if source.model == (piece.base_model or base) else "model"
            place = f"{prefix}slices[{index}].sources[{number}].parameters"
            yield place, source.parameters, owner

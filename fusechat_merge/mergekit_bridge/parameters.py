"""The YAML parameters of our methods, checked by what each method's `spec` declares of them.

mergekit lets unknown names pass and ignores a setting in a place where it has no meaning; here
both are problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import ValidationError

from fusechat_common.errors import nearest
from fusechat_merge.mergekit_bridge.methods import METHODS

SPECS: dict[str, MergeMethodSpec] = {method.spec.name: method.spec for method in METHODS}
"""Our methods by name."""


def parameter_problems(config: Any) -> list[str]:
    """Everything wrong with a configuration's parameters, each with its remedy.

    Args:
        config: mergekit's `MergeConfiguration` or `RawPyTorchMergeConfig`; one of another
            method has no problems here.
    """
    method = config.merge_method
    if method not in SPECS:
        return []
    problems = [] if _has_base(config) else [f"base_model is missing: {method} needs the pivot"]
    for place, settings, owner in _places(config):
        for name, setting in (settings or {}).items():
            problems += _setting_problems(SPECS[method], f"{place}.{name}", name, setting, owner)
    return problems


def idle_filters(config: Any, tensors: Sequence[str]) -> list[str]:
    """The filters of our methods' settings that are part of no tensor's name: misspelt ones."""
    if config.merge_method not in SPECS:
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
    spec: MergeMethodSpec, place: str, name: str, setting: Any, owner: str
) -> Iterator[str]:
    known = {parameter.name: parameter for parameter in spec.parameters}
    parameter = known.get(name)
    if parameter is None:
        yield (
            f"{place}: {spec.name} has no parameter {name!r}{nearest(name, list(known))};"
            f" it takes {', '.join(known)}"
        )
        return
    shared = parameter.scope is ParameterScope.SHARED
    if owner == "model" and shared:
        yield f"{place}: {name!r} counts for all models: move it from the model to parameters"
    elif owner == "base":
        remedy = "move it to parameters" if shared else "give it to the targets"
        yield f"{place}: {name!r} has no meaning under the base model: {remedy}"
    else:
        for value in _values(setting):
            problem = _value_problem(parameter, value)
            if problem:
                yield f"{place}: {problem}"


def _value_problem(parameter: ParameterSpec, value: Any) -> str | None:
    try:
        parameter.validate(value)
    except ValidationError as error:
        detail = error.errors()[0]
        if detail["type"] == "literal_error":
            values = get_args(parameter.value_type)
            return (
                f"{value!r} is unknown{nearest(str(value), values)}; use one of {', '.join(values)}"
            )
        if detail["type"] == "greater_than_equal":
            return f"{value!r} is below {detail['ctx']['ge']:g}"
        if detail["type"] == "less_than_equal":
            return f"{value!r} is above {detail['ctx']['le']:g}"
        return f"{value!r} is not a finite number"
    return None


def _values(setting: Any) -> Iterator[Any]:
    """The scalars in a setting: plain, a gradient, or filtered."""
    if isinstance(setting, list):
        for item in setting:
            yield from _values(item)
    elif hasattr(setting, "filter"):
        yield from _values(setting.value)
    else:
        yield setting


def pieces_of(config: Any) -> dict[str, Any]:
    """The configuration and its modules, each by what a place in it begins with."""
    modules: Mapping[str, Any] = getattr(config, "modules", None) or {}
    return {"": config, **{f"modules.{name}.": module for name, module in modules.items()}}


def _places(config: Any) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    """(where, settings, owner) of every `parameters`; owner is all, model or base."""
    for prefix, piece in pieces_of(config).items():
        yield f"{prefix}parameters", piece.parameters, "all"
        for index, entry in enumerate(piece.models or []):
            owner = "base" if entry.model == config.base_model else "model"
            yield f"{prefix}models[{index}].parameters", entry.parameters, owner
        for index, part in enumerate(getattr(piece, "slices", None) or []):
            place = f"{prefix}slices[{index}]"
            yield f"{place}.parameters", part.parameters, "all"
            for number, source in enumerate(part.sources):
                owner = (
                    "base" if source.model == (part.base_model or config.base_model) else "model"
                )
                yield f"{place}.sources[{number}].parameters", source.parameters, owner

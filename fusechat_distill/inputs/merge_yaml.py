"""merge.yml: the configuration with which the targets are merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fusechat_distill.recipe.schema import Recipe, unexpected, unknown_key

OWN_METHODS = ("varm", "fusechat_sce")
"""What this project's other half adds to mergekit; importing mergekit takes seconds."""

HEADING = """\
# The targets of this folder, merged into one:
#   fusechat-merge run merge.yml OUT    or    mergekit-yaml merge.yml OUT
# Written anew when a target is added, as long as nothing below is changed ({digest}).
"""


def merge_configuration(recipe: Recipe, targets: Sequence[str]) -> dict[str, Any]:
    """mergekit's configuration: the pivot as base, the targets (or pivot + adapter) as models.

    A method without a base (`linear`) would merge the pivot as one more model, so the pivot is
    omitted then; the targets have its configuration and tokenizer.
    """
    base = _reference(recipe.pivot.model, recipe.pivot.revision)
    models = []
    for target in targets:
        made = _reference(str((recipe.targets_folder / target).resolve()))
        lora = recipe.training.lora is not None
        models.append({"model": _joined(base, made) if lora else _joined(made)})
    section = recipe.merge
    return {
        "merge_method": section.merge_method,
        **({"base_model": _joined(base)} if _has_base(section.merge_method) else {}),
        "models": models,
        **({"parameters": section.parameters} if section.parameters else {}),
        "dtype": section.dtype,
    }


def _has_base(merge_method: str) -> bool:
    if merge_method in OWN_METHODS:
        return True
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import BasePolicy

    policy = registry.get(merge_method).spec.contract.base
    return policy not in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)


def _reference(model: str, revision: str | None = None) -> dict[str, str]:
    path = str(Path(model).resolve()) if Path(model).is_dir() else model
    return {"path": path} | ({"revision": revision} if revision else {})


def _joined(model: dict[str, str], adapter: dict[str, str] | None = None) -> Any:
    """`model@revision+adapter`, as mergekit reads it; its long form if a name contains + or @."""
    parts = [model] + ([adapter] if adapter else [])
    if any("+" in value or "@" in value for part in parts for value in part.values()):
        return {"model": model} | ({"lora": adapter} if adapter else {})
    return "+".join("@".join(part.values()) for part in parts)


def merge_yaml(recipe: Recipe, targets: Sequence[str]) -> str:
    """The text of merge.yml."""
    body = yaml.safe_dump(merge_configuration(recipe, targets), sort_keys=False, allow_unicode=True)
    return HEADING.format(digest=_digest(body)) + body


def edited(text: str) -> bool:
    """Whether a merge.yml is no longer as `merge_yaml` wrote it."""
    lines = text.splitlines(keepends=True)
    heading, body = "".join(lines[:3]), "".join(lines[3:])
    return heading != HEADING.format(digest=_digest(body))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def merge_problems(recipe: Recipe) -> list[str]:
    """What mergekit would refuse in `merge:`, before there is anything to merge."""
    from mergekit.common import dtype_from_name
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import registry

    section = recipe.merge
    problems = []
    try:
        dtype_from_name(section.dtype)
    except RuntimeError:
        known_dtypes = "bfloat16, float16, float32, float64"
        problems.append(f"merge.dtype: {section.dtype!r} is not one of {known_dtypes}")
    methods = {method.spec.name: method.spec for method in registry.registered_methods()}
    method = methods.get(section.merge_method)
    if method is None:
        unknown = unknown_key(section.merge_method, methods, "a merge method")
        return [*problems, f"merge.merge_method: {unknown}"]
    try:
        MergeConfiguration.model_validate(merge_configuration(recipe, ["target"]))
    except Exception as error:  # pydantic's, and what mergekit's own validators raise
        problems.append(f"merge: {' '.join(str(error).split())}")
    known = {parameter.name: parameter for parameter in method.parameters}
    for name, setting in section.parameters.items():
        where = f"merge.parameters.{name}"
        if name not in known:
            problems.append(f"{where}: {unknown_key(name, known, f'a parameter of {method.name}')}")
            continue
        for value in _values(setting):
            try:
                known[name].validate(value)
            except ValidationError as error:
                problems.append(f"{where}: {unexpected(error.errors(), value)}")
    problems += [
        f"merge.parameters: {method.name} needs `{name}`"
        for name, parameter in known.items()
        if parameter.required and name not in section.parameters
    ]
    return problems


def _values(setting: Any) -> Iterator[Any]:
    """The scalars in a parameter's setting: a single value, a gradient, or values with filters."""
    if isinstance(setting, list):
        for item in setting:
            yield from _values(item)
    elif isinstance(setting, dict) and "value" in setting:
        yield from _values(setting["value"])
    else:
        yield setting

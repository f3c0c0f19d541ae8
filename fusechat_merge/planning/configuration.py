"""From a mergekit YAML to its checked configuration and the checkpoints that it names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import BaseModel
from transformers import PretrainedConfig

from fusechat_common.errors import RequestError, nearest, one_line
from fusechat_merge.inputs.adapter import in_memory, with_adapter
from fusechat_merge.inputs.checkpoint import (
    Checkpoint,
    CheckpointError,
    Folder,
    HubRepository,
    Store,
    download_model,
    read_checkpoint,
    read_settings,
)
from fusechat_merge.inputs.quantised import dequantised
from fusechat_merge.inputs.yaml_file import read_yaml
from fusechat_merge.mergekit_bridge.parameters import SPECS, parameter_problems, pieces_of
from fusechat_merge.planning.plan import Options, Plan


def read_config(
    config: str | Path | Mapping[str, Any] | MergeConfiguration, options: Options
) -> Plan:
    """The configuration alone, as a plan without outputs, the problems of its text in it."""
    if isinstance(config, MergeConfiguration):
        config, source = config.model_copy(deep=True), config.to_yaml()
        return Plan(config, source, options, problems=_config_problems(config))
    if isinstance(config, Mapping):
        raw, source = dict(config), yaml.safe_dump(dict(config), sort_keys=False)
    else:
        raw, source = read_yaml(Path(config))
    if not isinstance(raw, dict):
        raise RequestError(["a mergekit configuration is a YAML mapping with merge_method in it"])
    problems = list(_unknown_keys(raw, MergeConfiguration))
    try:
        parsed = MergeConfiguration.model_validate(raw)
    except Exception as error:  # pydantic's, or a RuntimeError of mergekit's validators
        details = error.errors() if hasattr(error, "errors") else None
        problems += _field_problems(details) if details else [one_line(error)]
        raise RequestError(problems) from error
    return Plan(parsed, source, options, problems=problems + _config_problems(parsed))


def _unknown_keys(raw: Any, annotation: Any, place: str = "") -> Iterator[str]:
    """The keys that mergekit would drop without a word, at any depth."""
    kinds = list(_alternatives(annotation))
    if isinstance(raw, list):
        items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
        for index, item in enumerate(raw if items else []):
            yield from _unknown_keys(item, tuple(items), f"{place}[{index}]")
    elif isinstance(raw, dict):
        fields: dict[str, Any] = {}
        for kind in kinds:
            if get_origin(kind) is dict:
                for key, value in raw.items():
                    yield from _unknown_keys(value, get_args(kind)[1], f"{place}.{key}")
                return
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                fields |= {name: field.annotation for name, field in kind.model_fields.items()}
        for key, value in raw.items() if fields else ():
            if key in fields:
                yield from _unknown_keys(value, fields[key], f"{place}.{key}".lstrip("."))
                continue
            remedy = nearest(str(key), sorted(fields))
            if not remedy and "parameters" in fields:
                remedy = "; a parameter stands under parameters"
            at = place or "the top of the configuration"
            yield f"unknown key {key!r} at {at}{remedy}"


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types that an annotation, or each of a tuple of them, allows."""
    union = get_origin(annotation) in (Union, UnionType)
    if union or isinstance(annotation, tuple):
        for kind in get_args(annotation) if union else annotation:
            yield from _alternatives(kind)
    else:
        yield annotation


def _field_problems(details: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for every place that pydantic refuses, however many types it tried there."""
    problems: dict[str, str] = {}
    for detail in details:
        location, value = detail["loc"], detail["input"]
        says = detail["msg"].replace("Input should", "should")
        says = says.replace("Field required", "is missing")
        if "parameters" in location[:-1]:
            location = location[: location.index("parameters") + 2]
            says = (
                "has no value; write one or leave the key out"
                if value is None
                else "takes a value, a list of numbers (a gradient), or filters: a list of"
                " {filter: part of a tensor's name, value: …}"
            )
        elif detail["type"] == "model_type" and len(location) == 2 and isinstance(value, str):
            says = f"{value!r} stands alone; write - model: {value}"
        elif location[-1] == "models" and detail["type"] == "list_type":
            says = "should be a list; write - model: NAME for each"
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location)
        problems.setdefault(place.lstrip(".") or "configuration", says)
    return [f"{place}: {says}" for place, says in problems.items()]


def _config_problems(config: MergeConfiguration) -> list[str]:
    problems = []
    methods = sorted(method.spec.name for method in registry.registered_methods())
    if config.merge_method not in methods:
        problems.append(
            f"unknown merge_method {config.merge_method!r}{nearest(config.merge_method, methods)};"
            f" use one of {', '.join(methods)}"
        )
    for key in ("dtype", "out_dtype"):
        try:
            dtype_from_name(getattr(config, key))
        except RuntimeError:
            problems.append(
                f"{key}: {getattr(config, key)!r} is unknown; use float16, bfloat16, float32 or"
                " float64"
            )
    return problems + _model_problems(config) + parameter_problems(config)


def _model_problems(config: MergeConfiguration) -> list[str]:
    """Models that a list names twice, in whatever spelling, and a list without a target."""
    problems = []
    base = config.base_model
    for prefix, piece in pieces_of(config).items():
        seen = {_whereabouts(base): base} if base else {}
        for index, entry in enumerate(piece.models or []):
            place = f"{prefix}models[{index}]"
            before = seen.setdefault(_whereabouts(entry.model), entry.model)
            if before == base and entry.model != base:
                problems.append(f"{place}: {entry.model} is the base_model {base}; leave it out")
            elif before is not entry.model and before != base:
                problems.append(f"{place}: {entry.model} is there already; name a target once")
        if piece.models and len(seen) == 1 and base and config.merge_method in SPECS:
            problems.append(f"{prefix}models: name a target beside the base_model {base}")
    return problems


def _whereabouts(reference: ModelReference) -> tuple[str, ...]:
    parts = [reference.model, *([reference.lora] if reference.lora else [])]
    return tuple(os.path.realpath(str(p)) if os.path.isdir(p.path) else str(p) for p in parts)


def referenced_models(config: MergeConfiguration) -> list[ModelReference]:
    """Every model, the base first, then in the order in which the configuration names them."""
    models = [config.base_model]
    for piece in pieces_of(config).values():
        models += [entry.model for entry in piece.models or []]
        for part in piece.slices or []:
            models += [part.base_model, *(source.model for source in part.sources)]
    return list(dict.fromkeys(model for model in models if model))


def name_adapters(config: MergeConfiguration) -> None:
    """Read a model that is an adapter's folder as the base with this adapter."""
    base = config.base_model
    if base is None:
        return
    pieces = pieces_of(config).values()
    entries = [entry for piece in pieces for entry in piece.models or []]
    entries += [s for piece in pieces for part in piece.slices or [] for s in part.sources]
    for entry in entries:
        folder = entry.model.model.path
        if (
            entry.model.lora is None
            and os.path.isfile(os.path.join(folder, "adapter_config.json"))
            and not os.path.exists(os.path.join(folder, "config.json"))
        ):
            entry.model = ModelReference(model=base.model, lora=entry.model.model)


def read_model(reference: ModelReference, options: Options, download: bool) -> Checkpoint:
    """The model's checkpoint, without its adapter.

    Raises:
        CheckpointError: everything that is wrong with its files, or how they are quantised.
    """
    store = _store(reference.model, options, download)
    try:
        checkpoint = read_checkpoint(store, str(reference))
    except OSError as error:
        raise CheckpointError([f"{reference.model}: can't be read ({one_line(error)})"]) from error
    return dequantised(checkpoint, read_settings(store, "config.json", checkpoint.name))


def read_adapter(
    reference: ModelReference,
    checkpoint: Checkpoint,
    options: Options,
    download: bool,
    like: PretrainedConfig | None = None,
) -> Checkpoint:
    """The model's checkpoint with its adapter, if it has one.

    Args:
        reference: the model.
        checkpoint: without the adapter.
        options, download: as in `plan`.
        like: configuration of the base, where the checkpoint has its names and layout.

    Raises:
        CheckpointError: it can't be read, or can't be merged.
    """
    if reference.lora is None:
        return checkpoint
    adapter = _store(reference.lora, options, download)
    try:
        config = reference.config(options.trust_remote_code)
    except Exception:  # transformers' errors have no common base; planning reports them
        models = []
    else:
        models = in_memory(config, like)
    return with_adapter(checkpoint, adapter, str(reference.lora), models)


def _store(model: ModelPath, options: Options, download: bool) -> Store:
    path = model.path
    if os.path.isdir(path):  # False too for what can be no path at all
        return Folder(Path(path))
    if os.path.exists(path):
        raise CheckpointError([f"{path}: a model is a folder, this is a file"])
    start = "" if path.startswith("/") else f"; relative paths start at {Path.cwd()}"
    if path.startswith("~"):
        start = "; ~ stands for nothing in a YAML, write the path in full"
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError([f"{path}: no such folder{start}"])
    at = (path, model.revision, options.transformers_cache)
    try:
        return download_model(*at) if download else _on_hub(*at)
    except CheckpointError as error:
        raise CheckpointError([f"{problem}{start}" for problem in error.problems]) from error


def _on_hub(repository: str, revision: str | None, cache_dir: str | None) -> Store:
    """A model on the hub; where the hub can't be reached, what the cache holds of it."""
    try:
        return HubRepository(repository, revision, cache_dir)
    except CheckpointError:
        with suppress(CheckpointError):
            return download_model(repository, revision, cache_dir, cached_only=True)
        raise

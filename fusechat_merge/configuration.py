"""From a mergekit YAML to its checked configuration and the checkpoints that it names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry

from fusechat_merge.checkpoint import (
    Checkpoint,
    CheckpointError,
    Folder,
    HubRepository,
    Store,
    cached_model,
    download_model,
    read_checkpoint,
    read_settings,
)
from fusechat_merge.errors import ConfigError, nearest, one_line
from fusechat_merge.lora import with_adapter
from fusechat_merge.merge_plan import Options, Plan
from fusechat_merge.mergekit_loader import DTYPES
from fusechat_merge.parameters import parameter_problems


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
        try:
            source = Path(config).read_text(encoding="utf-8")
            raw = yaml.safe_load(source)
        except Exception as error:  # what reads a date or a number raises what it likes
            raise ConfigError([f"{config}: can't be read as YAML ({one_line(error)})"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(["a mergekit configuration is a YAML mapping with merge_method in it"])
    known = sorted(MergeConfiguration.model_fields)
    problems = [
        f"unknown key {key!r} at the top of the configuration{nearest(str(key), known)}"
        for key in raw
        if key not in known
    ]
    try:
        parsed = MergeConfiguration.model_validate(raw)
    except Exception as error:  # pydantic's, or a RuntimeError of mergekit's validators
        details = error.errors() if hasattr(error, "errors") else None
        found = (
            [f"{'.'.join(map(str, d['loc'])) or 'configuration'}: {d['msg']}" for d in details]
            if details
            else [one_line(error)]
        )
        raise ConfigError(problems + found) from error
    return Plan(parsed, source, options, problems=problems + _config_problems(parsed))


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
    return problems + parameter_problems(config)


def referenced_models(config: MergeConfiguration) -> list[ModelReference]:
    """Every model, the base first, then in the order in which the configuration names them."""
    found: dict[ModelReference, None] = {}
    if config.base_model:
        found[config.base_model] = None
    pieces: list[Any] = [config, *(config.modules or {}).values()]
    for piece in pieces:
        for entry in piece.models or []:
            found[entry.model] = None
        for part in piece.slices or []:
            if part.base_model:
                found[part.base_model] = None
            for source in part.sources:
                found[source.model] = None
    return list(found)


def name_adapters(config: MergeConfiguration) -> None:
    """Read a model that is an adapter's folder as the base with this adapter."""
    base = config.base_model
    pieces: list[Any] = [config, *(config.modules or {}).values()]
    entries = [entry for piece in pieces for entry in piece.models or []]
    entries += [s for piece in pieces for part in piece.slices or [] for s in part.sources]
    for entry in entries:
        folder = entry.model.model.path
        if (
            base is not None
            and entry.model.lora is None
            and os.path.isfile(os.path.join(folder, "adapter_config.json"))
            and not os.path.exists(os.path.join(folder, "config.json"))
        ):
            entry.model = ModelReference(model=base.model, lora=entry.model.model)


def read_model(reference: ModelReference, options: Options, download: bool) -> Checkpoint:
    store = _store(reference.model, options, download)
    try:
        checkpoint = read_checkpoint(store, str(reference))
    except OSError as error:
        raise CheckpointError([f"{reference.model}: can't be read ({one_line(error)})"]) from error
    problems = _quantised(checkpoint, store)
    if problems:
        raise CheckpointError(problems)
    if reference.lora is None:
        return checkpoint
    adapter = _store(reference.lora, options, download)
    return with_adapter(checkpoint, adapter, str(reference.lora))


def _store(model: ModelPath, options: Options, download: bool) -> Store:
    path = model.path
    if os.path.isdir(path):  # False too for what can be no path at all
        return Folder(Path(path))
    if os.path.exists(path):
        raise CheckpointError([f"{path}: a model is a folder, this is a file"])
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError([f"{path}: no such folder"])
    found = (path, model.revision, options.transformers_cache)
    if download:
        return download_model(*found)
    try:
        return HubRepository(*found)
    except CheckpointError:
        cached = cached_model(*found)  # offline, say
        if cached is None:
            raise
        return cached


def _quantised(checkpoint: Checkpoint, store: Store) -> list[str]:
    """What keeps a checkpoint from being merged because its weights are not plain numbers."""
    try:
        config = read_settings(store, "config.json", checkpoint.name)
    except CheckpointError as error:
        return error.problems
    scheme = config.get("quantization_config") if isinstance(config, dict) else None
    if scheme:
        kind = scheme.get("quant_method", "quantised") if isinstance(scheme, dict) else "quantised"
    else:
        odd = sorted({at.dtype for at in checkpoint.tensors.values()} - DTYPES.keys())
        if not odd:
            return []
        kind = ", ".join(odd)
    return [
        f"{checkpoint.name}: its weights are quantised ({kind}); merge the original checkpoint, or"
        ' write one: python -c "import sys, transformers as t; m, o = sys.argv[1:];'
        " t.AutoModelForCausalLM.from_pretrained(m, device_map='auto').dequantize()"
        '.save_pretrained(o)" MODEL NEW_FOLDER'
    ]

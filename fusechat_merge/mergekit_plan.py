"""A mergekit YAML as mergekit itself plans it: its configuration and a task for every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusechat_merge.errors import ConfigError

if TYPE_CHECKING:
    from mergekit.architecture import WeightInfo
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Task
    from mergekit.options import MergeOptions


@dataclass(frozen=True)
class PlannedMerge:
    """What mergekit would do for one configuration.

    Attributes:
        config: the configuration, normalised by mergekit's planner to modules and slices.
        tensors: (output weight, task that computes it) in mergekit's order.
        tokenizer_task: builds the output's tokenizer; None where the base's files are copied.
        model_config: the output's transformers configuration.
    """

    config: MergeConfiguration
    tensors: Sequence[tuple[WeightInfo, Task]]
    tokenizer_task: Task | None
    model_config: Any


def read_config(path: Path) -> tuple[MergeConfiguration, str]:
    """The configuration in a YAML file, and its text.

    Raises:
        ConfigError: unreadable, not YAML, or not a mergekit configuration.
    """
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: can't be read: {error}"]) from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: a merge configuration is a mapping with merge_method, models"])
    problems = _unknown_keys(path, data, MergeConfiguration)
    try:
        config = MergeConfiguration.model_validate(data)
    except ValidationError as error:
        problems += [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    except RuntimeError as error:
        problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(problems)
    return config, text


def _unknown_keys(path: Path, data: dict[Any, Any], model: Any) -> list[str]:
    """Top-level keys that mergekit would drop without a word."""
    import difflib

    known = list(model.model_fields)
    problems = []
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; it knows {', '.join(known)}"
            problems.append(f"{path}: mergekit has no key {key!r}{hint}")
    return problems


def plan_with_mergekit(config: MergeConfiguration, options: MergeOptions) -> PlannedMerge:
    """Let mergekit plan; reads configurations and indices, no tensor.

    Raises:
        ConfigError: what mergekit (or our checks in its planner) refuses.
    """
    import click
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    try:
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        model_config = _model_out_config(
            config, architecture, trust_remote_code=options.trust_remote_code
        )
        planner = MergePlanner(config, architecture, options, model_config)
        planner._plan()
    except click.ClickException:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError([f"mergekit can't plan this merge: {error}"]) from error
    return PlannedMerge(config, planner._tensors, planner._tokenizer_task, model_config)

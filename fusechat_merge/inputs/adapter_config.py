"""What adapter_config.json says of an adapter: its scales, and what can't be merged of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

MERGE = (
    'write the merged checkpoint once: python -c "import sys, peft; a, o = sys.argv[1:]; '
    "peft.AutoPeftModelForCausalLM.from_pretrained(a, dtype='auto').merge_and_unload()"
    '.save_pretrained(o)" ADAPTER NEW_FOLDER'
)
"""The command that turns an adapter into a checkpoint, for what can't be merged by blocks."""

_CONVERT = (
    "can't be found again from the base; where the trained model is at hand, convert it to plain"
    " LoRA: model.save_pretrained(NEW_FOLDER, path_initial_model_for_weight_conversion="
    "INITIAL_ADAPTER)"
)

_NO_WEIGHTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE",
}  # fmt: skip
"""Kinds that train inputs, and change no weight."""

_BY_INPUT = {"LILY", "POLY", "SHADOW", "XLORA"}
"""Kinds whose effect depends on the input, so that peft doesn't merge them."""


def unsupported(config: Any, name: str) -> list[str]:
    """What keeps an adapter from being merged, each with its remedy."""
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if not isinstance(kind, str):  # a list or an object can't even be looked for in a set
        return [f"{name}: adapter_config.json: peft_type must be a text, not {kind!r:.80}"]
    if kind in _NO_WEIGHTS:
        return [f"{name}: {kind} changes no weights, so that there is nothing to merge"]
    if kind in _BY_INPUT:
        return [f"{name}: what {kind} adds depends on the input; peft can't merge it either"]
    if kind != "LORA" or not isinstance(config, dict):
        return [f"{name}: peft_type {kind!r:.80} can't be merged by blocks; {MERGE}"]
    wrong = [f"{name}: adapter_config.json: {problem}" for problem in _wrong_values(config)]
    return wrong or [f"{name}: {problem}" for problem in _unmergeable(config)]


def _unmergeable(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("alora_invocation_tokens"):
        yield (
            "aLoRA (alora_invocation_tokens) changes a weight from some token on only, so that no"
            " merged model does the same; train without alora_invocation_tokens"
        )
    if config.get("arrow_config"):
        yield "Arrow (arrow_config) chooses among adapters by the input; name one of them instead"
    if config.get("use_qalora"):
        yield "QALoRA (use_qalora) changes quantised weights, which peft can't merge either"
    for key, what in (("use_bdlora", "BD-LoRA"), ("kasa_config", "KaSA")):
        if config.get(key):
            yield f"{what} ({key}) can't be merged by blocks; {MERGE}"
    if ranges := config.get("layer_replication"):
        yield (
            f"layer_replication {ranges!r:.80} makes other layers than the base's; make that model"
            " first (merge_method: passthrough, one of its slices for each layer_range), then take"
            " layer_replication out of adapter_config.json"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start == "loftq":
        yield (
            "init_lora_weights 'loftq' puts other weights in the base's place; where the trained"
            " model is at hand, save it merged: model.merge_and_unload().save_pretrained(FOLDER)"
        )
    elif start.startswith(("pissa_niter", "corda", "lora_ga")):
        yield f"the factors that init_lora_weights {start!r} took out of the base {_CONVERT}"


def taken(config: Mapping[str, Any]) -> str | None:
    """How the factors that training took out of the base are found again; None where none were."""
    start = str(config.get("init_lora_weights", True)).lower()
    return start if start in ("pissa", "olora") else None


def scale(config: Mapping[str, Any], name: str, rank: int) -> float | str:
    """α / r (rsLoRA: α / √r) of a module or parameter by its name, or what is wrong with its rank.

    Args:
        config: of adapter_config.json.
        name: in the model, without peft's prefix.
        rank: that the factors have.
    """
    r = _of_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    if r != rank:
        return f"factors of rank {rank}, adapter_config.json says {r}"
    alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """A rank or α that peft finds for the module by the patterns' names."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def names(config: Mapping[str, Any], key: str, module: str) -> bool:
    """Whether a list of the configuration (`modules_to_save`, say) names a module or parameter."""
    listed = config.get(key) or []
    return any(module == name or module.endswith(f".{name}") for name in listed)


def token_rows(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The rows of a module's weight that `trainable_token_indices` says were trained."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        for name, rows in indices.items():
            if module == name or module.endswith(f".{name}"):
                return rows if _whole_numbers(rows) else None
        return None
    return indices if _whole_numbers(indices) else None


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("r", "lora_alpha"):
        value = config.get(key, 1)
        if not _is_number(value, key == "r"):
            yield f"{key} must be a number{' above 0' * (key == 'r')}, not {value!r:.80}"
    for key in ("target_parameters", "modules_to_save"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            yield f"{key} must be a list of names, not {value!r:.80}"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            yield f"{key} must map names to numbers, not {patterns!r:.80}"
            continue
        for pattern, value in patterns.items():
            if not _is_number(value, key == "rank_pattern"):
                yield f"{key} gives {pattern!r:.80} the value {value!r:.80}, no such number"
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{key}: {pattern!r:.80} is no regular expression ({error})"


def _is_number(value: Any, positive: bool) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < 1e9 if positive else -1e9 < value < 1e9

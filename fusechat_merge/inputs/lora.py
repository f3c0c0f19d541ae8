"""LoRA adapters as targets: where their factors lie, and what they add to a few rows of a weight.

A target weight is W + s·B·A (arXiv 2106.09685); only the factors are ever held in memory. The
product is computed in tiles of whole rows counted from the first, whatever is asked for, so that
its bits don't depend on the caller's buffers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusechat_merge.inputs.checkpoint import (
    Checkpoint,
    CheckpointError,
    LowRank,
    Store,
    read_settings,
    read_weights_file,
)
from fusechat_merge.inputs.stored import Location, Stored

TILE = 1 << 17
"""Elements of the product that are computed at once, or one row where that is more."""
_FILE = "adapter_model.safetensors"


class Factors:
    """Both factors in a device's memory, float32; the weight's update is scale · left @ right."""

    def __init__(
        self,
        low_rank: LowRank,
        read: Callable[[Stored], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        def widened(at: Location) -> Tensor:
            stored = read(at).T if low_rank.transposed else read(at)
            return stored.to(torch.float32).contiguous().to(device)

        ends = (low_rank.a, low_rank.b) if low_rank.transposed else (low_rank.b, low_rank.a)
        self._left, self._right = map(widened, ends)
        self._scale = low_rank.scale

    def add_to(self, flat: Tensor, start: int) -> None:
        """Add the update's elements from number `start` on to `flat` [n], float32, in place."""
        columns = self._right.shape[1]
        tile = max(1, TILE // columns)
        end = start + flat.numel()
        for row in range(start // columns // tile * tile, -(-end // columns), tile):
            update = (self._left[row : row + tile] @ self._right).mul_(self._scale).view(-1)
            first = row * columns
            low, high = max(first, start), min(first + update.numel(), end)
            flat[low - start : high - start].add_(update[low - first : high - first])


def with_adapter(checkpoint: Checkpoint, store: Store, name: str) -> Checkpoint:
    """The checkpoint as the adapter changes it.

    Args:
        checkpoint: the model that the adapter was trained on.
        store: where the adapter is.
        name: what messages call it.

    Raises:
        CheckpointError: no LoRA adapter, or one with parts that can't be merged by blocks.
    """
    if "adapter_config.json" not in store.names():
        raise CheckpointError([f"{name}: is no adapter, it holds no adapter_config.json"])
    config = read_settings(store, "adapter_config.json", name)
    problems = _unsupported(config, name)
    if _FILE not in store.names():
        pickled = "adapter_model.bin" in store.names()
        why = "its weights are pickled, which can run code; load and save it with peft once"
        raise CheckpointError([*problems, f"{name}: {why if pickled else f'holds no {_FILE}'}"])
    try:
        locations, file = read_weights_file(store, _FILE, f"{name}: {_FILE}")
    except CheckpointError as error:
        raise CheckpointError([*problems, *error.problems]) from error
    if problems:
        raise CheckpointError(problems)
    path = _FILE if store.folder is None else str((store.folder / _FILE).absolute())
    locations = {key: replace(at, file=path) for key, at in locations.items()}

    tensors, low_rank = dict(checkpoint.tensors), dict(checkpoint.low_rank)
    for key, at in locations.items():
        plain = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", plain)
        if match is None:
            if plain in tensors and at.shape == tensors[plain].shape:
                tensors[plain] = at  # modules_to_save
            else:
                problems.append(f"{name}: {key} fits no tensor of {checkpoint.name}")
            continue
        half = len(key) - len(plain) + match.start(3)
        other = key[:half] + ("B" if match[3] == "A" else "A") + key[half + 1 :]
        if other not in locations:
            problems.append(f"{name}: {key}: {other} is missing")
        elif match[3] == "A":
            embedding = bool(match[2])
            problem = _pair(match[1], key, other, embedding, config, locations, tensors, low_rank)
            if problem:
                problems.append(f"{name}: {problem}")
    if problems:
        raise CheckpointError(problems)
    folder = checkpoint.folder if store.folder is not None else None
    files = checkpoint.files | {path: file}
    return replace(checkpoint, folder=folder, tensors=tensors, files=files, low_rank=low_rank)


def _unsupported(config: Any, name: str) -> list[str]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        return [f"{name}: peft_type {kind!r} can't be merged by blocks; merge_and_unload it first"]
    wrong = _wrong_values(config)
    return [f"{name}: adapter_config.json: {problem}" for problem in wrong] + [
        f"{name}: {what} can't be merged by blocks; merge_and_unload the adapter first"
        for what, used in (
            ("DoRA (use_dora)", config.get("use_dora")),
            ("bias", config.get("bias", "none") != "none" or config.get("lora_bias")),
            ("target_parameters", config.get("target_parameters")),
            ("aLoRA (alora_invocation_tokens)", config.get("alora_invocation_tokens")),
        )
        if used
    ]


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("r", "lora_alpha"):
        value = config.get(key, 1)
        if not _is_number(value, key == "r"):
            yield f"{key} must be a number{' above 0' * (key == 'r')}, not {value!r:.80}"
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


def _pair(
    module: str,
    key: str,
    other: str,
    embedding: bool,
    config: Mapping[str, Any],
    locations: Mapping[str, Location],
    tensors: Mapping[str, Stored],
    low_rank: dict[str, LowRank],
) -> str | None:
    """Enter one module's factors; what is wrong with them."""
    weight = f"{module}.weight"
    if weight not in tensors:
        return f"{key}: the model has no {weight}"
    a, b = locations[key], locations[other]
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return f"{key}: factors of shape {list(b.shape)} and {list(a.shape)} don't fit"
    shape = (b.shape[0], a.shape[1])
    if tensors[weight].shape != (shape[::-1] if transposed else shape):
        return f"{key}: B·A is {list(shape)}, {weight} is {list(tensors[weight].shape)}"
    rank = _of_pattern(config.get("rank_pattern"), module, config.get("r", a.shape[0]))
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    low_rank[weight] = LowRank(a, b, alpha / divisor, transposed)
    return None


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """A rank or α that peft finds for the module by the patterns' names."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

"""config.json's keys that describe layers, after slices have put others in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from fusechat_merge.inputs.loading import Loading, loading
from fusechat_merge.planning.plan import Plan

_LAYERWISE = re.compile(
    r"layer|block|pattern|type|heads|intermediate|rope|window|attn|attention|mlp|moe|sparsity"
)
_INDICES = re.compile(r"(layers|indices|idx)$")


def follow_layers(
    planned: Plan, configs: Mapping[str, Any], sources: Sequence[tuple[str, int]]
) -> None:
    """Set the plan's `layer_keys`, and add what config.json can't say to its problems.

    Args:
        planned: with its outputs.
        configs: every model's configuration.
        sources: for each layer of the output, the model and the layer that it comes from.
    """
    donor = configs[planned.donor]
    text = donor.get_text_config()
    number = getattr(text, "num_hidden_layers", None)
    if not isinstance(number, int) or list(sources) == [(planned.donor, n) for n in range(number)]:
        return
    wanted = _wanted(text, {m: c.get_text_config() for m, c in configs.items()}, sources, number)
    inner = next((k for k in donor.sub_configs if getattr(donor, k, None) is text), None)
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    made = _with(donor, inner, wanted | {count: len(sources)})
    if isinstance(made, str):
        planned.problems.append(f"{planned.donor}: config.json can't describe these layers: {made}")
        return
    before = text.to_dict()
    for key, value in wanted.items():
        found = getattr(made.get_text_config(), key)
        if (list(found) if isinstance(found, (list, tuple)) else found) != value:
            planned.problems.append(
                f"{planned.donor}: config.json can't say that {key} is {value} after these slices"
            )
        elif before.get(key) != value:
            planned.layer_keys[f"{inner}.{key}" if inner else key] = value
    try:
        found, alone = _loads(planned, made), _loads_alone(planned, donor)
    except Exception:  # a class that transformers can't build here
        return
    for problem in found.beyond(alone):
        planned.problems.append(
            f"the slices' layers don't fit any config.json of {planned.donor}'s kind: it would load"
            f" {problem}"
        )


def _wanted(
    text: Any, texts: Mapping[str, Any], sources: Sequence[tuple[str, int]], number: int
) -> dict[str, Any]:
    """Per-layer lists and lists of layers' numbers, as they should be."""
    wanted: dict[str, Any] = {}
    for key, value in vars(text).items():
        if not isinstance(value, (list, tuple)) or not _LAYERWISE.search(key):
            continue
        if len(value) == number:
            own = {model: getattr(other, key, None) or value for model, other in texts.items()}
            if all(layer < len(own[model]) for model, layer in sources):
                wanted[key] = [own[model][layer] for model, layer in sources]
        elif _INDICES.search(key) and all(type(n) is int and 0 <= n < number for n in value):
            own = {model: getattr(other, key, None) or () for model, other in texts.items()}
            wanted[key] = [n for n, (model, layer) in enumerate(sources) if layer in own[model]]
    first = getattr(text, "first_k_dense_replace", None)
    if isinstance(first, int):
        dense = [layer < first for _, layer in sources]
        wanted["first_k_dense_replace"] = dense.index(False) if False in dense else len(dense)
    return wanted


def _with(config: Any, inner: str | None, changes: Mapping[str, Any]) -> Any:
    """The configuration with other values; why there can't be one."""
    made = deepcopy(config.to_dict())
    (made[inner] if inner else made).update(changes)
    try:
        return type(config).from_dict(made)
    except Exception as error:  # transformers' checks have no common base
        return " ".join(str(error).split())[:200]


def _loads(planned: Plan, config: Any) -> Loading:
    return loading(config, {output.tensor: output.tensor_shape for output in planned.outputs})


def _loads_alone(planned: Plan, config: Any) -> Loading:
    tensors = planned.models[planned.donor].tensors
    return loading(config, {name: at.shape for name, at in tensors.items()})

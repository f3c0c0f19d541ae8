"""A target's model card: how the model was trained and on what, without local paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml


def model_card(made_of: Mapping[str, Any]) -> str:
    """Markdown with the hub's metadata, from `TrainStage.made_of`."""
    from huggingface_hub import ModelCard, ModelCardData

    pivot, dataset = made_of["pivot"], made_of["dataset"]["path"]
    metadata = ModelCardData(
        base_model=None if is_local(pivot) else pivot,
        datasets=None if is_local(dataset) else [dataset],
        library_name="transformers" if made_of["training"]["lora"] is None else "peft",
        pipeline_tag="text-generation",
        tags=["fusechat", "trl", "knowledge-fusion"],
    )
    text = "\n".join(_lines(publishable(made_of)))
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"))


def is_local(name: str) -> bool:
    """Whether the name of a model or dataset is a local path, not a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)


def publishable(value: Any) -> Any:
    """JSON values with every local path replaced by its last part."""
    if isinstance(value, Mapping):
        return {key: publishable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(part) for part in value]
    if isinstance(value, str) and "://" not in value and is_local(value):
        return os.path.basename(os.path.normpath(value))
    return value


def _lines(made_of: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {made_of['target']}\n"
    yield from _origin(made_of)
    won = made_of["decisions"]["won"]
    if won:
        yield "\n## What was decided\n"
        yield from _shares(won)
    if made_of["metrics"]:
        yield "\n## On held-out conversations\n\n| | |\n|---|---|"
        for name, value in made_of["metrics"].items():
            yield f"| {name.removeprefix('eval_')} | {value:.4f} |"
    yield "\n## Settings\n\n```yaml"
    keys = ("dataset", "max_length", "alignment", "fusion", "training", "versions")
    settings = {key: made_of[key] for key in keys}
    yield yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False).rstrip()
    yield "```"


def _origin(made_of: Mapping[str, Any]) -> Iterator[str]:
    name, sources = f"`{made_of['pivot']}`", made_of["sources"]
    if not sources:
        yield f"{name}, fine-tuned on a dataset's answers alone: the baseline for fusion."
        return
    others = ", ".join(f"`{source}`" for source in sources.values())
    method = {"min_ce": "MinCE", "avg_ce": "AvgCE"}[made_of["fusion"]["function"]]
    weight = made_of["training"]["lambda"]
    yield (
        f"{name}, fine-tuned on a dataset's answers and on fused distributions over them: those of "
        f"{name} itself and of {others}, aligned to its tokens and fused by {method}. The loss is "
        f"λ·L_CLM + (1 - λ)·L_Fusion with λ = {weight:g}."
    )


def _shares(won: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    columns = [c for c in ("samples", "positions") if any(c in shares for shares in won.values())]
    yield f"| model | {' | '.join(f'share of {column}' for column in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for model, shares in won.items():
        yield f"| {model} | {' | '.join(f'{shares.get(c, 0.0):.1%}' for c in columns)} |"

"""The model card of a target: from what it was made, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def model_card(made_of: Mapping[str, Any]) -> str:
    """Markdown with the hub's metadata, from `TrainStage.made_of`."""
    return "\n".join(_lines(made_of)) + "\n"


def _lines(made_of: Mapping[str, Any]) -> Iterator[str]:
    pivot, sources = made_of["pivot"], made_of["sources"]
    metadata: dict[str, Any] = {
        "library_name": "peft" if made_of["training"]["lora"] is not None else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fusechat", "trl", "knowledge-fusion"],
    }
    # The hub takes names of its own only.
    if _on_hub(pivot):
        metadata["base_model"] = pivot
    if _on_hub(made_of["dataset"]["path"]):
        metadata["datasets"] = [made_of["dataset"]["path"]]
    yield "---"
    yield yaml.safe_dump(metadata, sort_keys=True).rstrip()
    yield "---"
    yield ""
    yield f"# {made_of['target']}"
    yield ""
    yield from _origin(made_of, pivot, sources)
    won = made_of["decisions"]["won"]
    if won:
        yield ""
        yield "## What was decided"
        yield ""
        yield from _shares(won)
    if made_of["metrics"]:
        yield ""
        yield "## On held-out conversations"
        yield ""
        yield "| | |"
        yield "|---|---|"
        for name, value in made_of["metrics"].items():
            yield f"| {name.removeprefix('eval_')} | {value:.4f} |"
    yield ""
    yield "## Settings"
    yield ""
    yield "```yaml"
    settings = {
        key: made_of[key]
        for key in ("dataset", "max_length", "alignment", "fusion", "training", "versions")
    }
    yield yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False).rstrip()
    yield "```"


def _origin(made_of: Mapping[str, Any], pivot: str, sources: Mapping[str, str]) -> Iterator[str]:
    name = _name(pivot)
    if not sources:
        yield f"{name}, fine-tuned on a dataset's answers alone: the baseline for fusion."
        return
    others = ", ".join(_name(source) for source in sources.values())
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


def _on_hub(name: str) -> bool:
    return name.count("/") <= 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))


def _name(model: str) -> str:
    return f"`{model if _on_hub(model) else Path(model).name}`"

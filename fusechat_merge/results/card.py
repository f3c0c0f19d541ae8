"""The merged model's card: what was merged, how, and how much each target counts where."""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml

from fusechat_merge.methods.units import Unit
from fusechat_merge.planning.plan import Plan
from fusechat_merge.results.report import place_of, short_names


def model_card(planned: Plan, units: Sequence[Unit]) -> str:
    """Markdown with the hub's metadata on top."""
    config = planned.config
    models = list(planned.models)
    base = str(config.base_model) if config.base_model else None
    hub = [model for model in models if not os.path.exists(model.split("@")[0].split("+")[0])]
    metadata = {
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "fusechat"],
        **({"base_model": hub} if hub else {}),
    }
    names = {"varm": "VaRM (arXiv 2402.16107)", "fusechat_sce": "SCE (arXiv 2408.07990)"}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        "---",
        "",
        "# Merged model",
        "",
        f"A merge of {len(models)} checkpoints by"
        f" {names.get(config.merge_method, config.merge_method)}, made with fusechat-merge.",
        "",
        *([f"Base: `{base}`", ""] if base else []),
        *(f"- `{model}`" for model in models if model != base),
        "",
        *_weights(units, [model for model in models if model != base]),
        "## Configuration",
        "",
        "```yaml",
        planned.source.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _weights(units: Sequence[Unit], targets: Sequence[str]) -> list[str]:
    units = [unit for unit in units if len(unit.weights) == len(targets)]
    if not units or not targets:
        return []
    rows: dict[str, list[Sequence[float]]] = {"all": [unit.weights for unit in units]}
    for unit in units:
        for tensor in unit.tensors:
            rows.setdefault(place_of(tensor)[1], []).append(unit.weights)
    header = " | ".join(short_names(targets))
    lines = [
        "## Weights",
        "",
        f"Mean merge weight of each target ({len(units)} units;"
        " `fusechat_merge.json` has every one):",
        "",
        f"| | {header} |",
        "|---|" + "---|" * len(targets),
    ]
    for kind, found in rows.items():
        means = (sum(column) / len(found) for column in zip(*found, strict=True))
        lines.append(f"| {kind} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return [*lines, ""]

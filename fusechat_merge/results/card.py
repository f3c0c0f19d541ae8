"""The merged model's card: what was merged, how, and how much each target counts where."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from fusechat_merge.results.record import MergeRecord
from fusechat_merge.results.report import place_of, short_names

_PAPERS = {"varm": "VaRM (arXiv 2402.16107)", "fusechat_sce": "SCE (arXiv 2408.07990)"}


def model_card(record: MergeRecord, hub_ids: Sequence[str], configuration: str) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        record: of the merge.
        hub_ids: of the merged models that are on the hub.
        configuration: the merge's YAML, as it may be published.
    """
    metadata = ModelCardData(
        base_model=list(hub_ids) or None,
        library_name="transformers",
        tags=["merge", "mergekit", "fusechat"],
    )
    method = _PAPERS.get(record.merge_method, record.merge_method)
    targets = [model for model in record.models if model != record.base_model]
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        "# Merged model",
        "",
        f"A merge of {len(record.models)} checkpoints by {method}, made with fusechat-merge.",
        "",
        *([f"Base: `{record.base_model}`", ""] if record.base_model else []),
        *(f"- `{target}`" for target in targets),
        "",
        *_weights(record, targets),
        "## Configuration",
        "",
        "```yaml",
        configuration.rstrip(),
        "```",
    ]
    return str(ModelCard("\n".join(lines) + "\n"))


def _weights(record: MergeRecord, targets: Sequence[str]) -> list[str]:
    """The mean weights by kind of module, as a table; nothing where there are none."""
    units = [unit for unit in record.units if len(unit.weights) == len(targets)]
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

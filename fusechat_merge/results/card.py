"""The merged model's card: what was merged, how, and by which weights."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from fusechat_merge.results.record import MergeRecord
from fusechat_merge.results.report import mean_weights, place_of, short_names

_PAPERS = {"varm": "VaRM (arXiv 2402.16107)", "fusechat_sce": "SCE (arXiv 2408.07990)"}


def model_card(record: MergeRecord, hub_ids: Sequence[str], configuration: str) -> str:
    """Markdown, with the hub's metadata at the top.

    Args:
        record: the merge's record.
        hub_ids: ids of the merged models that are on the hub.
        configuration: the merge's YAML without local paths.
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
        *(["Quantised, their weights dequantised when read:", ""] if record.dequantised else []),
        *(f"- {model}" for model in record.dequantised),
        *([""] if record.dequantised else []),
        *_weights(record, targets),
        "## Configuration",
        "",
        "```yaml",
        configuration.rstrip(),
        "```",
    ]
    return str(ModelCard("\n".join(lines) + "\n"))


def _weights(record: MergeRecord, targets: Sequence[str]) -> list[str]:
    """The mean weights of all units and by kind of module, as a table; empty without units."""
    units = [unit for unit in record.units if len(unit.weights) == len(targets)]
    if not units or not targets:
        return []
    rows = [("all", unit.weights) for unit in units]
    rows += [(place_of(tensor).kind, unit.weights) for unit in units for tensor in unit.tensors]
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
    for kind, (means, _) in mean_weights(rows).items():
        lines.append(f"| {kind} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return [*lines, ""]

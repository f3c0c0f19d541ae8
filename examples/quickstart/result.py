"""Held-out losses shown as a table, in words and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

Losses = dict[str, dict[str, float]]  # {model: {domain: bits per byte}}


def table(losses: Losses) -> Table:
    """Losses by model and domain; the lowest of a column is bold."""
    columns = _columns(losses)
    shown = Table(title="held-out loss, bits per byte (lower is better)", title_justify="left")
    shown.add_column("model")
    for column in columns:
        shown.add_column(column, justify="right")
    for model in losses:
        shown.add_row(
            model,
            *(
                f"[bold]{values[model]:.4f}[/]"
                if values[model] == min(values.values())
                else f"{values[model]:.4f}"
                for values in columns.values()
            ),
        )
    return shown


def in_words(losses: Losses, ours: str, others: Sequence[str]) -> list[str]:
    """One line for each other model: where `ours` has a lower loss, and by how much on average."""
    lines = []
    for other in others:
        domains = losses[ours]
        lower = [domain for domain in domains if losses[ours][domain] < losses[other][domain]]
        change = fmean(losses[ours].values()) / fmean(losses[other].values()) - 1
        lines.append(
            f"{ours} against {other}: lower in {len(lower)} of {len(domains)} domains"
            f"{' (' + ', '.join(lower) + ')' if 0 < len(lower) < len(domains) else ''}, "
            f"mean {change:+.2%}"
        )
    return lines


def draw(losses: Losses, pivot: str, file: Path) -> None:
    """Draw each model's change of loss against the pivot, by domain, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = _columns(losses)
    models = [model for model in losses if model != pivot]
    colors = ["#9ecae1", "#6baed6", "#3182bd", "#fdae6b", "#d94801"]
    width = 0.8 / len(models)
    figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
    for i, (model, color) in enumerate(zip(models, colors, strict=True)):
        changes = [100 * (values[model] / values[pivot] - 1) for values in columns.values()]
        left = [x + (i - (len(models) - 1) / 2) * width for x in range(len(columns))]
        bars = axes.bar(left, changes, 0.92 * width, label=model, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=7.5, padding=2)
    axes.axhline(0, color="black", linewidth=1)
    axes.axvline(len(columns) - 1.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(columns)), list(columns))
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.set_ylabel(f"change of held-out loss\nagainst the {pivot}, % (lower is better)")
    axes.set_title("Targets and merges, domain by domain", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(models), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07))
    figure.savefig(file, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _columns(losses: Losses) -> dict[str, dict[str, float]]:
    """{domain, and "mean": {model: bits per byte}}."""
    domains = next(iter(losses.values()))
    columns = {d: {model: values[d] for model, values in losses.items()} for d in domains}
    return columns | {"mean": {model: fmean(values.values()) for model, values in losses.items()}}

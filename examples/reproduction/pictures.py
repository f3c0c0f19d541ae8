"""A forest plot: changes with their intervals, one a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusechat_distill.evaluation.schema import ConfidenceInterval

COLORS = {"better": "#1a7f37", "worse": "#b42318", "within noise": "#667085"}


def forest(rows: Sequence[tuple[str, ConfidenceInterval, str]], title: str, path: Path) -> None:
    """Draw rows of (what is compared, its relative change, verdict) from the top down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.26 * len(rows)), layout="constrained")
    for line, (_, change, verdict) in enumerate(rows):
        low = change.value if change.low is None else change.low
        high = change.value if change.high is None else change.high
        color = COLORS[verdict]
        axes.plot([100 * low, 100 * high], [line, line], color=color, linewidth=1.6)
        axes.plot(100 * change.value, line, "o", color=color, markersize=4.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        "% (less is better), with 95 % intervals over answers and training seeds;\n"
        "colours after Holm's correction for all comparisons of the table"
    )
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        pyplot.Line2D([], [], color=color, marker="o", label=verdict, markersize=4.5)
        for verdict, color in COLORS.items()
    ]
    figure.legend(handles=handles, ncols=3, frameon=False, fontsize=8, loc="outside lower right")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)

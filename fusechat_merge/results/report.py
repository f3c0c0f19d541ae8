"""The merge weights for people: tables for the terminal and a heat map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusechat_merge.methods.units import layer_of
from fusechat_merge.results.record import Analysis

if TYPE_CHECKING:
    from rich.table import Table

K = TypeVar("K")
_READABLE = 8  # most layers for which the cells of the heat map show their numbers


def place_of(tensor: str) -> tuple[int | None, str]:
    """Layer number and kind, such as `(3, "self_attn.q_proj")`; no number outside layers."""
    layer = layer_of(tensor)
    kind = tensor if layer == tensor else tensor[len(layer) + 1 :]
    kind = kind.removesuffix(".weight")
    number = layer.rpartition(".")[2]
    return (int(number) if layer != tensor else None), kind


def tables(report: Analysis, most: int = 10) -> list[Table]:
    """The mean weights by kind of module and by layer, and the most uneven units' weights."""
    from rich.table import Table

    placed = [(*place_of(tensor), unit.weights) for tensor, unit in report.by_tensor().items()]
    by_kind = mean_weights((kind, weights) for _, kind, weights in placed)
    by_layer = mean_weights((n, weights) for n, _, weights in placed if n is not None)
    ranked = sorted(report.units, key=lambda unit: -(max(unit.weights) - min(unit.weights)))
    uneven = [(unit.name, unit.numel, unit.weights) for unit in ranked[:most]]
    shown = []
    for title, first, second, rows in (
        ("weights by module", "module", "tensors", [(k, n, w) for k, (w, n) in by_kind.items()]),
        ("weights by layer", "layer", "tensors", [(k, n, w) for k, (w, n) in by_layer.items()]),
        (f"most uneven of {len(report.units)} units", "unit", "elements", uneven),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column(first, overflow="fold")
        for name in (second, *short_names(report.targets)):
            table.add_column(name, justify="right")
        for key, number, weights in rows:
            table.add_row(str(key), f"{number:,}", *(f"{weight:.3f}" for weight in weights))
        shown.append(table)
    return shown


def mean_weights(
    rows: Iterable[tuple[K, Sequence[float]]],
) -> dict[K, tuple[list[float], int]]:
    """Mean weights of the rows that share a key, and the number of these rows."""
    grouped: dict[K, list[Sequence[float]]] = {}
    for key, weights in rows:
        grouped.setdefault(key, []).append(weights)
    return {
        key: ([sum(column) / len(group) for column in zip(*group, strict=True)], len(group))
        for key, group in grouped.items()
    }


def short_names(models: Sequence[str]) -> list[str]:
    """The models' last path components, as many as it takes to tell them apart."""
    for parts in range(1, max((model.count("/") for model in models), default=0) + 2):
        short = ["/".join(model.rstrip("/").split("/")[-parts:]) for model in models]
        if len(set(short)) == len(short):
            return short
    return list(models)


def draw(report: Analysis, path: Path) -> None:
    """Draw the weights as a heat map (layers × modules, a panel a target) into a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    placed = [(*place_of(tensor), unit.weights) for tensor, unit in report.by_tensor().items()]
    layers = sorted({number for number, _, _ in placed if number is not None})
    inside = list(dict.fromkeys(kind for number, kind, _ in placed if number is not None))
    outside = [kind for number, kind, _ in placed if number is None]
    # For each target a grid [layers, kinds] and, below it, a strip [1, kinds outside layers].
    count = len(report.targets)
    grid = np.full((count, max(len(layers), 1), max(len(inside), 1)), np.nan)
    strip = np.full((count, 1, max(len(outside), 1)), np.nan)
    for number, kind, weights in placed:
        if number is None:
            strip[:, 0, outside.index(kind)] = weights
        else:
            grid[:, layers.index(number), inside.index(kind)] = weights

    width = 1.9 + 0.42 * max(len(inside), len(outside))
    height = 2.6 + 0.24 * len(layers) + 1.6
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(width * count + 1.2, height),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [max(len(layers), 3), 1]},
    )
    for j, name in enumerate(short_names(report.targets)):
        for axis, values, labels in (
            (axes[0, j], grid[j], inside),
            (axes[1, j], strip[j], outside),
        ):
            # A fixed range, so that two merges can be compared; grey: no such tensor.
            image = axis.imshow(
                np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis", aspect="auto"
            )
            axis.set_facecolor("0.85")
            if len(layers) <= _READABLE:
                for (row, column), weight in np.ndenumerate(values):
                    if not np.isnan(weight):
                        style = {"ha": "center", "va": "center", "fontsize": 6}
                        color = "black" if weight > 0.6 else "white"
                        axis.text(column, row, f"{weight:.2f}", color=color, **style)
            axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
        axes[0, j].set_title(name, fontsize=10)
        step = max(1, len(layers) // 16)
        axes[0, j].set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
        axes[1, j].set_yticks([])
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("outside\nlayers", fontsize=8)
    figure.colorbar(image, ax=axes, label="merge weight", shrink=0.8)
    granularities = ", ".join(sorted({unit.granularity for unit in report.units}))
    figure.suptitle(f"{report.method}, granularity {granularities}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""What a merge decided, for people: tables for the terminal and a heat map of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_merge.methods.units import layer_of
from fusechat_merge.results.record import Analysis

if TYPE_CHECKING:
    from rich.table import Table


_READABLE = 8
"""With at most so many layers the heat map's cells show their numbers."""


def place_of(tensor: str) -> tuple[int | None, str]:
    """(layer number, what it is there): ``(3, "self_attn.q_proj")``; no number outside layers."""
    layer = layer_of(tensor)
    kind = tensor if layer == tensor else tensor[len(layer) + 1 :]
    kind = kind.removesuffix(".weight")
    number = layer.rpartition(".")[2]
    return (int(number) if layer != tensor else None), kind


def tables(report: Analysis, most: int = 10) -> list[Table]:
    """The mean weights by module kind and by layer, and the units with the most uneven ones."""
    from rich.table import Table

    weights = {tensor: unit.weights for tensor, unit in report.by_tensor().items()}
    kinds = _means((place_of(tensor)[1], w) for tensor, w in weights.items())
    layers = _means(
        (number, w) for t, w in weights.items() if (number := place_of(t)[0]) is not None
    )
    names = short_names(report.targets)
    shown = [
        _table("weights by module", "module", names, kinds),
        _table("weights by layer", "layer", names, layers),
    ]
    uneven = Table(title=f"most uneven of {len(report.units)} units", title_justify="left")
    uneven.add_column("unit", overflow="fold")
    uneven.add_column("elements", justify="right")
    for name in names:
        uneven.add_column(name, justify="right")
    ranked = sorted(report.units, key=lambda unit: -(max(unit.weights) - min(unit.weights)))
    for unit in ranked[:most]:
        uneven.add_row(unit.name, f"{unit.numel:,}", *(f"{w:.3f}" for w in unit.weights))
    return [*shown, uneven]


def _means(rows: Iterable[tuple[Any, Sequence[float]]]) -> dict[Any, tuple[list[float], int]]:
    """Mean weights of the rows that share a key, and how many they are."""
    grouped: dict[Any, list[Sequence[float]]] = {}
    for key, values in rows:
        grouped.setdefault(key, []).append(values)
    return {
        key: ([sum(column) / len(found) for column in zip(*found, strict=True)], len(found))
        for key, found in grouped.items()
    }


def _table(
    title: str, first: str, names: Sequence[str], rows: Mapping[Any, tuple[list[float], int]]
) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    table.add_column("tensors", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for key, (means, count) in rows.items():
        table.add_row(str(key), str(count), *(f"{mean:.3f}" for mean in means))
    return table


def short_names(models: Sequence[str]) -> list[str]:
    """The shortest trailing path parts that tell the models apart."""
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

    placed = [(place_of(tensor), unit.weights) for tensor, unit in report.by_tensor().items()]
    layers = sorted({number for (number, _), _ in placed if number is not None})
    inside = list(dict.fromkeys(kind for (number, kind), _ in placed if number is not None))
    outside = [kind for (number, kind), _ in placed if number is None]
    count = len(report.targets)
    grid = np.full((count, max(len(layers), 1), max(len(inside), 1)), np.nan)
    strip = np.full((count, 1, max(len(outside), 1)), np.nan)
    for (number, kind), weights in placed:
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
    image = None
    for j, name in enumerate(short_names(report.targets)):
        for axis, values, labels in (
            (axes[0, j], grid[j], inside),
            (axes[1, j], strip[j], outside),
        ):
            # Fixed ends, so that two merges can be compared; grey: no such tensor.
            image = axis.imshow(
                np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis", aspect="auto"
            )
            axis.set_facecolor("0.85")
            if len(layers) <= _READABLE:
                for (row, column), weight in np.ndenumerate(values):
                    if not np.isnan(weight):
                        ink = "black" if weight > 0.6 else "white"
                        axis.text(
                            column,
                            row,
                            f"{weight:.2f}",
                            ha="center",
                            va="center",
                            color=ink,
                            fontsize=6,
                        )
            axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
        axes[0, j].set_title(name, fontsize=10)
        step = max(1, len(layers) // 16)
        axes[0, j].set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
        axes[1, j].set_yticks([])
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("outside\nlayers", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=axes, label="merge weight", shrink=0.8)
    granularities = ", ".join(sorted({unit.granularity for unit in report.units}))
    figure.suptitle(f"{report.method}, granularity {granularities}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)

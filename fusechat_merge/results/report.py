"""The merge weights for people: tables for the terminal and a heat map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fusechat_merge.methods.units import layer_of
from fusechat_merge.results.record import Analysis

if TYPE_CHECKING:
    from rich.table import Table

K = TypeVar("K")
_EXPERT = re.compile(r"(?<=experts\.)(\d+)\.|\[(\d+)\]")
_READABLE = 8  # most layers for which the cells of the heat map show their numbers
_FEW = 32  # the same of its columns


class Place(NamedTuple):
    """Where a matrix is in a model.

    Attributes:
        layer: what its layers' names begin with, and its layer's number; None outside layers.
        kind: its name within the layer, without an expert's number, such as `self_attn.q_proj`.
        expert: number of the expert that it belongs to, if any.
    """

    layer: tuple[str, int] | None
    kind: str
    expert: int | None


def place_of(tensor: str) -> Place:
    """The place of a tensor, or of a matrix in a stack of experts, by its name."""
    layer = layer_of(tensor)
    kind = tensor if layer == tensor else tensor[len(layer) + 1 :]
    expert = _EXPERT.search(kind)
    if expert:
        kind = kind[: expert.start()] + kind[expert.end() :]
    stack, _, number = layer.rpartition(".")
    which = int(expert[1] or expert[2]) if expert else None
    where = (stack, int(number)) if layer != tensor else None
    return Place(where, kind.removesuffix(".weight"), which)


def _layer_names(places: Iterable[Place]) -> dict[tuple[str, int], str]:
    """Every layer's name, in order: its number, where there is one stack of layers only."""
    stacks: dict[str, set[int]] = {}
    for place in places:
        if place.layer is not None:
            stacks.setdefault(place.layer[0], set()).add(place.layer[1])
    return {
        (stack, number): str(number) if len(stacks) == 1 else f"{stack.split('.')[-1]}.{number}"
        for stack, numbers in stacks.items()
        for number in sorted(numbers)
    }


def tables(report: Analysis, most: int = 10) -> list[Table]:
    """The mean weights by kind of module, by layer and by expert, and the most uneven units'."""
    from rich.table import Table

    placed = [(place_of(tensor), unit.weights) for tensor, unit in report.by_tensor().items()]
    by_kind = mean_weights((at.kind, weights) for at, weights in placed)
    names = _layer_names(at for at, _ in placed)
    by_layer = mean_weights((names[at.layer], w) for at, w in placed if at.layer)
    by_expert = mean_weights(
        (f"layer {names[at.layer]}, expert {at.expert}", w)
        for at, w in placed
        if at.layer and at.expert is not None
    )
    experts = sorted(by_expert.items(), key=lambda item: -_unevenness(item[1][0]))
    ranked = sorted(report.units, key=lambda unit: -_unevenness(unit.weights))
    uneven = [(unit.name, unit.numel, unit.weights) for unit in ranked[:most]]
    shown = []
    for title, first, second, rows in (
        ("weights by module", "module", "tensors", [(k, n, w) for k, (w, n) in by_kind.items()]),
        ("weights by layer", "layer", "tensors", [(k, n, w) for k, (w, n) in by_layer.items()]),
        (
            f"most uneven of {len(experts)} experts",
            "expert",
            "matrices",
            [(k, n, w) for k, (w, n) in experts[:most]],
        ),
        (f"most uneven of {len(report.units)} units", "unit", "elements", uneven),
    ):
        if second == "matrices" and not rows:
            continue
        table = Table(title=title, title_justify="left")
        table.add_column(first, overflow="fold")
        for name in (second, *short_names(report.targets)):
            table.add_column(name, justify="right")
        for key, number, weights in rows:
            table.add_row(str(key), f"{number:,}", *(f"{weight:.3f}" for weight in weights))
        shown.append(table)
    return shown


def _unevenness(weights: Sequence[float]) -> float:
    return max(weights) - min(weights)


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
    """Draw the weights as heat maps into a PNG, a column of them for each target.

    From top to bottom: layers × modules, where a module's experts count as their mean; layers ×
    experts, if there are any; what is outside of layers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    placed = [(place_of(tensor), unit.weights) for tensor, unit in report.by_tensor().items()]
    names = _layer_names(at for at, _ in placed)
    layers = list(names.values())
    within = [(names[at.layer], at, w) for at, w in placed if at.layer]
    inside = _Panel("layer", layers, [(layer, at.kind, w) for layer, at, w in within])
    of_experts = [(layer, at.expert, w) for layer, at, w in within if at.expert is not None]
    with_experts = {layer for layer, _, _ in of_experts}
    experts = _Panel("layer", [name for name in layers if name in with_experts], of_experts)
    others = [(None, at.kind, w) for at, w in placed if not at.layer]
    outside = _Panel("outside\nlayers", [None], others)
    panels = [inside, *([experts] if experts.columns else []), outside]

    count = len(report.targets)
    width = 1.9 + 0.42 * max(len(inside.columns), len(outside.columns))
    height = 2.6 + 0.24 * len(layers) * (len(panels) - 1) + 1.6
    figure, axes = plt.subplots(
        len(panels),
        count,
        figsize=(width * count + 1.2, height),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [*[max(len(layers), 3)] * (len(panels) - 1), 1]},
    )
    for row, panel in enumerate(panels):
        for j in range(count):
            image = panel.draw(axes[row, j], j)
        axes[row, 0].set_ylabel(panel.label, fontsize=10 if panel is not outside else 8)
    for j, name in enumerate(short_names(report.targets)):
        axes[0, j].set_title(name, fontsize=10)
    figure.colorbar(image, ax=axes, label="merge weight", shrink=0.8, aspect=40)
    granularities = ", ".join(sorted({unit.granularity for unit in report.units}))
    figure.suptitle(f"{report.method}, granularity {granularities}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class _Panel:
    """The mean weights of what shares a row and a column.

    Args:
        label: of the rows.
        rows: their keys, from top to bottom.
        weights: row, column and weights by target of everything that is shown.
    """

    def __init__(
        self, label: str, rows: Sequence[Any], weights: Sequence[tuple[Any, Any, Sequence[float]]]
    ) -> None:
        self.label, self.rows = label, rows
        self.columns = list(dict.fromkeys(column for _, column, _ in weights))
        self._means = mean_weights(((row, column), w) for row, column, w in weights)

    def draw(self, axis: Any, target: int) -> Any:
        """Draw one target's panel; the image, for the scale beside it."""
        import numpy as np

        values = np.full((max(len(self.rows), 1), max(len(self.columns), 1)), np.nan)
        for (row, column), (means, _) in self._means.items():
            values[self.rows.index(row), self.columns.index(column)] = means[target]
        # A fixed range, so that two merges can be compared; grey: no such tensor.
        image = axis.imshow(
            np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis", aspect="auto"
        )
        axis.set_facecolor("0.85")
        if len(self.rows) <= _READABLE and len(self.columns) <= _FEW:
            for (row, column), weight in np.ndenumerate(values):
                if not np.isnan(weight):
                    style = {"ha": "center", "va": "center", "fontsize": 6}
                    color = "black" if weight > 0.6 else "white"
                    axis.text(column, row, f"{weight:.2f}", color=color, **style)
        if any(isinstance(column, int) for column in self.columns):
            step = max(1, len(self.columns) // 16)
            axis.set_xticks(range(0, len(self.columns), step), self.columns[::step], fontsize=8)
            axis.set_xlabel("expert", fontsize=8)
        else:
            style = {"rotation": 60, "ha": "right", "fontsize": 8}
            axis.set_xticks(range(len(self.columns)), self.columns, **style)
        step = max(1, len(self.rows) // 16)
        if self.rows == [None]:
            axis.set_yticks([])
        else:
            axis.set_yticks(range(0, len(self.rows), step), self.rows[::step], fontsize=8)
        return image

"""The evaluation for people: tables on the terminal and a forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.files import replacing
from fusechat_distill.evaluation.candidates import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType


COLOURS = {
    "pivot": "#8a8f98",
    "source": "#f2a541",
    "target": "#63a4e0",
    "model": "#1d4f8c",
    "better": "#2b6cb0",
    "worse": "#e0702f",
    "no difference shown": "#9a9a9a",
}


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """The content of `evaluation.json` for a terminal: models by groups, then the pairs."""
    from rich.table import Table
    from rich.text import Text

    groups = found["groups"]
    data = found["dataset"]
    level = f"{found['method']['level']:.0%}"
    heading = (
        f"bits per byte of {data['counted']:,} of {data['answers']:,} held-out answers, ± half the "
        f"{level} interval; less is better"
    )
    models = Table()
    models.add_column("")
    for group in groups:
        models.add_column(Text(group), justify="right")
    models.add_column("bits to end", justify="right")
    for name, model in found["models"].items():
        models.add_row(
            Text(_named(name, model)),
            *(_value(model["groups"][group], bare=group != ALL) for group in groups),
            "-" if model["end_bits"] is None else f"{model['end_bits']:.2f}",
        )
    shown: list[RenderableType] = [Text(heading), models]
    if found["pairs"]:
        pairs = Table()
        pairs.add_column("")
        for column in ("bits per byte", "p (Holm)"):
            pairs.add_column(column, justify="right", no_wrap=True)
        pairs.add_column("", no_wrap=True)
        for pair in found["pairs"]:
            of = pair["groups"][ALL]
            pairs.add_row(
                Text(title(pair)),
                _bounds(of["relative"]),
                "-" if of["p_holm"] is None else f"{of['p_holm']:.2g}",
                Text(of["verdict"]),
            )
        shown += [Text(f"differences over all of them, with {level} intervals"), pairs]
        if any(is_single(pair) for pair in found["pairs"]):
            shown.append(
                Text("* of these checkpoints only: other training seeds may differ as much")
            )
        shown += _of_groups(found)
    least = min(model["left_out"] for model in found["models"].values())
    for name, model in found["models"].items():
        if more := model["left_out"] - least:
            shown.append(Text(f"{name}: could not be given {more:,} answers; not counted for any"))
    for name in found["unfinished"]:
        shown.append(Text(f"target {name}: not there yet; `fusechat-distill run RECIPE` goes on"))
    return shown


def title(pair: Mapping[str, Any]) -> str:
    """`a vs b`, with a star where training seeds are not part of the interval."""
    return f"{pair['a']} vs {pair['b']}" + ("*" if is_single(pair) else "")


def is_single(pair: Mapping[str, Any]) -> bool:
    return "this checkpoint" in pair["scope"]


def _of_groups(found: Mapping[str, Any]) -> list[RenderableType]:
    """Which groups a difference was shown in, a line for each pair."""
    from rich.text import Text

    groups = [group for group in found["groups"] if group != ALL]
    lines: list[RenderableType] = []
    for pair in found["pairs"] if groups else ():
        parts = []
        for verdict in ("better", "worse"):
            of = [g for g in groups if pair["groups"][g]["verdict"] == verdict]
            if of:
                parts.append(f"{verdict} in {len(of)} of {len(groups)} groups ({', '.join(of)})")
        said = "; ".join(parts) or "no difference shown in any group"
        lines.append(Text(f"{title(pair)}: {said}"))
    return lines


def _value(of: Mapping[str, Any], *, bare: bool) -> str:
    if bare or of["low"] is None:
        return f"{of['value']:.4f}"
    return f"{of['value']:.4f} ±{(of['high'] - of['low']) / 2:.4f}"


def _bounds(of: Mapping[str, Any]) -> str:
    """In per cent."""
    value = f"{of['value']:+.2%}"
    if of["low"] is None:
        return value
    return f"{value} [{of['low']:+.2%}, {of['high']:+.2%}]"


def write_picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw the content of `evaluation.json` as a forest plot, beside `path`, then renamed.

    A column for each group: above, the models' bits per byte; below, the pairs' differences.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups, models, pairs = list(found["groups"]), found["models"], found["pairs"]
    heights = [len(models), len(pairs)] if pairs else [len(models)]
    figure = Figure(
        figsize=(3 + 2.4 * len(groups), 2 + 0.32 * sum(heights)),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1),
    )
    FigureCanvasAgg(figure)
    level = f"{found['method']['level']:.0%}"
    figure.suptitle(
        f"Held-out answers, {level} intervals (left is better)", x=0.01, ha="left", fontsize=11
    )
    axes = figure.subplots(
        len(heights), len(groups), sharex="row", sharey="row", squeeze=False, height_ratios=heights
    )
    for column, group in enumerate(groups):
        of_group = found["groups"][group]
        _forest(
            axes[0, column],
            [model["groups"][group] for model in models.values()],
            [COLOURS[model["role"]] for model in models.values()],
            1,
        )
        axes[0, column].set_title(
            f"{group}\n{of_group['conversations']:,} conversations", loc="left", fontsize=9
        )
        axes[0, column].set_xlabel("bits per byte", fontsize=8)
        if not pairs:
            continue
        of_pairs = [pair["groups"][group] for pair in pairs]
        _forest(
            axes[1, column],
            [of["relative"] for of in of_pairs],
            [COLOURS[of["verdict"]] for of in of_pairs],
            100,
        )
        axes[1, column].axvline(0, color="black", linewidth=0.8, zorder=1)
        axes[1, column].set_xlabel("difference, %", fontsize=8)
    _names(axes[0, 0], [_named(name, model) for name, model in models.items()])
    if pairs:
        _names(axes[1, 0], [title(pair) for pair in pairs])
        figure.supxlabel(_legend(pairs), x=0.01, ha="left", fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _forest(
    axes: Axes, values: Sequence[Mapping[str, Any]], colours: Sequence[str], scale: float
) -> None:
    """An estimate with its interval a line, the first on top."""
    for y, (of, colour) in enumerate(zip(values, colours, strict=True)):
        if of["low"] is not None:
            axes.plot([of["low"] * scale, of["high"] * scale], [y, y], color=colour, linewidth=1.6)
        axes.plot([of["value"] * scale], [y], marker="o", markersize=5, color=colour)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)


def _named(name: str, model: Mapping[str, Any]) -> str:
    """With its role or its seeds where the name doesn't say it."""
    if model["role"] == "source":
        return f"source {name}"
    seeds = len(model["paths"])
    return name if seeds == 1 else f"{name} ({seeds} seeds)"


def _legend(pairs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "blue: better, orange: worse, at 5 % after Holm's correction; grey: no difference shown"
    ]
    if any(is_single(pair) for pair in pairs):
        lines.append("* of these checkpoints only: other training seeds may differ as much")
    return "\n".join(lines)

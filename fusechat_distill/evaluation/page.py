"""The evaluation for people: tables on the terminal and a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat_common.files import replacing
from fusechat_distill.evaluation.schema import (
    ALL,
    BitsPerByte,
    ConfidenceInterval,
    EvaluatedModel,
    Evaluation,
    Pair,
    Role,
    Verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

SAME: Verdict = "no difference shown"

ONE_SEED = "* of these checkpoints only: other training seeds may differ as much"

COLOURS: dict[Role | Verdict, str] = {
    "pivot": "#8a8f98",
    "source": "#f2a541",
    "target": "#63a4e0",
    "model": "#1d4f8c",
    "better": "#2b6cb0",
    "worse": "#e0702f",
    SAME: "#9a9a9a",
}


def tables(evaluation: Evaluation) -> list[RenderableType]:
    """The evaluation for a terminal: models by groups, then the pairs."""
    from rich.table import Table
    from rich.text import Text

    groups = evaluation.groups
    data = evaluation.dataset
    level = f"{evaluation.method.level:.0%}"
    heading = (
        f"bits per byte of {data.counted:,} of {data.answers:,} held-out answers, ± half the "
        f"{level} interval; less is better"
    )
    models = Table()
    models.add_column("")
    for group in groups:
        models.add_column(Text(group), justify="right")
    models.add_column("bits to end", justify="right")
    for name, model in evaluation.models.items():
        models.add_row(
            Text(_named(name, model)),
            _value(model.groups[ALL]),
            *(f"{model.groups[group].value:.4f}" for group in groups if group != ALL),
            "-" if model.end_bits is None else f"{model.end_bits:.2f}",
        )
    shown: list[RenderableType] = [Text(heading), models]
    if evaluation.pairs:
        pairs = Table()
        pairs.add_column("")
        for column in ("bits per byte", "p (Holm)"):
            pairs.add_column(column, justify="right", no_wrap=True)
        pairs.add_column("", no_wrap=True)
        for pair in evaluation.pairs:
            compared = pair.groups[ALL]
            pairs.add_row(
                Text(title(pair)),
                _bounds(compared.relative),
                "-" if compared.p_holm is None else f"{compared.p_holm:.2g}",
                Text(compared.verdict),
            )
        shown += [Text(f"differences over all of them, with {level} intervals"), pairs]
        if any(map(is_single, evaluation.pairs)):
            shown.append(Text(ONE_SEED))
        shown += _by_group(evaluation)
    least = min(model.left_out for model in evaluation.models.values())
    for name, model in evaluation.models.items():
        if more := model.left_out - least:
            shown.append(Text(f"{name}: could not score {more:,} answers; they count for no model"))
    shown += [
        Text(f"target {name}: not trained yet; `fusechat-distill run RECIPE` trains it")
        for name in evaluation.unfinished
    ]
    return shown


def title(pair: Pair) -> str:
    """`a vs b`, with a star where training seeds are not part of the interval."""
    return f"{pair.a} vs {pair.b}" + ("*" if is_single(pair) else "")


def is_single(pair: Pair) -> bool:
    return "this checkpoint" in pair.scope


def _by_group(evaluation: Evaluation) -> list[RenderableType]:
    """Which groups a difference was shown in, a line for each pair."""
    from rich.text import Text

    groups = [group for group in evaluation.groups if group != ALL]
    lines: list[RenderableType] = []
    for pair in evaluation.pairs if groups else ():
        parts = []
        for verdict in ("better", "worse"):
            shown = [group for group in groups if pair.groups[group].verdict == verdict]
            if shown:
                names = ", ".join(shown)
                parts.append(f"{verdict} in {len(shown)} of {len(groups)} groups ({names})")
        lines.append(Text(f"{title(pair)}: {'; '.join(parts) or f'{SAME} in any group'}"))
    return lines


def _value(bits: BitsPerByte) -> str:
    if bits.low is None or bits.high is None:
        return f"{bits.value:.4f}"
    return f"{bits.value:.4f} ±{(bits.high - bits.low) / 2:.4f}"


def _bounds(interval: ConfidenceInterval) -> str:
    """In per cent."""
    value = f"{interval.value:+.2%}"
    if interval.low is None:
        return value
    return f"{value} [{interval.low:+.2%}, {interval.high:+.2%}]"


def write_picture(evaluation: Evaluation, path: Path) -> None:
    """Draw the evaluation as a forest plot, beside `path`, then renamed.

    A column for each group: above, the models' bits per byte; below, the pairs' differences.
    """
    from matplotlib.figure import Figure

    groups, models, pairs = list(evaluation.groups), evaluation.models, evaluation.pairs
    heights = [len(models), len(pairs)] if pairs else [len(models)]
    figure = Figure(figsize=(3 + 2.4 * len(groups), 2 + 0.32 * sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.1)
    heading = f"Held-out answers, {evaluation.method.level:.0%} intervals (left is better)"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(
        len(heights), len(groups), sharex="row", sharey="row", squeeze=False, height_ratios=heights
    )
    for column, group in enumerate(groups):
        rows = [(model.groups[group], model.role) for model in models.values()]
        _forest(axes[0, column], rows)
        size = f"{evaluation.groups[group].conversations:,} conversations"
        axes[0, column].set_title(f"{group}\n{size}", loc="left", fontsize=9)
        axes[0, column].set_xlabel("bits per byte", fontsize=8)
        if pairs:
            differences = [pair.groups[group] for pair in pairs]
            _forest(axes[1, column], [(d.relative, d.verdict) for d in differences], scale=100)
            axes[1, column].axvline(0, color="black", linewidth=0.8, zorder=1)
            axes[1, column].set_xlabel("difference, %", fontsize=8)
    axes[0, 0].set_yticks(range(len(models)), [_named(*entry) for entry in models.items()])
    if pairs:
        axes[1, 0].set_yticks(range(len(pairs)), map(title, pairs))
        legend = "blue: better, orange: worse, at 5 % after Holm's correction; grey: " + SAME
        legend += f"\n{ONE_SEED}" * any(map(is_single, pairs))
        figure.supxlabel(legend, x=0.01, ha="left", fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _forest(
    axes: Axes, rows: Sequence[tuple[ConfidenceInterval, Role | Verdict]], scale: float = 1
) -> None:
    """An estimate with its interval a line, in the colour of its kind, the first on top."""
    for y, (interval, kind) in enumerate(rows):
        colour = COLOURS[kind]
        if interval.low is not None and interval.high is not None:
            bounds = [interval.low * scale, interval.high * scale]
            axes.plot(bounds, [y, y], color=colour, linewidth=1.6)
        axes.plot([interval.value * scale], [y], marker="o", markersize=5, color=colour)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _named(name: str, model: EvaluatedModel) -> str:
    """With its role or its seeds where the name doesn't say it."""
    if model.role == "source":
        return f"source {name}"
    seeds = len(model.paths)
    return name if seeds == 1 else f"{name} ({seeds} seeds)"

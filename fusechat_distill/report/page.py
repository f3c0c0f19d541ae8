"""The report for people: one PNG page, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat_common.errors import RequestError
from fusechat_common.files import replacing, write_json
from fusechat_distill.report.schema import REASONS, AlignedSource, Report, WorstSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

# Blue for what arrives or the source's, grey for the pivot's, warm for what is lost.
COLOURS = {
    "matched": "#2b6cb0",
    "inside_token": "#f2c14e",
    "edge": "#f08a4b",
    "past_cut": "#c06c84",
    "no_offset": "#6c5b7b",
    "no_sample": "#b0b0b0",
    "no_answer": "#d0d0d0",
    "several": "#f2c14e",
    "exact": "#2b6cb0",
    "mapped": "#63a4e0",
    "special": "#9ad1b5",
    "dropped": "#f08a4b",
    "pivot": "#8a8f98",
    "source": "#2b6cb0",
}

DARK = {COLOURS["matched"], COLOURS["no_offset"], COLOURS["past_cut"]}

LABELS = {
    "inside_token": "inside a source token",
    "past_cut": "past the cut",
    "edge": "at an edge",
    "no_offset": "no known byte",
    "no_sample": "no sample",
    "no_answer": "answer left out",
    "several": "several partners",
    "exact": "exact",
    "mapped": "mapped",
    "special": "by role",
    "dropped": "dropped",
    "matched": "matched",
}

LONGEST = 14
"""Tokens of a segment that are printed."""


def require_matplotlib(command: str) -> None:
    """Raises:
    RequestError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        problem = "draws with matplotlib, which is missing: pip install 'fusechat[report]'"
        raise RequestError([problem], command)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json` and `report.png` to `folder`; needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.json", folder / "report.png"]
    write_json(paths[0], report.as_json())
    write_page(report, paths[1])
    return paths


def write_page(report: Report, path: Path) -> None:
    """Draw the report on one page, written beside `path`, then renamed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    aligned = _aligned(report)
    height = 2.3 + 0.45 * len(aligned)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(13, 3 * height + 1), layout=layout)
    FigureCanvasAgg(figure)
    lines = ["How well the sources' distributions arrive, and which model predicts better"]
    lines += _problems(report)
    figure.suptitle("\n".join(lines), fontsize=11)
    axes = figure.subplots(3, 2)
    names = list(aligned)
    sources = list(aligned.values())
    position_parts = ["matched", *_reasons(sources)]
    _stacked(
        axes[0, 0],
        "Positions of the pivot",
        names,
        {LABELS[part]: _column(sources, "positions", part) for part in position_parts},
        [COLOURS[part] for part in position_parts],
    )
    mass_parts = ["exact", "mapped", "special", "dropped"]
    _stacked(
        axes[0, 1],
        "Mass of the source's top k through the vocabulary map",
        [f"{name}\n{_percent(source.mass.kept)} kept" for name, source in aligned.items()],
        {LABELS[part]: _column(sources, "mass", part) for part in mass_parts},
        [COLOURS[part] for part in mass_parts],
    )
    _grouped(
        axes[1, 0],
        "Most probable token is the gold one (matched positions)",
        names,
        {part: _column(sources, "gold_first", part) for part in ("before", "after")},
        [COLOURS["pivot"], COLOURS["source"]],
        _percent,
        labels={"before": "in the source's tokens", "after": "mapped to the pivot's"},
    )
    _grouped(
        axes[1, 1],
        "Cross-entropy, nats per byte (less is better)",
        names,
        {part: _column(sources, "cross_entropy", part) for part in ("pivot", "source")},
        [COLOURS["pivot"], COLOURS["source"]],
        _number,
    )
    _stacked(
        axes[2, 0],
        "Samples that MinCE gives to each",
        [f"{name}\n{source.samples.compared:,} compared" for name, source in aligned.items()],
        {part: _column(sources, "samples", f"{part}_won") for part in ("pivot", "source")},
        [COLOURS["pivot"], COLOURS["source"]],
    )
    _grouped(
        axes[2, 1],
        "Edges of the answers",
        names,
        {
            part: _column(sources, "edges", part)
            for part in ("begins_matched", "ends_matched", "pivot_run_over", "source_run_over")
        },
        [COLOURS["matched"], COLOURS["mapped"], COLOURS["pivot"], COLOURS["edge"]],
        _percent,
        labels={
            "begins_matched": "first positions matched",
            "ends_matched": "last positions matched",
            "pivot_run_over": "pivot token runs over the end",
            "source_run_over": "source token runs over the end",
        },
    )
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _aligned(report: Report) -> dict[str, AlignedSource]:
    return {
        name: source for name, source in report.sources.items() if isinstance(source, AlignedSource)
    }


def _problems(report: Report) -> list[str]:
    return [source.problem for source in report.sources.values() if source.problem]


def _reasons(sources: Sequence[AlignedSource]) -> list[str]:
    """Why positions of at least one source have no match."""
    return [r for r in REASONS if any(_share(source, "positions", r) for source in sources)]


def _share(source: AlignedSource, section: str, name: str) -> float | None:
    share: float | None = getattr(getattr(source, section), name)
    return share


def _column(sources: Sequence[AlignedSource], section: str, name: str) -> list[float | None]:
    return [_share(source, section, name) for source in sources]


def _stacked(
    axes: Axes,
    title: str,
    names: Sequence[str],
    parts: Mapping[str, Sequence[float | None]],
    colours: Sequence[str],
) -> None:
    """A bar for each name, cut into shares of 1; shares with room for it are written in."""
    left = [0.0] * len(names)
    for (label, values), colour in zip(parts.items(), colours, strict=True):
        shares = [value or 0.0 for value in values]
        axes.barh(range(len(names)), shares, left=left, color=colour, label=label, height=0.6)
        for i, share in enumerate(shares):
            if share >= 0.06:
                axes.text(
                    left[i] + share / 2,
                    i,
                    _percent(share),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if colour in DARK else "black",
                )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlim(0, 1)
    _dress(axes, title, names, len(parts))


def _grouped(
    axes: Axes,
    title: str,
    names: Sequence[str],
    parts: Mapping[str, Sequence[float | None]],
    colours: Sequence[str],
    written: Callable[[float | None], str],
    labels: Mapping[str, str] | None = None,
) -> None:
    """Bars side by side for each name, their values at their ends."""
    size = 0.8 / len(parts)
    highest = max((value or 0.0 for values in parts.values() for value in values), default=0.0)
    highest = highest or 1.0
    for j, ((part, values), colour) in enumerate(zip(parts.items(), colours, strict=True)):
        at = [i - 0.4 + (j + 0.5) * size for i in range(len(names))]
        lengths = [value or 0.0 for value in values]
        axes.barh(at, lengths, height=size, color=colour, label=(labels or {}).get(part, part))
        for y, value in zip(at, values, strict=True):
            axes.text((value or 0.0) + 0.01 * highest, y, written(value), va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * highest)
    _dress(axes, title, names, min(2, len(parts)))


def _dress(axes: Axes, title: str, names: Sequence[str], columns: int) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=min(columns, 4),
        fontsize=8,
        frameon=False,
        borderaxespad=0.3,
        handlelength=1,
        columnspacing=1,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tables(report: Report) -> list[RenderableType]:
    """The report for a terminal: a column for each source, then its worst samples."""
    from rich.table import Table
    from rich.text import Text

    sources = _aligned(report)
    table = Table(title=f"sources of {report.pivot.model}", title_justify="left")
    table.add_column("")
    for name in sources:
        table.add_column(Text(name), justify="right")

    def line(title: str, value: Callable[[AlignedSource], str]) -> None:
        table.add_row(title, *map(value, sources.values()))

    def shares(section: str, titles: Mapping[str, str]) -> None:
        for name, title in titles.items():
            line(title, lambda source, name=name: _percent(_share(source, section, name)))  # type: ignore[misc]

    line("samples aligned", lambda s: f"{s.aligned.done:,} of {s.aligned.total:,}")
    line("pivot's positions", lambda s: f"{s.positions.total:,}")
    reasons = {reason: f"  not: {LABELS[reason]}" for reason in _reasons(list(sources.values()))}
    shares("positions", {"matched": "matched"} | reasons)
    shares(
        "edges",
        {
            "begins_matched": "first of an answer matched",
            "ends_matched": "last of an answer matched",
            "pivot_run_over": "pivot token over an answer's end",
            "source_run_over": "source token over an answer's end",
        },
    )
    table.add_section()
    parts = ("exact", "mapped", "special", "dropped")
    shares("mass", {"kept": "mass kept"} | {part: f"  {LABELS[part]}" for part in parts})
    table.add_section()
    shares(
        "gold_first",
        {"before": "top 1 is gold, source's tokens", "after": "top 1 is gold, mapped"},
    )
    table.add_section()
    line("pivot, nats per byte", lambda s: _number(s.cross_entropy.pivot))
    line("source, nats per byte", lambda s: _number(s.cross_entropy.source))
    line("samples compared", lambda s: f"{s.samples.compared:,}")
    line("samples to the source (MinCE)", lambda s: _percent(s.samples.source_won))
    return [
        table,
        *map(Text, _problems(report)),
        *(_worst(name, sample) for name, source in sources.items() for sample in source.worst),
    ]


def _worst(name: str, sample: WorstSample) -> RenderableType:
    """A sample's segments: the tokens of both models and what arrived."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{name}, row {sample.row}: {_percent(sample.matched)} of its positions, "
        f"{_percent(sample.kept)} of the mass",
        title_justify="left",
    )
    for column in ("#", "pivot", "source", "nats", "arrived"):
        table.add_column(column, overflow="fold")
    for segment in sample.segments:
        table.add_row(
            f"{segment.index + 1}/{segment.of}",
            Text(_tokens(segment.pivot)),
            Text(_tokens(segment.source)),
            f"{-segment.pivot_logprob:.2f} {-segment.source_logprob:.2f}",
            Text(", ".join(f"{_visible(token)} {prob:.2f}" for token, prob in segment.arrived)),
        )
    return table


def _tokens(tokens: Sequence[str]) -> str:
    shown = "|".join(map(_visible, tokens[:LONGEST]))
    return shown + (f" ... {len(tokens) - LONGEST} more" if len(tokens) > LONGEST else "")


def _visible(token: str) -> str:
    """White space that can be seen, nothing that moves the terminal's cursor."""
    shown = token.replace(" ", "·")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)

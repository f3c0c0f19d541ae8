"""The report for people: one PNG page, and tables on the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import RequestError
from fusechat_common.files import replacing, write_json
from fusechat_distill.report.schema import REASONS, AlignedSource, EdgeShares, Report, WorstSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

BLUE, LIGHT_BLUE, GREY, ORANGE = "#2b6cb0", "#63a4e0", "#8a8f98", "#f08a4b"
"""Blue for what arrives or is the source's, grey for the pivot's, warm colours for what is lost."""

BARS = {
    "matched": ("matched", BLUE),
    "inside_token": ("inside a source token", "#f2c14e"),
    "edge": ("at an edge", ORANGE),
    "past_cut": ("past the cut", "#c06c84"),
    "no_offset": ("no known byte", "#6c5b7b"),
    "no_sample": ("no sample", "#b0b0b0"),
    "no_answer": ("answer left out", "#d0d0d0"),
    "several": ("several partners", "#f2c14e"),
    "exact": ("exact", BLUE),
    "mapped": ("mapped", LIGHT_BLUE),
    "special": ("by role", "#9ad1b5"),
    "dropped": ("dropped", ORANGE),
    "before": ("in the source's tokens", GREY),
    "after": ("mapped to the pivot's", BLUE),
    "pivot": ("pivot", GREY),
    "source": ("source", BLUE),
    "pivot_won": ("pivot", GREY),
    "source_won": ("source", BLUE),
    "begins_matched": ("first positions matched", BLUE),
    "ends_matched": ("last positions matched", LIGHT_BLUE),
    "pivot_run_over": ("pivot token runs over the end", GREY),
    "source_run_over": ("source token runs over the end", ORANGE),
}
"""Label and colour of each number that is drawn, by its key in `report.json`."""

MASS = ("exact", "mapped", "special", "dropped")

DARK = {BLUE, BARS["no_offset"][1], BARS["past_cut"][1]}

LONGEST = 14
"""Tokens of a segment that are printed."""


def require_matplotlib(command: str) -> None:
    """Raises:
    RequestError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        problem = "draws with matplotlib, which is missing: pip install 'fusechat[report]'"
        raise RequestError(problem, command)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json` and a page with pictures, `report.png`, to `folder`; needs matplotlib."""
    from matplotlib.figure import Figure

    aligned = _aligned(report)
    height = 2.3 + 0.45 * len(aligned)
    figure = Figure(figsize=(13, 3 * height + 1))
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    lines = ["How well the sources' distributions arrive, and which model predicts better"]
    lines += _problems(report)
    figure.suptitle("\n".join(lines), fontsize=11)
    axes = figure.subplots(3, 2)
    _stacked(axes[0, 0], "Positions of the pivot", aligned, "positions", _reasons(aligned))
    kept = {f"{name}\n{_percent(s.mass.kept)} kept": s for name, s in aligned.items()}
    title = "Mass of the source's top k through the vocabulary map"
    _stacked(axes[0, 1], title, kept, "mass", MASS)
    title = "Most probable token is the gold one (matched positions)"
    _grouped(axes[1, 0], title, aligned, "gold_first", ("before", "after"), _percent)
    title = "Cross-entropy, nats per byte (less is better)"
    _grouped(axes[1, 1], title, aligned, "cross_entropy", ("pivot", "source"), _number)
    compared = {f"{name}\n{s.samples.compared:,} compared": s for name, s in aligned.items()}
    title = "Samples that MinCE gives to each"
    _stacked(axes[2, 0], title, compared, "samples", ("pivot_won", "source_won"))
    edges = tuple(EdgeShares.model_fields)
    _grouped(axes[2, 1], "Edges of the answers", aligned, "edges", edges, _percent)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.json", folder / "report.png"]
    write_json(paths[0], report.as_json())
    with replacing(paths[1]) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return paths


def _aligned(report: Report) -> dict[str, AlignedSource]:
    return {n: source for n, source in report.sources.items() if isinstance(source, AlignedSource)}


def _problems(report: Report) -> list[str]:
    return [source.problem for source in report.sources.values() if source.problem]


def _reasons(sources: Mapping[str, AlignedSource]) -> list[str]:
    """`matched`, and why positions of at least one source have no match."""
    found = [r for r in REASONS if any(_share(s, "positions", r) for s in sources.values())]
    return ["matched", *found]


def _share(source: AlignedSource, section: str, name: str) -> float | None:
    share: float | None = getattr(getattr(source, section), name)
    return share


def _stacked(
    axes: Axes, title: str, sources: Mapping[str, AlignedSource], section: str, parts: Sequence[str]
) -> None:
    """A bar for each source, cut into shares of 1; shares with room for it are written in."""
    left = [0.0] * len(sources)
    for part in parts:
        label, colour = BARS[part]
        shares = [_share(source, section, part) or 0.0 for source in sources.values()]
        axes.barh(range(len(sources)), shares, left=left, color=colour, label=label, height=0.6)
        written = "white" if colour in DARK else "black"
        centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": written}
        for i, share in enumerate(shares):
            if share >= 0.06:
                axes.text(left[i] + share / 2, i, _percent(share), **centred)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlim(0, 1)
    _dress(axes, title, list(sources), len(parts))


def _grouped(
    axes: Axes,
    title: str,
    sources: Mapping[str, AlignedSource],
    section: str,
    parts: Sequence[str],
    written: Callable[[float | None], str],
) -> None:
    """Bars side by side for each source, their values at their ends."""
    size = 0.8 / len(parts)
    columns = [[_share(source, section, part) for source in sources.values()] for part in parts]
    highest = max((value or 0.0 for values in columns for value in values), default=0.0) or 1.0
    for j, (part, values) in enumerate(zip(parts, columns, strict=True)):
        label, colour = BARS[part]
        at = [i - 0.4 + (j + 0.5) * size for i in range(len(sources))]
        lengths = [value or 0.0 for value in values]
        axes.barh(at, lengths, height=size, color=colour, label=label)
        for y, length, value in zip(at, lengths, values, strict=True):
            axes.text(length + 0.01 * highest, y, written(value), va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * highest)
    _dress(axes, title, list(sources), min(2, len(parts)))


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

    def shares(section: str, **titles: str) -> None:
        for name, title in titles.items():
            values = (_percent(_share(source, section, name)) for source in sources.values())
            table.add_row(title, *values)

    line("samples aligned", lambda s: f"{s.aligned.done:,} of {s.aligned.total:,}")
    line("pivot's positions", lambda s: f"{s.positions.total:,}")
    _, *reasons = _reasons(sources)
    shares("positions", matched="matched", **{r: f"  not: {BARS[r][0]}" for r in reasons})
    shares(
        "edges",
        begins_matched="first of an answer matched",
        ends_matched="last of an answer matched",
        pivot_run_over="pivot token over an answer's end",
        source_run_over="source token over an answer's end",
    )
    table.add_section()
    shares("mass", kept="mass kept", **{part: f"  {BARS[part][0]}" for part in MASS})
    table.add_section()
    shares("gold_first", before="top 1 is gold, source's tokens", after="top 1 is gold, mapped")
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

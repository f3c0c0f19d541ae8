"""Figures as a page: docs/reliability.md, docs/reliability.json and the picture of memory."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from qa.reliability.figure import Figure

MIB = 1 << 20
PICTURE = Path("pictures") / "reliability_memory.png"

NOT_HERE = """## Not measured here

Known vulnerabilities of the dependencies: `pip-audit -r constraints.txt --no-deps --disable-pip`
looks them up, which needs its service on the network."""


def write(docs: Path, figures: list[Figure], scale: float, seed: int) -> None:
    (docs / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    points = [point for figure in figures for point in figure.points]
    if points:
        draw(points, docs / PICTURE)
    (docs / "reliability.md").write_text(markdown(figures, scale, seed, bool(points)))
    record = {
        "scale": scale,
        "seed": seed,
        "environment": environment(),
        "figures": [asdict(figure) for figure in figures],
    }
    (docs / "reliability.json").write_text(json.dumps(record, indent=1) + "\n")


def environment() -> dict[str, str]:
    packages = ("torch", "safetensors", "mergekit", "transformers", "trl", "pyarrow")
    return {"Python": platform.python_version(), "system": platform.system()} | {
        name: version(name) for name in packages
    }


def markdown(figures: list[Figure], scale: float, seed: int, picture: bool) -> str:
    tried = sum(figure.tried for figure in figures)
    fine = sum(figure.as_expected for figure in figures)
    minutes = sum(figure.seconds for figure in figures) / 60
    lines = [
        "# Reliability",
        "",
        f"{tried:,} cases tried in {minutes:.0f} minutes; {fine:,} went as they should, "
        f"{tried - fine:,} did not.",
        "",
        "`make reliability` makes this page again, "
        "`python -m qa.reliability.run --scale 10` one with ten times the cases. "
        f"This one: scale {scale:g}, seed {seed}, "
        + ", ".join(f"{name} {value}" for name, value in environment().items())
        + ".",
    ]
    for title in dict.fromkeys(figure.section for figure in figures):
        mine = [figure for figure in figures if figure.section == title]
        lines += ["", f"## {title}", "", "| tried | cases | as expected | seconds |"]
        lines += ["|---|---:|---:|---:|"]
        for figure in mine:
            what = figure.what + (f"<br>{figure.note}" if figure.note else "")
            lines.append(
                f"| {cell(what)} | {figure.tried:,} | {figure.as_expected:,} | {figure.seconds:.0f} |"
            )
        lines.append("")
        lines += [f"    {command}" for command in dict.fromkeys(figure.command for figure in mine)]
        if picture and any(figure.points for figure in mine):
            lines += ["", f"![peak memory against --memory]({PICTURE.as_posix()})"]
        for figure in mine:
            if figure.unexpected:
                lines += ["", f"Not as expected in “{figure.what}”, the first:", ""]
                lines += ["- `" + case.replace("`", "'") + "`" for case in figure.unexpected]
    lines += ["", NOT_HERE]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def draw(points: Iterable[tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets, peaks = ([value / MIB for value in values] for values in zip(*points, strict=True))
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    axes.scatter(budgets, peaks, s=18)
    span = [min(budgets), max(budgets)]
    axes.plot(span, span, color="grey", linewidth=1, label="peak = budget")
    axes.set(xlabel="--memory, MiB", ylabel="peak above a trivial merge, MiB")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def table(figures: list[Figure]) -> str:
    """The figures for a terminal."""
    return "\n".join(
        f"{figure.as_expected:>8,} of {figure.tried:>8,}  {figure.seconds:6.0f} s  "
        f"{figure.section}: {figure.what}"
        + (f" ({figure.note})" if figure.note else "")
        + "".join(f"\n    {case}" for case in figure.unexpected)
        for figure in figures
    )

"""Writes figures as docs/reliability.md, with the picture of memory, or as lines for a terminal."""

import platform
from importlib.metadata import version
from pathlib import Path

from qa.reliability.cases import Figure

MIB = 1 << 20
PICTURE = "pictures/reliability_memory.png"
PACKAGES = ("torch", "safetensors", "mergekit", "transformers", "trl", "pyarrow")
PAGE = """\
# Reliability

{tried:,} cases tried in {minutes:.0f} minutes; {fine:,} ended as they should, {wrong:,} did not.

`make reliability` makes this page again, `python -m qa.reliability.run --scale 10` one with ten times the cases. \
This one: scale {scale:g}, seed {seed}, {environment}.

{sections}## Not measured here

Known vulnerabilities of the dependencies: `pip-audit -r constraints.txt --no-deps --disable-pip`
looks them up, which needs its service on the network.
"""


def write(docs: Path, figures: list[Figure], scale: float, seed: int) -> None:
    (docs / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        if figure.points:
            draw(figure.points, docs / PICTURE)
    tried, fine = (sum(getattr(f, name) for f in figures) for name in ("tried", "as_expected"))
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    environment = [f"Python {platform.python_version()}", f"system {platform.system()}", *versions]
    titles = dict.fromkeys(figure.section for figure in figures)
    sections = [section(t, [f for f in figures if f.section == t]) for t in titles]
    counts = {"tried": tried, "fine": fine, "wrong": tried - fine, "scale": scale, "seed": seed}
    content = PAGE.format(
        **counts,
        minutes=sum(figure.seconds for figure in figures) / 60,
        environment=", ".join(environment),
        sections="".join(sections),
    )
    (docs / "reliability.md").write_text(content, encoding="utf-8")


def section(title: str, figures: list[Figure]) -> str:
    lines = [f"## {title}", "", "| tried | cases | as expected | seconds |", "|---|---:|---:|---:|"]
    for figure in figures:
        what = "<br>".join(filter(None, (figure.what, note_of(figure)))).replace("|", "\\|")
        counts = f"{figure.tried:,} | {figure.as_expected:,} | {figure.seconds:.0f}"
        lines.append(f"| {what} | {counts} |")
    lines += ["", *(f"    {command}" for command in dict.fromkeys(f.command for f in figures)), ""]
    if any(figure.points for figure in figures):
        lines += [f"![peak memory against --memory]({PICTURE})", ""]
    for figure in figures:
        if figure.unexpected:
            lines += [f"Not as expected in “{figure.what}”, the first:", ""]
            lines += ["- `" + case.replace("`", "'") + "`" for case in figure.unexpected] + [""]
    return "\n".join(lines) + "\n"


def note_of(figure: Figure) -> str:
    """The figure's note with the counts put in: “3 refused, 4 resumed”."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(figure.kinds.items()))
    return figure.note.replace("{kinds}", counts)


def line(figure: Figure) -> str:
    """The figure for a terminal."""
    counts = f"{figure.as_expected:>8,} of {figure.tried:>8,}  {figure.seconds:6.0f} s"
    return f"{counts}  {figure.section}: {figure.what} ({note_of(figure)})" + "".join(
        f"\n    {case}" for case in figure.unexpected
    )


def draw(points: tuple[tuple[float, float], ...], path: Path) -> None:
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

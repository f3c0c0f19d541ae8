"""Makes the reliability page: every section's figures, or those of a few sections on the terminal.

``python -m qa.reliability.run`` writes docs/reliability.md; with ``--only`` it prints the figures
and writes nothing. Ends with status 1 if anything went otherwise than expected.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once; sections fork

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click

from qa.reliability import distilling, fuzzing_distill, fuzzing_merge, merging, page, security
from qa.reliability.figure import Figure

SECTIONS = [
    *merging.SECTIONS,
    *fuzzing_merge.SECTIONS,
    *security.SECTIONS,
    *distilling.SECTIONS,
    *fuzzing_distill.SECTIONS,
]
NAMES = [name for name, _ in SECTIONS]
DOCS = Path(__file__).parents[2] / "docs"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Print these, no page.")
@click.option("--scale", default=1.0, show_default=True, help="Times as many cases.")
@click.option("--seed", default=0, show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), default=DOCS, help="Where the page goes.")
def main(only: tuple[str, ...], scale: float, seed: int, docs: Path) -> None:
    figures: list[Figure] = []
    for name, section in SECTIONS:
        if only and name not in only:
            continue
        command = f"python -m qa.reliability.run --only {name}"
        command += f" --scale {scale:g}" * (scale != 1) + f" --seed {seed}" * (seed != 0)
        with tempfile.TemporaryDirectory(prefix=f"reliability-{name}-") as work:
            before = time.monotonic()
            for figure in section(Path(work).resolve(), scale, seed):
                now = time.monotonic()
                figures.append(replace(figure, command=command, seconds=now - before))
                print(page.table(figures[-1:]), flush=True)
                before = now
    if not only:
        page.write(docs, figures, scale, seed)
    sys.exit(any(figure.as_expected < figure.tried for figure in figures))


if __name__ == "__main__":
    main()

"""Measures reliability: crashes, races, damaged inputs, memory, determinism and security.

    python -m qa.reliability.run [--only SECTION ...] [--scale N] [--seed N]

Writes docs/reliability.md; with `--only` it prints the figures of some sections and writes nothing.
The exit status is 1 if any case ended in another way than expected.
"""

import os

# Read at import. Sections fork, which neither torch's threads nor a hub's look-ups survive.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import sys
import tempfile
import time
from pathlib import Path

import click

from qa.reliability import distilling, fuzzing_distill, fuzzing_merge, merging, page, security

MODULES = (merging, fuzzing_merge, security, distilling, fuzzing_distill)
SECTIONS = {name: section for module in MODULES for name, section in module.SECTIONS.items()}
DOCS = Path(__file__).parents[2] / "docs"


@click.command()
@click.option(
    "--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Print these, no page."
)
@click.option("--scale", default=1.0, show_default=True, help="Times as many cases.")
@click.option("--seed", default=0, show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), default=DOCS, help="Where the page goes.")
def main(only: tuple[str, ...], scale: float, seed: int, docs: Path) -> None:
    figures = []
    for name in only or SECTIONS:
        command = f"python -m qa.reliability.run --only {name}"
        command += f" --scale {scale:g}" * (scale != 1) + f" --seed {seed}" * (seed != 0)
        with tempfile.TemporaryDirectory(prefix=f"reliability-{name}-") as work:
            before = time.monotonic()
            for figure in SECTIONS[name](Path(work).resolve(), scale, seed):
                figure.command, figure.seconds = command, time.monotonic() - before
                figures.append(figure)
                print(page.line(figure), flush=True)
                before = time.monotonic()
    if not only:
        page.write(docs, figures, scale, seed)
    sys.exit(any(figure.as_expected < figure.tried for figure in figures))


if __name__ == "__main__":
    main()

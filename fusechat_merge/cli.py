"""The command ``fusechat-merge``: says what is wrong in one line, imports late."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from fusechat_merge import __version__
from fusechat_merge.errors import ConfigError

T = TypeVar("T")
_F = TypeVar("_F", bound=Callable[..., Any])


class _Commands(click.Group):
    """A group whose commands end in one ``Error: …`` line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            name = type(error).__name__
            raise click.ClickException(
                f"{name}: {error} (fusechat-merge --debug … shows where)"
            ) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusechat-merge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Merge target checkpoints by variation ratio (VaRM) or SCE, from a mergekit YAML."""


def _mergekit_options(command: _F) -> _F:
    """mergekit's own options that change what a configuration means."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option("--allow-crimes", is_flag=True, help="Allow mixing architectures."),
        click.option("--transformers-cache", metavar="DIR", help="Where models are downloaded to."),
        click.option("--lora-merge-cache", metavar="DIR", help="Where merged LoRAs are kept."),
        click.option(
            "--unsafe-truncate-embeddings",
            is_flag=True,
            help="Drop the embedding rows beyond the smallest vocabulary.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_mergekit_options
def analyze(config: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Show the statistics and merge weights of every unit; no weights are written.

    CONFIG is a mergekit YAML with merge_method varm or fusechat_sce. --out writes analysis.json
    and a heat map of the weights, analysis.png, into DIR.

    \b
    Example: fusechat-merge analyze merge.yml --out analysis
    """
    if out is not None:
        _require_matplotlib()
    from fusechat_merge.analysis import analyze as measure
    from fusechat_merge.mergekit_plan import plan_with_mergekit, read_config

    merge_config, _ = read_config(config)
    from mergekit.options import MergeOptions

    planned = plan_with_mergekit(merge_config, MergeOptions(quiet=True, **options))
    report = measure(planned, _progress)
    text = json.dumps(report.as_json(), indent=1)
    if as_json:
        click.echo(text)
    else:
        _print_tables(report)
    if out is not None:
        from fusechat_merge.report import draw

        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.json").write_text(text + "\n", encoding="utf-8")
        draw(report, out / "analysis.png")
        click.echo(f"wrote {out / 'analysis.json'} and {out / 'analysis.png'}", err=True)


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError(["--out draws with matplotlib: pip install 'fusechat[report]'"])


def _progress(tasks: Sequence[T]) -> Iterable[T]:
    from tqdm import tqdm

    return tqdm(tasks, desc="reading", unit="tensor", file=sys.stderr)


def _print_tables(report: Any) -> None:
    from rich.console import Console

    from fusechat_merge.report import tables

    console = Console()
    for table in tables(report):
        console.print(table)


if __name__ == "__main__":
    main()

"""The command `fusechat-merge`. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from fusechat_common.cli import Commands
from fusechat_common.errors import FusechatError, RequestError
from fusechat_common.files import can_be_made, existing
from fusechat_common.versions import require_supported
from fusechat_merge import __version__

if TYPE_CHECKING:
    from fusechat_merge.planning.plan import Plan

NEEDED = ("huggingface_hub", "mergekit", "torch", "transformers")
"""Packages whose release is checked before a command imports them."""

_F = TypeVar("_F", bound=Callable[..., Any])


@click.group(cls=Commands)
@click.version_option(__version__, prog_name="fusechat-merge")
def main() -> None:
    """Merge target checkpoints by variation ratio (VaRM) or SCE, from a mergekit YAML.

    \b
    Example: fusechat-merge run merge.yml merged
    """
    # mergekit calls transformers in ways that it warns of, which no user can change.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _options(*options: Callable[[Any], Any]) -> Callable[[_F], _F]:
    """One decorator for several options."""

    def add(command: _F) -> _F:
        for option in options:
            command = option(command)
        return command

    return add


class _Size(click.ParamType):
    """A number of bytes: 500, 500B, 256MiB or 5GB. B is bytes, not mergekit's billions."""

    name = "size"
    _units: ClassVar[dict[str, int]] = {
        "": 1, "B": 1, "K": 10**3, "KB": 10**3, "KIB": 1 << 10,
        "M": 10**6, "MB": 10**6, "MIB": 1 << 20,
        "G": 10**9, "GB": 10**9, "GIB": 1 << 30, "T": 10**12, "TB": 10**12, "TIB": 1 << 40,
    }  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        if match is None or match[2].upper() not in self._units:
            self.fail(f"{value!r} is not a size; write 256MiB or 5GB", param, ctx)
        size = int(Decimal(match[1]) * self._units[match[2].upper()])
        if size < 1:
            self.fail(f"{value!r} is too small", param, ctx)
        return size


_config = click.argument("config", type=click.Path(path_type=Path))

_mergekit_options = _options(
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
    click.option("--allow-crimes", is_flag=True, help="Allow mixing architectures."),
    click.option("--transformers-cache", metavar="DIR", help="Where models are downloaded to."),
    click.option("--lora-merge-cache", metavar="DIR", help="Where merged LoRAs are kept."),
    click.option(
        "--unsafe-truncate-embeddings",
        is_flag=True,
        help="Drop the embedding rows beyond the smallest vocabulary.",
    ),
)
"""mergekit's own options that change what a configuration means."""

_engine_options = _options(
    click.option(
        "--threads", type=click.IntRange(1), help="Worker threads; default: one a processor."
    ),
    click.option(
        "--memory", type=_Size(), default="256MiB", help="All buffers, for varm and fusechat_sce."
    ),
)
"""What bounds the engine."""

_bytes_options = _options(
    click.option("--random-seed", type=int, default=0, help="Of methods that draw random numbers."),
    click.option(
        "--shard-size", type=_Size(), default="5GB", help="Most bytes of tensors in an output file."
    ),
)
"""mergekit's options that change what is written where."""


@main.command(short_help="Merge the models of CONFIG into the folder OUT.")
@_config
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute; auto: on a CUDA device if there is one.",
)
@_engine_options
@_bytes_options
@click.option(
    "--resume/--no-resume",
    default=True,
    help="Resume an interrupted merge of the same configuration, or start over.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new model is complete.")
@click.option("--report/--no-report", default=True, help="Write README.md and mergekit_config.yml.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
@_mergekit_options
def run(config: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Merge the models of CONFIG, a mergekit YAML, into the folder OUT.

    Memory is bounded. After a crash, or once a full disk has room again, the same command resumes.

    \b
    Example: fusechat-merge run merge.yml merged --memory 512MiB
    """
    require_supported(*NEEDED)
    from fusechat_merge.engine.execute import merge

    plans: list[Plan] = []
    with _Meter(as_json) as meter:

        def started(planned: Plan, device: str) -> None:
            plans.append(planned)
            meter.total = sum(output.nbytes for output in planned.outputs)
            for note in planned.notes():
                click.echo(note, err=True)
            _say(
                as_json,
                f"merging {len(planned.models)} models on {device}:"
                f" {planned.input_bytes / 1e9:.2f} GB in, {planned.output_bytes / 1e9:.2f} GB out",
                event="plan",
                device=device,
                tensors=len({output.tensor for output in planned.outputs}),
                input_bytes=planned.input_bytes,
                output_bytes=planned.output_bytes,
            )

        merge(config, out, progress=meter, started=started, **options)
    for planned in plans:
        _say_how_it_opens(planned, out)
    if meter.total is None:
        _say(as_json, f"{out} is complete already; nothing to do", event="finished")
    else:
        _say(as_json, f"wrote {out}", event="done", out=str(out))


def _say_how_it_opens(planned: Plan, out: Path) -> None:
    """Say that a merged folder loads.

    Raises:
        FusechatError: it doesn't load as what was written.
    """
    from fusechat_merge.engine.opening import opening_problems

    kind, problems = opening_problems(planned, out)
    if problems:
        raise FusechatError("\n  ".join(["it is written, but", *problems]))
    loads = kind if " " in kind else f"loads as {kind}, no tensor missing or unexpected"
    click.echo(f"{out}: {loads}", err=True)


@main.command(short_help="Show what CONFIG would read and write, and every problem.")
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@_engine_options
@_bytes_options
@_mergekit_options
def plan(config: Path, as_json: bool, memory: int, threads: int | None, **options: Any) -> None:
    """Show what CONFIG would read and write, and every problem that `run` would report.

    Reads headers only: nothing is computed or written, and no weights are downloaded.

    \b
    Example: fusechat-merge plan merge.yml --json
    """
    require_supported(*NEEDED)
    from fusechat_merge.engine.execute import peak_memory
    from fusechat_merge.planning.planner import plan as make_plan

    try:
        planned = make_plan(config, **options)
    except RequestError as error:
        if as_json:
            click.echo(json.dumps({"problems": list(error.problems)}, indent=1))
        raise
    peak = memory
    try:
        peak = peak_memory(planned, memory, threads)
    except RequestError as error:
        planned.problems += error.problems
    summary = planned.summary() | {"peak_memory_bytes": peak}
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    elif planned.outputs:
        _print_plan(summary)
    if planned.problems:
        raise RequestError(planned.problems)


def _print_plan(summary: dict[str, Any]) -> None:
    click.echo(f"method       {summary['merge_method']}")
    click.echo(f"parameters   {summary['parameters']:,} in {summary['tensors']} tensors")
    click.echo(f"reads        {summary['input_bytes'] / 1e9:.3f} GB")
    click.echo(f"writes       {summary['output_bytes'] / 1e9:.3f} GB")
    for shard in summary["shards"]:
        click.echo(f"             {shard['name']}  {shard['bytes'] / 1e9:.3f} GB")
    click.echo(f"peak memory  about {summary['peak_memory_bytes'] / 1e6:.0f} MB")
    for key, heading in (
        ("merged_by_name", "the architecture doesn't know, merged by name"),
        ("copied_from_base", "the architecture doesn't know, copied from the base"),
        ("left_out", "left out"),
    ):
        for item in summary[key]:
            text = item if isinstance(item, str) else "{model}: {tensor} ({reason})".format(**item)
            click.echo(f"{heading}: {text}")


@main.command(short_help="Check that OUT is what CONFIG makes.")
@_config
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Share of the tensors to recompute.",
)
@_engine_options
@_bytes_options
@_mergekit_options
def verify(config: Path, out: Path, **options: Any) -> None:
    """Check that OUT is what CONFIG makes: structure, side files, and recomputed tensors.

    \b
    Example: fusechat-merge verify merge.yml merged --sample 0.1
    """
    require_supported(*NEEDED)
    from fusechat_merge.engine.verify import verify as check

    with _Meter() as meter:
        differences = check(config, out, progress=meter, **options)
    if differences:
        number, listed = len(differences), differences[:20]
        if number > 20:
            listed.append(f"… and {number - 20} more")
        heading = f"{number} difference{'s' if number > 1 else ''}:"
        raise FusechatError("\n  ".join([heading, *listed]))
    share = options["sample"]
    sampled = f" ({share:.0%} of its tensors recomputed)" if share < 1 else ""
    click.echo(f"{out} is what {config} makes{sampled}")


@main.command(short_help="Show the merge weights of every unit.")
@_config
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_engine_options
@_mergekit_options
def analyze(
    config: Path, out: Path | None, as_json: bool, memory: int, threads: int | None, **options: Any
) -> None:
    """Show the statistics and merge weights of every unit; no weights are written.

    CONFIG is a mergekit YAML with merge_method varm or fusechat_sce. --out writes analysis.json
    and a heat map of the weights, analysis.png, into DIR.

    \b
    Example: fusechat-merge analyze merge.yml --out analysis
    """
    if out is not None:
        _check_drawing(out)
    require_supported(*NEEDED)
    from fusechat_merge.engine import analysis, execute

    planned = execute.local_plan(config, **options)
    with _Meter(total=sum(output.nbytes for output in planned.outputs)) as meter:
        report = analysis.analyze(planned, memory=memory, threads=threads, progress=meter)
    text = report.as_text()
    if as_json:
        click.echo(text, nl=False)
    else:
        from rich.console import Console

        from fusechat_merge.results.report import tables

        for table in tables(report):
            Console().print(table)
    if out is not None:
        from fusechat_merge.results.report import draw

        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.json").write_text(text, encoding="utf-8")
        draw(report, out / "analysis.png")
        click.echo(f"wrote {out / 'analysis.json'} and {out / 'analysis.png'}", err=True)


def _check_drawing(folder: Path) -> None:
    """Refuse --out before the analysis where its files couldn't be written after it."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise RequestError(["--out draws with matplotlib: pip install 'fusechat[report]'"])
    if not can_be_made(folder):
        place = existing(folder)
        raise RequestError([f"--out {folder}: {place} can't be written to; name another folder"])


def _say(as_json: bool, text: str, **event: Any) -> None:
    click.echo(json.dumps(event) if as_json else text, err=not as_json)


class _Meter:
    """Progress, from the first report on: a bar on stderr, or events on stdout twice a second.

    Args:
        as_json: print events.
        total: bytes that will be made; None where that is not known (yet).
    """

    def __init__(self, as_json: bool = False, total: int | None = None) -> None:
        self.total = total
        self._as_json = as_json
        self._done, self._last = 0, 0.0
        self._lock = threading.Lock()
        self._bar: Any = None

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, tensor: str, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            due = now - self._last > 0.5 or self._done == self.total
            if due:
                self._last = now
            if not self._as_json:
                if self._bar is None:
                    from tqdm import tqdm

                    self._bar = tqdm(total=self.total, unit="B", unit_scale=True, file=sys.stderr)
                if due:
                    self._bar.set_postfix_str(tensor, refresh=False)
                self._bar.update(nbytes)
            elif due:
                event = {"event": "progress", "tensor": tensor}
                click.echo(json.dumps(event | {"bytes": self._done, "of": self.total}))


if __name__ == "__main__":
    main()

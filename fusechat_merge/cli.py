"""The command ``fusechat-merge``: says what is wrong in one line, imports late."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from fusechat_common.cli import Commands
from fusechat_common.errors import FusechatError, RequestError
from fusechat_common.files import can_be_made, existing
from fusechat_common.versions import require_supported
from fusechat_merge import __version__

NEEDED = ("huggingface_hub", "mergekit", "torch", "transformers")
"""Packages whose release is checked before a command imports them."""

T = TypeVar("T")
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
            self.fail(f"{value!r} is no size; write 256MiB or 5GB", param, ctx)
        size = int(Decimal(match[1]) * self._units[match[2].upper()])
        if size < 1:
            self.fail(f"{value!r} is too small", param, ctx)
        return size


def _engine_options(command: _F) -> _F:
    """What bounds the engine."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1), help="Worker threads; default: one a processor."
        ),
        click.option(
            "--memory",
            type=_Size(),
            default="256MiB",
            show_default=True,
            help="Of all buffers together, for varm and fusechat_sce.",
        ),
    ):
        command = option(command)
    return command


def _bytes_options(command: _F) -> _F:
    """mergekit's options that change what is written where."""
    for option in (
        click.option(
            "--random-seed",
            type=int,
            default=0,
            show_default=True,
            help="Of methods that draw random numbers.",
        ),
        click.option(
            "--shard-size",
            type=_Size(),
            default="5GB",
            show_default=True,
            help="Most bytes of tensors in one output file.",
        ),
    ):
        command = option(command)
    return command


@main.command(short_help="Merge the models of CONFIG into the folder OUT.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto: on a CUDA device if there is one.",
)
@_engine_options
@_bytes_options
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on where an interrupted merge of the same configuration was.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new model is complete.")
@click.option(
    "--report/--no-report",
    default=True,
    show_default=True,
    help="Write README.md and mergekit_config.yml.",
)
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
@_mergekit_options
def run(
    config: Path,
    out: Path,
    device: str,
    memory: int,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    report: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge the models of CONFIG, a mergekit YAML, into the folder OUT.

    Runs in bounded memory. Killed or out of room, the same command goes on where it was.

    \b
    Example: fusechat-merge run merge.yml merged --memory 512MiB
    """
    require_supported(*NEEDED)
    from fusechat_merge.engine.execute import carry_out, chosen_device, is_finished, tidy
    from fusechat_merge.planning.planner import plan as make_plan

    planned = _planned(config, make_plan, options)
    if resume and is_finished(planned, out):
        tidy(out)
        _say(as_json, f"{out} is this merge already, finished; nothing to do", event="finished")
        return
    device = chosen_device(device)

    def started() -> None:
        _say(
            as_json,
            f"merging {len(planned.models)} models on {device}:"
            f" {planned.input_bytes / 1e9:.2f} GB in, {planned.output_bytes / 1e9:.2f} GB out",
            event="plan",
            device=device,
            tensors=len(planned.outputs),
            input_bytes=planned.input_bytes,
            output_bytes=planned.output_bytes,
        )

    with _Meter(sum(o.nbytes for o in planned.outputs), as_json) as meter:
        carry_out(
            planned,
            out,
            memory=memory,
            threads=threads,
            device=device,
            resume=resume,
            overwrite=overwrite,
            report=report,
            progress=meter,
            started=started,
        )
    _say(as_json, f"wrote {out}", event="done", out=str(out))


@main.command(short_help="Show what CONFIG would read and write, and every problem.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@_engine_options
@_bytes_options
@_mergekit_options
def plan(config: Path, as_json: bool, memory: int, threads: int | None, **options: Any) -> None:
    """Show what CONFIG would read and write, and everything that stands in its way.

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
    except ValueError as error:
        planned.problems.append(str(error))
    summary = planned.summary() | {"peak_memory_bytes": peak}
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    elif planned.outputs:
        _print_plan(summary)
    if planned.problems:
        raise RequestError(planned.problems)


@main.command(short_help="Check that OUT is what CONFIG makes.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
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

    with _Meter(None, False) as meter:
        differences = check(config, out, progress=meter, **options)
    if differences:
        raise Different(differences)
    share = options["sample"]
    sampled = f" ({share:.0%} of its tensors recomputed)" if share < 1 else ""
    click.echo(f"{out} is what {config} makes{sampled}")


class Different(FusechatError):
    """A merged model is not what its configuration makes."""

    def __init__(self, differences: Sequence[str]) -> None:
        more = [f"… and {len(differences) - 20} more"] if len(differences) > 20 else []
        listed = "\n  ".join([*differences[:20], *more])
        number = len(differences)
        super().__init__(f"{number} difference{'s' if number > 1 else ''}:\n  {listed}")


def _planned(config: Path, make_plan: Callable[..., Any], options: dict[str, Any]) -> Any:
    planned = make_plan(config, **options)
    if not planned.problems and any(m.folder is None for m in planned.models.values()):
        planned = make_plan(config, download=True, **options)
    if planned.problems:
        raise RequestError(planned.problems)
    return planned


def _say(as_json: bool, text: str, **event: Any) -> None:
    click.echo(json.dumps(event) if as_json else text, err=not as_json)


class _Meter:
    """Progress: a bar on stderr, or events on stdout twice a second; from the first piece on."""

    def __init__(self, total: int | None, as_json: bool) -> None:
        self._total, self._as_json = total, as_json
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
            if self._bar is None and not self._as_json:
                from tqdm import tqdm

                self._bar = tqdm(total=self._total, unit="B", unit_scale=True, file=sys.stderr)
            self._done += nbytes
            now = time.monotonic()
            late = now - self._last > 0.5 or self._done == self._total
            if late:
                self._last = now
            if self._bar is not None:
                if late:
                    self._bar.set_postfix_str(tensor, refresh=False)
                self._bar.update(nbytes)
            elif late:
                event = {"event": "progress", "tensor": tensor}
                click.echo(json.dumps(event | {"bytes": self._done, "of": self._total}))


def _print_plan(summary: dict[str, Any]) -> None:
    click.echo(f"method       {summary['merge_method']}")
    click.echo(f"parameters   {summary['parameters']:,} in {summary['tensors']} tensors")
    click.echo(f"reads        {summary['input_bytes'] / 1e9:.3f} GB")
    click.echo(f"writes       {summary['output_bytes'] / 1e9:.3f} GB")
    for shard in summary["shards"]:
        click.echo(f"             {shard['name']}  {shard['bytes'] / 1e9:.3f} GB")
    click.echo(f"peak memory  about {summary['peak_memory_bytes'] / 1e6:.0f} MB")
    for key, what in (
        ("merged_by_name", "the architecture doesn't know, merged by name"),
        ("copied_from_base", "the architecture doesn't know, copied from the base"),
        ("left_out", "left out"),
    ):
        for item in summary[key]:
            text = item if isinstance(item, str) else "{model}: {tensor} ({reason})".format(**item)
            click.echo(f"{what}: {text}")


@main.command(short_help="Show the merge weights of every unit.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_engine_options
@_mergekit_options
def analyze(
    config: Path,
    out: Path | None,
    as_json: bool,
    memory: int,
    threads: int | None,
    **options: Any,
) -> None:
    """Show the statistics and merge weights of every unit; no weights are written.

    CONFIG is a mergekit YAML with merge_method varm or fusechat_sce. --out writes analysis.json
    and a heat map of the weights, analysis.png, into DIR.

    \b
    Example: fusechat-merge analyze merge.yml --out analysis
    """
    if out is not None:
        _require_matplotlib()
        _require_writable(out)
    require_supported(*NEEDED)
    from fusechat_merge.engine.analysis import analyze as measure
    from fusechat_merge.planning.planner import plan as make_plan

    planned = _planned(config, make_plan, options)
    with _Meter(sum(o.nbytes for o in planned.outputs), False) as meter:
        report = measure(planned, memory=memory, threads=threads, progress=meter)
    text = report.model_dump_json(indent=1)
    if as_json:
        click.echo(text)
    else:
        _print_tables(report)
    if out is not None:
        from fusechat_merge.results.report import draw

        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.json").write_text(text + "\n", encoding="utf-8")
        draw(report, out / "analysis.png")
        click.echo(f"wrote {out / 'analysis.json'} and {out / 'analysis.png'}", err=True)


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise RequestError(["--out draws with matplotlib: pip install 'fusechat[report]'"])


def _require_writable(folder: Path) -> None:
    """Before anything is measured: the nearest folder that is there takes what is missing."""
    if not can_be_made(folder):
        place = existing(folder)
        raise RequestError([f"--out {folder}: {place} can't be written to; name another folder"])


def _print_tables(report: Any) -> None:
    from rich.console import Console

    from fusechat_merge.results.report import tables

    console = Console()
    for table in tables(report):
        console.print(table)


if __name__ == "__main__":
    main()

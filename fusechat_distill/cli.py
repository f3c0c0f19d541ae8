"""The commands of `fusechat-distill`; each imports the heavy packages that it needs."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusechat_common.cli import Commands
from fusechat_common.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fusechat_distill.alignment.stage import AlignSummary
    from fusechat_distill.fusion.decisions import FuseSummary
    from fusechat_distill.inputs.open import Inputs
    from fusechat_distill.scoring.stage import ScoreSummary
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.storage.stage import Stage, StageStatus

LISTED_ROWS = 20
"""Rows that are left out of the dataset and shown; `--json` lists all."""

OWN_WARNINGS = (
    r"`(is_)?gradient_checkpointing` is deprecated",
    "'pin_memory' argument is set as true but no accelerator is found",
)
"""Warnings of transformers and torch about TRL's own defaults, whatever a recipe sets."""


@click.group(cls=Commands)
@click.version_option(package_name="fusechat", prog_name="fusechat-distill")
def commands() -> None:
    """Fuse chat LLMs into one: score, align and fuse their distributions, train the targets.

    \b
    Example: fusechat-distill init, edit recipe.yaml, fusechat-distill run recipe.yaml
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


def main() -> None:
    commands(prog_name="fusechat-distill")


recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False))
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that a model's repository brings along; read it first.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@commands.command(short_help="Write a commented recipe, recipe.yaml.")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False))
def init(folder: str) -> None:
    """Write a commented recipe, recipe.yaml, to DIR (default: here).

    \b
    Example: fusechat-distill init my-run
    """
    from fusechat_distill.recipe.reference import commented_recipe

    path = Path(folder) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(commented_recipe())
    except FileExistsError:
        raise RequestError("exists already; name another folder, or move it away", path) from None
    click.echo(str(path))


@commands.command(short_help="Print the JSON schema of recipes, for editors.")
def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    \b
    Example: fusechat-distill schema > recipe.schema.json
    and, as the first line of a recipe in the same folder:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from fusechat_distill.recipe.reference import schema as make

    _echo_json(make())


@commands.command(short_help="Check a recipe and everything it names, without weights.")
@recipe_argument
@click.option(
    "--estimate",
    is_flag=True,
    help="Print the expected disk, memory and time of each stage instead, computed from the "
    "models' configurations.",
)
@trust_option
@json_option
def validate(recipe: str, estimate: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Check everything that needs no weights, and say what RECIPE will do.

    Models' configurations, tokenizers and templates, the dataset, the disk, and what earlier runs
    left: every problem is named in one message.

    \b
    Example: fusechat-distill validate recipe.yaml --estimate
    """
    from fusechat_distill.chain import run_problems
    from fusechat_distill.estimate.measure import estimate_recipe
    from fusechat_distill.inputs.open import open_inputs, readable_size
    from fusechat_distill.recipe.schema import load_recipe

    _quieten()
    if estimate:
        expected = estimate_recipe(load_recipe(recipe), trust_remote_code=trust_remote_code)
        if as_json:
            _echo_json(expected.as_json())
        else:
            click.echo("\n".join(expected.lines()))
        return
    inputs = open_inputs(recipe, trust_remote_code=trust_remote_code, more_problems=run_problems)
    facts = _facts(inputs)
    if as_json:
        _echo_json(facts)
        return
    data = facts["dataset"]
    click.echo(
        f"dataset: {data['conversations']:,} conversations ({data['layout']}), "
        f"{len(data['left_out']):,} rows left out"
    )
    for entry in data["left_out"][:LISTED_ROWS]:
        click.echo(f"  row {entry['row']}: {entry['reason']}")
    if len(data["left_out"]) > LISTED_ROWS:
        click.echo(f"  ... and {len(data['left_out']) - LISTED_ROWS:,} more (--json lists all)")
    for name, model in facts["models"].items():
        click.echo(
            f"{name}: {model['model']} ({model['type']}, {model['tokens']:,} tokens), about "
            f"{readable_size(model['expected_bytes'])} of scores"
        )


@commands.command(short_help="Score every conversation with the pivot and the sources.")
@recipe_argument
@click.option("--model", "names", metavar="NAME", multiple=True, help="Only this model.")
@trust_option
def score(recipe: str, names: tuple[str, ...], trust_remote_code: bool) -> None:
    """Score every conversation with the pivot and every source of RECIPE.

    Continues where an earlier run stopped. On several devices or machines, start it with
    `accelerate launch -m fusechat_distill score RECIPE`; the result is the same.

    \b
    Example: fusechat-distill score recipe.yaml --model pivot
    """
    from fusechat_distill.scoring.stage import score_stages

    stages = partial(score_stages, names=names or None, trust_remote_code=trust_remote_code)
    _run(recipe, stages, {"--model": names}, names or None, trust_remote_code=trust_remote_code)


@commands.command(short_help="Turn the sources' scores into distributions over the pivot's tokens.")
@recipe_argument
@click.option("--source", "names", metavar="NAME", multiple=True, help="Only this source.")
@trust_option
def align(recipe: str, names: tuple[str, ...], trust_remote_code: bool) -> None:
    """Turn the sources' scores into distributions over the pivot's tokens.

    Needs the scores that `score` writes; continues where an earlier run stopped. `accelerate
    launch` shares the work among processes here too.

    \b
    Example: fusechat-distill align recipe.yaml
    """
    from fusechat_distill.alignment.stage import align_stages

    stages = partial(align_stages, names=names or None)
    _run(recipe, stages, {"--source": names}, trust_remote_code=trust_remote_code)


@commands.command(short_help="Fuse the aligned distributions and train the targets.")
@recipe_argument
@click.option("--source", "names", metavar="NAME", multiple=True, help="Only this source's target.")
@trust_option
def train(recipe: str, names: tuple[str, ...], trust_remote_code: bool) -> None:
    """Fuse the aligned distributions, and train a target on them for every source.

    Needs what `align` writes; continues from the last checkpoint of an earlier run. On several
    devices, start it with `accelerate launch -m fusechat_distill train RECIPE`. When all targets
    are trained, `merge.yml` is written.

    \b
    Example: fusechat-distill train recipe.yaml
    """
    from fusechat_distill.chain import target_stages

    stages = partial(target_stages, names=names or None, trust_remote_code=trust_remote_code)
    _run(recipe, stages, {"--source": names}, trust_remote_code=trust_remote_code)


@commands.command(short_help="Do all of a recipe that is not done yet.")
@recipe_argument
@trust_option
def run(recipe: str, trust_remote_code: bool) -> None:
    """Score, align, fuse, train and write merge.yml: all of RECIPE that is not done yet.

    Can be stopped at any moment and started again, and under `accelerate launch`.

    \b
    Example: fusechat-distill run recipe.yaml
    """
    from fusechat_distill.chain import run_stages

    stages = partial(run_stages, trust_remote_code=trust_remote_code)
    _run(recipe, stages, {}, trust_remote_code=trust_remote_code)


@commands.command(short_help="Show how far the stages of a recipe are.")
@recipe_argument
@json_option
def status(recipe: str, as_json: bool) -> None:
    """Show how far the stages of RECIPE are: samples or steps, bytes, rate, and what is left.

    \b
    Example: fusechat-distill status recipe.yaml --json
    """
    from fusechat_distill.chain import run_status
    from fusechat_distill.recipe.schema import load_recipe

    states = run_status(load_recipe(recipe))
    if not as_json:
        click.echo("\n".join(map(_line, states)))
        return
    _echo_json(
        [
            state.model_dump(exclude={"details", "unit"})
            | {"seconds_left": _seconds_left(state)}
            | state.details.model_dump(exclude_none=True)
            for state in states
        ]
    )


@commands.command(short_help="Show how well the sources' distributions arrive.")
@recipe_argument
@trust_option
@json_option
def report(recipe: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show how well each source's distributions arrive, and which model predicts better.

    Over what `align` has made so far. Writes `report/report.json` and a page, `report/report.png`.

    \b
    Example: fusechat-distill report recipe.yaml
    """
    from fusechat_distill.inputs.open import open_inputs
    from fusechat_distill.report.compute import report as read_report
    from fusechat_distill.report.page import require_matplotlib, tables, write_report

    _quieten()
    require_matplotlib("report")
    inputs = open_inputs(recipe, trust_remote_code=trust_remote_code)
    content = read_report(inputs)
    paths = write_report(content, inputs.recipe.output_folder / "report")
    if as_json:
        _echo_json(content.as_json())
    else:
        _print(tables(content), paths)


@commands.command(short_help="Compare models by bits per byte of held-out answers.")
@recipe_argument
@click.option(
    "--model",
    "models",
    metavar="NAME=PATH",
    multiple=True,
    help="Another checkpoint; the same NAME again: another training seed of it.",
)
@click.option(
    "--generate",
    metavar="N",
    type=click.IntRange(min=1),
    help="Also let the models answer N held-out questions, side by side.",
)
@click.option(
    "--questions",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Let them answer these instead (all, or the first N): MT-Bench's question.jsonl or "
    "AlpacaEval's JSON.",
)
@trust_option
@json_option
def evaluate(
    recipe: str,
    models: tuple[str, ...],
    generate: int | None,
    questions: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compare models by the bits per byte that they need for held-out answers.

    The pivot, the sources, all finished targets and what --model names, each under its own
    template and tokenizer, on the rows that `dataset.eval_fraction` keeps from training. Writes
    `evaluation.json` and `report/evaluation.png`; a model that was measured before is not measured
    again. Answers go to `report/answers.md`, and to `answers/` in the formats that FastChat's
    MT-Bench and AlpacaEval 2.0 judge.

    Benchmarks run on a target or a merge as on any checkpoint, for instance (not run here):

    \b
      lm-eval run --model hf --model_args pretrained=runs/fusechat/targets/NAME,dtype=bfloat16 \\
        --tasks gsm8k,mmlu --apply_chat_template

    \b
    Example: fusechat-distill evaluate recipe.yaml --model merged=merged
    """
    from fusechat_common.files import write_json, write_text
    from fusechat_distill.evaluation.candidates import EvaluationPlanner
    from fusechat_distill.evaluation.compare import evaluate as measure
    from fusechat_distill.evaluation.export import export, markdown, side_by_side
    from fusechat_distill.evaluation.page import tables, write_picture
    from fusechat_distill.inputs.open import open_inputs
    from fusechat_distill.report.page import require_matplotlib
    from fusechat_distill.storage.processes import Processes

    _quieten()
    require_matplotlib("evaluate")
    planner = EvaluationPlanner(models, generate, questions, trust_remote_code)
    problems = planner.problems
    inputs = open_inputs(recipe, trust_remote_code=trust_remote_code, more_problems=problems)
    plan = planner.plan(inputs)
    processes = Processes(inputs.recipe.scoring.device)
    if processes.count > 1:
        problem = "runs in one process, on all devices of the machine; start it without a launcher"
        raise RequestError(problem, "evaluate")
    evaluation, answers = measure(plan, processes, Bar(processes))
    output = inputs.recipe.output_folder
    report = output / "report"
    paths = [output / "evaluation.json", report / "evaluation.png"]
    report.mkdir(exist_ok=True)
    write_json(paths[0], evaluation.as_json())
    write_picture(evaluation, paths[1])
    if plan.questions is not None:
        shown = side_by_side(plan.questions, answers)
        folder = output / "answers" / plan.questions.name
        paths += [report / "answers.json", report / "answers.md", folder]
        write_json(report / "answers.json", shown.as_json())
        write_text(report / "answers.md", markdown(shown))
        export(plan.questions, answers, folder)
    if as_json:
        _echo_json(evaluation.as_json())
    else:
        _print(tables(evaluation), paths)


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _print(tables: Iterable[RenderableType], paths: Iterable[Path]) -> None:
    """Results for people, and where they were written."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    click.echo("written: " + ", ".join(map(str, paths)))


def _run(
    recipe: str,
    stages: Callable[[Inputs], list[Stage]],
    asked: dict[str, tuple[str, ...]],
    only: tuple[str, ...] | None = None,
    *,
    trust_remote_code: bool,
) -> None:
    """Check everything, then run the stages one after the other, on all processes.

    `only` is as in `open_inputs`.
    """
    from fusechat_distill.inputs.open import open_inputs
    from fusechat_distill.recipe.schema import PIVOT, read_recipe
    from fusechat_distill.storage.processes import Processes

    def more_problems(inputs: Inputs) -> list[str]:
        chosen = stages(inputs)
        problems = [problem for stage in chosen for problem in stage.problems()]
        for option, names in asked.items():
            known = [n for n in inputs.recipe.models if option == "--model" or n != PIVOT]
            problems += [
                f"{option} {name}: not in the recipe; its {option[2:]}s are {', '.join(known)}"
                for name in names
                if name not in known
            ]
        if not problems and not chosen and any(asked.values()):
            strategy = inputs.recipe.fusion.strategy
            problems.append(f"--source: fusion.strategy: {strategy} has no sources; leave it out")
        return problems

    def check() -> Inputs:
        return open_inputs(
            recipe, only=only, trust_remote_code=trust_remote_code, more_problems=more_problems
        )

    readable, _ = read_recipe(recipe)
    processes = Processes(readable.scoring.device if readable else "cpu")
    _quieten(processes.is_first)
    try:
        for stage in stages(processes.in_turn(check)):
            status = stage.run(processes, Bar(processes))
            if processes.is_first:
                click.echo(_line(status))
    finally:
        processes.close()


class Bar:
    """Progress on stderr: samples, tokens/s of this process, time left; in the first process."""

    def __init__(self, processes: Processes):
        self._processes = processes

    def start(self, title: str, total: int) -> None:
        from tqdm import tqdm

        count = self._processes.count
        self._tokens = 0
        self._bar = tqdm(
            total=total,
            desc=title if count == 1 else f"{title} (1 of {count} processes)",
            unit=" samples",
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            disable=not self._processes.is_first,
        )

    def advance(self, samples: int, tokens: int) -> None:
        self._tokens += tokens
        seconds = self._bar.format_dict["elapsed"]
        if seconds:
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(samples)

    def stop(self) -> None:
        self._bar.close()


def _quieten(first: bool = True) -> None:
    """Silence the libraries' notes, and their progress bars unless stderr is a terminal."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors say the same
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).propagate = False  # they have a handler of their own
    for message in OWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    transformers_logging.set_verbosity_error()
    if not (first and sys.stderr.isatty()):  # pragma: no branch (a terminal)
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _facts(inputs: Inputs) -> dict[str, Any]:
    from fusechat_distill.inputs.open import expected_bytes

    conversations = inputs.conversations
    return {
        "dataset": {
            "conversations": len(conversations),
            "layout": conversations.layout,
            "left_out": [{"row": r.row, "reason": r.reason} for r in conversations.rejected],
        },
        "models": {
            name: {
                "model": model.spec.model,
                "type": model.files.config.model_type,
                "tokens": len(model.files.token_ids),
                "expected_bytes": expected_bytes(inputs, model),
            }
            for name, model in inputs.models.items()
        },
    }


def _line(state: StageStatus[Any]) -> str:
    from fusechat_distill.inputs.open import readable_size

    if state.total is None:
        return f"{state.stage} {state.name}: not begun"
    facts: dict[str, Callable[[Any], list[str]]] = {
        "score": _score_facts,
        "align": _align_facts,
        "fuse": _fuse_facts,
        "train": lambda losses: [f"{name} {x:.4g}" for name, x in losses if x is not None],
        "merge": lambda details: [],
    }
    parts = [f"{state.done:,} of {state.total:,} {state.unit}", *facts[state.stage](state.details)]
    parts.append(readable_size(state.bytes))
    if state.tokens_per_second:
        parts.append(f"{state.tokens_per_second:,.0f} tokens/s a process")
    if left := _seconds_left(state):
        parts.append(f"about {datetime.timedelta(seconds=round(left))} left")
    return f"{state.stage} {state.name}: " + "; ".join(parts)


def _score_facts(summary: ScoreSummary) -> list[str]:
    counts = {
        "response tokens": summary.response_tokens,
        "cut at max_length": summary.cut,
        "with the system prompt in the first user message": summary.system_folded,
        "left out": len(summary.left_out),
        "left out with NaN or Inf": len(summary.non_finite),
    }
    facts = [f"{count:,} {what}" for what, count in counts.items() if count]
    if skipped := summary.turns_skipped:
        reasons = ", ".join(f"{count} {why}" for why, count in skipped.items())
        facts.append(f"{sum(skipped.values()):,} answers as context only ({reasons})")
    return facts


def _align_facts(summary: AlignSummary) -> list[str]:
    from fusechat_distill.alignment.stage import alignment_shares

    shares = alignment_shares(summary)
    return [
        f"{shares['positions_matched']:.1%} of the pivot's positions matched",
        f"{shares['mass_kept']:.1%} of the mass kept",
    ]


def _fuse_facts(summary: FuseSummary) -> list[str]:
    facts = [f"{summary.held_out:,} held out"]
    if summary.positions:
        share = (summary.positions_with_target or 0) / summary.positions
        facts.append(f"{share:.1%} of the positions have a distribution")
    return facts


def _seconds_left(state: StageStatus[Any]) -> float | None:
    """At the rate so far, for one process."""
    if state.total is None or not 0 < state.done < state.total or not state.tokens_per_second:
        return None
    tokens = state.details.input_tokens / state.done * (state.total - state.done)
    return tokens / state.tokens_per_second

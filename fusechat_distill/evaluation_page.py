"""The evaluation for people: tables on the terminal and a forest plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusechat_distill.evaluation import ALL

if TYPE_CHECKING:
    from rich.console import RenderableType


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """The content of `evaluation.json` for a terminal: models by groups, then the pairs."""
    from rich.table import Table
    from rich.text import Text

    groups = found["groups"]
    data = found["dataset"]
    level = f"{found['method']['level']:.0%}"
    models = Table(
        title=f"bits per byte of {data['counted']:,} of {data['answers']:,} held-out answers, "
        f"± half the {level} interval; less is better",
        title_justify="left",
    )
    models.add_column("")
    for group in groups:
        models.add_column(Text(group), justify="right")
    models.add_column("bits to end", justify="right")
    for name, model in found["models"].items():
        seeds = len(model["paths"])
        models.add_row(
            Text(name + (f" ({seeds} seeds)" if seeds > 1 else "")),
            *(_value(model["groups"][group]) for group in groups),
            "-" if model["end_bits"] is None else f"{model['end_bits']:.2f}",
        )
    shown: list[RenderableType] = [models]
    if found["pairs"]:
        pairs = Table(
            title=f"differences over all of them, with {level} intervals", title_justify="left"
        )
        pairs.add_column("")
        for column in ("bits per byte", "p (Holm)"):
            pairs.add_column(column, justify="right", no_wrap=True)
        pairs.add_column("", no_wrap=True)
        for pair in found["pairs"]:
            of = pair["groups"][ALL]
            pairs.add_row(
                Text(title(pair)),
                _bounds(of["relative"]),
                "-" if of["p_holm"] is None else f"{of['p_holm']:.2g}",
                Text(of["verdict"]),
            )
        shown.append(pairs)
        if any(is_single(pair) for pair in found["pairs"]):
            shown.append(
                Text("* of these checkpoints only: other training seeds may differ as much")
            )
        shown += _of_groups(found)
    least = min(model["left_out"] for model in found["models"].values())
    for name, model in found["models"].items():
        if more := model["left_out"] - least:
            shown.append(Text(f"{name}: could not be given {more:,} answers; not counted for any"))
    for name in found["unfinished"]:
        shown.append(Text(f"target {name}: not there yet; `fusechat-distill run RECIPE` goes on"))
    return shown


def title(pair: Mapping[str, Any]) -> str:
    """`a vs b`, with a star where training seeds are not part of the interval."""
    return f"{pair['a']} vs {pair['b']}" + ("*" if is_single(pair) else "")


def is_single(pair: Mapping[str, Any]) -> bool:
    return "this checkpoint" in pair["scope"]


def _of_groups(found: Mapping[str, Any]) -> list[RenderableType]:
    """Which groups a difference was shown in, a line for each pair."""
    from rich.text import Text

    groups = [group for group in found["groups"] if group != ALL]
    lines: list[RenderableType] = []
    for pair in found["pairs"] if groups else ():
        parts = []
        for verdict in ("better", "worse"):
            of = [g for g in groups if pair["groups"][g]["verdict"] == verdict]
            if of:
                parts.append(f"{verdict} in {len(of)} of {len(groups)} groups ({', '.join(of)})")
        said = "; ".join(parts) or "no difference shown in any group"
        lines.append(Text(f"{title(pair)}: {said}"))
    return lines


def _value(of: Mapping[str, Any]) -> str:
    if of["low"] is None:
        return f"{of['value']:.4f}"
    return f"{of['value']:.4f} ±{(of['high'] - of['low']) / 2:.4f}"


def _bounds(of: Mapping[str, Any]) -> str:
    """In per cent."""
    value = f"{of['value']:+.2%}"
    if of["low"] is None:
        return value
    return f"{value} [{of['low']:+.2%}, {of['high']:+.2%}]"

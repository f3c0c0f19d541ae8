"""Units: which tensors share one statistic, and so one set of merge weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Granularity = Literal["matrix", "module", "layer", "model", "element"]
"""What a unit is; `varm` declares its parameter with this type."""
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
MULTI_TENSOR: frozenset[str] = frozenset({"module", "layer", "model"})
"""Granularities whose unit may hold several tensors."""


@dataclass(frozen=True)
class Unit:
    """The key of a unit of several tensors.

    Attributes:
        name: what the tensors' names begin with, or `model`; see `unit_name`.
        granularity: one of `MULTI_TENSOR`.
        statistic: `square` or `absolute`.
    """

    name: str
    granularity: str
    statistic: str


def shared_unit(tensor: str, parameters: Mapping[str, Any]) -> Unit | None:
    """The unit of several tensors that a tensor belongs to; None where it is a unit by itself.

    `parameters` are those of `varm`, resolved for this tensor.
    """
    granularity = parameters["granularity"]
    if granularity not in MULTI_TENSOR:
        return None
    return Unit(unit_name(tensor, granularity), granularity, parameters["statistic"])


def members_of(units: Iterable[Unit], tensors: Sequence[str]) -> dict[Unit, list[int]]:
    """Which tensors each unit's statistic is taken over.

    A tensor belongs to a unit by its name alone: also if a filter gives the tensor itself another
    granularity or statistic.

    Args:
        units: the units asked for; equal ones count once.
        tensors: names of the tensors that may be members.

    Returns:
        For each unit, in the order given, the positions of its members in `tensors`.
    """
    wanted = list(dict.fromkeys(units))
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for granularity in {unit.granularity for unit in wanted}:
        for position, tensor in enumerate(tensors):
            members[granularity, unit_name(tensor, granularity)].append(position)
    return {unit: members[unit.granularity, unit.name] for unit in wanted}


def unit_name(tensor: str, granularity: str) -> str:
    """The name of the unit that a tensor belongs to.

    Args:
        tensor: its name, such as `model.layers.3.self_attn.q_proj.weight`.
        granularity: `matrix` and `element` (the tensor itself), `module` (the layer and one
            component more, `model.layers.3.self_attn`), `layer` or `model` (everything).

    Raises:
        ValueError: an unknown granularity.
    """
    check_granularity(granularity)
    if granularity == "module":
        return layer_of(tensor, more=1)
    if granularity == "layer":
        return layer_of(tensor)
    return "model" if granularity == "model" else tensor


def check_granularity(granularity: str) -> None:
    """Raise ValueError for a name that is no granularity."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {granularity!r}: use one of {', '.join(GRANULARITIES)}"
        )


def layer_of(tensor: str, more: int = 0) -> str:
    """Everything up to and including the first all-digit component: `model.layers.3`.

    A tensor outside the layers is a layer of its own.

    Args:
        tensor: its name.
        more: how many components after that one to include.
    """
    parts = tensor.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            return ".".join(parts[: i + 1 + more])
    return tensor

"""From the statistics of tensors to the weights of the units they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusechat_merge.granularity import unit_of
from fusechat_merge.methods.varm import total, weights


@dataclass(frozen=True)
class Measured:
    """One output tensor with its settings and what its inputs were found to be.

    Attributes:
        name: the output tensor's name.
        granularity, statistic: its own settings.
        prior: its targets' ``weight`` parameters.
        numel: number of elements.
        sums: Σ δ² (``square``) or Σ |δ| (``absolute``) over the tensor, a target each; None where
            a model lacks the tensor, which then counts for nobody.
    """

    name: str
    granularity: str
    statistic: str
    prior: tuple[float, ...]
    numel: int
    sums: tuple[float, ...] | None


@dataclass(frozen=True)
class Unit:
    """One set of merge weights and what it was computed from.

    Attributes:
        name: the unit's name, a tensor's or a prefix of several.
        granularity: what the unit is.
        tensors: the output tensors merged by these weights.
        numel: elements that the statistics cover.
        statistics: mean over those elements of δ² (or |δ|), a target each.
        weights: a target each; they sum to 1, or are all 0 where no target moved.
    """

    name: str
    granularity: str
    tensors: tuple[str, ...]
    numel: int
    statistics: tuple[float, ...]
    weights: tuple[float, ...]


def weigh(tensors: Iterable[Measured]) -> list[Unit]:
    """The units of a merge in the order of their first tensors.

    A unit's statistics cover every tensor that its name covers, whatever that tensor's own
    granularity; tensors of one unit but of different prior make a Unit each.
    """
    tensors = list(tensors)
    sharing: dict[tuple[str, str, str, tuple[float, ...]], list[Measured]] = {}
    for tensor in tensors:
        unit = unit_of(tensor.name, tensor.granularity)
        key = (tensor.granularity, unit, tensor.statistic, tensor.prior)
        sharing.setdefault(key, []).append(tensor)
    covered: dict[tuple[str, str], list[Measured]] = {}
    for granularity in {tensor.granularity for tensor in tensors}:
        for tensor in tensors:
            if tensor.sums is not None:
                place = (granularity, unit_of(tensor.name, granularity))
                covered.setdefault(place, []).append(tensor)
    units = []
    for (granularity, unit, _, prior), members in sharing.items():
        counted = covered.get((granularity, unit), [])
        sums = total([t.sums for t in counted if t.sums is not None], len(prior))
        numel = sum(t.numel for t in counted)
        units.append(
            Unit(
                name=unit,
                granularity=granularity,
                tensors=tuple(t.name for t in members),
                numel=numel,
                statistics=tuple(s / numel if numel else 0.0 for s in sums),
                weights=tuple(weights(sums, prior)),
            )
        )
    return units

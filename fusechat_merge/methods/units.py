"""A unit: the tensors that share one set of merge weights, and what the weights came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """One set of merge weights and what it was computed from.

    Attributes:
        name: the unit's name, a tensor's or a prefix of several.
        granularity: what the unit is.
        tensors: the output tensors merged by these weights.
        numel: elements that the statistics cover.
        statistics: mean over those elements of δ² (or |δ|), a target each; empty where the method
            needed none.
        weights: a target each; they sum to 1, or are all 0 where no target moved.
    """

    name: str
    granularity: str
    tensors: tuple[str, ...]
    numel: int
    statistics: tuple[float, ...]
    weights: tuple[float, ...]

"""Variation Ratio Merge: a unit's targets count as much as they moved it (arXiv 2402.16107, eq. 7).

W_j = weight_j · s_j / Σ weight · s, where s_j is the sum over the unit of δ_j² (or |δ_j|) and
δ_j = target_j − base. Merged: base + λ Σ_j W_j δ_j, computed as (1 − λ) base + λ Σ_j W_j target_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fusechat_merge.methods.blocks import (
    HALF,
    Block,
    InMemory,
    Passes,
    add_up,
    half_cell_sums,
    scratch,
)
from fusechat_merge.methods.units import check_granularity

Statistic = Literal["square", "absolute"]
"""How far a target has moved from the base: δ² or |δ|."""
STATISTICS: tuple[str, ...] = get_args(Statistic)
_SQUARED = {"square": True, "absolute": False}
"""Whether a statistic sums δ²; one that is not listed is a KeyError, not taken for another."""


@lru_cache(maxsize=1)
def compiled_loops() -> ModuleType | None:
    """`methods.compiled` where numba is there; imported late, for it takes half a second."""
    try:
        from fusechat_merge.methods import compiled
    except ImportError:
        return None
    return compiled


def loops_for(*tensors: Tensor) -> ModuleType | None:
    """The compiled loops if these tensors are what they take: bfloat16 on the CPU."""
    if any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in tensors):
        return None
    return compiled_loops()


def delta_sums(block: Block, statistic: str) -> list[list[float]]:
    """Σ δ_j² or Σ |δ_j| per half grid cell: K lists.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    loops = loops_for(block.base, *block.targets)
    if loops is not None:
        sums = loops.delta_sums(block.base, block.targets, HALF, _SQUARED[statistic])
    else:
        sums = [[] for _ in block.targets]
        for strip in block.strips():
            of_strip = half_cell_sums(_squares(strip, statistic))
            for column, values in zip(sums, of_strip, strict=True):
                column += values
    if not math.isfinite(sum(map(sum, sums))):
        block.raise_if_not_finite()
        raise OverflowError("a target differs from the base by more than float64 can square")
    return sums


def _squares(strip: Block, statistic: str) -> Iterator[Tensor]:
    """δ_j² or |δ_j|, float64 [n], one target after the other in the same memory.

    In float32 a delta of 1e-23 would count as unmoved.
    """
    base = scratch.take("base", strip.base, torch.float64).copy_(strip.base)
    delta = scratch.take("delta", strip.base, torch.float64)
    for target in strip.targets:
        delta.copy_(target).sub_(base)
        yield delta.mul_(delta) if _SQUARED[statistic] else delta.abs_()


def statistics(passes: Passes, statistic: str) -> list[float]:
    """Σ over one tensor of δ_j² or |δ_j|: K floats, exact sums of the half cells' float64 sums.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    return add_up(passes.map(lambda block: delta_sums(block, statistic)), passes.count)


def total(rows: Sequence[Sequence[float]], count: int) -> list[float]:
    """The columns' sums of `rows` [n][count], correctly rounded and so free of any order."""
    return [math.fsum(row[j] for row in rows) for j in range(count)]


def weights(statistics: Sequence[float], prior: Sequence[float]) -> list[float]:
    """W_j ∝ prior_j · statistic_j, Σ W = 1; all 0 where no target with a prior moved."""
    largest = max((s for s, w in zip(statistics, prior, strict=True) if w), default=0.0)
    if largest == 0.0:
        return [0.0] * len(statistics)
    shares = [w * (s / largest) for s, w in zip(statistics, prior, strict=True)]
    whole = math.fsum(shares)
    return [share / whole for share in shares]


def write(passes: Passes, weights: Sequence[float], lam: float) -> None:
    """Write (1 − λ) base + λ Σ W_j target_j, rounded once to the inputs' promoted dtype.

    A unit no target moved (all weights 0) is the base's, bit for bit, and where one target has all
    the weight at λ = 1 the unit is that target's.
    """
    coefficients = [lam * w for w in weights]
    if not any(coefficients):
        passes.write(lambda block, out: out.copy_(block.base))
    elif lam == 1.0 and 1.0 in weights:
        sole = weights.index(1.0)
        passes.write(lambda block, out: out.copy_(block.targets[sole]))
    else:
        write_sum(passes, [1.0 - lam, *coefficients])


def write_sum(passes: Passes, factors: Sequence[float]) -> None:
    """Write Σ factor · input, the base's factor first, rounded once; one at least isn't 0."""
    passes.write(lambda block, out: _write_block(block, out, factors))


def _write_block(block: Block, out: Tensor, factors: Sequence[float]) -> None:
    terms = zip((block.base, *block.targets), factors, strict=True)
    tensors, factors = zip(*((tensor, factor) for tensor, factor in terms if factor), strict=True)
    loops = loops_for(out, *tensors)
    if loops is not None:
        loops.combine(tensors, factors, out)
        return
    for strip in Block(block.start, tensors[0], tensors[1:]).strips():
        merged = scratch.take("merged", strip.base, block.compute_dtype)
        term = scratch.take("delta", strip.base, block.compute_dtype)
        merged.copy_(strip.base).mul_(factors[0])
        for tensor, factor in zip(strip.targets, factors[1:], strict=True):
            merged.add_(term.copy_(tensor), alpha=factor)
        block.part(out, strip).copy_(merged)


def write_elements(passes: Passes, prior: Sequence[float], statistic: str, lam: float) -> None:
    """The same with every element a unit of its own; an unmoved element keeps the base's bits.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    passes.write(lambda block, out: _write_elements_block(block, out, prior, statistic, lam))


def _write_elements_block(
    block: Block, out: Tensor, prior: Sequence[float], statistic: str, lam: float
) -> None:
    for strip in block.strips():
        strip.raise_if_not_finite()
        merged = block.part(out, strip)
        merged.copy_(strip.base)
        if not lam:
            continue
        # Targets of weight 0 neither count nor move an element.
        counted = [(t, w) for t, w in zip(strip.targets, prior, strict=True) if w]
        base = scratch.take("base", strip.base, torch.float64).copy_(strip.base)
        value = scratch.take("delta", strip.base, torch.float64)
        share = scratch.take("wide", strip.base, torch.float64)
        largest = scratch.take("largest", strip.base, torch.float64).zero_()
        for target, _ in counted:
            torch.maximum(largest, value.copy_(target).sub_(base).abs_(), out=largest)
        moved = largest > 0
        largest.masked_fill_(~moved, 1.0)
        whole = scratch.take("whole", strip.base, torch.float64).zero_()
        mean = scratch.take("merged", strip.base, torch.float64).zero_()
        for target, weight in counted:
            value.copy_(target)
            # Relative to the largest, so that no square underflows.
            torch.sub(value, base, out=share).div_(largest).abs_()
            if _SQUARED[statistic]:
                share.mul_(share)
            share.mul_(weight)
            whole.add_(share)
            mean.addcmul_(share, value)
        # The weighted mean of the targets; scaled by λ towards the base, or the one target itself.
        mean.div_(whole.masked_fill_(~moved, 1.0))
        if lam != 1.0:
            mean.mul_(lam).add_(base, alpha=1.0 - lam)
        elif len(strip.targets) == 1:
            mean.copy_(strip.targets[0])
        torch.where(moved, mean.to(merged.dtype), merged, out=merged)


def varm_weights(
    base: Tensor,
    targets: Sequence[Tensor],
    *,
    statistic: Statistic = "square",
    weight: Sequence[float] | None = None,
) -> Tensor:
    """The merge weights of one unit that is one tensor (arXiv 2402.16107, eq. 7).

    Args:
        base: the pivot's tensor, any shape, floating.
        targets: K tensors of the same shape.
        statistic: `square` (the paper's) or `absolute`.
        weight: prior of each target, at least 0; default 1.

    Returns:
        float64 [K] on the CPU: the weights, which sum to 1; all 0 where no target moved.

    Raises:
        ValueError: shapes differ, a tensor isn't floating, no target, an unknown statistic, a
            negative or all-zero weight.
        NonFiniteError: an input holds NaN or Inf.
    """
    prior = _checked(targets, statistic, weight)
    sums = statistics(InMemory(base, targets), statistic)
    return torch.tensor(weights(sums, prior), dtype=torch.float64)


def varm(
    base: Tensor,
    targets: Sequence[Tensor],
    *,
    granularity: str = "matrix",
    statistic: Statistic = "square",
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
) -> Tensor:
    """Merge one tensor by variation ratio (arXiv 2402.16107, eq. 7).

    Args:
        base: the pivot's tensor, any shape, floating.
        targets: K tensors of the same shape.
        granularity: `element` weighs each element by itself; for any other granularity the unit
            is this tensor.
        statistic: `square` (the paper's) or `absolute`.
        weight: prior of each target, at least 0; default 1.
        lambda_: scale of the merged update.

    Returns:
        The merged tensor: base's shape, the promoted dtype of all inputs, rounded once.

    Raises:
        ValueError: shapes differ, a tensor isn't floating, no target, an unknown granularity or
            statistic, a negative or all-zero weight.
        NonFiniteError: an input holds NaN or Inf.
    """
    check_granularity(granularity)
    prior = _checked(targets, statistic, weight)
    passes = InMemory(base, targets)
    if granularity == "element":
        write_elements(passes, prior, statistic, lambda_)
    else:
        write(passes, weights(statistics(passes, statistic), prior), lambda_)
    return passes.output


def _checked(
    targets: Sequence[Tensor], statistic: str, weight: Sequence[float] | None
) -> list[float]:
    if not targets:
        raise ValueError("varm needs at least one target")
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}: use one of {', '.join(STATISTICS)}")
    prior = [1.0] * len(targets) if weight is None else [float(w) for w in weight]
    if len(prior) != len(targets):
        raise ValueError(f"{len(prior)} weights for {len(targets)} targets")
    if not all(math.isfinite(w) and w >= 0 for w in prior):
        raise ValueError(f"weight must be finite and at least 0, got {list(prior)}")
    if not any(prior):
        raise ValueError("every target's weight is 0: give at least one a weight above 0")
    return prior

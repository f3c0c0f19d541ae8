"""Select, Calculate, Erase (FuseChat, arXiv 2408.07990, Algorithm 1), one matrix at a time.

Select the τ share of elements whose δ varies most across targets (δ̂, others 0); η_j ∝ Σ δ̂_j²;
erase the entries of δ̂_j whose sign is against that of Σ_j δ̂_j; merged = base + Σ_j η_j δ′_j.
All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.methods.blocks import Block, InMemory, Passes, cell_sum, scratch
from fusechat_merge.methods.varm import total, weights

VARIANTS: tuple[str, ...] = ("paper", "fork")
_DIGIT = 16


def merge(passes: Passes, select_topk: float = 1.0, variant: str = "paper") -> list[float]:
    """Write the merged tensor; return η_j, K floats.

    Args:
        passes: one tensor of the base and K targets.
        select_topk: τ, the share of the elements of non-zero variance that is selected; 1 selects
            every element.
        variant: ``paper``, or ``fork`` (the authors' code: selection affects η only, whole deltas
            are merged and divided by the η of those that agree in sign).

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    eta, selection = shares(passes, select_topk, variant)
    if variant == "fork":
        passes.write(lambda block, out: _write_fork(block, out, eta))
    else:
        passes.write(lambda block, out: _write_paper(block, out, eta, selection))
    return eta


def shares(
    passes: Passes, select_topk: float = 1.0, variant: str = "paper"
) -> tuple[list[float], _Selection | None]:
    """η_j (K floats) and the selection it was calculated over (None: everything)."""
    selection = _select(passes, select_topk) if select_topk < 1.0 else None
    rows = [
        row for rows in passes.map(lambda block: _selected_sums(block, selection)) for row in rows
    ]
    eta = weights(total(rows, passes.count), [1.0] * passes.count)
    if variant == "fork" and not any(eta):
        eta = [1.0 / passes.count] * passes.count
    return eta, selection


@dataclass(frozen=True)
class _Selection:
    """Elements whose variance, as the int64 of its bits, is above ``threshold``, and of those equal
    to it the ``ties`` first; ``tied_before`` counts the equal ones before each grid cell."""

    threshold: int
    ties: int
    tied_before: dict[int, int]

    def mask(self, cell: Block, deltas: Sequence[Tensor]) -> Tensor:
        """bool [n]: which elements of the cell are selected."""
        keys = _variance_keys(deltas)
        selected = keys > self.threshold
        if self.ties:
            tied = keys == self.threshold
            rank = torch.cumsum(tied, 0) + self.tied_before[cell.start]
            selected |= tied & (rank <= self.ties)
        return selected


def _deltas(cell: Block) -> list[Tensor]:
    """δ_j in float64: K of [n]."""
    base = scratch.take("base", cell.base, torch.float64).copy_(cell.base)
    return [
        scratch.take(f"delta{j}", cell.base, torch.float64).copy_(target).sub_(base)
        for j, target in enumerate(cell.targets)
    ]


def _variance_keys(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance across targets as the int64 of its bits, which orders alike: [n]."""
    mean = scratch.take("mean", deltas[0], torch.float64).zero_()
    for delta in deltas:
        mean.add_(delta)
    mean.div_(len(deltas))
    variance = scratch.take("variance", deltas[0], torch.float64).zero_()
    off = scratch.take("off", deltas[0], torch.float64)
    for delta in deltas:
        torch.sub(delta, mean, out=off)
        variance.add_(off.mul_(off))  # addcmul_ fuses on some processors, which breaks ties
    return variance.div_(len(deltas)).view(torch.int64)


def _select(passes: Passes, tau: float) -> _Selection:
    """The k = ⌊τ · (elements of non-zero variance)⌋ largest variances, found digit by digit.

    Each pass counts the next 16 bits of those that share the bits found so far, so memory does not
    depend on the tensor.
    """
    prefix, wanted = 0, -1
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for found in passes.map(lambda b, s=shift, p=prefix: _digit_counts(b, s, p)):  # type: ignore[misc]
            counts += found
        if wanted < 0:
            wanted = math.floor(tau * int(counts.sum()))
            if wanted == 0:
                return _Selection(np.iinfo(np.int64).max, 0, {})
        at_least = np.cumsum(counts[::-1])[::-1]
        digit = int(np.flatnonzero(at_least >= wanted)[-1])
        wanted -= int(at_least[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
        if wanted == counts[digit]:
            return _Selection((prefix << shift) - 1, 0, {})
    tied_before, seen = {}, 0
    for cells in passes.map(lambda block: _tied(block, prefix)):
        for start, tied in cells:
            tied_before[start] = seen
            seen += tied
    return _Selection(prefix, wanted, tied_before)


def _digit_counts(block: Block, shift: int, prefix: int) -> np.ndarray:
    """How many elements of non-zero variance have which digit at ``shift`` below ``prefix``."""
    counts = np.zeros(1 << _DIGIT, dtype=np.int64)
    for cell in block.cells():
        keys = _variance_keys(_deltas(cell))
        if shift == 64 - _DIGIT:
            if not math.isfinite(cell_sum(keys.view(torch.float64))):
                cell.raise_if_not_finite()
            inside = keys[keys != 0]
        else:
            inside = keys[(keys >> (shift + _DIGIT) == prefix) & (keys != 0)]
        digits = (inside >> shift) & ((1 << _DIGIT) - 1)
        counts += np.bincount(digits.cpu().numpy(), minlength=1 << _DIGIT)
    return counts


def _tied(block: Block, threshold: int) -> list[tuple[int, int]]:
    return [
        (cell.start, int((_variance_keys(_deltas(cell)) == threshold).sum()))
        for cell in block.cells()
    ]


def _selected_sums(block: Block, selection: _Selection | None) -> list[list[float]]:
    """Σ δ̂_j² per grid cell."""
    sums = []
    for cell in block.cells():
        deltas = _deltas(cell)
        mask = None if selection is None else selection.mask(cell, deltas)
        square = scratch.take("square", cell.base, torch.float64)
        row = []
        for delta in deltas:
            torch.mul(delta, delta, out=square)
            if mask is not None:
                square.mul_(mask)
            row.append(cell_sum(square))
        if not all(map(math.isfinite, row)):
            cell.raise_if_not_finite()
        sums.append(row)
    return sums


def _write_paper(
    block: Block, out: Tensor, eta: Sequence[float], selection: _Selection | None
) -> None:
    for cell in block.cells():
        deltas = _deltas(cell)
        if selection is not None:
            mask = selection.mask(cell, deltas)
            for delta in deltas:
                delta.mul_(mask)
        update = scratch.take("update", cell.base, torch.float64).zero_()
        majority = _sum(deltas).sign_()
        for delta, share in zip(deltas, eta, strict=True):
            agrees = delta.sign().mul_(majority) > 0
            update.add_(delta.mul_(agrees), alpha=share)
        _add_update(cell, block, out, update)


def _write_fork(block: Block, out: Tensor, eta: Sequence[float]) -> None:
    for cell in block.cells():
        deltas = _deltas(cell)
        majority = torch.where(_sum(deltas) >= 0, 1.0, -1.0)
        update = scratch.take("update", cell.base, torch.float64).zero_()
        divisor = scratch.take("divisor", cell.base, torch.float64).zero_()
        for delta, share in zip(deltas, eta, strict=True):
            agrees = (delta.sign() == majority).to(torch.float64)
            update.add_(delta.mul_(agrees), alpha=share)
            divisor.add_(agrees, alpha=share)
        update.div_(divisor.masked_fill_(divisor == 0, 1.0))
        _add_update(cell, block, out, update)


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    result = scratch.take("mean", deltas[0], torch.float64).zero_()
    for delta in deltas:
        result.add_(delta)
    return result


def _add_update(cell: Block, block: Block, out: Tensor, update: Tensor) -> None:
    """base + update, the base's own bits where the update is 0."""
    first = cell.start - block.start
    merged = out[first : first + cell.base.numel()]
    merged.copy_(cell.base)
    still = update == 0
    update.add_(cell.base)
    torch.where(still, merged, update.to(merged.dtype), out=merged)


def sce(
    base: Tensor, targets: Sequence[Tensor], *, select_topk: float = 1.0, variant: str = "paper"
) -> Tensor:
    """Merge one tensor by Select, Calculate, Erase; see ``merge`` for the parameters.

    Returns:
        The merged tensor: base's shape, the promoted dtype of all inputs, rounded once.

    Raises:
        ValueError: shapes differ, a tensor isn't floating, no target, ``select_topk`` outside 0 to
            1, an unknown variant.
        NonFiniteError: an input holds NaN or Inf.
    """
    if not targets:
        raise ValueError("sce needs at least one target")
    if not 0.0 <= select_topk <= 1.0:
        raise ValueError(f"select_topk must be from 0 to 1, got {select_topk!r}")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: use one of {', '.join(VARIANTS)}")
    passes = InMemory(base, targets)
    merge(passes, select_topk, variant)
    return passes.output

"""Select, Calculate, Erase (FuseChat, arXiv 2408.07990, Algorithm 1), one matrix at a time.

Select the τ share of elements whose δ varies most across targets (δ̂, others 0); η_j ∝ Σ δ̂_j²;
erase the entries of δ̂_j whose sign is against that of Σ_j δ̂_j; merged = base + Σ_j η_j δ′_j.
All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.methods.blocks import Block, InMemory, Passes, add_up, half_cell_sums, scratch
from fusechat_merge.methods.varm import weights

Variant = Literal["paper", "fork"]
"""Algorithm 1 as published, or as the authors' code has it."""
VARIANTS: tuple[str, ...] = get_args(Variant)
_DIGIT = 16
CANDIDATES = 1 << 17
"""Variances, at most, that are collected to be sorted."""


def sce(
    base: Tensor, targets: Sequence[Tensor], *, select_topk: float = 1.0, variant: str = "paper"
) -> Tensor:
    """Merge one tensor by Select, Calculate, Erase; see `merge` for the parameters.

    Args:
        base: the pivot's tensor, any shape, floating.
        targets: K tensors of the same shape.

    Returns:
        The merged tensor: base's shape, the promoted dtype of all inputs, rounded once.

    Raises:
        ValueError: shapes differ, a tensor isn't floating, no target, `select_topk` outside 0 to
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


def merge(passes: Passes, select_topk: float, variant: str) -> list[float]:
    """Write the merged tensor; return η_j, K floats.

    Args:
        passes: one tensor of the base and K targets.
        select_topk: τ, the share of the elements of non-zero variance that is selected; 1 selects
            every element.
        variant: `paper`, or `fork` (the authors' code: selection affects η only, whole deltas
            are merged and divided by the η of those that agree in sign).

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    eta, selection = shares(passes, select_topk, variant)
    write(passes, eta, selection, variant)
    return eta


def shares(
    passes: Passes, select_topk: float, variant: str
) -> tuple[list[float], Selection | None]:
    """η_j (K floats) and the selection it was calculated over (None: everything)."""
    selection = select(passes, select_topk) if select_topk < 1.0 else None
    sums = add_up(passes.map(lambda block: _selected_sums(block, selection)), passes.count)
    eta = weights(sums, [1.0] * passes.count)
    if variant == "fork" and not any(eta):
        eta = [1.0 / passes.count] * passes.count
    return eta, selection


def write(passes: Passes, eta: Sequence[float], selection: Selection | None, variant: str) -> None:
    """Write the merged tensor by what `shares` returned."""
    update: Callable[[Block, list[Tensor]], Tensor]
    if variant == "fork":
        update = partial(_fork_update, eta=eta)
    else:
        update = partial(_paper_update, eta=eta, selection=selection)
    passes.write(lambda block, out: _write(block, out, update))


@dataclass(frozen=True)
class Selection:
    """The elements of largest variance across targets.

    Attributes:
        above: elements whose variance, as the int64 of its bits, is larger are selected.
        ties: how many of the elements equal to it are selected as well, the first ones.
        tied_before: if ties, how many equal elements lie before each strip of each block, by the
            strip's start.
    """

    above: int
    ties: int = 0
    tied_before: dict[int, int] = field(default_factory=dict)

    def mask(self, strip: Block, deltas: Sequence[Tensor]) -> Tensor:
        """float64 [n]: 1 where selected, else 0."""
        keys = _variance_keys(deltas)
        selected = keys > self.above
        if self.ties:
            tied = keys == self.above
            rank = torch.cumsum(tied, 0).add_(self.tied_before[strip.start])
            selected |= tied & (rank <= self.ties)
        return selected.to(torch.float64)


def select(passes: Passes, tau: float) -> Selection:
    """Select the k = ⌊τ · (elements of non-zero variance)⌋ elements of largest variance.

    Population variance; ties go to the lower flat index. The k-th largest is found digit by digit:
    a pass counts the next 16 bits of the variances that share the bits found so far, until so few
    are left that they can be sorted. Memory does not depend on the tensor.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
    """
    # `prefix`: the leading bits of the k-th largest variance, as far as they are known. `wanted`:
    # how many of the variances that begin with it are selected, the largest; -1 until k is known.
    prefix, wanted = 0, -1
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for digits, number in passes.map(partial(_count_digits, shift=shift, prefix=prefix)):
            counts[digits] += number
        if wanted < 0:  # the first pass has counted every element of non-zero variance
            wanted = math.floor(tau * int(counts.sum()))
            if wanted == 0:
                return Selection(np.iinfo(np.int64).max)
        # at_least[d]: variances whose digit is d or above. The k-th has the largest digit for which
        # these are enough; those above it are selected, the rest is looked for at this digit.
        at_least = np.cumsum(counts[::-1])[::-1]
        digit = int(np.flatnonzero(at_least >= wanted)[-1])
        wanted -= int(at_least[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
        # All that begin with these bits are selected: the largest number below them is the limit.
        if wanted == counts[digit]:
            return Selection((prefix << shift) - 1)
        # Few enough to collect and sort: the k-th itself, and how many of its equals are wanted.
        if shift and counts[digit] <= CANDIDATES:
            keys = np.sort(
                np.concatenate(list(passes.map(partial(_candidates, shift=shift, prefix=prefix))))
            )
            prefix = int(keys[-wanted])
            wanted -= int((keys > prefix).sum())
            if wanted == int((keys == prefix).sum()):
                return Selection(prefix - 1)
            break
    # Not all elements equal to the k-th are selected. The first ones are: a last pass counts how
    # many lie before each strip, so that a strip can rank its own.
    tied_before, seen = {}, 0
    for strips in passes.map(lambda block: _tied(block, prefix)):
        for start, tied in strips:
            tied_before[start] = seen
            seen += tied
    return Selection(prefix, wanted, tied_before)


def _deltas(strip: Block) -> list[Tensor]:
    """δ_j in float64: K of [n]."""
    base = scratch.take("base", strip.base, torch.float64).copy_(strip.base)
    return [
        scratch.take(f"delta{j}", strip.base, torch.float64).copy_(target).sub_(base)
        for j, target in enumerate(strip.targets)
    ]


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    result = scratch.take("sum", deltas[0], torch.float64).copy_(deltas[0])
    for delta in deltas[1:]:
        result.add_(delta)
    return result


def _variance_keys(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance across targets as the int64 of its bits, which orders alike: [n]."""
    mean = _sum(deltas).div_(len(deltas))
    variance = scratch.take("variance", deltas[0], torch.float64).zero_()
    off = scratch.take("off", deltas[0], torch.float64)
    for delta in deltas:
        # Not addcmul_: whether it fuses is the processor's affair, and ties hang on the last bit.
        torch.sub(delta, mean, out=off)
        variance.add_(off.mul_(off))
    return variance.div_(len(deltas)).view(torch.int64)


def _count_digits(block: Block, shift: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits at `shift` of the variances that begin with `prefix`, and how many have each.

    Zeros are left out at the first digit, so that no more is wanted than there are others.
    """
    counts = np.zeros(1 << _DIGIT, dtype=np.int64)
    for strip in block.strips():
        keys = _variance_keys(_deltas(strip))
        if shift == 64 - _DIGIT:
            if not math.isfinite(float(keys.view(torch.float64).sum())):
                strip.raise_if_not_finite()
            counts += _bins(keys >> shift)
            counts[0] -= int((keys == 0).sum())
        else:
            inside = keys[keys >> (shift + _DIGIT) == prefix]
            counts += _bins((inside >> shift) & ((1 << _DIGIT) - 1))
    digits = np.flatnonzero(counts)
    return digits, counts[digits]


def _bins(digits: Tensor) -> np.ndarray:
    return np.bincount(digits.cpu().numpy(), minlength=1 << _DIGIT)


def _candidates(block: Block, shift: int, prefix: int) -> np.ndarray:
    """The variances, as int64, that begin with `prefix`."""
    parts = []
    for strip in block.strips():
        keys = _variance_keys(_deltas(strip))
        parts.append(keys[keys >> shift == prefix].cpu().numpy())
    return np.concatenate(parts)


def _tied(block: Block, key: int) -> list[tuple[int, int]]:
    """(start, number of elements whose variance has the bits `key`) of every strip."""
    return [
        (strip.start, int((_variance_keys(_deltas(strip)) == key).sum()))
        for strip in block.strips()
    ]


def _selected_sums(block: Block, selection: Selection | None) -> list[list[float]]:
    """Σ δ̂_j² per half grid cell: K lists."""
    columns: list[list[float]] = [[] for _ in block.targets]
    for strip in block.strips():
        sums = half_cell_sums(_selected_squares(strip, selection))
        if not math.isfinite(sum(map(sum, sums))):
            strip.raise_if_not_finite()
        for column, values in zip(columns, sums, strict=True):
            column += values
    return columns


def _selected_squares(strip: Block, selection: Selection | None) -> Iterator[Tensor]:
    deltas = _deltas(strip)
    mask = None if selection is None else selection.mask(strip, deltas)
    for delta in deltas:
        square = delta.mul_(delta)
        yield square if mask is None else square.mul_(mask)


def _paper_update(
    strip: Block, deltas: list[Tensor], eta: Sequence[float], selection: Selection | None
) -> Tensor:
    """Σ η_j δ′_j: of the selected elements, the deltas that agree with the sign of their sum."""
    # Outside the selection every δ̂ is 0, and so is the sign of their sum.
    mask = None if selection is None else selection.mask(strip, deltas)
    sign = _sum(deltas).sign_()
    if mask is not None:
        sign.mul_(mask)
    result = scratch.take("update", strip.base, torch.float64).zero_()
    for delta, share in zip(deltas, eta, strict=True):
        result.add_(delta.mul_(sign).clamp_min_(0.0), alpha=share)
    return result.mul_(sign)


def _fork_update(strip: Block, deltas: list[Tensor], eta: Sequence[float]) -> Tensor:
    """The same of all elements, divided by the sum of the η_j that agree."""
    sign = torch.where(_sum(deltas) >= 0, 1.0, -1.0).to(torch.float64)
    result = scratch.take("update", strip.base, torch.float64).zero_()
    divisor = scratch.take("divisor", strip.base, torch.float64).zero_()
    for delta, share in zip(deltas, eta, strict=True):
        # |δ_j| where it agrees with the sign, else 0.
        along = delta.mul_(sign).clamp_min_(0.0)
        result.add_(along, alpha=share)
        divisor.add_(along > 0, alpha=share)
    return result.div_(divisor.masked_fill_(divisor == 0, 1.0)).mul_(sign)


def _write(block: Block, out: Tensor, update: Callable[[Block, list[Tensor]], Tensor]) -> None:
    """base + update, the base's own bits where the update is 0."""
    for strip in block.strips():
        change = update(strip, _deltas(strip))
        merged = block.part(out, strip)
        merged.copy_(strip.base)
        still = change == 0
        base = scratch.take("base", strip.base, torch.float64)  # as _deltas left it
        torch.where(still, merged, change.add_(base).to(merged.dtype), out=merged)

"""Inner loops on bfloat16, compiled by numba for the processor at hand.

Several times as fast as the same steps as separate torch operations, and without the interpreter's
lock. Lanes are added in a fixed order and nothing is contracted, so that the results have the same
bits on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

_LANES = 128
_CHUNK = 1024


def delta_sums(
    base: Tensor, targets: Sequence[Tensor], part: int, squared: bool
) -> list[list[float]]:
    """Σ δ_j² (or |δ_j|) in float64 of every `part` elements and of the rest.

    Args:
        base: [n] bfloat16 on the CPU, contiguous.
        targets: K of the same.
        part: a multiple of 128.

    Returns:
        K lists of ⌈n / part⌉ floats.
    """
    sums = np.empty((len(targets), -(-base.numel() // part)), np.float64)
    _delta_sums(_raw(base), tuple(map(_raw, targets)), sums, part, squared)
    columns: list[list[float]] = sums.tolist()
    return columns


def dot_products(tensors: Sequence[Tensor], part: int, deltas: bool) -> list[list[float]]:
    """Dot products in float64 of all pairs of tensors, of every `part` elements and of the rest.

    Args:
        tensors: [n] bfloat16 each on the CPU, contiguous.
        part: a multiple of 128.
        deltas: take the others' differences from the first.

    Returns:
        A list of ⌈n / part⌉ floats for each pair i ≤ j, in the order (0, 0), (0, 1), …
    """
    count = len(tensors) - deltas
    sums = np.empty((count * (count + 1) // 2, -(-tensors[0].numel() // part)), np.float64)
    _dot_products(tuple(map(_raw, tensors)), sums, part, deltas)
    columns: list[list[float]] = sums.tolist()
    return columns


def combine(tensors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """Σ factor · tensor in float32, in their order, rounded to nearest even.

    Args:
        tensors: [n] bfloat16 each on the CPU, contiguous.
        factors: of each.
        out: [n] bfloat16, not one of the tensors.
    """
    _combine(tuple(map(_raw, tensors)), np.array(factors, np.float32), _raw(out))


def _raw(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return tensor.view(torch.uint16).numpy()


def _compiled(function: Any) -> Any:
    """Compiled on its first call and kept beside the module, or in the user's cache."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # neither can be written to
        return njit(**options)(function)

    @wraps(function)
    def call(*arguments: Any) -> None:
        try:
            compiled(*arguments)
        except OSError:  # no room to keep it there; it has been compiled all the same
            compiled(*arguments)

    return call


@njit(inline="always")
def _widened(raw: Any) -> Any:  # pragma: no cover (runs as machine code)
    """The float32 whose upper half are a bfloat16's bits."""
    return np.uint32(np.uint32(raw) << np.uint32(16)).view(np.float32)


@_compiled
def _delta_sums(  # pragma: no cover (runs as machine code)
    base: Any, targets: Any, sums: Any, part: int, squared: bool
) -> None:
    lanes = np.empty((len(targets), _LANES), np.float64)
    for number in range(sums.shape[1]):
        lanes[:] = 0.0
        end = min((number + 1) * part, base.shape[0])
        for i in range(number * part, end, _LANES):
            j = min(i + _LANES, end)
            b = base[i:j]
            for k in range(len(targets)):
                t, lane = targets[k][i:j], lanes[k]
                if squared:
                    for at in range(j - i):
                        delta = np.float64(_widened(t[at])) - np.float64(_widened(b[at]))
                        lane[at] += delta * delta
                else:
                    for at in range(j - i):
                        lane[at] += abs(np.float64(_widened(t[at])) - np.float64(_widened(b[at])))
        for k in range(len(targets)):
            whole = 0.0
            for at in range(_LANES):
                whole += lanes[k, at]
            sums[k, number] = whole


@_compiled
def _dot_products(  # pragma: no cover (runs as machine code)
    tensors: Any, sums: Any, part: int, deltas: bool
) -> None:
    first = 1 if deltas else 0
    count = len(tensors) - first
    lanes = np.empty((sums.shape[0], _LANES), np.float64)
    wide = np.empty((count, _LANES), np.float64)
    for number in range(sums.shape[1]):
        lanes[:] = 0.0
        end = min((number + 1) * part, tensors[0].shape[0])
        for i in range(number * part, end, _LANES):
            j = min(i + _LANES, end)
            base = tensors[0][i:j]
            for k in range(count):
                t, row = tensors[k + first][i:j], wide[k]
                if deltas:
                    for at in range(j - i):
                        row[at] = np.float64(_widened(t[at])) - np.float64(_widened(base[at]))
                else:
                    for at in range(j - i):
                        row[at] = np.float64(_widened(t[at]))
            pair = 0
            for k in range(count):
                for other in range(k, count):
                    a, b, lane = wide[k], wide[other], lanes[pair]
                    for at in range(j - i):
                        lane[at] += a[at] * b[at]
                    pair += 1
        for pair in range(sums.shape[0]):
            whole = 0.0
            for at in range(_LANES):
                whole += lanes[pair, at]
            sums[pair, number] = whole


@_compiled
def _combine(tensors: Any, factors: Any, out: Any) -> None:  # pragma: no cover (machine code)
    chunk = np.empty(_CHUNK, np.float32)
    for i in range(0, out.shape[0], _CHUNK):
        n = min(_CHUNK, out.shape[0] - i)
        chunk[:] = 0.0
        for k in range(len(tensors)):
            tensor, factor = tensors[k][i : i + n], factors[k]
            for at in range(n):
                chunk[at] += _widened(tensor[at]) * factor
        merged = out[i : i + n]
        for at in range(n):
            bits = np.float32(chunk[at]).view(np.uint32)
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
            merged[at] = np.uint16(np.uint32(rounded >> np.uint32(16)))

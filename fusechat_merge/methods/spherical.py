"""mergekit's interpolations on a sphere, and its model stock: norms and dot products first.

What each of them returns is a sum of its inputs, whose coefficients depend on the inputs' norms and
dot products only. So one pass gives the Gram matrix in float64, the coefficients follow from it,
and a second pass writes the sum. The definitions, with their thresholds, are mergekit 0.1.5's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusechat_merge.methods import varm
from fusechat_merge.methods.blocks import HALF, Block, Passes, add_up, half_cell_sums, scratch

Vector = NDArray[np.float64]
Gram = NDArray[np.float64]
"""Dot products of all pairs of inputs, or of their differences from the base."""


def slerp(gram: Gram, parameters: Mapping[str, Any]) -> Vector:
    """Between two inputs, at `t`; linear where they are almost parallel or opposite."""
    t = float(parameters["t"])
    norms = [norm if norm > 1e-8 else 1.0 for norm in np.sqrt(np.diag(gram))]
    cosine = min(max(gram[0, 1] / norms[0] / norms[1], -1.0), 1.0)
    return _arc(t, cosine, linear=abs(cosine) > 0.9995)


def nuslerp(gram: Gram, parameters: Mapping[str, Any]) -> Vector:
    """Between two inputs by their weights, of any norm."""
    weights = parameters["weight"]
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    norms = np.maximum(np.sqrt(np.diag(gram)), 1e-7)
    cosine = min(max(gram[0, 1] / norms[0] / norms[1], -1.0), 1.0)
    return _arc(t, cosine, linear=1 - cosine**2 <= 1e-16)


def _arc(t: float, cosine: float, linear: bool) -> Vector:
    if linear:
        return np.array([1 - t, t])
    angle = math.acos(cosine)
    return np.sin(np.array([1 - t, t]) * angle) / math.sin(angle)


def multislerp(gram: Gram, parameters: Mapping[str, Any]) -> Vector:
    """The weighted mean's direction, with the inputs' mean norm.

    Raises:
        ValueError: the weighted mean has no direction.
    """
    weights, eps = np.array(parameters["weight"], float), float(parameters["eps"])
    if len(weights) == 1:
        return np.ones(1)
    if parameters["normalize_weights"]:
        weights = weights / weights.sum()
    norms = np.sqrt(np.diag(gram))
    mean = weights / (norms + eps)
    length = _norm(mean, gram)
    if length < eps:
        if len(weights) == 2:
            return weights
        raise ValueError("the weighted sum of the inputs is zero: use other weights")
    # In the tangent space at the mean the weighted sum is zero, but for rounding.
    return mean / length * math.cos(eps) * float(weights @ norms)


def karcher(gram: Gram, parameters: Mapping[str, Any]) -> Vector:
    """The Karcher mean of the inputs' directions, with their mean norm."""
    count, tol = len(gram), float(parameters["tol"])
    if count == 1:
        return np.ones(1)
    norms = np.sqrt(np.diag(gram))
    valid = norms > tol
    if not valid.any():
        return np.zeros(count)
    # Vectors are given by their coefficients of the inputs.
    units = np.where(valid, 1 / np.where(valid, norms, 1), 0.0)
    share = 1 / int(valid.sum())
    mean = share * units
    length = _norm(mean, gram)
    first = np.eye(count)[int(np.argmax(valid))] * units
    mean = first if length < tol else mean / length
    for _ in range(int(parameters["max_iter"])):
        tangent = np.zeros(count)
        for index in np.flatnonzero(valid):
            unit = np.eye(count)[index] * units
            dot = min(max(float(mean @ gram @ unit), -1.0), 1.0)
            angle = math.acos(dot)
            # From an opposite input no direction leads to it; rounding would choose one.
            if angle >= tol and math.sin(angle) > 1e-12:
                tangent += share * (angle / math.sin(angle)) * (unit - dot * mean)
        length = _norm(tangent, gram)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        if (length := _norm(mean, gram)) > tol:
            mean = mean / length
    return float(norms.sum()) / count * mean


def model_stock(gram: Gram, parameters: Mapping[str, Any]) -> Vector:
    """The part of the targets' mean that their angles to each other suggest."""
    count, norms = len(gram), np.sqrt(np.diag(gram))
    cosines = [
        min(max(gram[i, j] / max(norms[i] * norms[j], 1e-6), -1.0), 1.0)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    return np.full(count, t / count)


def _norm(vector: Vector, gram: Gram) -> float:
    return math.sqrt(max(float(vector @ gram @ vector), 0.0))


COEFFICIENTS: Mapping[str, Callable[[Gram, Mapping[str, Any]], Vector]] = {
    "karcher": karcher,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "nuslerp": nuslerp,
    "slerp": slerp,
}
"""What each method gives its inputs (or their differences from the base) for coefficients."""
FROM_BASE = ("model_stock", "multislerp", "nuslerp")
"""Methods whose vectors are differences from the base, where there is one."""


def merge(passes: Passes, method: str, parameters: Mapping[str, Any], based: bool) -> None:
    """Merge one tensor.

    Args:
        passes: over the inputs; the first is the base where there is one.
        method: a key of `COEFFICIENTS`.
        parameters: mergekit's; `weight` is a list, one an input that isn't the base.
        based: whether the first input is the base.

    Raises:
        NonFiniteError: an input holds NaN or Inf.
        ValueError: the method isn't defined for these inputs.
    """
    deltas = based and method in FROM_BASE
    coefficients = COEFFICIENTS[method](gram_matrix(passes, deltas), parameters).tolist()
    if deltas:
        # base + Σ c · (input − base); one target and nothing to interpolate gives it itself.
        coefficients = [1 - math.fsum(coefficients), *coefficients]
    if any(coefficients):
        varm.write_sum(passes, coefficients)
    else:
        passes.write(lambda block, out: out.zero_())


def gram_matrix(passes: Passes, deltas: bool) -> Gram:
    """Dot products of the inputs, or of their differences from the first, float64 [n, n]."""
    count = passes.count + (not deltas)
    pairs = list(combinations_with_replacement(range(count), 2))

    def sums(block: Block) -> list[list[float]]:
        found = _products(block, deltas, pairs)
        if not math.isfinite(sum(map(sum, found))):
            block.raise_if_not_finite()
            raise OverflowError("float64 can't hold the inputs' dot products")
        return found

    gram = np.zeros((count, count))
    for (i, j), value in zip(pairs, add_up(passes.map(sums), len(pairs)), strict=True):
        gram[i, j] = gram[j, i] = value
    return gram


def _products(block: Block, deltas: bool, pairs: Sequence[tuple[int, int]]) -> list[list[float]]:
    """Dot products of every pair, one a half cell."""
    inputs = (block.base, *block.targets)
    loops = varm.loops_for(*inputs)
    if loops is not None:
        return loops.dot_products(inputs, HALF, deltas)
    sums: list[list[float]] = [[] for _ in pairs]
    for strip in block.strips():
        vectors = [
            scratch.take(f"vector {number}", tensor, torch.float64).copy_(tensor)
            for number, tensor in enumerate((strip.base, *strip.targets))
        ]
        if deltas:
            base, *vectors = vectors
            for vector in vectors:
                vector.sub_(base)
        product = scratch.take("product", strip.base, torch.float64)
        products = (torch.mul(vectors[i], vectors[j], out=product) for i, j in pairs)
        for column, values in zip(sums, half_cell_sums(products), strict=True):
            column += values
    return sums

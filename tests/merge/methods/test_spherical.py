"""mergekit's interpolations, against its definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_tensors

from fusechat_merge.methods import spherical
from fusechat_merge.methods.blocks import InMemory, NonFiniteError

Arrays = list[np.ndarray]


def arc(a: np.ndarray, b: np.ndarray, t: float, threshold: float) -> np.ndarray:
    cosine = np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(x: Arrays, t: float) -> np.ndarray:
    return arc(*x, t, 0.9995)


def nuslerp(x: Arrays, weight: list[float], base: bool) -> np.ndarray:
    origin = x[0] if base else 0.0
    a, b = (v - origin for v in x[base:])
    return origin + arc(a, b, weight[1] / sum(weight), 1 - 1e-15)


def multislerp(x: Arrays, weight: list[float], base: bool) -> np.ndarray:
    origin = x[0] if base else 0.0
    vectors = [v - origin for v in x[base:]]
    w = np.array(weight) / sum(weight)
    norms = np.array([np.linalg.norm(v) for v in vectors])
    mean = sum(w * v / n for w, v, n in zip(w, vectors, norms, strict=True))
    return origin + mean / np.linalg.norm(mean) * (w @ norms)


def karcher(x: Arrays) -> np.ndarray:
    norms = [np.linalg.norm(v) for v in x]
    units = [v / n for v, n in zip(x, norms, strict=True)]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(10):
        tangent = 0.0
        for unit in units:
            angle = np.arccos(np.clip(mean @ unit, -1, 1))
            if angle > 1e-5:
                tangent += angle / np.sin(angle) * (unit - np.cos(angle) * mean) / len(x)
        length = np.linalg.norm(tangent)
        if length < 1e-5:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
        mean /= np.linalg.norm(mean)
    return np.mean(norms) * mean


def model_stock(x: Arrays) -> np.ndarray:
    base, *targets = x
    deltas = [v - base for v in targets]
    cosines = [
        a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6)
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cosine, count = np.mean(cosines), len(targets)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * np.mean(targets, 0) + (1 - t) * base


CASES: dict[str, tuple[str, int, bool, dict[str, Any], Callable[[Arrays], np.ndarray]]] = {
    "slerp": ("slerp", 2, True, {"t": 0.3}, lambda x: slerp(x, 0.3)),
    "slerp beyond": ("slerp", 2, True, {"t": 1.5}, lambda x: slerp(x, 1.5)),
    "nuslerp": ("nuslerp", 2, False, {"weight": [1.0, 3.0]}, lambda x: nuslerp(x, [1, 3], False)),
    "nuslerp, base": ("nuslerp", 3, True, {"weight": [1.0, 3.0]}, lambda x: nuslerp(x, [1, 3], True)),
    "multislerp": (
        "multislerp", 3, False, {"weight": [1.0, 2.0, 3.0]},
        lambda x: multislerp(x, [1, 2, 3], False),
    ),
    "multislerp, base": (
        "multislerp", 4, True, {"weight": [1.0, 2.0, 3.0]},
        lambda x: multislerp(x, [1, 2, 3], True),
    ),
    "karcher": ("karcher", 3, False, {}, karcher),
    "model_stock": ("model_stock", 4, True, {}, model_stock),
}  # fmt: skip
DEFAULTS = {"multislerp": {"normalize_weights": True, "eps": 1e-8},
            "karcher": {"max_iter": 10, "tol": 1e-5}}  # fmt: skip


def merged(case: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    method, _, based, parameters, _ = CASES[case]
    passes = InMemory(inputs[0], inputs[1:])
    spherical.merge(passes, method, DEFAULTS.get(method, {}) | parameters, based)
    return passes.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("case", CASES)
def test_as_defined_and_nearer_than_mergekit(case: str, scale: float, dtype: torch.dtype) -> None:
    method, count, based, parameters, right = CASES[case]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_000, generator=generator)
    inputs = [base.to(dtype)] + [
        (base + scale * (1 + n) * torch.randn(70_000, generator=generator)).to(dtype)
        for n in range(count - 1)
    ]
    expected = right([tensor.double().numpy() for tensor in inputs])
    ours = merged(case, inputs)
    assert ours.dtype == dtype
    distance = np.abs(ours.double().numpy() - expected).max()
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 2**-23, torch.float64: 1e-9}[dtype]
    assert distance <= tolerance * np.abs(expected).max()
    theirs = merge_tensors(inputs, method, base_index=0 if based else None, parameters=parameters)
    assert distance <= 1.01 * np.abs(theirs.double().numpy() - expected).max() + 1e-13


@pytest.mark.parametrize("case", CASES)
def test_at_the_edges_as_mergekit(case: str) -> None:
    """Equal, opposite and zero inputs, in float64, where mergekit's own rounding doesn't count."""
    method, count, based, parameters, _ = CASES[case]
    one, zero = torch.linspace(-1, 1, 50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    first = [zero] if based and method != "slerp" else [one]
    opposite = -one
    for other in (one, opposite, zero, 1e-9 * one, one + 1e-9):
        inputs = [*first, *[one, other, one][-(count - 1) :]]
        try:
            theirs = merge_tensors(
                inputs, method, base_index=0 if based else None, parameters=parameters
            )
        except ValueError:
            with pytest.raises(ValueError, match="use other weights"):
                merged(case, inputs)
            continue
        if method == "karcher" and other is opposite:
            theirs = one  # there mergekit takes the direction that rounding gives
        assert torch.allclose(merged(case, inputs), theirs, rtol=1e-6, atol=1e-12), other


def test_nan_is_found() -> None:
    bad = torch.full((9,), torch.nan)
    with pytest.raises(NonFiniteError):
        merged("slerp", [torch.ones(9), bad])


def test_where_there_is_nothing_to_interpolate() -> None:
    one, two = np.ones((1, 1)), np.array([[1.0, -1.0], [-1.0, 1.0]])
    weights = {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-8}
    assert spherical.multislerp(one, weights | {"weight": [3.0]}).tolist() == [1.0]
    assert spherical.multislerp(two, weights).tolist() == [0.5, 0.5]
    assert spherical.karcher(one, DEFAULTS["karcher"]).tolist() == [1.0]
    assert not merged("karcher", [torch.zeros(9)] * 3).any()
    with pytest.raises(OverflowError, match="dot products"):
        merged("slerp", [torch.full((9,), 1e200, dtype=torch.float64)] * 2)

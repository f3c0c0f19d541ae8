"""SCE against float64 written here from Algorithm 1, its selection, and the authors' variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusechat_merge
from fusechat_merge.methods import sce as method
from fusechat_merge.methods.blocks import BLOCK, STRIP, InMemory
from tests.support.tensors import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SIZES,
    Segments,
    coarse,
    ends_of_bfloat16,
    models,
    numbers,
    same_bits,
    ulp,
)

VARIANTS = pytest.mark.parametrize("variant", ["paper", "fork"])
KINDS = {name: DTYPES[name] for name in ("bf16", "fp16", "fp32", "fp64", "mixed")}


def reference(
    base: Tensor, targets: Sequence[Tensor], tau: float = 1.0, variant: str = "paper"
) -> tuple[np.ndarray, np.ndarray]:
    """(merged in float64, η) by sorting: no radix, no blocks."""
    pivot = numbers(base).reshape(-1)
    deltas = np.stack([numbers(t).reshape(-1) - pivot for t in targets])
    chosen = np.ones(pivot.size, dtype=bool)
    if tau < 1:
        variance = deltas.var(axis=0)
        k = math.floor(tau * np.count_nonzero(variance))
        by_variance = np.lexsort((np.arange(pivot.size), -variance))  # ties: lower index first
        chosen[:] = False
        chosen[by_variance[:k]] = True
    selected = np.where(chosen, deltas, 0.0)
    squares = (selected**2).sum(axis=1)
    eta = squares / squares.sum() if squares.sum() else np.zeros(len(targets))
    if variant == "paper":
        agreed = np.sign(selected) * np.sign(selected.sum(axis=0)) > 0
        merged = pivot + (eta[:, None] * np.where(agreed, selected, 0.0)).sum(axis=0)
    else:
        if not eta.any():
            eta = np.full(len(targets), 1 / len(targets))
        sign = np.where(deltas.sum(axis=0) >= 0, 1.0, -1.0)
        agreed = np.sign(deltas) == sign
        divisor = (eta[:, None] * agreed).sum(axis=0)
        divisor[divisor == 0] = 1.0
        merged = pivot + (eta[:, None] * agreed * deltas).sum(axis=0) / divisor
    return merged.reshape(base.shape), eta


def assert_rounded(out: Tensor, expected: np.ndarray) -> None:
    """Rounded from float64 (torch does so by way of float32), but for float64's own error."""
    error = np.abs(numbers(out) - expected)
    own = 1e-14 if out.dtype in (F32, F64) else 2.0**-24
    assert (error <= ulp(expected, out.dtype) / 2 + own * np.abs(expected) + 1e-15).all(), (
        error.max()
    )


def merged(
    base: Tensor, targets: Sequence[Tensor], tau: float = 1.0, variant: str = "paper", rtol=1e-11
) -> Tensor:
    """What SCE makes of tensors, after a comparison with the reference."""
    passes = InMemory(base, targets)
    eta = method.merge(passes, tau, variant)
    if base.numel():
        expected, expected_eta = reference(base, targets, tau, variant)
        np.testing.assert_allclose(eta, expected_eta, rtol=rtol)
        assert_rounded(passes.output, expected)
    assert passes.output.shape == base.shape
    return passes.output


# -- against the reference


@VARIANTS
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtypes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [*SIZES, (), (3, 4, 5), (0,), (2, 0)])
def test_reference(shape, dtypes, tau, variant):
    out = merged(*models(shape, dtypes), tau, variant)
    assert out.dtype == reduce(torch.promote_types, dtypes)


@VARIANTS
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("size", [10, 1000, BLOCK + 1, 2 * BLOCK + 333])
def test_reference_with_ties(size, count, tau, variant):
    merged(*coarse(size, count), tau, variant, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 9, 31, 100, BLOCK + 13])
@pytest.mark.parametrize("tau", [0.25, 0.5])
def test_ties_go_to_the_lower_index(size, tau):
    # All variances are equal, and with three targets none of them is exact: the bits must still be
    # the same wherever an element lies.
    base = torch.zeros(size, dtype=F64)
    targets = [torch.full_like(base, value) for value in (0.1, 0.7, 0.3)]
    out = fusechat_merge.sce(base, targets, select_topk=tau)
    k = math.floor(tau * size)
    assert torch.count_nonzero(out[:k]) == k
    assert torch.count_nonzero(out[k:]) == 0


def neighbours() -> np.ndarray:
    """Variances, as the int64 of their bits: on, before and after the border of every digit."""
    digits = np.random.default_rng(0).integers(1, 0x7FEF, (6, 4))
    borders = [
        sum(int(d) << (48 - 16 * i) for i, d in enumerate(row[: 1 + n]))
        for row in digits
        for n in range(4)
    ]
    subnormal = [1, 2, 1 << 16, 1 << 32, 3 << 32, (1 << 48) - 1]
    return np.array([0, *subnormal, *(border + off for border in borders for off in (-1, 0, 1))])


@pytest.mark.parametrize("candidates", [0, 3, 1 << 17])
@pytest.mark.parametrize("size", [160, (STRIP + 1) * BLOCK + 17])
def test_selection_of_variances_with_any_bits(monkeypatch, size, candidates):
    # δ itself stands for the variance.
    monkeypatch.setattr(
        method, "_variance_keys", lambda deltas: deltas[0].view(torch.int64).clone()
    )
    monkeypatch.setattr(method, "CANDIDATES", candidates)
    few = [2 << 48, (2 << 48) + 5, (2 << 48) + 5]  # ties beside one other
    keys = np.concatenate([np.random.default_rng(1).choice(neighbours(), size - 3), few])
    target = torch.from_numpy(keys.view(np.float64))
    order = np.lexsort((np.arange(size), -keys))
    nonzero = np.count_nonzero(keys)
    for k in range(nonzero) if size == 160 else (nonzero // 50, nonzero // 2):
        for passes in (
            InMemory(torch.zeros_like(target), [target]),
            Segments(torch.zeros_like(target), [target], 2),
        ):
            selection = method.select(passes, (k + 0.5) / nonzero)
            masks = passes.map(
                lambda block: torch.cat(
                    [selection.mask(strip, method._deltas(strip)) for strip in block.strips()]
                )
            )
            assert np.array_equal(np.flatnonzero(torch.cat(list(masks))), np.sort(order[:k]))


def test_algorithm_1_by_hand():
    base = torch.zeros(4)
    first = torch.tensor([4.0, 1.0, -1.0, 0.0])
    second = torch.tensor([0.0, 1.0, 3.0, 1.0])
    # Variances 4, 0, 4, 0.25: of three that aren't 0, ⌊0.7 · 3⌋ = 2 are selected.
    # δ̂ = (4, 0, −1, 0) and (0, 0, 3, 0); η = 17/26, 9/26; Σδ̂ = (4, 0, 2, 0), so −1 is erased.
    out = fusechat_merge.sce(base, [first, second], select_topk=0.7)
    assert out.tolist() == pytest.approx([4 * 17 / 26, 0.0, 3 * 9 / 26, 0.0])
    # The fork merges whole deltas where the sign agrees, divided by the η that agree.
    fork = fusechat_merge.sce(base, [first, second], select_topk=0.7, variant="fork")
    assert fork.tolist() == pytest.approx([4.0, 1.0, 3.0, 1.0])


def test_where_the_signs_cancel():
    base = torch.tensor([1.0, -0.0, 1.0])
    first = base + torch.tensor([0.5, 0.0, 1.0])
    second = base + torch.tensor([-0.5, 0.0, 0.0])
    paper = fusechat_merge.sce(base, [first, second])
    eta = 1.25 / 1.5
    assert paper.tolist() == pytest.approx([1.0, 0.0, 1.0 + eta])  # Σδ = 0 is erased
    assert math.copysign(1, paper[1]) == -1
    fork = fusechat_merge.sce(base, [first, second], variant="fork")
    assert fork.tolist() == pytest.approx([1.5, 0.0, 2.0])  # 0 counts as +
    assert math.copysign(1, fork[1]) == -1


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-66, 2.0**20])
@VARIANTS
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_scaling_every_delta_scales_the_update(tau, variant, scale):
    _, targets = models(BLOCK + 100)
    base = torch.zeros_like(targets[0])
    plain, scaled = InMemory(base, targets), InMemory(base, [t * scale for t in targets])
    eta = method.merge(plain, tau, variant)
    assert method.merge(scaled, tau, variant) == pytest.approx(eta, rel=1e-14)
    torch.testing.assert_close(scaled.output / scale, plain.output, rtol=1e-6, atol=0)


# -- the edges of Select


@VARIANTS
def test_tau_one_selects_elements_without_variance_too(variant):
    base = torch.tensor([1.0, 2.0])
    same = torch.tensor([1.5, 2.0])
    out = fusechat_merge.sce(base, [same, same.clone()], variant=variant)
    # Variance is 0 everywhere; η is 1/2 each.
    assert out.tolist() == [1.5, 2.0]
    nearly = fusechat_merge.sce(base, [same, same.clone()], select_topk=0.99)
    assert same_bits(nearly, base)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.999])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_one_target_and_tau_below_one_give_the_pivot(dtype, tau):
    base, targets = models(200, (dtype, dtype))
    base[:3] = -0.0
    assert same_bits(fusechat_merge.sce(base, targets, select_topk=tau), base)


@VARIANTS
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_one_target_and_tau_one_give_the_target(dtype, variant):
    base, (target,) = models(200, (dtype, dtype))
    assert torch.equal(fusechat_merge.sce(base, [target], variant=variant), target)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_ends_of_bf16s_range(tau):
    base, targets = ends_of_bfloat16()
    out = fusechat_merge.sce(base, targets, select_topk=tau)
    assert torch.isfinite(out).all()
    assert_rounded(out, reference(base, targets, tau)[0])


# -- property


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_small_tensor(data):
    # With 1, 2 or 4 targets and few bits every variance is exact, so ties are ties.
    count = data.draw(st.sampled_from([1, 2, 4]))
    size = data.draw(st.integers(1, 8))
    column = st.lists(st.integers(-6, 6), min_size=size, max_size=size)
    base, *targets = (torch.tensor(data.draw(column)).to(BF16) for _ in range(count + 1))
    tau = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
    for variant in ("paper", "fork"):
        merged(base, targets, tau, variant, rtol=1e-13)

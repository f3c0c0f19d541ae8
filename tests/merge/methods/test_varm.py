"""VaRM against float64 written here from the paper's equation, and the properties it must have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusechat_merge
from fusechat_merge.methods import varm as method
from fusechat_merge.methods.blocks import BLOCK, STRIP, Block
from tests.support.tensors import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SIZES,
    ends_of_bfloat16,
    models,
    numbers,
    same_bits,
    ulp,
)

GRANULARITIES = pytest.mark.parametrize("granularity", ["matrix", "element"])
STATISTICS = pytest.mark.parametrize("statistic", ["square", "absolute"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
KINDS = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def deltas_of(base: Tensor, targets: Sequence[Tensor]) -> list[np.ndarray]:
    return [numbers(t) - numbers(base) for t in targets]


def reference_weights(
    deltas: Sequence[np.ndarray], prior: Sequence[float], statistic: str = "square"
) -> np.ndarray:
    """W_j = w_j E[δ_j²] / Σ w E[δ²]; zeros where nothing moved."""
    s = [np.mean(d * d) if statistic == "square" else np.mean(np.abs(d)) for d in deltas]
    w = np.array(prior) * np.array(s)
    return w / w.sum() if w.sum() else w


def reference(
    base: Tensor,
    targets: Sequence[Tensor],
    prior: Sequence[float] | None = None,
    statistic: str = "square",
    lam: float = 1.0,
    granularity: str = "matrix",
) -> np.ndarray:
    prior = prior or [1.0] * len(targets)
    deltas = np.stack(deltas_of(base, targets))
    if granularity == "element":
        largest = np.abs(deltas).max(axis=0)  # so that no square underflows
        unit = np.abs(deltas) / np.where(largest == 0, 1.0, largest)
        shares = np.einsum("k,k...->k...", prior, unit**2 if statistic == "square" else unit)
        whole = shares.sum(axis=0)
        update = (shares * deltas).sum(axis=0) / np.where(whole == 0, 1.0, whole)
    else:
        shares = reference_weights(deltas, prior, statistic)
        update = sum(w * d for w, d in zip(shares, deltas, strict=True))
    return numbers(base) + lam * update


def assert_rounded_once(
    out: Tensor, expected: np.ndarray, inputs: Sequence[Tensor], lam: float = 1.0
) -> None:
    """``out`` is ``expected`` rounded to its dtype, allowing for the arithmetic's own error."""
    arithmetic = 2.0**-52 if {t.dtype for t in inputs} & {F32, F64} else 2.0**-23
    largest = np.max([np.abs(numbers(t)) for t in inputs], axis=0) * (1 + 2 * abs(lam))
    allowed = ulp(expected, out.dtype) / 2 + 4 * arithmetic * largest
    error = np.abs(numbers(out) - expected)
    worst = np.argmax(error - allowed) if error.size else 0
    assert (error <= allowed).all(), (worst, error.flat[worst], allowed.flat[worst])


def merged(base: Tensor, targets: Sequence[Tensor], lam: float = 1.0, **options: Any) -> Tensor:
    """What varm makes of tensors, after a comparison with the reference."""
    out = fusechat_merge.varm(base, targets, lambda_=lam, **options)
    assert out.shape == base.shape
    if base.numel():
        expected = reference(base, targets, options.pop("weight", None), lam=lam, **options)
        assert_rounded_once(out, expected, [base, *targets], lam)
    return out


# -- against the reference


@GRANULARITIES
@STATISTICS
@KINDS
@pytest.mark.parametrize("shape", [*SIZES, (), (2, 3, 4), (0,), (4, 0)])
def test_reference(shape, dtypes, statistic, granularity):
    out = merged(*models(shape, dtypes), granularity=granularity, statistic=statistic)
    assert out.is_contiguous()
    assert out.dtype == reduce(torch.promote_types, dtypes)


@GRANULARITIES
@pytest.mark.parametrize("lam", [0.0, -0.5, 0.3, 1.7])
@pytest.mark.parametrize("prior", [(1.0, 1.0, 1.0), (0.0, 2.0, 0.5), (0.0, 3.0, 0.0)])
@KINDS
def test_reference_of_weight_and_lambda(dtypes, prior, lam, granularity):
    merged(*models((31, 17), dtypes), lam, granularity=granularity, weight=prior)


@STATISTICS
@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_reference_weights(size, dtypes, statistic):
    base, targets = models(size, dtypes)
    prior = [0.5, 1.0, 4.0]
    weights = fusechat_merge.varm_weights(base, targets, statistic=statistic, weight=prior)
    assert weights.dtype == F64
    assert weights.shape == (3,)
    expected = reference_weights(deltas_of(base, targets), prior, statistic)
    # δ of 16-bit inputs is rounded to float32 once.
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-7)
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-15)


def test_the_papers_example_by_hand():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    first = base + torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # Σδ² = 2, Σ|δ| = 2
    second = base + torch.tensor([[0.0, 2.0], [0.0, 0.0]])  # Σδ² = 4, Σ|δ| = 2
    square = fusechat_merge.varm_weights(base, [first, second])
    assert square.tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-15)
    absolute = fusechat_merge.varm_weights(base, [first, second], statistic="absolute")
    assert absolute.tolist() == [0.5, 0.5]
    matrix = fusechat_merge.varm(base, [first, second])
    torch.testing.assert_close(matrix, torch.tensor([[4 / 3, 10 / 3], [3.0, 11 / 3]]))
    element = fusechat_merge.varm(base, [first, second], granularity="element")
    assert element.tolist() == [[2.0, 4.0], [3.0, 3.0]]


def test_strips_cover_a_block_and_its_output():
    n = (STRIP + 1) * BLOCK + 5
    block = Block(3 * BLOCK, torch.arange(n), ())
    out = torch.arange(n)
    strips = list(block.strips())
    assert [strip.base.numel() for strip in strips] == [STRIP * BLOCK, BLOCK + 5]
    assert all(torch.equal(block.part(out, strip), strip.base) for strip in strips)


def test_total_knows_no_order():
    rows = [[1e16, 1.0], [1.0, 1e-9], [-1e16, 3.0], [2.0**-60, 0.0]]
    for order in itertools.permutations(rows):
        assert method.total(order, 2) == [1.0 + 2.0**-60, 4.000000001]
    assert method.total([], 2) == [0.0, 0.0]


def test_no_weight_where_no_target_with_a_prior_moved():
    assert method.weights([2.0, 0.0], [0.0, 1.0]) == [0.0, 0.0]
    assert method.weights([2.0, 1.0], [0.0, 0.0]) == [0.0, 0.0]


# -- copies


@GRANULARITIES
@EVERY_DTYPE
def test_one_target_is_copied(dtype, granularity):
    base, (target,) = models(BLOCK + 3, (dtype, dtype))
    target[::5] = -0.0
    assert same_bits(fusechat_merge.varm(base, [target], granularity=granularity), target)


def test_one_target_among_weightless_ones_is_copied():
    base, targets = models(100)
    targets[1][3] = -0.0
    out = fusechat_merge.varm(base, targets, weight=[0, 2.5, 0])
    assert same_bits(out, targets[1])
    still = [base.clone(), targets[1], base.clone()]
    assert same_bits(fusechat_merge.varm(base, still), targets[1])


@GRANULARITIES
@EVERY_DTYPE
def test_lambda_zero_is_the_base(dtype, granularity):
    base, targets = models((STRIP + 1) * BLOCK, (dtype,) * 3)  # more than one strip
    base[:9] = -0.0
    out = fusechat_merge.varm(base, targets, granularity=granularity, lambda_=0.0)
    assert same_bits(out, base)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_unmoved_elements_of_a_moved_unit_keep_their_value(dtype):
    base, targets = models(1000, (dtype,) * 4)
    for target in targets:
        target[::3] = base[::3]
    for granularity in ("matrix", "element"):
        out = fusechat_merge.varm(base, targets, granularity=granularity)
        assert torch.equal(out[::3], base[::3])


def test_an_unmoved_element_keeps_the_bases_bits_per_element():
    base = torch.tensor([-0.0, -0.0, 2.0])
    targets = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, 1.0, 2.0])]
    out = fusechat_merge.varm(base, targets, granularity="element")
    assert same_bits(out, torch.tensor([-0.0, 1.0, 2.0]))


# -- statistics have no threshold


@STATISTICS
@pytest.mark.parametrize("scale", [1e-6, 1e-20, 1e6])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_scaling_every_delta_leaves_the_weights(dtype, scale, statistic):
    _, targets = models(3 * BLOCK + 5, (dtype,) * 4)
    # A base of 0 holds any delta exactly; powers of two keep it exact in every dtype.
    base = torch.zeros_like(targets[0])
    factor = 2.0 ** round(math.log2(scale))
    scaled = [t * factor for t in targets]
    weights = fusechat_merge.varm_weights(base, targets, statistic=statistic)
    assert fusechat_merge.varm_weights(base, scaled, statistic=statistic).tolist() == (
        pytest.approx(weights.tolist(), rel=1e-14)
    )


@GRANULARITIES
@pytest.mark.parametrize("count", [2, 3, 7])
@EVERY_DTYPE
def test_identical_targets_give_equal_weights_and_the_target(dtype, count, granularity):
    base, (target,) = models(2 * BLOCK + 1, (dtype, dtype))
    targets = [target.clone() for _ in range(count)]
    assert set(fusechat_merge.varm_weights(base, targets).tolist()) == {1 / count}
    out = fusechat_merge.varm(base, targets, granularity=granularity)
    error = np.abs(numbers(out) - numbers(target))
    # float64 has no wider arithmetic: each of the sum's terms is rounded too.
    assert (error <= ulp(numbers(target), dtype) * (2 if dtype == F64 else 0.5)).all()


# -- extremes


@STATISTICS
def test_bf16_at_the_ends_of_its_range(statistic):
    base, targets = ends_of_bfloat16()
    weights = fusechat_merge.varm_weights(base, targets, statistic=statistic)
    expected = reference_weights(deltas_of(base, targets), [1, 1], statistic)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    for granularity in ("matrix", "element"):
        out = merged(base, targets, granularity=granularity, statistic=statistic)
        assert torch.isfinite(out).all()


@GRANULARITIES
@pytest.mark.parametrize(
    ("dtype", "step"), [(F32, 1.4e-45), (BF16, 9.2e-41), (F16, 6e-8), (F64, 1e-150)]
)
def test_subnormals_count(dtype, step, granularity):
    base = torch.tensor([0.0, 3.0, -5.0, 1.0], dtype=F64).mul(step).to(dtype)
    targets = [
        torch.tensor([1.0, 3.0, -5.0, 1.0], dtype=F64).mul(step).to(dtype),
        torch.tensor([0.0, 6.0, -5.0, 1.0], dtype=F64).mul(step).to(dtype),
    ]
    assert fusechat_merge.varm_weights(base, targets).tolist() == pytest.approx([0.1, 0.9])
    merged(base, targets, granularity=granularity)


def test_tiny_and_huge_priors():
    base, targets = models(50)
    even = fusechat_merge.varm_weights(base, targets)
    for scale in (1e-300, 1e300):
        found = fusechat_merge.varm_weights(base, targets, weight=[scale] * 3)
        assert found.tolist() == pytest.approx(even.tolist())


def test_deltas_beyond_float64_are_refused():
    base, target = torch.tensor([-1e200], dtype=F64), torch.tensor([1e200], dtype=F64)
    with pytest.raises(OverflowError) as caught:
        fusechat_merge.varm(base, [target])
    assert str(caught.value) == "a target differs from the base by more than float64 can square"


# -- property


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_small_tensor(data):
    count, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    dtype = st.sampled_from([BF16, F16, F32, F64])
    dtypes = data.draw(st.lists(dtype, min_size=count + 1, max_size=count + 1))
    # Few distinct values, so that ties and unmoved elements come up.
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0]) | st.floats(
        -8e3, 8e3, width=16, allow_subnormal=True
    )
    columns = [data.draw(st.lists(value, min_size=size, max_size=size)) for _ in dtypes]
    base, *targets = (
        torch.tensor(c, dtype=F64).to(d) for c, d in zip(columns, dtypes, strict=True)
    )
    prior = data.draw(
        st.lists(st.just(0.0) | st.floats(0.01, 8), min_size=count, max_size=count).filter(any)
    )
    lam = data.draw(st.floats(-3, 3))
    statistic = data.draw(st.sampled_from(["square", "absolute"]))
    for granularity in ("matrix", "element"):
        merged(base, targets, lam, granularity=granularity, statistic=statistic, weight=prior)


def test_every_statistic_is_computed_as_itself():
    assert set(method._SQUARED) == set(method.STATISTICS)

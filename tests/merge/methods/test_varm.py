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
from fusechat_merge.methods.blocks import BLOCK, STRIP, Block, InMemory, NonFiniteError
from tests.support.tensors import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SIZES,
    Segments,
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
@pytest.mark.parametrize("size", SIZES)
def test_reference(size, dtypes, statistic, granularity):
    out = merged(*models(size, dtypes), granularity=granularity, statistic=statistic)
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


@GRANULARITIES
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4), (0,), (4, 0)])
def test_shapes(shape, granularity):
    assert merged(*models(shape), granularity=granularity).is_contiguous()


@GRANULARITIES
def test_strides_do_not_count(granularity):
    base, targets = models((40, 50))
    expected = fusechat_merge.varm(base, targets, granularity=granularity)
    wide = torch.zeros(40, 100)
    wide[:, ::2] = targets[0]
    strided = [wide[:, ::2], targets[1].t().contiguous().t(), targets[2]]
    out = fusechat_merge.varm(base.t().contiguous().t(), strided, granularity=granularity)
    assert same_bits(out, expected)


def test_inputs_are_left_alone():
    base, targets = models((40, 50))
    kept = [t.clone() for t in (base, *targets)]
    base.requires_grad_()
    for granularity in ("matrix", "element"):
        fusechat_merge.varm(base, targets, granularity=granularity)
    assert all(same_bits(t.detach(), k) for t, k in zip((base, *targets), kept, strict=True))


# -- the same bits, whatever computes them


@KINDS
def test_threads_and_segments_leave_the_bits(set_threads, dtypes):
    base, targets = models(5 * BLOCK + 4099, dtypes)
    found = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        passes = [InMemory(base, targets), *(Segments(base, targets, cells) for cells in (1, 2, 4))]
        for one in passes:
            sums = method.statistics(one, "square")
            method.write(one, method.weights(sums, [1.0, 2.0, 1.0]), 0.9)
            written = one.output.clone()
            method.write_elements(one, [1.0, 2.0, 1.0], "absolute", 0.9)
            found.append((sums, written, one.output.clone()))
    first = found[0]
    for other in found[1:]:
        assert other[0] == first[0]
        assert same_bits(other[1], first[1])
        assert same_bits(other[2], first[2])


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


NEGATIVE_ZEROS = torch.tensor([-0.0, 0.0, -0.0, 1.0, -1.5])


@GRANULARITIES
@pytest.mark.parametrize("lam", [1.0, 1.7, 0.0, -2.0])
@EVERY_DTYPE
def test_what_no_target_moved_is_the_bases(dtype, lam, granularity):
    base = NEGATIVE_ZEROS.to(dtype)
    targets = [base.abs() * base.sign(), base.clone()]  # 0.0 for −0.0: equal, so not moved
    out = fusechat_merge.varm(base, targets, granularity=granularity, lambda_=lam)
    assert same_bits(out, base)


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


def test_realistic_fine_tuning_deltas_are_weighed():
    base, _ = models(100_000, (F32, F32))
    g = torch.Generator().manual_seed(3)
    # std 2e-4 and 6e-4: E[δ²] of 4e-8 and 3.6e-7 is below the 1e-6 of mergekit's sce.
    targets = [base + s * torch.randn(base.shape, generator=g) for s in (2e-4, 6e-4)]
    assert fusechat_merge.varm_weights(base, targets).tolist() == pytest.approx(
        [0.1, 0.9], abs=2e-3
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
    top = torch.finfo(BF16).max
    base = torch.tensor([-top, top, 1.0], dtype=BF16)
    targets = [
        torch.tensor([top, top, 1.0], dtype=BF16),  # δ = 2 · 3.39e38 is beyond float32
        torch.tensor([-top, -top / 2, 2.0], dtype=BF16),
    ]
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


# -- NaN and Inf


@pytest.mark.parametrize("call", ["weights", "matrix", "element"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 8])
@pytest.mark.parametrize("where", [None, 0, 2])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_nan_and_inf_are_named(dtype, where, at, value, call):
    base, targets = models(2 * BLOCK + 9, (dtype,) * 4)
    (base if where is None else targets[where])[at] = value
    with pytest.raises(NonFiniteError) as caught:
        if call == "weights":
            fusechat_merge.varm_weights(base, targets)
        else:
            # A weight of 0 doesn't excuse a broken checkpoint.
            fusechat_merge.varm(base, targets, granularity=call, weight=[1, 1, 0])
    assert caught.value.target == where


def test_deltas_beyond_float64_are_refused():
    base, target = torch.tensor([-1e200], dtype=F64), torch.tensor([1e200], dtype=F64)
    with pytest.raises(OverflowError) as caught:
        fusechat_merge.varm(base, [target])
    assert str(caught.value) == "a target differs from the base by more than float64 can square"


def test_the_same_infinity_everywhere_is_no_agreement():
    base, targets = models(10)
    for tensor in (base, *targets):
        tensor[4] = math.inf
    for granularity in ("matrix", "element"):
        with pytest.raises(NonFiniteError, match="base holds NaN or Inf"):
            fusechat_merge.varm(base, targets, granularity=granularity)


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"granularity": "tensor"},
            "unknown granularity 'tensor': use one of matrix, module, layer, model, element",
        ),
        ({"statistic": "cube"}, "unknown statistic 'cube': use one of square, absolute"),
        ({"weight": [1.0]}, "1 weights for 2 targets"),
        ({"weight": [1.0, -1.0]}, "weight must be finite and at least 0, got [1.0, -1.0]"),
        ({"weight": [1.0, math.inf]}, "weight must be finite and at least 0, got [1.0, inf]"),
        ({"weight": [0.0, 0.0]}, "every target's weight is 0: give at least one a weight above 0"),
    ],
)
def test_refused(options, message):
    base, targets = models(3, (F32,) * 3)
    with pytest.raises(ValueError) as caught:
        fusechat_merge.varm(base, targets, **options)
    assert str(caught.value) == message


def test_refused_tensors():
    base, targets = models((2, 3), (F32,) * 3)
    for tensors, message in [
        ((base, []), "varm needs at least one target"),
        ((base, [targets[0], targets[1][:1]]), "target 1 has shape (1, 3), the base (2, 3)"),
        (
            (base.long(), [t.long() for t in targets]),
            "the base is int64: only floating-point tensors can be merged",
        ),
    ]:
        for call in (fusechat_merge.varm, fusechat_merge.varm_weights):
            with pytest.raises(ValueError) as caught:
                call(*tensors)
            assert str(caught.value) == message


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

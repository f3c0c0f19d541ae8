"""What VaRM and SCE have in common: copies, bits that nothing changes, broken values, refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fusechat_merge import sce, varm, varm_weights
from fusechat_merge.methods import sce as sce_method
from fusechat_merge.methods import varm as varm_method
from fusechat_merge.methods.blocks import BLOCK, InMemory, NonFiniteError
from tests.support.tensors import BF16, DTYPES, F16, F32, F64, Segments, coarse, models, same_bits

VARM = {
    f"varm {granularity} {lam}": partial(varm, granularity=granularity, lambda_=lam)
    for granularity in ("matrix", "element")
    for lam in (1.0, 1.7, 0.0, -2.0)
}
SCE = {
    f"{variant} {tau}": partial(sce, variant=variant, select_topk=tau)
    for variant in ("paper", "fork")
    for tau in (0.0, 0.4, 1.0)
}
CALLS = pytest.mark.parametrize("call", (VARM | SCE).values(), ids=VARM | SCE)


@CALLS
def test_strides_do_not_count_and_inputs_are_left_alone(call):
    base, targets = models((40, 50))
    expected = call(base, targets)
    wide = torch.zeros(40, 100)
    wide[:, ::2] = targets[0]
    strided = [wide[:, ::2], targets[1].t().contiguous().t(), targets[2]]
    kept = [t.clone() for t in (base, *strided)]
    given = base.t().contiguous().t().requires_grad_()
    assert same_bits(call(given, strided), expected)
    assert all(t.detach().equal(k) for t, k in zip((given, *strided), kept, strict=True))


@CALLS
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_what_no_target_moved_is_the_bases(dtype, call):
    base = torch.tensor([-0.0, 0.0, -0.0, 1.0, -1.5], dtype=dtype)
    targets = [base.abs() * base.sign(), base.clone()]  # 0.0 for −0.0: equal, so not moved
    assert same_bits(call(base, targets), base)


def test_realistic_fine_tuning_deltas_are_weighed():
    g = torch.Generator().manual_seed(3)
    base = torch.randn(100_000, generator=g)
    # std 2e-4 and 6e-4: E[δ²] of 4e-8 and 3.6e-7 is below the 1e-6 of mergekit's sce.
    targets = [base + s * torch.randn(base.shape, generator=g) for s in (2e-4, 6e-4)]
    eta = sce_method.merge(InMemory(base, targets), 1.0, "paper")
    for weights in (varm_weights(base, targets).tolist(), eta):
        assert weights == pytest.approx([0.1, 0.9], abs=2e-3)


def varm_everything(passes):
    sums = varm_method.statistics(passes, "square")
    varm_method.write(passes, varm_method.weights(sums, [1.0, 2.0, 1.0]), 0.9)
    written = passes.output.clone()
    varm_method.write_elements(passes, [1.0, 2.0, 1.0], "absolute", 0.9)
    return sums, written, passes.output.clone()


def sce_everything(tau, variant, passes):
    return sce_method.merge(passes, tau, variant), passes.output.clone()


SIZE = 5 * BLOCK + 4099
MADE = {f"varm {kind}": (varm_everything, partial(models, SIZE, DTYPES[kind])) for kind in DTYPES}
MADE |= {
    f"{variant} {tau} {kind}": (partial(sce_everything, tau, variant), made)
    for variant in ("paper", "fork")
    for tau in (0.3, 1.0)
    for kind, made in (("fp32", partial(models, SIZE)), ("ties", partial(coarse, SIZE, 3)))
}


@pytest.mark.parametrize("kind", MADE)
def test_threads_and_segments_leave_the_bits(set_threads, kind):
    make, made = MADE[kind]
    base, targets = made()
    found = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        passes = [InMemory(base, targets), *(Segments(base, targets, n) for n in (1, 2, 3, 4))]
        found += [make(one) for one in passes]
    (first, *expected), *others = found
    for other, *tensors in others:
        assert other == first
        assert all(same_bits(a, b) for a, b in zip(tensors, expected, strict=True))


# -- NaN and Inf, refusals

# A weight of 0 doesn't excuse a broken checkpoint.
BREAKABLE = SCE | {
    "weights": varm_weights,
    "matrix": partial(varm, weight=[1, 1, 0]),
    "element": partial(varm, weight=[1, 1, 0], granularity="element"),
    "select": lambda base, targets: sce_method.select(InMemory(base, targets), 0.3),
}


@pytest.mark.parametrize("call", BREAKABLE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, BLOCK + 8])
@pytest.mark.parametrize("where", [None, 0, 2])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_nan_and_inf_are_named(dtype, where, at, value, call):
    base, targets = models(BLOCK + 9, (dtype,) * 4)
    (base if where is None else targets[where])[at] = value
    with pytest.raises(NonFiniteError) as caught:
        BREAKABLE[call](base, targets)
    assert caught.value.target == where


@pytest.mark.parametrize("call", BREAKABLE)
def test_the_same_infinity_everywhere_is_no_agreement(call):
    base, targets = models(10)
    for tensor in (base, *targets):
        tensor[4] = math.inf
    with pytest.raises(NonFiniteError, match="base holds NaN or Inf"):
        BREAKABLE[call](base, targets)


WEIGHT = "weight must be finite and at least 0, got [1.0, {}]"
SELECT_TOPK = "select_topk must be from 0 to 1, got {}"


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (varm, {"granularity": "tensor"},
         "unknown granularity 'tensor': use one of matrix, module, layer, model, element"),
        (varm, {"statistic": "cube"}, "unknown statistic 'cube': use one of square, absolute"),
        (varm, {"weight": [1.0]}, "1 weights for 2 targets"),
        (varm, {"weight": [1.0, -1.0]}, WEIGHT.format("-1.0")),
        (varm, {"weight": [1.0, math.inf]}, WEIGHT.format("inf")),
        (varm, {"weight": [0.0, 0.0]},
         "every target's weight is 0: give at least one a weight above 0"),
        (sce, {"variant": "frok"}, "unknown variant 'frok': use one of paper, fork"),
        (sce, {"select_topk": 1.5}, SELECT_TOPK.format(1.5)),
        (sce, {"select_topk": -0.1}, SELECT_TOPK.format(-0.1)),
        (sce, {"select_topk": math.nan}, SELECT_TOPK.format("nan")),
    ],
)  # fmt: skip
def test_refused(call, options, message):
    with pytest.raises(ValueError) as caught:
        call(*models(3, (F32,) * 3), **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("call", [varm, varm_weights, sce])
def test_refused_tensors(call):
    base, (first, second) = models((2, 3), (F32,) * 3)
    for tensors, message in [
        ((base, []), f"{call.__name__.partition('_')[0]} needs at least one target"),
        ((base, [first, second[:1]]), "target 1 has shape (1, 3), the base (2, 3)"),
        # One element would spread over the whole tensor.
        ((base, [first, second[0, 0]]), "target 1 has shape (), the base (2, 3)"),
        (
            (base.long(), [first.long(), second.long()]),
            "the base is int64: only floating-point tensors can be merged",
        ),
    ]:
        with pytest.raises(ValueError) as caught:
            call(*tensors)
        assert str(caught.value) == message

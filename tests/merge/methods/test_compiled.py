"""The compiled loops against float64, on every bfloat16 there is and at every odd length."""

from __future__ import annotations

import math
import resource
import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import numpy as np
import pytest
import torch

from fusechat_merge import methods
from fusechat_merge.methods import compiled, varm

BF16 = torch.bfloat16


def every_finite_bfloat16() -> torch.Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16)
    return values[torch.isfinite(values)]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1 << 14, (1 << 14) + 1, 5 * (1 << 14) - 3])
@pytest.mark.parametrize("squared", [True, False])
def test_sums_of_deltas(n, squared):
    generator = torch.Generator().manual_seed(n)
    base, *targets = (torch.randn(n, generator=generator).to(BF16) for _ in range(4))
    found = compiled.delta_sums(base, targets, 1 << 14, squared)
    for target, sums in zip(targets, found, strict=True):
        delta = target.double() - base.double()
        parts = (delta * delta if squared else delta.abs()).split(1 << 14)
        assert len(sums) == len(parts)
        for value, part in zip(sums, parts, strict=True):
            assert value == pytest.approx(math.fsum(part.tolist()), rel=1e-13)


def test_deltas_over_the_whole_range_are_exact():
    values = every_finite_bfloat16()
    for at in range(0, len(values), 997):  # one pair at a time: no sum, so no rounding
        base, target = values[at : at + 1], values[-1 - at].view(1)
        ((found,),) = compiled.delta_sums(base, [target], 128, True)
        assert found == (float(target) - float(base)) ** 2


def test_nan_and_infinity_reach_the_sum():
    for value in (math.nan, math.inf, -math.inf):
        target = torch.zeros(300, dtype=BF16)
        target[299] = value
        (sums,) = compiled.delta_sums(torch.zeros(300, dtype=BF16), [target], 128, True)
        assert sums[:2] == [0.0, 0.0]
        assert not math.isfinite(sums[2])


def test_one_tensor_at_factor_one_keeps_every_value():
    values = every_finite_bfloat16()
    out = torch.empty_like(values)
    compiled.combine([values], [1.0], out)
    assert torch.equal(out, values)  # −0 may become 0


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 40_000])
def test_combination_is_rounded_once_to_nearest_even(n):
    generator = np.random.default_rng(n)
    tensors = [torch.tensor(generator.normal(size=n)).to(BF16) for _ in range(3)]
    factors = [0.5, 0.25, 2.0**-9]  # products and sums exact in float32: ties are met
    out = torch.empty(n, dtype=BF16)
    compiled.combine(tensors, factors, out)
    exact = sum((t.double() * f for t, f in zip(tensors, factors, strict=True)), torch.zeros(n))
    assert torch.equal(out, exact.to(torch.float32).to(BF16))


def test_ties_go_to_the_even_neighbour():
    one, step = torch.tensor([1.0, 1.0, -1.0], dtype=BF16), 2.0**-8  # half of 1's last bit
    out = torch.empty(3, dtype=BF16)
    compiled.combine([one, one], [1.0, step], out)
    assert out.tolist() == [1.0, 1.0, -1.0]
    compiled.combine([one, one], [1.0, 3 * step], out)
    assert out.tolist() == [1.0 + 4 * step, 1.0 + 4 * step, -1.0 - 4 * step]


def test_an_overflow_becomes_infinity():
    largest = torch.tensor([torch.finfo(BF16).max], dtype=BF16)
    out = torch.empty(1, dtype=BF16)
    compiled.combine([largest, largest], [1.0, 1.0], out)
    assert out.item() == math.inf


def test_they_run_for_bfloat16_on_the_cpu_alone():
    tensor = torch.zeros(4, dtype=BF16)
    assert varm.loops_for(tensor, tensor) is compiled
    assert varm.loops_for(tensor, tensor.float()) is None
    assert varm.loops_for(tensor, tensor.to("meta")) is None


def test_without_numba_the_same_within_rounding(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_001, generator=generator).to(BF16)
    targets = [(base + s * torch.randn(70_001, generator=generator)).to(BF16) for s in (0.1, 0.3)]
    merged, found = varm.varm(base, targets), varm.varm_weights(base, targets)
    monkeypatch.delattr(methods, "compiled")
    monkeypatch.setitem(sys.modules, compiled.__name__, None)  # as where numba is missing
    monkeypatch.setattr(varm, "compiled_loops", varm.compiled_loops.__wrapped__)
    assert varm.compiled_loops() is None
    torch.testing.assert_close(varm.varm_weights(base, targets), found, rtol=1e-13, atol=0)
    plain = varm.varm(base, targets)
    assert (plain.view(torch.int16).int() - merged.view(torch.int16).int()).abs().max() <= 1


def test_without_a_place_for_what_is_compiled(tmp_path):
    """Nowhere to keep it from the start, and none left when it has been compiled."""
    text = "def doubled(numbers):\n    numbers[0] *= 2\n"
    nowhere: dict[str, Any] = {}
    exec(text, nowhere)
    file = tmp_path / "kept.py"
    file.write_text(text)
    spec = spec_from_file_location("kept", file)
    kept = module_from_spec(spec)
    spec.loader.exec_module(kept)
    lost = compiled._compiled(kept.doubled)
    numbers = np.array([3.0])
    compiled._compiled(nowhere["doubled"])(numbers)
    assert numbers.tolist() == [6.0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        lost(numbers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lost(numbers)
    assert numbers.tolist() == [24.0]


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("numel", [1, 127, 300, 1024])
def test_dot_products(deltas: bool, numel: int) -> None:
    tensors = [torch.randn(numel).to(torch.bfloat16) for _ in range(4)]
    base, *others = (tensor.double() for tensor in tensors)
    vectors = [other - base for other in others] if deltas else [base, *others]
    found = iter(compiled.dot_products(tensors, 256, deltas))
    for i, one in enumerate(vectors):
        for other in vectors[i:]:
            expected = [float(part.sum()) for part in (one * other).split(256)]
            assert next(found) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert next(found, None) is None

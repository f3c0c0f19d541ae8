"""Tensors, passes and the spacing of numbers, for tests of the merge methods' arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.methods.blocks import BLOCK, Block, InMemory

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIGNIFICANT = {BF16: 8, F16: 11, F32: 24, F64: 53}
SMALLEST = {BF16: -133, F16: -24, F32: -149, F64: -1074}  # exponent of the smallest subnormal
DTYPES = {
    "bf16": (BF16,) * 4,
    "fp16": (F16,) * 4,
    "fp32": (F32,) * 4,
    "fp64": (F64,) * 4,
    "mixed": (BF16, F32, F16, BF16),
    "mixed16": (F16, BF16, F16, F16),
    "mixed64": (F64, BF16, F32, F16),
}
"""dtypes of a base and three targets."""
SIZES = (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17)


def models(
    shape: Any = (5, 13), dtypes: Sequence[torch.dtype] = (F32,) * 4, scale: float = 1e-2
) -> tuple[Tensor, list[Tensor]]:
    """A base and targets, each moved by another amount."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g, dtype=F64)
    targets = [
        base + scale * (1 + 2 * j) * torch.randn(shape, generator=g, dtype=F64)
        for j in range(len(dtypes) - 1)
    ]
    return base.to(dtypes[0]), [t.to(d) for t, d in zip(targets, dtypes[1:], strict=True)]


def coarse(size: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """bfloat16 models whose δ are small multiples of 2^-7, so that variances are exact and tie."""
    g = torch.Generator().manual_seed(0)
    deltas = [torch.randint(-2, 3, (size,), generator=g) * 2.0**-7 for _ in range(count)]
    return torch.ones(size, dtype=BF16), [(1 + delta).to(BF16) for delta in deltas]


def ends_of_bfloat16() -> tuple[Tensor, list[Tensor]]:
    """Differences of 2 · 3.39e38, which are beyond float32."""
    top = torch.finfo(BF16).max
    rows = ([-top, top, 1.0, 2.0], [top, top, 1.0, 2.0], [-top, -top / 2, 2.0, 2.0])
    base, *targets = (torch.tensor(row, dtype=BF16) for row in rows)
    return base, targets


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(F64).numpy()


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at `values`."""
    _, exponent = np.frexp(values)
    normal = np.where(values == 0, -9999, exponent - SIGNIFICANT[dtype])
    return np.ldexp(1.0, np.maximum(normal, SMALLEST[dtype]))


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


class Segments:
    """Passes that hand out blocks of `cells` grid cells, from several threads, last one first."""

    def __init__(self, base: Tensor, targets: Sequence[Tensor], cells: int) -> None:
        whole = InMemory(base, targets)
        self.count, self.output = whole.count, whole.output
        first, *others = (t.flatten() for t in (base, *targets))
        parts = [slice(at, at + cells * BLOCK) for at in range(0, base.numel(), cells * BLOCK)]
        self._blocks = [Block(p.start, first[p], tuple(t[p] for t in others)) for p in parts]
        self._outs = [self.output.view(-1)[part] for part in parts]

    def map(self, fn: Callable[[Block], Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(fn, self._blocks[::-1]))
        yield from found[::-1]

    def write(self, fn: Callable[[Block, Tensor], None]) -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(fn, self._blocks[::-1], self._outs[::-1]))

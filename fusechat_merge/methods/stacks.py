"""Stacks of experts: tensors that hold one matrix, or two, for every expert.

The unit of VaRM and SCE is one parameter matrix (FusionChat eq. 7), however a file stacks them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe|moe)\.")
_DOWN = {
    "gate_up_proj": "down_proj",
    "gate_and_up_projs": "down_projs",
    "input_linear": "output_linear",
}
"""The stack of down matrices beside one of gate and up matrices, by the last part of its name."""


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix within a stack.

    Attributes:
        label: what follows the stack's name, such as `[3].up`.
        first: number of its first element in the stack.
        shape: of the matrix.
    """

    label: str
    first: int
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this name and shape holds a matrix for every expert."""
    return len(shape) == 3 and shape[1] > 1 and bool(_EXPERTS.search(name))


def down_of(name: str) -> str | None:
    """The name of the stack of down matrices that belongs to a stack of gate and up matrices."""
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    down = _DOWN.get(last)
    return down and f"{prefix}.{down}{name[len(prefix) + 1 + len(last) :]}"


def has_halves(shape: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether each expert has its gate matrix, then its up matrix, as halves of rows.

    In [experts, hidden, 2 · inner] they stand side by side in every row, or interleave.

    Args:
        shape: of the stack of gate and up matrices, [experts, 2 · inner, hidden] with halves.
        down: of the stack of down matrices, [experts, hidden, inner] then.
    """
    _, hidden, inner = down
    return shape[1:] == (2 * inner, hidden)


def matrices(shape: tuple[int, ...], halves: bool) -> Iterator[Matrix]:
    """The matrices of a stack, in the order of its elements."""
    experts, rows, columns = shape
    parts = (".gate", ".up") if halves else ("",)
    each = (rows // len(parts), columns)
    for expert in range(experts):
        for number, part in enumerate(parts):
            first = (expert * len(parts) + number) * math.prod(each)
            yield Matrix(f"[{expert}]{part}", first, each)

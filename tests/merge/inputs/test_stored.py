"""Tensors that are several ranges of bytes, or stored transposed, against numpy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fusechat_merge.inputs.stored import Joined, Location, Stored, Transposed, part_of

ROWS, COLUMNS = 7, 5
FILE = np.arange(4 * ROWS * COLUMNS, dtype=np.int16)  # four matrices, one after the other


def matrix(number: int, *shape: int) -> Location:
    nbytes = 2 * ROWS * COLUMNS
    return Location("weights", number * nbytes, nbytes, "I16", shape or (ROWS, COLUMNS))


def numbers(number: int, *shape: int) -> np.ndarray:
    return FILE.reshape(4, -1)[number].reshape(shape or (ROWS, COLUMNS))


STORED: dict[str, tuple[Stored, Callable[[], np.ndarray]]] = {
    "one range": (matrix(2), lambda: numbers(2)),
    "part of a range": (part_of(matrix(1), 5, (2, 5)), lambda: numbers(1)[1:3]),
    "joined": (
        Joined((matrix(3), matrix(0)), (2 * ROWS, COLUMNS)),
        lambda: np.concatenate([numbers(3), numbers(0)]),
    ),
    "transposed": (Transposed(matrix(1, COLUMNS, ROWS)), lambda: numbers(1, COLUMNS, ROWS).T),
    "transposed halves": (
        Joined(
            (Transposed(matrix(0)), part_of(Transposed(matrix(3)), 14, (3, 7))), (8, ROWS)
        ),
        lambda: np.concatenate([numbers(0).T, numbers(3).T[2:]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_every_range_of_every_kind(kind: str) -> None:
    stored, right = STORED[kind]
    expected = np.ascontiguousarray(right())
    assert stored.shape == expected.shape
    assert stored.numel == expected.size
    read: list[str] = []

    def read_at(file: str, offset: int, into: memoryview) -> None:
        read.append(file)
        into[:] = FILE.tobytes()[offset : offset + into.nbytes]

    for first in range(stored.numel):
        for count in range(1, stored.numel - first + 1):
            into = np.zeros(count, np.int16)
            stored.read(read_at, first, into.view(np.uint8).data)
            assert (into == expected.reshape(-1)[first : first + count]).all()
    assert {at.file for at in stored.locations()} == set(read)
    assert stored.nbytes == 2 * stored.numel
    if "transposed" in kind:
        assert stored.scratch(stored.numel) >= 2 * stored.numel / 2
    else:
        assert stored.scratch(stored.numel) == 0

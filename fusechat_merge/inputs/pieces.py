"""Where a parameter in memory lies in a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""The first index, and the one after the last, of each axis."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is a box of a stored tensor.

    Attributes:
        tensor: name of the stored one.
        shape: in which it is seen here; its elements are in the same order as stored.
        box: in the tensor that is described.
        origin: index in the stored tensor of the box's first element.
        axes: for each axis of the box the stored tensor's, None for an axis added by stacking.
    """

    tensor: str
    shape: tuple[int, ...]
    box: Box
    origin: tuple[int, ...]
    axes: tuple[int | None, ...]

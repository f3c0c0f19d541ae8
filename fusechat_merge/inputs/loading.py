"""What transformers finds when it loads tensors of some names and shapes: none is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat_merge.inputs.layouts import InMemory, Piece
from fusechat_merge.inputs.stored import Location


@dataclass(frozen=True)
class Loading:
    """What doesn't go together when a checkpoint is loaded.

    Attributes:
        missing: tensors of the class that the files don't have.
        unexpected: tensors of the files that the class doesn't have.
        mismatched: tensors of the class for which the files' have another shape.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]

    def beyond(self, other: Loading) -> list[str]:
        """What another checkpoint hasn't as well, in a line each."""
        return [
            f"{what} {', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}"
            for what, names in (
                ("without", self.missing - other.missing),
                ("with a shape of another configuration:", self.mismatched - other.mismatched),
                ("with nothing that takes", self.unexpected - other.unexpected),
            )
            if names
        ]


def loading(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Loading:
    """Match tensors with the class that the configuration names, as `from_pretrained` does.

    Args:
        config: one of transformers'.
        shapes: of the files' tensors, by name.

    Raises:
        LookupError: transformers has no such class.
        Exception: it can't build the class from this configuration.
    """
    memory = InMemory(config)
    stored = {name: Location("", 0, 0, "U8", shape) for name, shape in shapes.items()}
    described = memory.describe(stored)
    tied = set(memory.model.all_tied_weights_keys)
    used = {piece.tensor for pieces in described.values() for piece in pieces}
    mismatched = {
        name for name, pieces in described.items() if _extent(pieces) != memory.state[name].shape
    }
    return Loading(
        missing=frozenset(memory.state.keys() - described.keys() - tied),
        unexpected=frozenset(shapes.keys() - used),
        mismatched=frozenset(mismatched),
    )


def _extent(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The shape of the tensor that the pieces cover."""
    axes = zip(*(piece.box for piece in pieces), strict=True)
    return tuple(max(end for _, end in axis) for axis in axes)

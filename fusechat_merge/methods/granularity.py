"""Which tensors share their merge weights: from a tensor's name to the unit it belongs to."""

from __future__ import annotations

GRANULARITIES: tuple[str, ...] = ("matrix", "module", "layer", "model", "element")
SHARED: frozenset[str] = frozenset({"module", "layer", "model"})
"""Granularities whose unit may hold several tensors."""


def check_granularity(granularity: str) -> None:
    """Raise ValueError for a name that is no granularity."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {granularity!r}: use one of {', '.join(GRANULARITIES)}"
        )


def layer_of(name: str) -> str:
    """Everything up to and including the first all-digit component: ``model.layers.3``.

    A tensor outside the layers is a layer of its own.
    """
    return _up_to_layer(name, 0)


def module_of(name: str) -> str:
    """The layer and one component more: ``model.layers.3.self_attn``.

    A tensor outside the layers is a module of its own.
    """
    return _up_to_layer(name, 1)


def _up_to_layer(name: str, more: int) -> str:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            return ".".join(parts[: i + 1 + more])
    return name


def unit_of(name: str, granularity: str) -> str:
    """The unit of the tensor ``name``: tensors of one unit share their merge weights.

    Args:
        name: an output tensor's name, such as ``model.layers.3.self_attn.q_proj.weight``.
        granularity: ``matrix`` and ``element`` (the tensor itself), ``module``, ``layer`` or
            ``model`` (everything, named ``model``).

    Raises:
        ValueError: an unknown granularity.
    """
    check_granularity(granularity)
    if granularity == "module":
        return module_of(name)
    if granularity == "layer":
        return layer_of(name)
    if granularity == "model":
        return "model"
    return name

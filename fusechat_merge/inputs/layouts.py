"""A checkpoint under the names and in the layout of another one's files.

The same model is stored under several names: experts one by one or stacked, a vision model's parts
with one prefix or another, as released or as transformers saves it again. Which belong together is
known by transformers: it converts all of them to the tensors that it has in memory. Here its
conversions are run on descriptions of tensors instead of numbers. That gives, for every box of a
tensor in memory, the box of a stored tensor that it comes from; and with two checkpoints' boxes the
tensors of one are presented in the layout of the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusechat_merge.inputs.checkpoint import Checkpoint
from fusechat_merge.inputs.stored import Joined, Location, Range, Stored, Transposed, part_of

T = TypeVar("T")

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

    def within(self, box: Box) -> Piece | None:
        """The part of the piece that lies in a box."""
        cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.box, box, strict=True))
        if any(low >= high for low, high in cut):
            return None
        origin = list(self.origin)
        for axis, (low, _), (first, _) in zip(self.axes, cut, self.box, strict=True):
            if axis is not None:
                origin[axis] += low - first
        return replace(self, box=cut, origin=tuple(origin))

    def moved(self, axis: int, by: int) -> Piece:
        """The piece at another place along one axis."""
        low, high = self.box[axis]
        box = (*self.box[:axis], (low + by, high + by), *self.box[axis + 1 :])
        return replace(self, box=box)

    def with_axis(self, axis: int, index: int) -> Piece:
        """The piece in a tensor with one axis more, at an index of it."""
        box = (*self.box[:axis], (index, index + 1), *self.box[axis:])
        return replace(self, box=box, axes=(*self.axes[:axis], None, *self.axes[axis:]))

    def permuted(self, order: Sequence[int]) -> Piece:
        """The piece with the axes of the described tensor in another order."""
        box, axes = (tuple(values[i] for i in order) for values in (self.box, self.axes))
        return replace(self, box=box, axes=axes)  # type: ignore[arg-type]


class Described(Tensor):
    """A tensor without numbers, of which is known what stored tensors it is made from.

    Attributes:
        pieces: they cover it; None after an operation that is not known here.
    """

    pieces: tuple[Piece, ...] | None

    @staticmethod
    def of(shape: Sequence[int], pieces: tuple[Piece, ...] | None) -> Described:
        made = torch.empty(tuple(shape), device="meta").as_subclass(Described)
        made.pieces = pieces
        return made

    @staticmethod
    def stored(name: str, shape: tuple[int, ...]) -> Described:
        box = tuple((0, size) for size in shape)
        axes = tuple(range(len(shape)))
        return Described.of(shape, (Piece(name, shape, box, (0,) * len(shape), axes),))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        pieces_of = _KNOWN.get(getattr(func, "__name__", ""))
        if isinstance(result, Tensor):
            pieces = pieces_of(result, *args, **(kwargs or {})) if pieces_of else None
            return Described.of(result.shape, pieces)
        if isinstance(result, (tuple, list)) and isinstance(next(iter(result), None), Tensor):
            every = pieces_of(result, *args, **(kwargs or {})) if pieces_of else ()
            return [Described.of(r.shape, p) for r, p in zip_longest(result, every)]
        return result


def _joined(parts: Sequence[Described], place: Callable[[Piece, int], Piece]) -> Any:
    """The pieces of several tensors, each moved to its place; None if some aren't known."""
    pieces: list[Piece] = []
    for number, part in enumerate(parts):
        if part.pieces is None:
            return None
        pieces += (place(piece, number) for piece in part.pieces)
    return tuple(pieces)


def _stack(result: Tensor, tensors: Sequence[Described], dim: int = 0) -> Any:
    return _joined(tensors, lambda piece, number: piece.with_axis(dim, number))


def _cat(result: Tensor, tensors: Sequence[Described], dim: int = 0) -> Any:
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + tensor.shape[dim])
    return _joined(tensors, lambda piece, number: piece.moved(dim, starts[number]))


def _chunk(result: Sequence[Tensor], tensor: Described, chunks: Any, dim: int = 0) -> list[Any]:
    every: list[Any] = []
    start = 0
    for part in result:
        box = tuple((0, size) for size in tensor.shape)
        end = start + part.shape[dim]
        box = (*box[:dim], (start, end), *box[dim + 1 :])
        cut = [piece.within(box) for piece in tensor.pieces or ()]
        moved = tuple(piece.moved(dim, -start) for piece in cut if piece)
        every.append(None if tensor.pieces is None else moved)
        start = end
    return every


def _transpose(result: Tensor, tensor: Described, dim0: int = 0, dim1: int = 1) -> Any:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return tensor.pieces and tuple(piece.permuted(order) for piece in tensor.pieces)


def _reshape(result: Tensor, tensor: Described, *shape: Any) -> Any:
    """Known for a whole stored tensor in its own order, whatever shape it is seen in."""
    if result.shape == tensor.shape:
        return tensor.pieces
    if tensor.pieces is None or len(tensor.pieces) != 1:
        return None
    (piece,) = tensor.pieces
    if piece.axes != tuple(range(tensor.ndim)) or piece.shape != tuple(tensor.shape):
        return None
    return Described.stored(piece.tensor, tuple(result.shape)).pieces


def _same(result: Tensor, tensor: Described, *args: Any, **kwargs: Any) -> Any:
    return tensor.pieces


_KNOWN: dict[str, Callable[..., Any]] = {
    "stack": _stack,
    "cat": _cat,
    "chunk": _chunk,
    "split": _chunk,
    "transpose": _transpose,
    "reshape": _reshape,
    "view": _reshape,
    "contiguous": _same,
    "clone": _same,
}


class InMemory:
    """What transformers makes of a class's checkpoints: its tensors and its conversions.

    Args:
        config: the model's configuration.

    Raises:
        LookupError: transformers has no such class.
    """

    def __init__(self, config: Any) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.initialization import no_init_weights

        (name,) = config.architectures or [None]
        kind = getattr(transformers, str(name), None)
        if kind is None:
            raise LookupError(f"transformers has no class {name}")
        with torch.device("meta"), no_init_weights():
            self.model = kind(deepcopy(config))
        self.state = dict(self.model.state_dict())
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def describe(self, stored: Mapping[str, Stored]) -> dict[str, tuple[Piece, ...]]:
        """Of every tensor in memory that the stored ones make up, the pieces that it is made of."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        renamings, converters = deepcopy((self._renamings, self._converters))  # they keep a state
        by_pattern = {p: t for t in converters for p in t.source_patterns}
        prefix = self.model.base_model_prefix
        described: dict[str, tuple[Piece, ...]] = {}
        converting: dict[str, Any] = {}
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = rename_source_key(name, [], [], prefix, self.state)
            if renamed not in self.state:
                continue
            tensor = Described.stored(name, stored[name].shape)
            if pattern is None:
                described[renamed] = tensor.pieces or ()
                continue
            if renamed not in converting:
                converting[renamed] = deepcopy(by_pattern[pattern])
            converting[renamed].add_tensor(renamed, name, pattern, tensor)
        for first, converter in converting.items():
            described |= self._converted(first, converter)
        return described

    def _converted(self, first: str, converter: Any) -> dict[str, tuple[Piece, ...]]:
        """What one conversion makes of the descriptions that it has collected."""
        collected = converter.collected_tensors
        numbered = [tensor for tensors in collected.values() for tensor in tensors]
        permuting = any("Permute" in type(op).__name__ for op in converter.operations)
        if permuting:
            numbers = iter(range(len(numbered)))
            for pattern, tensors in collected.items():
                collected[pattern] = [_row_numbers(tensor, next(numbers)) for tensor in tensors]
        try:
            made = converter.convert(first, model=self.model, config=self.model.config)
        except Exception:  # an operation that needs numbers: what it makes stays unknown
            return {}
        tensors = {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }
        if permuting:
            return {name: tuple(_runs(rows, numbered)) for name, rows in tensors.items()}
        return {name: tensor.pieces for name, tensor in tensors.items() if tensor.pieces}


_ROWS = 1 << 40
"""More rows than a tensor has."""


def _row_numbers(tensor: Described, number: int) -> Tensor:
    """A tensor of one column that holds the number of each row, for operations that move rows."""
    rows = torch.arange(tensor.shape[0]) + number * _ROWS
    return rows if tensor.ndim == 1 else rows.view(-1, *[1] * (tensor.ndim - 1))


def _runs(rows: Tensor, numbered: Sequence[Described]) -> Iterator[Piece]:
    """The pieces of a tensor, from the numbers of its rows."""
    flat = rows.reshape(rows.shape[0], -1)[:, 0]
    breaks = (flat.diff() != 1).nonzero()[:, 0] + 1
    bounds = [0, *breaks.tolist(), len(flat)]
    for low, high in pairwise(bounds):
        number, row = divmod(int(flat[low]), _ROWS)
        (whole,) = numbered[number].pieces or ()
        others = tuple((0, size) for size in whole.shape[1:])
        origin = (row, *[0] * len(others))
        yield replace(whole, box=((low, high), *others), origin=origin)


def in_layout_of(
    base: Checkpoint, base_config: Any, checkpoint: Checkpoint, config: Any
) -> Checkpoint:
    """A checkpoint with the names and in the layout of the base's files.

    Args:
        base, base_config: the base and its configuration, one of transformers'.
        checkpoint, config: the one to present: of the same class, or one of them the language model
            that is a part of the other.

    Returns:
        The checkpoint; tensors that fit none of the base's keep their names. `absent` names those
        of the base's that its class doesn't have.
    """
    ours, theirs = base.tensors, checkpoint.tensors
    if all(name in theirs and theirs[name].shape == at.shape for name, at in ours.items()):
        return checkpoint
    try:
        of_base, of_other = InMemory(base_config), InMemory(config)
    except Exception:  # transformers' errors for what it can't build have no common base
        return checkpoint
    described, described_base = of_other.describe(theirs), of_base.describe(ours)
    known = set(of_other.state)
    prefixes = _prefixes(of_base.model, of_other.model)
    if prefixes is None:
        return checkpoint
    in_base, in_other = prefixes
    described = _renamed(described, in_other, in_base)
    known = set(_renamed(dict.fromkeys(known), in_other, in_base))
    presented = arranged(checkpoint, described, base, described_base)
    expected = {p.tensor for name in known for p in described_base.get(name, ())}
    return replace(presented, absent=frozenset(ours.keys() - presented.tensors.keys() - expected))


class InTermsOf:
    """A model in memory whose checkpoint has the base's names and layout; see `in_layout_of`.

    Args:
        base: the base in memory.
        own: the model.
    """

    def __init__(self, base: InMemory, own: InMemory) -> None:
        self.model = own.model
        self._base, self._own = base, own

    def describe(self, stored: Mapping[str, Stored]) -> dict[str, tuple[Piece, ...]]:
        """As `InMemory.describe`, of tensors under the base's names or the model's own."""
        described = self._own.describe(stored)
        prefixes = _prefixes(self._base.model, self.model)
        return (
            described | _renamed(self._base.describe(stored), *prefixes) if prefixes else described
        )


def _prefixes(base: Any, other: Any) -> tuple[str, str] | None:
    """What the same modules' names begin with in two models; None where they have none in common.

    Empty for models of one class. Else one is the language model that is a part of the other.
    """
    if type(base) is type(other):
        return "", ""
    names = _language_part(base, other)
    if names is None:
        names = _language_part(other, base)
        names = names and names[::-1]
    return names and (f"{names[0]}.", f"{names[1]}.")


def _renamed(described: Mapping[str, T], before: str, after: str) -> dict[str, T]:
    """The same with another prefix of names, where they have the first."""
    return {
        after + name.removeprefix(before) if name.startswith(before) else name: pieces
        for name, pieces in described.items()
    }


def _language_part(whole: Any, model: Any) -> tuple[str, str] | None:
    """Where a language model's layers are in a vision-language model, and in itself."""
    own = model.base_model_prefix
    backbone = getattr(model, own, None)
    for name, module in whole.named_modules():
        if name and type(module) is type(backbone):
            return name, own
    return None


def arranged(
    checkpoint: Checkpoint,
    described: Mapping[str, tuple[Piece, ...]],
    like: Checkpoint,
    described_like: Mapping[str, tuple[Piece, ...]],
) -> Checkpoint:
    """A checkpoint with another one's names and layout.

    Args:
        checkpoint: the one to present.
        described: its tensors in memory; the same for `described_like`.
        like: whose names and layout it gets.

    Returns:
        The checkpoint; tensors that fit no name of the other keep theirs.
    """
    # Of each tensor of `like`: its boxes, and the same box of a tensor in memory.
    places: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for name, pieces in described_like.items():
        for piece in pieces:
            places[piece.tensor].append((name, piece))
    by_box = {
        memory: {piece.box: piece for piece in pieces} for memory, pieces in described.items()
    }
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    for name, at in like.tensors.items():
        parts = []
        for memory, piece in places.get(name, ()):
            same = by_box.get(memory, {}).get(piece.box)  # the usual case, and there are many
            others = [same] if same else described.get(memory, ())
            parts += [_seen_from(cut, piece) for o in others if (cut := o.within(piece.box))]
        shape = places[name][0][1].shape if name in places else at.shape
        stored = _assembled(parts, shape, checkpoint.tensors)
        if stored is None:
            continue
        tensors[name] = _reshaped(stored, at.shape)
        used |= {part.tensor for part in parts}
    for name, at in checkpoint.tensors.items():
        if name not in used:
            tensors.setdefault(name, at)
    return replace(checkpoint, tensors=tensors)


def _seen_from(other: Piece, piece: Piece) -> Piece:
    """A piece of a tensor in memory, as a piece of the stored tensor that `piece` is of.

    `other` lies within `piece`'s box; the result's box is in `piece`'s stored tensor.
    """
    box: list[tuple[int, int]] = [(0, 1)] * len(piece.shape)
    axes: list[int | None] = [None] * len(piece.shape)
    for axis, mine in enumerate(piece.axes):
        low, high = other.box[axis]
        if mine is not None:
            shift = piece.origin[mine] - piece.box[axis][0]
            box[mine] = (low + shift, high + shift)
            axes[mine] = other.axes[axis]
    return replace(other, box=tuple(box), axes=tuple(axes))


def _assembled(
    parts: Sequence[Piece], shape: tuple[int, ...], tensors: Mapping[str, Stored]
) -> Stored | None:
    """The tensor of this shape that the parts cover; None where they leave something out."""
    covered = sum(math.prod(high - low for low, high in part.box) for part in parts)
    if covered != math.prod(shape) or len({tensors[part.tensor].dtype for part in parts}) != 1:
        return None
    leaves = list(_leaves(parts, tuple((0, size) for size in shape), tensors))
    return leaves[0] if len(leaves) == 1 else Joined(tuple(leaves), shape)


def _leaves(parts: Sequence[Piece], box: Box, tensors: Mapping[str, Stored]) -> Iterator[Stored]:
    """The box's elements in their order, as stored tensors one after the other.

    `parts` cover the box and nothing else.
    """
    if len(parts) == 1:
        leaf = _leaf(parts[0], tensors)
        if leaf is not None:
            yield leaf
            return
    # Cut along the first axis that is left: where parts end, else at every index.
    axis = next(i for i, (low, high) in enumerate(box) if high - low > 1)
    low, high = box[axis]
    ends = sorted({bound for part in parts for bound in part.box[axis]})
    if len(ends) == 2:
        ends = list(range(low, high + 1))
    cuts = list(pairwise(ends))
    inside: list[list[Piece]] = [[] for _ in cuts]
    for part in parts:
        first, last = part.box[axis]
        for number in range(bisect_left(ends, first), bisect_left(ends, last)):
            inner = (*box[:axis], cuts[number], *box[axis + 1 :])
            cut = part.within(inner)
            assert cut is not None
            inside[number].append(cut)
    for cut_parts, bounds in zip(inside, cuts, strict=True):
        yield from _leaves(cut_parts, (*box[:axis], bounds, *box[axis + 1 :]), tensors)


def _leaf(part: Piece, tensors: Mapping[str, Stored]) -> Stored | None:
    """The part as consecutive elements of a stored tensor, or of a transposed matrix of one."""
    whole = tensors[part.tensor]
    sizes = tuple(high - low for low, high in part.box)
    used = [(axis, size) for axis, size in zip(part.axes, sizes, strict=True) if size > 1]
    strides = [math.prod(part.shape[i + 1 :]) for i in range(len(part.shape))]
    first = sum(index * stride for index, stride in zip(part.origin, strides, strict=True))
    # Consecutive: every axis but the first is whole, and they stand in the stored order.
    expected = math.prod(sizes)
    for axis, size in used:
        expected //= size
        if axis is None or strides[axis] != expected:
            break
    else:
        if first == 0 and math.prod(sizes) == whole.numel:
            return _reshaped(whole, sizes)
        return part_of(whole, first, sizes)
    if len(used) != 2 or None in (used[0][0], used[1][0]):
        return None
    (row_axis, rows), (column_axis, columns) = used
    assert row_axis is not None and column_axis is not None  # noqa: PT018
    # A matrix stored transposed: all its stored rows, which are columns here.
    stored_rows = part.shape[row_axis]
    if strides[row_axis] != 1 or strides[column_axis] != stored_rows:
        return None
    if columns != part.shape[column_axis]:
        return None
    start = first - part.origin[row_axis]
    matrix = Transposed(part_of(whole, start, (columns, stored_rows)))
    if rows == stored_rows:
        return _reshaped(matrix, sizes)
    return part_of(matrix, part.origin[row_axis] * columns, sizes)


def _reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """The same elements as a tensor of another shape."""
    if stored.shape == shape:
        return stored
    if isinstance(stored, (Location, Joined, Range)):
        return replace(stored, shape=shape)
    return Joined((stored,), shape)

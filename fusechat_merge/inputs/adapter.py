"""Adapters as targets: which of a checkpoint's tensors one changes, and by what.

An adapter names its model's modules as they are in memory. Which tensors of the files they are is
what transformers' conversions say; where transformers can't build the model, or isn't asked to, the
names are those in the files.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

from fusechat_merge.inputs.adapter_config import (
    MERGE,
    names,
    scale,
    taken,
    token_rows,
    unsupported,
)
from fusechat_merge.inputs.checkpoint import (
    Checkpoint,
    CheckpointError,
    Store,
    read_settings,
    read_weights_file,
)
from fusechat_merge.inputs.layouts import InMemory, InTermsOf, Piece
from fusechat_merge.inputs.stored import Location, Stored, Transposed, part_of
from fusechat_merge.inputs.update import LowRank, Strided, Update

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>(\.base_layer)*)\.lora_(?P<kind>A|B|embedding_A|embedding_B"
    r"|magnitude_vector)(\.(?P<of>weight|bias))?"
)
_TOKENS = re.compile(r"(.+?)(\.token_adapter)?\.trainable_tokens_delta")
_TRAINING_ONLY = re.compile(r"\.lora_(velora|monteclora)_")
_SHOWN = 5
"""Problems of one adapter that a message lists: the others are likely the same."""


def with_adapter(
    checkpoint: Checkpoint,
    store: Store,
    name: str,
    models: Sequence[InMemory | InTermsOf] = (),
) -> Checkpoint:
    """The checkpoint as the adapter changes it.

    Args:
        checkpoint: the model that the adapter was trained on.
        store: where the adapter is.
        name: what messages call it.
        models: the model in memory, by each class that it may have been trained as.

    Raises:
        CheckpointError: no LoRA adapter, or one with parts that can't be merged by blocks.
    """
    if "adapter_config.json" not in store.names():
        raise CheckpointError([f"{name}: is no adapter, it holds no adapter_config.json"])
    config = read_settings(store, "adapter_config.json", name)
    problems = unsupported(config, name)
    if _FILE not in store.names():
        pickled = "adapter_model.bin" in store.names()
        why = "its weights are pickled, which can run code; load and save it with peft once"
        raise CheckpointError([*problems, f"{name}: {why if pickled else f'holds no {_FILE}'}"])
    try:
        locations, file = read_weights_file(store, _FILE, f"{name}: {_FILE}")
    except CheckpointError as error:
        raise CheckpointError([*problems, *error.problems]) from error
    if problems:
        raise CheckpointError(problems)
    path = _FILE if store.folder is None else str((store.folder / _FILE).absolute())
    stored = {key: replace(at, file=path) for key, at in locations.items()}

    attempts = []
    for model in (*models, None):
        reading = _Reading(checkpoint, config, stored, model)
        reading.read()
        if not reading.problems:
            folder = checkpoint.folder if store.folder is not None else None
            return replace(
                checkpoint,
                folder=folder,
                tensors=reading.tensors,
                files=checkpoint.files | {path: file},
                updates=reading.updates,
            )
        attempts.append(reading.problems)
    fewest = min(attempts, key=len)
    shown = [f"{name}: {problem}" for problem in fewest[:_SHOWN]]
    more = len(fewest) - _SHOWN
    raise CheckpointError([*shown, f"{name}: {more} more of this kind"] if more > 0 else shown)


def in_memory(config: Any, like: Any = None) -> list[InMemory | InTermsOf]:
    """The model in memory: as its own class, and as transformers loads it as a language model.

    Args:
        config: the model's, one of transformers'.
        like: the same of a model whose names and layout the checkpoint was given.
    """
    own = _in_memory(config)
    return [*own, *(InTermsOf(base, o) for o in own for base in (_in_memory(like) if like else ()))]


def _in_memory(config: Any) -> list[InMemory]:
    from transformers import AutoModelForCausalLM

    variants = [config]
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is not None and kind.__name__ not in (config.architectures or ()):
        text = deepcopy(config if kind.config_class is type(config) else config.get_text_config())
        text.architectures = [kind.__name__]
        variants.append(text)
    found = []
    for variant in variants:
        with suppress(Exception):  # transformers' errors have no common base; it can't be built
            found.append(InMemory(variant))
    return found


class _Reading:
    """One reading of an adapter's tensors.

    Attributes:
        tensors, updates: the checkpoint's, changed.
        problems: what fits nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any],
        stored: Mapping[str, Location],
        model: InMemory | InTermsOf | None,
    ) -> None:
        self._name, self._config, self._stored = checkpoint.name, config, stored
        self.tensors: dict[str, Stored] = dict(checkpoint.tensors)
        self.updates: dict[str, Update] = dict(checkpoint.updates)
        self.problems: list[str] = []
        self._model = model.model if model else None
        self._pieces = model.describe(checkpoint.tensors) if model else {}
        self._tied: dict[str, str] = (
            self._model.get_expanded_tied_weights_keys(all_submodels=True) if self._model else {}
        )
        # Of each module and depth of peft's wrappers around it, its factors by kind.
        self._factors: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        self._whole: dict[str, str] = {}
        self._rows: dict[str, str] = {}
        self._added: list[str] = []
        self._passed_over: list[str] = []
        self._elsewhere: list[str] = []

    def read(self) -> None:
        """Enter everything that the adapter holds."""
        for key in self._stored:
            self._sort(key)
        self._untie()
        if self._model is None and self._may_be_tied():
            self.problems.append(
                f"trained the embeddings, and whether {self._name} ties its head to them is not"
                f" known, since transformers can't build it; {MERGE}"
            )
        for parameter, key in self._whole.items():
            self._replace(parameter, key)
        if self._added:
            listed = ", ".join(self._added)
            self.problems.append(
                f"holds {listed} of {self._name}; where tokens were added, {MERGE}"
            )
        for (module, depth), factors in self._factors.items():
            self._enter(module, depth, factors)
        for module, key in self._rows.items():
            self._replace_rows(module, key)
        if self._elsewhere:
            self.problems.append(
                f"{_first(self._elsewhere)}: stored in an order that can't be followed here;"
                f" {MERGE}"
            )
        if self._passed_over:
            self.problems.append(
                f"peft passes over {_first(self._passed_over)}, since adapter_config.json has no"
                " lora_bias: true; add that to merge them, or delete the tensors"
            )

    def _sort(self, key: str) -> None:
        plain = _WRAPPERS.sub("", key).removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(plain):
            kind = match["kind"] + (".bias" if match["of"] == "bias" else "")
            depth = match["nested"].count("base_layer")
            self._factors[match["module"], depth][kind] = key
        elif match := _TOKENS.fullmatch(plain):
            self._rows[match[1]] = key
        elif not _TRAINING_ONLY.search(plain):
            self._whole[plain.replace(".base_layer.", ".")] = key

    # Tied weights

    def _untie(self) -> None:
        """Tell tied weights apart that the adapter trained apart: each gets a tensor of its own."""
        for other, first in self._tied.items():
            if self._known(other) or not self._known(first):
                continue
            # Rows of the embeddings are the head's too, but not the other way round.
            if self._apart(other) or self._apart(first) or _module(other) in self._rows:
                self._copy(first, other)
                continue
            # Trained as one: a second copy is the same, and so are second factors.
            self._whole.pop(other, None)
            self._factors.pop((_module(other), 0), None)

    def _may_be_tied(self) -> bool:
        """Whether embeddings were trained of a model whose files hold no head."""
        trained = [*self._whole, *(module for module, _ in self._factors), *self._rows]
        first = any(re.search(r"(^|\.)(embed\w*|wte|word_embeddings)(\.|$)", n) for n in trained)
        return first and not any("lm_head" in name or "embed_out" in name for name in self.tensors)

    def _apart(self, parameter: str) -> bool:
        """Whether the adapter trained a weight, but not those that are tied to it."""
        module = _module(parameter)
        trained = (module, 0) in self._factors or names(self._config, "modules_to_save", module)
        return trained and not self._config.get("ensure_weight_tying")

    def _copy(self, first: str, other: str) -> None:
        (piece,) = self._pieces_of(first)
        self.tensors[other] = self.tensors[piece.tensor]
        self._pieces[other] = (replace(piece, tensor=other),)

    def _known(self, parameter: str) -> bool:
        return parameter in self._pieces or parameter in self.tensors

    # Whole tensors: modules_to_save, trained biases, the weights below embeddings' factors

    def _replace(self, parameter: str, key: str) -> None:
        at = self._stored[key]
        if not self._known(parameter):
            self._fits_nothing(key)
            return
        shape = self._shape(parameter)
        if at.shape != shape and len(shape) == 2 and at.shape[1:] == shape[1:]:
            self._added.append(f"{parameter} with {at.shape[0]} rows for {shape[0]}")
            return
        parts = [(piece.tensor, _part(piece, at, shape)) for piece in self._pieces_of(parameter)]
        if at.shape != shape:
            self._fits_nothing(key)
        elif all(part for _, part in parts):
            self.tensors |= {tensor: part for tensor, part in parts if part}
        else:
            self._elsewhere.append(parameter)

    def _fits_nothing(self, key: str) -> None:
        self.problems.append(f"{key} fits no tensor of {self._name}")

    # Factors

    def _enter(self, module: str, depth: int, factors: dict[str, str]) -> None:
        first = next(iter(factors.values()))
        embedding = any(kind.startswith("embedding") for kind in factors)
        kinds = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        for kind, other in (kinds, kinds[::-1]):
            if kind in factors and other not in factors:
                key = factors[kind]
                end = key.rindex(f"lora_{kind}") + len("lora_" + kind)
                self.problems.append(f"{key}: {key[: end - 1]}{other[-1]}{key[end:]} is missing")
        if not factors.keys() >= set(kinds):
            if not factors.keys() & set(kinds):
                self._fits_nothing(first)
            return
        parameter, wrapped = self._parameter(module, depth)
        if not self._known(parameter):
            self.problems.append(f"{factors[kinds[0]]}: the model has no {parameter}")
            return
        problem = self._pair(parameter, wrapped, factors, kinds)
        if problem:
            self.problems.append(f"{factors[kinds[0]]}: {problem}")

    def _parameter(self, module: str, depth: int) -> tuple[str, bool]:
        """The parameter that factors belong to, and whether it is one of `target_parameters`.

        peft wraps a module once for each of its parameters that are named there, in the order in
        which it has them, the first innermost.
        """
        targets = []
        owner = self._owner(module)
        if owner is not None and self._config.get("target_parameters"):
            every = [f"{module}.{name}" for name, _ in owner.named_parameters(recurse=False)]
            targets = [n for n in every if names(self._config, "target_parameters", n)]
        if depth < len(targets):
            return targets[-1 - depth], True
        return f"{module}{'.base_layer' * depth}.weight", False

    def _pair(
        self, parameter: str, wrapped: bool, factors: Mapping[str, str], kinds: tuple[str, str]
    ) -> str | None:
        """Enter a pair of factors; what is wrong with them."""
        a, b = (self._stored[factors[kind]] for kind in kinds)
        both = f"factors of shape {list(b.shape)} and {list(a.shape)}"
        if min(len(a.shape), len(b.shape)) < 2 or 0 in (*a.shape, *b.shape):
            return (
                f"{both}: each process saved a part of them (FSDP, DeepSpeed ZeRO-3); save the"
                " adapter again with the whole parameters gathered"
            )
        # Of several experts, A holds one after the other, and B interleaves them.
        shape = self._shape(parameter)
        experts = shape[0] if wrapped and len(shape) == 3 else 1
        rank, rest = divmod(a.shape[0], experts)
        if rest or b.numel != b.shape[0] * a.shape[0]:
            return f"{both} don't fit"
        number = scale(self._config, parameter if wrapped else _module(parameter), rank)
        if isinstance(number, str):
            return number
        rows, columns = b.shape[0], a.numel // a.shape[0]
        left = Strided(b, 0, (experts, rows, rank), (1, rank * experts, experts))
        right = Strided(a, 0, (experts, rank, columns), (rank * columns, columns, 1))
        transposed = self._transposed(parameter, wrapped, kinds)
        if transposed:
            left, right = right.transposed, left.transposed
        matrices = shape if wrapped and len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
        if matrices != (experts, left.shape[1], right.shape[2]):
            return f"B·A is {[rows, columns]}, {parameter} is {list(shape)}"
        return self._add(parameter, LowRank(left, right, number), factors, transposed)

    def _transposed(self, parameter: str, wrapped: bool, kinds: tuple[str, str]) -> bool:
        """Whether the weight is stored [in, out]: embeddings, GPT-2's Conv1D, some experts."""
        if kinds[0].startswith("embedding"):
            return True
        owner = self._owner(_module(parameter))
        if owner is None:
            return bool(self._config.get("fan_in_fan_out"))
        if wrapped:
            return bool(getattr(owner, "is_transposed", False)) and len(self._shape(parameter)) == 3
        return type(owner).__name__ == "Conv1D"

    def _owner(self, module: str) -> Any:
        """The module in memory; None without one."""
        with suppress(AttributeError):
            return self._model and self._model.get_submodule(module)
        return None

    def _add(
        self, parameter: str, low_rank: LowRank, factors: Mapping[str, str], transposed: bool
    ) -> str | None:
        """Enter what is added to a parameter; what keeps it from being merged."""
        pieces = self._pieces_of(parameter)
        start = taken(self._config)
        magnitude = factors.get("magnitude_vector")
        if self._config.get("use_dora") and not magnitude:
            return "its lora_magnitude_vector is missing"
        if start and transposed:
            return f"init_lora_weights {start!r} of a transposed weight can't be merged; {MERGE}"
        parts = [(piece.tensor, _within(low_rank, piece)) for piece in pieces]
        whole = len(pieces) == 1 and _is_whole(pieces[0])
        if not all(part for _, part in parts) or ((start or magnitude) and not whole):
            self._elsewhere.append(parameter)
            return None
        for tensor, part in parts:
            before = self.updates.get(tensor, Update())
            self.updates[tensor] = replace(
                before,
                low_ranks=(*before.low_ranks, *([part] if part else [])),
                taken=start,
                magnitude=self._stored[magnitude] if magnitude else None,
                by_row=not transposed,
                columns=low_rank.columns,
            )
        if bias := factors.get("B.bias"):
            return self._add_bias(f"{_module(parameter)}.bias", bias, low_rank.scale)
        return None

    def _add_bias(self, parameter: str, key: str, number: float) -> str | None:
        at = self._stored[key]
        if not self._config.get("lora_bias"):
            self._passed_over.append(key)
            return None
        if not self._known(parameter) or self._shape(parameter) != at.shape:
            return f"{key} changes a bias, which {self._name} doesn't have"
        (piece, *more) = self._pieces_of(parameter)
        if more or self.tensors[piece.tensor].shape != at.shape:
            self._elsewhere.append(parameter)
            return None
        left = Strided(at, 0, (1, at.numel, 1), (at.numel, 1, 1))
        self.updates[piece.tensor] = Update((LowRank(left, None, number),), columns=1)
        return None

    # Trained rows

    def _replace_rows(self, module: str, key: str) -> None:
        parameter, at = f"{module}.weight", self._stored[key]
        rows = token_rows(self._config, module)
        if not self._known(parameter) or len(self._pieces_of(parameter)) != 1:
            self._fits_nothing(key)
            return
        (piece,) = self._pieces_of(parameter)
        shape = self._shape(parameter)
        if rows is None or at.shape != (len(rows), *shape[1:]) or piece.shape != shape:
            self.problems.append(f"{key} is {list(at.shape)}, adapter_config.json says rows {rows}")
        elif rows and not 0 <= min(rows) <= max(rows) < shape[0]:
            self.problems.append(
                f"{key}: {parameter} has rows 0 to {shape[0] - 1}, not {max(rows)}"
            )
        else:
            before = self.updates.get(piece.tensor, Update())
            self.updates[piece.tensor] = replace(
                before, rows=tuple(rows), values=at, columns=shape[1]
            )

    # Where a parameter lies

    def _shape(self, parameter: str) -> tuple[int, ...]:
        if parameter in self._pieces:
            return tuple(
                max(high for _, high in axis)
                for axis in zip(*(piece.box for piece in self._pieces[parameter]), strict=True)
            )
        return self.tensors[parameter].shape

    def _pieces_of(self, parameter: str) -> tuple[Piece, ...]:
        if parameter in self._pieces:
            return self._pieces[parameter]
        shape = self.tensors[parameter].shape
        box = tuple((0, size) for size in shape)
        return (Piece(parameter, shape, box, (0,) * len(shape), tuple(range(len(shape)))),)


def _first(listed: Sequence[str]) -> str:
    return listed[0] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _is_whole(piece: Piece) -> bool:
    """Whether a parameter is one stored tensor as it is."""
    whole = tuple((0, size) for size in piece.shape)
    return piece.axes == tuple(range(len(piece.shape))) and piece.box == whole


def _within(low_rank: LowRank, piece: Piece) -> LowRank | None:
    """What is added to a stored tensor, of what is added to the parameter that it is a piece of.

    None where the piece is not consecutive whole rows of the stored tensor.
    """
    shape, axes = piece.shape, piece.axes
    if _is_whole(piece):
        return low_rank
    *experts, (row, last_row), (column, last_column) = piece.box
    *expert_axes, row_axis, column_axis = axes
    (expert, last_expert), *other = experts or [(0, 1)]
    if other or low_rank.right is None or row_axis is None or column_axis is None:
        return None
    number, rows, columns = last_expert - expert, last_row - row, last_column - column
    left = low_rank.left.at(0, expert, number).at(1, row, rows)
    right = low_rank.right.at(0, expert, number).at(2, column, columns)
    if row_axis > column_axis:
        left, right = right.transposed, left.transposed
        row_axis, column_axis, rows, columns = column_axis, row_axis, columns, rows
    strides = _strides(shape)
    consecutive: list[tuple[int | None, int]] = [(column_axis, 1), (row_axis, columns)]
    if number > 1:
        consecutive += [(axis, rows * columns) for axis in expert_axes]
    if any(axis is None or strides[axis] != stride for axis, stride in consecutive):
        return None
    first = sum(index * stride for index, stride in zip(piece.origin, strides, strict=True))
    return LowRank(left, right, low_rank.scale, first)


def _part(piece: Piece, at: Location, shape: Sequence[int]) -> Stored | None:
    """The stored tensor that is a piece of a parameter, out of the whole parameter.

    None where it is not consecutive elements of it, nor a matrix transposed.
    """
    sizes = [high - low for low, high in piece.box]
    if math.prod(sizes) != math.prod(piece.shape):
        return None
    strides = _strides(shape)
    used = [axis for axis, size in enumerate(sizes) if size > 1]
    expected = math.prod(sizes)
    for axis in used:
        expected //= sizes[axis]
        if strides[axis] != expected:
            return None
    first = sum(low * stride for (low, _), stride in zip(piece.box, strides, strict=True))
    stored_axes = [piece.axes[axis] for axis in used]
    if stored_axes == sorted(axis for axis in stored_axes if axis is not None):
        return part_of(at, first, piece.shape)
    if len(used) != 2 or None in stored_axes:
        return None
    return Transposed(part_of(at, first, (sizes[used[0]], sizes[used[1]])))

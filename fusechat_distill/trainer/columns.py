"""The token columns of a training dataset, checked, cut and packed together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl import SFTConfig
from trl.data_utils import pack_dataset

TOKENS = ("input_ids", "labels")
TARGETS = ("fusion_ids", "fusion_probs")

# Rows per block: with 2,048 tokens and k = 64, 130 MB of ids and as much of probabilities.
_BATCH = 250
# How far a row's sum may exceed 1 by rounding (fp16 storage, many small entries).
_MASS_TOLERANCE = 1e-3


def prepare_dataset(
    dataset: Dataset, args: SFTConfig, *, packing: bool, vocab_size: int, name: str
) -> Dataset:
    """Prepare all four columns as TRL prepares tokenised rows.

    Rows are cut to `args.max_length`, or packed by `args.packing_strategy`; rows without a label
    after the cut are dropped. The order of the steps, and so every batch, is the same as TRL's.
    Targets that the loss ignores (row 0, label −100) are set to zero, because packing in `wrapped`
    style may move a row 0 into the middle of a sequence. Targets may be nested, k numbers for each
    token, or flat; those of a prepared row are flat, [tokens · k].

    Args:
        dataset: rows with `input_ids`, `labels`, `fusion_ids` and `fusion_probs`.
        vocab_size: of the model.
        name: the dataset's name in error messages.

    Raises:
        ValueError: lengths that differ between columns, ids outside [0, vocab_size), probabilities
            that are negative, not finite or add up to more than 1; the message names the row.
    """
    if packing and args.max_length is None:
        raise ValueError("When packing is enabled, `max_length` can't be `None`.")
    if "seq_lengths" in dataset.column_names:
        return dataset  # already packed
    dataset = dataset.select_columns([*TOKENS, *TARGETS]).with_format("arrow")
    dataset = dataset.map(
        _prepare_rows,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        fn_kwargs={
            "width": _width(dataset),
            "vocab_size": vocab_size,
            "max_length": None if packing else args.max_length,
            "keep_end": args.truncation_mode == "keep_end",
            "flat": not packing,
            "name": name,
        },
        num_proc=args.dataset_num_proc,
        desc=f"Checking and cutting {name} dataset",
    )
    if packing:
        assert args.max_length is not None
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(
            dataset.with_format(None),
            args.max_length,
            args.packing_strategy,
            {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"},
        )
        dataset = dataset.with_format("arrow").map(
            _flatten_targets,
            batched=True,
            batch_size=_BATCH,
            num_proc=args.dataset_num_proc,
            desc=f"Flattening {name} dataset",
        )
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return dataset.with_format("numpy", columns=list(TARGETS), output_all_columns=True)


def _width(dataset: Dataset) -> int:
    """k: the number of entries of the first row's distributions."""
    first = dataset[:1]
    ids = pc.list_flatten(first["fusion_ids"])
    entries = pc.list_flatten(ids) if pa.types.is_nested(ids.type) else ids
    return max(1, len(entries) // max(1, len(pc.list_flatten(first["input_ids"]))))


def _prepare_rows(
    table: pa.Table,
    indices: list[int],
    *,
    width: int,
    vocab_size: int,
    max_length: int | None,
    keep_end: bool,
    flat: bool,
    name: str,
) -> pa.Table:
    """Check, mask and cut one block of rows; `indices` are their numbers in the dataset.

    Columns are handled as flat arrays over all tokens of the block, [tokens] or [tokens, width].
    """
    columns = {column: _one_array(table[column]) for column in (*TOKENS, *TARGETS)}
    lengths = _lengths(columns["input_ids"])
    # All columns have one entry per token; a flat column of targets has `width` numbers per token.
    for column, array in columns.items():
        nested = column in TOKENS or pa.types.is_nested(array.type.value_type)
        expected = lengths if nested else lengths * width
        different = np.flatnonzero(_lengths(array) != expected)
        if len(different):
            row = int(different[0])
            raise ValueError(
                f"{name} dataset, row {indices[row]}: `{column}` has {_lengths(array)[row]} "
                f"entries but `input_ids` has {lengths[row]}, for which {expected[row]} are needed."
            )
    tokens = {column: _numbers(pc.list_flatten(columns[column])) for column in TOKENS}
    # Tokens that the loss counts: those with a label, except the first of a row.
    starts = np.cumsum(lengths) - lengths
    counted = tokens["labels"] != -100
    counted[starts[lengths > 0]] = False
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    ids, probs = (_entries(columns[column], width, name, column) for column in TARGETS)
    # Whatever is in a row that the loss ignores is neither checked nor used.
    probs = np.where(counted[:, None], probs, 0).astype(np.float32)

    def check(bad: Any, what: str) -> None:
        if bad.any():
            token = int(np.flatnonzero(bad)[0])
            row = int(row_of[token])
            raise ValueError(
                f"{name} dataset, row {indices[row]}, token {token - starts[row]}: {what} "
                f"(fusion_ids {ids[token].tolist()}, fusion_probs {probs[token].tolist()})."
            )

    check((~np.isfinite(probs) | (probs < 0)).any(-1), "a probability is negative or not finite")
    check(probs.sum(-1) > 1 + _MASS_TOLERANCE, "the probabilities add up to more than 1")
    outside = ((probs > 0) & ((ids < 0) | (ids >= vocab_size))).any(-1)
    check(outside, f"a token lies outside the model's vocabulary of {vocab_size}")
    # An entry of probability 0 may have any id, even an invalid one.
    ids = np.where(probs > 0, ids, 0).astype(np.int32)

    # Cut every row to its first, or last, `max_length` tokens.
    if max_length is not None:
        position = np.arange(len(row_of)) - np.repeat(starts, lengths)
        begin = np.repeat(lengths - max_length, lengths)
        kept = position >= begin if keep_end else position < max_length
        # As in TRL, a row without a label after the cut is dropped.
        labelled = np.bincount(row_of[kept & (tokens["labels"] != -100)], minlength=len(lengths))
        kept &= np.repeat(labelled > 0, lengths)
        lengths = np.minimum(lengths, max_length)[labelled > 0]
        tokens = {column: values[kept] for column, values in tokens.items()}
        ids, probs = ids[kept], probs[kept]

    # Back to Arrow: one list per row, of numbers or of `width` numbers per token.
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    arrays = [
        *(pa.array(tokens[column]) for column in TOKENS),
        *(pa.FixedSizeListArray.from_arrays(x.reshape(-1), width) for x in (ids, probs)),
    ]
    lists = [pa.ListArray.from_arrays(offsets, array) for array in arrays]
    prepared = pa.Table.from_arrays(lists, names=[*TOKENS, *TARGETS])
    return _flatten_targets(prepared) if flat else prepared


def _flatten_targets(table: pa.Table) -> pa.Table:
    """Flatten the targets, since Arrow returns nested lists as one Python object per token."""
    for column in TARGETS:
        lists = _one_array(table[column])
        width = lists.type.value_type.list_size
        offsets = pa.array(np.concatenate([[0], np.cumsum(_lengths(lists) * width)]), pa.int32())
        values = pc.list_flatten(pc.list_flatten(lists))
        flat = pa.ListArray.from_arrays(offsets, values)
        table = table.set_column(table.column_names.index(column), column, flat)
    return table


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _lengths(lists: pa.Array) -> np.ndarray:
    return np.asarray(pc.list_value_length(lists).fill_null(0), np.int64)


def _numbers(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _entries(lists: pa.Array, width: int, name: str, column: str) -> np.ndarray:
    """The entries of every token, [tokens, width]."""
    rows: Any = pc.list_flatten(lists)
    if not pa.types.is_nested(rows.type):
        return _numbers(rows).reshape(-1, width)
    if (_lengths(rows) != width).any():
        raise ValueError(
            f"{name} dataset: `{column}` has rows of {sorted(set(_lengths(rows).tolist()))} "
            f"entries; every token needs the same number, {width} as the first one has. Pad "
            "shorter rows with probability 0."
        )
    return _numbers(pc.list_flatten(rows)).reshape(-1, width)

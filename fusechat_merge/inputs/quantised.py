"""Which weights are quantised, and how: what config.json says of them, and what files show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusechat_merge.inputs.checkpoint import Checkpoint, CheckpointError, first_of
from fusechat_merge.inputs.scaled import SCALES, Scaled
from fusechat_merge.inputs.stored import Joined, Location, Stored, Transposed, part_of

Block = tuple[int, int]
"""Rows and columns."""

PLACES = ("quantization_config", "quantization", "compression_config")
"""Keys of a configuration, or of one within it, that say how weights are quantised."""

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOAT8 = {"fp8": [128, 128], "mxfp8": [1, 32]}
"""The methods of FP8 that are read, and their blocks where the configuration gives none."""

_BYTES = ("F8_E4M3", "F8_E5M2")
_PACKED_INT4 = ".weight_packed"
_BLOCKS = (".gate_up_proj_blocks", ".down_proj_blocks")
_COMPRESSED = "compressed-tensors"
_COMPRESSED_FLOAT8 = (("float-quantized", "float", 8), ("naive-quantized", "float", 8))
_INT4 = ("pack-quantized", "int", 4)
_SCALES_OF_WEIGHTS = ("_scale_inv", ".weight_scale", ".qscale_weight", ".weight_zero_point",
                      ".weight_g_idx", ".weight_shape")  # fmt: skip
_SCALES_OF_ACTIVATIONS = ("activation_scale", ".input_scale", ".output_scale", ".qscale_act",
                          ".k_scale", ".v_scale")  # fmt: skip
_PACKED = ("_blocks", "_packed")
_PLAIN = {"BOOL", "F16", "BF16", "F32", "F64", "C64"}
_MAY_BE_CODES = {"U8", "I8", "U16", "I16", "U32", "I32"}
_DEQUANTISERS = ("scale", "zero", "absmax", "scb", "codebook", "centroid", "quant")
"""Parts of the names of what turns codes into numbers."""

_COMMANDS = {
    "bitsandbytes": 'python -c "import sys, transformers as t; m, o = sys.argv[1:]; '
    "t.AutoModelForCausalLM.from_pretrained(m).dequantize()"
    '.save_pretrained(o, save_original_format=False)" MODEL NEW_FOLDER',
}
"""Commands that write the dequantised checkpoint, by the method's name."""


def schemes(config: Any) -> Iterator[tuple[list[Any], Any]]:
    """Every place in a `config.json` that says how weights are quantised, and what it says."""
    inner: list[tuple[list[Any], Any]] = [([], config)]
    while inner:
        path, data = inner.pop()
        if isinstance(data, list):
            inner += (([*path, number], item) for number, item in enumerate(data))
        for key, value in data.items() if isinstance(data, dict) else ():
            if key in PLACES and value:
                yield [*path, key], value
            else:
                inner.append(([*path, key], value))


def methods_of(config: Any) -> list[str]:
    """The names of the ways in which a `config.json` says that weights are quantised."""
    return list(dict.fromkeys(_method(path[-1], scheme) for path, scheme in schemes(config)))


def dequantised(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """A checkpoint whose tensors are the weights, whatever the files hold in their place.

    Which tensors are quantised is told by the files; the configuration says how.

    Args:
        checkpoint: with the tensors of its files.
        config: its `config.json`.

    Raises:
        CheckpointError: its configuration, or a tensor, says that they are quantised, in a way that
            can't be read here.
    """
    found = list(schemes(config))
    methods, problems = [], []
    for path, scheme in found:
        method = _method(path[-1], scheme)
        blocks = _blocks(method, scheme)
        if blocks is None:
            problems.append(_refusal(checkpoint.name, method))
        else:
            methods.append((method, blocks))
    tensors = checkpoint.tensors
    if methods and not problems:
        blocks = list(dict.fromkeys(block for _, blocks in methods for block in blocks))
        tensors, unread = _weights(tensors, blocks, _dtype(config))
        problems = first_of([f"{checkpoint.name}: {problem}" for problem in unread])
    codes = _codes(tensors)
    if codes and not problems:
        dtypes = ", ".join(sorted({tensors[name].dtype for name in codes}))
        problems = [_refusal(checkpoint.name, f"{dtypes}, {codes[0]} for one")]
    if problems:
        raise CheckpointError(problems)
    how = ", ".join(f"{method}{_text(blocks)}" for method, blocks in methods)
    return replace(checkpoint, tensors=tensors, quantised=how and f"{how}, as {_dtype(config)}")


def _text(blocks: Sequence[Block]) -> str:
    sizes = ", ".join(f"{rows}x{columns}" for rows, columns in blocks)
    return f" (blocks of {sizes})" if sizes else ""


def _dtype(config: Any) -> str:
    """What transformers dequantises to: the model's dtype, safetensors' name."""
    inner = config.get("text_config") if isinstance(config, dict) else None
    for settings in (config, inner):
        of_model = isinstance(settings, dict) and (
            settings.get("dtype") or settings.get("torch_dtype")
        )
        name = of_model or ""
        if isinstance(name, str) and name in _DTYPES:
            return _DTYPES[name]
    return "BF16"


def _method(key: str | int, scheme: Any) -> str:
    """What the way of quantising is called."""
    if not isinstance(scheme, dict):
        return f"{scheme}"[:80]
    if scheme.get("load_in_4bit") or scheme.get("load_in_8bit"):
        return "bitsandbytes"
    method = scheme.get("quant_method")
    if method is None and key == "compression_config":
        method = _COMPRESSED
    if method is None:
        return "MLX" if {"bits", "group_size"} <= scheme.keys() else "in an unknown way"
    name = f"{method}"[:80].removesuffix("_4bit").removesuffix("_8bit")
    layout = scheme.get("format")
    return f"{name} {layout}"[:80] if name == _COMPRESSED and layout else name


def _blocks(method: str, scheme: Any) -> list[Block] | None:
    """The blocks that share a scale, besides rows and whole matrices; None: can't be read here."""
    if not isinstance(scheme, dict):
        return None
    if method in _FLOAT8:
        size = scheme.get("weight_block_size", _FLOAT8[method])
        return [] if size is None else _sizes([size])
    if method == "mxfp4":
        return [(1, 32)]
    if not method.startswith(_COMPRESSED):
        return None
    groups, sparsity = scheme.get("config_groups"), scheme.get("sparsity_config") or {}
    if not isinstance(groups, dict) or not isinstance(sparsity, dict) or not groups:
        return None
    if scheme.get("transform_config") or sparsity.get("format", "dense") != "dense":
        return None
    sizes: list[Any] = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return None
        layout = group.get("format") or scheme.get("format")
        kind = (layout, weights.get("type"), weights.get("num_bits"))
        if kind == _INT4:
            # Without a status, the format's own reader takes the weights as not packed yet.
            packed = scheme.get("quantization_status") in ("compressed", "frozen")
            if not (packed and weights.get("symmetric", True)) or weights.get("actorder"):
                return None
        elif kind not in _COMPRESSED_FLOAT8:
            return None
        strategy = weights.get("strategy")
        if strategy == "block":
            sizes.append(weights.get("block_structure"))
        elif strategy == "group":
            sizes.append([1, weights.get("group_size")])
        elif strategy not in ("tensor", "channel"):
            return None
    return _sizes(sizes)


def _sizes(sizes: Sequence[Any]) -> list[Block] | None:
    for size in sizes:
        if not (
            isinstance(size, list)
            and len(size) == 2
            and all(type(n) is int and n > 0 for n in size)
        ):
            return None
    return [(rows, columns) for rows, columns in sizes]


def _weights(
    tensors: Mapping[str, Stored], blocks: Sequence[Block], dtype: str
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors with weights in the place of codes and scales, and what can't be read."""
    weights: dict[str, tuple[str, Stored]] = {}
    consumed: set[str] = set()
    problems = []
    for name, at in tensors.items():
        if name.endswith(_BLOCKS) and at.dtype == "U8":
            scales = f"{name.removesuffix('_blocks')}_scales"
            weight = _experts(at, tensors.get(scales), dtype)
        elif name.endswith(_PACKED_INT4) and at.dtype == "I32":
            scales = f"{name.removesuffix('_packed')}_scale"
            weight = _packed(at, tensors.get(scales), blocks, dtype)
            consumed.add(f"{name.removesuffix('_packed')}_shape")
        elif at.dtype in _BYTES:
            scales = next((n for n in _names_of_scales(name) if n in tensors), "")
            weight = _scaled(at, tensors.get(scales), blocks, dtype)
        else:
            continue
        if weight is None:
            which = f"{scales}, {list(tensors[scales].shape)}" if scales in tensors else "none"
            problems.append(f"{name} of {at.dtype} {list(at.shape)} has no fitting scales: {which}")
            continue
        weight_name = name.removesuffix("_blocks").removesuffix("_packed")
        if weight_name != name and weight_name in tensors:
            problems.append(f"{name} stands beside {weight_name}: one of them has to go")
        weights[name] = weight_name, weight
        consumed.add(scales)
    problems += [
        f"{name} belongs to no weight that is quantised"
        for name in tensors
        if name not in consumed and name.endswith(_SCALES_OF_WEIGHTS)
    ]
    plain = dict(
        weights.get(name, (name, at))
        for name, at in tensors.items()
        if name not in consumed and not name.endswith(_SCALES_OF_ACTIVATIONS)
    )
    return plain, problems


def _names_of_scales(name: str) -> Iterator[str]:
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name.endswith(".weight"):
        yield f"{name.removesuffix('weight')}qscale_weight"


def _scaled(
    at: Stored, scales: Stored | None, blocks: Sequence[Block], dtype: str
) -> Scaled | None:
    """Codes of a byte with their scales; None if these have no shape or dtype that is known."""
    if not (isinstance(at, Location) and isinstance(scales, Location)) or len(at.shape) < 2:
        return None
    block = _block(at.shape, scales, blocks)
    return block and Scaled(at, at.dtype, scales, at.shape, block, dtype)


def _packed(
    at: Stored, scales: Stored | None, blocks: Sequence[Block], dtype: str
) -> Scaled | None:
    """Words of eight codes, [rows, columns / 8], with their scales."""
    if not (isinstance(at, Location) and isinstance(scales, Location)) or len(at.shape) != 2:
        return None
    shape = (at.shape[0], 8 * at.shape[1])
    block = _block(shape, scales, blocks)
    codes = replace(at, dtype="U8", shape=(at.shape[0], 4 * at.shape[1]))
    return block and Scaled(codes, "I4", scales, shape, block, dtype)


def _block(shape: tuple[int, ...], scales: Location, blocks: Sequence[Block]) -> Block | None:
    """The block of each scale; None where the scales are none for a tensor of this shape."""
    if scales.dtype not in SCALES or 0 in shape:
        return None
    rows, columns = shape[-2:]
    if scales.numel == 1:
        return rows, columns
    for high, wide in (*blocks, (1, columns), (rows, columns)):
        grid = (-(-rows // high), -(-columns // wide))
        if scales.shape == (*shape[:-2], *grid):
            return high, wide
    return None


def _experts(at: Stored, scales: Stored | None, dtype: str) -> Stored | None:
    """Experts' blocks of MXFP4, [experts, rows, blocks, 16], as transformers has them in memory.

    Returns:
        [experts, 32 · blocks, rows]; None if the scales don't fit.
    """
    if not (isinstance(at, Location) and isinstance(scales, Location)) or len(at.shape) != 4:
        return None
    experts, rows, number, nbytes = at.shape
    if nbytes != 16 or 0 in at.shape or (scales.dtype, scales.shape) != ("U8", at.shape[:-1]):
        return None
    each = rows * number
    matrices = []
    for expert in range(experts):
        codes = part_of(at, expert * each * nbytes, (rows, number * nbytes))
        exponents = part_of(scales, expert * each, (rows, number))
        assert isinstance(codes, Location)
        assert isinstance(exponents, Location)
        matrix = Scaled(codes, "F4", exponents, (rows, 32 * number), (1, 32), dtype)
        matrices.append(Transposed(matrix))
    return Joined(tuple(matrices), (experts, 32 * number, rows))


def _refusal(name: str, how: str) -> str:
    command = f", or write one: {_COMMANDS[how]}" if how in _COMMANDS else ""
    return (
        f"{name}: its weights are quantised ({how}), which can't be read here; merge the"
        f" checkpoint that they were quantised from{command}"
    )


def _codes(tensors: Mapping[str, Stored]) -> list[str]:
    """The tensors whose elements are no numbers of their own, by dtypes and names."""
    inside: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        module, _, last = name.rpartition(".")
        inside[module].append(last.lower())
    scaled = {
        module
        for module, names in inside.items()
        if any(part in name for name in names for part in _DEQUANTISERS)
    }
    codes = []
    for name, at in tensors.items():
        module, _, last = name.rpartition(".")
        if at.dtype in _PLAIN:
            continue
        whole = at.dtype[0] in "UI"
        matrix = len(at.shape) > 1
        if not whole or (
            matrix
            and (
                last == "weight"
                or last.endswith(_PACKED)
                or (at.dtype in _MAY_BE_CODES and module in scaled)
            )
        ):
            codes.append(name)
    return codes

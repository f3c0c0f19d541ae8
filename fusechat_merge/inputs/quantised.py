"""Whether weights are quantised: what config.json says of them, and what the files show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from fusechat_merge.inputs.checkpoint import Checkpoint, CheckpointError
from fusechat_merge.inputs.stored import Stored

PLACES = ("quantization_config", "quantization", "compression_config")
"""Keys of a configuration, or of one within it, that say how weights are quantised."""

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


def schemes(config: Any) -> Iterator[tuple[list[str], Any]]:
    """Every place in a `config.json` that says how weights are quantised, and what it says."""
    inner: list[tuple[list[str], Any]] = [([], config)]
    while inner:
        path, data = inner.pop()
        if isinstance(data, list):
            inner += ((path, item) for item in data)
        for key, value in data.items() if isinstance(data, dict) else ():
            if key in PLACES and value:
                yield [*path, key], value
            else:
                inner.append(([*path, key], value))


def check_plain(checkpoint: Checkpoint, config: Any) -> None:
    """Refuse quantised weights.

    Args:
        checkpoint: with the tensors of its files.
        config: its `config.json`.

    Raises:
        CheckpointError: its configuration, or a tensor, says that they are quantised.
    """
    methods = dict.fromkeys(_method(path[-1], scheme) for path, scheme in schemes(config))
    problems = [_refusal(checkpoint.name, method) for method in methods]
    if not problems:
        codes = _codes(checkpoint.tensors)
        if codes:
            dtypes = ", ".join(sorted({checkpoint.tensors[name].dtype for name in codes}))
            problems = [_refusal(checkpoint.name, f"{dtypes}, {codes[0]} for one")]
    if problems:
        raise CheckpointError(problems)


def _method(key: str, scheme: Any) -> str:
    """What the way of quantising is called."""
    if not isinstance(scheme, dict):
        return f"{scheme}"[:80]
    if scheme.get("load_in_4bit") or scheme.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_method" in scheme:
        return f"{scheme['quant_method']}"[:80].removesuffix("_4bit").removesuffix("_8bit")
    if key == "compression_config":
        return "compressed-tensors"
    return "MLX" if {"bits", "group_size"} <= scheme.keys() else "in an unknown way"


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
            matrix and (last == "weight" or (at.dtype in _MAY_BE_CODES and module in scaled))
        ):
            codes.append(name)
    return codes

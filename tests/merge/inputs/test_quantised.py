"""Quantised checkpoints: read as transformers dequantises them, or refused by name."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fusechat_merge import plan
from fusechat_merge.inputs.stored import ITEM_BITS
from tests.support.merging import change_json, configuration

UP = "model.layers.0.mlp.up_proj.weight"
PLAIN = {"F16", "BF16", "F32", "F64", "BOOL", "C64"}
METHODS = sorted({n.removesuffix("_4bit").removesuffix("_8bit") for n in AUTO_QUANTIZER_MAPPING})


def add_tensors(folder: Path, more: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Zeros of any dtype and shape, under new names or in the place of others."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:end]), raw[end:]
    tensors = {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"} | more
    entries, out = {}, b""
    for name, (dtype, shape) in tensors.items():
        nbytes = reduce(int.__mul__, shape, 1) * ITEM_BITS[dtype] // 8
        begin, last = header[name]["data_offsets"] if name not in more else (0, 0)
        content = data[begin:last] if name not in more else bytes(nbytes)
        place = [len(out), len(out) + nbytes]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        out += content
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + out)


@pytest.mark.parametrize(
    "place",
    [
        "quantization_config",
        "text_config.quantization_config",
        "thinker_config.text_config.quantization_config",
        "quantization",
        "compression_config",
    ],
)
def test_every_method_of_transformers_is_refused_by_name_in_every_place(paths, place):
    for method in [*METHODS, "modelopt"]:
        *nested, key = place.split(".")
        config = {key: {"quant_method": method}}
        for name in reversed(nested):
            config = {name: config}
        change_json(paths[1] / "config.json", **config)
        problems = plan(configuration(paths)).problems
        assert any(f"t0: its weights are quantised ({method})" in p for p in problems), problems


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ({"quantization": {"group_size": 32, "bits": 4}}, "MLX"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 4}}, "in an unknown way"),
        ({"quantization_config": "gptq"}, "gptq"),
    ],
)
def test_methods_that_have_another_key_for_their_name(paths, scheme, method):
    change_json(paths[1] / "config.json", **scheme)
    (problem,) = plan(configuration(paths)).problems
    assert f"its weights are quantised ({method})" in problem
    assert ("save_original_format=False" in problem) == (method == "bitsandbytes")


@pytest.mark.parametrize("dtype", ITEM_BITS)
@pytest.mark.parametrize("names", [(UP,), (f"{UP[:-7]}.W_q", f"{UP[:-7]}.scale")])
def test_weights_of_every_dtype_without_a_word_in_the_configuration(paths, dtype, names):
    shapes = {names[0]: (dtype, (48, 32))} | dict.fromkeys(names[1:], ("F32", (48, 1)))
    for path in paths:
        add_tensors(path, shapes)
    problems = plan(configuration(paths)).problems
    refused = [p for p in problems if f"quantised ({dtype}, {names[0]} for one)" in p]
    # Wide integers are positions, say, unless they stand in the place of a weight.
    plain = dtype in PLAIN or (dtype in ("I64", "U64") and names[0] != UP)
    assert len(refused) == (0 if plain else len(paths)), problems

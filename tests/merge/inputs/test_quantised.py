"""Quantised checkpoints: read as transformers dequantises them, or refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fusechat_merge import plan
from fusechat_merge.engine.execute import merge
from fusechat_merge.inputs.scaled import SCALES, Scaled
from fusechat_merge.inputs.stored import ITEM_BITS, Location
from tests.support.families import FAMILIES
from tests.support.merging import Tensors, assert_same, change_json, configuration, read, rewrite
from tests.support.tensors import same_bits

UP = "model.layers.0.mlp.up_proj.weight"
PLAIN = {"F16", "BF16", "F32", "F64", "BOOL", "C64"}
READ = {"fp8", "mxfp8"}
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
    for method in [*sorted(set(METHODS) - READ), "modelopt"]:
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
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors int-quantized"),
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


def float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes, and what to multiply them with: the last blocks may be smaller."""
    rows, columns = weight.shape
    high, wide = (min(a, b) for a, b in zip(block, weight.shape, strict=True))
    padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // high, high, -1, wide)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn), scales


def times(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight that they stand for, one element after the other in float64."""
    rows, columns = codes.shape
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (codes.double() * spread[:rows, :columns]).float().bfloat16()


HUGE = 256
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def compressed(strategy: str, **more: object) -> dict[str, object]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": groups}  # fmt: skip


FLOAT8 = {
    "blocks": (FP8 | {"weight_block_size": [16, 8]}, (16, 8), "_scale_inv"),
    "whole": (STATIC, (HUGE, HUGE), "_scale_inv"),
    "exponents": (FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 8]}, (1, 8),
                  "_scale_inv"),
    "ends": (FP8 | {"weight_block_size": [20, 20]}, (20, 20), "_scale_inv"),
    "rows": (compressed("channel"), (1, HUGE), "_scale"),
    "tensor": (compressed("tensor"), (HUGE, HUGE), "_scale"),
    "groups": (compressed("group", group_size=8), (1, 8), "_scale"),
}  # fmt: skip
"""What config.json says, the blocks of a scale, and the ending of the scales' names."""


def write_float8(plain: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    """A pico model with its matrices in FP8; returns what its files stand for."""
    scheme, block, ending = FLOAT8[kind]
    tensors, expected = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "proj.weight" not in name or "layers" not in name or "vision" in name:
            tensors[name] = expected[name] = weight
            continue
        codes, scales = float8(weight.float(), block)
        if kind == "exponents":
            scales = (scales.log2().ceil() + 127).to(torch.uint8)
            codes = weight / times(torch.ones_like(codes), 2.0 ** (scales.double() - 127), block)
            codes = codes.to(torch.float8_e4m3fn)
        if kind == "whole":
            scales = scales[0, 0]
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
        tensors |= {name: codes, name + ending: scales}
        numbers = 2.0 ** (scales.double() - 127) if kind == "exponents" else scales
        expected[name] = times(codes, numbers.reshape(-1, 1) if not scales.ndim else numbers, block)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def write_plain(family: str, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    FAMILIES[family].build().bfloat16().save_pretrained(folder)
    return folder


def copy(folder: Path, out: Path) -> Path:
    """The model alone, as a merge writes it."""
    only = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    return merge({"merge_method": "linear", "models": only}, out)


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("family", ["Qwen3 (tied head)", "DeepSeek-V3", "Mistral 3"])
def test_float8_is_read_as_transformers_does(tmp_path, family, kind):
    plain = write_plain(family, tmp_path / "plain", 0)
    expected = write_float8(plain, tmp_path / "quantised", kind)
    out = copy(tmp_path / "quantised", tmp_path / "out")
    assert_same(read(out), expected)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "Quantised, their weights dequantised" in (out / "README.md").read_text()
    if kind in ("ends", "rows", "tensor", "groups"):
        return  # transformers refuses blocks that don't fit, and needs another package
    import transformers

    cls = getattr(transformers, FAMILIES[family].model)
    settings = FineGrainedFP8Config(dequantize=True)
    theirs = cls.from_pretrained(tmp_path / "quantised", quantization_config=settings)
    assert_same(cls.from_pretrained(out).state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "varm"},
        {"method": "varm", "parameters": {"granularity": "layer"}},
        {"method": "fusechat_sce", "parameters": {"select_topk": 0.3}},
        {"method": "task_arithmetic", "parameters": {"weight": 0.5}},
        {"method": "ties", "parameters": {"weight": 0.5, "density": 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantised", [(0,), (1, 2), (0, 1)])
def test_quantised_and_plain_models_in_one_merge(tmp_path, settings, quantised):
    plain, mixed = [], []
    for number in range(3):
        folder = write_plain("DeepSeek-V3", tmp_path / f"model{number}", number)
        plain.append(folder)
        mixed.append(folder)
        if number in quantised:
            mixed[-1] = tmp_path / f"quantised{number}"
            write_float8(folder, mixed[-1], "blocks")
            plain[-1] = copy(mixed[-1], tmp_path / f"dequantised{number}")
    expected = merge(configuration(plain, **settings), tmp_path / "expected")
    out = merge(configuration(mixed, **settings), tmp_path / "out", memory=1 << 25)
    assert_same(read(out), read(expected))
    assert (out / "config.json").read_text() == (expected / "config.json").read_text()


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(f"{UP}_scale_inv"),
         f"{UP} of F8_E4M3 [48, 32] has no fitting scales: none that is known"),
        (lambda t: t.update({f"{UP}_scale_inv": t[f"{UP}_scale_inv"][:2]}),
         f"{UP} of F8_E4M3 [48, 32] has no fitting scales: {UP}_scale_inv, [2, 4]"),
        (lambda t: t.update({UP: t[UP].to(torch.bfloat16)}),
         f"{UP}_scale_inv belongs to no weight that is quantised"),
        (lambda t: t.update({UP: t.pop(f"{UP}_scale_inv").to(torch.int8)}),
         f"its weights are quantised (I8, {UP} for one)"),
    ],
)  # fmt: skip
def test_codes_and_scales_that_do_not_fit(tmp_path, edit, message):
    plain = write_plain("Qwen3 (tied head)", tmp_path / "plain", 0)
    write_float8(plain, tmp_path / "quantised", "blocks")
    rewrite(tmp_path / "quantised", edit)
    problems = plan(configuration([plain, tmp_path / "quantised"])).problems
    assert any(message in problem for problem in problems), problems


def test_any_range_of_any_grid_and_dtype():
    """What lies across pieces, matrices and ends of blocks, against float64."""
    torch.manual_seed(0)
    for shape, block, scale in (
        ((2, 300, 260), (128, 128), "F32"),
        ((3, 7, 9), (3, 4), "BF16"),
        ((2, 40_000), (1, 1 << 14), "F16"),
        ((70, 3), (1, 3), "F8_E8M0"),
    ):
        grid = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
        codes = torch.randn(shape).to(torch.float8_e5m2)
        scales = (torch.rand(*shape[:-2], *grid) + 0.5).to(SCALES[scale])
        raw = bytes(codes.view(torch.uint8).numpy()) + bytes(scales.view(torch.uint8).numpy())
        stored = Scaled(
            Location("f", 0, codes.numel(), "F8_E5M2", shape),
            Location("f", codes.numel(), scales.nbytes, scale, tuple(scales.shape)),
            shape, block, "F32",
        )  # fmt: skip
        high, wide = block
        spread = scales.float().repeat_interleave(high, -2).repeat_interleave(wide, -1)
        right = (codes.double() * spread[..., : shape[-2], : shape[-1]]).float().view(-1)

        def read_at(file: str, offset: int, into: memoryview, raw: bytes = raw) -> None:
            into[:] = raw[offset : offset + into.nbytes]

        chance = random.Random(0)
        for _ in range(40):
            first = chance.randrange(len(right))
            count = chance.randint(1, min(len(right) - first, 1 << 17))
            found = torch.empty(count)
            stored.read(read_at, first, found.view(torch.uint8).numpy().data)
            assert same_bits(found, right[first : first + count])

"""Quantised checkpoints: read as transformers dequantises them, or refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, GptOssForCausalLM, Mxfp4Config, Qwen3MoeForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fusechat_common.errors import RequestError
from fusechat_merge import plan
from fusechat_merge.engine.execute import merge
from fusechat_merge.inputs.scaled import SCALES, Scaled
from fusechat_merge.inputs.stored import ITEM_BITS, Location, Stored, Transposed
from tests.support.families import FAMILIES
from tests.support.merging import (
    Tensors,
    assert_same,
    change_json,
    configuration,
    read,
    rewrite,
    run_mergekit,
)
from tests.support.tensors import same_bits

UP = "model.layers.0.mlp.up_proj.weight"
PLAIN = {"F16", "BF16", "F32", "F64", "BOOL", "C64"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
READ = {"fp8", "mxfp8", "mxfp4"}
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
        ({"vision": [{"quantization_config": "fp8"}]}, "fp8"),
        ({"quantization_config": FP8 | {"weight_block_size": [128]}}, "fp8"),
        ({"quantization_config": FP8 | {"weight_block_size": [0, "128"]}}, "fp8"),
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


DTYPE_OF = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
HUGE = 256
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
    made = FAMILIES[family]
    if family == "gpt-oss":  # in whole blocks of 32
        made = replace(made, settings=made.settings | {"intermediate_size": 64})
    made.build().bfloat16().save_pretrained(folder)
    return folder


def copy(folder: Path, out: Path) -> Path:
    """The model alone, as a merge writes it."""
    return merge({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, out)


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


def write_mxfp4(plain: Path, folder: Path, low: int = 1, high: int = 250) -> None:
    """gpt-oss as released: every code, and exponents from `low` to below `high`."""
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        experts, columns, rows = weight.shape
        blocks = (experts, rows, columns // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(low, high, blocks[:-1], dtype=torch.uint8)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


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
@pytest.mark.parametrize("family", ["DeepSeek-V3", "gpt-oss"])
def test_quantised_and_plain_models_in_one_merge(tmp_path, family, settings, quantised):
    plain, mixed = [], []
    for number in range(3):
        folder = write_plain(family, tmp_path / f"model{number}", number)
        plain.append(folder)
        mixed.append(folder)
        if number in quantised:
            mixed[-1] = tmp_path / f"quantised{number}"
            if family == "gpt-oss":
                write_mxfp4(folder, mixed[-1], 118, 124)
            else:
                write_float8(folder, mixed[-1], "blocks")
            plain[-1] = copy(mixed[-1], tmp_path / f"dequantised{number}")
    expected = merge(configuration(plain, **settings), tmp_path / "expected")
    out = merge(configuration(mixed, **settings), tmp_path / "out", memory=1 << 25)
    assert_same(read(out), read(expected))
    assert (out / "config.json").read_text() == (expected / "config.json").read_text()


def test_an_adapter_of_quantised_experts(tmp_path):
    plain = write_plain("gpt-oss", tmp_path / "plain", 0)
    write_mxfp4(plain, tmp_path / "quantised", 118, 124)
    dequantised = copy(tmp_path / "quantised", tmp_path / "dequantised")
    settings = LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = GptOssForCausalLM.from_pretrained(dequantised)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    expected, found = (
        read(merge(configuration([base, tmp_path / "adapter"]), tmp_path / f"of {base.name}"))
        for base in (dequantised, tmp_path / "quantised")
    )
    assert_same(found, expected)


def test_quantised_experts_one_by_one_and_plain_ones_stacked(tmp_path):
    separate = write_plain("Qwen3-MoE", tmp_path / "plain", 0)
    expected = write_float8(separate, tmp_path / "quantised", "blocks")
    target = write_plain("Qwen3-MoE", tmp_path / "target", 1)
    stacked = Qwen3MoeForCausalLM.from_pretrained(target)
    shutil.copytree(target, tmp_path / "stacked")
    save_file(stacked.state_dict(), tmp_path / "stacked" / "model.safetensors", {"format": "pt"})
    half = configuration([tmp_path / "quantised", tmp_path / "stacked"], "task_arithmetic",
                         parameters={"weight": 0.5})  # fmt: skip
    found = read(merge(half, tmp_path / "out"))
    half["base_model"] = str(copy(tmp_path / "quantised", tmp_path / "dequantised"))
    half["models"] = [{"model": str(target)}]
    assert found.keys() == expected.keys()
    assert_same(found, read(merge(half, tmp_path / "expected")))


def test_mergekit_itself_would_merge_the_codes(tmp_path):
    plain = write_plain("Qwen3 (tied head)", tmp_path / "plain", 0)
    write_float8(plain, tmp_path / "quantised", "blocks")
    with pytest.raises(RequestError, match=r"quantised: its weights are quantised \(fp8\)"):
        run_mergekit(
            configuration([plain, tmp_path / "quantised"], dtype="bfloat16"), tmp_path / "out"
        )


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(f"{UP}_scale_inv"),
         f"{UP} of F8_E4M3 [48, 32] has no fitting scales: none"),
        (lambda t: t.update({f"{UP}_scale_inv": t[f"{UP}_scale_inv"][:2]}),
         f"{UP} of F8_E4M3 [48, 32] has no fitting scales: {UP}_scale_inv, [2, 4]"),
        (lambda t: t.update({UP: t[UP].to(torch.bfloat16)}),
         f"{UP}_scale_inv belongs to no weight that is quantised"),
        (lambda t: t.update({f"{UP}_packed": torch.zeros(48, 4, dtype=torch.int32),
                             f"{UP}_scale": torch.ones(48, 1)}),
         f"{UP}_packed stands beside {UP}: one of them has to go"),
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


SHAPES = (
    ((2, 300, 260), (128, 128), "F8_E5M2", "F32"),
    ((3, 7, 9), (3, 4), "F8_E4M3", "BF16"),
    ((2, 40_000), (1, 1 << 14), "F8_E5M2", "F16"),
    ((70, 3), (1, 3), "F8_E4M3", "F8_E8M0"),
    ((400, 1024), (1, 32), "F4", "U8"),
)


@pytest.mark.parametrize(("shape", "block", "coding", "scale"), SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_range_of_any_grid_and_dtype(shape, block, coding, scale, transposed):
    """What lies across pieces, matrices and ends of blocks, against float64."""
    torch.manual_seed(0)
    grid = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
    if coding == "F4":
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
        halves = torch.stack([codes % 16, codes // 16], -1).view(shape)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()[(halves % 8).long()]
        values = torch.where(halves < 8, values, -values)
    else:
        codes = torch.randn(shape).to(getattr(torch, DTYPE_OF[coding]))
        values = codes.double()
    scales = torch.randint(100, 140, (*shape[:-2], *grid), dtype=torch.uint8)
    numbers = 2.0 ** (scales.double() - 127)
    if scale != "U8":
        scales = (torch.rand(scales.shape) + 0.5).to(SCALES[scale])
        numbers = scales.double()
    spread = numbers.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    right = (values * spread[..., : shape[-2], : shape[-1]]).float()
    raw = bytes(codes.view(torch.uint8).numpy()) + bytes(scales.view(torch.uint8).numpy())
    stored: Stored = Scaled(
        Location("f", 0, codes.nbytes, "U8", (codes.nbytes,)), coding,
        Location("f", codes.nbytes, scales.nbytes, scale, tuple(scales.shape)),
        shape, block, "F32",
    )  # fmt: skip
    assert stored.nbytes == len(raw)
    if transposed and len(shape) == 2:
        stored, right = Transposed(stored), right.T
    right = right.reshape(-1)

    def read_at(file: str, offset: int, into: memoryview) -> None:
        into[:] = raw[offset : offset + into.nbytes]

    chance = random.Random(0)
    for _ in range(20):
        first = chance.randrange(len(right))
        found = torch.empty(chance.randint(1, min(len(right) - first, 1 << 17)))
        stored.read(read_at, first, found.view(torch.uint8).numpy().data)
        assert same_bits(found, right[first : first + len(found)])


def test_mxfp4_is_read_as_transformers_does(tmp_path):
    plain = write_plain("gpt-oss", tmp_path / "plain", 0)
    write_mxfp4(plain, tmp_path / "quantised")
    out = copy(tmp_path / "quantised", tmp_path / "out")
    assert set(read(out)) == set(read(plain))
    settings = Mxfp4Config(dequantize=True)
    theirs = GptOssForCausalLM.from_pretrained(tmp_path / "quantised", quantization_config=settings)
    ours, info = GptOssForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(ours.state_dict(), theirs.state_dict())


def write_int4(plain: Path, folder: Path, group: int | None, dtype: torch.dtype) -> Tensors:
    """compressed-tensors' packed codes, as in Kimi K2.5; returns what the files stand for."""
    tensors, expected = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "proj.weight" not in name or "layers" not in name or "vision" in name:
            tensors[name] = expected[name] = weight
            continue
        rows, columns = weight.shape
        block = (1, min(group or columns, columns))
        codes = torch.randint(-8, 8, weight.shape)
        scales = (torch.rand(rows, columns // block[1]) + 0.5).to(dtype)
        words = ((codes + 8).view(rows, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
        tensors[f"{name}_packed"] = (words - (words >> 31 << 32)).to(torch.int32)
        tensors[f"{name}_scale"], tensors[f"{name}_shape"] = scales, torch.tensor(weight.shape)
        expected[name] = times(codes, scales, block)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    scheme = compressed("group" if group else "channel", num_bits=4, type="int", group_size=group)
    config = json.loads((plain / "config.json").read_text())
    inside = config.get("text_config", config)
    inside["quantization_config"] = scheme | {
        "format": "pack-quantized", "quantization_status": "compressed"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("family", ["Qwen3 (tied head)", "DeepSeek-V3", "Kimi K2.5"])
@pytest.mark.parametrize(
    ("group", "dtype"), [(8, torch.bfloat16), (16, torch.float32), (None, torch.float32)]
)
def test_packed_int4_is_code_times_scale(tmp_path, family, group, dtype):
    plain = write_plain(family, tmp_path / "plain", 0)
    expected = write_int4(plain, tmp_path / "quantised", group, dtype)
    out = copy(tmp_path / "quantised", tmp_path / "out")
    assert_same(read(out), expected)
    assert (out / "config.json").read_text() == (
        copy(plain, tmp_path / "same") / "config.json"
    ).read_text()


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ({"symmetric": False}, {}),
        ({"actorder": "group"}, {}),
        ({"num_bits": 3}, {}),
        ({"type": [], "num_bits": {}}, {}),
        ({"strategy": "tensor_group"}, {}),
        ({"group_size": -1}, {}),
        ({}, {"quantization_status": None}),
        ({}, {"format": "marlin-24"}),
        ({}, {"transform_config": {"config_groups": {"u": 1}}}),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}),
    ],
    ids=str,
)
def test_other_kinds_of_compressed_tensors_are_refused(tmp_path, weights, more):
    plain = write_plain("Qwen3 (tied head)", tmp_path / "plain", 0)
    write_int4(plain, tmp_path / "quantised", 16, torch.float32)
    path = tmp_path / "quantised" / "config.json"
    scheme = json.loads(path.read_text())["quantization_config"] | more
    scheme["config_groups"]["group_0"]["weights"] |= weights
    change_json(path, quantization_config=scheme)
    (problem,) = plan(configuration([plain, tmp_path / "quantised"])).problems
    assert f"quantised (compressed-tensors {scheme['format']}), which can't be read here" in problem

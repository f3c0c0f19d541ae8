"""LoRA targets against peft's merge_and_unload, and adapters that are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.planning.planner import plan
from tests.support.checkpoints import PAIR, llama_family, write_adapter
from tests.support.merging import assert_same, configuration, read

F32, BF16 = torch.float32, torch.bfloat16


def adapted(base: Path, adapter: Path, merged: Path, seed: int, **settings: Any) -> None:
    """Write an adapter with random factors, and the model that peft merges it into."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(adapter, save_embedding_layers=False)
    model.merge_and_unload().save_pretrained(merged)


@pytest.fixture
def base(tmp_path):
    return llama_family(tmp_path / "in", (F32,))[0]


def problems(base: Path, adapter: Path) -> list[str]:
    return plan(configuration([base, f"{base}+{adapter}"])).problems


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
        {
            "target_modules": "all-linear",
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ],
)
@pytest.mark.parametrize("method", ["varm", "fusechat_sce", "task_arithmetic"])
def test_as_the_merge_of_merged_checkpoints(tmp_path, base, settings, method):
    adapters, merged = ([tmp_path / f"{kind}{seed}" for seed in (1, 2)] for kind in "am")
    for seed, paths in enumerate(zip(adapters, merged, strict=True), 1):
        adapted(base, *paths, seed, **settings)
    parameters = {"weight": 0.4} if method == "task_arithmetic" else {}
    plain = configuration([base, *merged], method, parameters=parameters)
    models = [base, f"{base}+{adapters[0]}", adapters[1]]
    ours = configuration(models, method, parameters=parameters)
    expected = read(merge(plain, tmp_path / "plain"))
    found = read(merge(ours, tmp_path / "ours"))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert verify(ours, tmp_path / "ours") == []


def test_16_bits_are_rounded_once_and_memory_changes_no_byte(tmp_path):
    (base,) = llama_family(tmp_path / "in", (BF16,), changes={"vocab_size": 5000})
    adapted(base, tmp_path / "a", tmp_path / "m", 1, target_modules=["q_proj", "embed_tokens"])
    config = configuration([base, tmp_path / "a"])
    found = read(merge(config, tmp_path / "one"))
    assert_same(read(merge(config, tmp_path / "two", memory=9 << 20, threads=1)), found)
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    at = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{at}.lora_{x}.weight"].double() for x in "AB")
    exact = read(base)[f"{at}.weight"].double() + 2 * b @ a
    ulp = torch.finfo(BF16).eps * exact.abs() / 2 + 1e-6
    assert bool(((found[f"{at}.weight"].double() - exact).abs() <= ulp).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA (use_dora) can't be merged by blocks; merge_and_unload"),
        ({"bias": "all"}, "bias can't be merged by blocks"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' can't be merged by blocks"),
        ({"r": 0}, "adapter_config.json: r must be a number above 0, not 0"),
        ({"r": "4"}, "adapter_config.json: r must be a number above 0, not '4'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, not nan"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names to numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives 'q_proj' the value 0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no regular expression"),
    ],
)
def test_adapters_that_are_refused(tmp_path, base, changes, message):
    (problem,) = problems(base, write_adapter(tmp_path / "a", **changes))
    assert message in problem


@pytest.mark.parametrize(
    ("file", "renamed", "message"),
    [
        ("adapter_config.json", "x", "a: is no adapter, it holds no adapter_c"),
        ("adapter_model.safetensors", "x", "a: holds no adapter_model.safete"),
        (
            "adapter_model.safetensors",
            "adapter_model.bin",
            "a: its weights are pickled, which can run code; load and save it with peft once",
        ),
    ],
)
def test_folders_that_hold_no_adapter(tmp_path, base, file, renamed, message):
    adapter = write_adapter(tmp_path / "a")
    (adapter / file).rename(adapter / renamed)
    (problem,) = problems(base, adapter)
    assert message in problem


def test_a_damaged_adapter(tmp_path, base):
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(b"abc")
    (problem,) = problems(base, adapter)
    assert "adapter_model.safetensors: 3 bytes is too short for a safetensors file" in problem


STEM = "base_model.model."
A, B = PAIR


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PAIR, None),
        (PAIR | {f"{STEM}odd": torch.ones(3)}, f"{STEM}odd fits no tensor of"),
        (PAIR | {f"{STEM}model.norm.weight": torch.ones(3)}, "model.norm.weight fits no tensor of"),
        (
            PAIR | {B.replace("up", "down"): torch.ones(32, 2)},
            "layers.0.mlp.down_proj.lora_A.weight is missing",
        ),
        ({A: PAIR[A]}, f"{B} is missing"),
        (
            {key.replace("layers.0", "layers.7"): value for key, value in PAIR.items()},
            "the model has no model.layers.7.mlp.up_proj.weight",
        ),
        (PAIR | {A: torch.ones(2, 31)}, "B·A is [48, 31]"),
        (PAIR | {B: torch.ones(48, 3)}, "factors of shape [48, 3] and [2, 32] don't"),
    ],
)
def test_factors_that_fit_nothing(tmp_path, base, tensors, message):
    found = problems(base, write_adapter(tmp_path / "a", tensors))
    assert [message in problem for problem in found] == [True] * (message is not None)

"""LoRA targets against peft's merge_and_unload, and adapters that are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.planning.planner import plan

F32, BF16 = torch.float32, torch.bfloat16
Family = Callable[..., list[Path]]


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


SETTINGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
    {
        "target_modules": "all-linear",
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", ["varm", "fusechat_sce", "task_arithmetic"])
def test_as_the_merge_of_merged_checkpoints(
    tmp_path: Path, llama_family: Family, settings: dict[str, Any], method: str
) -> None:
    (base,) = llama_family(tmp_path / "in", (F32,))
    for seed in (1, 2):
        adapted(base, tmp_path / f"a{seed}", tmp_path / f"m{seed}", seed, **settings)
    weight = {"weight": 0.4} if method == "task_arithmetic" else {}
    config = {"merge_method": method, "base_model": str(base), "parameters": weight}
    adapters = [f"{base}+{tmp_path / 'a1'}", str(tmp_path / "a2")]
    ours = config | {"models": [{"model": model} for model in adapters]}
    plain = config | {"models": [{"model": str(tmp_path / f"m{seed}")} for seed in (1, 2)]}
    expected = load_file(merge(plain, tmp_path / "plain") / "model.safetensors")
    found = load_file(merge(ours, tmp_path / "ours") / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert verify(ours, tmp_path / "ours") == []


def test_16_bits_are_rounded_once_and_memory_changes_no_byte(
    tmp_path: Path, llama_family: Family
) -> None:
    (base,) = llama_family(tmp_path / "in", (BF16,), changes={"vocab_size": 5000})
    adapted(base, tmp_path / "a", tmp_path / "m", 1, target_modules=["q_proj", "embed_tokens"])
    config = {
        "merge_method": "varm",
        "base_model": str(base),
        "models": [{"model": str(tmp_path / "a")}],
    }
    found = load_file(merge(config, tmp_path / "one") / "model.safetensors")
    other = merge(config, tmp_path / "two", memory=9 << 20, threads=1)
    assert {n: t.tolist() for n, t in load_file(other / "model.safetensors").items()} == {
        n: t.tolist() for n, t in found.items()
    }
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    at = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{at}.lora_{x}.weight"].double() for x in "AB")
    exact = weights[f"{at}.weight"].double() + 2 * b @ a
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
def test_adapters_that_are_refused(
    tmp_path: Path, llama_family: Family, changes: dict[str, Any], message: str
) -> None:
    (base,) = llama_family(tmp_path / "in", (F32,))
    adapted(base, tmp_path / "a", tmp_path / "m", 1, target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    config = {"merge_method": "varm", "base_model": str(base)}
    models = [{"model": f"{base}+{tmp_path / 'a'}"}]
    problems = plan(config | {"models": models}).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: (a / "adapter_config.json").unlink(), "a: is no adapter, it holds no adapter_c"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "a: holds no adapter_model.safete"),
        (
            lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
            "a: its weights are pickled, which can run code; load and save it with peft once",
        ),
    ],
)
def test_folders_that_hold_no_adapter(
    tmp_path: Path, llama_family: Family, damage: Callable[[Path], Any], message: str
) -> None:
    (base,) = llama_family(tmp_path / "in", (F32,))
    adapted(base, tmp_path / "a", tmp_path / "m", 1, target_modules=["q_proj"])
    damage(tmp_path / "a")
    models = [{"model": f"{base}+{tmp_path / 'a'}"}]
    (problem,) = plan({"merge_method": "varm", "base_model": str(base), "models": models}).problems
    assert message in problem


def test_an_adapter_of_another_model(tmp_path: Path, llama_family: Family) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.self_attn.q_proj.weight"
        if label == "t0":
            tensors[name] = torch.zeros(8, 32)

    base, other = llama_family(tmp_path / "in", (F32,) * 2, edit=edit)
    adapted(base, tmp_path / "a", tmp_path / "m", 1, target_modules=["q_proj"])
    config = {
        "merge_method": "varm",
        "base_model": str(base),
        "models": [{"model": f"{other}+{tmp_path / 'a'}"}],
    }
    problems = plan(config).problems
    assert any("B·A is [32, 32]" in problem for problem in problems), problems


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
PAIR = {UP.format("A"): torch.ones(2, 32), UP.format("B"): torch.ones(48, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PAIR, None),
        (PAIR | {"base_model.model.odd": torch.ones(3)}, "base_model.model.odd fits no tensor of"),
        (
            PAIR | {"base_model.model.model.norm.weight": torch.ones(3)},
            "model.norm.weight fits no tensor of",
        ),
        (
            PAIR | {UP.format("B").replace("up", "down"): torch.ones(32, 2)},
            "layers.0.mlp.down_proj.lora_A.weight is missing",
        ),
        ({UP.format("A"): PAIR[UP.format("A")]}, f"{UP.format('B')} is missing"),
        (
            {key.replace("layers.0", "layers.7"): value for key, value in PAIR.items()},
            "the model has no model.layers.7.mlp.up_proj.weight",
        ),
        (PAIR | {UP.format("B"): torch.ones(48, 3)}, "factors of shape [48, 3] and [2, 32] don't"),
        (None, "adapter_model.safetensors: 3 bytes is too short for a safetensors file"),
    ],
)
def test_factors_that_fit_nothing(
    tmp_path: Path, llama_family: Family, tensors: dict[str, Tensor] | None, message: str | None
) -> None:
    (base,) = llama_family(tmp_path / "in", (F32,))
    adapter = tmp_path / "a"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    file = adapter / "adapter_model.safetensors"
    if tensors is None:
        file.write_bytes(b"abc")
    else:
        save_file(tensors, file)
    models = [{"model": f"{base}+{adapter}"}]
    problems = plan({"merge_method": "varm", "base_model": str(base), "models": models}).problems
    assert [message in problem for problem in problems] == [True] * (message is not None)

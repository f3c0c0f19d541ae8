"""Adapters as targets: every kind against peft's own merge, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from mergekit.scripts import extract_lora
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForCausalLM,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    Qwen2Config,
)

from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.inputs.adapter import with_adapter
from fusechat_merge.inputs.adapter_config import MERGE
from fusechat_merge.inputs.checkpoint import CheckpointError, Folder, read_checkpoint
from fusechat_merge.planning.planner import plan
from tests.support.checkpoints import PAIR, llama_family, write_adapter
from tests.support.families import FAMILIES
from tests.support.merging import assert_same, change_json, configuration, read, rewrite

F32, BF16 = torch.float32, torch.bfloat16

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, config: Any, auto: Any = AutoModelForCausalLM) -> Path:
    """A model of the real class, as it saves itself."""
    torch.manual_seed(0)
    auto.from_config(config, dtype=F32).save_pretrained(folder)
    return folder


def trained(
    base: Path, adapter: Path, seed: int = 0, auto: Any = AutoModelForCausalLM, **settings: Any
) -> PeftModel:
    """An adapter saved by peft with its defaults, every parameter that trains moved at random."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(auto.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    return model


def merged_by_peft(
    base: Path, adapter: Path, out: Path, auto: Any = AutoModelForCausalLM
) -> dict[str, Tensor]:
    """What peft merges a saved adapter into, as the model saves itself."""
    model = auto.from_pretrained(base)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return read(out)


def assert_same_logits(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ids = torch.arange(12)[None]
    logits = [model.eval()(ids).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors, to 1e-6 of each one's largest value."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        atol = 1e-6 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.fixture
def base(tmp_path):
    return llama_family(tmp_path / "in", (F32,))[0]


def problems(base: Path, adapter: Path) -> list[str]:
    return plan(configuration([base, f"{base}+{adapter}"])).problems


KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias of its modules": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "DoRA": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True},
    "PiSSA": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"},
    "PiSSA and DoRA": {
        "target_modules": ["up_proj"],
        "init_lora_weights": "pissa",
        "use_dora": True,
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "EVA": {"target_modules": ["q_proj"], "init_lora_weights": "eva", "eva_config": EvaConfig()},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "MiCA": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "VeLoRA": {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}},
    "MonteCLoRA": {"target_modules": ["q_proj"], "monteclora_config": MontecloraConfig()},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    "trained tokens of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7], "lm_head": [3, 90]},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_it(tmp_path, kind):
    base = saved(tmp_path / "base", Qwen2Config(**SIZES))
    trained(base, tmp_path / "a", **KINDS[kind])
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft")
    moved = [name for name, tensor in read(base).items() if not expected[name].equal(tensor)]
    assert moved
    assert_close(read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out")), expected)


STACKS = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
MIXERS = {"target_modules": ["in_proj", "q_proj"]}
TARGETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["Gemma 4 MoE", "Llama 4", "Qwen3-Next", "Qwen3.5-MoE", "Qwen3-VL-MoE"], STACKS
    ),
    "gpt-oss": STACKS | {"target_parameters": [*STACKS["target_parameters"], "router.weight"]},
    **dict.fromkeys(["Falcon-H1", "Mamba 2", "Nemotron-H"], MIXERS),
    "LLaVA": {"target_modules": ["q_proj", "patch_embedding", "linear_1"]},
}
"""What is targeted where peft's `all-linear` leaves the experts out, or refuses a module."""


def of_family(name: str, folder: Path) -> tuple[Path, Any]:
    """A checkpoint of a family, and its class."""
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(folder)
    return folder, getattr(transformers, FAMILIES[name].model)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_in_memory_and_tensors_in_files(tmp_path, family):
    base, kind = of_family(family, tmp_path / "base")
    trained(
        base, tmp_path / "a", auto=kind, **TARGETS.get(family, {"target_modules": "all-linear"})
    )
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft", kind)
    before = read(base)
    assert any(not expected[name].equal(tensor) for name, tensor in before.items())
    assert_close(read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out")), expected)


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (HrmTextConfig(**SIZES), ["q_proj", "k_proj", "up_proj"]),  # one tensor of q, k and v
        (
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False),
            ["c_attn", "c_proj", "lm_head"],  # stored [in, out], but for the head
        ),
    ],
)
def test_weights_that_are_stored_otherwise(tmp_path, config, modules):
    base = saved(tmp_path / "base", config)
    trained(base, tmp_path / "a", target_modules=modules)
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft")
    assert_close(read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out")), expected)


def test_a_vision_model_trained_as_a_language_model(tmp_path):
    base, _ = of_family("Qwen3.5", tmp_path / "base")
    trained(base, tmp_path / "a", target_modules="all-linear")
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft")
    found = read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out"))
    assert_close({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("Qwen3-MoE", ["gate_proj", "up_proj", "down_proj", "q_proj"]),
        ("Gemma 3 with vision", ["q_proj", "gate_proj"]),
    ],
)
def test_keys_as_the_files_name_the_tensors(tmp_path, family, modules):
    """As transformers 4 had the modules: experts one by one, a language part named otherwise."""
    base, auto = of_family(family, tmp_path / "base")
    keys = {}
    for name, weight in read(base).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in modules and "vision" not in name:
            at = f"base_model.model.{module}.lora_"
            keys[f"{at}A.weight"] = torch.randn(2, weight.shape[1])
            keys[f"{at}B.weight"] = torch.randn(weight.shape[0], 2)
    write_adapter(tmp_path / "a", keys, target_modules=modules)
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft", auto)
    assert_close(read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out")), expected)


@pytest.mark.parametrize("seen", [False, True])
def test_an_adapter_of_a_vision_model_or_of_its_language_part(tmp_path, seen):
    """The base is the other one of the two."""
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    whole, _ = of_family("Gemma 3 with vision", tmp_path / "whole")
    model = autos[1].from_pretrained(whole)
    language = Gemma3ForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.save_pretrained(tmp_path / "part")
    base, target = (tmp_path / "part", whole) if seen else (whole, tmp_path / "part")
    trained(target, tmp_path / "a", auto=autos[seen], target_modules=r".*layers.*\.(q|up)_proj")
    expected = merged_by_peft(target, tmp_path / "a", tmp_path / "peft", autos[seen])
    config = configuration([base, f"{target}+{tmp_path / 'a'}"])
    found = read(merge(config, tmp_path / "out", allow_crimes=True))  # towers are left out

    def layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.rpartition("model.layers.")[2]: tensor
            for name, tensor in tensors.items()
            if "model.layers." in name
        }

    assert len(layers(found)) == len(layers(expected)) > 0
    assert_close(layers(found), layers(expected))
    assert not layers(found)["0.mlp.up_proj.weight"].equal(
        layers(read(base))["0.mlp.up_proj.weight"]
    )


def test_parts_of_a_tensor_are_not_scaled(tmp_path):
    base = saved(tmp_path / "base", HrmTextConfig(**SIZES))
    trained(base, tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    (problem,) = problems(base, tmp_path / "a")
    assert "q_proj.weight and 3 more: stored in an order that can't be followed here" in problem


def test_a_target_whose_experts_are_stacked_otherwise(tmp_path):
    base, _ = of_family("Qwen3-MoE", tmp_path / "base")
    stacked = tmp_path / "stacked"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(stacked, save_original_format=False)
    assert set(read(stacked)) != set(read(base))
    trained(base, tmp_path / "a", target_modules="all-linear")
    expected = merged_by_peft(base, tmp_path / "a", tmp_path / "peft")
    config = configuration([base, f"{stacked}+{tmp_path / 'a'}"])
    assert_close(read(merge(config, tmp_path / "out")), expected)


def test_what_mergekit_extracts(tmp_path):
    base = saved(tmp_path / "base", Qwen2Config(**SIZES))
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    paths = {"--model": tmp_path / "model", "--base-model": base, "--out-path": tmp_path / "a"}
    words = [str(word) for pair in paths.items() for word in pair]
    assert CliRunner().invoke(extract_lora.main, words).exit_code == 0
    (problem,) = problems(base, tmp_path / "a")  # peft would leave out how the biases differ
    assert "lora_B.bias and 5 more, since adapter_config.json has no lora_bias" in problem
    change_json(tmp_path / "a" / "adapter_config.json", lora_bias=True)
    found = read(merge(configuration([base, tmp_path / "a"]), tmp_path / "out"))
    for name, tensor in read(tmp_path / "model").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


TIED = {
    "LoRA on the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "DoRA on both": ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, False),
    "the embeddings": ({"modules_to_save": ["embed_tokens"]}, False),
    "the head": ({"modules_to_save": ["lm_head"]}, False),
    "LoRA on the embeddings, the head whole": (
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "tied LoRA": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "rows": ({"trainable_token_indices": [1, 5]}, True),
    "rows of the head": ({"trainable_token_indices": {"lm_head": [1, 5]}}, False),
    "rows of each": ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [5]}}, False),
    "copies that nobody trained": ({}, True),
}


@pytest.mark.parametrize("config", [Qwen2Config, Gemma3Config])
@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_are_what_was_trained(tmp_path, kind, config):
    """Where peft's merge would add the update to both, the model that was trained counts."""
    settings, tied = TIED[kind]
    if config is Gemma3Config:
        made = FAMILIES["Gemma 3 with vision"].build().config
        auto = AutoModelForImageTextToText
    else:
        made, auto = Qwen2Config(**SIZES, tie_word_embeddings=True), AutoModelForCausalLM
    base = saved(tmp_path / "base", made, auto)
    model = trained(base, tmp_path / "a", auto=auto, **{"target_modules": ["q_proj"], **settings})
    if not settings:
        model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    out = merge(configuration([base, tmp_path / "a"]), tmp_path / "out")
    assert_same_logits(auto.from_pretrained(out), model)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in read(out)) is not tied


def test_a_trained_head_beside_targets_that_tie_theirs(tmp_path):
    base = saved(tmp_path / "base", Qwen2Config(**SIZES, tie_word_embeddings=True))
    adapters, merged = ([tmp_path / f"{kind}{seed}" for seed in (1, 2)] for kind in "am")
    for adapter, folder, more in zip(adapters, merged, (["lm_head"], None), strict=True):
        trained(base, adapter, target_modules=["q_proj"], modules_to_save=more)
        merged_by_peft(base, adapter, folder)
    expected = read(merge(configuration([base, *merged]), tmp_path / "plain"))
    assert_close(read(merge(configuration([base, *adapters]), tmp_path / "ours")), expected)


@pytest.mark.parametrize("kind", ["patterns", "DoRA", "PiSSA"])
@pytest.mark.parametrize("method", ["fusechat_sce", "task_arithmetic"])
def test_as_the_merge_of_merged_checkpoints(tmp_path, kind, method):
    base = saved(tmp_path / "base", Qwen2Config(**SIZES))
    adapters, merged = ([tmp_path / f"{kind}{seed}" for seed in (1, 2)] for kind in "am")
    for seed, (adapter, folder) in enumerate(zip(adapters, merged, strict=True), 1):
        trained(base, adapter, seed, **KINDS[kind])
        merged_by_peft(base, adapter, folder)
    parameters = {"weight": 0.4} if method == "task_arithmetic" else {}
    plain = configuration([base, *merged], method, parameters=parameters)
    ours = configuration(
        [base, f"{base}+{adapters[0]}", adapters[1]], method, parameters=parameters
    )
    expected = read(merge(plain, tmp_path / "plain"))
    assert_close(read(merge(ours, tmp_path / "ours")), expected)
    assert verify(ours, tmp_path / "ours") == []


@pytest.mark.parametrize("dora", [False, True])
def test_16_bits_are_rounded_once_and_memory_changes_no_byte(tmp_path, dora):
    (base,) = llama_family(tmp_path / "in", (BF16,), changes={"vocab_size": 5000})
    trained(base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"], use_dora=dora)
    config = configuration([base, tmp_path / "a"])
    found = read(merge(config, tmp_path / "one"))
    assert_same(read(merge(config, tmp_path / "two", memory=9 << 20, threads=1)), found)
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    at = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{at}.lora_{x}.weight"].double() for x in "AB")
    exact = read(base)[f"{at}.weight"].double() + 2 * b @ a
    if dora:
        length = factors[f"base_model.model.{at}.lora_magnitude_vector"].double()
        exact *= (length / exact.norm(dim=1))[:, None]
    ulp = torch.finfo(BF16).eps * exact.abs() / 2 + 1e-6
    assert bool(((found[f"{at}.weight"].double() - exact).abs() <= ulp).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lora_A.weight: its lora_magnitude_vector is missing"),
        ({"peft_type": "LOHA"}, f"peft_type 'LOHA' can't be merged by blocks; {MERGE}"),
        ({"peft_type": ["LORA"]}, "peft_type must be a text, not ['LORA']"),
        ({"peft_type": "P_TUNING"}, "P_TUNING changes no weights, so that there is nothing to"),
        (
            {"peft_type": "XLORA"},
            "what XLORA adds depends on the input; peft can't merge it either",
        ),
        ({"alora_invocation_tokens": [1]}, "no merged model does the same; train without"),
        ({"arrow_config": {}, "use_qalora": True}, "which peft can't merge either"),
        ({"arrow_config": {"top_k": 1}}, "chooses among adapters by the input"),
        (
            {"use_bdlora": {"nblocks": 2}},
            f"BD-LoRA (use_bdlora) can't be merged by blocks; {MERGE}",
        ),
        (
            {"layer_replication": [[0, 2]]},
            "makes other layers than the base's; make that model first",
        ),
        ({"init_lora_weights": "loftq"}, "'loftq' puts other weights in the base's place; where"),
        ({"init_lora_weights": "pissa_niter_4"}, "convert it to plain LoRA: model.save_pretrained"),
        ({"init_lora_weights": "lora_ga"}, "the factors that init_lora_weights 'lora_ga' took out"),
        ({"target_parameters": "w"}, "target_parameters must be a list of names, not 'w'"),
        ({"r": 3}, "factors of rank 2, adapter_config.json says 3"),
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
        (PAIR | {A: torch.ones(64), B: torch.ones(96)}, "each process saved a part of them (FSDP"),
        (
            PAIR | {B.replace("weight", "bias"): torch.ones(48)},
            "peft passes over base_model.model.model.layers.0.mlp.up_proj.lora_B.bias, since",
        ),
        (
            PAIR | {f"{STEM}model.embed_tokens.weight": torch.ones(1102, 32)},
            "holds model.embed_tokens.weight with 1102 rows for 1100 of",
        ),
        (
            {key.replace("up_proj", "_fsdp_wrapped_module.up_proj"): v for key, v in PAIR.items()},
            None,
        ),
        (PAIR | {B: torch.ones(48, 3)}, "factors of shape [48, 3] and [2, 32] don't"),
    ],
)
def test_factors_that_fit_nothing(tmp_path, base, tensors, message):
    found = problems(base, write_adapter(tmp_path / "a", tensors))
    assert [message in problem for problem in found] == [True] * (message is not None)


UNMERGEABLE = {
    "KaSA": {"kasa_config": KasaConfig()},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_the_command_for_what_cannot_be_merged_by_blocks(tmp_path, monkeypatch, kind):
    base = saved(tmp_path / "base", LlamaConfig(**SIZES))
    model = trained(base, tmp_path / "a", target_modules=["q_proj"], **UNMERGEABLE[kind])
    (problem,) = problems(base, tmp_path / "a")
    assert problem.endswith(MERGE)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "a"), str(tmp_path / "new")])
    exec(MERGE.split('"')[1], {})
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), model)


def test_the_remedy_for_replicated_layers(tmp_path):
    base, ranges = saved(tmp_path / "base", LlamaConfig(**SIZES)), [[0, 2], [1, 2]]
    model = trained(base, tmp_path / "a", target_modules=["q_proj"], layer_replication=ranges)
    slices = [{"sources": [{"model": str(base), "layer_range": each}]} for each in ranges]
    longer = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "longer")
    change_json(tmp_path / "a" / "adapter_config.json", layer_replication=None)
    out = merge(configuration([longer, tmp_path / "a"]), tmp_path / "out")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(out), model)


def test_the_remedy_for_factors_that_cannot_be_found_again(tmp_path):
    base = saved(tmp_path / "base", LlamaConfig(**SIZES))
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    config.init_lora_weights = True  # as peft's documentation says
    model.save_pretrained(tmp_path / "initial")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    initial = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    model.save_pretrained(tmp_path / "a", **initial)
    out = merge(configuration([base, tmp_path / "a"]), tmp_path / "out")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(out), model)


def test_a_model_that_transformers_cannot_build(tmp_path, base):
    rewrite(base, lambda tensors: tensors.pop("lm_head.weight"))
    checkpoint = read_checkpoint(Folder(base), "base")
    assert with_adapter(checkpoint, Folder(write_adapter(tmp_path / "a")), "a").updates
    embeddings = {f"{STEM}model.embed_tokens.weight": torch.ones(1100, 32)}
    adapter = Folder(write_adapter(tmp_path / "b", embeddings))
    with pytest.raises(
        CheckpointError, match="and whether base ties its head to them is not known"
    ):
        with_adapter(checkpoint, adapter, "b")

"""What `validate --estimate` says, against models and stores that are really made."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
)

from fusechat_distill.chain import run_status
from fusechat_distill.estimate import measure
from fusechat_distill.estimate.formulas import FLOPS, Shape, Text, estimate, total
from fusechat_distill.inputs.open import readable_size
from fusechat_distill.inputs.trl_settings import lora_config
from fusechat_distill.recipe.schema import load_recipe
from tests.support import chain, published
from tests.support.chain import ROOT, printed, refused, run

PICO = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = PICO | {"num_key_value_heads": 1}
RECIPES = ROOT / "examples" / "recipes"


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED, tie_word_embeddings=False),
        LlamaConfig(**GROUPED, tie_word_embeddings=True),
        GPTNeoXConfig(**PICO),
        Gemma2Config(**GROUPED, head_dim=8),
    ],
    ids=["untied", "tied", "neox", "gemma2"],
)
def test_parameters_are_those_of_the_model(config):
    model = AutoModelForCausalLM.from_config(config)
    shape = measure.shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    lookup = 0 if config.tie_word_embeddings else 97 * 16
    assert shape.active == shape.parameters - lookup
    assert (shape.layers, shape.hidden, shape.intermediate) == (2, 16, 24)


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 1}
QWEN3_MOE = {"moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 5}


@pytest.mark.parametrize(
    ("config", "expert"),
    [
        (MixtralConfig(**GROUPED, **MIXTRAL), 3 * 16 * 24),
        (Qwen3MoeConfig(**GROUPED, **QWEN3_MOE), 3 * 16 * 8),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_of_experts_only_the_chosen_are_active(config, expert):
    shape = measure.shape(config)
    idle = 3
    assert shape.parameters - shape.active == 97 * 16 + 2 * idle * expert


@pytest.mark.parametrize("name", published.CONFIGS)
def test_published_sizes(name):
    counted = measure.shape(published.CONFIGS[name]()).parameters
    assert counted == pytest.approx(published.PARAMETERS[name], rel=0.005)


def test_adapter_parameters_are_those_that_peft_trains(tmp_path, models):
    path = chain.recipe(tmp_path, models, training={"lora": {"r": 3, "target_modules": ["q_proj"]}})
    recipe = load_recipe(path)
    model = AutoModelForCausalLM.from_pretrained(models / "pivot")
    adapted = get_peft_model(model, lora_config(recipe))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 3 * (16 + 16)
    assert measure.adapter_parameters(recipe, model.config) == trained
    with_adapter = measure.estimate_recipe(recipe)
    (train,) = (cost for cost in with_adapter.costs if cost.stage == "train")
    assert train.disk_bytes == 4 * trained


def test_flops_and_bytes_by_hand(tmp_path, models):
    """The formulas with round numbers, worked out on paper."""
    path = chain.recipe(
        tmp_path,
        models,
        sources=[str(models / "neox"), str(models / "twin")],
        scoring={"top_k": 10, "dtype": "bfloat16", "batch_tokens": 1000},
        max_length=128,
        fusion={"function": "avg_ce"},
        dataset={"eval_fraction": 0.25},
        training={
            "max_steps": -1,
            "num_train_epochs": 2,
            "gradient_checkpointing": True,
            "per_device_train_batch_size": 2,
        },
    )
    shape = Shape(parameters=2000, active=1000, layers=3, hidden=8, intermediate=16)
    text = Text(conversations=400, tokens=100, response_tokens=50)
    shapes = {"pivot": shape, "neox": None, "twin": shape}
    costs = {
        (c.stage, c.name): c for c in estimate(load_recipe(path), shapes, text, local=frozenset())
    }
    pivot = costs["score", "pivot"]
    assert pivot.gpu_hours == pytest.approx(2 * 1000 * 40_000 / FLOPS / 3600)
    assert pivot.disk_bytes == 42 * 20_000
    assert pivot.memory_bytes == 2 * (2000 + 1000 * (4 * 8 + 3 * 16)) + 2**28
    unknown = costs["score", "neox"]
    assert (unknown.disk_bytes, unknown.memory_bytes, unknown.gpu_hours) == (840_000, None, None)
    assert costs["download", "twin"].disk_bytes == 2 * 2000
    # avg_ce keeps the entries of the pivot and of the target's one source.
    assert costs["fuse", "twin"].disk_bytes == 400 * (2 * 100 + (4 + 4 * 20) * 50)
    train = costs["train", "twin"]
    assert train.gpu_hours == pytest.approx(8 * 1000 * 2 * 0.75 * 40_000 / FLOPS / 3600)
    assert train.disk_bytes == 4 * 2000
    # Two checkpoints at once, each with two moments, and the rows: 8 + 8 · 20 bytes a token.
    assert train.temporary_bytes == 4 * 2000 * 2 * 3 + 40_000 * 168
    layer = 256 * (10 * 8 + 5 * 16) * 2
    assert train.memory_bytes == 2000 * (4 + 4 + 8 + 2) + 256 * 8 * 2 * 3 + layer
    assert costs["merge", "varm"].disk_bytes == 2 * 2000
    whole = total(list(costs.values()))
    assert whole.temporary_bytes == train.temporary_bytes
    assert whole.memory_bytes == max(c.memory_bytes or 0 for c in costs.values())


def test_bytes_against_what_a_run_writes(tmp_path, models):
    path = chain.recipe(tmp_path, models, training={"save_strategy": "no"})
    found = measure.estimate_recipe(load_recipe(path))
    assert (found.assumed, found.missing) == ([], [])
    assert run("run", path).exit_code == 0
    written = {(s.stage, s.name): s for s in run_status(load_recipe(path))}
    tokens = written["score", "pivot"].details.response_tokens
    # 256 of the 300 rows stand for all; the rows repeat.
    assert found.text.response_tokens * 300 == pytest.approx(tokens, rel=0.02)
    for cost in found.costs:
        if cost.stage in ("score", "align", "fuse"):
            taken = written[cost.stage, cost.name].bytes
            assert taken / 1.3 < cost.disk_bytes < 4 * taken, (cost, taken)
    weights = load_recipe(path).targets_folder / "neox" / "model.safetensors"
    (train,) = (cost for cost in found.costs if cost.stage == "train")
    assert train.disk_bytes == pytest.approx(weights.stat().st_size, rel=0.05)


def test_what_is_out_of_reach_is_named(tmp_path, models, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    absent = str(tmp_path / "nowhere" / "model")
    path = chain.recipe(tmp_path, models, sources=[absent, str(models / "neox")])
    shown = printed("validate", path, "--estimate", "--json")
    found = json.loads(shown)
    assert len(found["missing"]) == 1
    assert found["missing"][0].startswith(f"model ({absent}): its configuration can't be read: ")
    by = {(stage["stage"], stage["name"]): stage for stage in found["stages"]}
    assert by["score", "model"]["gpu_hours"] is None
    assert by["score", "neox"]["gpu_hours"] > 0
    shown = printed("validate", path, "--estimate")
    assert "missing: model" in shown
    assert "the total is of what is known" in shown


def test_an_absent_dataset_is_assumed_and_said(tmp_path, models):
    path = chain.recipe(
        tmp_path, models, max_length=64, dataset={"path": "org/chats", "max_samples": 500}
    )
    found = measure.estimate_recipe(load_recipe(path))
    assert found.text == Text(500, 64, 32)
    assert found.assumed == [
        "the dataset isn't here: 500 conversations of 64 tokens, 50% of them in answers"
    ]


def test_without_the_pivots_tokenizer_bytes_are_counted(tmp_path, models):
    path = chain.recipe(tmp_path, models, max_length=1000, pivot=str(tmp_path / "none"), count=6)
    found = measure.estimate_recipe(load_recipe(path))
    said = [
        [m for m in row["messages"] if m["role"] in roles]
        for row in chain.rows(6)
        for roles in (("user", "assistant"), ("assistant",))
    ]
    sizes = [sum(len(m["content"].encode()) for m in messages) for messages in said]
    assert found.text.tokens * 6 == pytest.approx(sum(sizes[::2]) / 4)
    assert found.text.response_tokens * 6 == pytest.approx(sum(sizes[1::2]) / 4)
    assert found.assumed == ["the pivot's tokenizer isn't here: 4 bytes a token"]


def test_what_is_here_but_no_use_is_named(tmp_path, models):
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1).save_pretrained(tmp_path / "t5")
    lora = {"lora": {"target_modules": ["nowhere"]}}
    path = chain.recipe(tmp_path, models, sources=[str(tmp_path / "t5")], training=lora)
    (tmp_path / "chats.jsonl").write_text("{", encoding="utf-8")
    found = measure.estimate_recipe(load_recipe(path))
    t5, adapter, dataset = found.missing
    assert t5.startswith(f"t5 ({tmp_path / 't5'}): Unrecognized configuration class")
    assert adapter.startswith("training.lora: Target modules {'nowhere'} not found")
    assert dataset.startswith(f"dataset {tmp_path / 'chats.jsonl'}: can't be opened: line 1 is not")
    assert found.assumed[0].startswith("the dataset isn't here: ")
    assert "5 TB" in readable_size(5e12)


def test_a_wrong_recipe_is_refused(tmp_path, models):
    path = chain.recipe(tmp_path, models, scoring={"topk": 3})
    assert "did you mean `top_k`?" in refused("validate", path, "--estimate")


def test_no_weights_are_made():
    """A model of 72 billion parameters is counted without memory for it."""
    before = torch.get_default_dtype()
    assert measure.shape(published.CONFIGS["Qwen/Qwen1.5-72B-Chat"]()).parameters > 7e10
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_show_what_is_printed(path, monkeypatch):
    """The comment that closes each recipe, with the configurations that the hub would give."""
    monkeypatch.setattr(
        measure, "read_config", lambda model, trust: published.CONFIGS[model.model]()
    )
    lines = measure.estimate_recipe(load_recipe(path)).lines()
    text = path.read_text("utf-8")
    comment = "".join(f"#   {line}".rstrip() + "\n" for line in lines)
    assert text.endswith(comment), f"{path.name} should end with\n{comment}"

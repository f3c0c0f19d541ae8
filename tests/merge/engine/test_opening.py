"""Merged folders load as what was written: config.json after slices, tensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.opening import opening_problems
from fusechat_merge.engine.verify import verify
from fusechat_merge.inputs.loading import loading
from fusechat_merge.planning.planner import plan
from tests.support.checkpoints import llama_family
from tests.support.families import FAMILIES, Family, family
from tests.support.merging import (
    add_tokenizers,
    change_json,
    cli,
    configuration,
    piece,
    read,
    write_yaml,
)

FOUR = {"num_hidden_layers": 4}


def stacked(paths: list[Path], *ranges: tuple[int, int]) -> dict[str, Any]:
    """A passthrough merge of these layers of the first model."""
    slices = [piece(paths[:1], begin, end) for begin, end in ranges]
    return {"merge_method": "passthrough", "slices": slices}


def made(name: str, folder: Path, **changes: Any) -> list[Path]:
    """A family's checkpoint with other settings of its language model."""
    base = FAMILIES[name]
    text = base.settings.get("text_config", base.settings) | changes
    settings = base.settings | {"text_config": text} if "text_config" in base.settings else text
    FAMILIES["changed"] = Family(base.model, base.config, settings)
    try:
        return family("changed", folder, targets=0)
    finally:
        del FAMILIES["changed"]


LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(
    ("name", "changes", "ranges", "keys"),
    [
        ("Qwen3-Next", FOUR | {"layer_types": [LINEAR, FULL] * 2}, [(0, 1), (2, 4)],
         {"layer_types": [LINEAR, LINEAR, FULL], "num_hidden_layers": 3}),
        ("Qwen3.5", FOUR | {"layer_types": [LINEAR, LINEAR, FULL, FULL]}, [(1, 3), (0, 4)],
         {"layer_types": [LINEAR, FULL, LINEAR, LINEAR, FULL, FULL]}),
        ("Gemma 2", FOUR, [(1, 2), (1, 4)], {"layer_types": [FULL, FULL, "sliding_attention", FULL]}),
        ("DeepSeek-V3", FOUR | {"first_k_dense_replace": 2}, [(1, 4)], {"first_k_dense_replace": 1}),
        ("Qwen3-MoE", FOUR | {"mlp_only_layers": [1, 3]}, [(1, 3)], {"mlp_only_layers": [0]}),
        ("GPT-2", {"n_layer": 4}, [(0, 2), (1, 4)], {"n_layer": 5}),
    ],
)  # fmt: skip
def test_config_follows_the_layers(
    name: str, changes: dict[str, Any], ranges: list[tuple[int, int]], keys: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    paths = made(name, tmp_path / "in", **changes)
    out = merge(stacked(paths, *ranges), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    written = written.get("text_config", written)
    assert {key: written[key] for key in keys} == keys
    load = getattr(transformers, FAMILIES[name].model).from_pretrained
    _, report = load(out, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize(
    ("name", "changes", "ranges", "problem"),
    [
        ("DeepSeek-V3", FOUR | {"first_k_dense_replace": 2}, [(2, 4), (0, 2)], "don't fit any"),
        ("Jamba", FOUR, [(1, 3)], "don't fit any config.json"),
    ],
)  # fmt: skip
def test_what_config_cannot_say_is_a_problem(
    name: str, changes: dict[str, Any], ranges: list[tuple[int, int]], problem: str, tmp_path: Path
) -> None:
    paths = made(name, tmp_path, **changes)
    assert any(problem in line for line in plan(stacked(paths, *ranges)).problems)


@pytest.mark.parametrize("name", ["Llama", "Qwen3.5-MoE", "Gemma 3 with vision", "Mixtral"])
def test_as_transformers_itself_reports(name: str, tmp_path: Path) -> None:
    """Missing, unexpected and mismatched tensors, against its own loading of damaged files."""
    (path,) = family(name, tmp_path, targets=0)
    tensors = read(path)
    one, other = [n for n in tensors if "attn.q_proj.weight" in n or "attn.o_proj.weight" in n][:2]
    del tensors[one]
    tensors["odd.weight"] = torch.ones(2)
    tensors[other] = tensors[other][1:].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(path)
    found = loading(config, {n: tuple(t.shape) for n, t in tensors.items()})
    load = getattr(transformers, FAMILIES[name].model).from_pretrained
    _, report = load(path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert found.missing == set(report["missing_keys"])
    assert found.unexpected == set(report["unexpected_keys"])
    assert found.mismatched == {entry[0] for entry in report["mismatched_keys"]}


def test_run_and_verify_say_so(tmp_path: Path) -> None:
    paths = family("Llama", tmp_path)
    settings, out = configuration(paths), tmp_path / "out"
    told = cli("run", write_yaml(tmp_path / "merge.yml", settings), out)
    assert f"{out}: loads as LlamaForCausalLM, no tensor missing or unexpected" in told.stderr
    planned = plan(settings)
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 64}]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = opening_problems(planned, out)[1]
    assert "its tokenizer has ids up to 64, its embeddings 64 rows" in problem
    (out / "tokenizer.json").unlink()
    change_json(out / "config.json", num_hidden_layers=3)
    (problem,) = opening_problems(planned, out)[1]
    assert "loads without model.layers.2." in problem
    change_json(out / "config.json", num_hidden_layers=2, intermediate_size=47)
    (problem,) = opening_problems(planned, out)[1]
    assert "loads with a shape of another configuration: model.layers.0.mlp" in problem
    change_json(out / "config.json", num_hidden_layers=1, intermediate_size=48)
    (problem,) = opening_problems(planned, out)[1]
    assert "loads with nothing that takes model.layers.1" in problem
    change_json(out / "config.json", architectures=["OddForCausalLM"])
    assert opening_problems(planned, out) == (
        "not checked whether it loads: transformers has no class OddForCausalLM", []
    )  # fmt: skip
    change_json(out / "config.json", num_attention_heads="many")
    assert "can't be loaded" in opening_problems(planned, out)[1][0]


def test_a_merge_that_does_not_load_is_said(tmp_path: Path) -> None:
    """A base whose tokenizer has more tokens than its embeddings have rows."""
    paths = family("Llama", tmp_path)
    tokenizer = {"model": {"vocab": [["a", 0.0]] * 70}, "added_tokens": []}
    (paths[0] / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings, out = configuration(paths), tmp_path / "out"
    told = cli("run", write_yaml(tmp_path / "merge.yml", settings), out)
    assert told.exit_code == 1
    assert "it is written, but" in told.stderr
    (difference,) = verify(settings, out)
    assert "ids up to 69" in difference


def test_leftovers_and_other_tokenizers_do_not_travel(tmp_path: Path) -> None:
    """Files of other weights never do; a tokenizer's other forms only with the base's own."""
    paths = llama_family(tmp_path / "in", (torch.bfloat16,) * 2)
    add_tokenizers(paths, "abc", "abd")
    leftovers = [
        "adapter_config.json",
        "params.json",
        "consolidated.safetensors",
        "old.bin.index.json",
    ]
    others = ["tekken.json", "spiece.model", "added_tokens.json", "qwen.tiktoken"]
    for name in (*leftovers, *others, "chat_template.json", "LICENSE"):
        (paths[0] / name).write_text("{}")
    plain = merge(configuration(paths), tmp_path / "plain")
    merged = merge(configuration(paths, tokenizer_source="union"), tmp_path / "union")
    asked = merge(configuration(paths, chat_template="chatml"), tmp_path / "template")
    for out, kept in (
        (plain, {*others, "chat_template.json", "LICENSE"}),
        (merged, {"LICENSE"}),
        (asked, {*others, "LICENSE"}),
    ):
        assert {p.name for p in out.iterdir()} & {
            *leftovers,
            *others,
            "chat_template.json",
            "LICENSE",
        } == kept

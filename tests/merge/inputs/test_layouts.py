"""Targets whose files have other names or another layout than the base's: the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.core_model_loading import Transpose, WeightConverter

from fusechat_merge.engine.execute import merge
from fusechat_merge.inputs.checkpoint import Checkpoint
from fusechat_merge.inputs.layouts import Described, InMemory, Piece, arranged
from fusechat_merge.inputs.stored import Location
from fusechat_merge.planning.planner import plan
from tests.support.checkpoints import write_adapter
from tests.support.families import FAMILIES, family
from tests.support.merging import (
    assert_same,
    change_json,
    cli,
    configuration,
    read,
    record,
    rewrite,
    write_yaml,
)

Save = Callable[[Path, Path], object]


EXPERTS, INNER, HIDDEN = 3, 4, 5
NUMBERS = torch.randn(EXPERTS, 2 * INNER, HIDDEN)
GATES, UPS = NUMBERS[:, :INNER], NUMBERS[:, INNER:]
Named = Mapping[str, torch.Tensor]


def each(label: str, stack: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{label}{number}": matrix for number, matrix in enumerate(stack)}


def some(named: Named, label: str) -> list[torch.Tensor]:
    return [tensor for name, tensor in named.items() if name.startswith(label)]


# Ways to store gate and up matrices, and how the stack in memory comes from them.
LAYOUTS: dict[str, tuple[dict[str, torch.Tensor], Callable[[Named], torch.Tensor]]] = {
    "stack": ({"all": NUMBERS}, lambda t: t["all"]),
    "flat": ({"all": NUMBERS.reshape(-1, HIDDEN)}, lambda t: t["all"].reshape(NUMBERS.shape)),
    "transposed": ({"all": NUMBERS.transpose(1, 2)}, lambda t: t["all"].transpose(1, 2)),
    "experts": (each("e", NUMBERS), lambda t: torch.stack(list(t.values()))),
    "matrices": (
        each("g", GATES) | each("u", UPS),
        lambda t: torch.cat([torch.stack(some(t, "g")), torch.stack(some(t, "u"))], 1),
    ),
    "transposed matrices": (
        each("g", GATES.transpose(1, 2)) | each("u", UPS.transpose(1, 2)),
        lambda t: torch.cat([torch.stack(some(t, k)).transpose(1, 2) for k in "gu"], 1),
    ),
    "halves": ({"g": GATES, "u": UPS}, lambda t: torch.cat([t["g"], t["u"]], dim=1)),
    "exchanged": (
        {"all": torch.cat([UPS, GATES], 1)},
        lambda t: torch.cat(list(torch.chunk(t["all"], 2, dim=1))[::-1], 1),
    ),
}


@pytest.mark.parametrize("base", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_every_layout_in_every_other(base: str, other: str) -> None:
    """Against the numbers themselves, read in ranges of every length."""
    raw = {}

    def checkpoint(layout: str) -> tuple[Checkpoint, dict[str, tuple[Piece, ...]]]:
        stored, in_memory = LAYOUTS[layout]
        assert torch.equal(in_memory(stored), NUMBERS)
        raw.update({f"{layout} {n}": t.contiguous().numpy().tobytes() for n, t in stored.items()})
        tensors = {
            n: Location(f"{layout} {n}", 0, 4 * t.numel(), "F32", tuple(t.shape))
            for n, t in stored.items()
        }
        made = in_memory({n: Described.stored(n, tuple(t.shape)) for n, t in stored.items()})
        return Checkpoint(layout, None, tensors, {}, {}), {"M": made.pieces}

    def read_at(file: str, offset: int, into: memoryview) -> None:
        into[:] = raw[file][offset : offset + into.nbytes]

    presented = arranged(*checkpoint(other), *checkpoint(base))
    assert set(presented.tensors) == set(LAYOUTS[base][0])
    for name, right in LAYOUTS[base][0].items():
        at, expected = presented.tensors[name], right.reshape(-1)
        assert at.shape == tuple(right.shape)
        for first in range(0, at.numel, 3):
            into = torch.zeros(min(7, at.numel - first))
            at.read(read_at, first, into.view(torch.uint8).numpy().data)
            assert torch.equal(into, expected[first : first + 7]), name


def test_an_unknown_operation_leaves_no_origin() -> None:
    tensor = Described.stored("a", (4, 6))
    assert (tensor + 1).pieces is None
    assert (tensor.transpose(0, 1).reshape(3, 8)).pieces is None
    assert torch.stack([tensor, tensor + 1]).pieces is None
    assert [part.pieces for part in torch.chunk(tensor + 1, 2)] == [None, None]
    assert [part.pieces for part in torch.unbind(tensor)] == [None] * 4
    assert tensor.reshape(4, 6).pieces == tensor.clone().pieces == tensor.pieces
    assert (tensor + 1).reshape(24).pieces is None


def as_in_memory(original: Path, folder: Path) -> None:
    kind = getattr(
        transformers, json.loads((original / "config.json").read_text())["architectures"][0]
    )
    kind.from_pretrained(original).save_pretrained(folder, save_original_format=False)


def transposed(original: Path, folder: Path) -> None:
    """Qwen3-VL-MoE as it was released: experts [experts, in, out]."""
    shutil.copytree(original, folder)
    rewrite(folder, lambda tensors: tensors.update(
        {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if ".experts." in n}
    ))  # fmt: skip


def without_prefix(original: Path, folder: Path) -> None:
    """GPT-2 as OpenAI's first checkpoints name it."""
    shutil.copytree(original, folder)
    renamed = {n.removeprefix("transformer."): t for n, t in read(folder).items()}
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.parametrize("backwards", [False, True], ids=["targets", "base"])
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("Qwen3-MoE", as_in_memory),
        ("Mixtral", as_in_memory),
        ("DeepSeek-V3", as_in_memory),
        ("Qwen3-VL-MoE", transposed),
        ("Gemma 3 with vision", as_in_memory),
        ("LLaVA", as_in_memory),
        ("Kimi K2.5", as_in_memory),
        ("GPT-2", without_prefix),
    ],
)
def test_another_layout(name: str, save: Save, backwards: bool, tmp_path: Path) -> None:
    """As if all had been saved like the base."""
    paths = family(name, tmp_path / "one")
    others = [tmp_path / "other" / path.name for path in paths]
    for path, other in zip(paths, others, strict=True):
        save(path, other)
    if backwards:
        paths, others = others, paths
    assert set(read(paths[0])) != set(read(others[0])) or save is transposed
    settings = {"parameters": {"granularity": "matrix"}, "dtype": "bfloat16"}
    expected = read(merge(configuration(paths, **settings), tmp_path / "expected"))
    mixed = configuration([paths[0], others[1], paths[2]], **settings)
    assert_same(read(merge(mixed, tmp_path / "out", memory=4 << 20)), expected)
    written = record(tmp_path / "out")
    assert written["left_out"] == written["copied_from_base"] == []
    linear = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (paths[0], others[1])]
    out = read(merge({"merge_method": "linear", "models": linear}, tmp_path / "linear"))
    base, target = read(paths[0]), read(paths[1])
    halves = {n: (base[n].double() + target[n].double()) / 2 for n in base}
    assert all(torch.allclose(out[n].double(), halves[n], atol=1e-6) for n in base)


@pytest.mark.parametrize("name", ["Gemma 3 with vision", "Qwen3.5", "Mistral 3"])
def test_a_language_model_saved_on_its_own(name: str, tmp_path: Path) -> None:
    """Its tensors are merged with those of the vision-language base, whose tower stays."""
    paths = family(name, tmp_path)
    kind = getattr(transformers, FAMILIES[name].model)
    whole = kind.from_pretrained(paths[1])
    text_config = whole.config.get_text_config()
    text_config.tie_word_embeddings = whole.config.tie_word_embeddings
    text = transformers.AutoModelForCausalLM.from_config(text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text")
    settings = configuration([paths[0], tmp_path / "text"])
    out = read(merge(settings, tmp_path / "out"))
    base, target = read(paths[0]), read(paths[1])
    tower = [n for n in base if "vision" in n or "visual" in n or "projector" in n]
    assert tower
    assert set(out) == set(base)
    assert all(torch.equal(out[n], (base if n in tower else target)[n]) for n in base)
    assert sorted(record(tmp_path / "out")["copied_from_base"]) == sorted(tower)
    backwards = configuration([tmp_path / "text", paths[1]])
    (problem,) = plan(backwards).problems
    assert "fit none of the base's and would be left out" in problem
    out = read(merge(backwards, tmp_path / "backwards", allow_crimes=True))
    alone = read(tmp_path / "text")
    assert set(out) == set(alone)
    assert all(torch.equal(out[n], alone[n]) for n in alone)


def test_layers_for_multi_token_prediction(tmp_path: Path) -> None:
    """transformers drops them when it saves again: they are the base's then."""
    paths = family("DeepSeek-V3", tmp_path)
    layer = {
        f"model.layers.2.{n}.weight": torch.randn(8, 8) for n in ("eh_proj", "mlp.gate", "enorm")
    }
    rewrite(paths[0], lambda tensors: tensors.update(layer))
    assert plan(configuration(paths)).notes()[0].startswith("the base's alone, copied: 3 tensors (")
    out = read(merge(configuration(paths), tmp_path / "out"))
    assert all(torch.equal(out[name], tensor) for name, tensor in layer.items())
    assert sorted(record(tmp_path / "out")["copied_from_base"]) == sorted(layer)
    for number in (1, 2):
        rewrite(paths[number], lambda tensors, n=number: tensors.update(
            {name: tensor + n for name, tensor in layer.items()}
        ))  # fmt: skip
    out = read(merge(configuration(paths), tmp_path / "both"))
    assert all(torch.allclose(out[n], t + 0.2 * 1 + 0.8 * 2, atol=1e-5) for n, t in layer.items())
    assert record(tmp_path / "both")["copied_from_base"] == []


def test_what_fits_nothing_is_said_before_the_merge(tmp_path: Path) -> None:
    paths = family("Qwen3.5", tmp_path)
    table, bias = "adapter.table.weight", "model.language_model.layers.0.mlp.up_proj.bias"
    rewrite(paths[2], lambda tensors: tensors.update(
        {table: torch.ones(4, 4), bias: torch.ones(48)}
    ))  # fmt: skip
    (problem,) = plan(configuration(paths)).problems
    assert f"{paths[2]}: 1 tensor, {table}, fits none of the base's" in problem
    assert "--allow-crimes" in problem
    yml = write_yaml(tmp_path / "merge.yml", configuration(paths))
    result = cli("run", yml, tmp_path / "out", "--allow-crimes")
    assert result.exit_code == 0, result.output
    assert f"left out of {paths[2]}: 2 tensors ({table}, …)" in result.stderr
    assert {table, bias} == {left["tensor"] for left in record(tmp_path / "out")["left_out"]}


def test_an_adapter_of_a_model_with_another_layout(tmp_path: Path) -> None:
    paths = family("Qwen3-MoE", tmp_path)
    as_in_memory(paths[0], tmp_path / "stacked")
    name = "model.layers.0.self_attn.q_proj"
    pair = {f"{name}.lora_{k}.weight": torch.randn(s) for k, s in (("A", (2, 32)), ("B", (32, 2)))}
    write_adapter(tmp_path / "lora", {f"base_model.model.{key}": t for key, t in pair.items()})
    model = {"model": f"{paths[0]}+{tmp_path / 'lora'}"}
    settings = {"merge_method": "varm", "base_model": str(tmp_path / "stacked"), "models": [model]}
    out, base = read(merge(settings, tmp_path / "out")), read(tmp_path / "stacked")
    assert [n for n in base if not torch.equal(out[n], base[n])] == [f"{name}.weight"]


def test_what_transformers_cannot_match_is_a_problem(tmp_path: Path) -> None:
    paths = family("Llama", tmp_path / "llama")
    for path in paths:
        change_json(path / "config.json", architectures=["OddForCausalLM"])
    rewrite(paths[1], lambda tensors: tensors.update(odd=tensors.pop("model.norm.weight")))
    assert "lacks model.norm.weight" in plan(configuration(paths)).problems[0]
    others = [paths[0], family("GPT-2", tmp_path / "gpt2")[0]]
    assert "--allow-crimes" in plan(configuration(others)).problems[0]


def test_a_conversion_that_fails_makes_nothing_known() -> None:
    config = FAMILIES["Llama"].build().config
    config.architectures = ["LlamaForCausalLM"]
    memory = InMemory(config)
    name = "model.layers.0.self_attn.{}_proj.weight".format
    both = WeightConverter(["q_proj", "k_proj"], "v_proj", [Transpose(0, 1)])
    memory._converters.append(both)
    tensors = {name(k): Location("", 0, 4096, "F32", (32, 32)) for k in "qkvo"}
    assert list(memory.describe(tensors)) == [name("o"), name("v")]

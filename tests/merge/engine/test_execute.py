"""fusechat-merge run against mergekit: the same bits, whatever the method, layout or memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.engine import passes, saving
from fusechat_merge.engine.analysis import analyze
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.tasks import _as_planned
from fusechat_merge.engine.verify import verify
from fusechat_merge.mergekit_bridge.loader import CheckpointLoader
from fusechat_merge.planning import side_files
from fusechat_merge.planning.planner import plan

Family = Callable[..., list[Path]]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def configuration(paths: Sequence[Path], method: str = "varm", **settings: Any) -> dict[str, Any]:
    base, *targets = map(str, paths)
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": target} for target in targets],
        **settings,
    }


def reference(settings: Mapping[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    config = MergeConfiguration.model_validate(settings)
    run_merge(config, str(out), MergeOptions(quiet=True, **options))
    return read(out)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def assert_as_mergekit(settings: Mapping[str, Any], folder: Path, **options: Any) -> None:
    expected = reference(settings, folder / "mergekit", **options)
    found = read(merge(settings, folder / "ours", **options))
    assert_same(found, expected)
    assert set(found) == set(expected)
    ours, theirs = (AutoConfig.from_pretrained(folder / n).to_dict() for n in ("ours", "mergekit"))
    ours.pop("_name_or_path"), theirs.pop("_name_or_path")
    assert ours == theirs


@pytest.mark.parametrize("granularity", ["matrix", "module", "layer", "model", "element"])
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, BF16, F16), (F32,) * 4])
def test_varm(tmp_path: Path, llama_family: Family, granularity: str, dtypes: Any) -> None:
    paths = llama_family(tmp_path / "in", dtypes)
    settings = configuration(
        paths, parameters={"granularity": granularity, "lambda": 0.7, "statistic": "absolute"}
    )
    settings["models"][0]["parameters"] = {"weight": [0.5, 2]}
    assert_as_mergekit(settings, tmp_path)


def test_varm_with_settings_per_tensor(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 3)
    settings = configuration(
        paths,
        parameters={
            "granularity": [
                {"filter": "mlp", "value": "layer"},
                {"filter": "q_proj", "value": "element"},
                {"value": "model"},
            ],
            "statistic": [{"filter": "mlp", "value": "absolute"}, {"value": "square"}],
        },
        dtype="float32",
        out_dtype="bfloat16",
    )
    assert_as_mergekit(settings, tmp_path)


@pytest.mark.parametrize("variant", ["paper", "fork"])
@pytest.mark.parametrize("topk", [0.0, 0.3, 1.0])
def test_fusechat_sce(tmp_path: Path, llama_family: Family, variant: str, topk: float) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 4)
    parameters = {"select_topk": topk, "variant": variant}
    assert_as_mergekit(configuration(paths, "fusechat_sce", parameters=parameters), tmp_path)


OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (3, {"weight": 0.4}),
    "task_arithmetic": (3, {"weight": 0.4, "lambda": 0.8}),
    "ties": (3, {"weight": 0.4, "density": 0.5}),
    "breadcrumbs": (3, {"weight": 0.4, "density": 0.5}),
    "sce": (3, {"select_topk": 0.5}),
    "model_stock": (3, {}),
    "slerp": (2, {"t": [0, 0.5, 1]}),
    "nuslerp": (3, {"weight": 0.5}),
    "nearswap": (2, {"t": 1e-3}),
    "arcee_fusion": (2, {}),
    "karcher": (3, {}),
    "multislerp": (3, {"weight": 0.5}),
    "ram": (3, {}),
    "ramplus_tl": (3, {}),
}


@pytest.mark.parametrize("method", sorted(OTHERS))
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_other_methods(
    tmp_path: Path, llama_family: Family, method: str, dtype: str | None
) -> None:
    count, parameters = OTHERS[method]
    paths = llama_family(tmp_path / "in", (BF16,) * count, shards=2)
    settings = configuration(paths, method, parameters=parameters)
    if dtype:
        settings |= {"dtype": dtype, "out_dtype": "bfloat16" if dtype == "float32" else None}
    assert_as_mergekit(settings, tmp_path)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_random_methods_depend_on_the_seed_and_nothing_else(
    tmp_path: Path, llama_family: Family, method: str
) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 3)
    settings = configuration(paths, method, parameters={"weight": 0.5, "density": 0.5})
    before = torch.random.get_rng_state()
    first = read(merge(settings, tmp_path / "first", random_seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert_same(read(merge(settings, tmp_path / "second", random_seed=1)), first)
    other = read(merge(settings, tmp_path / "other", random_seed=2))
    assert any(bits(other[name]) != bits(first[name]) for name in first)


def test_slices_of_different_models(tmp_path: Path, llama_family: Family) -> None:
    a, b, c = llama_family(tmp_path / "in", (BF16,) * 3, changes={"num_hidden_layers": 3})
    stacked = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(a), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(b), "layer_range": [1, 3]}]},
        ],
    }
    (tmp_path / "stacked").mkdir()
    assert_as_mergekit(stacked, tmp_path / "stacked")
    woven = {
        "merge_method": "varm",
        "base_model": str(a),
        "parameters": {"granularity": "module"},
        "slices": [
            {"sources": [{"model": str(m), "layer_range": span} for m in (a, b, c)]}
            for span in ([1, 3], [0, 2])
        ],
    }
    (tmp_path / "woven").mkdir()
    assert_as_mergekit(woven, tmp_path / "woven")


@pytest.mark.parametrize("phantom", [False, True])
def test_tied_heads(tmp_path: Path, llama_family: Family, phantom: bool) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if phantom and label == "t1":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    paths = llama_family(
        tmp_path / "in", (BF16,) * 3, changes={"tie_word_embeddings": True}, edit=edit
    )
    assert_as_mergekit(configuration(paths), tmp_path)
    assert ("lm_head.weight" in read(tmp_path / "ours")) is phantom


def test_vocabulary_cut_to_the_smallest(tmp_path: Path, llama_family: Family) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label == "t0":
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = tensors[name][:1050].contiguous()

    paths = llama_family(tmp_path / "in", (BF16,) * 3, edit=edit)
    for method in ("varm", "task_arithmetic"):
        folder = tmp_path / method
        folder.mkdir()
        parameters = {"weight": 0.5}
        assert_as_mergekit(
            configuration(paths, method, parameters=parameters)
            if method != "varm"
            else configuration(paths),
            folder,
            unsafe_truncate_embeddings=True,
        )


GRANITE = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
BIAS = "model.layers.0.self_attn.q_proj.bias"  # which Granite need not have


@pytest.mark.parametrize(
    ("method", "parameters", "having", "kept"),
    [
        ("varm", {"granularity": "layer"}, ("base", "t0"), True),
        ("varm", {"granularity": "matrix"}, ("base", "t1"), True),
        ("varm", {"granularity": "matrix"}, ("base",), True),
        ("fusechat_sce", {}, ("base", "t1"), True),
        ("model_stock", {}, ("base",), True),
        ("model_stock", {}, ("base", "t1"), False),
        ("slerp", {"t": 0.3}, ("t0",), True),
        ("nearswap", {"t": 0.3}, ("base",), True),
    ],
)
def test_an_optional_tensor_that_some_models_lack(
    tmp_path: Path,
    llama_family: Family,
    method: str,
    parameters: dict[str, Any],
    having: tuple[str, ...],
    kept: bool,
) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label in having:
            tensors[BIAS] = torch.arange(32.0).to(BF16) + ("base", "t0", "t1").index(label)

    count = 2 if method in ("slerp", "nearswap") else 3
    paths = llama_family(tmp_path / "in", (BF16,) * count, changes=GRANITE, edit=edit)
    assert_as_mergekit(configuration(paths, method, parameters=parameters), tmp_path)
    assert (BIAS in read(tmp_path / "ours")) is kept
    left = json.loads((tmp_path / "ours" / "fusechat_merge.json").read_text())["left_out"]
    assert sorted(Path(entry["model"]).name for entry in left) == ([] if kept else list(having))


def test_an_optional_tensor_that_the_base_lacks(tmp_path: Path, llama_family: Family) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label != "base":
            tensors[BIAS] = torch.ones(32, dtype=BF16)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, changes=GRANITE, edit=edit)
    (problem,) = plan(configuration(paths)).problems
    assert problem.startswith(f"{BIAS}: ")
    assert "Base input is not present" in problem


def test_whole_numbers_that_differ(tmp_path: Path, llama_family: Family) -> None:
    """Tensors that the architecture knows, of a dtype that it doesn't expect."""
    name = "model.norm.weight"

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.full((32,), 2 if different and label == "t1" else 1)

    different = False
    paths = llama_family(tmp_path / "same", (BF16,) * 3, edit=edit)
    assert_as_mergekit(configuration(paths), tmp_path)
    different = True
    paths = llama_family(tmp_path / "different", (BF16,) * 3, edit=edit)
    with pytest.raises(FusechatError, match=f"^{name}: .*differs between inputs"):
        merge(configuration(paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_mergekit_finds_impossible_when_it_merges(
    tmp_path: Path, llama_family: Family
) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 4)
    parameters = {"weight": 0.0, "normalize_weights": False}
    settings = configuration(paths, "multislerp", parameters=parameters)
    assert plan(settings).problems == []
    with pytest.raises(
        FusechatError, match=r"^[a-z_.]+weight: The weighted sum of the input tensors is"
    ):
        merge(settings, tmp_path / "out")


def test_what_a_method_returns_is_as_planned(tmp_path: Path, paths: list[Path]) -> None:
    output = plan(configuration(paths)).outputs[0]
    for value, got in (
        (None, "nothing"),
        (torch.ones(3), r"torch.float32 \[3\]"),
        (torch.ones(output.shape, dtype=F32), "torch.float32"),
    ):
        with pytest.raises(FusechatError, match=f"{output.name}: the method returned {got}"):
            _as_planned(value, output)
    assert _as_planned(
        torch.ones(output.shape, dtype=BF16).T.contiguous().T, output
    ).is_contiguous()


def test_leftover_layers_do_not_take_the_place_of_stacked_ones(
    tmp_path: Path, llama_family: Family
) -> None:
    name = "model.layers.{}.input_layernorm.weight"

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        tensors[name.format(3)] = torch.full((32,), 9.0, dtype=BF16)

    (a,) = llama_family(tmp_path / "in", (BF16,), edit=edit)
    piece = {"sources": [{"model": str(a), "layer_range": [0, 2]}]}
    stacked = {"merge_method": "passthrough", "slices": [piece, piece]}
    assert_as_mergekit(stacked, tmp_path)
    found = read(tmp_path / "ours")
    assert torch.equal(found[name.format(3)], found[name.format(1)])


def test_slices_of_another_base(tmp_path: Path, llama_family: Family) -> None:
    a, b, c = llama_family(tmp_path / "in", (BF16,) * 3)
    first = {"sources": [{"model": str(m), "layer_range": [0, 1]} for m in (a, b)]}
    second = {"sources": [{"model": str(m), "layer_range": [1, 2]} for m in (b, c)]}
    slices = [first | {"base_model": str(a)}, second | {"base_model": str(b)}]
    settings = {"merge_method": "task_arithmetic", "slices": slices, "base_model": str(a)}
    settings["parameters"] = {"weight": 0.5}
    assert_as_mergekit(settings, tmp_path)


def add_tokenizer(folder: Path, words: Sequence[str]) -> None:
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("method", ["varm", "linear"])
def test_tokenizer_union(tmp_path: Path, llama_family: Family, method: str) -> None:
    changes = {"vocab_size": 7}
    paths = llama_family(tmp_path / "in", (BF16,) * 3, changes=changes)
    for path, words in zip(paths, ("abcdef", "gbcdef", "fedcba"), strict=True):
        add_tokenizer(path, words)
    settings = configuration(
        paths,
        method,
        tokenizer={"source": "union", "pad_to_multiple_of": 4},
        parameters={"weight": 0.5},
    )
    if method == "varm":
        settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        by_layer = [{"filter": "layers", "value": "layer"}, {"value": "matrix"}]
        settings["parameters"]["granularity"] = by_layer
    assert_as_mergekit(settings, tmp_path)
    for name in ("tokenizer.json", *(["chat_template.jinja"] if method == "varm" else [])):
        ours, theirs = ((tmp_path / out / name).read_bytes() for out in ("ours", "mergekit"))
        assert ours == theirs
    assert (tmp_path / "ours" / "chat_template.jinja").exists() is (method == "varm")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == 8


def test_token_ids_that_no_embedding_is_for(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 2, changes={"vocab_size": 8})
    settings = configuration(paths, "varm", tokenizer={"source": "base"})
    add_tokenizer(paths[0], "abcdef")
    add_tokenizer(paths[1], "abcdefg")
    assert plan(settings).problems == []
    add_tokenizer(paths[1], "ghabcdef")
    (problem,) = plan(settings).problems
    assert problem.startswith(f"{paths[1]}: its tokenizer has ids beyond its 8 embeddings")
    add_tokenizer(paths[1], "abcdef")
    text = (paths[0] / "tokenizer.json").read_text()
    (paths[0] / "tokenizer.json").write_text(text.replace('"f": 6', '"f": 7'))
    (problem,) = plan(settings).problems
    assert problem.startswith("the merged tokenizer has 7 tokens and ids up to 7: ")


def test_a_chat_template_alone(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 2)
    add_tokenizer(paths[0], "abc")
    settings = json.loads((paths[0] / "tokenizer_config.json").read_text())
    (paths[0] / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "x"}))
    out = merge(configuration(paths, chat_template="chatml"), tmp_path / "out")
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "tokenizer.json").read_bytes() == (paths[0] / "tokenizer.json").read_bytes()
    (paths[0] / "tokenizer_config.json").unlink()
    other = merge(configuration(paths, chat_template="chatml"), tmp_path / "other", report=False)
    assert (other / "chat_template.jinja").read_bytes() == (
        out / "chat_template.jinja"
    ).read_bytes()
    assert {path.name for path in other.iterdir()} == {
        "chat_template.jinja", "config.json", "fusechat_merge.json", "model.safetensors",
        "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["varm", "linear"])
@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_a_checkpoint_that_mergekit_converts(tmp_path: Path, method: str, granularity: str) -> None:
    """Qwen2-MoE has no table in mergekit; on disk it has one tensor an expert, in memory one."""
    config = Qwen2MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(tmp_path / "in" / str(seed))
        AutoModelForCausalLM.from_config(config).to(BF16).save_pretrained(paths[-1])
    stored = read(paths[0])
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in stored
    parameters = {"weight": 0.5} | ({"granularity": granularity} if method == "varm" else {})
    assert_as_mergekit(configuration(paths, method, parameters=parameters), tmp_path)
    record = json.loads((tmp_path / "ours" / "fusechat_merge.json").read_text())
    assert record["left_out"] == record["merged_by_name"] == []


def test_tensors_that_the_architecture_does_not_know(tmp_path: Path, llama_family: Family) -> None:
    layer = "model.layers.1.self_attn."

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        start = {"base": 0.0, "t0": 1.0, "t1": 3.0}[label]
        tensors[layer + "q_proj.bias"] = torch.arange(32, dtype=BF16) + start
        tensors["extra.table"] = torch.arange(6, dtype=torch.int64)
        tensors["extra.empty"] = torch.zeros(0, 4, dtype=BF16)
        if label == "base":
            tensors[layer + "k_proj.bias"] = torch.full((16,), 0.1, dtype=F32)
        if label == "t1":
            tensors[layer + "v_proj.bias"] = torch.ones(16, dtype=BF16)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, edit=edit)
    settings = configuration(paths, parameters={"granularity": "layer"}, dtype="bfloat16")
    expected = reference(settings, tmp_path / "mergekit")
    found = read(merge(settings, tmp_path / "ours"))
    assert_same(found, expected)
    more = set(found) - set(expected)
    assert more == {layer + "q_proj.bias", layer + "k_proj.bias", "extra.table", "extra.empty"}
    assert found["extra.empty"].shape == (0, 4)
    # A unit of its own: weights 1/10 and 9/10, whatever else the layer holds.
    assert torch.equal(found[layer + "q_proj.bias"], (torch.arange(32) + 2.8).to(BF16))
    assert found[layer + "k_proj.bias"].dtype == BF16
    assert torch.equal(found["extra.table"], torch.arange(6))
    record = json.loads((tmp_path / "ours" / "fusechat_merge.json").read_text())
    assert sorted(record["merged_by_name"]) == ["extra.empty", layer + "q_proj.bias"]
    assert sorted(record["copied_from_base"]) == ["extra.table", layer + "k_proj.bias"]
    (left,) = [left for left in record["left_out"] if left["tensor"] == layer + "v_proj.bias"]
    assert left["model"] == paths[2].name
    assert "the base has no such tensor" in left["reason"]


def test_memory_threads_and_shards_change_no_byte(tmp_path: Path, llama_family: Family) -> None:
    changes = {"vocab_size": 12_000}  # 12 grid cells in the embeddings
    one = llama_family(tmp_path / "one", (BF16,) * 4, changes=changes)
    many = llama_family(tmp_path / "many", (BF16,) * 4, changes=changes, shards=5)
    for method, parameters in [
        ("varm", {"granularity": "layer"}),
        ("fusechat_sce", {"select_topk": 0.2}),
    ]:
        first = None
        for number, (paths, options) in enumerate(
            [
                (one, {}),
                (one, {"memory": 9_000_000, "threads": 1}),
                (one, {"memory": 60 << 20, "threads": 5}),
                (many, {"memory": 12_000_000, "shard_size": 100_000}),
            ]
        ):
            settings = configuration(paths, method, parameters=parameters)
            found = read(merge(settings, tmp_path / f"{method}{number}", **options))
            first = first or found
            assert_same(found, first)


def test_shards_as_the_plan_says_and_the_model_loads(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 3)
    out = merge(configuration(paths), tmp_path / "out", shard_size=50_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    sizes = {file: sum(t.nbytes for t in load_file(out / file).values()) for file in files}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= 50_000 or len(load_file(out / file)) == 1 for file, size in sizes.items())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_mixed_dtypes_stay_aligned(tmp_path: Path, llama_family: Family) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
        tensors["odd"] = torch.ones(3, dtype=torch.uint8)

    out = merge(
        configuration(llama_family(tmp_path / "in", (BF16,) * 2, edit=edit)), tmp_path / "o"
    )
    found = read(out)  # safetensors refuses to view misaligned bytes
    assert found["model.norm.weight"].dtype == torch.float64
    assert found["odd"].tolist() == [1, 1, 1]


def test_side_files_byte_for_byte(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (BF16,) * 3)
    files = {
        "tokenizer.json": b'{"version": "1.0"}\r\n',
        "tokenizer_config.json": b'{"chat_template": "x"}',
        "chat_template.jinja": "{{ 'größe' }}".encode(),
        "generation_config.json": b"{}",
        "merges.txt": b"a b\n",
        "LICENSE": b"x",
        "preprocessor_config.json": b"{ }",
        "additional_chat_templates/tool.jinja": b"y",
    }
    (paths[0] / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (paths[0] / name).write_bytes(content)
    for name in ("pytorch_model.bin", "README.md", ".gitattributes", "x.gguf"):
        (paths[0] / name).write_bytes(b"never copied")
    text = '{\n "model_type" : "llama",\n\t"torch_dtype":"float16" , "größe": [1.0, {"x": "}"}]}\n'
    original = json.loads((paths[0] / "config.json").read_text())
    body = ", ".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in original.items()
                     if k not in ("model_type", "torch_dtype"))  # fmt: skip
    text = text.replace('"größe"', body + ', "größe"')
    (paths[0] / "config.json").write_text(text, encoding="utf-8")
    out = merge(configuration(paths, dtype="bfloat16"), tmp_path / "out")
    for name, content in files.items():
        assert (out / name).read_bytes() == content
    assert (out / "config.json").read_text("utf-8") == text.replace('"float16"', '"bfloat16"')
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        *(name for name in files if "/" not in name),
        "config.json", "model.safetensors", "fusechat_merge.json", "README.md",
        "mergekit_config.yml",
    }  # fmt: skip
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert "| self_attn.q_proj |" in card


def test_the_record_of_units(tmp_path: Path, llama_family: Family) -> None:
    paths = llama_family(tmp_path / "in", (F32,) * 3)
    out = merge(configuration(paths, parameters={"granularity": "module"}), tmp_path / "out")
    record = json.loads((out / "fusechat_merge.json").read_text())
    assert record["granularity"] == "module"
    base, *targets = (read(path) for path in paths)
    unit = next(u for u in record["units"] if u["name"] == "model.layers.1.mlp")
    names = [name for name in base if name.startswith("model.layers.1.mlp.")]
    assert sorted(unit["tensors"]) == sorted(names)
    assert unit["numel"] == sum(base[name].numel() for name in names)
    sums = [
        sum(float((t[n].double() - base[n].double()).square().sum()) for n in names)
        for t in targets
    ]
    assert unit["statistics"] == pytest.approx([s / unit["numel"] for s in sums], rel=1e-12)
    assert unit["weights"] == pytest.approx([s / sum(sums) for s in sums], rel=1e-12)


def test_a_folder_with_a_space_in_its_name(tmp_path: Path, llama_family: Family) -> None:
    base, target = llama_family(tmp_path / "two words", (torch.bfloat16,) * 2)
    config = {"merge_method": "varm", "base_model": f"{base}/", "models": [{"model": str(target)}]}
    out = merge(config, tmp_path / "neue Mischung ü")
    assert verify(config, out) == []
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge(config, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before  # known to be finished


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_nan_is_named(tmp_path: Path, llama_family: Family, method: str) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label == "t1":
            tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    paths = llama_family(tmp_path / "in", (BF16,) * 3, edit=edit)
    with pytest.raises(FusechatError) as caught:
        merge(configuration(paths, method), tmp_path / "out")
    assert f"tensor model.layers.1.mlp.up_proj.weight of model {paths[2]}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def paths(tmp_path: Path, llama_family: Family) -> list[Path]:
    return llama_family(tmp_path / "in", (BF16,) * 3)


class _Stream:
    """Stands in for a CUDA stream: what it is told to copy is there at once."""

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_what_is_computed_elsewhere_goes_there_and_comes_back(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The staging of an accelerator, with memory of its own and no accelerator."""
    config = configuration(paths, method)
    expected = read(merge(config, tmp_path / "plain"))
    plain = passes.Desk.__init__

    def staged(self: passes.Desk, ring: passes.Ring) -> None:
        plain(self, ring)
        self._there, self._stream = torch.full_like(self._host, 255), _Stream()
        self._host.fill_(255)

    monkeypatch.setattr(passes.Desk, "__init__", staged)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    assert_same(read(merge(config, tmp_path / "staged")), expected)


def test_a_device_that_is_not_there(tmp_path: Path, paths: list[Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RequestError, match="--device cuda: PyTorch .* sees no CUDA device"):
        merge(configuration(paths), tmp_path / "out", device="cuda")
    out = merge(configuration(paths), tmp_path / "out")
    record = json.loads((out / "fusechat_merge.json").read_text())
    assert record["device"] == "cpu"
    (out / "fusechat_merge.json").write_text(json.dumps(record | {"device": "cuda"}))
    with pytest.raises(RequestError, match="was computed on a CUDA device"):
        verify(configuration(paths), out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["varm", "fusechat_sce", "task_arithmetic"])
def test_cuda_agrees_with_the_processor(tmp_path: Path, paths: list[Path], method: str) -> None:
    config = configuration(
        paths, method, parameters={} if method != "task_arithmetic" else {"weight": 0.5}
    )
    ours = read(merge(config, tmp_path / "cuda", device="cuda"))
    for name, tensor in read(merge(config, tmp_path / "cpu", device="cpu")).items():
        apart = (tensor.view(torch.int16).int() - ours[name].view(torch.int16).int()).abs()
        assert apart.max() <= 1, name
    weights = [
        [
            unit["weights"]
            for unit in json.loads((tmp_path / d / "fusechat_merge.json").read_text())["units"]
        ]
        for d in ("cuda", "cpu")
    ]
    torch.testing.assert_close(
        torch.tensor(weights[0]), torch.tensor(weights[1]), atol=1e-6, rtol=0
    )
    assert verify(config, tmp_path / "cuda") == []


def test_pages_that_cannot_go_directly(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that takes no direct writes, and one that refuses each of them."""
    config = configuration(paths)
    monkeypatch.setattr(saving, "_DIRECT", 1)
    expected = read(merge(config, tmp_path / "direct"))
    plain, direct = os.pwrite, os.O_DIRECT

    def refusing(descriptor: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, "no direct writes")
        return plain(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refusing)
        assert_same(read(merge(config, tmp_path / "refused")), expected)
    monkeypatch.delattr(os, "O_DIRECT")
    assert_same(read(merge(config, tmp_path / "unknown")), expected)
    assert verify(config, tmp_path / "direct") == []


def with_tokenizers(paths: list[Path]) -> None:
    for path, words in zip(paths, ("abc", "cba", "acb"), strict=True):
        add_tokenizer(path, words)


def test_units_of_a_permuted_vocabulary_are_refused(paths: list[Path]) -> None:
    with_tokenizers(paths)
    parameters = {"granularity": "model"}
    settings = configuration(paths, tokenizer={"source": "base"}, parameters=parameters)
    (problem,) = plan(settings).problems
    assert "can't be combined with a tokenizer merge" in problem
    assert "model.embed_tokens.weight" in problem


def test_a_permuted_vocabulary_of_other_width(paths: list[Path]) -> None:
    with_tokenizers(paths)
    name = "model.embed_tokens.weight"
    tensors = load_file(paths[1] / "model.safetensors")
    save_file(tensors | {name: tensors[name][:, :5].clone()}, paths[1] / "model.safetensors")
    problems = plan(configuration(paths, tokenizer={"source": "base"})).problems
    assert any(p.startswith(f"{name}: shapes don't fit: [1100, 32] in ") for p in problems)


def test_a_config_without_the_keys_that_change(tmp_path: Path, paths: list[Path]) -> None:
    config = json.loads((paths[0] / "config.json").read_text())
    del config["torch_dtype"]
    (paths[0] / "config.json").write_text(json.dumps(config))
    out = merge(configuration(paths, dtype="float32"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ('{"a" : 1 , "b":2}\n', ["b"], '{"a" : 1 , "b":7}\n'),
        (
            '{"a":{"x":"}"},\n\t"b":{"a": 0, "x":null}}',
            ["b", "x"],
            '{"a":{"x":"}"},\n\t"b":{"a": 0, "x":7}}',
        ),
        ("{}", ["a"], {"a": 7}),
        ('{"a": 1}', ["b"], {"a": 1, "b": 7}),
        ('{"a": {"x": 1}, "b": 2}', ["a", "y"], {"a": {"x": 1, "y": 7}, "b": 2}),
        ('{"a": null, "b": 2}', ["a", "y"], {"a": {"y": 7}, "b": 2}),
        ('{"b": 2}', ["a", "y"], {"a": {"y": 7}, "b": 2}),
    ],
)
def test_one_value_of_a_config_changes(text: str, path: list[str], expected: Any) -> None:
    found = side_files._with_value(text, path, 7)
    assert (found if isinstance(expected, str) else json.loads(found)) == expected


def test_too_little_memory(tmp_path: Path, paths: list[Path]) -> None:
    with pytest.raises(RequestError, match="--memory: at least 4MiB is needed"):
        merge(configuration(paths), tmp_path / "out", memory=1 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_places_that_are_not_there_yet(tmp_path: Path, paths: list[Path]) -> None:
    out = merge(configuration(paths), tmp_path / "a" / "b" / "out")
    assert verify(configuration(paths), out) == []
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file is a file, no folder"):
        merge(configuration(paths), tmp_path / "file" / "out")


def test_a_file_that_became_shorter(paths: list[Path]) -> None:
    planned = plan(configuration(paths))
    file = paths[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=f"model.safetensors of {paths[1]} has become shorter"):
        analyze(planned)
    loader = CheckpointLoader(planned.models[str(paths[1])])
    with pytest.raises(OSError, match=f"model.safetensors of {paths[1]} has become shorter"):
        loader.get_tensor("model.norm.weight")


def test_a_folder_that_can_not_be_written_to(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(RequestError, match="can't be written to"):
        merge(configuration(paths), tmp_path / "out")

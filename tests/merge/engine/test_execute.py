"""fusechat-merge run against mergekit: the same bits, whatever the method, layout or memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.engine import passes, saving
from fusechat_merge.engine.analysis import analyze
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.tasks import _as_planned
from fusechat_merge.engine.verify import verify
from fusechat_merge.mergekit_bridge.loader import CheckpointLoader
from fusechat_merge.planning import side_files
from fusechat_merge.planning.plan import ELEMENTWISE
from fusechat_merge.planning.planner import plan
from tests.support.checkpoints import BIAS, granite, llama_family
from tests.support.merging import (
    add_tokenizers,
    as_mergekit,
    assert_same,
    change_json,
    configuration,
    piece,
    read,
    record,
    rewrite,
    run_mergekit,
)
from tests.support.tensors import same_bits

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


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
def test_other_methods(tmp_path, method, dtype):
    count, parameters = OTHERS[method]
    paths = llama_family(tmp_path / "in", (BF16,) * count, shards=2)
    settings = configuration(paths, method, parameters=parameters)
    if dtype:
        settings |= {"dtype": dtype, "out_dtype": "bfloat16" if dtype == "float32" else None}
    as_mergekit(settings, tmp_path)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_random_methods_depend_on_the_seed_and_nothing_else(tmp_path, paths, method):
    settings = configuration(paths, method, parameters={"weight": 0.5, "density": 0.5})
    before = torch.random.get_rng_state()
    first = read(merge(settings, tmp_path / "first", random_seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert_same(read(merge(settings, tmp_path / "second", random_seed=1)), first)
    other = read(merge(settings, tmp_path / "other", random_seed=2))
    assert any(not same_bits(other[name], first[name]) for name in first)


def slices_of(method: str, a: Path, b: Path, c: Path) -> dict[str, Any]:
    """Stacked from different models, and each with a base of its own."""
    if method == "passthrough":
        return {"slices": [piece([a], 0, 2), piece([b], 1, 3)]}
    slices = [piece([a, b], 0, 1, base_model=str(a)), piece([b, c], 1, 2, base_model=str(b))]
    return {"slices": slices, "base_model": str(a), "parameters": {"weight": 0.5}}


@pytest.mark.parametrize("method", ["passthrough", "task_arithmetic"])
def test_slices(tmp_path, method):
    models = llama_family(tmp_path / "in", (BF16,) * 3, changes={"num_hidden_layers": 3})
    as_mergekit({"merge_method": method, **slices_of(method, *models)}, tmp_path)


def test_leftover_layers_do_not_take_the_place_of_stacked_ones(tmp_path):
    name = "model.layers.{}.input_layernorm.weight"

    def edit(label, tensors):
        tensors[name.format(3)] = torch.full((32,), 9.0, dtype=BF16)

    models = llama_family(tmp_path / "in", (BF16,), edit=edit)
    stacked = {"merge_method": "passthrough", "slices": [piece(models, 0, 2)] * 2}
    found = as_mergekit(stacked, tmp_path)
    assert torch.equal(found[name.format(3)], found[name.format(1)])


LABELS = ("base", "t0", "t1")


@pytest.mark.parametrize(
    ("method", "parameters", "having", "kept"),
    [
        ("varm", {}, ("base",), True),
        ("fusechat_sce", {}, ("base", "t1"), True),
        ("model_stock", {}, ("base",), True),
        ("model_stock", {}, ("base", "t1"), False),
        ("slerp", {"t": 0.3}, ("t0",), True),
        ("nearswap", {"t": 0.3}, ("base",), True),
    ],
)
def test_an_optional_tensor_that_some_models_lack(tmp_path, method, parameters, having, kept):
    dtypes = (BF16,) * (2 if method in ("slerp", "nearswap") else 3)
    paths = granite(tmp_path / "in", dtypes, **{label: LABELS.index(label) for label in having})
    found = as_mergekit(configuration(paths, method, parameters=parameters), tmp_path)
    assert (BIAS in found) is kept
    left = record(tmp_path / "ours")["left_out"]
    assert sorted(Path(entry["model"]).name for entry in left) == ([] if kept else list(having))


def test_an_optional_tensor_that_the_base_lacks(tmp_path):
    paths = granite(tmp_path / "in", (BF16,) * 3, t0=1.0, t1=2.0)
    (problem,) = plan(configuration(paths)).problems
    assert problem.startswith(f"{BIAS}: ")
    assert "Base input is not present" in problem


def test_weights_that_mergekit_finds_impossible_when_it_merges(tmp_path):
    paths = llama_family(tmp_path / "in", (BF16,) * 4)
    parameters = {"weight": 0.0, "normalize_weights": False}
    settings = configuration(paths, "multislerp", parameters=parameters)
    assert plan(settings).problems == []
    message = r"^[a-z_.]+weight: the weighted sum of the inputs is zero"
    with pytest.raises(FusechatError, match=message):
        merge(settings, tmp_path / "out")


def test_what_a_method_returns_is_as_planned(paths):
    output = plan(configuration(paths)).outputs[0]
    for value, got in (
        (None, "nothing"),
        (torch.ones(3), r"torch.float32 \[3\]"),
        (torch.ones(output.shape, dtype=F32), "torch.float32"),
    ):
        with pytest.raises(FusechatError, match=f"{output.name}: the method returned {got}"):
            _as_planned(value, output)
    transposed = torch.ones(output.shape, dtype=BF16).T.contiguous().T
    assert _as_planned(transposed, output).is_contiguous()


@pytest.mark.parametrize("method", ["varm", "linear"])
def test_tokenizer_union(tmp_path, method):
    paths = llama_family(tmp_path / "in", (BF16,) * 3, changes={"vocab_size": 7})
    add_tokenizers(paths, "abcdef", "gbcdef", "fedcba")
    union = {"source": "union", "pad_to_multiple_of": 4}
    settings = configuration(paths, method, tokenizer=union, parameters={"weight": 0.5})
    compared = ["tokenizer.json"]
    if method == "varm":
        compared.append("chat_template.jinja")
        settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        by_layer = [{"filter": "layers", "value": "layer"}, {"value": "matrix"}]
        settings["parameters"]["granularity"] = by_layer
    as_mergekit(settings, tmp_path)
    ours, theirs = tmp_path / "ours", tmp_path / "mergekit"
    for name in compared:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert (ours / "chat_template.jinja").exists() is (method == "varm")
    assert json.loads((ours / "config.json").read_text())["vocab_size"] == 8


def test_token_ids_that_no_embedding_is_for(tmp_path):
    paths = llama_family(tmp_path / "in", (BF16,) * 2, changes={"vocab_size": 8})
    settings = configuration(paths, "varm", tokenizer={"source": "base"})
    add_tokenizers(paths, "abcdef", "abcdefg")
    assert plan(settings).problems == []
    add_tokenizers(paths[1:], "ghabcdef")
    (problem,) = plan(settings).problems
    assert problem.startswith(f"{paths[1]}: its tokenizer has ids beyond its 8 embeddings")
    add_tokenizers(paths[1:], "abcdef")
    text = (paths[0] / "tokenizer.json").read_text()
    (paths[0] / "tokenizer.json").write_text(text.replace('"f": 6', '"f": 7'))
    (problem,) = plan(settings).problems
    assert problem.startswith("the merged tokenizer has 7 tokens and ids up to 7: ")


def test_a_permuted_vocabulary_is_refused(paths):
    """For units of several tensors, and where the width of the embeddings differs."""
    add_tokenizers(paths, "abc", "cba", "acb")
    settings = configuration(paths, tokenizer={"source": "base"})
    (problem,) = plan(settings | {"parameters": {"granularity": "model"}}).problems
    assert "can't be combined with a tokenizer merge" in problem
    assert EMBEDDING in problem
    rewrite(paths[1], lambda t: t.update({EMBEDDING: t[EMBEDDING][:, :5].clone()}))
    problems = plan(settings).problems
    assert any(p.startswith(f"{EMBEDDING}: shapes don't fit: [1100, 32] in ") for p in problems)


def test_a_chat_template_alone(tmp_path, paths):
    add_tokenizers(paths[:1], "abc")
    change_json(paths[0] / "tokenizer_config.json", chat_template="x")
    settings = configuration(paths, chat_template="chatml")
    out = merge(settings, tmp_path / "out")
    template = (out / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "tokenizer.json").read_bytes() == (paths[0] / "tokenizer.json").read_bytes()
    (paths[0] / "tokenizer_config.json").unlink()
    other = merge(settings, tmp_path / "other", report=False)
    assert (other / "chat_template.jinja").read_text() == template
    written = "chat_template.jinja config.json fusechat_merge.json model.safetensors tokenizer.json"
    assert {path.name for path in other.iterdir()} == set(written.split())


def test_tensors_that_the_architecture_does_not_know(tmp_path):
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkv")

    def edit(label, tensors):
        start = {"base": 0.0, "t0": 1.0, "t1": 3.0}[label]
        tensors[q] = torch.arange(32, dtype=BF16) + start
        tensors["extra.table"] = torch.arange(6, dtype=torch.int64)
        tensors["extra.empty"] = torch.zeros(0, 4, dtype=BF16)
        if label == "base":
            tensors[k] = torch.full((16,), 0.1, dtype=F32)
        if label == "t1":
            tensors[v] = torch.ones(16, dtype=BF16)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, edit=edit)
    settings = configuration(paths, parameters={"granularity": "layer"}, dtype="bfloat16")
    expected = run_mergekit(settings, tmp_path / "mergekit")
    found = read(merge(settings, tmp_path / "ours"))
    assert_same({name: found[name] for name in expected}, expected)
    assert set(found) - set(expected) == {q, k, "extra.table", "extra.empty"}
    assert found["extra.empty"].shape == (0, 4)
    # A unit of its own: weights 1/10 and 9/10, whatever else the layer holds.
    assert torch.equal(found[q], (torch.arange(32) + 2.8).to(BF16))
    assert found[k].dtype == BF16
    assert torch.equal(found["extra.table"], torch.arange(6))
    written = record(tmp_path / "ours")
    assert sorted(written["merged_by_name"]) == ["extra.empty", q]
    assert sorted(written["copied_from_base"]) == ["extra.table", k]
    (left,) = [left for left in written["left_out"] if left["tensor"] == v]
    assert left["model"] == paths[2].name
    assert "the base has no such tensor" in left["reason"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("varm", {"granularity": "layer"}),
        ("fusechat_sce", {"select_topk": 0.2}),
        ("task_arithmetic", {"weight": 0.4, "normalize": True, "lambda": 0.7}),
        ("linear", {"weight": 0.4}),
        ("multislerp", {"weight": 0.4}),
        ("karcher", {}),
        ("model_stock", {}),
    ],
)
def test_memory_threads_and_shards_change_no_byte(tmp_path, method, parameters):
    changes = {"vocab_size": 12_000}  # 12 grid cells in the embeddings
    one = llama_family(tmp_path / "one", (BF16,) * 4, changes=changes)
    many = llama_family(tmp_path / "many", (BF16,) * 4, changes=changes, shards=5)
    first, *others = (
        read(merge(configuration(paths, method, parameters=parameters), tmp_path / name, **options))
        for name, paths, options in [
            ("plain", one, {}),
            ("little memory", one, {"memory": 9_000_000, "threads": 1}),
            ("threads", one, {"memory": 60 << 20, "threads": 5}),
            ("shards", many, {"memory": 12_000_000, "shard_size": 100_000}),
        ]
    )
    for other in others:
        assert_same(other, first)
    if method in ELEMENTWISE:  # by mergekit's own method, over segments
        settings = configuration(one, method, parameters=parameters)
        assert_same(first, run_mergekit(settings, tmp_path / "mergekit"))
        assert all(output.how == "blocks" for output in plan(settings).outputs)


def test_shards_as_the_plan_says_and_the_model_loads(tmp_path, paths):
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


def test_mixed_dtypes_stay_aligned(tmp_path, paths):
    for path in paths:
        rewrite(path, lambda t: t.update({NORM: t[NORM].double()}))
        rewrite(path, lambda t: t.update(odd=torch.ones(3, dtype=torch.uint8)))
    found = read(merge(configuration(paths), tmp_path / "o"))  # refused if misaligned
    assert found[NORM].dtype == torch.float64
    assert found["odd"].tolist() == [1, 1, 1]


def test_side_files_byte_for_byte(tmp_path, paths):
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
    made = "config.json model.safetensors fusechat_merge.json README.md mergekit_config.yml"
    copied = {name for name in files if "/" not in name}
    assert {p.name for p in out.iterdir() if p.is_file()} == {*copied, *made.split()}
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert "| self_attn.q_proj |" in card


def test_a_folder_with_a_space_in_its_name(tmp_path):
    base, target = llama_family(tmp_path / "two words", (torch.bfloat16,) * 2)
    config = configuration([f"{base}/", target])
    out = merge(config, tmp_path / "not there" / "yet" / "neue Mischung ü")
    assert verify(config, out) == []
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge(config, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before  # known to be finished


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_what_is_computed_elsewhere_goes_there_and_comes_back(tmp_path, paths, monkeypatch, method):
    """The staging of an accelerator, with memory of its own and no accelerator."""
    config = configuration(paths, method)
    expected = read(merge(config, tmp_path / "plain"))
    plain = passes.Desk.__init__

    def staged(self, ring):
        plain(self, ring)
        self._there, self._stream = torch.full_like(self._host, 255), Mock()
        self._host.fill_(255)

    monkeypatch.setattr(passes.Desk, "__init__", staged)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    assert_same(read(merge(config, tmp_path / "staged")), expected)


def test_a_device_that_is_not_there(tmp_path, paths):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RequestError, match="--device cuda: PyTorch .* sees no CUDA device"):
        merge(configuration(paths), tmp_path / "out", device="cuda")
    out = merge(configuration(paths), tmp_path / "out")
    assert record(out)["device"] == "cpu"
    change_json(out / "fusechat_merge.json", device="cuda")
    with pytest.raises(RequestError, match="was computed on a CUDA device"):
        verify(configuration(paths), out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["varm", "fusechat_sce", "task_arithmetic"])
def test_cuda_agrees_with_the_processor(tmp_path, paths, method):
    parameters = {} if method != "task_arithmetic" else {"weight": 0.5}
    config = configuration(paths, method, parameters=parameters)
    cuda, cpu = (merge(config, tmp_path / device, device=device) for device in ("cuda", "cpu"))
    ours = read(cuda)
    for name, tensor in read(cpu).items():
        apart = (tensor.view(torch.int16).int() - ours[name].view(torch.int16).int()).abs()
        assert apart.max() <= 1, name
    found, expected = (
        torch.tensor([unit["weights"] for unit in record(out)["units"]]) for out in (cuda, cpu)
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert verify(config, cuda) == []


def test_pages_that_cannot_go_directly(tmp_path, paths, monkeypatch):
    """A file system that takes no direct writes, and one that refuses each of them."""
    config = configuration(paths)
    monkeypatch.setattr(saving, "_DIRECT", 1)
    expected = read(merge(config, tmp_path / "direct"))
    plain, direct = os.pwrite, os.O_DIRECT

    def refusing(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, "no direct writes")
        return plain(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refusing)
        assert_same(read(merge(config, tmp_path / "refused")), expected)
    monkeypatch.delattr(os, "O_DIRECT")
    assert_same(read(merge(config, tmp_path / "unknown")), expected)
    assert verify(config, tmp_path / "direct") == []


def test_a_config_without_the_keys_that_change(tmp_path, paths):
    config = json.loads((paths[0] / "config.json").read_text())
    del config["torch_dtype"]
    (paths[0] / "config.json").write_text(json.dumps(config))
    out = merge(configuration(paths, dtype="float32"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "float32"}


@pytest.mark.parametrize("head", [False, True])
def test_a_head_of_its_own_is_no_longer_tied(tmp_path, head):
    def edit(label, tensors):
        if head and label == "t0":
            tensors[HEAD] = tensors[EMBEDDING] * 1.5

    paths = llama_family(
        tmp_path / "in", (F32,) * 2, changes={"tie_word_embeddings": True}, edit=edit
    )
    out = merge(configuration(paths), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not head
    loaded = AutoModelForCausalLM.from_pretrained(out).lm_head.weight
    assert same_bits(loaded, read(out)[HEAD if head else EMBEDDING])


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ('{"a" : 1 , "b":2}\n', ["b"], '{"a" : 1 , "b":7}\n'),
        ('{"a":{"x":"}"},\n\t"b":{"x":null}}', ["b", "x"], '{"a":{"x":"}"},\n\t"b":{"x":7}}'),
        ("{}", ["a"], {"a": 7}),
        ('{"a": 1}', ["b"], {"a": 1, "b": 7}),
        ('{"a": {"x": 1}, "b": 2}', ["a", "y"], {"a": {"x": 1, "y": 7}, "b": 2}),
        ('{"a": null, "b": 2}', ["a", "y"], {"a": {"y": 7}, "b": 2}),
        ('{"b": 2}', ["a", "y"], {"a": {"y": 7}, "b": 2}),
    ],
)
def test_one_value_of_a_config_changes(text, path, expected):
    found = side_files._with_value(text, path, 7)
    assert (found if isinstance(expected, str) else json.loads(found)) == expected


def test_a_file_that_became_shorter(paths):
    planned = plan(configuration(paths))
    file = paths[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=f"model.safetensors of {paths[1]} has become shorter"):
        analyze(planned)
    loader = CheckpointLoader(planned.models[str(paths[1])])
    with pytest.raises(OSError, match=f"model.safetensors of {paths[1]} has become shorter"):
        loader.get_tensor(NORM)


def test_a_folder_that_can_not_be_written_to(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(RequestError, match="can't be written to"):
        merge(configuration(paths), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

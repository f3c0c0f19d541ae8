"""fusechat-merge verify: one wrong bit, one wrong file or one missing tensor is found and named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusechat_common.errors import RequestError
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.inputs.checkpoint import Folder, read_checkpoint
from tests.support.checkpoints import llama_family
from tests.support.merging import cli, configuration, run_mergekit, write_yaml

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    found = llama_family(tmp_path_factory.mktemp("models"), (BF16,) * 3)
    (found[0] / "tokenizer.json").write_text("{}")
    return found


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("varm", {"granularity": "model"}),
        ("varm", {"granularity": "element"}),
        ("fusechat_sce", {"select_topk": 0.4}),
        ("ties", {"weight": 0.5, "density": 0.5}),
    ],
)
def test_a_flipped_bit_is_found_and_named(tmp_path, paths, method, parameters):
    config = configuration(paths, method, parameters=parameters, dtype="bfloat16")
    out = merge(config, tmp_path / "out", shard_size=60_000)
    assert verify(config, out) == []
    made = read_checkpoint(Folder(out), "out")
    wrong = {"model.embed_tokens": 1100 * 32 - 1, "model.layers.1.mlp.down_proj": 77}
    for name, element in wrong.items():
        at = made.tensors[f"{name}.weight"]
        raw = bytearray((out / at.file).read_bytes())
        raw[at.offset + 2 * element] ^= 1
        (out / at.file).write_bytes(raw)
    assert verify(config, out) == [
        f"{name}.weight: differs from what its sources give, first in element {element}"
        for name, element in wrong.items()
    ]


def test_a_sample_checks_some_and_its_structure_all(tmp_path, paths):
    config = configuration(paths, parameters={"granularity": "layer"})
    out = merge(config, tmp_path / "out")
    seen = set()

    def progress(name, size):
        seen.update([name] if size else [])

    assert verify(config, out, sample=0.2, progress=progress) == []
    assert len(seen) == 4
    tensors = load_file(out / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(31, dtype=BF16)
    tensors["stray"] = torch.ones(1)
    save_file(tensors, out / "model.safetensors")
    (out / "tokenizer.json").write_text("{ }")
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert verify(config, out, sample=0.1) == [
        "model.layers.0.input_layernorm.weight: is BF16 [31], not torch.bfloat16 [32]",
        "model.norm.weight: is missing",
        "stray: doesn't belong here",
        "config.json: differs from the base's as the merge changes it",
        "tokenizer.json: differs from the base's",
    ]


def test_what_mergekit_made_is_verified_too(tmp_path, paths):
    config = configuration(paths, parameters={"granularity": "module"}, dtype="bfloat16")
    run_mergekit(config, tmp_path / "out")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "out" / name).write_bytes((paths[0] / name).read_bytes())
    assert verify(config, tmp_path / "out") == []


def test_the_command(tmp_path, paths):
    yml, out = write_yaml(tmp_path / "merge.yml", configuration(paths)), tmp_path / "out"
    assert cli("run", yml, out).exit_code == 0
    result = cli("verify", yml, out, "--sample", "0.5")
    assert result.exit_code == 0
    assert result.stdout.endswith("merge.yml makes (50% of its tensors recomputed)\n")
    raw = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(raw[:-1])
    result = cli("verify", yml, out)
    assert result.exit_code == 1
    assert "Error: 1 difference:" in result.stderr
    assert "truncated" in result.stderr
    write_yaml(yml, configuration(paths, parameters={"granularity": "layer", "lambda": 0.5}))
    (out / "model.safetensors").write_bytes(raw)
    result = cli("verify", yml, out)
    assert "Error: 21 differences:" in result.stderr
    assert result.stderr.endswith("\n  … and 1 more\n")


def test_side_files_that_are_missing_or_damaged(tmp_path, paths):
    config = configuration(paths)
    out = merge(config, tmp_path / "out")
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{")
    damaged, missing = verify(config, out, sample=0.01)
    assert damaged.startswith("config.json: can't be read (Expecting property name")
    assert missing == "tokenizer.json: is missing"
    (out / "config.json").unlink()
    damaged, _ = verify(config, out, sample=0.01)
    assert damaged.startswith("config.json: can't be read ([Errno 2] No such file")


def test_what_cannot_be_verified(tmp_path, paths):
    config = configuration(paths)
    with pytest.raises(RequestError, match=r"out: can't be read \(.*No such file"):
        verify(config, tmp_path / "out")
    out = merge(config, tmp_path / "out")
    with pytest.raises(RequestError, match="--memory: at least 4MiB is needed"):
        verify(config, out, memory=1 << 20)

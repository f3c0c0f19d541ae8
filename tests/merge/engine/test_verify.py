"""fusechat-merge verify: one wrong bit, one wrong file or one missing tensor is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from fusechat_common.errors import RequestError
from fusechat_merge.cli import main
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.inputs.checkpoint import Folder, read_checkpoint

BF16 = torch.bfloat16
Family = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, llama_family: Family) -> list[Path]:
    found = llama_family(tmp_path_factory.mktemp("models"), (BF16,) * 3)
    (found[0] / "tokenizer.json").write_text("{}")
    return found


def configuration(paths: list[Path], method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in paths[1:]],
        "parameters": parameters,
        "dtype": "bfloat16",
    }


CONFIGURATIONS = [
    ("varm", {"granularity": "model"}),
    ("varm", {"granularity": "element"}),
    ("fusechat_sce", {"select_topk": 0.4}),
    ("ties", {"weight": 0.5, "density": 0.5}),
]


@pytest.mark.parametrize(("method", "parameters"), CONFIGURATIONS)
def test_a_flipped_bit_is_found_and_named(
    tmp_path: Path, paths: list[Path], method: str, parameters: dict[str, Any]
) -> None:
    config = configuration(paths, method, **parameters)
    out = merge(config, tmp_path / "out", shard_size=60_000)
    assert verify(config, out) == []
    made = read_checkpoint(Folder(out), "out")
    for name, element in (
        ("model.embed_tokens.weight", 1100 * 32 - 1),
        ("model.layers.1.mlp.down_proj.weight", 77),
    ):
        at = made.tensors[name]
        raw = bytearray((out / at.file).read_bytes())
        raw[at.offset + 2 * element] ^= 1
        (out / at.file).write_bytes(raw)
    assert verify(config, out) == [
        "model.embed_tokens.weight: differs from what its sources give, first in element 35199",
        "model.layers.1.mlp.down_proj.weight: differs from what its sources give, first in"
        " element 77",
    ]


def test_a_sample_checks_some_and_its_structure_all(tmp_path: Path, paths: list[Path]) -> None:
    config = configuration(paths, "varm", granularity="layer")
    out = merge(config, tmp_path / "out")
    seen: set[str] = set()
    assert (
        verify(
            config, out, sample=0.2, progress=lambda name, size: seen.add(name) if size else None
        )
        == []
    )
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


def test_what_mergekit_made_is_verified_too(tmp_path: Path, paths: list[Path]) -> None:
    config = configuration(paths, "varm", granularity="module")
    run_merge(
        MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True)
    )
    (tmp_path / "out" / "config.json").write_bytes((paths[0] / "config.json").read_bytes())
    (tmp_path / "out" / "tokenizer.json").write_bytes((paths[0] / "tokenizer.json").read_bytes())
    assert verify(config, tmp_path / "out") == []


def test_the_command(tmp_path: Path, paths: list[Path]) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(configuration(paths, "varm")))
    out = tmp_path / "out"
    run = CliRunner().invoke
    assert run(main, ["run", str(yml), str(out)]).exit_code == 0
    result = run(main, ["verify", str(yml), str(out), "--sample", "0.5"])
    assert result.exit_code == 0
    assert result.stdout.endswith("merge.yml makes (50% of its tensors recomputed)\n")
    raw = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(raw[:-1])
    result = run(main, ["verify", str(yml), str(out)])
    assert result.exit_code == 1
    assert "Error: 1 difference:" in result.stderr
    assert "truncated" in result.stderr
    config = configuration(paths, "varm", granularity="layer", **{"lambda": 0.5})
    yml.write_text(yaml.safe_dump(config))
    (out / "model.safetensors").write_bytes(raw)
    result = run(main, ["verify", str(yml), str(out)])
    assert "Error: 21 differences:" in result.stderr
    assert result.stderr.endswith("\n  … and 1 more\n")


def test_side_files_that_are_missing_or_damaged(tmp_path: Path, paths: list[Path]) -> None:
    config = configuration(paths, "varm")
    out = merge(config, tmp_path / "out")
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{")
    damaged, missing = verify(config, out, sample=0.01)
    assert damaged.startswith("config.json: can't be read (Expecting property name")
    assert missing == "tokenizer.json: is missing"
    (out / "config.json").unlink()
    damaged, _ = verify(config, out, sample=0.01)
    assert damaged.startswith("config.json: can't be read ([Errno 2] No such file")


def test_what_cannot_be_verified(tmp_path: Path, paths: list[Path]) -> None:
    config = configuration(paths, "varm")
    with pytest.raises(RequestError, match=r"out: can't be read \(.*No such file"):
        verify(config, tmp_path / "out")
    out = merge(config, tmp_path / "out")
    with pytest.raises(RequestError, match="--memory: at least 4MiB is needed"):
        verify(config, out, memory=1 << 20)

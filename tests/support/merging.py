"""Configurations of merges, the commands that carry them out, and merged tensors bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from fusechat_merge.cli import main
from fusechat_merge.engine.execute import merge
from fusechat_merge.planning.plan import SPHERICAL
from tests.support.tensors import same_bits

Tensors = dict[str, Tensor]


def configuration(paths: Sequence[Path], method: str = "varm", **settings: Any) -> dict[str, Any]:
    """A mergekit configuration of a base, which comes first, and its targets."""
    base, *targets = map(str, paths)
    models = [{"model": target} for target in targets]
    return {"merge_method": method, "base_model": base, "models": models, **settings}


def write_yaml(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def cli(*words: object) -> Result:
    """`fusechat-merge WORDS` in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def run_program(
    command: Sequence[str], folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with one thread a library."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=240,
        check=False,
    )


def run_mergekit(settings: Mapping[str, Any], out: Path, **options: Any) -> Tensors:
    """What mergekit's own `run_merge` writes."""
    config = MergeConfiguration.model_validate(settings)
    run_merge(config, str(out), MergeOptions(quiet=True, **options))
    return read(out)


def as_mergekit(settings: Mapping[str, Any], folder: Path, **options: Any) -> Tensors:
    """What mergekit and fusechat-merge write, which has to be the same, config.json included.

    Where mergekit computes sums and angles in bfloat16, its numbers are near only.
    """
    expected = run_mergekit(settings, folder / "mergekit", **options)
    found = read(merge(settings, folder / "ours", **options))
    if settings["merge_method"] in SPHERICAL:
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.allclose(found[name].float(), tensor.float(), rtol=0.02, atol=5e-2), name
    else:
        assert_same(found, expected)
    ours, theirs = (AutoConfig.from_pretrained(folder / n).to_dict() for n in ("ours", "mergekit"))
    ours.pop("_name_or_path"), theirs.pop("_name_or_path")
    if "lm_head.weight" in expected:  # mergekit leaves it tied to the embeddings
        theirs["tie_word_embeddings"] = False
    assert ours == theirs
    return expected


def piece(models: Sequence[Path], begin: int, end: int, **more: Any) -> dict[str, Any]:
    """A slice of these layers."""
    return {"sources": [{"model": str(m), "layer_range": [begin, end]} for m in models], **more}


def add_tokenizers(paths: Sequence[Path], *vocabularies: Sequence[str]) -> None:
    """A tokenizer for each path: `<unk>` and these words, in this order."""
    for path, words in zip(paths, vocabularies, strict=True):
        ids = {word: number for number, word in enumerate(("<unk>", *words))}
        backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)


def read(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors files."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work_of(out: Path) -> Path:
    """Where the unfinished parts of a merge lie."""
    return out.parent / f".{out.name}.partial"


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "fusechat_merge.json").read_text())


def change_json(path: Path, **changes: Any) -> dict[str, Any]:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
    return content


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not same_bits(found[name], expected[name])] == []

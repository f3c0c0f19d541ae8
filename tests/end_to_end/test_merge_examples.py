"""Every YAML in examples/merge merges as it stands, with pico models in place of those it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration

from tests.support.checkpoints import llama_family
from tests.support.merging import Tensors, read, run_mergekit

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "merge").glob("*.yml"))
PIVOT = "openchat/openchat_3.5"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{the name in an example: a checkpoint}, the targets moved from the pivot."""
    names = {PIVOT}
    for example in EXAMPLES:
        config = MergeConfiguration.model_validate(yaml.safe_load(example.read_text()))
        names |= {reference.model.path for reference in config.referenced_models()}
    ordered = sorted(names, key=lambda name: (name != PIVOT, name))
    dtypes, changes = (torch.bfloat16,) * len(names), {"num_hidden_layers": 4}
    paths = llama_family(tmp_path_factory.mktemp("models"), dtypes, changes=changes)
    return dict(zip(ordered, paths, strict=True))


def merge(example: Path, models: dict[str, Path], out: Path) -> Tensors:
    text = example.read_text(encoding="utf-8")
    for name in sorted(models, key=len, reverse=True):
        text = text.replace(f"{name}\n", f"{models[name]}\n")
    return run_mergekit(yaml.safe_load(text), out, copy_tokenizer=False)


def moved(merged: Tensors, pivot: Tensors) -> Iterator[str]:
    assert merged.keys() == pivot.keys()
    return (name for name, value in pivot.items() if not torch.equal(value, merged[name]))


def test_there_are_examples():
    assert {example.stem for example in EXAMPLES} >= {"varm", "sce"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_merges_as_it_stands(example, models, tmp_path):
    pivot = read(models[PIVOT])
    names = set(moved(merge(example, models, tmp_path / "out"), pivot))
    if example.stem == "varm-attention":
        assert names == {name for name in pivot if "self_attn" in name}
    else:
        assert names == set(pivot)


def test_examples_differ(models, tmp_path):
    """A parameter that mergekit dropped would give the default's result."""
    default, *others = (
        merge(example, models, tmp_path / example.stem)
        for example in sorted(EXAMPLES, key=lambda example: example.stem != "varm")
    )
    for other in others:
        assert list(moved(other, default))

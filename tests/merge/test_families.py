"""Merges of every family's checkpoints: the right numbers, the base's names, and they load."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from fusechat_merge.engine.execute import merge
from tests.support.families import FAMILIES, family
from tests.support.merging import Tensors, configuration, read, record, run_mergekit

DOCS = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8").splitlines()
DOWN = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}


def matrices(name: str, tensors: Tensors) -> Iterator[tuple[slice, ...]]:
    """Where each parameter matrix of a tensor is."""
    shape = tensors[name].shape
    if len(shape) < 3 or shape[1] == 1 or not re.search(r"\.(experts|block_sparse_moe)\.", name):
        yield ()
        return
    fused = next((kind for kind in DOWN if kind in name), None)
    halves = fused and shape[2] == tensors[name.replace(fused, DOWN[fused])].shape[1]
    inner = tensors[name.replace(fused, DOWN[fused])].shape[2] if fused else 0
    for expert in range(shape[0]):
        if halves and shape[1] == 2 * inner:
            yield slice(expert, expert + 1), slice(0, inner)
            yield slice(expert, expert + 1), slice(inner, 2 * inner)
        else:
            yield (slice(expert, expert + 1),)


def merged(base: Tensors, targets: list[Tensors], layers: bool = False) -> Tensors:
    """FusionChat eq. 7 in float64, for matrices or for layers."""
    deltas = [{n: t[n].double() - base[n].double() for n in base} for t in targets]
    units: Mapping[str, list[tuple[str, tuple[slice, ...]]]] = defaultdict(list)
    for name in base:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        for place in matrices(name, base):
            key = (layer[0] if layer else name) if layers else f"{name}{place}"
            units[key].append((name, place))
    result = {name: tensor.double() for name, tensor in base.items()}
    for places in units.values():
        squares = [sum(float(d[n][p].square().sum()) for n, p in places) for d in deltas]
        for name, place in places:
            for delta, square in zip(deltas, squares, strict=True):
                result[name][place] += square / sum(squares) * delta[name][place]
    return result


def close(found: Tensors, expected: Mapping[str, Tensor]) -> list[str]:
    return [n for n in expected if not torch.allclose(found[n].double(), expected[n], atol=2e-6)]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    paths, made = family(name, tmp_path), FAMILIES[name]
    base, *targets = map(read, paths)
    settings = configuration(paths)
    out = read(merge(settings, tmp_path / "out"))
    assert set(out) == set(base)
    assert close(out, merged(base, targets)) == []
    written = record(tmp_path / "out")
    assert sum(unit["numel"] for unit in written["units"]) == sum(map(torch.numel, base.values()))
    assert written["left_out"] == written["copied_from_base"] == written["merged_by_name"] == []
    by_layer = read(merge(configuration(paths, parameters={"granularity": "layer"}),
                          tmp_path / "layer"))  # fmt: skip
    assert close(by_layer, merged(base, targets, layers=True)) == []
    mean = read(merge({"merge_method": "linear", "models": [
        {"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]]},
        tmp_path / "linear"))  # fmt: skip
    halves = {n: (targets[0][n].double() + targets[1][n].double()) / 2 for n in base}
    assert set(mean) == set(base)
    assert close(mean, halves) == []

    load = getattr(transformers, made.model).from_pretrained
    model, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    try:
        run_mergekit(settings, tmp_path / "mergekit")
        theirs = load(tmp_path / "mergekit").state_dict()
        ours = model.state_dict()
        other = [
            n
            for n in ours
            if not (theirs[n].shape == ours[n].shape and torch.equal(theirs[n], ours[n]))
        ]
        assert bool(other) == (made.mergekit != "same"), other
        assert all(made.differs in tensor for tensor in other), other
    except RuntimeError as error:
        assert made.mergekit.startswith("wants"), error
    assert made.row(name) in DOCS, made.row(name)

"""fusechat-merge analyze: statistics and weights of every unit, as JSON, tables and a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from matplotlib.axes import Axes

from fusechat_common.errors import RequestError
from fusechat_merge.engine.analysis import analyze
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.journal import Sink
from fusechat_merge.engine.merger import Merger
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.planning.planner import plan
from fusechat_merge.results.record import Analysis, UnitWeights
from fusechat_merge.results.report import draw, short_names, tables
from tests.support.checkpoints import llama_family
from tests.support.merging import cli, configuration, read, record, write_yaml


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return llama_family(tmp_path_factory.mktemp("family"), (torch.bfloat16,) * 4, shards=2)


@pytest.fixture(scope="module")
def tensors(family):
    return [{name: tensor.double() for name, tensor in read(path).items()} for path in family]


def weighted(family: list[Path], **parameters: object) -> dict:
    """A configuration in which the second target has the weight 2."""
    config = configuration(family, parameters=parameters, dtype="float32")
    config["models"][1]["parameters"] = {"weight": 2.0}
    return config


def analyzed(folder: Path, config: dict, *options: object) -> Result:
    return cli("analyze", write_yaml(folder / "merge.yml", config), *options)


@pytest.mark.parametrize(
    ("granularity", "unit"),
    [
        ("matrix", "model.layers.1.self_attn.k_proj.weight"),
        ("module", "model.layers.1.self_attn"),
        ("layer", "model.layers.1"),
        ("model", ""),
        ("element", "model.layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("statistic", ["square", "absolute"])
def test_statistics_and_weights(tmp_path, family, tensors, granularity, unit, statistic):
    config = weighted(family, granularity=granularity, statistic=statistic)
    result = analyzed(tmp_path, config, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["method"] == "varm"
    assert report["targets"] == [str(path) for path in family[1:]]
    base, *targets = tensors
    named = [name for unit in report["units"] for name in unit["tensors"]]
    assert sorted(named) == sorted(base)

    (found,) = (u for u in report["units"] if u["name"] == (unit or "model"))
    members = [name for name in base if name.startswith(unit)]
    numel = sum(base[name].numel() for name in members)
    measure = torch.abs if statistic == "absolute" else torch.square
    means = [sum(measure(t[n] - base[n]).sum().item() for n in members) / numel for t in targets]
    shares = [means[0], 2 * means[1], means[2]]
    assert found["granularity"] == granularity
    assert found["numel"] == numel
    assert sorted(found["tensors"]) == sorted(members)
    assert found["statistics"] == pytest.approx(means, rel=1e-12)
    assert found["weights"] == pytest.approx([s / sum(shares) for s in shares], rel=1e-12)
    merged = record(merge(config, tmp_path / "out"))
    kept = (None, []) if granularity == "element" else (granularity, report["units"])
    assert (merged["granularity"], merged["units"]) == kept


def test_sce_shares(tmp_path, family, tensors):
    config = configuration(family, "fusechat_sce", parameters={"select_topk": 1.0})
    report = json.loads(analyzed(tmp_path, config, "--json").stdout)
    base, *targets = tensors
    name = "model.layers.0.mlp.down_proj.weight"
    (found,) = (unit for unit in report["units"] if unit["name"] == name)
    sums = [torch.square(target[name] - base[name]).sum().item() for target in targets]
    assert found["weights"] == pytest.approx([s / sum(sums) for s in sums], rel=1e-6)


def test_out_and_tables(tmp_path, family):
    out = tmp_path / "analysis"
    result = analyzed(tmp_path, weighted(family), "--out", out)
    assert result.exit_code == 0, result.output
    for title in ("weights by module", "weights by layer", "most uneven of 21 units"):
        assert title in result.stdout
    assert len(json.loads((out / "analysis.json").read_text())["units"]) == 21
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis", "merge.yml"]


def test_nan_is_named(tmp_path):
    def edit(label, tensors):
        if label == "t1":
            tensors["model.norm.weight"][3] = float("nan")

    family = llama_family(tmp_path / "family", edit=edit)
    result = analyzed(tmp_path, weighted(family))
    assert result.exit_code == 1
    assert "tensor model.norm.weight of model" in result.output
    assert f"{family[2]} holds NaN or Inf" in result.output
    assert "Traceback" not in result.output


def analysis(weights: dict[str, tuple[float, ...]], *targets: str) -> Analysis:
    rest = {"granularity": "matrix", "numel": 1, "statistics": ()}
    units = [
        UnitWeights(name=name, tensors=(name,), weights=shares, **rest)
        for name, shares in weights.items()
    ]
    return Analysis(method="varm", base="p", targets=targets, units=tuple(units))


def test_rows_of_the_tables_are_means():
    weights = {
        "model.layers.0.a.weight": (0.25, 0.75),
        "model.layers.1.a.weight": (0.75, 0.25),
        "model.norm.weight": (1.0, 0.0),
    }
    modules, layers, uneven = tables(analysis(weights, "x/one", "x/two"))
    assert [list(column.cells) for column in modules.columns] == [
        ["a", "model.norm"],
        ["2", "1"],
        ["0.500", "1.000"],
        ["0.500", "0.000"],
    ]
    assert list(layers.columns[0].cells) == ["0", "1"]
    assert next(iter(uneven.columns[0].cells)) == "model.norm.weight"
    assert [column.header for column in uneven.columns[2:]] == ["one", "two"]


def test_experts_and_several_stacks_of_layers(tmp_path):
    layers, visual = "model.language_model.layers", "model.visual.blocks"
    weights = {
        f"{layers}.1.mlp.experts.7.up_proj.weight": (0.25, 0.75),
        f"{layers}.1.mlp.experts.7.down_proj.weight": (0.75, 0.25),
        f"{layers}.2.mlp.experts.gate_up_proj[7].gate": (1.0, 0.0),
        f"{visual}.0.norm1.weight": (0.0, 1.0),
    }
    modules, by_layer, experts, _ = tables(analysis(weights, "x/one", "x/two"))
    assert list(modules.columns[0].cells) == [
        "mlp.experts.up_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj.gate", "norm1"
    ]  # fmt: skip
    assert list(by_layer.columns[0].cells) == ["layers.1", "layers.2", "blocks.0"]
    assert [list(column.cells) for column in experts.columns] == [
        ["layer layers.2, expert 7", "layer layers.1, expert 7"],
        ["1", "2"],
        ["1.000", "0.500"],
        ["0.000", "0.500"],
    ]
    draw(analysis(weights, "x/one", "x/two"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_models_of_the_same_folder_name_are_told_apart():
    assert short_names(["a/x/merged", "a/y/merged"]) == ["x/merged", "y/merged"]
    assert short_names(["x/one", "x/one/"]) == ["x/one", "x/one/"]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["only"], ["1.00"]),  # a model without layers
        ([f"model.layers.{n}.a.weight" for n in range(8)], ["1.00"] * 8),
        ([f"model.layers.{n}.a.weight" for n in range(9)], []),  # they could not be read
    ],
)
def test_the_picture_and_its_numbers(tmp_path, monkeypatch, names, numbers):
    drawn = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: drawn.append(text))
    draw(analysis(dict.fromkeys(names, (1.0,)), "t"), tmp_path / "x.png")
    assert drawn == numbers
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_method_without_weights_has_nothing_to_analyze(family, tmp_path, monkeypatch):
    monkeypatch.setattr(Merger, "_measure", lambda self, output: None)
    result = analyzed(tmp_path, weighted(family))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "merge_method varm has no weights to analyze" in result.stderr


def test_a_method_that_nothing_writes_is_not_taken_for_another(family):
    planned = plan(weighted(family, granularity="element"))
    outputs = [replace(output, how="median") for output in planned.outputs if output.how == "varm"]
    files = SourceFiles(planned)
    ring = divide(outputs, 1 << 26, 1)
    merger = Merger(planned, files, Sink(), ring, lambda tensor, nbytes: None)
    with pytest.raises(NotImplementedError, match="median is one of `METHODS`, but not"):
        merger.run(outputs)
    files.close()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--memory", "1MiB"], "--memory: at least 5MiB is needed"),
        ({"merge_method": "vram"}, [], "did you mean 'varm'?"),
        (
            {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}},
            [],
            "Error: merge_method task_arithmetic has no weights to analyze",
        ),
    ],
)
def test_what_cannot_be_analyzed(tmp_path, family, changes, options, message):
    result = analyzed(tmp_path, weighted(family, granularity="matrix") | changes, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_plan_with_problems_is_not_analyzed(family):
    with pytest.raises(RequestError, match="granularity"):
        analyze(plan(weighted(family, granularity="matrices")))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[], []], "no tensor is computed from targets, so"),
        ([[1], [2]], "slices with different targets can't be analyzed"),
    ],
)
def test_slices_that_cannot_be_analyzed(family, targets, message):
    slices = [
        {"sources": [{"model": str(family[n]), "layer_range": [at, at + 1]} for n in (0, *here)]}
        for at, here in enumerate(targets)
    ]
    config = {"merge_method": "varm", "base_model": str(family[0]), "slices": slices}
    with pytest.raises(RequestError, match=message):
        analyze(plan(config))


def test_the_picture_needs_matplotlib(tmp_path, family, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = analyzed(tmp_path, weighted(family), "--out", tmp_path / "analysis")
    assert result.exit_code == 2
    assert "--out draws with matplotlib: pip install 'fusechat[report]'" in result.stderr
    assert not (tmp_path / "analysis").exists()


def test_a_place_that_takes_nothing_is_known_before_anything_is_measured(
    family, tmp_path, monkeypatch
):
    monkeypatch.setattr("fusechat_merge.engine.analysis.analyze", None)
    (tmp_path / "file").write_text("")
    result = analyzed(tmp_path, weighted(family), "--out", tmp_path / "file" / "analysis")
    assert result.exit_code == 2
    assert "file can't be written to; name another folder" in result.stderr

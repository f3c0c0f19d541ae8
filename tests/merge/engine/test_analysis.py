"""fusechat-merge analyze: statistics and weights of every unit, as JSON, tables and a picture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from fusechat_common.errors import RequestError
from fusechat_merge.cli import main
from fusechat_merge.engine.analysis import _NothingWritten, analyze
from fusechat_merge.engine.merger import Merger
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.planning.planner import plan
from fusechat_merge.results.record import Analysis, UnitWeights
from fusechat_merge.results.report import draw, short_names, tables


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, llama_family: Callable[..., list[Path]]):
    return llama_family(tmp_path_factory.mktemp("family"), (torch.bfloat16,) * 4, shards=2)


def _analyze(folder: Path, config: dict, *options: str) -> Result:
    (folder / "merge.yml").write_text(yaml.safe_dump(config))
    return CliRunner().invoke(main, ["analyze", str(folder / "merge.yml"), *options])


def _config(family: list[Path], **parameters: object) -> dict:
    models = [{"model": str(path)} for path in family[1:]]
    models[1]["parameters"] = {"weight": 2.0}
    return {
        "merge_method": "varm",
        "base_model": str(family[0]),
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
    }


def _unit(name: str, *weights: float) -> UnitWeights:
    return UnitWeights(
        name=name, granularity="matrix", tensors=(name,), numel=1, statistics=(), weights=weights
    )


def _analysis(targets: tuple[str, ...], units: tuple[UnitWeights, ...]) -> Analysis:
    return Analysis(method="varm", base="p", targets=targets, units=units)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor.double()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


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
def test_statistics_and_weights(
    tmp_path: Path, family: list[Path], granularity: str, unit: str, statistic: str
) -> None:
    config = _config(family, granularity=granularity, statistic=statistic)
    result = _analyze(tmp_path, config, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["method"] == "varm"
    assert report["targets"] == [str(path) for path in family[1:]]
    base, *targets = (_tensors(path) for path in family)
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
    assert found["statistics"] == pytest.approx(means, rel=1e-6)
    assert found["weights"] == pytest.approx([s / sum(shares) for s in shares], rel=1e-6)


def test_sce_shares(tmp_path: Path, family: list[Path]) -> None:
    config = _config(family) | {"merge_method": "fusechat_sce"}
    config["models"][1].pop("parameters")
    config["parameters"] = {"select_topk": 1.0}
    report = json.loads(_analyze(tmp_path, config, "--json").stdout)
    base, *targets = (_tensors(path) for path in family)
    name = "model.layers.0.mlp.down_proj.weight"
    (found,) = (unit for unit in report["units"] if unit["name"] == name)
    sums = [torch.square(target[name] - base[name]).sum().item() for target in targets]
    assert found["weights"] == pytest.approx([s / sum(sums) for s in sums], rel=1e-6)


def test_out_and_tables(tmp_path: Path, family: list[Path]) -> None:
    result = _analyze(tmp_path, _config(family), "--out", str(tmp_path / "analysis"))
    assert result.exit_code == 0, result.output
    assert "weights by module" in result.stdout
    assert "weights by layer" in result.stdout
    assert "most uneven of 21 units" in result.stdout
    written = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert len(written["units"]) == 21
    png = (tmp_path / "analysis" / "analysis.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis", "merge.yml"]


def test_other_methods_are_refused(tmp_path: Path, family: list[Path]) -> None:
    config = _config(family, weight=1.0) | {"merge_method": "task_arithmetic"}
    result = _analyze(tmp_path, config)
    assert result.exit_code == 2
    assert "Error: merge_method task_arithmetic has no weights to analyze" in result.output


def test_nan_is_named(tmp_path: Path, llama_family: Callable[..., list[Path]]) -> None:
    def edit(label: str, tensors: dict[str, torch.Tensor]) -> None:
        if label == "t1":
            tensors["model.norm.weight"][3] = float("nan")

    family = llama_family(tmp_path / "family", edit=edit)
    result = _analyze(tmp_path, _config(family))
    assert result.exit_code == 1
    assert "tensor model.norm.weight of model" in result.output
    assert f"{family[2]} holds NaN or Inf" in result.output
    assert "Traceback" not in result.output


def test_rows_of_the_tables_are_means() -> None:
    units = tuple(
        _unit(name, *weights)
        for name, weights in [
            ("model.layers.0.a.weight", (0.25, 0.75)),
            ("model.layers.1.a.weight", (0.75, 0.25)),
            ("model.norm.weight", (1.0, 0.0)),
        ]
    )
    modules, layers, uneven = tables(_analysis(("x/one", "x/two"), units))
    assert [list(column.cells) for column in modules.columns] == [
        ["a", "model.norm"],
        ["2", "1"],
        ["0.500", "1.000"],
        ["0.500", "0.000"],
    ]
    assert list(layers.columns[0].cells) == ["0", "1"]
    assert next(iter(uneven.columns[0].cells)) == "model.norm.weight"
    assert [column.header for column in uneven.columns[2:]] == ["one", "two"]


def test_models_of_the_same_folder_name_are_told_apart() -> None:
    assert short_names(["a/x/merged", "a/y/merged"]) == ["x/merged", "y/merged"]
    assert short_names(["x/one", "x/one/"]) == ["x/one", "x/one/"]


def test_picture_of_a_model_without_layers(tmp_path: Path) -> None:
    draw(_analysis(("t",), (_unit("only", 1.0),)), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_method_without_weights_has_nothing_to_analyze(
    family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Merger, "_measure", lambda self, output: None)
    result = _analyze(tmp_path, _config(family))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "merge_method varm has no weights to analyze" in result.stderr


def test_a_method_that_nothing_writes_is_not_taken_for_another(family: list[Path]) -> None:
    planned = plan(_config(family, granularity="element"))
    outputs = [replace(output, how="median") for output in planned.outputs if output.how == "varm"]
    files = SourceFiles({name: m.folder for name, m in planned.models.items() if m.folder})
    ring = divide(outputs, 1 << 26, 1)
    merger = Merger(planned, files, _NothingWritten(), ring, lambda tensor, nbytes: None)
    with pytest.raises(NotImplementedError, match="median is one of `METHODS`, but not"):
        merger.run(outputs)
    files.close()


def test_what_cannot_be_analyzed(tmp_path: Path, family: list[Path]) -> None:
    config = _config(family, granularity="matrix")
    with pytest.raises(RequestError, match="granularity"):
        analyze(plan(config | {"parameters": {"granularity": "matrices"}}))
    result = _analyze(tmp_path, config, "--memory", "1MiB")
    assert result.exit_code == 2
    assert "--memory: at least 5MiB is needed" in result.stderr
    result = _analyze(tmp_path, config | {"merge_method": "vram"})
    assert result.exit_code == 2
    assert "did you mean 'varm'?" in result.stderr

    def sliced(*models: list[Path]) -> dict:
        slices = [
            {"sources": [{"model": str(path), "layer_range": [at, at + 1]} for path in paths]}
            for at, paths in enumerate(models)
        ]
        return {"merge_method": "varm", "base_model": str(family[0]), "slices": slices}

    with pytest.raises(RequestError, match="no tensor is computed from targets here"):
        analyze(plan(sliced(family[:1], family[:1])))
    with pytest.raises(RequestError, match="slices with different targets can't be analyzed"):
        analyze(plan(sliced(family[:2], [family[0], family[2]])))


def test_the_picture_needs_matplotlib(
    tmp_path: Path, family: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = _analyze(tmp_path, _config(family), "--out", str(tmp_path / "analysis"))
    assert result.exit_code == 2
    assert "--out draws with matplotlib: pip install 'fusechat[report]'" in result.stderr
    assert not (tmp_path / "analysis").exists()


def test_numbers_are_left_out_where_they_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: drawn.append(text))
    for layers in (8, 9):
        units = tuple(_unit(f"model.layers.{n}.a.weight", 1.0) for n in range(layers))
        draw(_analysis(("t",), units), tmp_path / f"{layers}.png")
    assert drawn == ["1.00"] * 8
    assert (tmp_path / "9.png").stat().st_size > 1000


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fusechat_merge.cli import main; "
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0; "
        "print(sorted({'torch', 'mergekit', 'numpy', 'transformers', 'rich'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_a_place_that_takes_nothing_is_known_before_anything_is_measured(
    family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusechat_merge.engine.analysis.analyze", None)
    (tmp_path / "file").write_text("")
    result = _analyze(tmp_path, _config(family), "--out", str(tmp_path / "file" / "analysis"))
    assert result.exit_code == 2
    assert "file can't be written to; name another folder" in result.stderr

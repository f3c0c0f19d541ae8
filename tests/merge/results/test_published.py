"""A merged folder names hub ids and folders, and no path of the machine it was made on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file

from fusechat_merge.engine.execute import is_finished, merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.planning.configuration import referenced_models
from fusechat_merge.planning.planner import plan
from fusechat_merge.results.published import PublicNames
from tests.support.checkpoints import llama_family, write_adapter


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models in it, also where their names have + and @."""
    for name in ("pivot", "mine/target", "yours/target", "c++/run@3", "~/kept", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(base: Any, *models: Any, **settings: Any) -> tuple[PublicNames, MergeConfiguration]:
    entries = [{"model": model} for model in models]
    config = MergeConfiguration.model_validate(
        {"merge_method": "varm", "base_model": base, "models": entries, **settings}
    )
    return PublicNames(config), config


@pytest.mark.parametrize(
    ("written", "public", "hub_ids"),
    [
        ("org/pivot", "org/pivot", ["org/pivot"]),
        ("org/pivot@v2+org/adapter@main", "org/pivot@v2+org/adapter@main",
         ["org/pivot", "org/adapter"]),
        ("HERE/pivot", "pivot", []),
        ("HERE/pivot/", "pivot", []),
        ("HERE/pivot@HERE/pivot", "pivot", []),
        ("./mine/target", "target", []),
        ("mine/../pivot", "pivot", []),
        ("~/kept", "kept", []),
        ("org/pivot+HERE/adapter", "org/pivot+adapter", ["org/pivot"]),
        ("org/pivot@v2+./adapter", "org/pivot@v2+adapter", ["org/pivot"]),
        ("HERE/pivot+org/adapter@main", "pivot+org/adapter@main", ["org/adapter"]),
        ("HERE/pivot@main+HERE/adapter@main", "pivot+adapter", []),
        ({"model": {"path": "HERE/c++/run@3"}}, "run@3", []),
        ({"model": {"path": "HERE/pivot", "revision": "HERE"}}, "pivot", []),
    ],
)  # fmt: skip
def test_names_of_models(machine: Path, written: Any, public: str, hub_ids: list[str]) -> None:
    written = json.loads(json.dumps(written).replace("HERE", str(machine)))
    names, config = names_in(written, "org/other")
    base = config.base_model
    assert base is not None
    assert names.of(base) == public
    assert names.hub_ids(referenced_models(config)) == [*hub_ids, "org/other"]
    source = yaml.safe_dump({"base_model": written, "models": [{"model": "org/other"}]})
    shown = names.configuration(source)
    assert str(machine) not in shown
    read = ModelReference.model_validate(yaml.safe_load(shown)["base_model"])
    assert names.of(read) == public


def test_folders_of_one_name_are_told_apart(machine: Path) -> None:
    names, config = names_in(
        "target", "mine/target", str(machine / "yours/target"), tokenizer_source="yours/target/"
    )
    found = [names.of(model) for model in referenced_models(config)]
    assert found == ["target", "target-2", "target-3"]  # the first is the hub's
    source = yaml.safe_dump({"tokenizer_source": "yours/target/", "models": ["mine/target"]})
    assert yaml.safe_load(names.configuration(source)) == {
        "tokenizer_source": "target-3",
        "models": ["target-2"],
    }


def test_a_configuration_without_paths_is_kept_as_written(machine: Path) -> None:
    names, _ = names_in("org/pivot", "org/other")
    source = "# mine, of org/other\nbase_model:   org/pivot # 1/2\nlambda: [0.5, 1]\n"
    assert names.configuration(source) == source


@pytest.mark.parametrize("comment", ["was HERE/pivot", "'./pivot'", "(see ~/kept)"])
def test_a_comment_with_a_path_is_left_out(machine: Path, comment: str) -> None:
    names, _ = names_in("org/pivot", "org/other")
    (machine / "kept").mkdir()
    comment = comment.replace("HERE", str(machine))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(machine))
        shown = names.configuration(f"base_model: org/pivot  # {comment}\nlambda: 0.5\n")
    assert shown == "base_model: org/pivot\nlambda: 0.5\n"


def test_nothing_of_a_merged_folder_has_a_path_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, after +, after @, relative, as `~`, and in the base's config.json."""
    home = tmp_path / "someone"
    base, target, other, third = llama_family(home / "models", (torch.bfloat16,) * 4)
    adapter = write_adapter(home / "adapter", base_model_name_or_path=str(base))
    text = (base / "config.json").read_text()
    named = text.replace("{", f'{{"_name_or_path": "{base}", ', 1)
    (base / "config.json").write_text(named)
    (home / "~").mkdir()
    other.rename(home / "~" / "kept")
    extra = load_file(third / "model.safetensors") | {"extra.weight": torch.ones(2)}
    save_file(extra, third / "model.safetensors")
    monkeypatch.chdir(home)
    source = (
        f"# from {home}\nmerge_method: varm\nbase_model: {base}@{home}\nmodels:\n"
        f"  - model: {base}+{adapter}\n  - model: models/{target.name}\n  - model: ~/kept\n"
        f"  - model: models/../models/{third.name}@main\n"
    )
    (home / "merge.yml").write_text(source)
    out = merge(home / "merge.yml", tmp_path / "out")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        if path.suffix != ".safetensors":
            assert b"someone" not in path.read_bytes(), path
            assert b"models/" not in path.read_bytes(), path
    record = json.loads((out / "fusechat_merge.json").read_text())
    assert record["base_model"] == base.name
    assert record["models"] == [
        base.name, f"{base.name}+adapter", target.name, "kept", third.name,
    ]  # fmt: skip
    assert [left["model"] for left in record["left_out"]] == [third.name]
    assert (out / "config.json").read_text() == named.replace(str(base), "")
    shown = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert [entry["model"] for entry in shown["models"]] == record["models"][1:]
    _, metadata, _ = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers", "tags": ["merge", "mergekit", "fusechat"],
    }  # fmt: skip
    # The configuration that it was made by still counts.
    assert is_finished(plan(home / "merge.yml"), out)
    assert verify(home / "merge.yml", out) == []


def test_the_card_names_models_of_the_hub_as_its_bases() -> None:
    from huggingface_hub import ModelCard

    from fusechat_merge.results.card import model_card
    from fusechat_merge.results.record import MergeRecord

    record = MergeRecord(
        fusechat="0", merge_method="linear", base_model=None, models=("org/a@v2", "b"),
        granularity=None, units=(), merged_by_name=(), copied_from_base=(), left_out=(), dequantised=(),
        identity="", device="cpu",
    )  # fmt: skip
    card = ModelCard(model_card(record, ["org/a"], "merge_method: linear\n"))
    assert card.data.base_model == ["org/a"]
    assert "by linear, made with fusechat-merge.\n\n- `org/a@v2`\n- `b`\n" in card.text
    assert card.text.endswith("```yaml\nmerge_method: linear\n```\n")

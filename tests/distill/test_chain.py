"""The whole chain from the command line: killed and resumed, changed, extended, merged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusechat_common.errors import RequestError
from fusechat_distill.chain import MergeStage, run_problems
from fusechat_distill.cli import commands
from fusechat_distill.inputs.merge_yaml import merge_configuration
from fusechat_distill.inputs.open import open_inputs
from fusechat_distill.recipe.schema import Recipe, load_recipe
from fusechat_distill.storage.processes import Processes
from tests.support import chain
from tests.support.chain import (
    ROOT,
    Silent,
    launched,
    printed,
    read_json,
    refused,
    run,
)
from tests.support.killing import in_child, kill_at

TIMED = ("trainer_state.json", "log.jsonl")
"""Files that say how long something took."""


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run makes that must not depend on how it went."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED and not path.name.startswith(".")
    }


def times(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "digests.json")
    }


def recipe(
    folder: Path, models: Path, name: str = "out", output: Path | None = None, **sections
) -> Path:
    output = output or folder / name
    return chain.recipe(folder, models, name, count=270, output=str(output), **sections)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models) -> Path:
    """A recipe with one source, run once from beginning to end."""
    path = recipe(tmp_path_factory.mktemp("chain"), models)
    names = (
        "score pivot",
        "score neox",
        "align neox",
        "fuse neox",
        "train neox",
        "merge merge.yml",
    )
    assert stages(printed("run", path)) == list(names)
    return path


def stages(shown: str) -> list[str]:
    return [line.split(":")[0] for line in shown.splitlines()]


def out_of(path: Path) -> Path:
    return load_recipe(path).output_folder


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Of the recipe's first target."""
    return load_file(out_of(path) / "targets" / "neox" / "model.safetensors")


def test_the_whole_chain_makes_a_target_once(whole):
    out = out_of(whole)
    target = out / "targets" / "neox"
    AutoModelForCausalLM.from_pretrained(target)
    AutoTokenizer.from_pretrained(target)
    assert not list((out / "training").iterdir())
    assert yaml.safe_load((out / "merge.yml").read_text()) == {
        "merge_method": "varm",
        "base_model": str(load_recipe(whole).pivot.model),
        "models": [{"model": str(target)}],
        "dtype": "bfloat16",
    }
    before = times(out / "targets") | times(out / "fused")
    printed("run", whole)
    assert times(out / "targets") | times(out / "fused") == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_every_stage_the_result_is_the_same(whole, models):
    path = recipe(whole.parent, models, "killed")
    out = out_of(path)
    moments = [
        ("scores/pivot/", 4),
        ("scores/neox/", 6),
        ("aligned/", 3),
        ("aligned/neox/0", 2),
        ("fused/neox/", 4),
        ("fused/neox/.decisions", 1),
        ("training/neox/", 2),
        ("checkpoint-2/trainer_state", 1),
        ("checkpoint-4", 1),
        ("targets/.neox.part/README", 1),
        ("targets/neox", 1),
        (".merge.yml", 1),
    ]
    for part, number in moments:
        status = in_child(lambda: command(path), kill_at(part, number))
        assert status == -signal.SIGKILL, f"{part}: nothing was written there"
    assert in_child(lambda: command(path)) == 0
    expected = files(out_of(whole))
    found = files(out)
    texts = {"merge.yml"}
    assert found.keys() == expected.keys()
    differing = {name for name in found if found[name] != expected[name]} - {"digests.json"}
    assert differing <= texts
    merged = [yaml.safe_load(made["merge.yml"]) for made in (found, expected)]
    assert merged[0]["models"] == [{"model": str(out / "targets" / "neox")}]
    assert merged[0]["base_model"] == merged[1]["base_model"]
    assert not list(out.rglob("*.part"))
    assert not list(out.rglob("quarantine"))
    assert not list((out / "training").iterdir())


def command(path: Path) -> None:
    commands.main(["run", str(path)], standalone_mode=False)


def test_a_source_that_is_added_leaves_the_others_files_untouched(whole, models):
    out = out_of(whole)
    both = [str(models / "neox"), {"model": str(models / "twin"), "name": "other"}]
    path = recipe(whole.parent, models, "more", out, sources=both)
    before = times(out)
    merge_before = (out / "merge.yml").read_text()
    lines = printed("status", path).splitlines()
    ahead = [f"{stage} other" for stage in ("score", "align", "fuse", "train")]
    assert [line for line in lines if line.endswith(": not begun")] == [
        f"{stage}: not begun" for stage in (*ahead, "merge merge.yml")
    ]
    printed("run", path)
    after = times(out)
    changed = {file for file in before if after.get(file) != before[file]}
    assert changed == {out / "merge.yml"}
    models_now = yaml.safe_load((out / "merge.yml").read_text())["models"]
    assert models_now == [{"model": str(out / "targets" / name)} for name in ("neox", "other")]
    (out / "merge.yml").write_text(merge_before)
    printed("run", whole)


def test_a_merge_yml_that_was_edited_is_not_overwritten(whole, models):
    out = out_of(whole)
    text = (out / "merge.yml").read_text()
    ties = {"merge_method": "ties", "parameters": {"weight": 1.0}}
    changed = recipe(whole.parent, models, "ties", out, merge=ties)
    (out / "merge.yml").write_text(text.replace("bfloat16", "float32"))
    said = refused("run", changed)
    assert "merge.yml: was changed by hand and would be overwritten; move it away" in said
    assert "float32" in (out / "merge.yml").read_text()
    with pytest.raises(RequestError, match="was changed by hand"):  # while the run was going on
        MergeStage(load_recipe(changed)).run(Processes("cpu"), Silent())
    (out / "merge.yml").write_text(text)
    printed("run", changed)
    assert yaml.safe_load((out / "merge.yml").read_text())["merge_method"] == "ties"
    (out / "merge.yml").write_text(text)


def test_status_shows_the_whole_chain(whole, models, tmp_path):
    lines = run("status", whole).stdout.splitlines()
    assert lines[3].startswith("fuse neox: 270 of 270 samples; ")
    assert " held out; " in lines[3]
    assert lines[4].startswith("train neox: 4 of 4 steps; loss ")
    assert lines[5].startswith("merge merge.yml: 1 of 1 targets; ")
    entries = json.loads(run("status", whole, "--json").stdout)
    assert [e["stage"] for e in entries] == ["score", "score", "align", "fuse", "train", "merge"]
    assert entries[4]["done"] == entries[4]["total"] == 4
    assert entries[3]["positions_with_target"] > 0
    fresh = recipe(tmp_path, models)
    assert all(line.endswith(": not begun") for line in run("status", fresh).stdout.splitlines())
    sft = recipe(tmp_path, models, "sft", fusion={"strategy": "sft"})
    assert run("status", sft).stdout == "fuse sft: not begun\ntrain sft: not begun\n"
    # Begun, but nothing of it done; and targets that are not there yet are not merged.
    fused = load_recipe(fresh).fused_folder / "neox"
    shutil.copytree(load_recipe(whole).fused_folder / "neox", fused)
    for path in fused.glob("*.parquet"):
        path.unlink()
    (line,) = [x for x in run("status", fresh).stdout.splitlines() if x.startswith("fuse")]
    assert line == "fuse neox: 0 of 270 samples; 0 held out; 0 B"
    stage = MergeStage(load_recipe(fresh))
    assert not stage.run(Processes("cpu"), Silent()).complete
    assert not stage.path.exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fusion": {"temperature": 2.0}}, "fused neox: {out}/fused/neox was made with other "),
        ({"training": {"lambda": 0.9}}, "(training.lambda was 0.5, is 0.9)"),
        ({"alignment": {"vocabulary": "em"}}, "(vocabulary was 'bytes', is 'em')"),
        ({"dataset": {"eval_fraction": 0.2}}, "(eval_fraction was 0.1, is 0.2)"),
    ],
)
def test_a_changed_recipe_is_refused_before_anything_is_done(whole, models, sections, message):
    out = out_of(whole)
    path = recipe(whole.parent, models, "changed", out, **sections)
    before = times(out)
    for name in ("validate", "run", "train"):
        said = refused(name, path)
        if not ("alignment" in sections and name == "train"):
            assert message.format(out=out) in said
            # What follows from it is not explained by hashes.
            assert not re.search("[0-9a-f]{13}", said.replace(str(out), ""))
            follows = f"target neox: {out}/targets/neox was made from inputs that have changed; "
            assert (follows in said) == ("training" not in sections)
        assert "move it away or delete it to make it again" in said
    assert times(out) == before


ALL = ["scores", "scores", "aligned", "fused", "target"]


@pytest.mark.parametrize(
    ("sections", "stages"),
    [
        ({"max_length": 63}, ALL),
        ({"dataset": {"max_samples": 200}}, ALL),
        ({"scoring": chain.SCORING | {"top_k": 5}}, ALL),
        ({"scoring": chain.SCORING | {"batch_tokens": 99}}, []),
        ({"sources": [("neox", {"template": "pivot"})]}, ALL[1:]),
        ({"sources": [("neox", {"load": {"device_map": "cpu"}})]}, []),
        ({"sources": [("neox", {"vocabulary": "em"})]}, ALL[2:]),
        ({"alignment": {"vocabulary": "bytes", "positions": "dtw"}}, ALL[2:]),
        ({"alignment": {"vocabulary": "bytes", "unmatched": "pivot"}}, ALL[3:]),
        ({"fusion": {"tail": "gold"}}, ALL[3:]),
        ({"dataset": {"eval_fraction": 0.2}}, ALL[3:]),
        ({"training": {"learning_rate": 0.1}}, ALL[4:]),
        ({"training": {"save_steps": 3, "logging_steps": 1, "report_to": "none"}}, []),
        ({"fusion": {"strategy": "multi"}}, []),
        ({"merge": {"dtype": "float32"}}, []),
        ({"sources": [("neox", {}), ("twin", {})]}, []),
    ],
)
def test_what_a_change_makes_stale(whole, models, sections, stages):
    """The table in docs/distilling.md, by the first words of the problems."""
    if "sources" in sections:
        sources = [{"model": str(models / name)} | keys for name, keys in sections["sources"]]
        sections = {"sources": sources}
    path = recipe(whole.parent, models, "stale", out_of(whole), **sections)
    try:
        open_inputs(path, more_problems=run_problems)
        found = []
    except RequestError as error:
        found = [problem.split()[0] for problem in error.problems]
    assert found == stages


def test_train_takes_the_targets_that_are_asked_for(whole, models, tmp_path):
    said = refused("train", whole, "--source", "nobody")
    assert "--source nobody: not in the recipe; its sources are neox" in said
    shown = printed("train", whole, "--source", "neox")
    assert stages(shown) == ["fuse neox", "train neox", "merge merge.yml"]
    sft = recipe(tmp_path, models, "sft", fusion={"strategy": "sft"})
    said = refused("train", sft, "--source", "neox")
    assert "--source: fusion.strategy: sft has no sources; leave it out" in said
    said = refused("train", recipe(tmp_path, models), status=1)
    assert "run `fusechat-distill align RECIPE --source neox` first" in said


def test_several_sources_make_one_target(models, tmp_path):
    path = recipe(
        tmp_path,
        models,
        sources=[str(models / "neox"), str(models / "twin")],
        fusion={"strategy": "multi", "function": "avg_ce", "level": "token"},
        training={"packing": True},
    )
    printed("run", path)
    out = out_of(path)
    assert [path.name for path in (out / "targets").iterdir()] == ["multi"]
    assert not (out / "merge.yml").exists(), "there is nothing to merge"
    made_of = read_json(out / "targets" / "multi" / "fusechat_distill.json")
    assert made_of["decisions"]["won"].keys() == {"pivot", "neox", "twin"}


def mergekit(config: Path, out: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    parsed = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    options = MergeOptions(quiet=True, lora_merge_cache=str(out / "cache"))
    run_merge(parsed, str(out), options)
    return load_file(next(out.glob("*.safetensors")))


def test_mergekit_merges_what_merge_yml_says(whole, models, tmp_path):
    out = out_of(whole)
    text = (out / "merge.yml").read_text()
    (tmp_path / "merge.yml").write_text(text.replace("bfloat16", "float32"))
    merged = mergekit(tmp_path / "merge.yml", tmp_path / "merged")
    target = load_file(out / "targets" / "neox" / "model.safetensors")
    # Of one target VaRM makes that target.
    for name, weight in target.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_mergekit_reads_paths_with_its_own_signs_in_them(models, tmp_path, lora):
    pivot = tmp_path / "pivot@1+x"
    shutil.copytree(models / "pivot", pivot)
    output = tmp_path / "out+1"
    path = recipe(tmp_path, models, output=output, pivot=str(pivot), training={"lora": lora})
    read = MergeConfiguration.model_validate(merge_configuration(load_recipe(path), ["neox"]))
    assert (read.base_model.model.path, read.base_model.lora) == (str(pivot), None)
    (model,) = (entry.model for entry in read.models)
    target = str(output / "targets" / "neox")
    if lora:
        assert (model.model.path, model.lora.path) == (str(pivot), target)
    else:
        assert (model.model.path, model.lora) == (target, None)


def test_mergekit_merges_adapters(models, tmp_path):
    path = recipe(
        tmp_path,
        models,
        training={"lora": {"r": 2, "target_modules": "all-linear"}, "learning_rate": 0.1},
        merge={"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
    )
    printed("run", path)
    out = out_of(path)
    target = out / "targets" / "neox"
    written = yaml.safe_load((out / "merge.yml").read_text())
    assert written["models"] == [{"model": f"{models / 'pivot'}+{target}"}]
    assert "base_model" not in written, "mergekit would average the pivot in"
    merged = mergekit(out / "merge.yml", tmp_path / "merged")
    pivot = load_file(models / "pivot" / "model.safetensors")
    adapter = load_file(target / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    factors = [adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"]
    expected = pivot[f"{name}.weight"] + 8 / 2 * factors[0] @ factors[1]
    assert not torch.equal(expected, pivot[f"{name}.weight"])
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def test_two_processes_train_one_target(whole, models):
    """Each takes half of a step's batch; everything else of the chain is as with one."""
    training = {"per_device_train_batch_size": 2, "max_steps": 2}
    two = recipe(whole.parent, models, "two", training=training)
    result = launched("run", two)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 6, "only the first process speaks"
    one = recipe(whole.parent, models, "one", training={"max_steps": 2})
    printed("run", one)
    expected = weights_of(one)
    for name, weight in weights_of(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_papers_recipes_are_recipes(path):
    read = load_recipe(path)
    assert isinstance(read, Recipe)
    assert all("/" in model.model for model in read.models.values())


def test_there_are_the_papers_recipes():
    assert {"fusechat", "fusechat-baseline", "fusellm", "fusionchat"} <= {p.stem for p in RECIPES}


@pytest.fixture
def brought(whole, models, tmp_path) -> Path:
    """A recipe whose source has its scores, made elsewhere, but of the model itself no weights."""
    shutil.copytree(models, tmp_path / "models", ignore=lambda *_: ["twin"])
    path = recipe(tmp_path, tmp_path / "models")
    stored = load_recipe(whole).scores_folder / "neox"
    shutil.copytree(stored, load_recipe(path).scores_folder / "neox")
    (tmp_path / "models" / "neox" / "model.safetensors").unlink()
    return path


def test_scores_from_elsewhere_stand_for_a_source_without_weights(brought, whole):
    printed("run", brought)
    found, expected = (files(out_of(path)) for path in (brought, whole))
    assert found["targets/neox/model.safetensors"] == expected["targets/neox/model.safetensors"]
    printed("evaluate", brought)
    measured = read_json(out_of(brought) / "evaluation.json")
    assert list(measured["models"]) == ["pivot", "target neox"]


def test_without_weights_every_shard_must_be_there(brought):
    damaged = load_recipe(brought).scores_folder / "neox" / "00000000-00000256.parquet"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100] + b"x" + content[101:])
    said = refused("run", brought, status=1)
    assert said.count("Error: ") == 1
    assert "to compute the missing scores with (00000000-00000256.parquet)" in said
    said = refused("run", brought)
    assert "1 of its 2 shards of scores are here; with all it needs no weights" in said


def test_scores_of_another_model_do_not_stand_for_it(brought, whole):
    config = brought.parent / "models" / "neox" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"hidden_act": "relu"}))
    said = refused("validate", brought)
    assert "scores/neox was made with other settings or inputs (model.config was" in said
    # Nor does another folder of a run that was copied in its place.
    folder = load_recipe(brought).scores_folder / "neox"
    shutil.rmtree(folder)
    shutil.copytree(load_recipe(whole).aligned_folder / "neox", folder)
    assert f"scores of neox: {folder} was made with other settings or inputs (" in refused(
        "validate", brought
    )


def test_without_its_tokenizer_what_to_copy_is_said(brought):
    shutil.rmtree(brought.parent / "models" / "neox")
    said = refused("validate", brought)
    assert "needs no weights, only its config.json, tokenizer and chat template" in said


def test_one_model_is_scored_where_the_others_are_not(models, whole, tmp_path):
    shutil.copytree(models, tmp_path / "models", ignore=lambda *_: ["twin"])
    (tmp_path / "models" / "pivot" / "model.safetensors").unlink()
    both = [str(tmp_path / "models" / name) for name in ("neox", "twin")]
    path = recipe(tmp_path, tmp_path / "models", sources=both)
    printed("score", path, "--model", "neox")
    made, expected = (files(load_recipe(p).scores_folder / "neox") for p in (path, whole))
    assert made == expected
    assert [p.name for p in load_recipe(path).scores_folder.iterdir()] == ["neox"]
    said = refused("score", path, "--model", "nex")
    assert "--model nex: not in the recipe; its models are pivot, neox, twin" in said

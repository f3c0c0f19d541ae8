"""The ladder at a scale that means nothing: everything runs, resumes, and is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

LADDER = Path(__file__).parents[2] / "examples" / "reproduction"


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """(the module, the folder of a finished run, the folder of its results)."""
    sys.path.insert(0, str(LADDER))
    import ladder

    folder = tmp_path_factory.mktemp("ladder")
    results = folder / "results"
    results.mkdir()
    scale = ladder.SCALES["pico"]
    ladder.run(folder / "out", scale, results, command="python ladder.py --scale pico")
    return ladder, folder / "out", results


def test_results_have_every_row(ladder):
    _, _, results = ladder
    text = (results / "RESULTS.md").read_text("utf-8")
    for name in ("pivot", "source code", "sft", "two sft seeds", "multi", "target documentation"):
        assert f"\n| {name} |" in text
    for merge in ("linear", "slerp", "task arithmetic", "ties", "dare", "sce (mergekit)", "sce"):
        assert f"\n| {merge} |" in text
    for granularity in ("matrix", "module", "layer", "model", "element"):
        assert f"\n| varm {granularity} |" in text
    assert "\n| template | pivot | native |" in text
    assert "`python ladder.py --scale pico`" in text
    for picture in ("ladder", "merges", "factors"):
        assert f"({picture}.png)" in text
        assert (results / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_makes_nothing_and_says_the_same(ladder):
    module, out, results = ladder
    before = (results / "RESULTS.md").read_bytes()
    jobs = (out / "jobs.jsonl").read_bytes()
    targets = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    module.run(out, module.SCALES["pico"], results, command="python ladder.py --scale pico")
    assert (results / "RESULTS.md").read_bytes() == before
    assert (out / "jobs.jsonl").read_bytes() == jobs
    assert targets == {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}


def test_seeds_share_scores_and_differ_in_weights(ladder):
    _, out, _ = ladder
    runs = out / "runs"
    (shard,) = (runs / "default" / "1" / "scores" / "code").glob("*.parquet")
    for other in ("default/0", "multi/0", "multi/1"):
        (same,) = (runs / other / "scores" / "code").glob("*.parquet")
        assert same.stat().st_ino == shard.stat().st_ino
    (own,) = (runs / "pivot-template" / "0" / "scores" / "code").glob("*.parquet")
    assert own.stat().st_ino != shard.stat().st_ino
    weights = [runs / "sft" / seed / "targets" / "sft" / "model.safetensors" for seed in "01"]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_another_scale_in_the_same_folder_is_refused(ladder):
    module, out, results = ladder
    with pytest.raises(SystemExit, match="was made by another version of this; move it away"):
        module.run(out, module.SCALES["cpu"], results, command="")


def test_what_is_measured_is_what_the_evaluation_measures(ladder):
    """Bits per byte in the table against `fusechat-distill evaluate` on the same checkpoints."""
    from click.testing import CliRunner

    from fusechat_distill.cli import commands

    _, out, results = ladder
    paths = [out / "runs" / "multi" / seed / "targets" / "multi" for seed in "01"]
    words = [word for path in paths for word in ("--model", f"multi={path}")]
    recipe = out / "recipes" / "evaluation.yaml"
    shown = CliRunner().invoke(commands, ["evaluate", str(recipe), "--json", *words])
    assert shown.exit_code == 0, shown.output
    value = json.loads(shown.stdout)["models"]["multi"]["groups"]["all"]["value"]
    row = next(
        line
        for line in (results / "RESULTS.md").read_text("utf-8").splitlines()
        if "| multi |" in line
    )
    assert f"| {value:.4f} ±" in row


def test_gpu_recipes_are_recipes(ladder, tmp_path):
    """`--scale gpu` has not been run; what it would run is at least well-formed."""
    module, _, _ = ladder
    from fusechat_distill.recipe.schema import load_recipe

    scale = module.SCALES["gpu"]
    planned = module.Ladder(tmp_path, scale)
    text, models, *_ = module.phases(planned)
    assert [job.name for job in text] == ["text"]
    assert models == []
    for variant in scale.variants:
        recipe = load_recipe(planned.recipe(variant, 1))
        assert recipe.pivot.model == scale.models["pivot"]
        assert [source.title for source in recipe.sources] == ["qwen", "smollm"]
        assert recipe.training.sft["seed"] == 1
    assert load_recipe(planned.evaluation_recipe()).fusion.strategy == "sft"

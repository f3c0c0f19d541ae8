"""The recipe: what it says when something is wrong with it, and that nothing is assumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusechat_common.errors import RequestError
from fusechat_distill.recipe.reference import commented_recipe
from fusechat_distill.recipe.schema import Recipe, Training, load_recipe, read_recipe

MINIMAL = "output: out\npivot: org/pivot\nsources: [org/source]\ndataset: {path: data.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[str]:
    return read_recipe(write(folder, text))[1]


def test_minimal_recipe_has_the_documented_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert list(recipe.models) == ["pivot", "source"]
    assert recipe.max_length == 2048
    assert recipe.scoring.model_dump() == {
        "top_k": 10,
        "engine": "transformers",
        "dtype": "bfloat16",
        "batch_tokens": 16384,
        "device": "auto",
    }
    assert recipe.alignment.model_dump() == {
        "positions": "bytes",
        "vocabulary": "ms",
        "unmatched": "one_hot",
    }
    assert recipe.fusion.model_dump() == {
        "strategy": "pairwise",
        "function": "min_ce",
        "level": "sequence",
        "cross_entropy": "byte",
        "temperature": 1.0,
        "tail": "renormalize",
    }
    assert recipe.training.clm_weight == 0.9
    assert recipe.dataset.eval_fraction == 0.02
    assert recipe.merge.merge_method == "varm"


def test_commented_recipe_is_valid_and_shows_every_default(tmp_path):
    text = commented_recipe()
    recipe = load_recipe(write(tmp_path, text))
    minimal = load_recipe(write(tmp_path, MINIMAL))
    for section in ("max_length", "scoring", "alignment", "fusion", "merge"):
        assert getattr(recipe, section) == getattr(minimal, section)
    assert recipe.training.clm_weight == minimal.training.clm_weight
    for name, field in Recipe.model_fields.items():
        assert f"\n{name}:" in text, f"{name} is not shown"
        sections = getattr(field.annotation, "model_fields", {})
        for key, inner in sections.items():
            assert f"{inner.alias or key}:" in text, f"{name}.{key} is not shown"


def test_every_problem_is_in_one_message(tmp_path):
    text = """
output: out
pivot: {model: org/pivot, tempate: native}
sources:
  - org/a
  - {model: other/a}
  - {model: org/b, name: Pivot}
  - {model: org/c, load: {revision: main}}
dataset: {path: data.jsonl, eval_fraction: 2}
lenght: 3
scoring: {topk: 3, dtype: int8, top_k: ten}
training: {lambda: 1.5, learning_rat: 1, max_length: 3, dataset_num_proc: 2, lora: {alpha: 3}}
"""
    path = write(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path} has 14 problems:"
    assert sorted(rest) == [
        "  dataset.eval_fraction: should be less than 1, found 2",
        "  lenght: is not a key here; did you mean `max_length`?",
        "  pivot.tempate: is not a key here; did you mean `template`?",
        "  scoring.dtype: should be 'auto', 'bfloat16', 'float16' or 'float32', found 'int8'",
        "  scoring.top_k: should be a valid integer, found 'ten'",
        "  scoring.topk: is not a key here; did you mean `top_k`?",
        "  sources[1].name: 'a' is already sources[0]'s name; give this source another `name`",
        "  sources[2].name: 'Pivot' is already the pivot's name; give this source another `name`",
        "  sources[3].load: `revision` can't be set here; use the model's `revision`",
        "  training.dataset_num_proc: remove it, the pipeline prepares the dataset",
        "  training.lambda: should be less than or equal to 1, found 1.5",
        "  training.learning_rat: is not a field of SFTConfig; did you mean `learning_rate`?",
        "  training.lora.alpha: is not a field of LoraConfig; did you mean `lora_alpha`?",
        "  training.max_length: remove it, the recipe's top-level `max_length` holds for every "
        "stage",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not a mapping; `fusechat-distill init` writes a recipe"),
        ("- a", "is not a mapping; `fusechat-distill init` writes a recipe"),
        (MINIMAL.replace("pivot: org/pivot\n", ""), "pivot: is missing"),
        (
            MINIMAL.replace("org/pivot", "3"),
            "pivot: should be a mapping of keys to values, found 3",
        ),
        (
            MINIMAL.replace("[org/source]", "[]"),
            "sources: is empty; name at least one model, or set fusion.strategy: sft for the "
            "baseline without sources",
        ),
        (
            MINIMAL.replace("org/source", "org/böse"),
            "sources[0].name: 'böse' can't name a folder; give this source a `name`",
        ),
        (
            MINIMAL.replace("[org/source]", "[{model: org/x, name: ../x}]"),
            "sources[0].name: '../x' can't name a folder; use a letter or digit, then letters, "
            "digits and . _ + -, 128 at most",
        ),
        (MINIMAL + "max_length: true\n", "max_length: should be a valid integer, found True"),
        (MINIMAL + "max_length: [9]\n", "max_length: should be a valid integer, found a list"),
        (MINIMAL + "output_: {}\n", "output_: is not a key here; did you mean `output`?"),
        (
            MINIMAL.replace("[org/source]", "[{model: org/source, vocabulry: em}]"),
            "sources[0].vocabulry: is not a key here; did you mean `vocabulary`?",
        ),
        (
            MINIMAL.replace("[org/source]", "org/source"),
            "sources: should be a list, found 'org/source'",
        ),
        (
            MINIMAL + "scoring: {device: gpu}\n",
            r"scoring.device: should be text that matches ^(auto|cpu|mps|(cuda|xpu|npu)(:\d+)?)$, "
            "found 'gpu'",
        ),
        (
            MINIMAL + "pivot: org/other\n",
            'is not YAML: duplicate key `pivot` in "<unicode string>", line 5, column 1: '
            "pivot: org/other ^",
        ),
    ],
)
def test_one_problem_and_its_remedy(tmp_path, text, problem):
    assert problems(tmp_path, text) == [problem]


def test_one_problem_is_one_line(tmp_path):
    path = write(tmp_path, MINIMAL + "seed: 1\n")
    with pytest.raises(RequestError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: seed: is not a key here")
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_left_out_of_the_recipe_that_further_checks_use(tmp_path):
    text = MINIMAL + "scoring: {top_k: ten, batch_tokens: 99}\n"
    recipe, found = read_recipe(write(tmp_path, text))
    assert len(found) == 1
    assert recipe is not None
    assert (recipe.scoring.top_k, recipe.scoring.batch_tokens) == (10, 99)
    text = MINIMAL + "training: {lambda: 0.5, learning_rat: 1, seed: 3, lora: {rnak: 4, r: 2}}\n"
    recipe, found = read_recipe(write(tmp_path, text))
    assert len(found) == 2
    assert recipe is not None
    assert recipe.training == Training(**{"lambda": 0.5}, seed=3, lora={"r": 2})


def test_a_learning_rate_as_everyone_writes_it_is_a_number(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "training: {learning_rate: 5e-6}\n"))
    assert recipe.training.sft == {"learning_rate": 5e-6}


def test_pipeline_owns_these_training_keys(tmp_path):
    owned = [
        "max_length",
        "output_dir",
        "dataset_text_field",
        "completion_only_loss",
        "assistant_only_loss",
        "chat_template_path",
        "eos_token",
    ]
    text = MINIMAL + "training: {" + ", ".join(f"{key}: 1" for key in owned) + "}\n"
    found = problems(tmp_path, text)
    assert [problem.split(":")[0] for problem in found] == [f"training.{key}" for key in owned]
    assert all(": remove it, " in problem for problem in found)


def test_unreadable_files_name_the_remedy(tmp_path):
    missing = tmp_path / "none.yaml"
    assert read_recipe(missing)[1] == [
        "can't be read (No such file or directory); `fusechat-distill init` writes a recipe"
    ]
    path = tmp_path / "latin.yaml"
    path.write_bytes("output: caf\xe9".encode("latin-1"))
    assert read_recipe(path)[1] == ["is not UTF-8 text (byte 11); save it as UTF-8"]


EXPLOSION = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("? [a]\n: b\n", "is not YAML: unhashable type: 'list'"),
        ("output: 2024-99-99\n", "is not YAML: month must be in 1..12"),
        ("max_length: !!int seven\n", "is not YAML: invalid literal for int()"),
        ("max_length: !!bool x\n", "is not YAML: 'x' is not a valid bool in"),
        ("max_length: !!int ''\n", "is not YAML: '' is not a valid int in"),
        ("output: !!timestamp x\n", "is not YAML: 'x' is not a valid timestamp in"),
        ("max_length: " + "9" * 9999, "is not YAML: Exceeds the limit (4300 digits)"),
        ("merge: " + "[" * 10_000, "is not YAML: nested deeper than 50"),
        ("merge: &a {parameters: *a}\n", "is not YAML: found unconstructable recursive node"),
        (EXPLOSION, "is not YAML: its aliases expand to more than 100,000 values"),
        (MINIMAL + "null: x\n", "None: the key None is not text"),
        (
            MINIMAL.replace("out\n", '"a\\0b"\n'),
            "output: can't be the name of a folder (embedded null",
        ),
        (
            MINIMAL.replace("out\n", "o" * 999 + "\n"),
            "output: is too long for the name of a folder",
        ),
        (MINIMAL.replace("source]", f"{'o' * 999}]"), "sources[0].name: 'ooo"),
    ],
)
def test_what_yaml_allows_and_a_recipe_cannot_be_is_refused(tmp_path, text, problem):
    assert problems(tmp_path, text)[0].startswith(problem)


def test_a_section_can_be_said_once(tmp_path):
    text = MINIMAL.replace("pivot: org/pivot", "pivot: &a {model: org/pivot, dtype: float32}")
    text = text.replace("[org/source]", "[{<<: *a, model: org/source}]")
    (source,) = load_recipe(write(tmp_path, text)).sources
    assert (source.model, source.dtype) == ("org/source", "float32")

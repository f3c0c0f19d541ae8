"""What docs/ has from the code is what the code says now."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fusechat_distill.cli import commands
from fusechat_distill.recipe.reference import commented_recipe
from fusechat_distill.recipe.schema import Recipe
from fusechat_merge.methods.units import GRANULARITIES
from qa import mutation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def _script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_generated() -> None:
    for name, content in _script(DOCS / "reference.py").pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, (
            f"docs/{name}: python docs/reference.py"
        )


def test_tables_of_merging_are_generated() -> None:
    text = (DOCS / "merging.md").read_text(encoding="utf-8")
    assert _script(DOCS / "merge_reference.py").page(text) == text, "python docs/merge_reference.py"


def test_granularities_are_listed_where_they_are_explained() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^  granularity: .*# (.*)$", readme, re.MULTILINE)
    assert listed.replace(" (default)", "").split(", ") == list(GRANULARITIES)
    (section,) = re.findall(
        r"^## Granularities\n(.*?)^## ",
        (DOCS / "merging.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert re.findall(r"^- `(\w+)`: ", section, re.MULTILINE) == list(GRANULARITIES)


def test_schema_command_prints_the_published_schema() -> None:
    shown = CliRunner().invoke(commands, ["schema"])
    assert shown.exit_code == 0
    assert shown.stdout == (DOCS / "recipe.schema.json").read_text(encoding="utf-8")


def test_every_key_is_explained() -> None:
    schema = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        assert section["description"], name
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def _problems(schema: dict[str, Any], value: Any, root: dict[str, Any], where: str) -> list[str]:
    """A validator of the keywords that the schema uses; any other one fails the test."""
    known = {
        "$schema", "$defs", "title", "description", "default", "examples", "$ref", "type", "enum",
        "anyOf", "not", "required", "properties", "additionalProperties", "propertyNames", "items",
        "pattern", "minLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    }  # fmt: skip
    assert schema.keys() <= known, schema.keys() - known
    if "$ref" in schema:
        return _problems(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, where)
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
        "null": type(None),
    }  # fmt: skip
    if "type" in schema and (
        not isinstance(value, types[schema["type"]]) or isinstance(value, bool)
    ):
        return [f"{where}: no {schema['type']}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: not in enum")
    if "anyOf" in schema and all(_problems(s, value, root, where) for s in schema["anyOf"]):
        found.append(f"{where}: none of anyOf")
    if "not" in schema and not _problems(schema["not"], value, root, where):
        found.append(f"{where}: not")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where}: pattern")
    if len(value) < schema["minLength"] if "minLength" in schema else False:
        found.append(f"{where}: too short")
    limits = {
        "minimum": lambda v, limit: v >= limit,
        "maximum": lambda v, limit: v <= limit,
        "exclusiveMinimum": lambda v, limit: v > limit,
        "exclusiveMaximum": lambda v, limit: v < limit,
    }
    found += [
        f"{where}: {n}" for n, ok in limits.items() if n in schema and not ok(value, schema[n])
    ]
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += _problems(schema.get("items", {}), item, root, f"{where}[{i}]")
    if isinstance(value, dict):
        found += [f"{where}.{k}: missing" for k in schema.get("required", ()) if k not in value]
        for key, item in value.items():
            if "propertyNames" in schema:
                found += _problems(schema["propertyNames"], key, root, f"{where}.{key}")
            if key in schema.get("properties", {}):
                found += _problems(schema["properties"][key], item, root, f"{where}.{key}")
            elif schema.get("additionalProperties", True) is False:
                found.append(f"{where}.{key}: unknown")
    return found


def _check(recipe: Any) -> list[str]:
    schema = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    return _problems(schema, recipe, schema, "recipe")


def _recipes() -> dict[str, str]:
    recipes = {p.name: p.read_text("utf-8") for p in (ROOT / "examples/recipes").glob("*.yaml")}
    recipes["init"] = commented_recipe()
    for page in PAGES:
        blocks = re.findall(
            r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        for i, block in enumerate(blocks):
            if re.search(r"^output:", block, re.MULTILINE):
                recipes[f"{page.name} {i}"] = block
    return recipes


@pytest.mark.parametrize("name", _recipes())
def test_schema_takes_every_recipe_that_is_shown(name: str) -> None:
    recipe = yaml.safe_load(_recipes()[name])
    assert _check(recipe) == []
    Recipe.model_validate(recipe)  # so that the recipe itself is one


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lenght": 3}, "recipe.lenght: unknown"),
        ({"pivot": {"model": "a", "tempate": "native"}}, "recipe.pivot: none of anyOf"),
        ({"sources": [{"model": "a", "vocabulary": "dtw"}]}, "recipe.sources[0]: none of anyOf"),
        ({"dataset": {"path": "a", "eval_fraction": 1}}, "recipe.dataset: none of anyOf"),
        ({"scoring": {"topk": 3}}, "recipe.scoring.topk: unknown"),
        ({"scoring": {"top_k": 0}}, "recipe.scoring.top_k: minimum"),
        ({"scoring": {"device": "gpu"}}, "recipe.scoring.device: pattern"),
        ({"alignment": {"positions": "byte"}}, "recipe.alignment.positions: not in enum"),
        ({"fusion": {"temperature": 0}}, "recipe.fusion.temperature: exclusiveMinimum"),
        ({"training": {"lambda": 2}}, "recipe.training.lambda: maximum"),
        ({"training": {"max_length": 3}}, "recipe.training.max_length: not"),
        ({"training": {"clm_weight": 0.5}}, "recipe.training.clm_weight: not"),
        ({"training": {"dataset_num_proc": 2}}, "recipe.training.dataset_num_proc: not"),
        ({"merge": {"method": "varm"}}, "recipe.merge.method: unknown"),
    ],
)
def test_schema_refuses_what_the_recipe_refuses(change: dict[str, Any], problem: str) -> None:
    recipe = {"output": "o", "pivot": "p", "sources": ["s"], "dataset": "d"}
    assert _check(recipe) == []
    assert _check(recipe | change) == [problem]


def test_schema_wants_what_has_no_default() -> None:
    assert _check({}) == [f"recipe.{key}: missing" for key in ("output", "pivot", "dataset")]


def _texts(package: Path) -> list[str]:
    """Every string that a package's code may print; `…` where something is put in."""
    found = []
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "…").replace("%d", "…"))
    return found


def _quoted() -> list[str]:
    """The messages of troubleshooting.md: the code spans before the colon of each entry."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- ((?:`[^`]+`(?:,| or| and)?\s*)+)", page, re.MULTILINE)
    return [quoted for entry in entries for quoted in re.findall(r"`([^`]+)`", entry)]


def test_quoted_messages_are_the_programs_own() -> None:
    texts = _texts(ROOT / "fusechat_merge") + _texts(ROOT / "fusechat_distill")
    quoted = _quoted()
    assert len(quoted) > 60
    for message in quoted:
        parts = [part.strip(" ;") for part in message.split("…") if part.strip(" ;")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(map(pattern.search, texts)), f"no program says {message!r}"


def _shown_runs(page: str) -> list[tuple[str, str]]:
    """Python blocks and the output that the page shows right after them."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("page", ["alignment.md", "python.md"])
def test_first_example_prints_what_is_shown(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The others need models, and are run by `make docs-check`."""
    code, output = _shown_runs(page)[0]
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out == output


def test_the_drawn_example_is_what_the_tokenizers_do() -> None:
    picture = _script(DOCS / "pictures" / "alignment.py")
    code, _ = _shown_runs("alignment.md")[0]
    written = [json.loads(numbers) for numbers in re.findall(r"np\.array\((\[.*?\])\)", code)]
    tokenizers = picture.real_tokenizers
    sides = [
        picture.answered(picture.Renderer(tokenizer()), picture.LINES[0])
        for tokenizer in (tokenizers.mistral, tokenizers.qwen)
    ]
    assert written == [[0, *ends[:-1].tolist()] for _, ends, _ in sides]
    assert [pending for _, _, pending in sides] == [b" ", b""]


def test_the_table_of_mutants() -> None:
    page = mutation.PAGE.read_text(encoding="utf-8")
    path = "fusechat_distill/trainer/loss.py"
    ((mutants, survivors),) = re.findall(rf"`{path}` \| (\d+) \| \d+ \| (\d+) \|", page)
    counts = {path: (int(mutants), int(survivors))}
    assert mutation.more_survive(page, counts) == []
    assert mutation.with_table(page, counts) == page
    assert all(f"| `{module}` |" in page for module in mutation.TESTS)
    worse = {path: (int(mutants), int(survivors) + 1)}
    (problem,) = mutation.more_survive(page, worse)
    assert problem.startswith(f"{path}: {int(survivors) + 1} survive, {survivors} in docs")
    assert mutation.more_survive(mutation.with_table(page, worse), worse) == []

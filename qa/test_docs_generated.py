"""What docs/ has from the code is what the code says now."""

import ast
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
SCHEMA = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def _script(path: Path) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_reference_pages_are_generated() -> None:
    pages = _script(DOCS / "reference.py").pages().items()
    stale = [name for name, made in pages if (DOCS / name).read_text("utf-8") != made]
    assert stale == [], "python docs/reference.py"


def test_tables_of_merging_are_generated() -> None:
    text = (DOCS / "merging.md").read_text(encoding="utf-8")
    assert _script(DOCS / "merge_reference.py").page(text) == text, "python docs/merge_reference.py"


def test_granularities_are_listed_where_they_are_explained() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^  granularity: .*# (.*)$", readme, re.MULTILINE)
    assert listed.replace(" (default)", "").split(", ") == list(GRANULARITIES)
    (section,) = _fenced(DOCS / "merging.md", r"^## Granularities\n(.*?)^## ")
    assert re.findall(r"^- `(\w+)`: ", section, re.MULTILINE) == list(GRANULARITIES)


def test_schema_command_prints_the_published_schema() -> None:
    shown = CliRunner().invoke(commands, ["schema"])
    assert shown.exit_code == 0
    assert shown.stdout == (DOCS / "recipe.schema.json").read_text(encoding="utf-8")


def test_every_key_is_explained() -> None:
    for name, section in {"Recipe": SCHEMA, **SCHEMA["$defs"]}.items():
        assert section["description"], name
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def _problems(schema: dict[str, Any], value: Any, where: str) -> list[str]:
    """A validator of the keywords that the schema uses; any other one fails the test."""
    if "$ref" in schema:
        return _problems(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value, where)
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
        "null": type(None),
    }  # fmt: skip
    fulfilled: dict[str, Callable[[Any], bool]] = {
        "type": lambda kind: isinstance(value, types[kind]) and not isinstance(value, bool),
        "enum": lambda values: value in values,
        "anyOf": lambda schemas: any(not _problems(s, value, where) for s in schemas),
        "not": lambda other: bool(_problems(other, value, where)),
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "minLength": lambda limit: len(value) >= limit,
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
    }
    nested = {"required", "properties", "additionalProperties", "propertyNames", "items"}
    about = {"$schema", "$defs", "title", "description", "default", "examples"}
    assert schema.keys() <= fulfilled.keys() | nested | about
    for keyword in (k for k in fulfilled if k in schema):
        if not fulfilled[keyword](schema[keyword]):
            return [f"{where}: {keyword}"]
    found = []
    for i, item in enumerate(value if isinstance(value, list) else []):
        found += _problems(schema.get("items", {}), item, f"{where}[{i}]")
    if isinstance(value, dict):
        found += [f"{where}.{k}: missing" for k in schema.get("required", ()) if k not in value]
        for key, item in value.items():
            found += _problems(schema.get("propertyNames", {}), key, f"{where}.{key}")
            if key in schema.get("properties", {}):
                found += _problems(schema["properties"][key], item, f"{where}.{key}")
            elif schema.get("additionalProperties", True) is False:
                found.append(f"{where}.{key}: unknown")
    return found


def _check(recipe: Any) -> list[str]:
    return _problems(SCHEMA, recipe, "recipe")


def _fenced(page: Path, pattern: str) -> list[Any]:
    """What a pattern finds in a page, in which `^` is a line's begin and `.` any character."""
    return re.findall(pattern, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def _recipes() -> dict[str, str]:
    recipes = {p.name: p.read_text("utf-8") for p in (ROOT / "examples/recipes").glob("*.yaml")}
    recipes["init"] = commented_recipe()
    for page in PAGES:
        for i, block in enumerate(_fenced(page, r"^```yaml\n(.*?)^```")):
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
        ({"pivot": {"model": "a", "tempate": "native"}}, "recipe.pivot: anyOf"),
        ({"sources": [{"model": "a", "vocabulary": "dtw"}]}, "recipe.sources[0]: anyOf"),
        ({"dataset": {"path": "a", "eval_fraction": 1}}, "recipe.dataset: anyOf"),
        ({"scoring": {"topk": 3}}, "recipe.scoring.topk: unknown"),
        ({"scoring": {"top_k": 0}}, "recipe.scoring.top_k: minimum"),
        ({"scoring": {"device": "gpu"}}, "recipe.scoring.device: pattern"),
        ({"alignment": {"positions": "byte"}}, "recipe.alignment.positions: enum"),
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
    return _fenced(DOCS / page, r"^```python\n(.*?)^```\n\n```text\n(.*?)^```")


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

"""Writes the pages that explain keys, from the docstrings of pydantic models: docs/recipe.md and
docs/recipe.schema.json from the recipe's, docs/results.md from those of what is written as data.

`python docs/reference.py`; with `--check` it writes nothing and fails where they differ. A new file
of results is a new line in `RESULTS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fusechat_distill.evaluation.schema import Answers, Evaluation
from fusechat_distill.fusion.decisions import Decisions
from fusechat_distill.recipe.reference import (
    default_of,
    schema,
    section_of,
    source_keys,
    values_of,
)
from fusechat_distill.report.schema import Report

RESULTS: dict[str, type[BaseModel]] = {
    "report/report.json": Report,
    "evaluation.json": Evaluation,
    "fused/TARGET/decisions.json": Decisions,
    "report/answers.json": Answers,
}
"""Files of results, and the models of their content."""

KINDS = {
    "object": "mapping",
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "null": "null",
}

RECIPE_INTRODUCTION = """\
# The recipe, key by key

Written by `python docs/reference.py` from `fusechat_distill/recipe/schema.py`; not edited
by hand. [distilling.md](distilling.md) says how to choose. `fusechat-distill init` writes a recipe
with every key, its default and its meaning.

Omitted keys have their defaults. An unknown key, a duplicate key, and a value of the wrong type are
errors; `fusechat-distill validate` lists each with the expected values. `5e-6` is a number.

With a JSON schema, an editor completes, explains and checks the keys. Write it once, beside your
recipe:

    fusechat-distill schema > recipe.schema.json

Then begin the recipe with this line for the YAML language server, which Visual Studio Code's YAML
extension and other editors use:

```yaml
# yaml-language-server: $schema=recipe.schema.json
output: runs/fusechat
pivot: openchat/openchat_3.5
sources: [NousResearch/Nous-Hermes-2-SOLAR-10.7B]
dataset: FuseAI/FuseChat-Mixture
```

The same schema is in [recipe.schema.json](recipe.schema.json). It has every key of this page. The
fields of TRL's `SFTConfig` and PEFT's `LoraConfig` depend on the installed versions; only
`validate` checks them.

"""


RESULTS_INTRODUCTION = """\
# Results, key by key

Written by `python docs/reference.py` from the models of the files' content; not edited by hand.
All are JSON. `format` is a file's version: the same number, the same keys. `evaluate --json` and
`report --json` print the content of the file that they write.

"""


def recipe_page() -> str:
    """The recipe's keys as tables."""
    recipe = schema()
    parts = [_recipe_table("The recipe", recipe, recipe["properties"], recipe)]
    for name, field in recipe["properties"].items():
        if section := section_of(recipe, field):
            keys = source_keys(recipe) if name == "sources" else section["properties"]
            parts.append(_recipe_table(f"`{name}`", section, keys, recipe))
    return RECIPE_INTRODUCTION + "\n".join(parts)


def _recipe_table(
    title: str, section: dict[str, Any], fields: dict[str, Any], recipe: dict[str, Any]
) -> str:
    rows = []
    for key, field in fields.items():
        of_key = section_of(recipe, field)
        values = f"[below](#{key})" if of_key else values_of(field) or _kind(field)
        if key in section.get("required", ()):
            default = "required"
        else:
            default = "" if of_key else f"`{default_of(field)}`"
        text = field.get("description") or of_key["description"].partition("\n\n")[0]
        rows.append((f"`{key}`", values, default, text))
    return _table(f"## {title}", section["description"], ("key", "values", "default", ""), rows)


def _kind(field: dict[str, Any]) -> str:
    types = [choice.get("type") for choice in (field, *field.get("anyOf", ()))]
    return next((KINDS[kind] for kind in types if kind in KINDS), "")


def results_page() -> str:
    """The keys of all files of results as tables: a table for each model."""
    parts = []
    shown: set[str] = set()
    for file, model in RESULTS.items():
        content = model.model_json_schema(mode="serialization")
        parts.append(_result_table(f"## `{file}`", content, content))
        for name in dict.fromkeys(_references(content, content)):
            if name in shown:
                raise ValueError(f"two models are called {name}; the page has room for one")
            shown.add(name)
            parts.append(_result_table(f"### {name}", content["$defs"][name], content))
    return RESULTS_INTRODUCTION + "\n".join(parts)


def _result_table(title: str, model: dict[str, Any], content: dict[str, Any]) -> str:
    rows = []
    for key, field in model["properties"].items():
        text = field.get("description")
        if text is None:  # a model of its own says it
            text = content["$defs"][_name(field)]["description"].partition("\n\n")[0]
        rows.append((f"`{key}`", _value(field), text))
    return _table(title, model["description"], ("key", "value", ""), rows)


def _references(part: Any, content: dict[str, Any]) -> Iterator[str]:
    """Models that a part of the schema names, each before those that it names itself."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield _name(part)
            yield from _references(content["$defs"][_name(part)], content)
        for key, value in part.items():
            if key != "$defs":
                yield from _references(value, content)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value, content)


def _name(field: dict[str, Any]) -> str:
    name: str = field["$ref"].rpartition("/")[2]
    return name


def _value(field: dict[str, Any]) -> str:
    """What a key's value is, in words."""
    if "$ref" in field:
        return f"[{_name(field)}](#{_name(field).lower()})"
    if "anyOf" in field:
        return " or ".join(map(_value, field["anyOf"]))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:
        return f"[{', '.join(map(_value, field['prefixItems']))}]"
    if field.get("type") == "array":
        return f"list of {_value(field['items'])}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"names, each with {_value(field['additionalProperties'])}"
    return KINDS.get(field.get("type", ""), "anything")


def _table(title: str, text: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    cells = [[" ".join(cell.split()) for cell in line] for line in lines]
    table = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in cells]
    table[1] = "|---" * len(columns) + "|"
    return "\n".join([title, "", " ".join(text.split()), "", *table, ""])


def pages() -> dict[str, str]:
    """Each file's name and content."""
    return {
        "recipe.md": recipe_page(),
        "results.md": results_page(),
        "recipe.schema.json": json.dumps(schema(), indent=2, ensure_ascii=False) + "\n",
    }


def main() -> None:
    folder = Path(__file__).parent
    for name, content in pages().items():
        path = folder / name
        if "--check" not in sys.argv[1:]:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            sys.exit(f"{path} is not what this script writes: python docs/reference.py")


if __name__ == "__main__":
    main()

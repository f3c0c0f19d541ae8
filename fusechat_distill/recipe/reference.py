"""Documentation generated from the models in `schema`: the commented recipe that `init` writes, the
JSON schema for editors. docs/reference.py makes the reference page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from fusechat_distill.recipe.schema import OWN_TRAINING_KEYS, Recipe

TEXT_WILL_DO = ("pivot", "sources", "dataset")
"""Keys that take a mapping, or only the value of its first key."""


def schema() -> dict[str, Any]:
    """JSON schema (draft 7, which editors support) of a recipe; it checks each key separately.

    The fields of `training` and `training.lora` are TRL's and PEFT's; only `validate` checks them.
    """
    result: dict[str, Any] = Recipe.model_json_schema(by_alias=True)
    definitions = result["$defs"]
    for name in TEXT_WILL_DO:
        holder, key = result["properties"], name
        if name == "sources":
            holder, key = holder[name], "items"
        mapping = holder[key]
        # Draft 7 ignores all keywords beside a `$ref`.
        described = {key: mapping.pop(key) for key in ("description",) if key in mapping}
        holder[key] = described | {"anyOf": [{"type": "string", "minLength": 1}, mapping]}
    definitions["Training"]["propertyNames"] = {
        "not": {"anyOf": [{"enum": sorted(OWN_TRAINING_KEYS)}, {"pattern": "^dataset_"}]}
    }
    for part in (result, *definitions.values()):
        part.pop("title", None)
        for field in part["properties"].values():
            field.pop("title", None)
            if "$ref" in field:
                field.pop("default", None)  # the defaults are those of the section's keys
        for described in (part, *part["properties"].values()):
            if "description" in described:
                paragraphs = described["description"].split("\n\n")
                described["description"] = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    heading = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "fusechat recipe"}
    return heading | result


def commented_recipe() -> str:
    """A recipe that shows every key with its documentation and its default."""
    full = schema()
    lines = [
        "# Which models to fuse, on which dataset, and how. Every key is shown with its default,",
        "# unless its comment says that it has none. Keys may be omitted; unknown keys are errors.",
        "# An editor with YAML support completes and checks the keys after",
        "#   fusechat-distill schema > recipe.schema.json",
        "# if the first line of this file is",
        "#   # yaml-language-server: $schema=recipe.schema.json",
    ]
    for name, field in full["properties"].items():
        section = section_of(full, field)
        lines += ["", *_comment(name, section | field, full)]
        if name == "sources":
            lines += [f"{name}:", *(f"  - {example}" for example in field["examples"][0])]
            lines.append("  # - model: org/model      # the long form: the keys of `pivot`, and")
            lines += [
                "  #   " + line for line in _lines(source_keys(full), full["$defs"]["Source"])
            ]
        elif section:
            lines.append(f"{name}:")
            lines += ["  " + line for line in _lines(section["properties"], section)]
        else:
            lines.append(f"{name}: {default_of(field)}")
    return "\n".join(lines) + "\n"


def _lines(fields: dict[str, Any], section: dict[str, Any]) -> Iterator[str]:
    for key, field in fields.items():
        yield from _comment(key, field, section)
        yield f"{key}: {default_of(field)}"


def source_keys(full: dict[str, Any]) -> dict[str, Any]:
    """The keys that a source has and the pivot has not."""
    pivot = full["$defs"]["Model"]["properties"]
    source = full["$defs"]["Source"]["properties"]
    return {key: field for key, field in source.items() if key not in pivot}


def section_of(full: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """The schema of the mapping that a key takes; empty if it takes none."""
    places = (field, *field.get("anyOf", ()), *field.get("items", {}).get("anyOf", ()))
    references = [place["$ref"].rpartition("/")[2] for place in places if "$ref" in place]
    definitions: dict[str, dict[str, Any]] = full["$defs"]
    return definitions[references[0]] if references else {}


def _comment(key: str, field: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """The first paragraph of a key's documentation, and its values."""
    text = field["description"].partition("\n\n")[0]
    if values := values_of(field):
        text += f" ({values})"
    if key in section.get("required", ()):
        text += " No default."
    return ["# " + line for line in textwrap.wrap(text, 92, break_on_hyphens=False)]


def values_of(field: dict[str, Any]) -> str:
    """The possible values of a key if there are few, or their limits."""
    for choice in (field, *field.get("anyOf", ())):
        if "enum" in choice:
            return ", ".join(choice["enum"])
        low = choice.get("minimum", choice.get("exclusiveMinimum"))
        high = choice.get("maximum", choice.get("exclusiveMaximum"))
        if low is not None:
            above = f"above {low}" if "exclusiveMinimum" in choice else f"{low} or more"
            if high is None:
                return above
            return f"{low} to {high}" if "maximum" in choice else f"{low} to below {high}"
    return ""


def default_of(field: dict[str, Any]) -> str:
    value = field["default"] if "default" in field else field["examples"][0]
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")

"""Writes the tables of docs/merging.md that the code declares: parameters, and fields of records.

`python docs/merge_reference.py`; with `--check` it writes nothing and fails where they differ.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import BaseModel, TypeAdapter

from fusechat_merge.mergekit_bridge.parameters import SPECS
from fusechat_merge.results.record import Analysis, MergeRecord, UnitWeights, UnusedTensor

PAGE = Path(__file__).parent / "merging.md"
PLACES = {ParameterScope.SHARED: "`parameters`", ParameterScope.NON_BASE: "a target's `parameters`"}
MODELS: dict[str, type[BaseModel]] = {
    "fusechat_merge.json": MergeRecord,
    "units": UnitWeights,
    "left_out": UnusedTensor,
    "analysis.json": Analysis,
}
KINDS = {str: "text", int: "whole number", float: "number", type(None): "null"}


def parameter_table(parameters: tuple[ParameterSpec, ...]) -> str:
    """The parameters of a merge method."""
    rows = ["| parameter | where | values | default | meaning |", "|---|---|---|---|---|"]
    for parameter in parameters:
        default = parameter.default
        shown = f"`{default}`" if isinstance(default, str) else str(default)
        rows.append(
            f"| `{parameter.name}` | {PLACES[parameter.scope]} | {_values(parameter.value_type)}"
            f" | {shown} | {_cell(parameter.description or '')} |"
        )
    return "\n".join(rows)


def _values(value_type: Any) -> str:
    schema = TypeAdapter(value_type).json_schema()
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return "any finite number"
    return f"a number from {low}" if high is None else f"{low} to {high}"


def field_table(model: type[BaseModel]) -> str:
    """The fields of a record."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = _cell(field.description or "")
        rows.append(f"| `{name}` | {_kind(name, field.annotation)} | {meaning} |")
    return "\n".join(rows)


def _kind(name: str, annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        inner = arguments[0]
        below = isinstance(inner, type) and issubclass(inner, BaseModel)
        return f"list of [mappings](#{name})" if below else f"list of {KINDS[inner]}s"
    if annotation in KINDS:
        return KINDS[annotation]
    if get_origin(annotation) in (Union, type(int | str)):
        return " or ".join(_kind(name, argument) for argument in arguments)
    return ", ".join(f"`{value}`" for value in arguments)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def page(text: str) -> str:
    """The page with its tables as the code has them now; each stands between two comments."""
    tables = {name: parameter_table(spec.parameters) for name, spec in SPECS.items()}
    tables |= {name: field_table(model) for name, model in MODELS.items()}
    places = re.findall(r"^<!-- merge_reference\.py: (.*) -->$", text, re.MULTILINE)
    if sorted(places) != sorted(tables):
        sys.exit(f"{PAGE} has places for {places}, the code declares {list(tables)}")
    return re.sub(
        r"(^<!-- merge_reference\.py: (.*?) -->\n\n).*?(\n\n<!-- end -->$)",
        lambda found: found[1] + tables[found[2]] + found[3],
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        sys.exit(f"{PAGE} is not what this script writes: python docs/merge_reference.py")


if __name__ == "__main__":
    main()

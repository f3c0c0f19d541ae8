"""JSON files that other programs may read."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A JSON object with fixed keys, whose documentation is generated from their docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def as_text(self) -> str:
        """JSON for people and programs: a line for each key, and for each item of a list."""
        lines = []
        for key, value in self.as_json().items():
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list) and value:
                items = (json.dumps(item, ensure_ascii=False) for item in value)
                text = "[\n    " + ",\n    ".join(items) + "\n  ]"
            lines.append(f"  {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

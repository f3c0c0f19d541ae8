"""How published files name the merged models: hub ids and folders' names, no local paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import yaml
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel


class PublicNames:
    """The names of a configuration's models in published files.

    A model on the hub keeps its id. A local one is named by its folder, with a number if that name
    is taken.
    """

    def __init__(self, config: MergeConfiguration) -> None:
        paths = [
            part.path
            for reference in _references(config)
            for part in (reference.model, reference.lora)
            if part is not None
        ]
        on_hub = {path for path in paths if not os.path.isdir(path)}
        self._local: dict[str, str] = {}  # the path as it is written -> the name
        by_folder: dict[str, str] = {}
        for path in filter(os.path.isdir, paths):
            name = os.path.basename(os.path.abspath(path))
            others = {*on_hub, *by_folder.values()}
            numbered = (f"{name}-{number}" for number in range(2, len(others) + 3))
            free = next(n for n in (name, *numbered) if n not in others)
            self._local[path] = by_folder.setdefault(os.path.realpath(path), free)

    def of(self, reference: ModelReference) -> str:
        """`model+adapter`, with the revisions of those on the hub."""
        parts = [reference.model, *([reference.lora] if reference.lora else [])]
        return "+".join(self._local.get(part.path) or str(part) for part in parts)

    def hub_ids(self, references: list[ModelReference]) -> list[str]:
        """The hub ids of models and adapters, each once."""
        parts: list[ModelPath | None] = [p for r in references for p in (r.model, r.lora)]
        return list(dict.fromkeys(p.path for p in parts if p and p.path not in self._local))

    def configuration(self, source: str) -> str:
        """A configuration's YAML without local paths.

        Args:
            source: the YAML. It is returned as it is, unless it contains a path of this machine:
                then its values are, without comments.
        """
        values = yaml.safe_load(source)
        public = self._without_paths(values)
        words = re.split(r"[\s'\"()\[\]{},:;=#`]+", source)
        paths = (os.path.expanduser(word) for word in words if "/" in word)
        if public == values and not any(map(os.path.exists, paths)):
            return source
        return yaml.safe_dump(public, sort_keys=False, allow_unicode=True)

    def _without_paths(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._without_paths(item) for item in value]
        if isinstance(value, dict):
            # A folder has no revision, so this may be anything.
            local = value.get("path") in list(self._local)
            return {
                key: self._without_paths(item)
                for key, item in value.items()
                if not (local and key == "revision")
            }
        if not isinstance(value, str):
            return value
        if value in self._local:
            return self._local[value]
        parts = (part.partition("@") for part in value.split("+"))
        return "+".join(
            self._local.get(path) or path + at + revision for path, at, revision in parts
        )


def _references(value: Any) -> Iterator[ModelReference]:
    """All models that a configuration names, for a merge or a tokenizer."""
    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _references(getattr(value, field))
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _references(item)

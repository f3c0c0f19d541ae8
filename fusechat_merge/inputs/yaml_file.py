"""Reads a YAML file as a person wrote it: says where it is wrong and takes no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fusechat_common.errors import RequestError, one_line


def read_yaml(path: Path) -> tuple[Any, str]:
    """What a YAML file holds, and its text.

    Raises:
        RequestError: no such file, no text in UTF-8, no YAML, several documents, or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.load(text, _Loader), text
    except FileNotFoundError as error:
        raise RequestError([f"{path}: no such file"]) from error
    except IsADirectoryError as error:
        raise RequestError([f"{path}: is a folder; name the YAML file"]) from error
    except UnicodeDecodeError as error:
        raise RequestError([f"{path}: is no text in UTF-8; save it as that"]) from error
    except _TwiceError as error:
        raise RequestError([f"{path}: {error}"]) from error
    except yaml.MarkedYAMLError as error:
        raise RequestError([f"{path}{_where(error)}: {_why(error)}"]) from error
    except Exception as error:  # what reads a date or a number raises what it likes
        raise RequestError([f"{path}: can't be read as YAML ({one_line(error)})"]) from error


class _TwiceError(ValueError):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence: a list of models would be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _TwiceError(
                    f"{key.value!r} stands twice, in line {lines[key.value]} and in line {line}"
                )
            lines[key.value] = line
        return node


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _why(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "can't be read"
    if "but found another document" in problem:
        return "a second document begins; write one merge a file, or use mergekit-multi"
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    return f"can't be read as YAML ({error.context or ''}{', ' if error.context else ''}{problem})"

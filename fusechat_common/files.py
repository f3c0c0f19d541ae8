"""Files that are complete or absent: written under another name, synchronised, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fusechat_common.system import NO_FOLLOW, sync


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that becomes `path` when the block ends without an error.

    A killed process leaves `.NAME.PID.part` beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "xb") as file:  # "x" never follows a link
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that refuses links: the folder may come from somebody else."""
    return os.open(path, flags | NO_FOLLOW, 0o666)


def sync_path(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def can_be_made(folder: Path) -> bool:
    """Whether the folder and files in it can be created."""
    place = existing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

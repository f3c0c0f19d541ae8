"""Files that are complete or not there: written beside, flushed to the disk, then renamed."""

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
    """A file to write to, which becomes `path` when the block ends without an error.

    A process that is killed leaves `.NAME.PID.part` beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "xb") as file:  # never through a link that lies there
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def no_link(path: str, flags: int) -> int:
    """For `open`: a file of this very folder, never what a link in a brought folder points to."""
    return os.open(path, flags | NO_FOLLOW, 0o666)


def sync_folder(folder: Path) -> None:
    """Have names that were added or changed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists: where it would be made."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def can_be_made(folder: Path) -> bool:
    """Whether files can be written there, the folders that are missing made first."""
    there = existing(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)

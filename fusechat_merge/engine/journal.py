"""What of a merge is complete and on the disk, so that it can be resumed.

A journal is a file of JSON lines: first the merge's identity, then statistics, weights and how much
of each output is written. A line is added only after the bytes that it tells of have been forced to
the disk; a line that a crash cut short is ignored. One process at a time holds the journal, by a
lock that ends with the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from fusechat_common.errors import RequestError
from fusechat_common.system import NO_FOLLOW, sync_data
from fusechat_merge.planning.plan import Output


@dataclass
class Done:
    """What of a merge is done.

    Attributes:
        identity: of the merge: configuration, options and sources.
        elements: of each output: how many, from the first on, are written.
        statistics: of each tensor and statistic: sums by target, as `varm.statistics` returns them.
        weights: of each output, by target.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)


class Sink:
    """Takes a merge's bytes and results; this one keeps the results only.

    Attributes:
        done: results so far, an earlier run's included.
    """

    def __init__(self, done: Done | None = None) -> None:
        self.done = done or Done()

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """Take `data`, which belongs at byte `first` of the output; called from any thread."""

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        """Keep `value` under `name` in the field `kind` of `done`; `nbytes` were written for it."""
        getattr(self.done, kind)[name] = value


class Journal:
    """The journal file, locked while it is open.

    Args:
        path: the file, created if missing.

    Raises:
        RequestError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | NO_FOLLOW
            self._file = os.open(path, flags, 0o666)
            if not lock_descriptor(self._file, blocking=False):
                os.close(self._file)
                raise RequestError(
                    [f"another fusechat-merge is writing here now ({path.parent} is locked)"]
                )
            if _is(self._file, path):
                break
            os.close(self._file)  # the last holder has just finished and removed it
        self.done = Done()
        self._end = 0
        raw = b""
        while chunk := os.pread(self._file, 1 << 20, len(raw)):
            raw += chunk
        for line in raw.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break  # cut short by a crash, and so is everything after it
            self._end += len(line)
            if "identity" in entry:
                self.done = Done(entry["identity"])
            for name in ("elements", "statistics", "weights"):
                getattr(self.done, name).update(entry.get(name, {}))

    def begin(self, identity: dict[str, Any]) -> None:
        """Start over: forget everything, record the merge's identity."""
        os.ftruncate(self._file, 0)
        self._end, self.done = 0, Done(identity)
        self.add(identity=identity)

    def add(self, **entry: Any) -> None:
        """Append one line and force it to the disk."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        os.ftruncate(self._file, self._end)
        written = 0
        while written < len(line):
            written += os.pwrite(self._file, line[written:], self._end + written)
        sync_data(self._file)
        self._end += len(line)

    def close(self) -> None:
        os.close(self._file)


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def changes(before: dict[str, Any], now: dict[str, Any], place: str = "") -> Iterable[str]:
    """The differences between two identities, as messages; `place` begins each."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{place}{key}: ")
        elif old != new:
            yield f"{place}{key} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"

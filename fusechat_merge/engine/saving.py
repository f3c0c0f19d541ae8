"""The output files: written at final offsets, synchronised, renamed once they are complete."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_common.files import sync_path
from fusechat_common.system import NO_FOLLOW, exchange, open_direct, reserve, sync_data
from fusechat_merge.engine.journal import Journal, Sink
from fusechat_merge.planning.plan import Output, Plan

SAVE_EVERY = 64 << 20
"""Bytes after which what was written is forced to the disk and recorded in the journal."""
_DIRECT = 1 << 16  # bytes; fewer are not worth a direct write of their own


class ShardFiles:
    """The output files at their full size, written at offsets from any thread.

    Whole pages bypass the system's cache where possible, as the merged model would displace inputs
    that are read next. Pages that two writes share don't bypass it.

    What the journal says of a file that no longer exists is forgotten.
    """

    def __init__(self, planned: Plan, folder: Path, journal: Journal) -> None:
        folder.mkdir(exist_ok=True)
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        # Before any file is created: if this start fails too, the next must still see the loss.
        lost = {
            shard.name
            for shard in planned.shards
            if not (path := folder / shard.name).exists() or path.stat().st_size != shard.size
        }
        written = journal.done.elements
        forgotten = {o.name: 0 for o in planned.outputs if o.file in lost and o.name in written}
        if forgotten:
            journal.add(elements=forgotten)
            written.update(forgotten)
        for shard in planned.shards:
            path = folder / shard.name
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
            self._descriptors[shard.name] = descriptor
            os.ftruncate(descriptor, shard.size)
            reserve(descriptor, shard.size)
            direct = open_direct(path)
            if direct is not None:
                self._direct[shard.name] = direct
            self._write(shard.name, 0, memoryview(shard.header))
        sync_path(folder)

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """Write `data` from byte `first` of the output's tensor on."""
        offset = output.offset + first
        begin = -offset % PAGESIZE
        end = begin + (data.nbytes - begin) // PAGESIZE * PAGESIZE
        if end - begin >= _DIRECT and self._write_pages(
            output.file, offset + begin, data[begin:end]
        ):
            self._write(output.file, offset, data[:begin])
            self._write(output.file, offset + end, data[end:])
        else:
            self._write(output.file, offset, data)

    def _write(self, file: str, offset: int, data: memoryview) -> None:
        while data.nbytes:
            count = os.pwrite(self._descriptors[file], data, offset)
            data, offset = data[count:], offset + count

    def _write_pages(self, file: str, offset: int, data: memoryview) -> bool:
        """Write whole pages past the system's cache; False where that isn't possible."""
        descriptor = self._direct.get(file)
        if descriptor is None or np.frombuffer(data, np.uint8).ctypes.data % PAGESIZE:
            return False
        try:
            return os.pwrite(descriptor, data, offset) == data.nbytes
        except OSError:
            return False  # if the disk has failed, the write through the cache reports it

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            sync_data(descriptor)

    def close(self) -> None:
        for descriptors in (self._descriptors, self._direct):
            while descriptors:
                os.close(descriptors.popitem()[1])


class Saver(Sink):
    """Forces what was written to the disk and records it in the journal, in a thread of its own.

    The threads that write wait for it once it is behind by two saves.
    """

    def __init__(self, files: ShardFiles, journal: Journal) -> None:
        super().__init__(journal.done)
        self.files = files
        self._journal = journal
        self._changed = threading.Condition()
        self._saving = threading.Lock()
        self._pending: dict[str, dict[str, Any]] = {}
        self._noted, self._saved = 0, 0  # bytes
        self._busy = False
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            with suppress(OSError):  # such as a full disk: then less is kept
                self.save()

    def write(self, output: Output, first: int, data: memoryview) -> None:
        self.files.write(output, first, data)

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        """See `Sink.note`.

        Raises:
            OSError: an earlier save failed.
        """
        with self._changed:
            getattr(self.done, kind)[name] = value
            self._pending.setdefault(kind, {})[name] = value
            self._noted += nbytes
            while self._noted - self._saved >= SAVE_EVERY and not self._error:
                if not self._busy:
                    saving = threading.Thread(target=self._save_aside, name="save")
                    saving.start()
                    self._busy = True
                if self._noted - self._saved < 2 * SAVE_EVERY:
                    break
                self._changed.wait()
            if self._error:
                raise self._error

    def _save_aside(self) -> None:
        try:
            self.save()
        except OSError:
            pass  # the next `note` raises it
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def save(self) -> None:
        """Force everything written so far to the disk, then record it."""
        with self._saving:
            if self._error:
                raise self._error  # a second sync wouldn't report what a failed one lost
            with self._changed:
                pending, self._pending, noted = self._pending, {}, self._noted
            try:
                self.files.sync()
                if pending:
                    self._journal.add(**pending)
            except BaseException as error:
                self._error = error
                raise
            finally:
                with self._changed:
                    self._saved = noted
                    self._changed.notify_all()


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Give the complete folder the name `out`, in one step.

    Raises:
        OSError: `out` contains something that may not be replaced.
    """
    model = work / "model"
    for path in [*model.rglob("*"), model]:
        sync_path(path)
    if overwrite and out.exists() and any(out.iterdir()):
        exchange(model, out)
    else:
        os.rename(model, out)
    sync_path(out.parent)
    sync_path(work)

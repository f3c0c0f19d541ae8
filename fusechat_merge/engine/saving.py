"""A merge's bytes on the disk: written at their final places, made safe, published in one step."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_common.files import sync_folder
from fusechat_common.system import NO_FOLLOW, exchange, open_direct, reserve, sync, sync_data
from fusechat_merge.engine.journal import Journal
from fusechat_merge.planning.plan import Output, Plan

SAVE_EVERY = 64 << 20
"""Bytes after which what was written is forced to the disk and noted in the journal."""
_DIRECT = 1 << 16
"""Fewer bytes are not worth a transfer of their own."""


class ShardFiles:
    """The output files, whole from the start, filled at offsets from any thread.

    Whole pages go to the disk directly where the file system can: a merged model would only push
    what is to be read out of the system's cache. A page that two writes share goes through it.

    Whatever the journal says of a file that isn't there any more is forgotten.
    """

    def __init__(self, planned: Plan, folder: Path, journal: Journal) -> None:
        folder.mkdir(exist_ok=True)
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self._forget_lost(planned, folder, journal)
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
        sync_folder(folder)

    @staticmethod
    def _forget_lost(planned: Plan, folder: Path, journal: Journal) -> None:
        """Before any file is made anew: or a start that broke would hide the loss."""
        lost = set()
        for shard in planned.shards:
            path = folder / shard.name
            if not path.exists() or path.stat().st_size != shard.size:
                lost.add(shard.name)
        done = {
            o.name: 0 for o in planned.outputs if o.file in lost and o.name in journal.done.elements
        }
        if done:
            journal.add(elements=done)
            journal.done.elements.update(done)

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """Write ``data`` from byte ``first`` of the output's tensor on."""
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
        """Write whole pages past the system's cache; False where that can't be done."""
        descriptor = self._direct.get(file)
        if descriptor is None or np.frombuffer(data, np.uint8).ctypes.data % PAGESIZE:
            return False
        try:
            return os.pwrite(descriptor, data, offset) == data.nbytes
        except OSError:
            return False  # what is wrong with the disk, the other way will tell

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            sync_data(descriptor)

    def close(self) -> None:
        for descriptors in (self._descriptors, self._direct):
            while descriptors:
                os.close(descriptors.popitem()[1])


class Saver:
    """Forces what was written to the disk and notes it, beside the work of the others.

    It is never behind by more than two saves' worth: then the others wait.
    """

    def __init__(self, files: ShardFiles, journal: Journal) -> None:
        self.files = files
        self.done = journal.done
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
            with suppress(OSError):  # a disk that is full, say: then less is kept
                self.save()

    def write(self, output: Output, first: int, data: memoryview) -> None:
        self.files.write(output, first, data)

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        """Something to be remembered, which ``nbytes`` were written for.

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
            pass  # the next note raises it
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def save(self) -> None:
        """Force everything noted so far to the disk."""
        with self._saving:
            if self._error:
                raise self._error  # what a failed sync lost, a second one would not tell
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
    """Let the complete folder be ``out``, in one step.

    Raises:
        OSError: something is in ``out`` that may not be replaced.
    """
    made = work / "model"
    for path in [*made.rglob("*"), made]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    if overwrite and out.exists() and any(out.iterdir()):
        exchange(made, out)
    else:
        os.rename(made, out)
    sync_folder(out.parent)
    sync_folder(work)

"""Each call that a system may lack taken away: the same results without it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusechat_common import system
from fusechat_distill.storage.shards import Shards
from tests.support.checkpoints import llama_family
from tests.support.merging import configuration

LACKING = [
    "sched_getaffinity",
    "posix_fadvise",
    "POSIX_FADV_WILLNEED",
    "fdatasync",
    "O_DIRECT",
    "O_NOFOLLOW",
    "preadv",
]
WORK = """
import ctypes, json, os, sys
from pathlib import Path
given = json.loads(sys.argv[1])
for name in given["lacking"]:
    delattr(os, name)
if given["lacking"]:
    libraries = ctypes.CDLL
    ctypes.CDLL = lambda name=None, *a, **k: object() if name is None else libraries(name, *a, **k)
import pyarrow as pa
from fusechat_distill.storage.shards import Manifest, Shards
from fusechat_merge import merge
from fusechat_merge.engine import saving
here = Path(given["here"])
out = here / "out"
out.mkdir()
(out / "replaced").touch()
saving.SAVE_EVERY = 20_000
made = []
def interrupt(tensor, nbytes):
    made.append(tensor)
    if len(made) == 40:
        raise KeyboardInterrupt
try:
    merge(given["config"], out, overwrite=True, threads=1, progress=interrupt)
    raise AssertionError("not interrupted")
except KeyboardInterrupt:
    assert '"elements":' in (here / ".out.partial" / "journal").read_text()
merge(given["config"], out, overwrite=True)
merge(given["config"], here / "at once", report=False)
shards = Shards.create(here / "store", Manifest("test", 2, {}))
with shards.exclusive():
    shards.write(shards.manifest.ranges()[0], pa.table({"row": [0, 1]}), {"rows": 2})
    assert shards.clean() == []
"""


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            yield str(path.relative_to(folder)), path.read_bytes()


def test_a_merge_a_resumed_one_and_a_store_on_a_lesser_system(tmp_path: Path) -> None:
    config = configuration(llama_family(tmp_path / "models", (torch.bfloat16,) * 3))
    for name, lacking in (("all", []), ("few", LACKING)):
        (tmp_path / name).mkdir()
        given = json.dumps({"config": config, "here": str(tmp_path / name), "lacking": lacking})
        done = subprocess.run([sys.executable, "-c", WORK, given], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = dict(files(tmp_path / "few"))
    assert found == dict(files(tmp_path / "all"))
    assert {
        "out/model.safetensors",
        "at once/model.safetensors",
        "store/manifest.json",
    } <= found.keys()
    assert Shards.open(tmp_path / "few" / "store").present()


def test_every_call_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    with open(path, "rb+") as file:
        for name in (None, *LACKING):
            if name:
                monkeypatch.delattr(os, name)
            into = memoryview(bytearray(3))
            assert system.read_into(file.fileno(), into, 4) == 2
            assert bytes(into) == b"ef\0"
            assert 1 <= system.processors() <= (os.cpu_count() or 1)
            system.will_read(file.fileno(), 0, 6)
            system.sync_data(file.fileno())
    assert system.open_direct(path) is None
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.processors() == 1


def test_a_file_system_without_direct_writes(tmp_path: Path) -> None:
    assert system.open_direct(tmp_path / "missing") is None


def test_the_disks_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS's F_FULLFSYNC, by calls that succeed, are refused, or fail."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)
    with open(tmp_path / "file", "wb") as file:
        system.sync(file.fileno())
        assert synced == []
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 99_999)  # EINVAL
        system.sync(file.fileno())
        assert synced == [file.fileno()]
    with pytest.raises(OSError) as caught:
        system.sync(file_number_of_nothing := 1_000_000)
    assert caught.value.errno == errno.EBADF
    assert file_number_of_nothing not in synced


def test_room_is_reserved_where_it_can_be(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        system.reserve(file.fileno(), 1 << 20)
        assert os.stat(file.name).st_size == 1 << 20
        with pytest.raises(OSError) as caught:
            system.reserve(file.fileno(), (1 << 63) - 1)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    read, write = os.pipe()
    system.reserve(write, 1)  # not a file that room can be reserved for
    os.close(read), os.close(write)

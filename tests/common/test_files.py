"""Written beside, then renamed: complete or as before, whatever happens on the way."""

import json
import os
from pathlib import Path

import pytest

from fusechat_common.files import can_be_made, existing, replacing, write_json, write_text


def test_what_fails_on_the_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before\n")
    with pytest.raises(OSError, match="no room"), replacing(path) as file:
        file.write(b"half")
        raise OSError("no room")
    assert path.read_text() == "before\n"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another's")
    path = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(other)
    path.symlink_to(other)
    write_json(path, {"ä": 1})
    assert other.read_text() == "another's"
    assert not path.is_symlink()
    assert json.loads(path.read_text("utf-8")) == {"ä": 1}


def test_where_a_folder_would_be_made(tmp_path):
    assert existing(tmp_path / "a" / "b") == tmp_path.resolve()
    assert existing(tmp_path) == tmp_path.resolve()
    assert can_be_made(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    assert not can_be_made(tmp_path / "file" / "a")

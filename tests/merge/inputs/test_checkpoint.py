"""Checkpoints as they lie on disk: what is read from headers, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusechat_merge.inputs.checkpoint import CheckpointError, Folder, read_checkpoint

TENSORS = {
    "model.a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "model.b": torch.arange(5, dtype=torch.float32),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "größe": torch.tensor([True, False]),
}


def read(folder: Path):
    return read_checkpoint(Folder(folder), "m")


def problems(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return list(caught.value.problems)


def write_raw(path: Path, header: object, data: bytes = b"", pad: int = 0) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) + pad).to_bytes(8, "little") + raw + b" " * pad + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_sharded(folder: Path, **listed: str | None) -> None:
    """Two shards and their index, which places other tensors, too, or (None) not all."""
    save_file({"a": torch.ones(2)}, folder / "x-1.safetensors")
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, folder / "x-2.safetensors")
    placed = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"} | listed
    weight_map = {name: file for name, file in placed.items() if file is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_locations_point_at_the_bytes_that_safetensors_reads(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert set(checkpoint.tensors) == set(TENSORS)
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        for name, at in checkpoint.tensors.items():
            expected = reference.get_tensor(name)
            assert at.shape == tuple(expected.shape)
            assert at.numel == expected.numel()
            content = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw[at.offset : at.offset + at.nbytes] == content
    assert checkpoint.files["model.safetensors"].size == len(raw)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"late": entry("U8", [2], 1, 3), "early": entry("U8", [1], 0, 1)}
    write_raw(tmp_path / "model.safetensors", header, b"abc", pad=5)
    assert list(read(tmp_path).tensors) == ["early", "late"]


def test_the_index_decides_but_for_one_of_another_save(tmp_path):
    """transformers too takes a whole file, whatever lies beside it."""
    write_sharded(tmp_path, c=None)
    checkpoint = read(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.unlisted == {"c": "x-2.safetensors"}
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read(tmp_path).tensors) == ["whole"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("/etc/x.safetensors", "not a plain name"),
        ("../x.safetensors", "not a plain name"),
        ("sub/x.safetensors", "not a plain name"),
        ("..\\x.safetensors", "not a plain name"),
        ("C:x.safetensors", "not a file name to be trusted"),
        ("x\x00.safetensors", "not a file name to be trusted"),
        ("pytorch_model.bin", "convert it once"),
        ("gone.safetensors", "the index lists gone.safetensors, which is not there"),
        ("x-1.safetensors", "m: the index places d in x-1.safetensors, which doesn't hold it"),
    ],
)
def test_index_names_that_are_not_followed(tmp_path, listed, message):
    write_sharded(tmp_path, d=listed)
    (found,) = problems(tmp_path)
    assert message in found


def test_every_damaged_shard_is_named_at_once(tmp_path):
    write_sharded(tmp_path)
    for name in ("x-1.safetensors", "x-2.safetensors"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[:-1])
    assert problems(tmp_path) == [
        "m: x-1.safetensors: 'a' ends at byte 8 of 7: truncated",
        "m: x-2.safetensors: 'c' ends at byte 16 of 15: truncated",
    ]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc", "overlap"),
        ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"abc", "leave a hole"),
        ({"a": entry("U8", [1], 0, 1)}, b"abc", "2 bytes after the last tensor belong to none"),
        ({"a": entry("F32", [1], 0, 2)}, b"ab", "doesn't take the 2 bytes"),
        ({"a": entry("U8", [1 << 62, 1 << 62], 0, 2)}, b"ab", "doesn't take the 2 bytes"),
        ({"a": entry("U8", [0, 1 << 63], 0, 2)}, b"ab", "doesn't take the 2 bytes"),
        ({"a": entry("F4", [3], 0, 2)}, b"ab", "doesn't take the 2 bytes"),
        ({"a": entry("U8", [2], 2, 0)}, b"ab", "doesn't take the -2 bytes"),
        ({"a": entry("U8", [-1], 0, 2)}, b"ab", "list of sizes"),
        ({"a": entry("U8", [True, 2], 0, 2)}, b"ab", "list of sizes"),
        ({"a": entry("U8", [2.0], 0, 2)}, b"ab", "list of sizes"),  # type: ignore[list-item]
        ({"a": entry("Q4", [2], 0, 2)}, b"ab", "unknown dtype"),
        ({"a": {"dtype": ["U8"], "shape": [2], "data_offsets": [0, 2]}}, b"ab", "unknown dtype"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0]}}, b"ab", "pair of byte offsets"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", "needs dtype, shape and data_offsets"),
        ({"a": 3}, b"ab", "needs dtype, shape and data_offsets"),
        ({"__metadata__": {"x": 1}}, b"", "may map strings to strings"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
        (b'{"\\ud800": 1}', b"", "no valid text"),
        (b"[]", b"", "a JSON object belongs here"),
        (b"\xff{}", b"", "not to be read as JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not to be read as JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "not to be read as JSON"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, data, message):
    write_raw(tmp_path / "model.safetensors", header, data)
    (found,) = problems(tmp_path)
    assert found.startswith("m: model.safetensors: ")
    assert message in found


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"\x02\0\0\0", "too short"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "can't be"),
        ((200).to_bytes(8, "little") + b"{}", "truncated"),
        (os.mkfifo, "holds neither"),
    ],
)
def test_files_that_are_refused(tmp_path, raw, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw) if isinstance(raw, bytes) else raw(path)
    assert message in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "pickled (pytorch_model.bin), which can run code; convert it once"),
        ("model.gguf", "GGUF"),
        ("adapter_config.json", "is an adapter; name it together with its model: MODEL+m"),
        ("README.md", "holds neither model.safetensors nor"),
    ],
)
def test_other_formats_are_named_with_the_remedy(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    assert message in problems(tmp_path)[0]

"""Generated and damaged safetensors files: refused with a reason or read as safetensors reads them.

As a program it checks so many files more, from a seed:
`python -m tests.merge.inputs.test_fuzz_headers 2000000 0`.
"""

import json
import math
import random
import sys
import time

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusechat_merge.inputs.checkpoint import CheckpointError, read_weights_file
from tests.support.damage import changed_safetensors

DTYPES = {"BF16": 2, "F32": 4, "U8": 1, "I64": 8, "F8_E4M3": 1}
SHAPES = st.lists(st.integers(0, 4), max_size=3)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def built(tensors: list[tuple[str, str, list[int]]], pad: int) -> bytes:
    header, position = {}, 0
    for name, dtype, shape in tensors:
        end = position + DTYPES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return file(json.dumps(header).encode() + b" " * pad, bytes(position))


class InMemory:
    """A store of one file."""

    folder = None

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def names(self) -> set[str]:
        return {"f"}

    def stat(self, name: str) -> tuple[int, None]:
        return len(self.raw), None

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self.raw[offset : offset + length]


def locations(raw: bytes):
    return read_weights_file(InMemory(raw), "f", "f")[0]


def check(raw: bytes) -> bool:
    """Whether it was accepted; then safetensors must see the same tensors in the same bytes."""
    try:
        found = locations(raw)
    except CheckpointError as error:
        assert error.problems
        return False
    expected = dict(safetensors.deserialize(raw))
    assert set(found) == set(expected)
    for name, at in found.items():
        assert list(at.shape) == list(expected[name]["shape"])
        assert raw[at.offset : at.offset + at.nbytes] == bytes(expected[name]["data"])
    return True


TENSORS = st.lists(
    st.tuples(st.text(max_size=6), st.sampled_from(sorted(DTYPES)), SHAPES),
    max_size=4,
    unique_by=lambda t: t[0],
).filter(lambda tensors: all(name != "__metadata__" for name, _, _ in tensors))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TENSORS, st.integers(0, 9))
@example([("a", "U8", [0, 3]), ("b", "U8", [0])], 0)
def test_what_is_well_formed_is_accepted(tensors, pad):
    assert check(built(tensors, pad))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TENSORS, st.data())
def test_damage_is_refused_or_harmless(tensors, data):
    chance = random.Random(data.draw(st.integers(0, 1 << 32)))
    check(changed_safetensors(built(tensors, 0), chance, data.draw(st.integers(1, 4))))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=5), JUNK, max_size=3), st.binary(max_size=8))
def test_any_json_is_refused_or_read(header, data):
    check(file(json.dumps(header).encode(), data))


NAMED = b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
SHAPED = b'{"a":{"dtype":"U8","shape":[0,%s],"data_offsets":[0,0]}}'
MORE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":%s}}'


@pytest.mark.parametrize(
    ("header", "accepted", "refused"),
    [
        # Half a surrogate pair is no name.
        (NAMED, [r"\ud83d\ude00", r"\\ud800"], [r"\ud800", r"\ud800\u0041", r"\udc00"]),
        # A number is one of 64 bits.
        (SHAPED, ["0", str(2**64 - 1)], ["-0", "0.0", str(2**64)]),
        # What is not looked at must be JSON all the same.
        (MORE, ["null", "1.0"], ["1e400", "-1e400", "NaN", "Infinity", "9" * 400]),
        (b'{"__metadata__":%s}', ["null"], []),
    ],
)
def test_values_at_the_edge_of_json(header, accepted, refused):
    assert [v for v in accepted + refused if check(file(header % v.encode()))] == accepted


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused_or_read(raw):
    check(raw)


def main(files: int, seed: int) -> None:
    chance = random.Random(seed)
    accepted = 0
    for _ in range(files):
        tensors = [
            (f"t{i}", chance.choice(sorted(DTYPES)), [chance.randrange(4) for _ in range(i)])
            for i in range(chance.randrange(4))
        ]
        raw = changed_safetensors(built(tensors, chance.randrange(3)), chance, chance.randrange(6))
        started = time.monotonic()
        accepted += check(raw)
        assert time.monotonic() - started < 5, raw
    print(f"{files} files, {accepted} of them well-formed")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

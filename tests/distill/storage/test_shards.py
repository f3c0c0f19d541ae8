"""The store: what is written is read back, by key, and what is torn or foreign never is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.storage.shards import (
    Manifest,
    SampleRange,
    ScoreStore,
    Shards,
    scored_samples,
    scores_table,
    stale,
)
from fusechat_distill.text.scored import ScoredResponse, ScoredSample

MANIFEST = Manifest("scores", 10, {"model": {"name": "m", "revision": "a"}, "top_k": 3}, 4)


def sample(rng: np.random.Generator, row: int, lengths, k: int = 3) -> ScoredSample:
    responses = tuple(
        ScoredResponse(
            turn=2 * turn + 1,
            begin=1,
            end=5 * n + 1,
            first=10 + turn,
            pending=b"" if turn else " \xe9\n".encode(),
            stop="special" if n else "none",
            tokens=rng.integers(0, 2**32, n, dtype=np.uint32),
            ends=np.r_[np.arange(1, n), -1].astype(np.int32)[:n],
            ids=rng.integers(0, 2**32, (n, k), dtype=np.uint32),
            logprobs=-np.sort(rng.exponential(3, (n, k))).astype(np.float16),
            gold_logprobs=-rng.exponential(3, n).astype(np.float32),
        )
        for turn, n in enumerate(lengths)
    )
    return ScoredSample(hashlib.md5(str(row).encode()).hexdigest(), row, responses)


def samples(k: int = 3) -> list[ScoredSample]:
    rng = np.random.default_rng(0)
    shapes = [(3,), (1, 4), (2, 2, 2), (7,), (), (5, 0, 1), (300,), (1,), (2,), (9, 1)]
    return [sample(rng, row, shape, k) for row, shape in enumerate(shapes)]


def assert_same(one: ScoredSample, other: ScoredSample) -> None:
    assert (one.key, one.row, len(one.responses)) == (other.key, other.row, len(other.responses))
    for mine, theirs in zip(one.responses, other.responses, strict=True):
        for field in dataclasses.fields(ScoredResponse):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if isinstance(a, np.ndarray) and a.size:
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                np.testing.assert_array_equal(a, b)
            elif not isinstance(a, np.ndarray):
                assert a == b


def filled(folder: Path, leave_out: int | None = None) -> Shards:
    shards = Shards.create(folder, MANIFEST)
    everything = samples()
    for index, samples_range in enumerate(MANIFEST.ranges()):
        if index != leave_out:
            part = everything[samples_range.start : samples_range.stop]
            shards.write(samples_range, scores_table(part), {"samples": len(part)})
    return shards


def test_what_is_written_is_read_back_by_key(tmp_path):
    filled(tmp_path)
    store = ScoreStore(tmp_path, cached_shards=1)
    written = samples()
    assert list(store) == [s.key for s in written]
    for wanted in [*reversed(written), *written]:
        assert_same(store[wanted.key], wanted)
    assert "0" * 32 not in store
    with pytest.raises(KeyError):
        store["0" * 32]


@pytest.mark.parametrize("k", [1, 10, 64])
def test_tables_keep_every_type_and_shape(k):
    for one, other in zip(samples(k), scored_samples(scores_table(samples(k))), strict=True):
        assert_same(one, other)
    assert scored_samples(scores_table([])) == []


def test_of_equal_keys_the_first_row_counts(tmp_path):
    first, second = samples()[:2]
    second = dataclasses.replace(second, key=first.key)
    shards = Shards.create(tmp_path, Manifest("scores", 2, {}, 4))
    shards.write(SampleRange(0, 2), scores_table([first, second]), {})
    store = ScoreStore(tmp_path)
    assert len(store) == 1
    assert_same(store[first.key], first)


def test_same_content_is_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        filled(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_position_of_ten_entries_takes_at_most_55_bytes(tmp_path):
    # As random as it gets: 150,000 equally likely ids, no gold token guessed.
    rng = np.random.default_rng(1)

    def spread(r: ScoredResponse) -> ScoredResponse:
        return dataclasses.replace(
            r,
            ids=rng.integers(0, 150_000, r.ids.shape).astype(np.uint32),
            tokens=rng.integers(0, 150_000, r.tokens.shape).astype(np.uint32),
            logprobs=-np.sort(rng.normal(9, 1, r.ids.shape)).astype(np.float16),
        )

    made = [sample(rng, row, (200,), 10) for row in range(100)]
    made = [dataclasses.replace(s, responses=tuple(map(spread, s.responses))) for s in made]
    shards = Shards.create(tmp_path, Manifest("scores", 100, {}))
    path = shards.write(SampleRange(0, 100), scores_table(made), {})
    assert path.stat().st_size / 20_000 <= 55


def test_resuming_names_what_is_missing_and_keeps_what_is_there(tmp_path):
    filled(tmp_path, leave_out=1)
    shards = Shards.create(tmp_path, MANIFEST)
    assert shards.clean() == []
    assert shards.missing() == [SampleRange(4, 8)]
    assert shards.present() == [SampleRange(0, 4), SampleRange(8, 10)]
    assert shards.summary(SampleRange(8, 10)) == {"samples": 2}


def test_torn_and_foreign_shards_are_set_aside(tmp_path):
    shards = filled(tmp_path)
    first, second, third = (shards.path(r) for r in MANIFEST.ranges())
    torn = first.read_bytes()
    first.write_bytes(torn[:-9])
    flipped = bytearray(second.read_bytes())
    flipped[len(flipped) // 3] ^= 4
    second.write_bytes(flipped)
    other = dataclasses.replace(MANIFEST, fingerprint={"model": "other"})
    table = pq.read_table(third)
    Shards.create(tmp_path / "other", other).write(SampleRange(8, 10), table, {})
    os.replace(tmp_path / "other" / third.name, third)
    (tmp_path / "00000000-00000256.parquet").write_bytes(torn)
    (tmp_path / ".00000000-00000004.parquet.99.part").write_bytes(b"half")

    lines = shards.clean()
    assert [line.split(": ", 1)[0] for line in lines] == [
        str(path) for path in sorted([first, second, third, tmp_path / "00000000-00000256.parquet"])
    ]
    assert "not a sample range of this folder; moved to" in lines[1]
    assert "can't be read (it was changed or damaged after" in lines[2]
    assert "was made with another fingerprint; moved to" in lines[3]
    assert shards.missing() == MANIFEST.ranges()
    assert len(list((tmp_path / "quarantine").iterdir())) == 4
    assert not list(tmp_path.glob(".*.part"))

    filled(tmp_path)
    first.write_bytes(torn[:-9])
    shards.clean()
    assert (tmp_path / "quarantine" / f"{first.name}.1").exists(), "an earlier one was overwritten"


def test_a_shard_under_anothers_name_is_not_taken_for_it(tmp_path):
    shards = filled(tmp_path)
    first, second, _ = (shards.path(r) for r in MANIFEST.ranges())
    os.replace(second, first)
    with pytest.raises(FusechatError) as caught:
        shards.read(SampleRange(0, 4))
    assert str(caught.value) == f"{first}: holds samples [4, 8]"


def test_a_changed_fingerprint_is_refused_with_what_changed(tmp_path):
    filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changed = Manifest("scores", 11, {"model": {"name": "m", "revision": "b"}, "dtype": "x"}, 4)
    with pytest.raises(RequestError) as caught:
        Shards.create(tmp_path, changed)
    assert str(caught.value) == (
        f"{tmp_path}: was made with other settings or inputs (dtype was None, is 'x'; "
        "model.revision was 'a', is 'b'; top_k was 3, is None; samples was 10, is 11); undo the "
        "change, or move it away or delete it to make it again, or set another `output`"
    )
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    one, other = (Manifest("fused", 1, {"scores": digit * 64}) for digit in "ab")
    assert one.differences(other) == ["scores was 'aaaaaaaa...', is 'bbbbbbbb...'"]
    assert stale(tmp_path, MANIFEST) is None
    assert stale(tmp_path / "none", MANIFEST) is None


def test_a_torn_manifest_is_set_aside_and_the_shards_kept(tmp_path):
    filled(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "ki')
    with pytest.raises(FusechatError, match=r"its manifest\.json can't be read: Unterminated"):
        Shards.open(tmp_path)
    shards = Shards.create(tmp_path, MANIFEST)
    assert shards.clean() == []
    assert shards.missing() == []
    assert (tmp_path / "quarantine" / "manifest.json").exists()
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST.as_json()


def test_reading_what_is_not_there_says_so(tmp_path):
    with pytest.raises(FusechatError) as caught:
        ScoreStore(tmp_path)
    nothing = f"{tmp_path}: holds no manifest.json; nothing has been written there"
    assert str(caught.value) == nothing
    Shards.create(tmp_path, Manifest("aligned", 1, {}))
    with pytest.raises(FusechatError) as caught:
        ScoreStore(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds aligned, not scores"


def test_one_run_at_a_time(tmp_path):
    shards = Shards.create(tmp_path, MANIFEST)
    code = (
        "import sys; from fusechat_distill.storage.shards import Shards\n"
        "from fusechat_common.errors import RequestError\n"
        "try:\n    with Shards.open(sys.argv[1]).exclusive(): print('held')\n"
        "except RequestError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with shards.exclusive():
        held = subprocess.run(command, capture_output=True, text=True, check=True)
    assert held.stdout.strip() == (
        f"{tmp_path}: another run is writing it; wait for that run to end, or end it"
    )
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert free.stdout.strip() == "held"


def test_no_bit_of_a_shard_may_flip(tmp_path):
    """Neither in the values nor in what says how they are packed, nor in the summary."""
    shards = filled(tmp_path)
    first = MANIFEST.ranges()[0]
    path = shards.path(first)
    raw = path.read_bytes()
    summary = shards.summary(first)
    for at in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(FusechatError, match=path.name):
            shards.read(first)
        try:
            assert shards.summary(first) == summary
        except FusechatError:
            continue


def test_a_link_that_lies_in_the_folder_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    shards = filled(tmp_path / "store")
    first = MANIFEST.ranges()[0]
    path = shards.path(first)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    for link in (path, part, shards.folder / ".lock"):
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    shards.write(first, scores_table(samples()[:4]), {})
    with pytest.raises(OSError, match="symbolic links"), shards.exclusive():
        pass
    assert victim.read_text() == "mine"
    assert not path.is_symlink()


def test_a_folder_of_another_version_is_left_as_it_is(tmp_path):
    manifest = filled(tmp_path).manifest
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="another version of fusechat .format 0, expected 1"):
        Shards.create(tmp_path, manifest)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

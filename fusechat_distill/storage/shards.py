"""Parquet shards of distributions, named by sample range, under a manifest of what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import lock_descriptor
from numpy.typing import NDArray

from fusechat_common.errors import FusechatError, RequestError, one_line
from fusechat_common.files import no_link, replacing, write_json
from fusechat_distill.text.scored import ScoredResponse, ScoredSample

SHARD_SAMPLES = 256
FORMAT = 1
METADATA = b"fusechat_distill"
MADE_FROM = ("pivot_scores ", "source_scores ", "aligned.", "fused ")
"""How differences of the stages before begin, in the fingerprints of those that follow."""


class SampleRange(NamedTuple):
    """Samples `start` to `stop` (excluded) of the conversations, and the shard that holds them."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        return f"{self.start:08d}-{self.stop:08d}.parquet"


class FormatError(ValueError):
    """A folder was written by a version with another format."""


@dataclass(frozen=True)
class Manifest:
    """What determines the content of a folder of shards."""

    kind: str
    samples: int
    fingerprint: Mapping[str, Any]
    """JSON values by name, nested as wanted; two folders with equal ones hold the same."""
    shard_samples: int = SHARD_SAMPLES

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "samples": self.samples,
            "shard_samples": self.shard_samples,
            "fingerprint": dict(self.fingerprint),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        if data["format"] != FORMAT:
            raise FormatError(f"format {data['format']}, expected {FORMAT}")
        return cls(data["kind"], data["samples"], data["fingerprint"], data["shard_samples"])

    @property
    def digest(self) -> str:
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def ranges(self) -> list[SampleRange]:
        return [
            SampleRange(start, min(start + self.shard_samples, self.samples))
            for start in range(0, self.samples, self.shard_samples)
        ]

    def differences(self, other: Manifest) -> list[str]:
        """`name: was …, is …` for what `other` has otherwise."""
        was, now = _flat(self.as_json()), _flat(other.as_json())
        return [
            f"{name.removeprefix('fingerprint.')} was {_shown(was.get(name))}, "
            f"is {_shown(now.get(name))}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]


def _shown(value: Any) -> str:
    """A hash says no more to a reader than that it is another one."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"'{value[:8]}...'"
    return repr(value)


class Shards:
    """A folder of Parquet shards: written one at a time, complete or not at all."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Open for reading.

        Raises:
            FusechatError: there is no manifest, or none that can be read.
        """
        folder = Path(folder)
        try:
            manifest = _read_manifest(folder)
        except ValueError as error:
            raise FusechatError(f"{folder}: its manifest.json can't be read: {error}") from error
        if manifest is None:
            raise FusechatError(f"{folder}: holds no manifest.json; nothing has been written there")
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> Shards:
        """Open for writing; a folder that the same manifest made is gone on with.

        Raises:
            RequestError: the folder was made with another fingerprint.
        """
        folder = Path(folder)
        problem = stale(folder, manifest)
        if problem:
            raise RequestError([problem], folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards = cls(folder, manifest)
        path = folder / "manifest.json"
        with contextlib.suppress(ValueError):
            if _read_manifest(folder) is not None:
                return shards
        if path.exists():
            shards._quarantine(path)
        write_json(path, manifest.as_json())
        return shards

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder for writing, against other runs on this file system.

        Raises:
            RequestError: another run holds it.
        """
        with open(self.folder / ".lock", "w", opener=no_link) as lock:
            if not lock_descriptor(lock.fileno(), blocking=False):
                problem = "another run is writing it; wait for that run to end, or end it"
                raise RequestError([problem], self.folder)
            yield

    def path(self, samples: SampleRange) -> Path:
        return self.folder / samples.file_name

    def clean(self) -> list[str]:
        """Remove what a stopped run left half written; set torn and foreign shards aside.

        Every shard is read whole. Only the one run that holds the folder
        may call this. Returns a line for each shard that went to `quarantine/`.
        """
        for path in self.folder.glob(".*.part"):
            path.unlink()
        expected = {samples.file_name: samples for samples in self.manifest.ranges()}
        reasons = []
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name not in expected:
                reason = "not a sample range of this folder"
            else:
                try:
                    self.read(expected[path.name])
                    continue
                except FusechatError as error:
                    reason = str(error).removeprefix(f"{path}: ")
            reasons.append(f"{path}: {reason}; moved to {self._quarantine(path)}")
        return reasons

    def missing(self) -> list[SampleRange]:
        return [samples for samples in self.manifest.ranges() if not self.path(samples).exists()]

    def present(self) -> list[SampleRange]:
        return [samples for samples in self.manifest.ranges() if self.path(samples).exists()]

    def write(self, samples: SampleRange, table: pa.Table, summary: Mapping[str, Any]) -> Path:
        """Write one shard, to the side first; `summary` (JSON) goes into its footer."""
        footer = {
            "range": [samples.start, samples.stop],
            "manifest": self.manifest.digest,
            "summary": dict(summary),
        }
        footer |= {"footer_sha256": _footer_digest(footer), "sha256": UNKNOWN}
        table = table.replace_schema_metadata({METADATA: json.dumps(footer, sort_keys=True)})
        # Ids and half floats compress best with their bytes in streams of their own: 42 bytes a
        # position at k = 10 instead of 55.
        buffer = pa.BufferOutputStream()
        pq.write_table(
            table,
            buffer,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=_number_lists(table.schema),
            write_statistics=False,
            write_page_checksum=True,
        )
        raw = buffer.getvalue().to_pybytes()
        path = self.path(samples)
        with replacing(path) as file:
            file.write(_with_digest(raw, hashlib.sha256(raw).hexdigest()))
        return path

    def read(self, samples: SampleRange, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard's rows; all columns together are checked against the shard's digest.

        Raises:
            FusechatError: it is torn, or was not written for this folder and range.
        """
        with self._shard(samples, whole=columns is None) as file:
            return file.read(columns=None if columns is None else list(columns), use_threads=False)

    def summary(self, samples: SampleRange) -> dict[str, Any]:
        """What `write` was given as `summary`; reads the footer only."""
        with self._shard(samples) as file:
            summary: dict[str, Any] = _footer(file)["summary"]
            return summary

    @contextlib.contextmanager
    def _shard(self, samples: SampleRange, *, whole: bool = False) -> Iterator[pq.ParquetFile]:
        path = self.path(samples)
        try:
            # Pages carry checksums, but what says where they lie and how they are packed does not.
            source = pa.py_buffer(_intact(path.read_bytes())) if whole else path
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                footer = _footer(file)
                if footer["manifest"] != self.manifest.digest:
                    raise FusechatError(f"{path}: was made with another fingerprint")
                if footer["range"] != [samples.start, samples.stop]:
                    raise FusechatError(f"{path}: holds samples {footer['range']}")
                yield file
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise FusechatError(f"{path}: can't be read ({one_line(error)})") from error

    def _quarantine(self, path: Path) -> Path:
        folder = self.folder / "quarantine"
        folder.mkdir(exist_ok=True)
        target = folder / path.name
        number = 1
        while target.exists():
            target = folder / f"{path.name}.{number}"
            number += 1
        os.replace(path, target)
        return target


def stale(folder: str | Path, manifest: Manifest) -> str | None:
    """What keeps `folder` from being gone on with under `manifest`, or None."""
    try:
        found = _read_manifest(Path(folder))
    except FormatError as error:
        return (
            f"was made by another version of fusechat ({error}); go on with that one, or move it "
            "away or delete it to make it anew, or set another `output`"
        )
    except ValueError:
        return None
    if found is None or found.digest == manifest.digest:
        return None
    changes = found.differences(manifest)
    # What was made from what is stale tells nothing new: the change is told where it was made.
    own = [line for line in changes if not line.startswith((*MADE_FROM, "samples was"))]
    if own or not any(line.startswith(MADE_FROM) for line in changes):
        why = f"was made otherwise ({'; '.join(changes)})"
    else:
        why = "was made from what has changed"
    return (
        f"{why}; undo that, or move it away or delete it to make it anew, or set another `output`"
    )


SPAN = ("turn", "begin", "end", "first", "pending", "stop")
"""Fields of a response that are one value each."""

RESPONSE = pa.struct(
    [
        ("turn", pa.uint32()),
        ("begin", pa.uint32()),
        ("end", pa.uint32()),
        ("first", pa.uint32()),
        ("pending", pa.binary()),
        ("stop", pa.string()),
        ("tokens", pa.uint32()),
    ]
)
"""`tokens` says how many of the row's tokens are this response's."""

SCORES = pa.schema(
    [
        ("key", pa.binary(16)),
        ("row", pa.uint32()),
        ("responses", pa.list_(RESPONSE)),
        ("tokens", pa.list_(pa.uint32())),
        ("ends", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.uint32())),
        ("logprobs", pa.list_(pa.float16())),
        ("gold_logprobs", pa.list_(pa.float32())),
    ]
)
"""A row is a sample; the lists run through all of its responses, `ids` and `logprobs` k by k."""


def score_bytes(top_k: int) -> float:
    """Bytes of the store per response token: 42 at k = 10 (39.5 to 42 measured, zstd)."""
    return 12 + 3 * top_k


def list_array(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.ListArray:
    """One list a row."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        offsets, np.concatenate([np.empty(0, dtype), *rows]).astype(dtype)
    )


def scores_table(samples: Sequence[ScoredSample]) -> pa.Table:
    """The samples as rows of `SCORES`."""

    def lists(name: str, dtype: Any) -> pa.Array:
        empty = np.empty(0, dtype)
        return list_array(
            [
                np.concatenate([empty, *(getattr(r, name).reshape(-1) for r in s.responses)])
                for s in samples
            ],
            dtype,
        )

    responses = [
        [
            {name: getattr(r, name) for name in SPAN} | {"tokens": len(r.tokens)}
            for r in sample.responses
        ]
        for sample in samples
    ]
    return pa.table(
        [
            pa.array([bytes.fromhex(sample.key) for sample in samples], pa.binary(16)),
            pa.array([sample.row for sample in samples], pa.uint32()),
            pa.array(responses, pa.list_(RESPONSE)),
            lists("tokens", np.uint32),
            lists("ends", np.int32),
            lists("ids", np.uint32),
            lists("logprobs", np.float16),
            lists("gold_logprobs", np.float32),
        ],
        schema=SCORES,
    )


def scored_samples(table: pa.Table) -> list[ScoredSample]:
    """The rows of `table` (schema `SCORES`) as typed arrays, views of its memory."""
    columns = {
        name: table[name].combine_chunks()
        for name in ("tokens", "ends", "ids", "logprobs", "gold_logprobs")
    }
    flat = {name: column.values.to_numpy() for name, column in columns.items()}
    starts = {name: column.offsets.to_numpy() for name, column in columns.items()}
    samples = []
    for index, (key, row, responses) in enumerate(
        zip(
            table["key"].to_pylist(),
            table["row"].to_pylist(),
            table["responses"].to_pylist(),
            strict=True,
        )
    ):
        at, stop = int(starts["tokens"][index]), int(starts["tokens"][index + 1])
        entry = int(starts["ids"][index])
        k = (int(starts["ids"][index + 1]) - entry) // max(1, stop - at)
        read = []
        for response in responses:
            n = response.pop("tokens")
            tokens, entries = slice(at, at + n), slice(entry, entry + n * k)
            read.append(
                ScoredResponse(
                    **response,
                    tokens=flat["tokens"][tokens],
                    ends=flat["ends"][tokens],
                    ids=flat["ids"][entries].reshape(n, k),
                    logprobs=flat["logprobs"][entries].reshape(n, k),
                    gold_logprobs=flat["gold_logprobs"][tokens],
                )
            )
            at, entry = at + n, entry + n * k
        samples.append(ScoredSample(key.hex(), row, tuple(read)))
    return samples


class ScoreStore(Mapping[str, ScoredSample]):
    """A model's scores by conversation key; holds the keys and the last few shards read.

    Of rows with the same key, which are the same conversation, the first counts. Iterates over
    the keys in the dataset's order.
    """

    def __init__(self, folder: str | Path, *, cached_shards: int = 2):
        self.shards = Shards.open(folder)
        if self.shards.manifest.kind != "scores":
            raise FusechatError(f"{folder}: holds {self.shards.manifest.kind}, not scores")
        self._cached_shards = cached_shards
        self._cache: OrderedDict[SampleRange, list[ScoredSample]] = OrderedDict()
        self._places: dict[str, tuple[SampleRange, int]] = {}
        for samples in self.shards.present():
            keys = self.shards.read(samples, ["key"])["key"].to_pylist()
            for index, key in enumerate(keys):
                self._places.setdefault(key.hex(), (samples, index))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> ScoredSample:
        samples, index = self._places[key]
        return self.shard(samples)[index]

    def shard(self, samples: SampleRange) -> list[ScoredSample]:
        """All of one shard's samples."""
        if samples in self._cache:
            self._cache.move_to_end(samples)
        else:
            self._cache[samples] = scored_samples(self.shards.read(samples))
            if len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        return self._cache[samples]


def _read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where there is none; ValueError where it can't be read."""
    try:
        return Manifest.from_json(json.loads((folder / "manifest.json").read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(one_line(error)) from error


def _number_lists(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns that hold lists of numbers."""
    return [
        f"{field.name}.list.element"
        for field in schema
        if pa.types.is_nested(field.type)
        and not pa.types.is_struct(field.type)
        and pa.types.is_primitive(field.type.value_type)
    ]


UNKNOWN = "0" * 64
"""Stands in a shard for the digest of all its bytes while that is computed."""


def _with_digest(raw: bytes, digest: str) -> bytes:
    """A shard's bytes with another digest in its footer; ValueError where there is none."""
    # What looks the same in the footer's JSON has its quotes escaped, and pages lie before.
    key = b'"sha256": "'
    at = raw.rindex(key) + len(key)
    return raw[:at] + digest.encode() + raw[at + len(digest) :]


def _intact(raw: bytes) -> bytes:
    """A shard's bytes; ValueError where they are not those that were written."""
    blank = _with_digest(raw, UNKNOWN)
    if _with_digest(blank, hashlib.sha256(blank).hexdigest()) != raw:
        raise ValueError(
            "it was changed or damaged after it was written; the stage that made it sets it aside "
            "and makes it anew"
        )
    return raw


def _footer(file: pq.ParquetFile) -> dict[str, Any]:
    footer: dict[str, Any] = json.loads((file.schema_arrow.metadata or {})[METADATA])
    if footer.pop("footer_sha256") != _footer_digest(footer):
        raise ValueError("its footer was changed or damaged after it was written")
    return footer


def _footer_digest(footer: Mapping[str, Any]) -> str:
    stated = {name: footer[name] for name in ("range", "manifest", "summary")}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat

"""Parquet shards of distributions, named by sample range, with a manifest of their inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from operator import attrgetter
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
INPUTS = ("pivot_scores ", "source_scores ", "aligned.", "fused ")
"""How a difference begins that comes from the folder of an earlier stage."""


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
    """JSON values by name, may be nested; folders with equal fingerprints have equal content."""
    shard_samples: int = SHARD_SAMPLES

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self), "fingerprint": dict(self.fingerprint)}

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
        """`name was …, is …` for each value that differs in `other`."""
        was, now = _flat(self.as_json()), _flat(other.as_json())
        return [
            f"{name.removeprefix('fingerprint.')} was {_shown(was.get(name))}, "
            f"is {_shown(now.get(name))}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]


def _shown(value: Any) -> str:
    """The value's repr; of a hash only the first digits."""
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
        """Open for writing; shards that are there under the same manifest are kept.

        Raises:
            RequestError: the folder has another manifest.
        """
        folder = Path(folder)
        if problem := stale(folder, manifest):
            raise RequestError(problem, folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards = cls(folder, manifest)
        path = folder / "manifest.json"
        try:
            if _read_manifest(folder) is not None:
                return shards
        except ValueError:
            shards._quarantine(path)
        write_json(path, manifest.as_json())
        return shards

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the folder for writing, against other runs on this file system.

        Raises:
            RequestError: another run has locked it.
        """
        with open(self.folder / ".lock", "w", opener=no_link) as lock:
            if not lock_descriptor(lock.fileno(), blocking=False):
                problem = "another run is writing it; wait for that run to end, or end it"
                raise RequestError(problem, self.folder)
            yield

    def path(self, samples: SampleRange) -> Path:
        return self.folder / samples.file_name

    def clean(self) -> list[str]:
        """Remove partly written files; move damaged and foreign shards to `quarantine/`.

        Every shard is read whole. Only the run that has locked the folder may call this.

        Returns:
            a line for each shard that was moved.
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
        """Write one shard atomically; `summary` (JSON) goes into its footer."""
        footer = {"range": [*samples], "manifest": self.manifest.digest, "summary": dict(summary)}
        footer |= {"footer_sha256": _footer_digest(footer), "sha256": UNKNOWN}
        table = table.replace_schema_metadata({METADATA: json.dumps(footer, sort_keys=True)})
        # Ids and half floats compress best with their bytes in streams of their own: 42 bytes a
        # position at k = 10 instead of 55. Parquet calls a list's values `NAME.list.element`.
        number_lists = [
            f"{field.name}.list.element"
            for field in table.schema
            if pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
        ]
        buffer = pa.BufferOutputStream()
        pq.write_table(
            table,
            buffer,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=number_lists,
            write_statistics=False,
            write_page_checksum=True,
        )
        raw = buffer.getvalue().to_pybytes()
        path = self.path(samples)
        with replacing(path) as file:
            file.write(_with_digest(raw, hashlib.sha256(raw).hexdigest()))
        return path

    def read(self, samples: SampleRange, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard's rows; a read of all columns is checked against the shard's digest.

        Raises:
            FusechatError: it is damaged, or was not written for this folder and range.
        """
        with self._shard(samples, whole=columns is None) as file:
            return file.read(columns=None if columns is None else list(columns), use_threads=False)

    def summary(self, samples: SampleRange) -> dict[str, Any]:
        """The `summary` that was passed to `write`; reads the footer only."""
        with self._shard(samples) as file:
            summary: dict[str, Any] = _footer(file)["summary"]
            return summary

    @contextlib.contextmanager
    def _shard(self, samples: SampleRange, *, whole: bool = False) -> Iterator[pq.ParquetFile]:
        path = self.path(samples)
        try:
            # Parquet's checksums cover pages, but not the metadata that locates and decodes them.
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
        names = chain([path.name], (f"{path.name}.{number}" for number in count(1)))
        target = next(folder / name for name in names if not (folder / name).exists())
        os.replace(path, target)
        return target


def stale(folder: str | Path, manifest: Manifest) -> str | None:
    """Why a run with `manifest` can't continue in `folder`, or None if it can."""
    remedy = "move it away or delete it to make it again, or set another `output`"
    try:
        existing = _read_manifest(Path(folder))
    except FormatError as error:
        why = "was written by another version of fusechat"
        return f"{why} ({error}); use that version, or {remedy}"
    except ValueError:
        return None
    if existing is None or existing.digest == manifest.digest:
        return None
    changes = existing.differences(manifest)
    # Where an earlier stage's folder is stale too, the change is reported for that folder.
    own = [line for line in changes if not line.startswith((*INPUTS, "samples was"))]
    if own or not any(line.startswith(INPUTS) for line in changes):
        why = f"was made with other settings or inputs ({'; '.join(changes)})"
    else:
        why = "was made from inputs that have changed"
    return f"{why}; undo the change, or {remedy}"


RESPONSE = pa.struct(
    [
        *((name, pa.uint32()) for name in ("turn", "begin", "end", "first")),
        *(("pending", pa.binary()), ("stop", pa.string()), ("tokens", pa.uint32())),
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


def sample_table(
    schema: pa.Schema,
    samples: Sequence[Any],
    parts: Callable[[Any], Sequence[Any]],
    **columns: pa.Array,
) -> pa.Table:
    """Samples as rows: their `key` and `row`, `columns`, and lists of numbers.

    Each of the schema's other fields is, for every sample, the attribute of that name of the
    sample's `parts`, flattened and end to end.
    """
    columns["key"] = pa.array([bytes.fromhex(sample.key) for sample in samples], pa.binary(16))
    columns["row"] = pa.array([sample.row for sample in samples], pa.uint32())
    for field in schema:
        if field.name not in columns:
            dtype = field.type.value_type.to_pandas_dtype()
            arrays = [
                [getattr(part, field.name).reshape(-1) for part in parts(sample)]
                for sample in samples
            ]
            lengths = [sum(map(len, of_sample)) for of_sample in arrays]
            values = np.concatenate([np.empty(0, dtype), *chain.from_iterable(arrays)])
            columns[field.name] = pa.ListArray.from_arrays(
                np.cumsum([0, *lengths]).astype(np.int32), values.astype(dtype)
            )
    return pa.table(columns, schema=schema)


def number_lists(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """The lists in these columns, row by row, as views of the table's memory."""
    columns = [table[name].combine_chunks() for name in names]
    values = [column.values.to_numpy() for column in columns]
    offsets = [column.offsets.to_numpy() for column in columns]
    for i in range(len(table)):
        yield {
            name: flat[at[i] : at[i + 1]]
            for name, flat, at in zip(names, values, offsets, strict=True)
        }


def scores_table(samples: Sequence[ScoredSample]) -> pa.Table:
    """The samples as rows of `SCORES`."""
    spans = [field.name for field in RESPONSE if field.name != "tokens"]

    def row(response: ScoredResponse) -> dict[str, Any]:
        return {name: getattr(response, name) for name in spans} | {"tokens": len(response.tokens)}

    responses = [[row(response) for response in sample.responses] for sample in samples]
    return sample_table(
        SCORES, samples, attrgetter("responses"), responses=pa.array(responses, pa.list_(RESPONSE))
    )


def scored_samples(table: pa.Table) -> list[ScoredSample]:
    """The rows of `table` (schema `SCORES`) as typed arrays, views of its memory."""
    samples = []
    for key, row, spans, lists in zip(
        *(table[name].to_pylist() for name in ("key", "row", "responses")),
        number_lists(table, ("tokens", "ends", "ids", "logprobs", "gold_logprobs")),
        strict=True,
    ):
        k = max(1, len(lists["ids"]) // max(1, len(lists["tokens"])))
        lists |= {name: lists[name].reshape(-1, k) for name in ("ids", "logprobs")}
        responses = []
        stop = 0
        for span in spans:
            start, stop = stop, stop + span.pop("tokens")
            arrays = {name: values[start:stop] for name, values in lists.items()}
            responses.append(ScoredResponse(**span, **arrays))
        samples.append(ScoredSample(key.hex(), row, tuple(responses)))
    return samples


class ScoreStore(Mapping[str, ScoredSample]):
    """A model's scores by conversation key; keeps the keys and the last few shards read.

    Rows with the same key are the same conversation; the first of them counts. Iterates over the
    keys in the dataset's order.
    """

    def __init__(self, folder: str | Path, *, cached_shards: int = 2):
        self.shards = Shards.open(folder)
        if self.shards.manifest.kind != "scores":
            raise FusechatError(f"{folder}: holds {self.shards.manifest.kind}, not scores")
        self._shard = lru_cache(cached_shards)(self._read)
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
        return self._shard(samples)

    def _read(self, samples: SampleRange) -> list[ScoredSample]:
        return scored_samples(self.shards.read(samples))


def _read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None if there is none; ValueError if it can't be read."""
    try:
        return Manifest.from_json(json.loads((folder / "manifest.json").read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(one_line(error)) from error


UNKNOWN = "0" * 64
"""The placeholder for a shard's digest while the digest is computed."""


def _with_digest(raw: bytes, digest: str) -> bytes:
    """A shard's bytes with another digest in its footer; ValueError where there is none."""
    # What looks the same in the footer's JSON has its quotes escaped, and pages lie before.
    key = b'"sha256": "'
    at = raw.rindex(key) + len(key)
    return raw[:at] + digest.encode() + raw[at + len(digest) :]


def _intact(raw: bytes) -> bytes:
    """A shard's bytes; ValueError if they are not those that were written."""
    blank = _with_digest(raw, UNKNOWN)
    if _with_digest(blank, hashlib.sha256(blank).hexdigest()) != raw:
        raise ValueError(
            "it was changed or damaged after it was written; the stage that made it moves it away "
            "and makes it again"
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

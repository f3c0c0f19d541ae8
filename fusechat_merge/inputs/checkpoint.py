"""Where every tensor of a checkpoint lies: read from headers alone, none of which is trusted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from fusechat_common.errors import RequestError, one_line
from fusechat_merge.inputs.stored import ITEM_BITS, Location, Stored
from fusechat_merge.inputs.update import Update

MAX_HEADER = 100_000_000
"""Longest safetensors header that the format's own reader takes, bytes; the same for an index."""

_FIRST_READ = 1 << 16


class CheckpointError(RequestError):
    """Everything that is wrong with a checkpoint."""


@dataclass(frozen=True)
class WeightsFile:
    """One safetensors file, as it was when its header was read.

    Attributes:
        size: bytes.
        modified: time of the last change, ns; None on the hub, where a commit names the content.
        header_sha256: digest of the header.
    """

    size: int
    modified: int | None
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors and the files that hold them.

    Attributes:
        name: the model, as the configuration names it.
        folder: where its files are; None where they are on the hub only.
        tensors: by name, in the order of the files and of the bytes in each.
        files: the safetensors files by name.
        unlisted: tensors in those files that the index doesn't place there, with the file.
        updates: what an adapter changes of which tensors.
        absent: names of the base's tensors that this model's class doesn't have.
        quantised: how its files hold the weights that are dequantised when read; or none.
    """

    name: str
    folder: Path | None
    tensors: dict[str, Stored]
    files: dict[str, WeightsFile]
    unlisted: dict[str, str]
    updates: Mapping[str, Update] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    quantised: str = ""


class Store(Protocol):
    """Where a checkpoint's files are: a folder or a repository on the hub."""

    folder: Path | None

    def names(self) -> set[str]: ...

    def stat(self, name: str) -> tuple[int, int | None]:
        """Size in bytes and time of the last change in ns."""

    def read(self, name: str, offset: int, length: int) -> bytes: ...


class Folder:
    """A local folder; a hub cache's snapshot is one too, its files symbolic links."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self._path = folder

    def names(self) -> set[str]:
        return {entry.name for entry in os.scandir(self._path) if entry.is_file()}

    def stat(self, name: str) -> tuple[int, int | None]:
        status = os.stat(self._path / name)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{name} is not a regular file")
        return status.st_size, status.st_mtime_ns

    def read(self, name: str, offset: int, length: int) -> bytes:
        with open(self._path / name, "rb") as file:
            return os.pread(file.fileno(), length, offset)


class HubRepository:
    """A model on the Hugging Face hub, read by byte ranges; files in the cache are read there.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: the hub cache; None for the user's own.

    Raises:
        CheckpointError: no such model, or no way to reach it.
    """

    def __init__(
        self, repository: str, revision: str | None = None, cache_dir: str | None = None
    ) -> None:
        import huggingface_hub

        self.folder: Path | None = None
        self._repository, self._cache_dir = repository, cache_dir
        try:
            info = huggingface_hub.HfApi().model_info(
                repository, revision=revision, files_metadata=True
            )
        except Exception as error:  # the client's errors have no common base
            at = f"{repository}@{revision}" if revision else repository
            why = f"no folder of this name, and not available from the hub ({one_line(error)})"
            raise CheckpointError([f"{at}: {why}"]) from error
        self.commit: str = info.sha or revision or "main"
        self._sizes = {s.rfilename: s.size for s in info.siblings or ()}

    def names(self) -> set[str]:
        return set(self._sizes)

    def stat(self, name: str) -> tuple[int, int | None]:
        size = self._sizes.get(name)
        if size is None:
            raise OSError(f"the hub gives no size for {name}")
        return size, None

    def read(self, name: str, offset: int, length: int) -> bytes:
        import huggingface_hub
        from huggingface_hub.utils import build_hf_headers, get_session

        cached = huggingface_hub.try_to_load_from_cache(
            self._repository, name, cache_dir=self._cache_dir, revision=self.commit
        )
        if isinstance(cached, str):
            with open(cached, "rb") as file:
                return os.pread(file.fileno(), length, offset)
        url = huggingface_hub.hf_hub_url(self._repository, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + length - 1}"}
        received = b""
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
                answer.raise_for_status()
                skip = 0 if answer.status_code == 206 else offset  # a server without ranges
                for chunk in answer.iter_bytes():
                    received += chunk
                    if len(received) >= skip + length:
                        break
        except Exception as error:  # the client's errors have no common base
            raise OSError(one_line(error)) from error
        return received[skip : skip + length]


def download_model(
    repository: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    cached_only: bool = False,
) -> Folder:
    """Fetch a model from the hub, or find it in the cache: weights, tokenizer, chat template.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: the hub cache; None for the user's own.
        cached_only: take what the cache holds, without asking the hub.

    Raises:
        CheckpointError: no such model, or no way to reach it.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=cached_only,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.py",
                            "*.tiktoken", "LICENSE*", "NOTICE*"],
            ignore_patterns=["*/*.safetensors"],
        )  # fmt: skip
    except Exception as error:  # the client's errors have no common base
        at = f"{repository}@{revision}" if revision else repository
        raise CheckpointError(
            [f"{at}: no folder of this name, and can't be fetched from the hub ({one_line(error)})"]
        ) from error
    return Folder(Path(folder))


def read_checkpoint(store: Store, name: str) -> Checkpoint:
    """Read a checkpoint's index and headers, and no weight.

    Args:
        store: where its files are.
        name: what messages call it.

    Raises:
        CheckpointError: everything that is wrong with its files.
    """
    present = store.names()
    problems: list[str] = []
    weight_map: dict[str, str] | None = None
    wanted = ["model.safetensors"]
    if "model.safetensors.index.json" in present:
        weight_map = _read_index(store, name)
        wanted = sorted(set(weight_map.values()))
    if "model.safetensors" in present and "model.safetensors" not in wanted:
        # The index is of another save; transformers takes the whole file too.
        weight_map, wanted = None, ["model.safetensors"]
    elif "model.safetensors.index.json" not in present and "model.safetensors" not in present:
        raise CheckpointError([_no_weights(name, present)])

    tensors: dict[str, Stored] = {}
    files: dict[str, WeightsFile] = {}
    unlisted: dict[str, str] = {}
    for file in wanted:
        if file not in present:
            problems.append(f"{name}: the index lists {file}, which is not there: fetch it again")
            continue
        try:
            locations, files[file] = read_weights_file(store, file, f"{name}: {file}")
        except CheckpointError as error:
            problems += error.problems
            continue
        for tensor, location in locations.items():
            if weight_map is None or weight_map.get(tensor) == file:
                tensors[tensor] = location
            else:
                unlisted[tensor] = file
    if weight_map is not None and not problems:
        problems += [
            f"{name}: the index places {tensor} in {weight_map[tensor]}, which doesn't hold it"
            for tensor in weight_map.keys() - tensors.keys()
        ]
    if problems:
        raise CheckpointError(problems)
    return Checkpoint(name, store.folder, tensors, files, unlisted)


def _json_header(
    read: Callable[[int, int], bytes], size: int, where: str
) -> tuple[dict[str, Any], bytes, int]:
    """A safetensors header as JSON, its bytes, and the length of the data that follow it."""

    def broken(problem: str) -> CheckpointError:
        return CheckpointError([f"{where}: {problem}"])

    start = read(0, min(size, _FIRST_READ))
    if len(start) < 8:
        raise broken(f"{size} bytes is too short for a safetensors file")
    if start.startswith(b"version https://git-lfs"):
        raise broken("is Git LFS's pointer to the file, not the file: git lfs pull fetches it")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise broken(f"a header of {length} bytes can't be: damaged, or no safetensors file")
    if 8 + length > size:
        raise broken(f"truncated, the header alone takes {8 + length} of its {size} bytes")
    raw = start[8 : 8 + length]
    if len(raw) < length:
        raw += read(8 + len(raw), length - len(raw))
    if len(raw) < length:
        raise broken(f"could only read {len(raw)} of {length} header bytes")
    return _json_object(raw, where), raw, size - 8 - length


def _locate(
    header: tuple[dict[str, Any], bytes, int], where: str, file: str
) -> dict[str, Location]:
    entries, raw, data_length = header
    problems: list[str] = []
    spans: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            if entry is not None and not (
                isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
            ):
                problems.append(f"{where}: __metadata__ may map strings to strings only")
            continue
        problem = _entry_problem(name, entry, data_length)
        if problem:
            problems.append(f"{where}: {problem}")
        else:
            begin, end = entry["data_offsets"]
            spans.append((begin, end, name, entry["dtype"], tuple(entry["shape"])))
    if not problems:
        # Together the tensors have to cover the data, without a gap or an overlap.
        spans.sort()
        position = 0
        for begin, end, name, _, _ in spans:
            if begin != position:
                what = "overlap the tensor before" if begin < position else "leave a hole before"
                problems.append(
                    f"{where}: the data of {name!r} {what} them:"
                    f" bytes {begin} to {end}, {position} was next"
                )
                break
            position = end
        else:
            if position != data_length:
                problems.append(
                    f"{where}: {data_length - position} bytes after the last tensor belong to none"
                )
    if problems:
        raise CheckpointError(first_of(problems))
    first = 8 + len(raw)
    return {
        name: Location(file, first + begin, end - begin, dtype, shape)
        for begin, end, name, dtype, shape in spans
    }


def _entry_problem(name: str, entry: Any, data_length: int) -> str | None:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return f"{name!r} needs dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        return f"{name!r} has the unknown dtype {dtype!r:.40}"
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return f"{name!r}: a shape is a list of sizes, not {shape!r:.80}"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        return f"{name!r}: data_offsets is a pair of byte offsets, not {offsets!r:.80}"
    begin, end = offsets
    if end > data_length:
        return f"{name!r} ends at byte {end} of {data_length}: truncated"
    bits = 0 if 0 in shape else ITEM_BITS[dtype]
    for size in shape if bits else ():  # stops early: a damaged shape may be very long
        bits *= size
        if bits > 8 * data_length:
            break
    if begin > end or bits != 8 * (end - begin):
        return (
            f"{name!r}: {dtype} of shape {shape!r:.80} doesn't take the {end - begin} bytes given"
        )
    return None


def read_weights_file(
    store: Store, file: str, where: str
) -> tuple[dict[str, Location], WeightsFile]:
    """The tensors of one safetensors file in the order of their bytes, and the file as it is.

    Raises:
        CheckpointError: it can't be read, its header has anything that the format forbids, or the
            header does not fit the file's size.
    """
    try:
        size, modified = store.stat(file)
        header = _json_header(partial(store.read, file), size, where)
    except OSError as error:
        raise CheckpointError([f"{where}: can't be read ({one_line(error)})"]) from error
    digest = hashlib.sha256(header[1]).hexdigest()
    return _locate(header, where, file), WeightsFile(size, modified, digest)


def read_settings(store: Store, file: str, name: str) -> Any:
    """A model's `config.json` or an adapter's, whose text any JSON parser may have written.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        size, _ = store.stat(file)
        if size > MAX_HEADER:
            raise ValueError(f"{size} bytes is too long")
        return json.loads(store.read(file, 0, size))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError([f"{name}: {file} can't be read ({one_line(error)})"]) from error


def _read_index(store: Store, name: str) -> dict[str, str]:
    """The index's weight_map; file names in it are judged as they stand, links not followed."""
    file = "model.safetensors.index.json"
    where = f"{name}: {file}"
    try:
        size, _ = store.stat(file)
        if size > MAX_HEADER:
            raise CheckpointError([f"{where}: {size} bytes is too long for an index"])
        index = _json_object(store.read(file, 0, size), where)
    except OSError as error:
        raise CheckpointError([f"{where}: can't be read ({one_line(error)})"]) from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(value, str) for value in weight_map.values()
    ):
        raise CheckpointError([f"{where}: weight_map must map tensor names to file names"])
    problems = []
    for listed in sorted(set(weight_map.values())):
        path = PurePosixPath(listed)
        if path.is_absolute() or len(path.parts) != 1 or ".." in path.parts or "\\" in listed:
            problems.append(f"{where}: lists {listed!r:.200}, not a plain name in the same folder")
        elif not listed.isprintable() or ":" in listed:
            problems.append(f"{where}: lists {listed!r:.200}, not a file name to be trusted")
        elif not listed.endswith(".safetensors"):
            problems.append(f"{where}: lists {listed!r:.200}, not a safetensors file; {CONVERT}")
    if problems:
        raise CheckpointError(first_of(problems))
    return weight_map


CONVERT = (
    'convert it once: python -c "import sys, transformers as t; m, o = sys.argv[1:]; '
    "t.AutoModelForCausalLM.from_pretrained(m, dtype='auto').save_pretrained(o); "
    't.AutoTokenizer.from_pretrained(m).save_pretrained(o)" MODEL NEW_FOLDER'
)
"""The command that turns a checkpoint of another format into safetensors."""


def _no_weights(name: str, present: set[str]) -> str:
    pickled = sorted(n for n in present if n.endswith((".bin", ".pt", ".pth", ".bin.index.json")))
    if any(n.startswith("pytorch_model") for n in pickled):
        return f"{name}: its weights are pickled ({pickled[0]}), which can run code; {CONVERT}"
    if "adapter_config.json" in present:
        return f"{name}: is an adapter; name it together with its model: MODEL+{name}"
    if any(n.endswith(".gguf") for n in present):
        return f"{name}: has GGUF weights only; merge the original safetensors checkpoint instead"
    return f"{name}: holds neither model.safetensors nor model.safetensors.index.json"


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if b"\\u" in raw:
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which Python's parser lets pass
        text = error.object[max(0, error.start - 40) : error.start + 40]
        raise CheckpointError([f"{where}: {text!r} is no valid text"]) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError([f"{where}: not to be read as JSON ({one_line(error)})"]) from error
    if not isinstance(parsed, dict):
        raise CheckpointError([f"{where}: a JSON object belongs here"])
    return parsed


def _whole(text: str) -> int | float:
    """As safetensors' parser: what doesn't fit 64 bits is no whole number, nor is -0."""
    if text.isdecimal() and len(text) < 20:
        return int(text)
    fits = text != "-0" and len(text) < 21 and -(1 << 63) <= int(text) < 1 << 64
    return int(text) if fits else _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text!r:.40} is out of range")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the name {key!r:.200} occurs twice")
    return unique


def first_of(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - 20
    return [*problems[:20], f"… and {more} more of this kind"] if more > 0 else problems

"""Carries a plan out in bounded memory: reads, computes and writes, and resumes after a crash.

Everything is written to a folder beside the output, which holds the journal too; the output folder
appears once it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from fusechat_common.errors import KEPT, FusechatError, RequestError
from fusechat_common.files import can_be_made, existing
from fusechat_merge import __version__
from fusechat_merge.engine.journal import Journal, changes
from fusechat_merge.engine.merger import Merger, Progress, make_tasks, read_bytes
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.engine.saving import Saver, ShardFiles, publish
from fusechat_merge.mergekit_bridge.loader import DTYPES
from fusechat_merge.planning.plan import Plan
from fusechat_merge.planning.planner import plan
from fusechat_merge.results.folder import write_side_files
from fusechat_merge.results.record import read_record

MEMORY = 256 << 20
"""Default bound of all buffers together, bytes."""
_START_UP = 510_000_000  # bytes that mergekit, torch and numba take once imported


def merge(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    device: str = "auto",
    resume: bool = True,
    overwrite: bool = False,
    report: bool = True,
    progress: Progress = lambda tensor, nbytes: None,
    started: Callable[[Plan, str], object] = lambda planned, device: None,
    **options: Any,
) -> Path:
    """Merge checkpoints as a mergekit configuration says.

    Args:
        config: path of a mergekit YAML, or the configuration itself.
        out: the folder that will hold the merged model.
        memory: bytes of all buffers together, for `varm` and `fusechat_sce`.
        threads: worker threads; as many as processors by default.
        device: where to compute: `cpu`, `cuda`, or `auto`: cuda if there is one.
        resume: continue an interrupted merge of the same configuration.
        overwrite: replace what is in `out`, once the new model is complete.
        report: write `README.md` and `mergekit_config.yml` too.
        progress: called with each tensor and its bytes that are done.
        started: called with the plan and the device after all checks, before any tensor is read;
            not called where `out` is complete already.
        options: fields of `planning.Options`.

    Returns:
        `out`, absolute.

    Raises:
        RequestError: the request can't be carried out; names every problem, nothing was written.
        FusechatError: it failed while running; the same call resumes.
    """
    planned = local_plan(config, **options)
    out = Path(os.path.abspath(out))
    work = out.parent / f".{out.name}.partial"
    if not planned.problems and resume and is_finished(planned, out):
        _tidy(work)
        return out
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    native = [output for output in planned.outputs if output.how != "task"]
    tasks = [output for output in planned.outputs if output.how == "task"]
    problems = planned.problems + _out_problems(planned, out, work, overwrite)
    try:
        ring = divide(native, memory, threads, device)
    except RequestError as error:
        problems += error.problems
    if device == "cuda" and not torch.cuda.is_available():
        problems.append(
            f"--device cuda: PyTorch {torch.__version__} sees no CUDA device; use --device cpu"
        )
    if problems:
        raise RequestError(problems)

    with ExitStack() as stack, _explained(out):
        journal = stack.enter_context(closing(Journal(work / "journal")))
        if resume and is_finished(planned, out):  # by another run, in the meantime
            shutil.rmtree(work, ignore_errors=True)
            return out
        problems = _out_problems(planned, out, work, overwrite)
        if problems:
            if not journal.done.identity:
                shutil.rmtree(work, ignore_errors=True)
            raise RequestError(problems)
        _begin(journal, _identity(planned) | {"device": device}, work, resume)
        started(planned, device)
        files = stack.enter_context(closing(ShardFiles(planned, work / "model", journal)))
        sources = stack.enter_context(closing(SourceFiles(planned)))
        with _unchanged(planned, journal):
            with Saver(files, journal) as saver:
                merger = Merger(planned, sources, saver, ring, progress)
                merger.run(native)
                make_tasks(planned, tasks, saver, progress, ring.device)
                saver.save()
            units = merger.units()
            write_side_files(planned, units, _digest(planned), device, work / "model", report)
        publish(work, out, overwrite)
        shutil.rmtree(work, ignore_errors=True)
    return out


def local_plan(config: str | Path | Mapping[str, Any], **options: Any) -> Plan:
    """A merge's plan; where it has no problems, models of the hub are downloaded."""
    planned = plan(config, **options)
    if not planned.problems and any(model.folder is None for model in planned.models.values()):
        planned = plan(config, download=True, **options)
    return planned


def _tidy(work: Path) -> None:
    """Remove the work folder of a finished merge that was killed just then, unless it is locked."""
    if work.exists() and not _planted(work):
        with suppress(RequestError), closing(Journal(work / "journal")):
            shutil.rmtree(work, ignore_errors=True)


def peak_memory(planned: Plan, memory: int = MEMORY, threads: int | None = None) -> int:
    """Expected peak memory of `merge`, start-up included, bytes.

    Exact buffers for what is computed block by block; for mergekit's tasks the largest tensor's
    inputs, those read ahead and float32 working copies, which is an estimate.

    Raises:
        RequestError: `memory` is too little.
    """
    native = [output for output in planned.outputs if output.how != "task"]
    ring = divide(native, memory, threads).total
    tasks = 0
    for output in planned.outputs:
        if output.how == "task":
            converted = sum(
                source.location.numel * source.dtype.itemsize
                for source in output.sources
                if source.dtype != DTYPES[source.location.dtype]
            )
            working = 4 * output.numel * (len(output.sources) + 2)
            tasks = max(tasks, 2 * read_bytes(output) + converted + output.nbytes + working)
    return _START_UP + max(ring if native else 0, tasks)


def _identity(planned: Plan) -> dict[str, Any]:
    """What decides a merge's bytes: configuration, options, sources, software versions."""
    return {
        # As written: mergekit can't write out a model whose path has a space in it.
        "configuration": json.loads(json.dumps(yaml.safe_load(planned.source), default=str)),
        "options": asdict(planned.options),
        "sources": {
            f"{name}/{file}": [at.size, at.modified, at.header_sha256]
            for name, checkpoint in planned.models.items()
            for file, at in checkpoint.files.items()
        },
        "adapters": {
            name: hashlib.sha256(repr(sorted(checkpoint.updates.items())).encode()).hexdigest()
            for name, checkpoint in planned.models.items()
        },
        "quantised": {name: model.quantised for name, model in planned.models.items()},
        "software": {
            "fusechat": __version__,
            "mergekit": version("mergekit"),
            "torch": torch.__version__,
            "numba": _version("numba"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(planned: Plan) -> str:
    """Hash of the identity without the software, by which a finished merge is recognised."""
    parts = {key: value for key, value in _identity(planned).items() if key != "software"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_finished(planned: Plan, out: Path) -> bool:
    """Whether `out` is what this plan makes, judged by its record and its files' sizes."""
    record = read_record(out)
    if record is None or record.identity != _digest(planned):
        return False
    files = [(out / shard.name, shard.size) for shard in planned.shards]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _out_problems(planned: Plan, out: Path, work: Path, overwrite: bool) -> list[str]:
    problems = []
    models = [model.folder.resolve() for model in planned.models.values() if model.folder]
    if any(folder == out.resolve() or out.resolve() in folder.parents for folder in models):
        problems.append(f"{out}: holds one of the models; name another folder")
    elif out.exists() and not out.is_dir():
        problems.append(f"{out}: is a file; name another folder")
    elif out.is_dir() and any(out.iterdir()) and not overwrite:
        problems.append(
            f"{out}: is in use by something other than this merge; name another folder, or"
            " --overwrite replaces it once the new model is complete"
        )
    place = existing(out.parent)
    if not place.is_dir():
        return [*problems, f"{out}: {place} is not a folder but a file; name another folder"]
    if not can_be_made(place):
        return [*problems, f"{place}: can't be written to"]
    if _planted(work):
        return [*problems, f"{work}: is a link or belongs to another user; remove it"]
    room = os.statvfs(place)
    available = room.f_bavail * room.f_frsize
    # The files of an interrupted merge are written again in their place.
    available += sum(f.stat().st_blocks * 512 for f in work.glob("model/*") if f.is_file())
    needed = planned.output_bytes + (16 << 20)
    if available < needed:
        problems.append(
            f"{place}: has room for {available / 1e9:.2f} GB,"
            f" the merged model takes {needed / 1e9:.2f} GB"
        )
    return problems


def _planted(work: Path) -> bool:
    """Whether someone else may have put the work folder there, to redirect what is written."""
    try:
        status = work.lstat()
    except FileNotFoundError:
        return False
    shared = work.parent.stat().st_mode & stat.S_IWOTH
    return not stat.S_ISDIR(status.st_mode) or bool(shared and status.st_uid != os.geteuid())


def _begin(journal: Journal, now: dict[str, Any], work: Path, resume: bool) -> None:
    """Accept what is in the journal if it is of this merge, or start over."""
    before = journal.done.identity
    if before and resume and before != now:
        problem = f"{work} holds an unfinished merge of something else; --no-resume starts over"
        raise RequestError([problem, *changes(before, now)])
    if not before or not resume:
        shutil.rmtree(work / "model", ignore_errors=True)
        journal.begin(now)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Say of a failed system call what it means for the merge, and what to do."""
    try:
        yield
    except FusechatError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"{out}: no room left ({error.strerror}); make room"
            raise FusechatError(f"{message}: {KEPT}") from error
        raise FusechatError(f"{error}; {KEPT}") from error


@contextmanager
def _unchanged(planned: Plan, journal: Journal) -> Iterator[None]:
    """Forget what was computed from sources that have changed, whether the merge failed or not.

    If it were kept and the source restored, the journal would match although other bytes were read.
    """
    try:
        yield
    finally:
        for name, model in planned.models.items():
            for file, at in model.files.items():
                path = model.folder and model.folder / file
                if not path or not path.exists():
                    continue
                status = path.stat()
                if (status.st_size, status.st_mtime_ns) != (at.size, at.modified):
                    journal.begin({})
                    raise FusechatError(
                        f"{name}/{file} was changed while it was being merged; the same command"
                        " starts over"
                    )

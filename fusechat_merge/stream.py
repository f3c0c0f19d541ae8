"""Carries a plan out: read, compute, write, in bounded memory and so that nothing done is lost.

Two lanes take one output after the other; their segments are read, computed and written to their
final places by a pool of worker threads. A saver forces the written bytes to the disk now and then
and notes in the journal what is safe. The output folder appears when everything is in it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import click
import torch

from fusechat_merge import __version__
from fusechat_merge.errors import ConfigError, TensorError
from fusechat_merge.journal import Done, Journal, changes, sync_folder
from fusechat_merge.mergekit_plugin import non_finite
from fusechat_merge.methods import sce, varm
from fusechat_merge.methods.blocks import NonFiniteError
from fusechat_merge.passes import LANES, Buffers, FilePasses, Ring, SourceFiles, divide
from fusechat_merge.planning import Output, Plan, plan
from fusechat_merge.side_files import write_side_files
from fusechat_merge.tasks import run_tasks
from fusechat_merge.units import Unit

MEMORY = 256 << 20
"""Default bound of all buffers together, bytes."""
_START_UP = 430_000_000  # what mergekit and torch take once imported
_SAVE_EVERY = 64 << 20
_AHEAD = 128 << 20

Progress = Callable[[str, int], None]
"""(tensor, bytes of it just done) -> None; called from several threads."""


class Broken(click.ClickException, OSError):
    """A merge that broke on the way; what was done is kept."""

    exit_code = 1


def merge(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    report: bool = True,
    progress: Progress = lambda tensor, nbytes: None,
    **options: Any,
) -> Path:
    """Merge checkpoints as a mergekit configuration says.

    Args:
        config: path of a mergekit YAML, or the configuration itself.
        out: the folder to be made.
        memory: bytes of all buffers together, for ``varm`` and ``fusechat_sce``.
        threads: worker threads; as many as processors by default.
        resume: go on where an interrupted merge of the same configuration was.
        overwrite: replace what is in ``out``, once the new model is complete.
        report: write ``README.md`` and ``mergekit_config.yml`` too.
        progress: told what has been done.
        options: fields of ``planning.Options``.

    Returns:
        ``out``.

    Raises:
        ConfigError: the request can't be carried out; everything that is wrong, nothing written.
        TensorError, Broken: it broke on the way; the same call goes on from there.
    """
    planned = plan(config, **options)
    if not planned.problems and any(c.folder is None for c in planned.models.values()):
        planned = plan(config, download=True, **options)
    return carry_out(
        planned,
        Path(out),
        memory=memory,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        report=report,
        progress=progress,
    )


def carry_out(
    planned: Plan,
    out: Path,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    report: bool = True,
    progress: Progress = lambda tensor, nbytes: None,
) -> Path:
    """Carry a plan out; see ``merge``."""
    out = Path(os.path.abspath(out))
    work = out.parent / f".{out.name}.partial"
    if not planned.problems and resume and is_finished(planned, out):
        shutil.rmtree(work, ignore_errors=True)
        return out
    native = [output for output in planned.outputs if output.how != "task"]
    tasks = [output for output in planned.outputs if output.how == "task"]
    problems = planned.problems + _out_problems(planned, out, work, overwrite)
    try:
        ring = divide(native, memory, threads or len(os.sched_getaffinity(0)))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)

    with ExitStack() as stack, _explained(out):
        journal = stack.enter_context(closing(Journal(work / "journal")))
        _begin(journal, identity(planned), work, resume)
        files = stack.enter_context(closing(ShardFiles(planned, work / "model", journal)))
        folders = {name: m.folder for name, m in planned.models.items() if m.folder}
        sources = stack.enter_context(closing(SourceFiles(folders)))
        with _Saver(files, journal) as saver:
            merger = Merger(planned, sources, saver, ring, progress)
            merger.run(native)
            make_tasks(planned, tasks, saver, progress)
            saver.save()
        write_side_files(planned, merger.units(), digest(planned), work / "model", report)
        _raise_if_changed(planned)
        _publish(work, out)
        shutil.rmtree(work, ignore_errors=True)
    return out


def peak_memory(planned: Plan, memory: int = MEMORY, threads: int | None = None) -> int:
    """Expected peak memory of ``carry_out``, start-up included, bytes.

    Exact buffers for what is computed block by block; for mergekit's tasks the largest tensor's
    inputs, those read ahead and float32 working copies, which is an estimate.
    """
    native = [output for output in planned.outputs if output.how != "task"]
    try:
        ring = divide(native, memory, threads or len(os.sched_getaffinity(0))).total
    except ValueError:
        ring = memory
    tasks = 0
    for output in planned.outputs:
        if output.how == "task":
            working = 4 * output.numel * (len(output.sources) + 2)
            tasks = max(tasks, 3 * _read_bytes(output) + output.nbytes + working)
    return _START_UP + max(ring if native else 0, tasks)


def identity(planned: Plan) -> dict[str, Any]:
    """What decides a merge's bytes: configuration, options, sources, software versions."""
    return {
        "configuration": planned.config.model_dump(mode="json", exclude_defaults=True),
        "options": asdict(planned.options),
        "sources": {
            f"{name}/{file}": [at.size, at.modified, at.header_sha256]
            for name, checkpoint in planned.models.items()
            for file, at in checkpoint.files.items()
        },
        "software": {
            "fusechat": __version__,
            "mergekit": version("mergekit"),
            "torch": torch.__version__,
        },
    }


def digest(planned: Plan) -> str:
    """One line for ``identity``, the software aside: a finished merge is known by it."""
    what = {key: value for key, value in identity(planned).items() if key != "software"}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def is_finished(planned: Plan, out: Path) -> bool:
    """Whether ``out`` is what this plan makes, going by its report and its files' sizes."""
    try:
        made = json.loads((out / "fusechat_merge.json").read_text(encoding="utf-8"))
        return made["identity"] == digest(planned) and all(
            (out / shard.name).stat().st_size == shard.size for shard in planned.shards
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    place = out.parent
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        problems.append(f"{place}: can't be written to")
        return problems
    stat = os.statvfs(place)
    have = stat.f_bavail * stat.f_frsize
    have += sum(f.stat().st_blocks * 512 for f in work.glob("model/*") if f.is_file())
    need = planned.output_bytes + (16 << 20)
    if have < need:
        problems.append(
            f"{place}: has room for {have / 1e9:.2f} GB, the merged model takes {need / 1e9:.2f} GB"
        )
    return problems


def _begin(journal: Journal, now: dict[str, Any], work: Path, resume: bool) -> None:
    before = journal.done.identity
    if before and resume and before != now:
        raise ConfigError(
            [
                f"{work} holds an unfinished merge of something else; --no-resume starts over",
                *changes(before, now),
            ]
        )
    if not before or not resume:
        shutil.rmtree(work / "model", ignore_errors=True)
        journal.begin(now)


class ShardFiles:
    """The output files, whole from the start, filled at offsets from any thread.

    Whatever the journal says of a file that isn't there any more is forgotten.
    """

    def __init__(self, planned: Plan, folder: Path, journal: Journal) -> None:
        folder.mkdir(exist_ok=True)
        self._descriptors: dict[str, int] = {}
        lost = set()
        for shard in planned.shards:
            path = folder / shard.name
            if not path.exists() or path.stat().st_size != shard.size:
                lost.add(shard.name)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._descriptors[shard.name] = descriptor
            os.ftruncate(descriptor, shard.size)
            os.pwrite(descriptor, shard.header, 0)
        sync_folder(folder)
        done = {
            o.name: 0 for o in planned.outputs if o.file in lost and o.name in journal.done.elements
        }
        if done:
            journal.add(elements=done)
            journal.done.elements.update(done)

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """Write ``data`` from byte ``first`` of the output's tensor on."""
        descriptor, offset = self._descriptors[output.file], output.offset + first
        while data.nbytes:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class _Saver:
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

    def __enter__(self) -> _Saver:
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
            while self._noted - self._saved >= _SAVE_EVERY and not self._error:
                if not self._busy:
                    self._busy = True
                    threading.Thread(target=self._save_aside, name="save").start()
                if self._noted - self._saved < 2 * _SAVE_EVERY:
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


class Sink(Protocol):
    """Where a merge's bytes go, and what is known of it already."""

    done: Done

    def write(self, output: Output, first: int, data: memoryview) -> None:
        """``data`` belongs at byte ``first`` of the output's tensor; called from any thread."""

    def note(self, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        """Remember ``value`` as field ``kind`` of ``done``; ``nbytes`` were written for it."""


class Merger:
    """Makes the outputs that are not mergekit's own tasks."""

    def __init__(
        self,
        planned: Plan,
        sources: SourceFiles,
        sink: Sink,
        ring: Ring,
        progress: Progress,
    ) -> None:
        self._plan, self._sources, self._sink = planned, sources, sink
        self._ring, self._progress = ring, progress
        self._by_name = {output.name: output for output in planned.outputs}
        self._lock = threading.Lock()
        self._units: dict[str, threading.Lock] = {key: threading.Lock() for key in planned.units}
        self._error: BaseException | None = None

    def run(self, outputs: Sequence[Output]) -> None:
        """Make them, two at a time."""
        self._each(outputs, self._make)

    def measure(self, outputs: Sequence[Output]) -> None:
        """Find their statistics and weights only; nothing is written.

        An output of granularity element is measured as the matrix that it is.
        """
        self._each(outputs, self._measure)

    def _each(self, outputs: Sequence[Output], work: Callable[[Output, int], object]) -> None:
        self._buffers = Buffers(self._ring, self._sources)
        todo = []
        for output in outputs:
            done = self._sink.done.elements.get(output.name, 0)
            self._progress(output.name, min(done, output.numel) * output.dtype.itemsize)
            if done < max(output.numel, 1):
                todo.append(output)
        queue = iter(list(enumerate(todo)))
        reading = _ReadAhead(self._sources, todo)
        threads = [
            threading.Thread(target=self._lane, args=(lane, queue, reading, work))
            for lane in range(LANES)
        ]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # a segment is one thread's; many segments go on at once
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._buffers.stopped.set()
            for thread in threads:
                thread.join()
            self._buffers.close()
            del self._buffers
            reading.close()
            torch.set_num_threads(before)
        if self._error is not None:
            raise self._error

    def _lane(
        self,
        lane: int,
        queue: Iterator[tuple[int, Output]],
        reading: _ReadAhead,
        work: Callable[[Output, int], object],
    ) -> None:
        torch.set_num_threads(1)
        while self._error is None and not self._buffers.stopped.is_set():
            with self._lock:
                number, output = next(queue, (0, None))
            if output is None:
                return
            try:
                reading.reached(number)
                work(output, lane)
            except BaseException as error:
                with self._lock:
                    if self._error is None or isinstance(self._error, InterruptedError):
                        self._error = error
                self._buffers.stopped.set()

    def _make(self, output: Output, lane: int) -> None:
        how, parameters = output.how, output.parameters
        shares = None
        if how == "varm" and parameters["granularity"] != "element":
            shares = self._shares(output, lane)
        passes = self._passes(output, lane)
        with _naming(output):
            if how == "copy":
                passes.write(lambda block, out: out.copy_(block.base))
            elif how == "fusechat_sce":
                eta = sce.merge(passes, parameters["select_topk"], parameters["variant"])
                self._sink.note("weights", output.name, eta)
            elif shares is None:
                varm.write_elements(
                    passes, parameters["weight"], parameters["statistic"], parameters["lambda"]
                )
            else:
                varm.write(passes, shares, parameters["lambda"])
        if not output.numel:
            self._sink.note("elements", output.name, 1)

    def _measure(self, output: Output, lane: int) -> None:
        if output.how == "varm":
            self._shares(output, lane)
        elif output.how == "fusechat_sce":
            self._tensor_sums(output, "square", lane)
            parameters = output.parameters
            with _naming(output):
                passes = FilePasses(output, self._buffers, lane)
                eta, _ = sce.shares(passes, parameters["select_topk"], parameters["variant"])
            self._sink.note("weights", output.name, eta)
        self._progress(output.name, output.nbytes)

    def _shares(self, output: Output, lane: int) -> list[float]:
        """W_j of the output's unit."""
        shares = varm.weights(self._sums(output, lane), output.parameters["weight"])
        self._sink.note("weights", output.name, shares)
        return shares

    def _passes(self, output: Output, lane: int) -> FilePasses:
        itemsize = output.dtype.itemsize
        begin = self._sink.done.elements.get(output.name, 0)
        written = begin

        def write(first: int, data: memoryview) -> None:
            self._sink.write(output, first * itemsize, data)

        def finished(element: int) -> None:
            nonlocal written
            nbytes = (element - written) * itemsize
            written = element
            self._sink.note("elements", output.name, element, nbytes)
            self._progress(output.name, nbytes)

        return FilePasses(output, self._buffers, lane, write, begin, finished)

    def _sums(self, output: Output, lane: int) -> list[float]:
        """Σ over the output's unit of δ² (or |δ|), one a target."""
        statistic = output.parameters["statistic"]
        if output.unit is None:
            return self._tensor_sums(output, statistic, lane)
        found: dict[str, list[float]] = {}
        with self._units[output.unit]:
            for name in self._plan.units[output.unit].members:
                member = self._by_name[name]
                sums = self._tensor_sums(member, statistic, lane)
                for source, value in zip(member.sources[1:], sums, strict=True):
                    found.setdefault(source.model, []).append(value)
        return [math.fsum(found.get(source.model, ())) for source in output.sources[1:]]

    def _tensor_sums(self, output: Output, statistic: str, lane: int) -> list[float]:
        key = f"{statistic} {output.name}"
        known = self._sink.done.statistics.get(key)
        if known is None:
            with _naming(output):
                known = varm.statistics(FilePasses(output, self._buffers, lane), statistic)
            self._sink.note("statistics", key, known)
        return known

    def units(self) -> list[Unit]:
        """The units with their statistics and weights, in the order of the outputs."""
        done = self._sink.done
        units: dict[tuple[str, tuple[float, ...]], Unit] = {}
        for output in self._plan.outputs:
            weights = done.weights.get(output.name)
            if weights is None:
                continue
            key = (output.unit or f"tensor {output.name}", tuple(weights))
            if key in units:
                units[key] = replace(units[key], tensors=(*units[key].tensors, output.name))
                continue
            shared = self._plan.units.get(output.unit or "")
            members = [self._by_name[n] for n in shared.members] if shared else [output]
            numel = sum(member.numel for member in members)
            statistic = output.parameters.get("statistic", "square")
            sums = [
                found
                for member in members
                if (found := done.statistics.get(f"{statistic} {member.name}")) is not None
            ]
            units[key] = Unit(
                name=shared.name if shared else output.name,
                granularity=output.parameters.get("granularity", "matrix"),
                tensors=(output.name,),
                numel=numel,
                statistics=tuple(value / numel for value in varm.total(sums, len(weights)))
                if sums and numel
                else (),
                weights=tuple(weights),
            )
        return list(units.values())


def make_tasks(planned: Plan, outputs: Sequence[Output], sink: Sink, progress: Progress) -> None:
    """Make the outputs that are mergekit's own tasks."""
    todo = []
    for output in outputs:
        if output.name in sink.done.elements:
            progress(output.name, output.nbytes)
        else:
            todo.append(output)
    for output, tensor in run_tasks(planned, todo):
        sink.write(output, 0, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        sink.note("elements", output.name, max(output.numel, 1), output.nbytes)
        progress(output.name, output.nbytes)


class _ReadAhead:
    """Asks the system for the tensors that come next, so that the disk is never idle."""

    def __init__(self, files: SourceFiles, outputs: Sequence[Output]) -> None:
        self._files, self._outputs = files, outputs
        self._next, self._ahead = 0, 0
        self._thread = ThreadPoolExecutor(1, "read ahead")

    def reached(self, number: int) -> None:
        """The output of this number is begun."""
        self._thread.submit(self._announce, number)

    def _announce(self, number: int) -> None:
        self._next = max(self._next, number)
        ahead = sum(_read_bytes(o) for o in self._outputs[number + 1 : self._next])
        while self._next < len(self._outputs) and ahead < _AHEAD:
            output = self._outputs[self._next]
            for source in output.sources:
                with suppress(OSError):  # the read itself will say so
                    self._files.announce(source)
            ahead += _read_bytes(output)
            self._next += 1

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def _read_bytes(output: Output) -> int:
    return sum(source.location.nbytes for source in output.sources)


@contextmanager
def _naming(output: Output) -> Iterator[None]:
    """Say which model's tensor holds NaN or Inf."""
    try:
        yield
    except NonFiniteError as error:
        source = output.sources[0 if error.target is None else error.target + 1]
        raise TensorError(non_finite(source.model, source.tensor)) from None


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Tell what a failure means for the merge and what to do."""
    again = "what was done is kept: the same command goes on from there"
    try:
        yield
    except (ConfigError, TensorError):
        raise
    except KeyboardInterrupt:
        raise Broken(f"interrupted; {again}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Broken(f"{out}: no room left ({error.strerror}); make room, {again}") from error
        raise Broken(f"{error}; {again}") from error


def _raise_if_changed(planned: Plan) -> None:
    for name, model in planned.models.items():
        for file, at in model.files.items():
            if model.folder is None:
                continue
            now = (model.folder / file).stat()
            if (now.st_size, now.st_mtime_ns) != (at.size, at.modified):
                raise Broken(
                    f"{name}/{file} was changed while it was being merged; --no-resume starts over"
                )


def _publish(work: Path, out: Path) -> None:
    """Let the complete folder be ``out``, in one step."""
    made = work / "model"
    for path in [*made.rglob("*"), made]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if out.exists() and any(out.iterdir()):
        _exchange(made, out)
    else:
        os.rename(made, out)
    sync_folder(out.parent)
    sync_folder(work)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names in one step where the system can, else in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    if hasattr(libc, "renameat2") and not libc.renameat2(
        at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange
    ):
        return
    aside = one.with_name("replaced")
    os.rename(other, aside)
    os.rename(one, other)

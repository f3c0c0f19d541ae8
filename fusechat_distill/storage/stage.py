"""The stages of a run: each knows what it needs, what is done, and does only what is missing."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from pydantic import BaseModel, SerializeAsAny

from fusechat_common.errors import FusechatError
from fusechat_common.files import no_link
from fusechat_common.record import Record
from fusechat_distill.storage.shards import Manifest, SampleRange, Shards, stale

if TYPE_CHECKING:
    import pyarrow as pa

    from fusechat_distill.storage.processes import Processes

log = logging.getLogger(__name__)

RATES = "log.jsonl"
"""Beside a stage's shards: how long each took, which is no part of their content."""


class Details(Record):
    """What a stage reports beside how far it is; a field without a value is left out."""


class Summary(Details, ABC):
    """What is reported of one shard, in its footer, and of all shards together, which is their sum.

    A footer holds the fields that were given to the constructor and aren't None.
    """

    @property
    @abstractmethod
    def tokens_processed(self) -> int:
        """What the progress display and the rate count."""

    def __add__(self, other: Self) -> Self:
        """Numbers are added, lists joined, and dictionaries of counts added key by key."""
        names = type(self).model_fields
        return type(self)(
            **{name: added(getattr(self, name), getattr(other, name)) for name in names}
        )


def added(one: Any, other: Any) -> Any:
    """The sum of two fields of summaries, where either may be None."""
    if one is None or other is None:
        return other if one is None else one
    return dict(Counter(one) + Counter(other)) if isinstance(one, dict) else one + other


D = TypeVar("D", bound=Details)
S = TypeVar("S", bound=Summary)
C = TypeVar("C")


class StageStatus(BaseModel, Generic[D]):
    """How far a stage is."""

    stage: str
    name: str
    done: int
    total: int | None
    """None where it has not begun."""
    details: SerializeAsAny[D]
    bytes: int = 0
    tokens_per_second: float | None = None
    """Of one process."""
    unit: str = "samples"
    """What `done` and `total` count."""

    @property
    def complete(self) -> bool:
        return self.done == self.total


class Stage(Protocol):
    """One resumable step with a folder of its own."""

    stage: str
    name: str

    def problems(self) -> list[str]:
        """What an earlier run left that this one can't continue from."""
        ...

    def status(self) -> StageStatus[Any]: ...

    def run(self, processes: Processes, progress: Progress) -> StageStatus[Any]:
        """Do what is missing. Every process calls it, and returns when all are done."""
        ...


class Progress(Protocol):
    """Where a stage shows how far it is."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...


class ShardedStage(ABC, Generic[S, C]):
    """A stage that makes a folder of shards, each from its range of samples alone.

    `run` is the same for all of them: check what has to be there first, lock the folder, set torn
    shards aside, deal the missing ranges out to the processes, make each shard, add up. A stage
    says what differs: what its shards are determined by (`manifest`), what has to be there first
    (`require`, `prepare`), what it keeps open while it makes shards (`open`), and one shard
    (`make`).
    """

    stage: str
    summary: ClassVar[type[Any]]
    """The stage's `Summary`."""
    timed: ClassVar[bool] = False
    """Whether the time that each shard took is kept, for the rate in the status."""
    name: str
    folder: Path

    @abstractmethod
    def manifest(self) -> Manifest:
        """What determines the content of the folder."""

    @abstractmethod
    def open(self, processes: Processes) -> contextlib.AbstractContextManager[C]:
        """What shards are made with (a loaded model, opened stores), until the block ends."""

    @abstractmethod
    def make(self, context: C, samples: SampleRange) -> tuple[pa.Table, S]:
        """One shard's rows and summary.

        They depend on the manifest and the range alone: not on which shards were made before,
        where, or in which order.
        """

    def require(self) -> None:
        """Raise `FusechatError` where what the shards are made from is not complete.

        In the first process, before anything is written.
        """

    def prepare(self, missing: Sequence[SampleRange]) -> None:
        """Make what all processes need to make the missing shards.

        In the first process, which holds the folder's lock.
        """

    def read_ahead(self, context: C, ranges: Sequence[SampleRange]) -> None:
        """Begin to read what the next shards, in this order, are made from."""

    def hopeless(self, made: S) -> bool:
        """Whether more shards are no use, given the sum of those that this process made."""
        return False

    def finish(self, status: StageStatus[S]) -> StageStatus[S]:
        """In the first process, when no process has anything left to make."""
        return status

    def problems(self) -> list[str]:
        # The manifest hashes a local model's weights: only where there is one to compare with.
        if not self.folder.exists():
            return []
        manifest = self.manifest()
        problem = stale(self.folder, manifest)
        return [f"{manifest.kind} {self.name}: {self.folder} {problem}"] if problem else []

    def status(self) -> StageStatus[S]:
        return self.status_of(self.name, Shards(self.folder, self.manifest()))

    @classmethod
    def status_of(cls, name: str, shards: Shards) -> StageStatus[S]:
        """How far a folder of this stage is, from its shards' footers."""
        present = shards.present()
        details: S = cls.summary()
        for samples in present:
            details += cls.summary.model_validate(shards.summary(samples))
        return StageStatus(
            stage=cls.stage,
            name=name,
            done=sum(samples.size for samples in present),
            total=shards.manifest.samples,
            details=details,
            bytes=sum(shards.path(samples).stat().st_size for samples in present),
            tokens_per_second=_rate(shards.folder / RATES),
        )

    def run(self, processes: Processes, progress: Progress) -> StageStatus[S]:
        """Make the missing shards.

        Raises:
            FusechatError: what they are made from is not complete, or can't be used.
            RequestError: the folder has another manifest, or another run is writing to it.
        """
        with contextlib.ExitStack() as stack:

            def prepare() -> tuple[Shards, list[SampleRange]]:
                self.require()
                shards = Shards.create(self.folder, self.manifest())
                stack.enter_context(shards.exclusive())
                for line in shards.clean():
                    log.warning("%s", line)
                missing = shards.missing()
                self.prepare(missing)
                return shards, missing

            shards, missing = processes.first(prepare)
            self.make_shards(
                shards, missing[processes.index :: processes.count], processes, progress
            )
            processes.wait()
            return processes.first(lambda: self.finish(self.status_of(self.name, shards)))

    def make_shards(
        self,
        shards: Shards,
        ranges: Sequence[SampleRange],
        processes: Processes,
        progress: Progress,
    ) -> None:
        """Make and write the shards of these ranges, in this process."""
        if not ranges:
            return
        made: S = self.summary()
        with self.open(processes) as context:
            progress.start(f"{self.stage} {self.name}", sum(samples.size for samples in ranges))
            try:
                for i, samples in enumerate(ranges):
                    started = time.perf_counter()
                    self.read_ahead(context, ranges[i : i + 2])
                    table, summary = self.make(context, samples)
                    footer = summary.model_dump(exclude_unset=True, exclude_none=True)
                    shards.write(samples, table, footer)
                    tokens = summary.tokens_processed
                    if self.timed:
                        seconds = time.perf_counter() - started
                        _note(self.folder / RATES, samples, tokens, seconds, processes.index)
                    progress.advance(samples.size, tokens)
                    made += summary
                    if self.hopeless(made):
                        break
            finally:
                progress.stop()


def require_complete(shards: Shards, name: str, lacks: str, command: str) -> None:
    """Raise `FusechatError`, which names the command to run, where shards are missing."""
    if left := shards.missing():
        raise FusechatError(
            f"{name}: {sum(samples.size for samples in left)} of {shards.manifest.samples} samples "
            f"{lacks}; run `fusechat-distill {command}` first"
        )


def _note(path: Path, samples: SampleRange, tokens: int, seconds: float, process: int) -> None:
    entry = {
        "samples": list(samples),
        "input_tokens": tokens,
        "seconds": round(seconds, 3),
        "process": process,
    }
    with open(path, "a", encoding="utf-8", opener=no_link) as file:
        file.write(json.dumps(entry) + "\n")


def _rate(path: Path) -> float | None:
    """Tokens per second over all that was noted."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return None
    tokens = seconds = 0.0
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):  # a line that a stopped run tore
            entry = json.loads(line)
            tokens += entry["input_tokens"]
            seconds += entry["seconds"]
    return tokens / seconds if seconds else None

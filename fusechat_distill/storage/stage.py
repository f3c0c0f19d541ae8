"""The stages of a run: what they need, how far they are, and the shards they still have to make."""

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
"""A file beside a stage's shards with the time that each took."""


class Details(Record):
    """What a stage reports beside its progress; fields that are None are left out."""


class Summary(Details, ABC):
    """Facts about one shard, stored in its footer, or about several, as the sum of their summaries.

    A footer holds the fields that were passed to the constructor and aren't None.
    """

    @property
    @abstractmethod
    def tokens_processed(self) -> int:
        """The number of tokens in the progress display and in the rate."""

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
    """None if it has not begun."""
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
        """Reasons why this run can't continue from what an earlier one left."""
        ...

    def status(self) -> StageStatus[Any]: ...

    def run(self, processes: Processes, progress: Progress) -> StageStatus[Any]:
        """Do what is missing; every process calls it, and returns when all have finished."""
        ...


class Progress(Protocol):
    """A progress display."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...


class ShardedStage(ABC, Generic[S, C]):
    """A stage that makes a folder of shards, each from its range of samples alone.

    `run` is the same for all: check the inputs, lock the folder, move damaged shards away, divide
    the missing ranges between the processes, make each shard, add up the summaries. A stage
    defines the rest: what determines its shards (`manifest`), which inputs must be complete
    (`require`), what must be made first (`prepare`), what stays open while shards are made
    (`open`), and one shard (`make`).
    """

    stage: str
    summary: ClassVar[type[Any]]
    """The stage's `Summary`."""
    timed: ClassVar[bool] = False
    """Whether the time of each shard is recorded, for the rate in the status."""
    name: str
    folder: Path

    @abstractmethod
    def manifest(self) -> Manifest:
        """Everything that determines the content of the folder."""

    @abstractmethod
    def open(self, processes: Processes) -> contextlib.AbstractContextManager[C]:
        """The context in which shards are made: a loaded model, opened stores."""

    @abstractmethod
    def make(self, context: C, samples: SampleRange) -> tuple[pa.Table, S]:
        """One shard's rows and summary.

        They depend on the manifest and the range alone: not on which shards were made before, in
        which process or in which order.
        """

    def require(self) -> None:
        """Raise `FusechatError` if the inputs of the shards are not complete.

        Called in the first process, before anything is written.
        """

    def prepare(self, missing: Sequence[SampleRange]) -> None:
        """Make what all processes need to make the missing shards.

        Called in the first process, which has locked the folder.
        """

    def read_ahead(self, context: C, ranges: Sequence[SampleRange]) -> None:
        """Begin to read the inputs of the next shards, in this order."""

    def hopeless(self, made: S) -> bool:
        """Whether to stop early, from the sum of the shards that this process has made."""
        return False

    def finish(self, status: StageStatus[S]) -> StageStatus[S]:
        """Called in the first process when all processes have made their shards."""
        return status

    def problems(self) -> list[str]:
        # The manifest hashes a local model's weights, so it is made only if there is a folder.
        if not self.folder.exists():
            return []
        manifest = self.manifest()
        problem = stale(self.folder, manifest)
        return [f"{manifest.kind} {self.name}: {self.folder} {problem}"] if problem else []

    def status(self) -> StageStatus[S]:
        return self.status_of(self.name, Shards(self.folder, self.manifest()))

    @classmethod
    def status_of(cls, name: str, shards: Shards) -> StageStatus[S]:
        """The progress in a folder of this stage, from the footers of its shards."""
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
            FusechatError: the inputs are not complete, or can't be used.
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
            own = missing[processes.index :: processes.count]
            self.make_shards(shards, own, processes, progress)
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
                        _record_time(self.folder / RATES, samples, tokens, seconds, processes.index)
                    progress.advance(samples.size, tokens)
                    made += summary
                    if self.hopeless(made):
                        break
            finally:
                progress.stop()


def require_complete(shards: Shards, name: str, lacks: str, command: str) -> None:
    """Raise `FusechatError`, which names the command to run, if shards are missing."""
    if left := shards.missing():
        raise FusechatError(
            f"{name}: {sum(samples.size for samples in left)} of {shards.manifest.samples} samples "
            f"{lacks}; run `fusechat-distill {command}` first"
        )


def _record_time(
    path: Path, samples: SampleRange, tokens: int, seconds: float, process: int
) -> None:
    seconds = round(seconds, 3)
    entry = {"samples": samples, "input_tokens": tokens, "seconds": seconds, "process": process}
    with open(path, "a", encoding="utf-8", opener=no_link) as file:
        file.write(json.dumps(entry) + "\n")


def _rate(path: Path) -> float | None:
    """Tokens per second over all recorded shards."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return None
    tokens = seconds = 0.0
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):  # a line that a killed run left incomplete
            entry = json.loads(line)
            tokens += entry["input_tokens"]
            seconds += entry["seconds"]
    return tokens / seconds if seconds else None

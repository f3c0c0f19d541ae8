"""The stages of a run: each knows what it needs, what is done, and does only what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fusechat_distill.storage.processes import Processes


@dataclass
class StageStatus:
    """How far a stage is; `details` are counts that add up over shards."""

    stage: str
    name: str
    done: int
    total: int | None
    """None where it has not begun."""
    bytes: int = 0
    tokens_per_second: float | None = None
    """Of one process."""
    details: dict[str, Any] = field(default_factory=dict)
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
        """What an earlier run left that this one can't go on with."""
        ...

    def status(self) -> StageStatus: ...

    def run(self, processes: Processes, progress: Progress) -> StageStatus:
        """Do what is missing. Every process calls it, and returns when all are done."""
        ...


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...

"""What all stages of shards share: order of the steps, dealing out, sums, an early end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import Field

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.storage.shards import Manifest, SampleRange, Shards
from fusechat_distill.storage.stage import ShardedStage, StageStatus, Summary, require_complete


class Counted(Summary):
    samples: int = 0
    rows: list[int] = Field(default_factory=list)
    reasons: dict[str, int] = Field(default_factory=dict)
    weight: float | None = None

    @property
    def tokens_processed(self) -> int:
        return 10 * self.samples


class Squares(ShardedStage[Counted, list[str]]):
    """Row i holds i squared; what happens is written down."""

    stage = "square"
    summary = Counted

    def __init__(self, folder: Path, samples: int = 10, limit: int = 1000):
        self.name = "squares"
        self.folder = folder
        self.samples = samples
        self.limit = limit
        self.events: list[str] = []

    def manifest(self) -> Manifest:
        return Manifest("squares", self.samples, {"power": 2}, 4)

    def require(self) -> None:
        written = (self.folder / "manifest.json").exists()
        self.events.append("require" if written else "require, before anything is written")

    def prepare(self, missing: Sequence[SampleRange]) -> None:
        self.events.append(f"prepare {len(missing)}")
        with pytest.raises(RequestError, match="another run"), Shards.open(self.folder).exclusive():
            pass

    @contextlib.contextmanager
    def open(self, processes) -> Iterator[list[str]]:
        self.events.append("open")
        yield self.events
        self.events.append("close")

    def read_ahead(self, context: list[str], ranges: Sequence[SampleRange]) -> None:
        context.append(f"ahead {[samples.start for samples in ranges]}")

    def make(self, context: list[str], samples: SampleRange) -> tuple[pa.Table, Counted]:
        context.append(f"make {samples.start}")
        rows = list(range(*samples))
        table = pa.table({"square": [row * row for row in rows]})
        return table, Counted(samples=len(rows), rows=rows, reasons={"odd": 2, "none": 0})

    def hopeless(self, made: Counted) -> bool:
        return made.samples > self.limit

    def finish(self, status: StageStatus[Counted]) -> StageStatus[Counted]:
        self.events.append("finish")
        return super().finish(status)


class Process:
    """One of several, which run one after the other here."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    def first(self, work):
        return work()

    def wait(self):
        pass


class Bar(list):
    def start(self, title, total):
        self.append((title, total))

    def advance(self, samples, tokens):
        self.append((samples, tokens))

    def stop(self):
        self.append("stop")


def test_each_missing_shard_is_made_once_in_order(tmp_path):
    stage, bar = Squares(tmp_path), Bar()
    status = stage.run(Process(), bar)
    assert stage.events == [
        *("require, before anything is written", "prepare 3", "open"),
        *("ahead [0, 4]", "make 0", "ahead [4, 8]", "make 4"),
        *("ahead [8]", "make 8", "close", "finish"),
    ]
    assert bar == [("square squares", 10), (4, 40), (4, 40), (2, 20), "stop"]
    assert (status.done, status.total, status.complete) == (10, 10, True)
    assert status.details == Counted(samples=10, rows=list(range(10)), reasons={"odd": 6})
    assert status.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    # A footer holds what was given, and nothing else.
    last = SampleRange(8, 10)
    shards = Shards.open(tmp_path)
    assert shards.summary(last) == {"samples": 2, "rows": [8, 9], "reasons": {"odd": 2, "none": 0}}
    # Of what is there nothing is made again, and nothing is opened for it.
    shards.path(last).unlink()
    again = Squares(tmp_path)
    assert again.status().done == 8
    assert again.run(Process(), Bar()) == status
    assert again.events[2:] == ["open", "ahead [8]", "make 8", "close", "finish"]
    done, bar = Squares(tmp_path), Bar()
    assert done.run(Process(), bar) == status
    assert (done.events, bar) == (["require", "prepare 0", "finish"], [])
    assert not (tmp_path / "log.jsonl").exists()
    assert status.tokens_per_second is None


def test_ranges_are_dealt_out(tmp_path):
    made = []
    for index in (1, 0):
        stage = Squares(tmp_path / str(index))
        stage.run(Process(index, 2), Bar())
        made.append([event for event in stage.events if event.startswith("make")])
    assert made == [["make 4"], ["make 0", "make 8"]]


def test_a_stage_ends_early_where_more_is_no_use(tmp_path):
    stage, bar = Squares(tmp_path, limit=7), Bar()
    assert stage.run(Process(), bar).done == 8
    assert bar[-1] == "stop"


def test_times_are_kept_where_a_stage_wants_them(tmp_path):
    stage = Squares(tmp_path)
    stage.timed = True
    status = stage.run(Process(), Bar())
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["samples"], e["input_tokens"], e["process"]) for e in entries] == [
        *(([0, 4], 40, 0), ([4, 8], 40, 0), ([8, 10], 20, 0))
    ]
    (tmp_path / "log.jsonl").write_text('{"input_tokens": 30, "seconds": 2.0}\n{"torn\n')
    assert stage.status() == status.model_copy(update={"tokens_per_second": 15.0})


def test_what_an_earlier_run_left_is_compared(tmp_path):
    assert Squares(tmp_path / "new").problems() == []
    Squares(tmp_path).run(Process(), Bar())
    assert Squares(tmp_path).problems() == []
    (problem,) = Squares(tmp_path, samples=12).problems()
    assert problem.startswith(
        f"squares squares: {tmp_path} was made with other settings or inputs (samples was 10, is"
    )


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    shards = Shards(tmp_path, Squares(tmp_path).manifest())
    with pytest.raises(
        FusechatError, match="^a: 10 of 10 samples are not there; run `fusechat-distill b` first$"
    ):
        require_complete(shards, "a", "are not there", "b")
    Squares(tmp_path).run(Process(), Bar())
    require_complete(shards, "a", "are not there", "b")


def test_sums_take_fields_without_a_value_as_nothing():
    one, other = Counted(samples=1), Counted(samples=2, weight=0.5)
    assert (one + one).weight is None
    assert (one + other).weight == (other + one).weight == 0.5
    assert (other + other).weight == 1.0

"""The content of `report/report.json`."""

from __future__ import annotations

from typing import Any, Literal

from fusechat_common.record import Record


class ReportedPivot(Record):
    """The model into whose tokens all distributions are mapped."""

    model: str
    """Hub name or folder."""


class SampleCount(Record):
    """How many of a source's samples are aligned."""

    done: int
    """Samples that are aligned; all other numbers of the source are over these."""
    total: int
    """Samples of the dataset."""


class PositionShares(Record):
    """The pivot's scored positions. The shares add up to 1: a position is matched, or has one of
    the reasons below."""

    mode: Literal["bytes", "dtw"]
    """How positions are matched: `alignment.positions` of the recipe."""
    total: int
    """Number of positions."""
    matched: float | None
    """Share that has a partner among the source's positions."""
    no_sample: float | None
    """The source has no scores of the sample."""
    no_answer: float | None
    """The source left this answer out."""
    past_cut: float | None
    """After the position where the source's answer was cut."""
    edge: float | None
    """At an answer's edge that the source doesn't have (a token over it, text trimmed)."""
    inside_token: float | None
    """Inside a longer source token."""
    no_offset: float | None
    """At a token that ends at no known byte of the answer."""
    several: float | None
    """No single partner (dtw only)."""


REASONS = tuple(
    name for name in PositionShares.model_fields if name not in ("mode", "total", "matched")
)
"""Why a position of the pivot has no match."""


class EdgeShares(Record):
    """Shares of the answers that both models scored."""

    begins_matched: float | None
    """First positions that match."""
    ends_matched: float | None
    """Last positions that match."""
    pivot_run_over: float | None
    """Answers of which a token of the pivot runs over the end."""
    source_run_over: float | None
    """Answers of which a token of the source runs over the end."""


class MassShares(Record):
    """Of the probability mass that the source's top k hold at matched positions."""

    kept: float | None
    """Share that arrives."""
    exact: float | None
    """Share on tokens whose bytes are those of the pivot's token."""
    mapped: float | None
    """Share on tokens mapped to a pivot token with other bytes."""
    special: float | None
    """Share on special tokens mapped by their role."""
    dropped: float | None
    """Share on tokens that the vocabulary map leaves out."""


class GoldFirst(Record):
    """Share of matched positions where the most probable token is the answer's own token."""

    before: float | None
    """In the source's tokens."""
    after: float | None
    """Mapped to the pivot's tokens."""


class CrossEntropies(Record):
    """Nats per UTF-8 byte, the stop included, over the answers that both models scored."""

    pivot: float | None
    """Of the pivot."""
    source: float | None
    """Of the source."""


class SamplesWon(Record):
    """Which model MinCE takes whole samples from."""

    compared: int
    """Samples that both models scored."""
    per: Literal["byte", "token"]
    """What losses are divided by: `fusion.cross_entropy` of the recipe."""
    pivot_won: float | None
    """Share that goes to the pivot."""
    source_won: float | None
    """Share that goes to the source."""


class Segment(Record):
    """A stretch of text between two matches."""

    index: int
    """Among the sample's segments, from 0."""
    of: int
    """Number of the sample's segments."""
    pivot: list[str]
    """The pivot's tokens."""
    source: list[str]
    """The source's tokens."""
    pivot_logprob: float
    """Log-probability of the pivot's tokens, in nats."""
    source_logprob: float
    """Log-probability of the source's tokens, in nats."""
    arrived: list[tuple[str, float]]
    """The distribution that arrives at its start: tokens of the pivot and their probabilities."""


class WorstSample(Record):
    """A sample of which little arrives."""

    row: int
    """Of the dataset."""
    matched: float
    """Share of its positions."""
    kept: float
    """Share of the mass at these."""
    segments: list[Segment]
    """Its longest segments, in the order of the text."""


class UnalignedSource(Record):
    """A source of which nothing is aligned yet."""

    model: str
    """Hub name or folder."""
    aligned: SampleCount
    problem: str | None
    """What is missing and how to make it; null where nothing is."""


class AlignedSource(UnalignedSource):
    """A source of which at least one sample is aligned."""

    positions: PositionShares
    edges: EdgeShares
    mass: MassShares
    gold_first: GoldFirst
    cross_entropy: CrossEntropies
    samples: SamplesWon
    worst: list[WorstSample]
    """The samples of which least arrives, worst first."""


class Report(Record):
    """How well each source's distributions arrive at the pivot, and which model predicts better.
    Shares are of 1, and null where there is nothing to divide by."""

    format: Literal[1]
    """Version of these keys; another number, other keys."""
    pivot: ReportedPivot
    sources: dict[str, AlignedSource | UnalignedSource]
    """By name."""
    targets: dict[str, dict[str, Any] | None]
    """By name: the content of the fuse stage's `decisions.json`, null where the stage is not
    done."""

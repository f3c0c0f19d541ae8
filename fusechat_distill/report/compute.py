"""How well each source's distributions arrive at the pivot, and which model predicts better."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import RequestError
from fusechat_common.record import Record
from fusechat_distill.alignment.positions import Positions, Responses, match_positions
from fusechat_distill.alignment.stage import (
    AlignedSample,
    AlignStage,
    Joined,
    align_stages,
    aligned_samples,
    alignment_shares,
    join,
)
from fusechat_distill.fusion.decisions import Decisions
from fusechat_distill.fusion.fuse import CrossEntropy, model_weights
from fusechat_distill.fusion.stage import FuseStage, fuse_stages
from fusechat_distill.report.schema import (
    REASONS,
    AlignedSource,
    CrossEntropies,
    EdgeShares,
    GoldFirst,
    MassShares,
    PositionShares,
    Report,
    ReportedPivot,
    SampleCount,
    SamplesWon,
    Segment,
    UnalignedSource,
    WorstSample,
)
from fusechat_distill.storage.shards import Shards
from fusechat_distill.text.scored import ScoredSample
from fusechat_distill.text.tokens import Vocabulary

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs

R = TypeVar("R", bound=Record)

WORST = 3
"""Samples of a source that are shown side by side."""

SEGMENTS = 12
"""Segments of such a sample that are shown."""

ARRIVED = 3
"""Entries of a distribution that are shown."""


def report(inputs: Inputs) -> Report:
    """The content of `report.json`; reads the stores shard by shard.

    Raises:
        RequestError: no source has been aligned; with what is missing for each.
    """
    stages = [stage for stage in align_stages(inputs) if isinstance(stage, AlignStage)]
    if not stages:
        nothing = "sources: is empty, so there is nothing to report on; name at least one model"
        raise RequestError(nothing, "the recipe")
    missing = {stage.name: _missing(inputs, stage) for stage in stages}
    if not any(done for done, _ in missing.values()):
        problems = [problem for _, problem in missing.values() if problem]
        raise RequestError(problems, inputs.recipe.output_folder)
    sources = {}
    for stage in stages:
        done, problem = missing[stage.name]
        source = UnalignedSource(
            model=stage.source.spec.model,
            aligned=SampleCount(done=done, total=len(inputs.conversations)),
            problem=problem,
        )
        sources[stage.name] = _aligned_source(inputs, stage, source) if done else source
    return Report(
        format=1,
        pivot=ReportedPivot(model=inputs.pivot.spec.model),
        sources=sources,
        targets={stage.name: _decisions(stage) for stage in fuse_stages(inputs)},
    )


def _missing(inputs: Inputs, stage: AlignStage) -> tuple[int, str | None]:
    """How many samples of the source are aligned, and what is to be done about the rest."""
    if problems := stage.problems():
        return 0, problems[0]
    for model in (inputs.pivot, stage.source):
        if Shards(inputs.scores_folder(model), inputs.scores_manifest(model)).missing():
            return 0, (
                f"{stage.name}: the scores of {model.name} are not complete; run `fusechat-distill "
                f"score RECIPE --model {model.name}`, then `align`"
            )
    status = stage.status()
    if status.complete:
        return status.done, None
    total = len(inputs.conversations)
    return status.done, (
        f"{stage.name}: {total - status.done:,} of {total:,} samples are not aligned; run "
        f"`fusechat-distill align RECIPE --source {stage.name}`"
    )


def _decisions(stage: FuseStage) -> dict[str, Any] | None:
    """What the fuse stage decided for its target, if it is done with these inputs."""
    if not stage.models or stage.problems() or not stage.status().complete:
        return None
    try:
        return Decisions.read(stage.folder).model_dump(exclude_none=True)
    except FileNotFoundError:
        return None


def _aligned_source(inputs: Inputs, stage: AlignStage, source: UnalignedSource) -> AlignedSource:
    """What is known of the source, and what its shards say."""
    shares: dict[str, Any] = dict(alignment_shares(stage.status().details))
    sums = Sums(inputs.recipe.fusion.cross_entropy, stage.positions, stage.vocabularies())
    scores, source_scores = stage.stores()
    shards = Shards.open(stage.folder)
    for samples in shards.present():
        scored = scores.shard(samples)
        sums.add(scored, join(scored, source_scores), aligned_samples(shards.read(samples)))
    if not sums.positions["matched"]:
        shares = dict.fromkeys(shares)

    def section(record: type[R], prefix: str = "") -> R:
        return record(**{name: shares[prefix + name] for name in record.model_fields})

    total = sums.positions["total"]
    positions = {name: _share(sums.positions[name], total) for name in ("matched", *REASONS)}
    pivot_won, source_won = (_share(won, sums.compared) for won in sums.won)
    pivot_loss, source_loss = (_share(*pair) for pair in zip(sums.nll, sums.num_bytes, strict=True))
    return AlignedSource(
        **dict(source),
        positions=PositionShares(mode=stage.positions, total=total, **positions),
        edges=section(EdgeShares),
        mass=section(MassShares, "mass_"),
        gold_first=section(GoldFirst, "gold_first_"),
        cross_entropy=CrossEntropies(pivot=pivot_loss, source=source_loss),
        samples=SamplesWon(
            compared=sums.compared,
            per=sums.cross_entropy,
            pivot_won=pivot_won,
            source_won=source_won,
        ),
        worst=[sample for *_, sample in sorted(sums.worst, key=itemgetter(0, 1), reverse=True)],
    )


@dataclass
class Sums:
    """Sums over shards of what the align stage's own sums don't say."""

    cross_entropy: CrossEntropy
    mode: Positions
    vocabularies: tuple[Vocabulary, Vocabulary]
    """The pivot's and the source's."""
    positions: Counter[str] = field(default_factory=Counter)
    nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    num_bytes: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    won: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    compared: int = 0
    worst: list[tuple[float, int, WorstSample]] = field(default_factory=list)
    """A heap whose first entry is the least bad: (-share that arrives, -row, the sample)."""

    def add(
        self,
        scored: Sequence[ScoredSample],
        joined: Joined | None,
        aligned: Sequence[AlignedSample],
    ) -> None:
        """One shard: the pivot's samples, those the source scored too, and their alignment."""
        total = sum(len(r.tokens) for sample in scored for r in sample.responses)
        self.positions["total"] += total
        if joined is None:
            self.positions["no_sample"] += total
            return
        of_both = sum(len(r.tokens) for pivot, _ in joined.samples for r in pivot.responses)
        self.positions["no_sample"] += total - of_both
        self.positions["no_answer"] += of_both - len(joined.pivot.tokens)
        lengths = np.diff(joined.pivot.offsets).tolist()
        places = zip(joined.where, lengths, strict=True)
        parts = [aligned[i].matches[start : start + length] for (i, start, _), length in places]
        matches = np.concatenate(parts)
        self.positions["matched"] += int((matches >= 0).sum())
        if self.mode == "dtw":
            self.positions["several"] += int((matches < 0).sum())
        else:
            self.positions += unmatched(joined.pivot, joined.source, matches)
        self._add_losses(joined)
        for sample, (left, right) in zip(aligned, joined.samples, strict=True):
            self._add_worst(sample, left, right)

    def _add_losses(self, joined: Joined) -> None:
        _, sample = np.unique([i for i, _, _ in joined.where], return_inverse=True)
        # Sums over each sample's responses, [samples, models]: nats, tokens and bytes.
        sums = [
            [
                np.bincount(sample, of_response)
                for of_response in (
                    -np.add.reduceat(side.gold_logprobs.astype(np.float64), side.offsets[:-1]),
                    np.diff(side.offsets),
                    side.limits - side.begins,
                )
            ]
            for side in (joined.pivot, joined.source)
        ]
        nll, tokens, num_bytes = np.moveaxis(np.array(sums), 0, -1)
        sizes = num_bytes[:, :1] if self.cross_entropy == "byte" else tokens
        entropies = nll / np.maximum(sizes, 1)
        present = np.ones(entropies.shape, bool)
        self.won += model_weights(entropies, present, "min_ce").sum(axis=0)
        self.compared += len(nll)
        self.nll += nll.sum(axis=0)
        self.num_bytes += num_bytes.sum(axis=0)

    def _add_worst(self, aligned: AlignedSample, pivot: ScoredSample, source: ScoredSample) -> None:
        # Share of the pivot's positions that match, times the share of the mass that arrives there.
        rows = np.flatnonzero(aligned.matches >= 0)
        matched = len(rows) / max(1, len(aligned.matches))
        entries = source.column("logprobs")[aligned.matches[rows]]
        before = float(np.exp(entries, dtype=np.float64).sum())
        after = float(np.exp(aligned.logprobs, dtype=np.float64).sum())
        mass_kept = after / before if before else 0.0
        order = (-matched * mass_kept, -aligned.row)
        if len(self.worst) == WORST and order <= self.worst[0][:2]:
            return
        sample = WorstSample(
            row=aligned.row,
            matched=matched,
            kept=mass_kept,
            segments=longest_segments(pivot, source, aligned, self.vocabularies),
        )
        push = heapq.heappush if len(self.worst) < WORST else heapq.heapreplace
        push(self.worst, (*order, sample))


def unmatched(pivot: Responses, source: Responses, matches: NDArray[np.integer]) -> Counter[str]:
    """How many of the pivot's states have no match for which of `REASONS`.

    `matches` [T]: the source's state of each of the pivot's, -1 where there is none; response r of
    one is response r of the other.
    """
    rows = np.flatnonzero(matches < 0)
    response = pivot.response[rows]
    at = pivot.at[rows]

    # Offsets of different responses stay apart: those of a response are below 2^32.
    def keys(side: Responses, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(offsets >= 0, (side.response << 32) + offsets, -1)

    # Is the source anywhere at the same byte, at the edges of its response, or past its cut?
    wanted = keys(pivot, pivot.at)[rows]
    states = keys(source, source.at)
    same_byte = match_positions(wanted, states) >= 0
    last = np.full(len(source.begins), -1, dtype=np.int64)
    np.maximum.at(last, source.response, source.at)
    at_edge = pivot.is_begin[rows] | pivot.is_end[rows] | (at == pivot.limits[response])
    beyond = at > last[response]
    # Without a stop and not run over the end: there would have been more.
    cut = ~source.stopped & (source.ends[source.offsets[1:] - 1] >= 0)
    # The source token whose end is the first beyond the state; it holds the state where the end of
    # the token before it is known too.
    ends = keys(source, source.ends)
    known = np.flatnonzero(ends >= 0)
    following = np.searchsorted(ends[known], wanted, side="right")
    token = known[np.minimum(following, len(known) - 1)] if len(known) else np.zeros_like(rows)
    # The first reason that holds.
    conditions = {
        "no_offset": at < 0,
        "past_cut": beyond & cut[response] & ~pivot.is_end[rows],
        "edge": same_byte | at_edge | beyond | (at < source.begins[response]),
        "inside_token": source.is_begin[token] | (source.ends[token - 1] >= 0),
    }
    reasons = np.select(list(conditions.values()), list(conditions), "no_offset")
    return Counter(reasons.tolist())


def longest_segments(
    pivot: ScoredSample,
    source: ScoredSample,
    aligned: AlignedSample,
    vocabularies: tuple[Vocabulary, Vocabulary],
) -> list[Segment]:
    """A sample's longest segments in order; of equally long ones those in which least arrives."""
    rows = np.flatnonzero(aligned.matches >= 0)
    # Every match begins a segment, and so does the text where its first position has no match.
    unmatched_start = [] if len(rows) and rows[0] == 0 else [0]
    starts = [[*unmatched_start, *begins.tolist()] for begins in (rows, aligned.matches[rows])]
    # Per model: its tokens and their log-probabilities, cut at its starts.
    tokens, logprobs = (
        [
            np.split(sample.column(name), begins)[1:]
            for sample, begins in zip((pivot, source), starts, strict=True)
        ]
        for name in ("tokens", "gold_logprobs")
    )
    arrived: list[list[tuple[str, float]]] = [[] for _ in unmatched_start]
    for ids, entries in zip(aligned.ids[:, :ARRIVED], aligned.logprobs[:, :ARRIVED], strict=True):
        present = entries > -np.inf
        probabilities = np.exp(entries[present].astype(np.float64)).tolist()
        shown = _shown(ids[present], vocabularies[0])
        arrived.append(list(zip(shown, probabilities, strict=True)))
    segments = [
        Segment(
            index=i,
            of=len(arrived),
            pivot=_shown(tokens[0][i], vocabularies[0]),
            source=_shown(tokens[1][i], vocabularies[1]),
            pivot_logprob=float(logprobs[0][i].sum()),
            source_logprob=float(logprobs[1][i].sum()),
            arrived=distribution,
        )
        for i, distribution in enumerate(arrived)
    ]
    segments.sort(key=lambda s: (-len(s.pivot), sum(probability for _, probability in s.arrived)))
    return sorted(segments[:SEGMENTS], key=lambda segment: segment.index)


def _shown(tokens: NDArray[np.integer], table: Vocabulary) -> list[str]:
    return [
        table.tokens[i].decode(errors="backslashreplace") if table.text[i] else f"<special {i}>"
        for i in tokens.tolist()
    ]


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None

"""How well each source's distributions arrive at the pivot, and which model predicts better.

Keys of `report.json` (shares are of 1, None where there is nothing to divide by):

- `format`: 1; another number, other keys. `pivot`: its `model`, a hub name or folder.
- `sources`, by name:
  - `model`; `aligned`: `done` and `total` samples, all that follows is over those done;
    `problem`: what is missing and how to make it, None where nothing is. Where nothing is aligned,
    no further keys.
  - `positions`: `mode` (bytes or dtw), `total`: the pivot's scored positions; shares of these that
    add up to 1: `matched`, and why the others aren't (`REASONS`).
  - `edges`: shares of first (`begins_matched`) and last (`ends_matched`) positions of answers that
    match; answers of which a token runs over the end (`pivot_run_over`, `source_run_over`).
  - `mass`, of what the source's top k hold at matched positions: `kept`, the share that arrives;
    `exact`, `mapped`, `special` and `dropped`, how the vocabulary map takes them, weighted by use.
  - `gold_first`: share of matched positions where the most probable token is the gold one,
    `before` (source's tokens) and `after` mapping (pivot's tokens).
  - `cross_entropy`: nats per UTF-8 byte of `pivot` and `source`, the stop included, over the
    answers that both scored.
  - `samples`: `compared`; shares that MinCE gives to `pivot_won` and `source_won`, whole samples,
    their losses `per` byte or token as the recipe says.
  - `worst`: the samples of which least arrives, each with `row` (of the dataset), `matched` (share
    of positions) and `kept` (share of mass), and `segments`, the longest stretches of text between
    two matches: `index` among all `of`, tokens of `pivot` and `source`, log-probabilities
    `pivot_logprob` and `source_logprob`, and `arrived`, the distribution at its start as
    [pivot token, probability].
- `targets`, by name: the fuse stage's decisions where it is done: `decisions.json`, else None.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import RequestError
from fusechat_distill.alignment.positions import Responses, match_positions
from fusechat_distill.alignment.stage import (
    AlignedSample,
    AlignStage,
    Joined,
    align_stages,
    aligned_samples,
    alignment_shares,
    join,
    side_by_side,
)
from fusechat_distill.fusion.fuse import CrossEntropy, Scores, fuse
from fusechat_distill.fusion.stage import fuse_stages
from fusechat_distill.storage.shards import ScoredSample, ScoreStore, Shards
from fusechat_distill.text.tokens import Vocabulary, vocabulary

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs

FORMAT = 1

WORST = 3
"""Samples of a source that are shown side by side."""

SEGMENTS = 12
"""Segments of such a sample that are kept."""

REASONS = {
    "no_sample": "the source has no scores of the sample",
    "no_answer": "the source left this answer out",
    "past_cut": "past where the source's answer was cut",
    "edge": "an answer's edge that the source doesn't have (a token over it, text trimmed)",
    "inside_token": "inside a longer source token",
    "no_offset": "a token that ends at no known byte of the answer",
    "several": "no single partner (dtw)",
}
"""Why a position of the pivot has no match."""


def report(inputs: Inputs) -> dict[str, Any]:
    """The content of `report.json`; reads the stores shard by shard.

    Raises:
        RequestError: no source has been aligned; with what is missing for each.
    """
    stages = [stage for stage in align_stages(inputs) if isinstance(stage, AlignStage)]
    if not stages:
        nothing = "sources: is empty, so there is nothing to report on; name at least one model"
        raise RequestError([nothing], "the recipe")
    missing = {stage.name: _missing(inputs, stage) for stage in stages}
    if all(done == 0 for done, _ in missing.values()):
        raise RequestError(
            [line for _, line in missing.values() if line], inputs.recipe.output_folder
        )
    sources = {}
    for stage in stages:
        done, problem = missing[stage.name]
        sources[stage.name] = {
            "model": stage.source.spec.model,
            "aligned": {"done": done, "total": len(inputs.conversations)},
            "problem": problem,
            **(_source_report(inputs, stage) if done else {}),
        }
    return {
        "format": FORMAT,
        "pivot": {"model": inputs.pivot.spec.model},
        "sources": sources,
        "targets": {stage.name: _decisions(stage) for stage in fuse_stages(inputs)},
    }


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


def _decisions(stage: Any) -> dict[str, Any] | None:
    """What the fuse stage decided for its target, if it is done with these inputs."""
    if not stage.models or stage.problems() or not stage.status().complete:
        return None
    try:
        decided: dict[str, Any] = json.loads((stage.folder / "decisions.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    return decided


def _source_report(inputs: Inputs, stage: AlignStage) -> dict[str, Any]:
    shares: dict[str, Any] = dict(alignment_shares(stage.status().details))
    sums = Sums(inputs.recipe.fusion.cross_entropy, stage.positions)
    pivot, source = (ScoreStore(inputs.scores_folder(m)) for m in (inputs.pivot, stage.source))
    vocabularies = (
        vocabulary(inputs.pivot.renderer.tokenizer),
        vocabulary(stage.source.renderer.tokenizer),
    )
    shards = Shards.open(stage.folder)
    for samples in shards.present():
        scored = pivot.shard(samples)
        sums.add(scored, join(scored, source), aligned_samples(shards.read(samples)), vocabularies)
    if not sums.positions["matched"]:
        shares = dict.fromkeys(shares)
    return {
        "positions": sums.positions_report(),
        "edges": {
            name: shares[name]
            for name in ("begins_matched", "ends_matched", "pivot_run_over", "source_run_over")
        },
        "mass": {
            name: shares[f"mass_{name}"]
            for name in ("kept", "exact", "mapped", "special", "dropped")
        },
        "gold_first": {name: shares[f"gold_first_{name}"] for name in ("before", "after")},
        **sums.losses_report(),
        "worst": sums.worst_report(),
    }


@dataclass
class Sums:
    """Sums over shards of what the align stage's own sums don't say."""

    cross_entropy: CrossEntropy
    mode: str
    positions: Counter[str] = field(default_factory=Counter)
    nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    num_bytes: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    won: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    compared: int = 0
    worst: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """A heap whose first entry is the least bad: (-share that arrives, -row, what is said)."""

    def add(
        self,
        scored: Sequence[ScoredSample],
        joined: Joined | None,
        aligned: Sequence[AlignedSample],
        vocabularies: tuple[Vocabulary, Vocabulary],
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
        matches = np.concatenate(
            [
                aligned[i].matches[start : start + size]
                for (i, start, _), size in zip(
                    joined.where, np.diff(joined.pivot.offsets).tolist(), strict=True
                )
            ]
        )
        self.positions["matched"] += int((matches >= 0).sum())
        if self.mode == "dtw":
            self.positions["several"] += int((matches < 0).sum())
        else:
            self.positions += unmatched(joined.pivot, joined.source, matches)
        self._add_losses(joined)
        for sample, (left, right) in zip(aligned, joined.samples, strict=True):
            self._add_worst(sample, left, right, vocabularies)

    def _add_losses(self, joined: Joined) -> None:
        sample_of, sample = np.unique([i for i, _, _ in joined.where], return_inverse=True)
        count = len(sample_of)
        models = []
        sizes = []
        for side in (joined.pivot, joined.source):
            lost = -np.add.reduceat(side.gold_logprobs.astype(np.float64), side.offsets[:-1])
            nll = np.bincount(sample, lost, minlength=count)
            tokens = np.bincount(sample, np.diff(side.offsets), minlength=count).astype(np.int64)
            sizes.append(np.bincount(sample, side.limits - side.begins, minlength=count))
            # One position a sample: for whole samples only the losses are compared.
            models.append(
                Scores(
                    ids=np.zeros((count, 1), np.int64),
                    logprobs=np.full((count, 1), -np.inf),
                    matched=np.ones(count, bool),
                    nll=nll,
                    tokens=tokens,
                    present=np.ones(count, bool),
                )
            )
        fused = fuse(models, np.arange(count + 1), sizes[0], cross_entropy=self.cross_entropy)
        self.won += fused.weights.sum(axis=0, dtype=np.float64)
        self.compared += count
        self.nll += [model.nll.sum() for model in models]
        self.num_bytes += [size.sum() for size in sizes]

    def _add_worst(
        self,
        aligned: AlignedSample,
        pivot: ScoredSample,
        source: ScoredSample,
        vocabularies: tuple[Vocabulary, Vocabulary],
    ) -> None:
        rows = np.flatnonzero(aligned.matches >= 0)
        share = len(rows) / max(1, len(aligned.matches))
        entries = np.concatenate([r.logprobs for r in source.responses])[aligned.matches[rows]]
        before, after = (
            float(np.exp(found, dtype=np.float64).sum()) for found in (entries, aligned.logprobs)
        )
        kept = after / before if before else 0.0
        place = (-share * kept, -aligned.row)
        if len(self.worst) == WORST and place <= self.worst[0][:2]:
            return
        said = {
            "row": aligned.row,
            "matched": share,
            "kept": kept,
            "segments": _segments(pivot, source, aligned, vocabularies),
        }
        push = heapq.heappush if len(self.worst) < WORST else heapq.heapreplace
        push(self.worst, (*place, said))

    def positions_report(self) -> dict[str, Any]:
        total = self.positions["total"]
        shares = {name: _share(self.positions[name], total) for name in ("matched", *REASONS)}
        return {"mode": self.mode, "total": total, **shares}

    def losses_report(self) -> dict[str, Any]:
        pivot, source = (_share(*pair) for pair in zip(self.nll, self.num_bytes, strict=True))
        won = [_share(share, self.compared) for share in self.won]
        return {
            "cross_entropy": {"pivot": pivot, "source": source},
            "samples": {
                "compared": self.compared,
                "per": self.cross_entropy,
                "pivot_won": won[0],
                "source_won": won[1],
            },
        }

    def worst_report(self) -> list[dict[str, Any]]:
        return [said for *_, said in sorted(self.worst, key=lambda entry: entry[:2], reverse=True)]


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
    first = source.is_begin[token]
    holds = first | (source.ends[token - 1] >= 0)
    reason = np.select(
        [
            at < 0,
            beyond & cut[response] & ~pivot.is_end[rows],
            same_byte | at_edge | beyond | (at < source.begins[response]),
            holds,
        ],
        ["no_offset", "past_cut", "edge", "inside_token"],
        "no_offset",
    )
    names, counts = np.unique(reason, return_counts=True)
    return Counter(dict(zip(names.tolist(), counts.tolist(), strict=True)))


def _segments(
    pivot: ScoredSample,
    source: ScoredSample,
    aligned: AlignedSample,
    vocabularies: tuple[Vocabulary, Vocabulary],
) -> list[dict[str, Any]]:
    """The longest segments in order; of equally long ones those in which least arrives."""
    segments = side_by_side(pivot, source, aligned, vocabularies)

    def order(i: int) -> tuple[int, float, int]:
        arrived = sum(probability for _, probability in segments[i].arrived)
        return -len(segments[i].pivot), arrived, i

    shown = sorted(sorted(range(len(segments)), key=order)[:SEGMENTS])
    return [
        {
            "index": i,
            "of": len(segments),
            "pivot": list(segments[i].pivot),
            "source": list(segments[i].source),
            "pivot_logprob": segments[i].gold_logprob[0],
            "source_logprob": segments[i].gold_logprob[1],
            "arrived": [list(entry) for entry in segments[i].arrived],
        }
        for i in shown
    ]


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None

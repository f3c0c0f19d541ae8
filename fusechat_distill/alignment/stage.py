"""The align stage: a source's scores become distributions over the pivot's tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from fusechat_common.files import replacing
from fusechat_distill.alignment.positions import (
    Aligned,
    Positions,
    Responses,
    align,
    match_states,
    pair_counts,
)
from fusechat_distill.alignment.vocabularies import (
    DROPPED,
    EXACT,
    MAPPED,
    SPECIAL,
    PairCounts,
    VocabularyMap,
    match_roles,
)
from fusechat_distill.storage.shards import (
    Manifest,
    SampleRange,
    ScoreStore,
    Shards,
    number_lists,
    sample_table,
)
from fusechat_distill.storage.stage import ShardedStage, Stage, Summary, require_complete
from fusechat_distill.text.scored import ScoredResponse, ScoredSample
from fusechat_distill.text.tokens import Vocabulary, fingerprint, first_tokens, vocabulary

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs, OpenModel
    from fusechat_distill.storage.processes import Processes

log = logging.getLogger(__name__)

WORST = 3
"""Samples of each shard that its summary lists as the worst aligned."""

Worst = tuple[int, float, float]
"""A row, the share of its positions that match, the share of their mass that arrives."""


def worst_aligned(entries: Sequence[Worst], number: int) -> list[Worst]:
    """The samples of which the least arrives, that first."""
    return sorted(entries, key=lambda entry: (entry[1] * entry[2], entry[0]))[:number]


class AlignSummary(Summary):
    """Sums over the samples that both models scored; `alignment_shares` puts them in relation."""

    worst: list[Worst] = Field(default_factory=list)
    """The samples of which least arrives, first."""
    begins_matched: int = 0
    """Responses whose first state has a match."""
    ends: int = 0
    """Responses of the pivot's that end with a stop at their last byte."""
    ends_matched: int = 0
    gold_first_after: int = 0
    """Matched positions whose most probable token is the gold one, in the pivot's tokens."""
    gold_first_before: int = 0
    """The same in the source's tokens."""
    mass_after: float = 0.0
    """Probability of the entries at matched positions, in the pivot's tokens."""
    mass_before: float = 0.0
    """The same in the source's tokens: the sum of the four that follow."""
    mass_dropped: float = 0.0
    mass_exact: float = 0.0
    mass_mapped: float = 0.0
    mass_special: float = 0.0
    matched: int = 0
    """Positions of the pivot's that match one of the source's."""
    pivot_bytes: int = 0
    pivot_nll: float = 0.0
    """In nats, over the whole samples."""
    pivot_run_over: int = 0
    """Responses whose last token runs over their end."""
    pivot_tokens: int = 0
    positions: int = 0
    responses: int = 0
    samples: int = 0
    source_bytes: int = 0
    source_nll: float = 0.0
    source_run_over: int = 0
    source_tokens: int = 0
    source_won: int = 0
    """Samples of which the source needs fewer nats per byte."""

    @property
    def tokens_processed(self) -> int:
        return self.positions

    def __add__(self, other: Self) -> Self:
        sums = super().__add__(other)
        return sums.model_copy(update={"worst": worst_aligned(sums.worst, 10 * WORST)})


@dataclass(frozen=True, eq=False)
class AlignedSample(Aligned):
    """One conversation: T are the pivot's scored tokens of all its responses, in order, and
    `matches`, which is int32 in the store, are indices into the source's scored tokens."""

    key: str
    row: int


ALIGNED = pa.schema(
    [
        ("key", pa.binary(16)),
        ("row", pa.uint32()),
        ("matches", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.uint32())),
        ("logprobs", pa.list_(pa.float16())),
    ]
)
"""A row is a sample that both models scored; `ids` and `logprobs` k by k."""


def aligned_table(samples: Sequence[AlignedSample]) -> pa.Table:
    """The samples as rows of `ALIGNED`."""
    return sample_table(ALIGNED, samples, lambda sample: [sample])


def aligned_samples(table: pa.Table) -> list[AlignedSample]:
    """The rows of `table` (schema `ALIGNED`) as typed arrays, views of its memory."""
    samples = []
    for key, row, lists in zip(
        *(table[name].to_pylist() for name in ("key", "row")),
        number_lists(table, ("matches", "ids", "logprobs")),
        strict=True,
    ):
        matches = lists["matches"]
        k = max(1, len(lists["ids"]) // max(1, int((matches >= 0).sum())))
        ids, logprobs = (lists[name].reshape(-1, k) for name in ("ids", "logprobs"))
        samples.append(AlignedSample(matches, ids, logprobs, key.hex(), row))
    return samples


@dataclass(frozen=True, eq=False)
class Joined:
    """The responses that two models both scored, of some samples."""

    samples: list[tuple[ScoredSample, ScoredSample]]
    """(pivot's, source's)."""
    pivot: Responses
    source: Responses
    where: list[tuple[int, int, int]]
    """For each response: which sample, and where its tokens start among the sample's tokens, on
    the pivot's side and on the source's."""


def join(pivots: Sequence[ScoredSample], source: ScoreStore) -> Joined | None:
    """Samples by key and their responses by turn; None where there is no common response."""
    samples = [(sample, source[sample.key]) for sample in pivots if sample.key in source]
    where: list[tuple[int, int, int]] = []
    left: list[ScoredResponse] = []
    right: list[ScoredResponse] = []
    for i, (pivot, other) in enumerate(samples):
        turns = {response.turn: (start, response) for start, response in _starts(other)}
        for start, response in _starts(pivot):
            if response.turn in turns:
                other_start, other_response = turns[response.turn]
                where.append((i, start, other_start))
                left.append(response)
                right.append(other_response)
    return Joined(samples, Responses.of(left), Responses.of(right), where) if where else None


def _starts(sample: ScoredSample) -> Iterator[tuple[int, ScoredResponse]]:
    """The sample's responses, each with the index of its first token in the sample's tokens."""
    lengths = [len(response.tokens) for response in sample.responses]
    return zip(accumulate([0, *lengths]), sample.responses, strict=False)


def align_samples(
    joined: Joined, vocabulary: VocabularyMap, positions: Positions
) -> tuple[list[AlignedSample], AlignSummary]:
    """The source's distributions for every sample, and sums over them."""
    aligned = align(joined.pivot, joined.source, vocabulary, positions)
    matches = [np.full(len(pivot.turns), -1, dtype=np.int32) for pivot, _ in joined.samples]
    # From indices into the tokens of all joined responses to indices into the sample's own tokens.
    for r, (i, start, other_start) in enumerate(joined.where):
        own = aligned.matches[joined.pivot.offsets[r] : joined.pivot.offsets[r + 1]]
        shift = other_start - joined.source.offsets[r]
        matches[i][start : start + len(own)] = np.where(own >= 0, own + shift, -1)
    # Responses are in the samples' order, and so are the rows of the positions that match.
    rows = np.cumsum([0, *(int((m >= 0).sum()) for m in matches)])
    ids, logprobs = np.split(aligned.ids, rows[1:-1]), np.split(aligned.logprobs, rows[1:-1])
    samples = [
        AlignedSample(matches[i], ids[i], logprobs[i], pivot.key, pivot.row)
        for i, (pivot, _) in enumerate(joined.samples)
    ]
    return samples, _summary(joined, vocabulary, samples, aligned.matches >= 0)


def _summary(
    joined: Joined,
    vocabulary: VocabularyMap,
    samples: Sequence[AlignedSample],
    matched: NDArray[np.bool_],
) -> AlignSummary:
    """Sums over the samples; `matched` [T] says which states of the joined responses match."""
    pivot, source = joined.pivot, joined.source
    sums: dict[str, Any] = defaultdict(int)
    kinds = np.zeros(4)
    worst = []
    for aligned, (left, right) in zip(samples, joined.samples, strict=True):
        # The M positions that match: rows of the pivot's tokens, states of the source's.
        rows = np.flatnonzero(aligned.matches >= 0)
        states = aligned.matches[rows]
        gold = left.column("tokens")[rows]
        own_gold = right.column("tokens")[states]
        # Probabilities [M, k] of the source's entries, and of what they became.
        ids = right.column("ids")[states]
        before = np.exp(right.column("logprobs")[states], dtype=np.float64)
        after = np.exp(aligned.logprobs, dtype=np.float64)
        # The source's mass by how its tokens are mapped; padding ids are in no map.
        inside = ids < len(vocabulary.kinds)
        kind = np.where(inside, vocabulary.kinds[np.where(inside, ids, 0)], DROPPED)
        kinds += np.bincount(kind.ravel(), weights=before.ravel(), minlength=4)
        # Both models' losses and texts, over all of the sample's answers.
        losses, sizes = [], []
        for name, sample in (("pivot", left), ("source", right)):
            gold_logprobs = [r.gold_logprobs.sum(dtype=np.float64) for r in sample.responses]
            losses.append(-sum(map(float, gold_logprobs)))
            sizes.append(sum(r.end - r.begin for r in sample.responses))
            sums[f"{name}_nll"] += losses[-1]
            sums[f"{name}_bytes"] += sizes[-1]
            sums[f"{name}_tokens"] += sum(len(r.tokens) for r in sample.responses)
        sums["positions"] += len(aligned.matches)
        sums["matched"] += len(rows)
        sums["mass_before"] += float(before.sum())
        sums["mass_after"] += float(after.sum())
        if len(rows):
            # An unused entry has the id 0 and no probability.
            arrived = aligned.logprobs[:, 0] > -np.inf
            sums["gold_first_before"] += int((ids[:, 0] == own_gold).sum())
            sums["gold_first_after"] += int(((aligned.ids[:, 0] == gold) & arrived).sum())
        sums["samples"] += 1
        # Nats per byte compared without a division: a / b < c / d.
        won = losses[1] * max(sizes[0], 1) < losses[0] * max(sizes[1], 1)
        sums["source_won"] += int(won)
        share = len(rows) / max(1, len(aligned.matches))
        mass_kept = float(after.sum() / before.sum()) if len(rows) else 0.0
        worst.append((aligned.row, round(share, 4), round(mass_kept, 4)))
    # A response runs over its end where no token ends there and its last token ends nowhere known.
    for name, side in (("pivot", pivot), ("source", source)):
        at_end = side.ends == side.limits[side.response]
        reached = np.bincount(side.response, weights=at_end, minlength=len(side.begins))
        last = side.ends[side.offsets[1:] - 1]
        sums[f"{name}_run_over"] += int(((reached == 0) & (last < 0)).sum())
    return AlignSummary(
        **sums,
        responses=len(pivot.begins),
        begins_matched=int((matched & pivot.is_begin).sum()),
        ends=int(pivot.is_end.sum()),
        ends_matched=int((matched & pivot.is_end).sum()),
        mass_exact=float(kinds[EXACT]),
        mass_mapped=float(kinds[MAPPED]),
        mass_special=float(kinds[SPECIAL]),
        mass_dropped=float(kinds[DROPPED]),
        worst=worst_aligned(worst, WORST),
    )


class AlignContext(NamedTuple):
    """The stores and the map with which a source's shards are made."""

    pivot: ScoreStore
    source: ScoreStore
    vocabulary: VocabularyMap


class AlignStage(ShardedStage[AlignSummary, AlignContext]):
    """A source's distributions over the pivot's tokens, in `aligned/<source>/`."""

    stage = "align"
    summary = AlignSummary

    def __init__(self, inputs: Inputs, source: OpenModel):
        recipe = inputs.recipe
        self.inputs = inputs
        self.source = source
        self.name = source.name
        self.folder = recipe.aligned_folder / source.name
        self.positions: Positions = recipe.alignment.positions
        self.mode: str = getattr(source.spec, "vocabulary", None) or recipe.alignment.vocabulary

    def manifest(self) -> Manifest:
        """What determines the distributions: both models' scores, and how they are aligned."""
        pivot = self.inputs.scores_manifest(self.inputs.pivot)
        fingerprint = {
            "pivot_scores": pivot.digest,
            "source_scores": self.inputs.scores_manifest(self.source).digest,
            "positions": self.positions,
            "vocabulary": self.mode,
        }
        return Manifest("aligned", pivot.samples, fingerprint, pivot.shard_samples)

    def require(self) -> None:
        for model in (self.inputs.pivot, self.source):
            shards = Shards(self.inputs.scores_folder(model), self.inputs.scores_manifest(model))
            command = f"score RECIPE --model {model.name}"
            require_complete(shards, model.name, "have no scores", command)

    def prepare(self, missing: Sequence[SampleRange]) -> None:
        if missing and self._read_vocabulary() is None:
            self._make_vocabulary()

    @contextlib.contextmanager
    def open(self, processes: Processes) -> Iterator[AlignContext]:
        vocabulary_map = self._read_vocabulary()
        assert vocabulary_map is not None
        yield AlignContext(*self.stores(), vocabulary_map)

    def make(self, context: AlignContext, samples: SampleRange) -> tuple[pa.Table, AlignSummary]:
        joined = join(context.pivot.shard(samples), context.source)
        if joined is None:
            return aligned_table([]), AlignSummary()
        aligned, summary = align_samples(joined, context.vocabulary, self.positions)
        return aligned_table(aligned), summary

    def stores(self) -> tuple[ScoreStore, ScoreStore]:
        """The pivot's and the source's scores."""
        folder = self.inputs.scores_folder
        return ScoreStore(folder(self.inputs.pivot)), ScoreStore(folder(self.source))

    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """The pivot's and the source's."""
        renderers = self.inputs.pivot.renderer, self.source.renderer
        return vocabulary(renderers[0].tokenizer), vocabulary(renderers[1].tokenizer)

    def _roles(self) -> dict[int, int]:
        return match_roles(self.inputs.pivot.renderer.roles(), self.source.renderer.roles())

    def vocabulary_file(self) -> Path:
        """Named by all that determines the map; sources with the same tokenizer share it."""
        inputs: dict[str, Any] = {
            "pivot": fingerprint(self.inputs.pivot.renderer.tokenizer),
            "source": fingerprint(self.source.renderer.tokenizer),
            "mode": self.mode,
            "specials": sorted(self._roles().items()),
        }
        if self.mode == "ms":
            inputs["corpus"] = self.manifest().digest
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        folder = self.inputs.recipe.aligned_folder / ".vocabularies"  # no source has this name
        return folder / f"{self.mode}-{digest[:16]}.npz"

    def _make_vocabulary(self) -> None:
        pivot, source = self.vocabularies()
        log.info("align %s: mapping %d tokens to %d", self.name, len(source), len(pivot))
        roles = self._roles()
        if self.mode == "ms":
            built = VocabularyMap.from_counts(pivot, source, self._counts(), roles)
        elif self.mode == "bytes":
            first = first_tokens(self.inputs.pivot.renderer.tokenizer, source.tokens)
            built = VocabularyMap.from_bytes(pivot, source, first, roles)
        else:
            build = VocabularyMap.from_em if self.mode == "em" else VocabularyMap.from_mined
            built = build(pivot, source, roles)
        path = self.vocabulary_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, ids=built.ids, kinds=built.kinds)

    def _read_vocabulary(self) -> VocabularyMap | None:
        try:
            with np.load(self.vocabulary_file()) as arrays:
                maps = arrays["ids"], arrays["kinds"]
        except (OSError, ValueError, KeyError):  # missing or damaged: it is made again
            return None
        return VocabularyMap(*self.vocabularies(), self.mode, *maps)

    def _counts(self) -> PairCounts:
        """Pairs of tokens over the whole corpus, one shard in memory at a time."""
        pivot, source = self.stores()
        vocabularies = self.vocabularies()
        counts = PairCounts.empty()
        for samples in pivot.shards.present():
            if joined := join(pivot.shard(samples), source):
                matches = match_states(joined.pivot, joined.source, self.positions, vocabularies)
                counts += pair_counts(joined.pivot, joined.source, matches)
        return counts


def alignment_shares(summary: AlignSummary) -> dict[str, float]:
    """The report's figures for a source, from its summary.

    Shares of the pivot's positions (all, first and last of an answer) that match, of the source's
    top-k mass that arrives and how it was mapped, of positions where the most probable token is the
    gold one before and after mapping, of samples that the source predicts better (nats per byte);
    both models' cross-entropy in nats per byte; tokens that run over an answer's end, per answer.
    """
    fields = {
        "positions_matched": ("matched", "positions"),
        "begins_matched": ("begins_matched", "responses"),
        "ends_matched": ("ends_matched", "ends"),
        "mass_kept": ("mass_after", "mass_before"),
        "mass_exact": ("mass_exact", "mass_before"),
        "mass_mapped": ("mass_mapped", "mass_before"),
        "mass_special": ("mass_special", "mass_before"),
        "mass_dropped": ("mass_dropped", "mass_before"),
        "gold_first_before": ("gold_first_before", "matched"),
        "gold_first_after": ("gold_first_after", "matched"),
        "pivot_cross_entropy": ("pivot_nll", "pivot_bytes"),
        "source_cross_entropy": ("source_nll", "source_bytes"),
        "source_won": ("source_won", "samples"),
        "pivot_run_over": ("pivot_run_over", "responses"),
        "source_run_over": ("source_run_over", "responses"),
    }
    sums = dict(summary)
    return {
        name: sums[part] / sums[whole] if sums[whole] else 0.0
        for name, (part, whole) in fields.items()
    }


def align_stages(inputs: Inputs, names: Sequence[str] | None = None) -> list[Stage]:
    """The align stages of the recipe's sources, or of those named."""
    return [
        AlignStage(inputs, model)
        for name, model in inputs.models.items()
        if model is not inputs.pivot and (names is None or name in names)
    ]

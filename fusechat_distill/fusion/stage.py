"""The fuse stage: scores and aligned distributions become the dataset that a target learns from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fusechat_common.errors import FusechatError
from fusechat_distill.alignment.stage import AlignedSample, AlignStage, aligned_samples
from fusechat_distill.fusion.decisions import NAME, Decisions, FuseSummary
from fusechat_distill.fusion.fuse import AlignedScores, Fused, fuse, segment_sums, target_models
from fusechat_distill.recipe.schema import PIVOT
from fusechat_distill.storage.shards import (
    Manifest,
    SampleRange,
    ScoreStore,
    Shards,
)
from fusechat_distill.storage.stage import ShardedStage, StageStatus, require_complete
from fusechat_distill.text.scored import ScoredSample

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.text.conversations import Conversation, Rendering, Response

IGNORED = -100
"""The label of a token that is no part of an answer, as everywhere in PyTorch."""

BLOCK = 1 << 21
"""Entries that are fused at a time, so that memory doesn't grow with k and the number of models."""


def held_out(key: str, fraction: float) -> bool:
    """Whether a conversation (its key) is kept from training, to be evaluated on.

    Decided by the key alone: rows that are added or removed, and the same row twice, change
    nothing for the others.
    """
    return int(key[:16], 16) < fraction * 2**64


def target_schema(width: int) -> pa.Schema:
    """Rows of a target's dataset: `FusionTrainer`'s columns, and which conversation it is.

    Without distributions (`width` 0, the baseline) `fusion_ids` and `fusion_probs` are missing.
    """
    columns = [
        ("key", pa.binary(16)),
        ("row", pa.uint32()),
        ("held_out", pa.bool_()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
    if width:
        columns += [
            ("fusion_ids", pa.list_(pa.list_(pa.int32(), width))),
            ("fusion_probs", pa.list_(pa.list_(pa.float32(), width))),
        ]
    return pa.schema(columns)


@dataclass(frozen=True, eq=False)
class Sample:
    """A conversation in the pivot's tokens, and what each model thinks of its N positions.

    `scores` has the pivot first; `num_bytes` is as in `fusion.fuse`. Losses and bytes are counted
    over the answers that all models scored, so that they are of the same text.
    """

    conversation: Conversation
    rendering: Rendering
    scores: tuple[AlignedScores, ...]
    num_bytes: NDArray[np.int64]


def join_sample(
    conversation: Conversation,
    rendering: Rendering,
    pivot: ScoredSample | None,
    sources: Sequence[tuple[AlignedSample, ScoredSample] | None],
) -> Sample:
    """Put together what the stores hold of one conversation; None where they hold nothing."""
    responses = rendering.responses
    positions = sum(len(response.ends) for response in responses)
    if pivot is None:
        scores = [AlignedScores.absent(positions) for _ in (None, *sources)]
        return Sample(conversation, rendering, tuple(scores), _counted(responses, None))
    own = pivot.turns
    if len(own) != positions:
        raise FusechatError(
            f"scores of {PIVOT}, key {conversation.key}: {len(own)} positions where the "
            f"conversation has {positions}; delete the shard that holds it"
        )
    # A source that has no answer in common with the pivot is as good as absent.
    sources = [
        entry if entry is not None and np.isin(own, entry[1].turns).any() else None
        for entry in sources
    ]
    shared = set(own.tolist())
    for entry in sources:
        if entry is not None:
            shared &= set(entry[1].turns.tolist())
    scores = [
        _scores(np.arange(positions), pivot, pivot.column("ids"), pivot.column("logprobs"), shared)
    ]
    for entry in sources:
        if entry is None:
            scores.append(AlignedScores.absent(positions))
        else:
            aligned, source = entry
            scores.append(_scores(aligned.matches, source, aligned.ids, aligned.logprobs, shared))
    return Sample(conversation, rendering, tuple(scores), _counted(responses, shared))


def _scores(
    matches: NDArray[Any],
    scored: ScoredSample,
    ids: NDArray[Any],
    logprobs: NDArray[Any],
    shared: set[int],
) -> AlignedScores:
    counted = np.isin(scored.turns, list(shared))
    nll = -scored.column("gold_logprobs").astype(np.float64)
    scores = AlignedScores.of(matches, ids, logprobs, np.where(counted, nll, 0.0))
    tokens, _ = segment_sums(matches, counted)
    return replace(scores, tokens=tokens)


def _counted(responses: Sequence[Response], shared: set[int] | None) -> NDArray[np.int64]:
    counts = [
        byte_counts(response) * (shared is None or response.turn in shared)
        for response in responses
    ]
    return np.concatenate(counts)


def byte_counts(response: Response) -> NDArray[np.int64]:
    """How many of the answer's bytes each token stands for, [n]; 0 for the stop.

    A token whose end isn't known leaves its bytes to the next one that has an end; after the last
    of these the first token takes the rest.
    """
    ends = response.ends.astype(np.int64)
    reached = np.maximum.accumulate(np.concatenate([[response.begin], ends]))
    counts = np.diff(reached)
    known = np.flatnonzero(ends >= 0)
    rest = known[-1] + 1 if len(known) else 0
    if rest < len(counts):
        counts[rest] += response.end - reached[-1]
    return counts


@dataclass(frozen=True, eq=False)
class Stores:
    """What a target is fused from."""

    scores: dict[str, ScoreStore]
    """By model."""
    aligned: dict[str, Shards]
    """By source."""


class FuseStage(ShardedStage[FuseSummary, Stores]):
    """What one target learns from, in `fused/<target>/`; beside it `decisions.json`."""

    stage = "fuse"
    summary = FuseSummary

    def __init__(self, inputs: Inputs, target: str, sources: Sequence[str]):
        self.inputs = inputs
        self.name = target
        self.folder = inputs.recipe.fused_folder / target
        self.sources = tuple(sources)
        self._aligned = [AlignStage(inputs, inputs.models[source]) for source in self.sources]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are compared, the pivot first; none for the baseline."""
        return (PIVOT, *self.sources) if self.sources else ()

    @property
    def width(self) -> int:
        """Entries of a fused distribution."""
        recipe, models = self.inputs.recipe, len(self.models)
        # MinCE takes one model's entries, AvgCE mixes those of all.
        return recipe.scoring.top_k * (models if recipe.fusion.function == "avg_ce" else models > 0)

    def manifest(self) -> Manifest:
        """What determines the dataset."""
        recipe, pivot = self.inputs.recipe, self.inputs.pivot
        made_of: dict[str, Any] = {"eval_fraction": recipe.dataset.eval_fraction}
        if self.models:
            made_of |= {
                "pivot_scores": self.inputs.scores_manifest(pivot).digest,
                "aligned": {stage.name: stage.manifest().digest for stage in self._aligned},
                "unmatched": recipe.alignment.unmatched,
                **recipe.fusion.model_dump(exclude={"strategy"}),
            }
        else:
            made_of |= {
                "conversations": self.inputs.conversations.fingerprint,
                "max_length": recipe.max_length,
                "pivot_renderer": pivot.renderer.fingerprint,
            }
        return Manifest("fused", len(self.inputs.conversations), made_of)

    def problems(self) -> list[str]:
        problems = super().problems()
        out = self.held_out()
        if out == len(self.inputs.conversations):
            problems.append(
                f"dataset.eval_fraction: holds out all {out} conversations; lower it, or add some"
            )
        return problems

    def held_out(self) -> int:
        """How many conversations are kept from training."""
        fraction = self.inputs.recipe.dataset.eval_fraction
        return sum(held_out(key, fraction) for key in self.inputs.conversations.keys)

    def require(self) -> None:
        for aligned in self._aligned:
            command = f"align RECIPE --source {aligned.name}"
            shards = Shards(aligned.folder, aligned.manifest())
            require_complete(shards, aligned.name, "are not aligned", command)

    @contextlib.contextmanager
    def open(self, processes: Processes) -> Iterator[Stores]:
        folders = {
            name: self.inputs.scores_folder(self.inputs.models[name]) for name in self.models
        }
        yield Stores(
            {name: ScoreStore(folder) for name, folder in folders.items()},
            {stage.name: Shards.open(stage.folder) for stage in self._aligned},
        )

    def make(self, context: Stores, samples: SampleRange) -> tuple[pa.Table, FuseSummary]:
        return self._shard(self._joined(samples, context))

    def finish(self, status: StageStatus[FuseSummary]) -> StageStatus[FuseSummary]:
        if not (self.folder / NAME).exists():
            Decisions.of(self.models, status.details).write(self.folder)
        return status

    def _joined(self, samples: SampleRange, stores: Stores) -> list[Sample]:
        """The range's conversations that the pivot has an answer in."""
        conversations = self.inputs.conversations[samples.start : samples.stop]
        renderings = [r for r, _ in self.inputs.rendered(self.inputs.pivot, conversations)]
        aligned = [
            {sample.key: sample for sample in aligned_samples(shards.read(samples))}
            for shards in stores.aligned.values()
        ]
        joined = []
        for conversation, rendering in zip(conversations, renderings, strict=True):
            if not rendering.responses:
                continue
            key = conversation.key
            pivot = stores.scores[PIVOT].get(key) if self.models else None
            sources = [
                (found[key], stores.scores[name][key]) if key in found else None
                for name, found in zip(self.sources, aligned, strict=True)
            ]
            joined.append(join_sample(conversation, rendering, pivot, sources))
        return joined

    def _shard(self, joined: Sequence[Sample]) -> tuple[pa.Table, FuseSummary]:
        fused = [self._fused(block) for block in self._blocks(joined)] if self.models else []
        ids = np.concatenate([np.zeros((0, self.width), np.int32), *(f.ids for f in fused)])
        probs = np.concatenate([np.zeros((0, self.width), np.float32), *(f.probs for f in fused)])
        table = target_table(joined, ids, probs, self.inputs.recipe.dataset.eval_fraction)
        summary = FuseSummary(
            samples=len(joined),
            held_out=int(sum(table["held_out"].to_pylist())),
            tokens=sum(len(sample.rendering.input_ids) for sample in joined),
            positions=sum(len(sample.num_bytes) for sample in joined),
            positions_with_target=int((probs.sum(axis=1) > 0).sum()) if self.models else None,
        )
        if self.models:
            for block, decided in zip(self._blocks(joined), fused, strict=True):
                summary += self._won(block, decided)
        return table, summary

    def _blocks(self, joined: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        start = entries = 0
        for i, sample in enumerate(joined):
            here = len(sample.num_bytes) * self.inputs.recipe.scoring.top_k * len(self.models)
            if entries and entries + here > BLOCK:
                yield joined[start:i]
                start, entries = i, 0
            entries += here
        if joined:
            yield joined[start:]

    def _fused(self, block: Sequence[Sample]) -> Fused:
        fusion = self.inputs.recipe.fusion
        scores = zip(*(sample.scores for sample in block), strict=True)
        fused = fuse(
            [AlignedScores.joined(of_model) for of_model in scores],
            np.cumsum([0, *(len(sample.num_bytes) for sample in block)]),
            np.concatenate([sample.num_bytes for sample in block]),
            function=fusion.function,
            level=fusion.level,
            cross_entropy=fusion.cross_entropy,
            tail=fusion.tail,
            temperature=fusion.temperature,
            unmatched=self.inputs.recipe.alignment.unmatched,
        )
        # A block in which no source has a sample is narrower.
        narrow = ((0, 0), (0, self.width - fused.ids.shape[1]))
        return replace(fused, ids=np.pad(fused.ids, narrow), probs=np.pad(fused.probs, narrow))

    def _won(self, block: Sequence[Sample], fused: Fused) -> FuseSummary:
        """Sums of each model's share, over what more than one model scored."""
        lengths = np.array([len(sample.num_bytes) for sample in block])
        several = np.array([sum(bool(s.present[0]) for s in sample.scores) > 1 for sample in block])
        rows, samples_won = fused.weights, None
        if self.inputs.recipe.fusion.level == "sequence":
            samples_won = rows[several].sum(axis=0, dtype=np.float64).tolist()
            rows = np.repeat(rows, lengths, axis=0)
        compared = np.repeat(several, lengths)
        return FuseSummary(
            samples_compared=int(several.sum()),
            samples_won=samples_won,
            positions_compared=int(compared.sum()),
            positions_won=rows[compared].sum(axis=0, dtype=np.float64).tolist(),
        )


def target_table(
    samples: Sequence[Sample], ids: NDArray[Any], probs: NDArray[Any], eval_fraction: float
) -> pa.Table:
    """Rows of `target_schema`.

    Args:
        ids, probs: [N, K], the fused distributions of all samples' positions end to end.
    """
    width = ids.shape[1]
    schema = target_schema(width)
    lengths = [len(sample.rendering.input_ids) for sample in samples]
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = np.concatenate(
        [np.zeros(0, np.int64), *(sample.rendering.input_ids for sample in samples)]
    ).astype(np.int32)
    live = np.zeros(len(tokens), dtype=np.bool_)
    for offset, sample in zip(offsets[:-1].tolist(), samples, strict=True):
        for response in sample.rendering.responses:
            part = response.token_slice()
            live[offset + part.start : offset + part.stop] = True
    keys = [sample.conversation.key for sample in samples]
    columns = [
        pa.array([bytes.fromhex(key) for key in keys], pa.binary(16)),
        pa.array([sample.conversation.row for sample in samples], pa.uint32()),
        pa.array([held_out(key, eval_fraction) for key in keys], pa.bool_()),
        pa.ListArray.from_arrays(offsets, tokens),
        pa.ListArray.from_arrays(offsets, np.where(live, tokens, np.int32(IGNORED))),
    ]
    for rows, dtype in ((ids, np.int32), (probs, np.float32)):
        if width:
            full = np.zeros((len(tokens), width), dtype)
            full[live] = rows
            nested = pa.FixedSizeListArray.from_arrays(full.reshape(-1), width)
            columns.append(pa.ListArray.from_arrays(offsets, nested))
    return pa.table(columns, schema=schema)


def fuse_stages(inputs: Inputs, names: Sequence[str] | None = None) -> list[FuseStage]:
    """The fuse stages of the recipe's targets, or of those made from the sources named."""
    recipe = inputs.recipe
    targets = target_models(recipe.fusion.strategy, [source.title for source in recipe.sources])
    return [
        FuseStage(inputs, target, sources)
        for target, sources in targets.items()
        if names is None or set(names) & set(sources)
    ]

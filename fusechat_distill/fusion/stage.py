"""The fuse stage: the dataset of a target, from the scores and the aligned distributions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fusechat_common.errors import FusechatError
from fusechat_distill.alignment.stage import AlignedSample, AlignStage, aligned_samples
from fusechat_distill.fusion.decisions import NAME, Decisions, FuseSummary
from fusechat_distill.fusion.fuse import AlignedScores, Fused, fuse, segment_sums, target_models
from fusechat_distill.recipe.schema import PIVOT
from fusechat_distill.storage.shards import Manifest, SampleRange, ScoreStore, Shards
from fusechat_distill.storage.stage import ShardedStage, StageStatus, require_complete
from fusechat_distill.text.scored import ScoredSample

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.text.conversations import Conversation, Rendering, Response

IGNORED = -100
"""The label of a token that is no part of an answer, as everywhere in PyTorch."""

BLOCK = 1 << 21
"""Entries fused at a time, so that memory doesn't grow with k and the number of models."""


def held_out(key: str, fraction: float) -> bool:
    """Whether the conversation with this key is held out from training, for evaluation.

    This depends on the key alone: it stays the same when other rows are added or removed.
    """
    return int(key[:16], 16) < fraction * 2**64


@dataclass(frozen=True, eq=False)
class Sample:
    """A conversation in the pivot's tokens, and each model's scores at its N positions.

    `scores` has the pivot first; `num_bytes` is as in `fusion.fuse`. Losses and bytes are those of
    the answers that all models scored, so that they are of the same text.
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
    """What the stores hold of one conversation; None for a model whose store does not have it."""
    responses = rendering.responses
    positions = sum(len(response.ends) for response in responses)
    num_bytes = [byte_counts(response) for response in responses]
    absent = AlignedScores.absent(positions)
    if pivot is None:
        scores = [absent] * (1 + len(sources))
        return Sample(conversation, rendering, tuple(scores), np.concatenate(num_bytes))
    own = pivot.turns
    if len(own) != positions:
        raise FusechatError(
            f"scores of {PIVOT}, key {conversation.key}: {len(own)} positions where the "
            f"conversation has {positions}; delete the shard that holds it"
        )
    # A source that has no answer in common with the pivot counts as absent.
    sources = [
        entry if entry is not None and np.isin(own, entry[1].turns).any() else None
        for entry in sources
    ]
    shared = set(own.tolist()).intersection(
        *(entry[1].turns.tolist() for entry in sources if entry)
    )
    ids, logprobs = pivot.column("ids"), pivot.column("logprobs")
    scores = [_scores(np.arange(positions), pivot, ids, logprobs, shared)]
    for entry in sources:
        if entry is None:
            scores.append(absent)
        else:
            aligned, source = entry
            scores.append(_scores(aligned.matches, source, aligned.ids, aligned.logprobs, shared))
    num_bytes = [
        counts * (response.turn in shared)
        for response, counts in zip(responses, num_bytes, strict=True)
    ]
    return Sample(conversation, rendering, tuple(scores), np.concatenate(num_bytes))


def _scores(
    matches: NDArray[Any],
    scored: ScoredSample,
    ids: NDArray[Any],
    logprobs: NDArray[Any],
    shared: set[int],
) -> AlignedScores:
    """One model's scores of the sample, with the losses and tokens of the turns in `shared`."""
    counted = np.isin(scored.turns, list(shared))
    nll = -scored.column("gold_logprobs").astype(np.float64)
    scores = AlignedScores.of(matches, ids, logprobs, np.where(counted, nll, 0.0))
    tokens, _ = segment_sums(matches, counted)
    return replace(scores, tokens=tokens)


def byte_counts(response: Response) -> NDArray[np.int64]:
    """The number of the answer's bytes that each token stands for, [n]; 0 for the stop.

    The bytes of a token whose end isn't known count for the next token with a known end; those
    after the last known end count for the token that follows it.
    """
    ends = response.ends.astype(np.int64)
    reached = np.maximum.accumulate(np.concatenate([[response.begin], ends]))
    counts = np.diff(reached)
    known = np.flatnonzero(ends >= 0)
    rest = known[-1] + 1 if len(known) else 0
    if rest < len(counts):
        counts[rest] += response.end - reached[-1]
    return counts


class FuseContext(NamedTuple):
    """The stores from which a target is fused."""

    scores: dict[str, ScoreStore]
    """By model."""
    aligned: dict[str, Shards]
    """By source."""


class FuseStage(ShardedStage[FuseSummary, FuseContext]):
    """The dataset of one target, in `fused/<target>/`, with its `decisions.json`."""

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
        recipe, pivot = self.inputs.recipe, self.inputs.pivot
        fingerprint: dict[str, Any] = {"eval_fraction": recipe.dataset.eval_fraction}
        if self.models:
            fingerprint |= {
                "pivot_scores": self.inputs.scores_manifest(pivot).digest,
                "aligned": {stage.name: stage.manifest().digest for stage in self._aligned},
                "unmatched": recipe.alignment.unmatched,
                **recipe.fusion.model_dump(exclude={"strategy"}),
            }
        else:
            fingerprint |= {
                "conversations": self.inputs.conversations.fingerprint,
                "max_length": recipe.max_length,
                "pivot_renderer": pivot.renderer.fingerprint,
            }
        return Manifest("fused", len(self.inputs.conversations), fingerprint)

    def problems(self) -> list[str]:
        problems = super().problems()
        out = self.held_out()
        if out == len(self.inputs.conversations):
            problems.append(
                f"dataset.eval_fraction: holds out all {out} conversations; lower it, or add some"
            )
        return problems

    def held_out(self) -> int:
        """How many conversations are held out from training."""
        fraction = self.inputs.recipe.dataset.eval_fraction
        return sum(held_out(key, fraction) for key in self.inputs.conversations.keys)

    def require(self) -> None:
        for aligned in self._aligned:
            command = f"align RECIPE --source {aligned.name}"
            shards = Shards(aligned.folder, aligned.manifest())
            require_complete(shards, aligned.name, "are not aligned", command)

    @contextlib.contextmanager
    def open(self, processes: Processes) -> Iterator[FuseContext]:
        models = [self.inputs.models[name] for name in self.models]
        yield FuseContext(
            {model.name: ScoreStore(self.inputs.scores_folder(model)) for model in models},
            {stage.name: Shards.open(stage.folder) for stage in self._aligned},
        )

    def make(self, context: FuseContext, samples: SampleRange) -> tuple[pa.Table, FuseSummary]:
        joined = self._joined(samples, context)
        blocks = list(self._blocks(joined)) if self.models else []
        fused = [self._fused(block) for block in blocks]
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
        for block, of_block in zip(blocks, fused, strict=True):
            summary += self._won(block, of_block)
        return table, summary

    def finish(self, status: StageStatus[FuseSummary]) -> StageStatus[FuseSummary]:
        if not (self.folder / NAME).exists():
            Decisions.of(self.models, status.details).write(self.folder)
        return status

    def _joined(self, samples: SampleRange, stores: FuseContext) -> list[Sample]:
        """The range's conversations in which the pivot's template leaves an answer."""
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
                (samples_of[key], stores.scores[name][key]) if key in samples_of else None
                for name, samples_of in zip(self.sources, aligned, strict=True)
            ]
            joined.append(join_sample(conversation, rendering, pivot, sources))
        return joined

    def _blocks(self, joined: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """The samples in parts of at most `BLOCK` entries, or of one sample."""
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
            unmatched=self.inputs.recipe.alignment.unmatched,
            **fusion.model_dump(exclude={"strategy"}),
        )
        # A block in which no source has a sample is narrower.
        narrow = ((0, 0), (0, self.width - fused.ids.shape[1]))
        return replace(fused, ids=np.pad(fused.ids, narrow), probs=np.pad(fused.probs, narrow))

    def _won(self, block: Sequence[Sample], fused: Fused) -> FuseSummary:
        """The sums of each model's share, over the samples that more than one model scored."""
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
    """Rows of a target's dataset: `FusionTrainer`'s columns, and which conversation each is.

    Args:
        ids, probs: [N, K], the fused distributions of all samples' positions end to end. With K = 0
            (the baseline) the columns `fusion_ids` and `fusion_probs` are left out.
    """
    width = ids.shape[1]
    inputs = [sample.rendering.input_ids for sample in samples]
    offsets = np.cumsum([0, *map(len, inputs)]).astype(np.int32)
    tokens = np.concatenate([np.zeros(0, np.int64), *inputs]).astype(np.int32)
    in_answer = np.zeros(len(tokens), dtype=np.bool_)
    for offset, sample in zip(offsets[:-1].tolist(), samples, strict=True):
        for response in sample.rendering.responses:
            part = response.token_slice()
            in_answer[offset + part.start : offset + part.stop] = True
    keys = [sample.conversation.key for sample in samples]
    columns = {
        "key": pa.array([bytes.fromhex(key) for key in keys], pa.binary(16)),
        "row": pa.array([sample.conversation.row for sample in samples], pa.uint32()),
        "held_out": pa.array([held_out(key, eval_fraction) for key in keys], pa.bool_()),
        "input_ids": pa.ListArray.from_arrays(offsets, tokens),
        "labels": pa.ListArray.from_arrays(offsets, np.where(in_answer, tokens, np.int32(IGNORED))),
    }
    targets = {"fusion_ids": ids.astype(np.int32), "fusion_probs": probs.astype(np.float32)}
    if width:
        for name, rows in targets.items():
            # Tokens that are no part of an answer have rows of zeros.
            full = np.zeros((len(tokens), width), rows.dtype)
            full[in_answer] = rows
            nested = pa.FixedSizeListArray.from_arrays(full.reshape(-1), width)
            columns[name] = pa.ListArray.from_arrays(offsets, nested)
    return pa.table(columns)


def fuse_stages(inputs: Inputs, names: Sequence[str] | None = None) -> list[FuseStage]:
    """The fuse stages of the recipe's targets, or of those with one of the named sources."""
    recipe = inputs.recipe
    targets = target_models(recipe.fusion.strategy, [source.title for source in recipe.sources])
    return [
        FuseStage(inputs, target, sources)
        for target, sources in targets.items()
        if names is None or set(names) & set(sources)
    ]

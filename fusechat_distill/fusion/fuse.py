"""MinCE and AvgCE: which models' distributions a target learns from, and the resulting rows.

Both are FuseLLM's (arXiv 2401.10491); FuseChat (arXiv 2408.07990) fuses pairwise. Arrays in, arrays
out: S samples, N response positions of the pivot in all, k entries a position. Row t is the
distribution that the label of row t was drawn from; mass missing from 1 lies on that label, so a
zero row is the one-hot target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusechat_distill.alignment.vocabularies import collapse

Strategy = Literal["pairwise", "multi", "sft"]
Function = Literal["min_ce", "avg_ce"]
Level = Literal["sequence", "token"]
CrossEntropy = Literal["byte", "token"]
Tail = Literal["renormalize", "gold"]
Unmatched = Literal["one_hot", "pivot"]

Array = NDArray[Any]


@dataclass(frozen=True)
class AlignedScores:
    """One model on the pivot's positions.

    ids: [N, k] integers, tokens of the pivot's vocabulary, each once a row.
    logprobs: [N, k] floats, normalised over the model's vocabulary; −inf where there is no entry.
    matched: [N] bool, whether the model has a distribution with the same text before it.
    nll: [N] floats, the model's loss, in nats, on its own tokens from a matched position up to the
        next one; that of a sample's first position includes the tokens before the first match,
        and unmatched positions have 0. The sum over a sample is its negative log-likelihood, the
        stop token included.
    tokens: [N] integers, the number of the model's own tokens in `nll`.
    present: [S] bool, whether the model scored the sample; if not, its rows are ignored.
    """

    ids: Array
    logprobs: Array
    matched: Array
    nll: Array
    tokens: Array
    present: Array

    @classmethod
    def of(cls, matches: Array, ids: Array, logprobs: Array, nll: Array) -> AlignedScores:
        """One sample, from what alignment stores.

        Args:
            matches: [n] integers, for each of the pivot's positions the model's position with the
                same text before it, rising, or −1. For the pivot itself 0 … n − 1.
            ids, logprobs: [m, k], entries at the m matched positions.
            nll: [t] floats, the loss of each of the model's own tokens.
        """
        matched = matches >= 0
        full_ids = np.zeros((len(matches), ids.shape[1]), np.int64)
        full_logprobs = np.full((len(matches), ids.shape[1]), -np.inf)
        full_ids[matched], full_logprobs[matched] = ids, logprobs
        sums, counts = segment_sums(matches, nll)
        return cls(full_ids, full_logprobs, matched, sums, counts, np.ones(1, bool))

    @classmethod
    def absent(cls, positions: int) -> AlignedScores:
        """One sample of n positions that the model didn't score."""
        nothing = cls.of(np.full(positions, -1), np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0))
        return replace(nothing, present=np.zeros(1, bool))

    @classmethod
    def joined(cls, samples: Sequence[AlignedScores]) -> AlignedScores:
        """Many samples of one model, one after the other."""
        width = max(sample.ids.shape[1] for sample in samples)
        return cls(
            np.concatenate([_widen(sample.ids, width) for sample in samples]),
            np.concatenate([_widen(sample.logprobs, width, -np.inf) for sample in samples]),
            *(
                np.concatenate([getattr(sample, name) for sample in samples])
                for name in ("matched", "nll", "tokens", "present")
            ),
        )


@dataclass(frozen=True)
class Fused:
    """Rows of a target, and the decisions.

    ids, probs: [N, K] int32 and float32, by falling probability, zeros at the end. K is the widest
        model's k for MinCE and the sum of all k for AvgCE.
    weights: [S, M] (level sequence) or [N, M] (level token) float32, the share of each of the M
        models, in the order they were given; zeros where no model scored the sample.
    """

    ids: Array
    probs: Array
    weights: Array


def target_models(strategy: Strategy, sources: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The targets of a strategy by name, and the sources that each is fused from with the pivot."""
    if strategy == "pairwise":
        return {source: (source,) for source in sources}
    return {"multi": tuple(sources)} if strategy == "multi" else {"sft": ()}


def segment_sums(matches: Array, nll: Array) -> tuple[Array, Array]:
    """`nll` and `tokens` of one sample's `AlignedScores`, from the loss of each token of the model.

    Args as in `AlignedScores.of`. Of several positions with one match the last gets the segment.
    """
    sums, counts = np.zeros(len(matches)), np.zeros(len(matches), np.int64)
    rows = np.flatnonzero(matches >= 0)
    if not len(matches) or not len(nll):
        return sums, counts
    if not len(rows):
        rows, starts = np.array([0]), np.array([0])
    else:
        starts = matches[rows]
    counts[rows] = np.diff(starts, append=len(nll))
    segments = np.add.reduceat(np.asarray(nll, np.float64), starts)
    sums[rows] = np.where(counts[rows] > 0, segments, 0.0)
    counts[0] += starts[0]
    sums[0] += np.sum(nll[: starts[0]], dtype=np.float64)
    return sums, counts


def fuse(
    models: Sequence[AlignedScores],
    offsets: Array,
    num_bytes: Array,
    *,
    function: Function = "min_ce",
    level: Level = "sequence",
    cross_entropy: CrossEntropy = "byte",
    tail: Tail = "renormalize",
    temperature: float = 1.0,
    unmatched: Unmatched = "one_hot",
) -> Fused:
    """One target from the pivot (the first of `models`) and its sources.

    The cross-entropy of a model is its negative log-likelihood divided by the UTF-8 bytes of the
    text (`byte`, the same for all models) or by the number of its own tokens (`token`, the
    papers'), over the sample or, at level `token`, over each segment between positions that all of
    the sample's models match. MinCE takes the model with the lowest, of equal ones the first;
    AvgCE mixes with weights softmax(−CE). A model that didn't score a sample isn't compared there.

    Args:
        offsets: [S + 1] integers, where the positions of each sample start and end.
        num_bytes: [N] integers, UTF-8 bytes of response text that each of the pivot's tokens
            stands for; a segment without any (the stop token alone) counts as one byte.
        tail: the mass outside the entries: `renormalize` spreads it over them, as the papers do;
            `gold` gives it to the label.
        temperature: divides log-probabilities; with `gold` the entries' total mass stays the same.
        unmatched: the distribution of a model at a position it doesn't match: `one_hot` on the
            label, or the pivot's own.
    """
    lengths = np.diff(offsets)
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    present = np.stack([model.present for model in models], axis=1)
    if level == "sequence":
        starts, unit_of, unit_present = np.asarray(offsets[:-1]), sample_of, present
    else:
        starts, unit_of = _segments(models, offsets, present[sample_of])
        unit_present = present[sample_of[starts]]
    losses = np.stack([_sums(model.nll, starts, len(sample_of)) for model in models], axis=1)
    if cross_entropy == "byte":
        sizes = _sums(num_bytes, starts, len(sample_of))[:, None]
    else:
        sizes = np.stack([_sums(model.tokens, starts, len(sample_of)) for model in models], axis=1)
    unit_weights = model_weights(losses / np.maximum(sizes, 1), unit_present, function)
    row_weights = unit_weights[unit_of]
    rows = _distributions(models, present[sample_of], tail, temperature, unmatched)
    ids = np.concatenate([ids for ids, _ in rows], axis=1)
    probs = np.concatenate(
        [row_weights[:, [j]] * probs for j, (_, probs) in enumerate(rows)], axis=1
    )
    widths = [model.ids.shape[1] for model in models]
    # MinCE leaves the entries of one model, whichever it is.
    width = max(widths) if function == "min_ce" else sum(widths)
    merged = collapse(ids.astype(np.int64), probs)
    weights = unit_weights if level == "sequence" else row_weights
    return Fused(
        np.maximum(merged.ids[:, :width], 0).astype(np.int32),
        merged.probs[:, :width].astype(np.float32),
        weights.astype(np.float32),
    )


def _segments(
    models: Sequence[AlignedScores], offsets: Array, row_present: Array
) -> tuple[Array, Array]:
    """The starts of the segments, and the segment of each position."""
    common = np.ones(len(row_present), bool)
    for j, model in enumerate(models):
        common &= model.matched | ~row_present[:, j]
    first = np.asarray(offsets[:-1])[np.diff(offsets) > 0]
    common[first] = True
    return np.flatnonzero(common), np.cumsum(common) - 1


def _sums(values: Array, starts: Array, total: int) -> Array:
    """Sums over [start, next start), in float64; 0 for an empty one."""
    sums = np.zeros(len(starts))
    filled = np.diff(starts, append=total) > 0
    if filled.any():
        sums[filled] = np.add.reduceat(np.asarray(values, np.float64), starts[filled])
    return sums


def model_weights(cross_entropies: Array, present: Array, function: Function) -> Array:
    """[U, M]: the share of each model in each unit, by the models' cross-entropies [U, M]."""
    # A loss that is infinite or NaN never wins; if all are, the models are equal.
    finite = np.where(np.isfinite(cross_entropies), cross_entropies, np.finfo(np.float64).max)
    finite = np.where(present, finite, np.inf)
    if function == "min_ce":
        winner = np.argmin(finite, axis=1)
        weights = np.zeros(finite.shape)
        np.put_along_axis(weights, winner[:, None], 1.0, axis=1)
        return weights * present.any(axis=1, keepdims=True)
    best = np.where(present.any(axis=1), finite.min(axis=1), 0.0)
    weights = np.exp(-(finite - best[:, None]))
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _distributions(
    models: Sequence[AlignedScores],
    row_present: Array,
    tail: Tail,
    temperature: float,
    unmatched: Unmatched,
) -> list[tuple[Array, Array]]:
    """Ids and probabilities, [N, k] each, of every model, with `unmatched` filled in."""
    rows: list[tuple[Array, Array]] = []
    for j, model in enumerate(models):
        known = (model.matched & row_present[:, j])[:, None]
        logprobs = np.where(known, np.asarray(model.logprobs, np.float64), -np.inf)
        ids, probs = model.ids, _probabilities(logprobs, tail, temperature)
        if unmatched == "pivot" and j > 0:
            # Rows of matched positions are empty too, if no entry could be mapped.
            pivot_ids, pivot_probs = rows[0]
            empty = probs.sum(axis=1) == 0
            width = max(ids.shape[1], pivot_ids.shape[1])
            ids, pivot_ids = _widen(ids, width), _widen(pivot_ids, width)
            probs, pivot_probs = _widen(probs, width), _widen(pivot_probs, width)
            ids = np.where(empty[:, None], pivot_ids, ids)
            probs = np.where(empty[:, None], pivot_probs, probs)
        rows.append((ids, probs))
    return rows


def _widen(rows: Array, width: int, fill: float = 0) -> Array:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=fill)


def _probabilities(logprobs: Array, tail: Tail, temperature: float) -> Array:
    """Rows of log-probabilities as probabilities; a row without an entry stays zero."""
    best = logprobs.max(axis=1, keepdims=True)
    heated = np.exp((logprobs - np.where(np.isneginf(best), 0, best)) / temperature)
    total = heated.sum(axis=1, keepdims=True)
    share = heated / np.where(total > 0, total, 1.0)
    if tail == "renormalize":
        return share
    return share * np.minimum(np.exp(logprobs).sum(axis=1, keepdims=True), 1.0)

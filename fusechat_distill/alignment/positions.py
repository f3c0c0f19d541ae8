"""Which positions of two tokenizations match, and the source's distributions at the pivot's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusechat_distill.alignment.vocabularies import PairCounts, VocabularyMap, collapse
from fusechat_distill.text.scored import ScoredResponse
from fusechat_distill.text.tokens import Vocabulary

Positions = Literal["bytes", "dtw"]

BLOCK = 1 << 17
"""Entries mapped at a time, so that memory doesn't grow with k."""


def match_positions(
    pivot_ends: NDArray[np.integer], source_ends: NDArray[np.integer]
) -> NDArray[np.int64]:
    """For each pivot end offset the index of the source position with the same end offset.

    Two positions match if they have consumed the same text.

    Args:
        pivot_ends, source_ends: [n] and [m], rising; negative offsets are unknown and match
            nothing.

    Returns:
        [n] int64, the last of several source positions with one offset, -1 where there is none.
    """
    pivot_ends, source_ends = np.asarray(pivot_ends), np.asarray(source_ends)
    known = np.flatnonzero(source_ends >= 0)
    if not len(known):
        return np.full(len(pivot_ends), -1, dtype=np.int64)
    offsets = source_ends[known]
    at = np.searchsorted(offsets, pivot_ends, side="right") - 1
    equal = (at >= 0) & (offsets[at] == pivot_ends) & (pivot_ends >= 0)
    return np.where(equal, known[at], -1)


def dtw(pivot_tokens: Sequence[str], source_tokens: Sequence[str]) -> NDArray[np.int64]:
    """For each pivot token the source token that the papers' alignment pairs it with, [n].

    Dynamic time warping (FuseLLM, arXiv 2401.10491): the cost of a pair is the edit distance of the
    two tokens without their white space (a special token is ""); of equally cheap paths the
    diagonal is preferred, then the one that goes back in the source. -1 where a token or its
    partner has several partners. O(n·m) time and memory, without a Python inner loop.
    """
    n, m = len(pivot_tokens), len(source_tokens)
    pairs = np.full(n, -1, dtype=np.int64)
    if not n or not m:
        return pairs
    # total[i, j]: the cost of the cheapest path to the pair of source token i and pivot token j.
    costs, rows, columns = _costs(source_tokens, pivot_tokens)
    far = np.int64(1) << 40
    total = np.empty((m, n), dtype=np.int64)
    above = np.full(n + 1, far)
    above[0] = 0
    for i in range(m):
        cost = costs[rows[i]][columns]
        # D[j] = c[j] + min(diagonal, up, D[j - 1]): with C the running sum of c this is
        # C[j] + the running minimum of min(diagonal, up)[l] - C[l - 1].
        running = np.cumsum(cost)
        entry = np.minimum(above[:-1], above[1:]) - running + cost
        total[i] = running + np.minimum.accumulate(entry)
        above[0] = far
        above[1:] = total[i]
    # Back along the cheapest path, counting each token's partners.
    i, j = m - 1, n - 1
    source_partners = np.zeros(m, dtype=np.int64)
    pivot_partners = np.zeros(n, dtype=np.int64)
    while True:
        source_partners[i] += 1
        pivot_partners[j] += 1
        pairs[j] = i
        if i == 0 and j == 0:
            break
        diagonal = total[i - 1, j - 1] if i and j else far
        up = total[i - 1, j] if i else far
        left = total[i, j - 1] if j else far
        if diagonal <= up and diagonal <= left:
            i, j = i - 1, j - 1
        elif up <= left:
            i -= 1
        else:
            j -= 1
    pairs[(pivot_partners > 1) | (source_partners[pairs] > 1)] = -1
    return pairs


def _costs(
    left: Sequence[str], right: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Edit distances between the distinct tokens, and the index of each token among these."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def distinct(tokens: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
        index: dict[str, int] = {}
        where = [index.setdefault("".join(token.split()), len(index)) for token in tokens]
        return list(index), np.array(where, dtype=np.int64)

    lefts, rows = distinct(left)
    rights, columns = distinct(right)
    costs = cdist(lefts, rights, scorer=Levenshtein.distance).astype(np.int64)
    return costs, rows, columns


@dataclass(frozen=True, eq=False)
class Responses:
    """Many responses of one model end to end: R responses, T tokens, k entries a token.

    State t predicts token t. Response r has the tokens `offsets[r]` to `offsets[r + 1]`; the other
    fields are those of `conversations.Response` and `scored.ScoredResponse`.
    """

    offsets: NDArray[np.int64]
    begins: NDArray[np.int64]
    limits: NDArray[np.int64]
    """[R], `end` of each response."""
    stopped: NDArray[np.bool_]
    """[R], whether the last token is the response's stop."""
    pending: tuple[bytes, ...]
    tokens: NDArray[np.int64]
    ends: NDArray[np.int64]
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float16]
    gold_logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, responses: Sequence[ScoredResponse]) -> Responses:
        """Concatenate at least one response."""
        return cls(
            offsets=np.cumsum([0, *(len(r.tokens) for r in responses)]),
            begins=np.array([r.begin for r in responses], dtype=np.int64),
            limits=np.array([r.end for r in responses], dtype=np.int64),
            stopped=np.array([r.stop != "none" for r in responses]),
            pending=tuple(r.pending for r in responses),
            tokens=np.concatenate([r.tokens for r in responses]).astype(np.int64),
            ends=np.concatenate([r.ends for r in responses]).astype(np.int64),
            ids=np.concatenate([r.ids for r in responses]),
            logprobs=np.concatenate([r.logprobs for r in responses]),
            gold_logprobs=np.concatenate([r.gold_logprobs for r in responses]),
        )

    @cached_property
    def response(self) -> NDArray[np.int64]:
        """[T], which response each token belongs to."""
        return np.repeat(np.arange(len(self.begins)), np.diff(self.offsets))

    @cached_property
    def at(self) -> NDArray[np.int64]:
        """[T], the number of the answer's bytes before each state; -1: unknown, or past the answer.

        Of several states at one byte all but the last have -1.
        """
        at = np.empty(len(self.tokens), dtype=np.int64)
        at[1:] = self.ends[:-1]
        at[self.offsets[:-1]] = self.begins
        same = (at[:-1] == at[1:]) & (self.response[:-1] == self.response[1:])
        at[:-1][same] = -1
        return at

    @cached_property
    def is_begin(self) -> NDArray[np.bool_]:
        """[T], the state before the response's first token."""
        first = np.zeros(len(self.tokens), dtype=np.bool_)
        first[self.offsets[:-1]] = True
        return first

    @cached_property
    def is_end(self) -> NDArray[np.bool_]:
        """[T], the state at the response's last byte: it predicts the stop."""
        return (self.at == self.limits[self.response]) & self.stopped[self.response]

    @cached_property
    def loss_before(self) -> NDArray[np.float64]:
        """[T + 1], sums of the gold log-probabilities of all tokens before each."""
        return np.concatenate([[0.0], np.cumsum(self.gold_logprobs, dtype=np.float64)])


def match_states(
    pivot: Responses,
    source: Responses,
    positions: Positions = "bytes",
    vocabularies: tuple[Vocabulary, Vocabulary] | None = None,
) -> NDArray[np.int64]:
    """For each of the pivot's states the source's state after the same text, [T], or -1.

    Response r of one is response r of the other. First states match only first states, and states
    at a response's last byte only such states: where one template trims what the other keeps, the
    texts differ. `dtw` is the papers' alignment of the tokens; it needs both vocabularies (pivot's,
    source's).
    """
    if positions == "dtw":
        assert vocabularies is not None
        return _match_dtw(pivot, source, *vocabularies)
    bases = _bases(pivot, source)

    # One number for a response, a byte in it and the kind of state there: equal numbers match.
    def keys(side: Responses) -> NDArray[np.int64]:
        kind = side.is_begin + 2 * side.is_end.astype(np.int64)
        return np.where(side.at >= 0, 4 * (bases[side.response] + side.at) + kind, -1)

    return match_positions(keys(pivot), keys(source))


def _bases(pivot: Responses, source: Responses) -> NDArray[np.int64]:
    """[R], a base for each response's offsets, which keeps them apart from other responses'."""
    room = np.maximum(pivot.limits, source.limits) + 1
    return np.cumsum(room) - room


def _match_dtw(
    pivot: Responses, source: Responses, pivot_vocabulary: Vocabulary, source_vocabulary: Vocabulary
) -> NDArray[np.int64]:
    matches = np.empty(len(pivot.tokens), dtype=np.int64)
    for r in range(len(pivot.begins)):
        p, s = pivot.offsets[r], source.offsets[r]
        p_stop, s_stop = pivot.offsets[r + 1], source.offsets[r + 1]
        pairs = dtw(
            _strings(pivot.tokens[p:p_stop], pivot_vocabulary),
            _strings(source.tokens[s:s_stop], source_vocabulary),
        )[:-1]
        # Tokens i and j are paired, so the states after them match; they predict i + 1 and j + 1.
        matches[p + 1 : p_stop] = np.where(pairs >= 0, s + pairs + 1, -1)
        matches[p] = s
    return matches


def _strings(tokens: NDArray[np.int64], vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.tokens[i].decode(errors="surrogateescape") for i in tokens.tolist()]


def pair_counts(pivot: Responses, source: Responses, matches: NDArray[np.int64]) -> PairCounts:
    """The pairs of tokens that begin after the same text: the statistics of FuseChat's MS.

    Without stops, and without first tokens that begin with different pending texts.
    """
    usable = (matches >= 0) & ~pivot.is_end & ~_pending_differs(pivot, source)
    rows = np.flatnonzero(usable)
    return PairCounts.of(source.tokens[matches[rows]], pivot.tokens[rows])


def _pending_differs(pivot: Responses, source: Responses) -> NDArray[np.bool_]:
    """[T], the pivot's first states of responses whose pending texts differ."""
    unequal = np.array([p != s for p, s in zip(pivot.pending, source.pending, strict=True)])
    return pivot.is_begin & unequal[pivot.response]


@dataclass(frozen=True, eq=False)
class Aligned:
    """A source's distributions at the pivot's matched states."""

    matches: NDArray[np.integer]
    """[T] index into the source's tokens for each of the pivot's, -1 where none matches."""
    ids: NDArray[np.uint32]
    """[M, k] pivot tokens at the M matched states in order, most probable first; unused entries
    are 0."""
    logprobs: NDArray[np.float16]
    """[M, k] natural; unused entries are -inf."""


def align(
    pivot: Responses, source: Responses, vocabulary: VocabularyMap, positions: Positions = "bytes"
) -> Aligned:
    """The source's distribution, in pivot tokens, at every matched state of the pivot.

    In `bytes` mode, and in every mode at the end of a response, the gold path is kept whole: the
    pivot's gold token gets the product of the source's gold probabilities up to the source token
    that ends where it ends (for the stop, up to and including the source's stop), and the rest of
    the source's first gold token is mapped like any other entry. Entries on the same pivot token
    are added up. If both sides have the same vocabulary, distributions stay as they are, unless
    the pending text or the stop differs.
    """
    matches = match_states(pivot, source, positions, (vocabulary.pivot, vocabulary.source))
    rows = np.flatnonzero(matches >= 0)
    states = matches[rows]
    ids, logprobs = source.ids[states], source.logprobs[states]
    changed = np.ones(len(rows), dtype=np.bool_)
    if vocabulary.is_identity:
        changed = _pending_differs(pivot, source)[rows]
        changed |= pivot.is_end[rows] & (pivot.tokens[rows] != source.tokens[states])
        changed |= (vocabulary.lookup(ids) != ids).any(axis=1)  # a stop with another name
    path = _gold_path(pivot, source, rows, states)
    if vocabulary.mode != "bytes" or vocabulary.is_identity:
        path[~pivot.is_end[rows]] = np.nan
    todo = np.flatnonzero(changed)
    step = max(1, BLOCK // ids.shape[1])
    for start in range(0, len(todo), step):
        part = todo[start : start + step]
        ids[part], logprobs[part] = _mapped(
            pivot, source, vocabulary, rows[part], states[part], path[part]
        )
    return Aligned(matches, ids, logprobs)


def _mapped(
    pivot: Responses,
    source: Responses,
    vocabulary: VocabularyMap,
    rows: NDArray[np.int64],
    states: NDArray[np.int64],
    path: NDArray[np.float64],
) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """The entries at the pivot's states `rows`, the source's `states`, in pivot tokens, [M, k].

    `path` [M] is the probability of the pivot's gold token (`_gold_path`), NaN: as mapped.
    """
    # Every entry's pivot token, [M, k].
    entries = source.ids[states]
    mapped = vocabulary.lookup(entries)
    # At an answer's first state the two templates may leave different texts pending. These states
    # are looked up again, grouped by their two texts.
    begin = np.flatnonzero(pivot.is_begin[rows])
    pending: dict[tuple[bytes, bytes], list[int]] = {}
    for i, r in zip(begin.tolist(), pivot.response[rows[begin]].tolist(), strict=True):
        pending.setdefault((source.pending[r], pivot.pending[r]), []).append(i)
    for (source_pending, pivot_pending), group in pending.items():
        mapped[group] = vocabulary.lookup_pending(entries[group], source_pending, pivot_pending)
    probs = np.exp(source.logprobs[states].astype(np.float64))

    # The probability of the pivot's gold token is taken from the source's first gold token; the
    # rest stays with the other continuations of that.
    on_path = ~np.isnan(path)
    gold = (entries == source.tokens[states][:, None]) & on_path[:, None]
    left = np.exp(source.gold_logprobs[states].astype(np.float64)) - path
    probs = np.where(gold, np.maximum(left, 0.0)[:, None], probs)
    # The gold path is one more column, [M, k + 1]; entries on one pivot token are added up.
    projection = collapse(
        np.column_stack([mapped, pivot.tokens[rows]]),
        np.column_stack([probs, np.where(on_path, path, 0.0)]),
    )
    # The k most probable, as the store holds them: id 0 where there is no entry.
    k = entries.shape[1]
    with np.errstate(divide="ignore"):
        logprobs = np.log(projection.probs[:, :k]).astype(np.float16)
    ids = np.where(np.isneginf(logprobs), 0, projection.ids[:, :k])
    return ids.astype(np.uint32), logprobs


def _gold_path(
    pivot: Responses, source: Responses, rows: NDArray[np.int64], states: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[M], the source's probability of the text of the pivot's gold token.

    NaN where no source token ends where that token ends, so that it isn't known.
    """
    # The source token that ends where the pivot's gold token ends; for a stop the source's last.
    bases = _bases(pivot, source)
    pivot_ends = np.where(pivot.ends >= 0, bases[pivot.response] + pivot.ends, -1)[rows]
    source_ends = np.where(source.ends >= 0, bases[source.response] + source.ends, -1)
    last = match_positions(pivot_ends, source_ends)
    responses = pivot.response[rows]
    last = np.where(pivot.is_end[rows], source.offsets[responses + 1] - 1, last)
    # The sum of gold log-probabilities from the state's own token to that one, inclusive.
    known = last >= states
    total = source.loss_before[last + 1] - source.loss_before[states]
    return np.where(known, np.exp(np.minimum(total, 0.0)), np.nan)

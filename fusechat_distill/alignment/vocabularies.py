"""Maps from one vocabulary's tokens to another's, and distributions mapped with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusechat_distill.text.tokens import Vocabulary

DROPPED, EXACT, MAPPED, SPECIAL = 0, 1, 2, 3
"""How a source token is mapped: not at all, to the same bytes, to other bytes, by its role."""


class Projection(NamedTuple):
    """Distributions in pivot ids, most probable first (of equals the lower id)."""

    ids: NDArray[np.int64]
    """[..., k], unused entries are -1."""
    probs: NDArray[np.float64]
    """[..., k], unused entries are 0."""
    mass: NDArray[np.float64]
    """[...] the sum of `probs`; the rest of 1 is the tail."""


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """The pivot token that gets the probability of each source token.

    Ids beyond the source's tokenizer (a padded output layer) go to the tail. The constructors take
    the pivot's and the source's `Vocabulary`, and `specials`, source special id to pivot special id
    (`match_roles`); other special tokens go to the tail, unless the vocabularies are the same.
    """

    pivot: Vocabulary
    source: Vocabulary
    mode: str
    ids: NDArray[np.int64]
    """[source size], -1 for the tail."""
    kinds: NDArray[np.uint8]
    """[source size], how each was mapped: `DROPPED`, `EXACT`, `MAPPED` or `SPECIAL`."""

    @classmethod
    def from_em(
        cls, pivot: Vocabulary, source: Vocabulary, specials: Mapping[int, int] | None = None
    ) -> VocabularyMap:
        """Exact match: the pivot token of the same bytes, else none (FuseLLM's EM)."""
        return cls._build(pivot, source, specials, "em")

    @classmethod
    def from_mined(
        cls,
        pivot: Vocabulary,
        source: Vocabulary,
        specials: Mapping[int, int] | None = None,
        *,
        workers: int = -1,
    ) -> VocabularyMap:
        """Exact match, else the pivot token at the least edit distance (FuseLLM's MinED).

        Distances are between the tokens' characters (a byte outside valid UTF-8 counts as one);
        ties go to the lower id. `workers`: threads, -1 for all cores.
        """
        built = cls._build(pivot, source, specials, "mined")
        left = np.flatnonzero(source.text & (built.kinds == DROPPED))
        nearest = _nearest([_characters(source.tokens[i]) for i in left], pivot, workers)
        return built._with(left, nearest)

    @classmethod
    def from_counts(
        cls,
        pivot: Vocabulary,
        source: Vocabulary,
        counts: PairCounts,
        specials: Mapping[int, int] | None = None,
    ) -> VocabularyMap:
        """Exact match, else the pivot token that most often began where this source token began
        (FuseChat's MS); ties by edit distance, then the lower id; none if it never occurred."""
        built = cls._build(pivot, source, specials, "ms")
        # Pairs by source token, the most frequent first, then the lower pivot id.
        usable = source.text[counts.source] & pivot.text[counts.pivot]
        usable &= built.kinds[counts.source] == DROPPED
        sources, pivots, number = (column[usable] for column in counts)
        order = np.lexsort((pivots, -number, sources))
        sources, pivots, number = sources[order], pivots[order], number[order]
        # Groups of one source token: where each starts, its size, which pairs are as frequent as
        # its first.
        first = np.flatnonzero(np.diff(sources, prepend=-1))
        sizes = np.diff(first, append=len(sources))
        best = number == np.repeat(number[first], sizes)
        chosen = pivots[first]
        several = np.flatnonzero(sizes > 1)
        for group in several[best[first[several] + 1]].tolist():
            members = slice(first[group], first[group] + sizes[group])
            tied = pivots[members][best[members]]  # ascending, so the first of equals is the lowest
            text = _characters(source.tokens[sources[first[group]]])
            nearest, _ = _nearest_of([text], [_characters(pivot.tokens[i]) for i in tied], 1)
            chosen[group] = tied[nearest[0]]
        return built._with(sources[first], chosen)

    @classmethod
    def from_bytes(
        cls,
        pivot: Vocabulary,
        source: Vocabulary,
        first: NDArray[np.int64],
        specials: Mapping[int, int] | None = None,
    ) -> VocabularyMap:
        """The pivot's first token of the source token's bytes.

        `first` [source size]: `tokens.first_tokens(pivot_tokenizer, source.tokens)`.
        """
        built = cls._build(pivot, source, specials, "bytes")
        text = np.flatnonzero(source.text)
        return built._with(text, first[text])

    @classmethod
    def _build(
        cls, pivot: Vocabulary, source: Vocabulary, specials: Mapping[int, int] | None, mode: str
    ) -> VocabularyMap:
        """Exact matches and roles, or the identity if the vocabularies are the same."""
        ids = np.full(len(source), -1, dtype=np.int64)
        if source.fingerprint == pivot.fingerprint:
            ids[:] = np.arange(len(source))
        else:
            exact = pivot.by_bytes
            for i in np.flatnonzero(source.text).tolist():
                ids[i] = exact.get(source.tokens[i], -1)
        kinds = np.where(ids >= 0, np.where(source.text, EXACT, SPECIAL), DROPPED)
        for source_id, pivot_id in (specials or {}).items():
            ids[source_id], kinds[source_id] = pivot_id, SPECIAL
        return cls(pivot, source, mode, ids, kinds.astype(np.uint8))

    def _with(self, sources: NDArray[np.int64], pivots: NDArray[np.int64]) -> VocabularyMap:
        """The same map with these source tokens mapped to these pivot tokens."""
        if self.is_identity:
            return self
        ids, kinds = self.ids.copy(), self.kinds.copy()
        ids[sources] = pivots
        exact = [
            p >= 0 and self.pivot.tokens[p] == self.source.tokens[s]
            for s, p in zip(sources.tolist(), pivots.tolist(), strict=True)
        ]
        kinds[sources] = np.where(pivots < 0, DROPPED, np.where(exact, EXACT, MAPPED))
        return VocabularyMap(self.pivot, self.source, self.mode, ids, kinds)

    @property
    def is_identity(self) -> bool:
        """Whether both sides have the same vocabulary, so that text tokens map to themselves."""
        return self.source.fingerprint == self.pivot.fingerprint

    def lookup(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pivot ids of source ids, of the same shape; -1 for the tail."""
        inside = (ids >= 0) & (ids < len(self.ids))
        if inside.all():
            return self.ids[ids]
        return np.where(inside, self.ids[np.where(inside, ids, 0)], -1)

    def lookup_pending(
        self, ids: NDArray[np.integer], source_pending: bytes, pivot_pending: bytes
    ) -> NDArray[np.int64]:
        """Pivot ids of source ids at an answer's first state, where a template's text is pending.

        Source tokens that don't begin with the source's pending text go to the tail. In the others
        the pivot's pending text replaces the source's. The result is the pivot token of these
        bytes, else what the source token of these bytes maps to, else, in `bytes` mode, the longest
        pivot token that they begin with. Equal pending texts change nothing.
        """
        if source_pending == pivot_pending:
            return self.lookup(ids)
        distinct, where = np.unique(ids, return_inverse=True)
        mapped = [self._pending(i, source_pending, pivot_pending) for i in distinct.tolist()]
        return np.array(mapped, dtype=np.int64)[where].reshape(ids.shape)

    def _pending(self, token: int, source_pending: bytes, pivot_pending: bytes) -> int:
        if not (token < len(self.source) and self.source.text[token]):
            return -1
        text = self.source.tokens[token]
        if not text.startswith(source_pending):
            return -1
        text = pivot_pending + text[len(source_pending) :]
        mapped = self.pivot.by_bytes.get(text, -1)
        if mapped < 0 and text in self.source.by_bytes:
            mapped = int(self.ids[self.source.by_bytes[text]])
        if mapped < 0 and self.mode == "bytes":
            mapped = self.pivot.longest_prefix(text)
        return mapped

    def project(self, ids: NDArray[np.integer], probs: NDArray[np.floating]) -> Projection:
        """The source's distributions in pivot ids; probabilities of the same token are added up.

        Args:
            ids, probs: [..., k], probabilities and not their logarithms. Probability that goes to
                the tail is missing from `mass`.
        """
        ids, probs = np.asarray(ids), np.asarray(probs)
        k = ids.shape[-1]
        mapped = self.lookup(ids).reshape(-1, k)
        flat = collapse(mapped, probs.reshape(-1, k).astype(np.float64))
        return Projection(
            flat.ids.reshape(ids.shape),
            flat.probs.reshape(ids.shape),
            flat.mass.reshape(ids.shape[:-1]),
        )


def collapse(ids: NDArray[np.int64], probs: NDArray[np.float64]) -> Projection:
    """Add up entries with the same id in each row of [n, k], drop id -1, sort by probability."""
    used = (ids >= 0) & (probs > 0)
    ids, probs = np.where(used, ids, -1), np.where(used, probs, 0.0)
    # Only rows with equal ids are added up.
    ordered = np.sort(ids, axis=1)
    collide = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    rows = np.flatnonzero(collide)
    if len(rows):
        ids[rows], probs[rows] = _added(ids[rows], probs[rows])
    # Rows that are in order already, the common case, stay as they are.
    higher, lower = probs[:, :-1], probs[:, 1:]
    rows = np.flatnonzero(
        ((higher < lower) | ((higher == lower) & (ids[:, :-1] > ids[:, 1:]))).any(axis=1)
    )
    if len(rows):
        order = np.lexsort((ids[rows], -probs[rows]), axis=1)
        ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
        probs[rows] = np.take_along_axis(probs[rows], order, axis=1)
    return Projection(ids, probs, probs.sum(axis=1))


def _added(
    ids: NDArray[np.int64], probs: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    probs = np.take_along_axis(probs, order, axis=1)
    begins = np.ones(ids.shape, dtype=np.bool_)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(begins.ravel())
    sums = np.zeros(ids.size)
    sums[starts] = np.add.reduceat(probs.ravel(), starts)
    used = begins & (ids >= 0)
    return np.where(used, ids, -1), np.where(used, sums.reshape(ids.shape), 0.0)


class PairCounts(NamedTuple):
    """How often a source and a pivot token began at the same offset; three arrays [n]."""

    source: NDArray[np.int64]
    pivot: NDArray[np.int64]
    number: NDArray[np.int64]

    @classmethod
    def empty(cls) -> PairCounts:
        return cls(*(np.zeros(0, dtype=np.int64) for _ in range(3)))

    @classmethod
    def of(cls, source: NDArray[np.integer], pivot: NDArray[np.integer]) -> PairCounts:
        """Of pairs (source[i], pivot[i])."""
        once = np.ones(len(source), dtype=np.int64)
        return cls.empty() + cls(source.astype(np.int64), pivot.astype(np.int64), once)

    def __add__(self, other: object) -> PairCounts:
        """The sums of both; memory is that of the distinct pairs."""
        if not isinstance(other, PairCounts):
            return NotImplemented
        keys = np.concatenate([(counts.source << 32) | counts.pivot for counts in (self, other)])
        pairs, where = np.unique(keys, return_inverse=True)
        number = np.zeros(len(pairs), dtype=np.int64)
        np.add.at(number, where, np.concatenate([self.number, other.number]))
        return PairCounts(pairs >> 32, pairs & 0xFFFFFFFF, number)


def match_roles(pivot: Mapping[str, int], source: Mapping[str, int]) -> dict[int, int]:
    """Source special id to pivot special id by role, whatever the tokens are called.

    Roles as in `conversations.Renderer.roles`; of a token's roles the first of end_of_turn, bos,
    eos, pad counts.
    """
    specials: dict[int, int] = {}
    for role in ("end_of_turn", "bos", "eos", "pad"):
        if role in pivot and role in source:
            specials.setdefault(source[role], pivot[role])
    return specials


def _characters(token: bytes) -> str:
    return token.decode(errors="surrogateescape")


def _nearest(texts: Sequence[str], pivot: Vocabulary, workers: int) -> NDArray[np.int64]:
    """For each text the pivot token at the least edit distance, of equals the lowest id.

    A token whose length differs by d is at least at distance d. So the candidates are those with a
    length in a window, which is widened for the texts that a narrower one does not settle.
    """
    nearest = np.full(len(texts), -1, dtype=np.int64)
    candidates = np.array(sorted(pivot.by_bytes.values()), dtype=np.int64)
    tokens = [_characters(pivot.tokens[i]) for i in candidates.tolist()]
    token_lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if not tokens:
        return nearest
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        window = 2
        while len(rows):
            near = np.flatnonzero(np.abs(token_lengths - length) <= window)
            if len(near):
                best, distance = _nearest_of(
                    [texts[i] for i in rows.tolist()], [tokens[i] for i in near.tolist()], workers
                )
                # No token outside the window is nearer than the window is wide.
                settled = (distance <= window) | (len(near) == len(tokens))
                nearest[rows[settled]] = candidates[near[best[settled]]]
                rows = rows[~settled]
            window *= 2
    return nearest


def _nearest_of(
    texts: Sequence[str], tokens: Sequence[str], workers: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each text the index of the token at the least edit distance, the first of equals, and
    the distance."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    size = max(1, (1 << 26) // len(tokens))  # 64 MB of distances at a time
    longest = max(map(len, [*tokens, *texts]))
    best, distance = [], []
    for start in range(0, len(texts), size):
        distances = cdist(
            texts[start : start + size],
            tokens,
            scorer=Levenshtein.distance,
            dtype=np.uint8 if longest < 256 else np.uint32,
            workers=workers,
        )
        best.append(distances.argmin(axis=1))
        distance.append(distances.min(axis=1).astype(np.int64))
    return np.concatenate(best), np.concatenate(distance)

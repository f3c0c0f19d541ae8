"""The protocol of the engines: token ids in, distributions at every response token out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import FusechatError


@dataclass(frozen=True)
class Request:
    """One rendered conversation.

    Row r of its scores is the model's distribution after `input_ids[: positions[r] + 1]`.
    """

    input_ids: NDArray[np.integer[Any]]
    """[L] token ids."""
    positions: NDArray[np.integer[Any]]
    """[R] indices into `input_ids`, ascending, each below L - 1: the gold token of position p is
    `input_ids[p + 1]`."""
    sets: tuple[tuple[int, NDArray[np.integer[Any]]], ...] = ()
    """(row, token ids): sets of tokens whose total probability at that row is wanted."""

    @property
    def gold(self) -> NDArray[np.integer[Any]]:
        """[R] the token that follows each position."""
        return self.input_ids[self.positions + 1]


@dataclass(frozen=True)
class Scores:
    """A model's distributions at R positions; natural log-probabilities over its vocabulary."""

    ids: NDArray[np.uint32]
    """[R, k] token ids, most probable first; of equals the lower id first."""
    logprobs: NDArray[np.float32]
    """[R, k]"""
    gold_logprobs: NDArray[np.float32]
    """[R] log-probability of the gold token."""
    set_logprobs: NDArray[np.float32] | None = None
    """[number of sets] log-probability of each of the request's sets, -inf for an empty one; None
    from an engine without whole distributions (vLLM)."""

    @property
    def finite(self) -> bool:
        """Whether the model's output was free of NaN and Inf."""
        return bool(np.isfinite(self.logprobs).all() and np.isfinite(self.gold_logprobs).all())


class Scorer(Protocol):
    """An engine. `score` yields one `Scores` for each request, in the requests' order.

    Each has `scoring.top_k` entries per position, all of them ids that the tokenizer has. A sample
    whose scores contain NaN or Inf is left out of the store; any other failure should raise.
    """

    def score(self, requests: Sequence[Request]) -> Iterator[Scores]: ...


def checked_scores(scorer: Scorer, requests: Sequence[Request], top_k: int) -> list[Scores]:
    """The engine's scores of the requests, checked before they are stored.

    Raises:
        FusechatError: their number, a shape, the order or the scale is wrong.
    """
    results = list(scorer.score(requests))
    engine = type(scorer).__name__
    if len(results) != len(requests):
        raise FusechatError(f"{engine}: gave {len(results)} scores for {len(requests)} requests")
    for request, scores in zip(requests, results, strict=True):
        rows = len(request.positions)
        shapes = [a.shape for a in (scores.ids, scores.logprobs, scores.gold_logprobs)]
        expected = [(rows, top_k), (rows, top_k), (rows,)]
        if shapes != expected:
            raise FusechatError(f"{engine}: gave scores of shapes {shapes}, not {expected}")
        if scores.finite:
            sorted_ = bool((np.diff(scores.logprobs, axis=1) <= 0).all())
            # Probabilities may exceed a sum of 1 by rounding only.
            if not sorted_ or (np.exp(np.minimum(scores.logprobs, 1)).sum(1) > 1.01).any():
                raise FusechatError(
                    f"{engine}: gave what are no natural log-probabilities, most probable first"
                )
    return results

"""Answers with one model's scores: its k most probable tokens at every position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusechat_distill.text.conversations import Response


@dataclass(frozen=True, eq=False)
class ScoredResponse(Response):
    """One assistant answer of n tokens, and the k most probable tokens at each position."""

    tokens: NDArray[np.uint32]
    """[n] the gold tokens."""
    ids: NDArray[np.uint32]
    """[n, k] most probable first."""
    logprobs: NDArray[np.float16]
    """[n, k] natural log-probabilities over the model's whole vocabulary."""
    gold_logprobs: NDArray[np.float32]
    """[n]"""


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """A conversation's scored answers; `key` and `row` as in `conversations.Conversation`."""

    key: str
    row: int
    responses: tuple[ScoredResponse, ...]

    def column(self, name: str) -> NDArray[Any]:
        """A field of all responses, end to end: [n] or [n, k] for the sample's n tokens."""
        return np.concatenate([getattr(response, name) for response in self.responses])

    @property
    def turns(self) -> NDArray[np.int64]:
        """[n], the turn that each token is part of."""
        lengths = [len(response.tokens) for response in self.responses]
        return np.repeat([response.turn for response in self.responses], lengths)

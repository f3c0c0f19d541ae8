"""How many bits a model needs for an answer's text, so that tokenizers and templates don't matter.

The model predicts the answer's bytes from all that stands before them; what the template puts
around the answer is no part of it. Three things make that more than a sum over tokens:

- A first token may begin with text of the template (`Assistant:` + `▁Hello`). The probability that
  the next token begins with that text is divided out, since that text is known.
- A last token may run over the answer's end (`.` and the template's line breaks in one). What
  counts is the probability that the next token begins with what is left of the answer.
- Ending the answer is a bet on the template as well: the tokens after the text, up to and including
  the stop, and what a last token adds beyond the text, are counted apart, as `end_bits`.

The text's probability is that of its canonical tokenization, as everywhere: other ways to spell
the same bytes are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusechat_distill.scoring.engine import Request, Scores

if TYPE_CHECKING:
    from fusechat_distill.text.conversations import Conversation, Rendering, Response
    from fusechat_distill.text.tokens import Vocabulary


class AnswerBits(NamedTuple):
    """What one model needs for one answer."""

    turn: int
    """Index into the conversation's messages."""
    num_bytes: int
    """UTF-8 bytes of the answer that the model saw: `max_length` and templates that trim shorten
    it."""
    tokens: int
    """The model's tokens that hold them."""
    bits: float
    end_bits: float | None
    """For ending the answer where the text does; None where the template has no stop, or the answer
    is cut."""


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """A rendering's answers, ready to be scored and then to be counted."""

    request: Request
    _parts: Sequence[_Part]

    def count(self, scores: Scores) -> list[AnswerBits]:
        """The answers' bits, in their order, from a scorer that knows `set_logprobs`."""
        assert scores.set_logprobs is not None
        gold = scores.gold_logprobs.astype(np.float64)
        sets = scores.set_logprobs.astype(np.float64)
        return [part.count(gold, sets) for part in self._parts]


def answer_request(
    conversation: Conversation, rendering: Rendering, vocabulary: Vocabulary
) -> AnswerRequest:
    """What is to be scored of a conversation, as one model sees it.

    `vocabulary` is that of the model's tokenizer; `rendering` has at least one answer.
    """
    sets: list[tuple[int, np.ndarray]] = []
    parts = []
    row = 0
    for response in rendering.responses:
        answer = conversation.messages[response.turn].content.encode()
        parts.append(_part(response, answer, rendering, vocabulary, row, sets))
        row += len(response.ends)
    return AnswerRequest(Request(rendering.input_ids, rendering.positions(), tuple(sets)), parts)


@dataclass(frozen=True)
class _Part:
    """Where one answer's numbers stand in a request's scores."""

    turn: int
    num_bytes: int
    row: int
    """Of the answer's first token."""
    tokens: int
    total: int
    """With those after the text."""
    stops: bool
    opening: int | None
    """The set of tokens that begin with the template's text before the answer."""
    closing: int | None
    """The set of tokens that begin with the answer's last bytes, which the last token runs over."""

    def count(self, gold: np.ndarray, sets: np.ndarray) -> AnswerBits:
        # Log-probability of the tokens that hold the text, and of those after them.
        end = self.row + self.tokens
        text, after = gold[self.row : end].sum(), gold[end : self.row + self.total].sum()
        # The last token runs over the end: only its beginning is text.
        if self.closing is not None:
            beyond = gold[end - 1] - sets[self.closing]
            text, after = text - beyond, after + beyond
        # The template's text that the first token begins with is known, not predicted.
        if self.opening is not None:
            text -= sets[self.opening]
        return AnswerBits(
            self.turn,
            self.num_bytes,
            self.tokens,
            float(-text / math.log(2)),
            float(-after / math.log(2)) if self.stops else None,
        )


def _part(
    response: Response,
    answer: bytes,
    rendering: Rendering,
    vocabulary: Vocabulary,
    row: int,
    sets: list[tuple[int, np.ndarray]],
) -> _Part:
    """One answer's part of a request, to whose `sets` it adds those that it needs."""
    ids = rendering.input_ids[response.token_slice()]
    tokens = _text_tokens(response, vocabulary.lengths[ids])
    ends = response.ends
    last = tokens - 1
    # Where the last token begins in the answer (below 0: not known), and the bytes from there.
    state = response.begin if last == 0 else int(ends[last - 1])
    rest = (response.pending if last == 0 else b"") + answer[state : response.end]
    # Where a normalizer changed the text, the tokens don't spell it and are counted whole.
    opening = closing = None
    if response.pending and vocabulary.tokens[ids[0]].startswith(response.pending):
        opening = len(sets)
        sets.append((row, vocabulary.beginning_with(response.pending)))
    if ends[last] < 0 <= state and rest and vocabulary.tokens[ids[last]].startswith(rest):
        closing = len(sets)
        sets.append((row + last, vocabulary.beginning_with(rest)))
    return _Part(
        turn=response.turn,
        num_bytes=(int(ends[last]) if ends[last] >= 0 else response.end) - response.begin,
        row=row,
        tokens=tokens,
        total=len(ends),
        stops=response.stop != "none",
        opening=opening,
        closing=closing,
    )


def _text_tokens(response: Response, lengths: np.ndarray) -> int:
    """How many of the answer's tokens hold a byte of it; `lengths` are all its tokens' bytes."""
    count = len(response.ends)
    if response.stop == "none":
        return count
    if response.stop == "text":
        return count - 1
    if len(exact := np.flatnonzero(response.ends == response.end)):
        return int(exact[0]) + 1
    # The last one runs over the end: as many as it takes to hold what is left.
    known = np.flatnonzero(response.ends >= 0)
    first = int(known[-1]) + 1 if len(known) else 0
    begin = int(response.ends[known[-1]]) if len(known) else response.begin - len(response.pending)
    held = np.cumsum(lengths[first : count - 1]) >= response.end - begin
    return first + int(np.argmax(held)) + 1 if held.any() else count - 1

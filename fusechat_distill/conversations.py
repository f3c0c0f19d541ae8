"""Dataset rows to conversations, conversations to token ids with the bytes of every answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stop = Literal["special", "text", "none"]
"""What ends a response: a special token, a token of plain text, or nothing (cut, or no token)."""


class Message(NamedTuple):
    role: str  # system, user, assistant or tool
    content: str


@dataclass(frozen=True)
class Conversation:
    """One row of the dataset.

    `key` is a hash of the messages (32 hex digits): rows of all models' stores join by it, and
    two rows with the same messages have the same key. `row` is the row's index in the dataset.
    """

    key: str
    row: int
    messages: tuple[Message, ...]


class Rejected(NamedTuple):
    """A row that is left out, and why."""

    row: int
    reason: str


class Conversations(Sequence[Conversation]):
    """The usable rows of a dataset, in its order; a row is read when it is asked for.

    `rejected` lists the rows left out; `layout` says which columns were read (`messages`,
    `conversations`, `prompt/completion`); `fingerprint` is a hash of all keys in order.
    """

    rejected: tuple[Rejected, ...]
    layout: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index): ...


def open_conversations(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
    max_samples: int | None = None,
) -> Conversations:
    """Open a dataset: hub name, local JSON / JSONL / Parquet / Arrow file or folder, saved folder.

    Raises `RequestError` where it can't be opened, has no split of that name, no known layout
    (`messages`, ShareGPT `conversations`, prompt/completion) or not one usable row.
    """
    raise NotImplementedError


class Cut(NamedTuple):
    """Where `max_length` ends a conversation: message `turn`, `byte` of its content.

    Byte 0 of a turn keeps all turns before it whole, with their stops.
    """

    turn: int
    byte: int


@dataclass(frozen=True, eq=False)
class Response:
    """An assistant's answer as one model sees it: n tokens that are predicted and scored.

    Token i is `input_ids[first + i]`; the state that predicts it is the one after
    `input_ids[first + i - 1]`, `first` >= 1. Offsets are in the UTF-8 bytes of the dataset's own
    answer `messages[turn].content`. The n tokens are: those that hold a byte of the response, then
    (where there is a stop) those of the template up to and including the stop.
    """

    turn: int
    """Index into the conversation's messages."""
    begin: int
    end: int
    """The bytes of the answer that the template rendered: a template that trims starts or ends
    inside it."""
    first: int
    ends: NDArray[np.int32]
    """[n], the answer's byte where each token ends. -1: not a byte offset of the answer, or not
    known: it runs over the response's end, lies after it, or a normaliser changed its text.
    State i, the one that predicts token i, is at `begin` for i = 0 and at `ends[i - 1]` after."""
    pending: bytes
    """Text between the state at `begin` and the response's first byte, that token 0 begins with."""
    stop: Stop
    """Whether token n - 1 is the stop, and of which kind."""

    def tokens(self) -> slice:
        """The response's tokens in `input_ids`: `gold = input_ids[response.tokens()]`."""
        return slice(self.first, self.first + len(self.ends))

    def states(self) -> slice:
        """The tokens after which the scored states are: logits[states()] predict the gold."""
        return slice(self.first - 1, self.first - 1 + len(self.ends))


class Skipped(NamedTuple):
    """An assistant turn that is context only for this model, and why."""

    turn: int
    reason: str


@dataclass(frozen=True, eq=False)
class Rendering:
    """A conversation as one model sees it."""

    input_ids: NDArray[np.int64]
    """[length], ends with the last scored token: what follows it is not kept."""
    responses: tuple[Response, ...]
    """In order; empty where nothing can be scored."""
    skipped: tuple[Skipped, ...] = ()
    system_folded: bool = False
    """The template takes no system prompt; its text went before the first user message."""
    problem: str | None = None
    """Why the whole conversation is left out for this model (the template refuses it)."""

    def cut_to(self, max_length: int) -> tuple[Rendering, Cut | None]:
        """Keep at most `max_length` tokens (the pivot's rendering); None if all of it fits."""
        raise NotImplementedError

    def cut_at(self, cut: Cut | None) -> Rendering:
        """Keep what ends at or before the pivot's cut (a source's rendering)."""
        raise NotImplementedError


class Renderer:
    """Renders conversations for one tokenizer under one chat template.

    `template`: the pivot's template text for `template: pivot`; None for the tokenizer's own.
    Raises `RequestError` where there is no template or the tokenizer's bytes can't be told.
    `fingerprint` is a hash of everything that a rendering depends on: tokenizer, template, date.
    """

    fingerprint: str

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, name: str = ""
    ) -> None:
        raise NotImplementedError

    def __call__(self, conversations: Sequence[Conversation]) -> list[Rendering]:
        """One rendering for each conversation, in order."""
        raise NotImplementedError

    def roles(self) -> dict[str, int]:
        """Special token ids by role: `end_of_turn` (from a rendered probe), `bos`, `eos`, `pad`."""
        raise NotImplementedError


def render(
    conversations: Sequence[Conversation],
    renderer: Renderer,
    pivot: Renderer,
    max_length: int,
) -> Iterator[Rendering]:
    """What a model scores: its renderings, cut where the pivot's are `max_length` tokens long.

    Streams in blocks; for the pivot itself pass the same renderer twice.
    """
    raise NotImplementedError

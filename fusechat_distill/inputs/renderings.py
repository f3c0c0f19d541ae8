"""One model's renderings, cut at `max_length`: each made once, as far as there is room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fusechat_distill.text.conversations import Conversation, Cut, Renderer, Rendering

ROOM = 256 * 2**20
"""Bytes of renderings that one process keeps: of 100,000 conversations of 600 tokens."""

OBJECTS = 1000
"""Bytes that a rendering takes beside its arrays, about."""


class Renderings:
    """Conversations as the pivot sees them, which are scored and fused, and cut all sources.

    Where a conversation is cut is kept of every one. Its rendering is kept while there is room and
    never dropped for another one: stages go through the conversations in the same order, so that
    the one least recently used is the next one to be used.
    """

    def __init__(self, renderer: Renderer, room: int = ROOM):
        self._renderer = renderer
        self._room = room
        self._cuts: dict[tuple[int, str], Cut | None] = {}
        self._kept: dict[tuple[int, str], Rendering] = {}

    def __call__(
        self, conversations: Sequence[Conversation], max_length: int
    ) -> list[tuple[Rendering, Cut | None]]:
        """Each conversation's rendering, of `max_length` tokens at most, and where it was cut."""
        made = self._make([c for c in conversations if (max_length, c.key) not in self._kept])
        renderings = {}
        for key, whole in made.items():
            rendering, self._cuts[max_length, key] = whole.cut_to(max_length)
            # As a copy of half the size, which doesn't keep alive what was cut off.
            renderings[key] = replace(rendering, input_ids=rendering.input_ids.astype(np.int32))
            self._keep((max_length, key), renderings[key])
        places = [(max_length, conversation.key) for conversation in conversations]
        return [(self._kept.get(at) or renderings[at[1]], self._cuts[at]) for at in places]

    def cuts(self, conversations: Sequence[Conversation], max_length: int) -> list[Cut | None]:
        """Where each conversation is cut; None where all of it fits."""
        self([c for c in conversations if (max_length, c.key) not in self._cuts], max_length)
        return [self._cuts[max_length, conversation.key] for conversation in conversations]

    def _make(self, conversations: Sequence[Conversation]) -> dict[str, Rendering]:
        # Rows with the same messages have the same key.
        distinct = {conversation.key: conversation for conversation in conversations}
        return dict(zip(distinct, self._renderer(list(distinct.values())), strict=True))

    def _keep(self, at: tuple[int, str], rendering: Rendering) -> None:
        arrays = [rendering.input_ids, *(response.ends for response in rendering.responses)]
        size = OBJECTS + sum(array.nbytes for array in arrays)
        if size <= self._room:
            self._room -= size
            self._kept[at] = rendering

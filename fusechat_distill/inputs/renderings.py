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
        places = [(max_length, conversation.key) for conversation in conversations]
        # Rows with the same messages have the same key.
        wanted = {
            at: c for at, c in zip(places, conversations, strict=True) if at not in self._kept
        }
        made = {}
        for at, whole in zip(wanted, self._renderer(list(wanted.values())), strict=True):
            rendering, self._cuts[at] = whole.cut_to(max_length)
            # As a copy of half the size, which doesn't keep alive what was cut off.
            made[at] = replace(rendering, input_ids=rendering.input_ids.astype(np.int32))
            self._keep(at, made[at])
        return [(made.get(at) or self._kept[at], self._cuts[at]) for at in places]

    def cuts(self, conversations: Sequence[Conversation], max_length: int) -> list[Cut | None]:
        """Where each conversation is cut; None where all of it fits."""
        self([c for c in conversations if (max_length, c.key) not in self._cuts], max_length)
        return [self._cuts[max_length, conversation.key] for conversation in conversations]

    def _keep(self, at: tuple[int, str], rendering: Rendering) -> None:
        arrays = [rendering.input_ids, *(response.ends for response in rendering.responses)]
        size = OBJECTS + sum(array.nbytes for array in arrays)
        if size <= self._room:
            self._room -= size
            self._kept[at] = rendering

"""One model's renderings, cut at `max_length`, in a cache of limited size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fusechat_distill.text.conversations import Conversation, Cut, Renderer, Rendering

ROOM = 256 * 2**20
"""Size limit of the cache in bytes: about 100,000 conversations of 600 tokens."""

OBJECTS = 1000
"""Approximate size in bytes of a rendering without its arrays."""


class Renderings:
    """The pivot's renderings: several stages need them, and their cuts apply to all sources.

    All cuts are cached. Renderings are cached until `room` bytes are used, and none is evicted:
    every stage reads the conversations in the same order, so the least recently used rendering is
    the next one that will be needed.
    """

    def __init__(self, renderer: Renderer, room: int = ROOM):
        self._renderer = renderer
        self._room = room
        self._cuts: dict[tuple[int, str], Cut | None] = {}
        self._cache: dict[tuple[int, str], Rendering] = {}

    def __call__(
        self, conversations: Sequence[Conversation], max_length: int
    ) -> list[tuple[Rendering, Cut | None]]:
        """Each conversation's rendering, of `max_length` tokens at most, and where it was cut."""
        places = [(max_length, conversation.key) for conversation in conversations]
        # Rows with the same messages have the same key.
        wanted = {
            at: c for at, c in zip(places, conversations, strict=True) if at not in self._cache
        }
        new = {}
        for at, whole in zip(wanted, self._renderer(list(wanted.values())), strict=True):
            rendering, self._cuts[at] = whole.cut_to(max_length)
            # A copy of half the size, so that the tokens after the cut are freed.
            new[at] = replace(rendering, input_ids=rendering.input_ids.astype(np.int32))
            self._add(at, new[at])
        return [(new.get(at) or self._cache[at], self._cuts[at]) for at in places]

    def cuts(self, conversations: Sequence[Conversation], max_length: int) -> list[Cut | None]:
        """Where each conversation is cut; None where all of it fits."""
        self([c for c in conversations if (max_length, c.key) not in self._cuts], max_length)
        return [self._cuts[max_length, conversation.key] for conversation in conversations]

    def _add(self, at: tuple[int, str], rendering: Rendering) -> None:
        arrays = [rendering.input_ids, *(response.ends for response in rendering.responses)]
        size = OBJECTS + sum(array.nbytes for array in arrays)
        if size <= self._room:
            self._room -= size
            self._cache[at] = rendering

"""Damaged inputs of a merge: a clear error, or what the reference makes of them."""

from figure import Section

SECTIONS: list[tuple[str, Section]] = []

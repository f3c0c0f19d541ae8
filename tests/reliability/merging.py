"""Merges under fire: crashes, races, memory, determinism, security."""

from figure import Section

SECTIONS: list[tuple[str, Section]] = []

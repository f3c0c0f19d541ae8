"""Distillation under fire: crashes, races, security."""

from figure import Section

SECTIONS: list[tuple[str, Section]] = []

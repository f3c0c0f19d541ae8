"""Damaged inputs of a distillation: a clear error, or what the reference makes of them."""

from figure import Section

SECTIONS: list[tuple[str, Section]] = []

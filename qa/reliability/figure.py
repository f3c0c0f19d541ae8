"""A figure of the reliability page: what was tried, how often, and how often it went as it should."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One row of the page.

    ``unexpected`` holds the first cases that did not go as expected, a line each; ``points`` are
    (budget, measured) pairs in bytes where the figure is drawn; ``command`` and ``seconds`` are
    filled in by ``run.py``.
    """

    section: str
    what: str
    tried: int
    as_expected: int
    note: str = ""
    unexpected: tuple[str, ...] = ()
    points: tuple[tuple[float, float], ...] = ()
    command: str = ""
    seconds: float = 0.0


# work folder (fresh, empty), scale, seed -> figures, each as soon as it is known
Section = Callable[[Path, float, int], Iterator[Figure]]


@dataclass
class Tally:
    """Counts cases while a figure is being made."""

    section: str
    what: str
    tried: int = 0
    as_expected: int = 0
    unexpected: list[str] = field(default_factory=list)

    def count(self, fine: bool, case: object) -> None:
        """One case; ``case`` says how to see it again, should it not be fine."""
        self.tried += 1
        self.as_expected += fine
        if not fine and len(self.unexpected) < 10:
            self.unexpected.append(" ".join(str(case).split())[:400])

    def figure(self, note: str = "", points: tuple[tuple[float, float], ...] = ()) -> Figure:
        return Figure(
            self.section,
            self.what,
            self.tried,
            self.as_expected,
            note,
            tuple(self.unexpected),
            points,
        )


def times(count: int, scale: float) -> int:
    """How many cases of ``count`` at scale 1 are tried at this scale, at least one."""
    return max(1, round(count * scale))

"""What a user is told: one line, without a traceback from any click program (mergekit's too)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click


class ConfigError(click.ClickException, ValueError):
    """The request can't be carried out as written; nothing was read or written yet.

    Args:
        problems: every problem found, each naming its remedy.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        # A name with a line break in it, say, shall not look like a line of its own.
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        super().__init__(self.problems[0] if len(problems) == 1 else _listed(self.problems))


def _listed(problems: Sequence[str]) -> str:
    return "\n  ".join([f"{len(problems)} problems:", *problems])


class TensorError(click.ClickException, ValueError):
    """A tensor can't be merged, which shows only once it is read (NaN, say)."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """What an exception says, its lines joined."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` where one of the known names is near, the transposed one first."""
    name = name.lower()
    letters = [k for k in known if sorted(k) == sorted(name)]
    found = letters or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""

"""What can go wrong, and the exit status that says whose fault it is."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click


class FusechatError(click.ClickException):
    """It broke on the way: what was done is kept, and the same command goes on from there.

    A `ClickException`, so that any click program (mergekit's too) shows it as one line.
    """

    exit_code = 1


class RequestError(FusechatError, ValueError):
    """The request can't be carried out as written; nothing was written.

    The message is `where: problem` when there is one problem, otherwise a heading and an indented
    line for each.

    Args:
        problems: every problem found, each naming its remedy.
        where: what they are problems of: a file, say.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str], where: object = None) -> None:
        self.where = where
        # A name with a line break in it, say, shall not look like a line of its own.
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        number = len(self.problems)
        if number == 1:
            heading = "" if where is None else f"{where}: "
            super().__init__(heading + self.problems[0])
        else:
            heading = f"{number} problems:" if where is None else f"{where} has {number} problems:"
            super().__init__("\n  ".join([heading, *self.problems]))


def one_line(error: BaseException) -> str:
    """What an exception says, its lines joined, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` where one of the known names is near, the transposed one first."""
    name = name.lower()
    letters = [k for k in known if sorted(k) == sorted(name)]
    found = letters or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""

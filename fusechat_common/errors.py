"""The errors of both programs; an error's class decides the exit status."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click

KEPT = "completed work is kept, and the same command resumes"


class FusechatError(click.ClickException):
    """A command failed while running: completed work is kept, and the same command resumes.

    A `ClickException`, so that any click program (mergekit's too) shows it as one line.
    """

    exit_code = 1


class RequestError(FusechatError, ValueError):
    """The request can't be carried out as written; nothing was written.

    The message is `where: problem` for one problem, otherwise a heading and a line for each.

    Args:
        problems: the problem, or all of them, each naming its remedy.
        where: what has these problems, such as a file.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], where: object = None) -> None:
        self.where = where
        several = [problems] if isinstance(problems, str) else problems
        # A name may contain a line break; a problem is one line all the same.
        self.problems = tuple(" ".join(problem.splitlines()) for problem in several)
        if len(self.problems) == 1:
            message = self.problems[0] if where is None else f"{where}: {self.problems[0]}"
        else:
            heading = f"{len(several)} problems:"
            heading = heading if where is None else f"{where} has {heading}"
            message = "\n  ".join([heading, *self.problems])
        super().__init__(message)


def one_line(error: BaseException) -> str:
    """An exception's message, its lines joined, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` if a known name is similar; one of the same letters comes first."""
    name = name.lower()
    same_letters = [k for k in known if sorted(k) == sorted(name)]
    similar = same_letters or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {similar[0]!r}?)" if similar else ""

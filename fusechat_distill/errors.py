"""What can go wrong, and the exit status that says whose fault it is."""

from __future__ import annotations

from collections.abc import Sequence


class DistillError(Exception):
    """It broke on the way: what was done is kept, and the same command goes on from there."""

    exit_status = 1


class RequestError(DistillError):
    """The request can't be carried out as written; nothing was written.

    `problems` are one line each and name their remedy. The message is `where: problem` when
    there is one, otherwise a heading and one indented line for each.
    """

    exit_status = 2

    def __init__(self, where: str, problems: Sequence[str]):
        self.where = where
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{where}: {self.problems[0]}")
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{where} has {len(self.problems)} problems:{lines}")


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

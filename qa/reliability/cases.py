"""Runs many cases and counts how they ended: each `Figure` is a row of docs/reliability.md."""

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from tests.support.killing import forked

MEMORY = 12 << 30


Case = Callable[[int, random.Random], str]
"""Number and random numbers of its own -> in a word or two, how it ended."""


class Wrong(Exception):
    """A case did not end as expected; the text says what happened."""


@dataclass
class Figure:
    """What was tried, how often, and how often it ended as it should.

    Attributes:
        section: the heading of the page under which it stands.
        note: shown below `what`; `{kinds}` stands for the counts of `kinds`.
        kinds: how many cases ended in which of the expected ways.
        unexpected: the first cases that did not end as expected, a line each.
        points: (budget, measured) pairs in bytes where the figure is drawn.
        command: makes this figure again; filled in, as `seconds` is, by `run.py`.
    """

    section: str
    what: str
    note: str = "{kinds}"
    tried: int = 0
    as_expected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    points: tuple[tuple[float, float], ...] = ()
    command: str = ""
    seconds: float = 0.0

    def count(self, fine: bool, case: object) -> None:
        """Count one case; `case` says how to repeat it and what happened, should it not be fine."""
        self.tried += 1
        self.as_expected += fine
        if not fine and len(self.unexpected) < 10:
            self.unexpected.append(" ".join(str(case).split())[:400])

    def noted(self, note: str) -> "Figure":
        """Set the note, once all cases are counted."""
        self.note = note
        return self

    def try_all(
        self,
        case: Case,
        count: int,
        seed: int,
        limit: int = 60,
        cpu_limit: float = 60.0,
        workers: int = 2,
    ) -> "Figure":
        """Try cases 0 to `count - 1` in forked processes; one that crashes or hangs is only counted.

        Args:
            case: raises `Wrong`, or anything else, where it doesn't end as expected.
            limit: seconds that a case may take; then its process is ended by SIGALRM.
            cpu_limit: seconds of CPU time that a case may take.
        """
        wrong: dict[int, str] = {}
        running: dict[int, tuple[deque[int], IO[bytes]]] = {}

        def start(share: deque[int]) -> None:
            answers = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (read when the child ends)
            pid = forked(partial(_answer_all, case, share, answers, seed, (limit, cpu_limit)))
            running[pid] = share, answers

        for first in range(min(workers, count)):
            start(deque(range(first, count, workers)))
        while running:
            pid, status = os.wait()
            share, answers = running.pop(pid)
            answers.seek(0)
            for kind, problem in map(json.loads, answers):
                number = share.popleft()
                if problem is None:
                    self.kinds[kind] += 1
                else:
                    wrong[number] = problem
            if share:  # the process died in this case
                wrong[share.popleft()] = f"ended with {os.waitstatus_to_exitcode(status)}"
            if share:
                start(share)
        for number in range(count):
            self.count(number not in wrong, f"seed {seed}, case {number}: {wrong.get(number)}")
        return self


def _answer_all(
    case: Case, share: Iterable[int], answers: IO[bytes], seed: int, limits: tuple[int, float]
) -> None:
    """Try the cases of a share, in a process for them, and write a JSON line for each."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in share:
        signal.alarm(limits[0])
        began = time.process_time()
        try:
            kind, problem = case(number, random.Random(f"{seed} {number}")), None
        except BaseException as error:  # panics of Rust libraries among them
            told = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            kind, problem = "", told[:3000]
        took = time.process_time() - began
        if problem is None and took > limits[1]:
            problem = f"took {took:.1f} s of CPU time"
        answers.write(json.dumps([kind, problem]).encode() + b"\n")


def own_copy(folder: Path) -> Path:
    """A copy of a folder for this process, beside it; made once."""
    copy = folder.with_name(f"{folder.name}-{os.getpid()}")
    if not copy.exists():
        shutil.copytree(folder, copy)
    return copy


# work folder (fresh, empty), scale, seed -> figures, each as soon as it is known
Section = Callable[[Path, float, int], Iterator[Figure]]


def scaled(count: int, scale: float) -> int:
    """How many cases of `count` at scale 1 are tried at this scale, at least one."""
    return max(1, round(count * scale))

"""Many cases in child processes: one that crashes, hangs or takes all memory is counted, no more."""

import json
import os
import resource
import select
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qa.reliability.figure import Tally

MEMORY = 12 << 30


class Wrong(Exception):
    """A case did not go as expected; the text says what it was."""


@dataclass
class _Worker:
    """A child and the cases that it has still to try."""

    todo: deque[int]
    pid: int = 0
    pipe: int = -1
    since: float = 0.0
    text: bytes = b""
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: dict[int, str] = field(default_factory=dict)


def sweep(
    case: Callable[[int], str], count: int, tally: Tally, limit: float = 60.0, workers: int = 2
) -> Counter[str]:
    """Try ``case(0)`` … ``case(count - 1)`` in children forked from this process.

    Args:
        case: returns in a word how it ended, or raises ``Wrong`` (or anything else).
        limit: seconds that one case may take.

    Returns:
        How many cases ended in which way.
    """
    crew = [_Worker(deque(range(first, count, workers))) for first in range(workers)]
    while running := [worker for worker in crew if worker.todo]:
        for worker in running:
            if not worker.pid:
                _start(worker, case)
        ready, _, _ = select.select([worker.pipe for worker in running], [], [], 0.5)
        for worker in running:
            if worker.pipe in ready:
                _take(worker)
            elif time.monotonic() - worker.since > limit:
                os.kill(worker.pid, signal.SIGKILL)
                _end(worker, f"took longer than {limit:.0f} s")
    wrong = {number: text for worker in crew for number, text in worker.wrong.items()}
    for number in range(count):
        tally.count(number not in wrong, f"case {number}: {wrong.get(number)}")
    return sum((worker.kinds for worker in crew), Counter())


def _start(worker: _Worker, case: Callable[[int], str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    worker.pipe, answer = os.pipe()
    worker.since, worker.text = time.monotonic(), b""
    worker.pid = os.fork()
    if worker.pid:
        os.close(answer)
        return
    try:
        os.close(worker.pipe)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number in worker.todo:
            try:
                ended, wrong = case(number), None
            except Exception as error:
                ended, wrong = "", f"{type(error).__name__}: {error}"
                if isinstance(error, Wrong):
                    wrong = str(error)
            os.write(answer, json.dumps([ended, wrong and wrong[:3000]]).encode() + b"\n")
    finally:
        os._exit(0)


def _take(worker: _Worker) -> None:
    chunk = os.read(worker.pipe, 1 << 16)
    if not chunk:
        _end(worker, "the process died")
        return
    *lines, worker.text = (worker.text + chunk).split(b"\n")
    for line in lines:
        ended, wrong = json.loads(line)
        number = worker.todo.popleft()
        worker.since = time.monotonic()
        if wrong is None:
            worker.kinds[ended] += 1
        else:
            worker.wrong[number] = wrong
    if not worker.todo:
        _end(worker, "")


def _end(worker: _Worker, why: str) -> None:
    os.close(worker.pipe)
    _, status = os.waitpid(worker.pid, 0)
    worker.pid = 0
    if worker.todo:
        worker.wrong[worker.todo.popleft()] = f"{why} (status {status})"


def in_words(kinds: Counter[str]) -> str:
    """``Counter(refused=3)`` as “3 refused”."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))

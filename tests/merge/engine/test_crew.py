"""Threads that help one another: nothing lost, nothing twice, no failure swallowed."""

from __future__ import annotations

import itertools
import threading
from contextlib import nullcontext

import pytest
import torch

from fusechat_merge.engine.crew import Crew


def crew(threads: int) -> Crew[nullcontext[None]]:
    return Crew([nullcontext() for _ in range(threads)])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_once(threads):
    working, found = crew(threads), {}

    def job(count):
        found[count] = list(working.pieces(count, lambda number, _: number * number))

    working.run(range(12), job)
    assert found == {count: [n * n for n in range(count)] for count in range(12)}


def test_an_idle_thread_helps():
    working, met = crew(2), threading.Barrier(2, timeout=30)

    def job(_):
        # Both pieces wait for each other: one thread alone would never end.
        assert list(working.pieces(2, lambda number, _: (met.wait(), number)[1])) == [0, 1]

    working.run([0], job)


def test_few_results_wait_for_a_slow_taker():
    working, begun, most = crew(2), set(), []

    def piece(number, _):
        begun.add(number)

    def job(_):
        for number, _ in enumerate(working.pieces(200, piece)):
            most.append(len(begun) - number)

    working.run([0], job)
    assert max(most) <= 9  # 4 a thread, and the one at hand


def test_what_several_need_is_done_once():
    working, done, seen = crew(4), [], []
    keys = [f"k{number}" for number in range(20)]

    def job(_):
        working.once(keys, lambda key: done.append(list(working.pieces(3, lambda n, _: (key, n)))))
        seen.append(len(done))

    working.run(range(9), job)
    assert sorted(done) == [[(key, n) for n in range(3)] for key in sorted(keys)]
    assert seen == [20] * 9


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_stops_all_and_is_raised(threads):
    working, begun = crew(threads), []

    def piece(number, _):
        begun.append(number)
        if len(begun) == 50:
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        working.run(range(100), lambda _: list(working.pieces(40, piece)))
    assert len(begun) <= 50 + threads


def test_the_jobs_own_thread_tells_of_a_helpers_failure():
    working, met, told = crew(2), threading.Barrier(2, timeout=30), []

    def piece(number, _):
        met.wait()
        if threading.current_thread() is not told[0]:
            raise ValueError("bare")

    def job(_):
        told.append(threading.current_thread())
        try:
            list(working.pieces(2, piece))
        except ValueError as error:
            raise ValueError(f"job: {error}") from None

    with pytest.raises(ValueError, match="job: bare"):
        working.run([0], job)


def test_a_thread_that_cannot_be_started(monkeypatch):
    plain = threading.Thread.start

    def start(thread):
        if thread.name == "merge" and threading.active_count() > before:
            raise RuntimeError("can't start new thread")
        plain(thread)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", start)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        crew(3).run(range(5), lambda _: threading.Event().wait(0.01))
    assert torch.get_num_threads() == threads


def test_ctrl_c_while_waiting(monkeypatch):
    """It reaches the thread that waits; the others are stopped and waited for all the same."""
    plain, presses = threading.Thread.join, iter(range(2))

    def join(thread, timeout=None):
        if thread.name == "merge" and next(presses, None) is not None:
            raise KeyboardInterrupt
        plain(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        crew(3).run(itertools.count(), lambda _: threading.Event().wait(0.001))
    assert not [thread for thread in threading.enumerate() if thread.name == "merge"]


def test_pieces_under_way_are_waited_for_when_a_job_stops_early():
    working, begun, met, ended = crew(2), threading.Event(), threading.Barrier(2, timeout=30), []

    def piece(number, _):
        begun.set()
        met.wait()
        if number:  # the helper's
            while working._shared:  # until the job has closed its pieces
                threading.Event().wait(0.001)
            ended.append(number)

    def job(number):
        if number:
            begun.wait(30)  # the first piece is the other thread's, then this one helps
            return
        pieces = working.pieces(2, piece)
        next(pieces)
        pieces.close()
        assert ended == [1]

    working.run(range(2), job)

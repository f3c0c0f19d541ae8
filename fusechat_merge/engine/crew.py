"""Threads that each make a tensor and, once none is left, share the segments of the others'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Job = TypeVar("Job")
Desk = TypeVar("Desk", bound=AbstractContextManager[Any])


class Crew(Generic[Desk]):
    """One thread for each desk; torch's operations use no other threads.

    Args:
        desks: each thread's buffers, a context that the thread enters while it works.
    """

    def __init__(self, desks: Sequence[Desk]) -> None:
        self._desks = desks
        self._changed = threading.Condition()
        self._shared: list[_Shared[Any]] = []
        self._begun: set[str] = set()
        self._finished: set[str] = set()
        self._working = 0
        self._error: BaseException | None = None
        self._own = threading.local()

    def run(self, jobs: Iterable[Job], work: Callable[[Job], object]) -> None:
        """Do `work` on every job, begun in order; raises what the first failure raised."""
        todo = iter(jobs)
        self._working = len(self._desks)
        threads = [
            threading.Thread(target=self._member, args=(desk, todo, work), name="merge")
            for desk in self._desks
        ]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:
            self._fail(error)
        for thread in threads:
            while thread.is_alive():
                try:
                    thread.join()
                except BaseException as error:  # Ctrl-C reaches this thread only, maybe repeatedly
                    self._fail(error)
        torch.set_num_threads(before)
        if self._error is not None:
            raise self._error

    def pieces(self, count: int, work: Callable[[int, Desk], T]) -> Iterator[T]:
        """`work` on the numbers below `count`, by this thread and idle ones; results in order.

        Only a few results wait at a time. To be called inside a job.
        """
        if count < 2:
            for number in range(count):
                yield work(number, self._own.desk)
            return
        shared = _Shared(count, work, ahead=4 * len(self._desks))
        with self._changed:
            self._shared.append(shared)
            self._changed.notify_all()
        try:
            for number in range(count):

                def ready(number: int = number) -> bool:
                    return number in shared.results or shared.error is not None

                self._help_until(ready, shared)
                if shared.error is not None:
                    raise shared.error
                with self._changed:
                    result = shared.results.pop(number)
                    shared.taken += 1
                    self._changed.notify_all()
                yield result
        finally:
            with self._changed:
                self._shared.remove(shared)
                shared.next = shared.count
                while shared.under_way:
                    self._changed.wait()

    def once(self, keys: Sequence[str], work: Callable[[str], object]) -> None:
        """Return when `work` has been done for each of `keys`, once, by whichever thread."""
        for key in keys:
            with self._changed:
                if key in self._begun:
                    continue
                self._begun.add(key)
            work(key)
            with self._changed:
                self._finished.add(key)
                self._changed.notify_all()
        missing = list(keys)

        def all_finished() -> bool:
            while missing and missing[-1] in self._finished:
                missing.pop()
            return not missing

        self._help_until(all_finished)

    def _member(self, desk: Desk, todo: Iterator[Job], work: Callable[[Job], object]) -> None:
        torch.set_num_threads(1)
        self._own.desk = desk
        try:
            with desk:
                while self._error is None:
                    with self._changed:
                        job = next(todo, self)
                    if job is self:
                        break
                    work(job)  # type: ignore[arg-type]
                with self._changed:
                    self._working -= 1
                    self._changed.notify_all()
                self._help_until(lambda: not self._working)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _help_until(self, reached: Callable[[], bool], first: _Shared[Any] | None = None) -> None:
        """Work on shared pieces, or only those of `first`, until `reached`.

        Raises:
            InterruptedError: another thread has failed.
        """
        while True:
            with self._changed:
                while True:
                    if self._error is not None:
                        raise InterruptedError("another thread has failed")
                    if reached():
                        return
                    shared = first or next((s for s in self._shared if s.open), None)
                    if shared is not None and shared.open:
                        number = shared.next
                        shared.next += 1
                        shared.under_way += 1
                        break
                    self._changed.wait()
            try:
                result = shared.work(number, self._own.desk)
            except BaseException as error:
                with self._changed:
                    shared.under_way -= 1
                    shared.next, shared.error = shared.count, error
                    self._changed.notify_all()
                if first is not None:
                    raise
                continue  # the job's own thread raises it, where its tensor is known
            with self._changed:
                shared.under_way -= 1
                shared.results[number] = result
                self._changed.notify_all()


class _Shared(Generic[T]):
    """Pieces of one job, used with the crew's lock held."""

    def __init__(self, count: int, work: Callable[[int, Any], T], ahead: int) -> None:
        self.count, self.work, self.ahead = count, work, ahead
        self.next = 0  # not begun yet
        self.taken = 0  # results handed on
        self.under_way = 0
        self.results: dict[int, T] = {}
        self.error: BaseException | None = None

    @property
    def open(self) -> bool:
        """Whether a piece can be begun."""
        return self.next < min(self.count, self.taken + self.ahead)

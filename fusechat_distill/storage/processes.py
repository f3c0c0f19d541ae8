"""The processes of one run (`accelerate launch`), and what they tell each other."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

from fusechat_common.errors import FusechatError

T = TypeVar("T")


class ElsewhereError(FusechatError):
    """The first process failed, and says so itself; this one did nothing wrong.

    Its exit status is 0, so that a launcher does not end the first before it has spoken.
    """

    exit_code = 0

    def __init__(self) -> None:
        super().__init__("the first process failed")

    def show(self, file: Any = None) -> None:
        pass


class Processes:
    """This process among those of the run; a plain start is a run of one.

    Args:
        device: the recipe's `scoring.device`.
    """

    def __init__(self, device: str = "auto"):
        import torch
        from accelerate import PartialState

        cpu = device == "cpu" or not torch.accelerator.is_available()
        # Processes wait for each other at the end, as long as the slowest needs.
        self._state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=30))
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device = str(self._state.device)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, in all of them.

        Raises:
            ElsewhereError: in the others, where `work` raised in the first.
        """
        result: list[Any] = [None, True]
        error: BaseException | None = None
        if self.is_first:
            try:
                result[0] = work()
            except BaseException as caught:
                error, result = caught, [None, False]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(result)
        if error is not None:
            raise error
        if not result[1]:
            raise ElsewhereError
        value: T = result[0]
        return value

    def in_turn(self, work: Callable[[], T]) -> T:
        """Each process's own result of `work`; the others begin when the first is done.

        What the first finds wrong it says alone, and what it caches is there for the others.
        """
        mine: list[T] = []
        self.first(lambda: mine.append(work()))
        return mine[0] if mine else work()

    def wait(self) -> None:
        """Return when every process has come here."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        self._state.destroy_process_group()

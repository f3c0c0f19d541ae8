"""The processes of one run (`accelerate launch`) and their communication."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

from fusechat_common.errors import FusechatError

T = TypeVar("T")


class ElsewhereError(FusechatError):
    """The first process failed and reports it; this one only ends.

    Its exit status is 0, so that a launcher does not end the first before it has reported.
    """

    exit_code = 0

    def __init__(self) -> None:
        super().__init__("the first process failed")

    def show(self, file: Any = None) -> None:
        pass


class Processes:
    """This process among those of the run; without a launcher it is the only one.

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
        """Run `work` in the first process and return its result in all of them.

        Raises:
            ElsewhereError: in the others, if `work` raised in the first.
        """
        result: list[Any] = [None, False]
        try:
            if self.is_first:
                result = [work(), True]
        finally:
            # The others wait for this, whether `work` returned or raised.
            if self.count > 1:
                from accelerate.utils import broadcast_object_list

                broadcast_object_list(result)
        if not result[1]:
            raise ElsewhereError
        value: T = result[0]
        return value

    def in_turn(self, work: Callable[[], T]) -> T:
        """Run `work` in every process, in the others when it has returned in the first.

        So a problem is reported once, by the first, and the others find what it cached.
        """
        mine: list[T] = []
        self.first(lambda: mine.append(work()))
        return mine[0] if mine else work()

    def wait(self) -> None:
        """Return when every process has called this."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        self._state.destroy_process_group()

"""Work in a forked process, and its kill without any clean-up at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable


def in_child(
    work: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    *,
    threads: int = 1,
    quiet: bool = False,
) -> int:
    """`before` and `work` in a forked process: its exit status, or minus the signal.

    Args:
        work: what the process is for.
        before: called in it first.
        threads: PyTorch's.
        quiet: what it prints goes to the error stream.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: object = 1
    try:
        if quiet:
            os.dup2(2, 1)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)
        before()
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def kill_at(part: str, number: int, *, parent: bool = False) -> Callable[[], None]:
    """Arm a process: it ends when the n-th file with `part` in its path is about to be written.

    Args:
        part: of a file or folder that is written, made or renamed.
        number: from 1.
        parent: its parent ends as well.
    """

    def arm() -> None:
        left = number

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            written = event in ("os.rename", "os.mkdir") or (
                event == "open" and str(arguments[1]).startswith(("w", "a", "x"))
            )
            if written and any(part in str(argument) for argument in arguments[:2]):
                left -= 1
                if left == 0:
                    for pid in (os.getppid(), os.getpid()) if parent else (os.getpid(),):
                        os.kill(pid, signal.SIGKILL)

        sys.addaudithook(hook)

    return arm

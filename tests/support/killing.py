"""Work in a forked process, and its kill without any clean-up at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import IO


def forked(work: Callable[[], object]) -> int:
    """Do `work` in a forked process, whose id is returned; see `exit_status`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status: object = 1
    try:
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
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def exit_status(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_child(work: Callable[[], object]) -> tuple[int, IO[bytes]]:
    """Do `work` in a forked process whose output is kept; see `wait_for_child`."""
    said = tempfile.TemporaryFile()  # noqa: SIM115 (read when the child ends)

    def telling() -> None:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        work()

    return forked(telling), said


def wait_for_child(pid: int, said: IO[bytes]) -> tuple[int, str]:
    """Wait for what `start_child` started: its exit status, and what it said."""
    status = exit_status(pid)
    said.seek(0)
    return status, said.read().decode("utf-8", "replace")


def in_child(
    work: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    *,
    threads: int = 1,
    quiet: bool = False,
) -> int:
    """`before` and `work` in a forked process: its exit status, or minus the signal.

    Args:
        threads: PyTorch's.
        quiet: what it prints goes to the error stream.
    """

    def both() -> None:
        if quiet:
            os.dup2(2, 1)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)
        before()
        work()

    return exit_status(forked(both))


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

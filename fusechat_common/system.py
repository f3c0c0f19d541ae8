"""System calls that not every system has, each with what is done without it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
"""Flag for `os.open`: a link in the last place is an error."""


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_into(descriptor: int, into: memoryview, offset: int) -> int:
    """Read from `offset` on, at most as many bytes as `into` holds; returns their number."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    data = os.pread(descriptor, into.nbytes, offset)
    into[: len(data)] = data
    return len(data)


def will_read(descriptor: int, offset: int, size: int) -> None:
    """Let the system begin to read a part of a file, in bytes, where it can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def open_direct(path: Path) -> int | None:
    """Open for writes that bypass the system's cache; None where that isn't supported."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def sync(descriptor: int) -> None:
    """Force a file to the disk; on macOS `fsync` alone may leave it in the disk's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise  # a second call wouldn't report what this one lost
    os.fsync(descriptor)


def sync_data(descriptor: int) -> None:
    """Force a file's bytes to the disk, without its times where the system can."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        sync(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Allocate a file's disk space where the system can, so that a full disk shows at once.

    Writing is also much faster then, as nothing is allocated page by page.

    Raises:
        OSError: the disk is full.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    offset = ctypes.c_int64  # glibc's and musl's off_t where the processor has 64 bits
    if libc.fallocate(descriptor, 0, offset(0), offset(size)):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def exchange(one: Path, other: Path) -> None:
    """Swap two folders' names, in one step where the system can.

    Otherwise in two, and the former `other` is then `replaced`, beside `one`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, swap = -100, 2
    if hasattr(libc, "renameat2") and not libc.renameat2(
        at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap
    ):
        return
    os.rename(other, one.with_name("replaced"))
    os.rename(one, other)

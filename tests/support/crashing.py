"""Merges in child processes that are killed at a chosen system call; a program, driven by lines.

Reads JSON lines {config, out, kill_at, options}; kill_at is the number of a call that changes the
disk, or such as "before rename"; kill_after counts bytes written into shards, kill_after_seconds
is told by the clock. At the call of the number ``at`` the disk can fail instead, once or from then
on (``fail``: {errno, lasting}), or a file be meddled with (``meddle``: {how, file}). Answers
{status, calls, written, error} each: how the child ended, how many calls that change the disk it
made, bytes written into shards.
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time

import click

from fusechat_merge.engine import execute, saving
from fusechat_merge.results import folder as result_folder

saving.SAVE_EVERY = 20_000
CALLS = [
    *((os, name) for name in ("pwrite", "fdatasync", "fsync", "ftruncate", "rename")),
    *((os, name) for name in ("open", "mkdir", "unlink", "rmdir")),
    (saving, "reserve"), (saving, "exchange"), (result_folder, "_write"), (shutil, "copyfile"),
]  # fmt: skip
WRITING = {"pwrite", "fdatasync", "fsync", "reserve", "_write", "copyfile", "mkdir"}


def child(order: dict, answer: int) -> None:
    calls, written, failing, lock = 0, 0, False, threading.Lock()

    def strike(name):
        nonlocal failing
        if "fail" in order:
            failing = order["fail"]["lasting"]
            raise OSError(order["fail"]["errno"], os.strerror(order["fail"]["errno"]))
        meddle(**order["meddle"])

    def counted(name, original):
        def call(*args, **kwargs):
            nonlocal calls, written
            with lock:
                calls += 1
                if order["kill_at"] in (calls, f"before {name}"):
                    os.kill(os.getpid(), signal.SIGKILL)
                struck = calls == order.get("at")
            if struck:
                strike(name)
            elif failing and name in WRITING:
                raise OSError(order["fail"]["errno"], os.strerror(order["fail"]["errno"]))
            result = original(*args, **kwargs)
            if order["kill_at"] == f"after {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "pwrite" and threading.current_thread().name.startswith("merge"):
                with lock:
                    written += result
                    if written >= order.get("kill_after", math.inf):
                        os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in CALLS:
        setattr(module, name, counted(name, getattr(module, name)))
    if "file_limit" in order:
        limit = order["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    error = None
    try:
        execute.merge(order["config"], order["out"], **order.get("options", {}))
    except click.ClickException as problem:
        error = [problem.exit_code, problem.message]
    report = json.dumps({"calls": calls, "written": written, "error": error})
    os.set_blocking(answer, True)
    sys.stdout.flush()
    os.write(answer, report.encode())


def meddle(how: str, file: str) -> None:
    """Do to a file what someone else may, while it is being read."""
    if how == "vanish":
        os.replace(file, f"{file}.gone")
    else:
        size = os.path.getsize(file)
        with open(file, "r+b", buffering=0) as changed:
            if how == "truncate":
                changed.truncate(size * 3 // 4)
            else:
                changed.seek(size // 2)
                changed.write(bytes(size - size // 2))


def attempt(order: dict) -> dict:
    """One child, from its order to what became of it."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        status = 1
        try:
            child(order, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    if "kill_after_seconds" in order:
        time.sleep(order["kill_after_seconds"])
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as answer:
        report = answer.read()
    _, status = os.waitpid(pid, 0)
    return {"status": status, **json.loads(report or "{}")}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""Merges in child processes that are killed at a chosen system call; a program, driven by lines.

Reads JSON lines {config, out, kill_at, options}; kill_at is the number of a call that changes the
disk, or such as "before rename"; kill_after counts bytes written into shards. Answers {status, calls, written, error} each:
how the child ended, how many calls that change the disk it made, bytes written into shards.
"""

import json
import math
import os
import resource
import signal
import sys
import threading

import click

from fusechat_merge import saving, stream

saving.SAVE_EVERY = 20_000
CALLS = ("pwrite", "fdatasync", "fsync", "ftruncate", "rename")


def child(order: dict, answer: int) -> None:
    calls, written, lock = 0, 0, threading.Lock()

    def counted(name, original):
        def call(*args, **kwargs):
            nonlocal calls, written
            with lock:
                calls += 1
                if order["kill_at"] in (calls, f"before {name}"):
                    os.kill(os.getpid(), signal.SIGKILL)
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

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    if "file_limit" in order:
        limit = order["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    error = None
    try:
        stream.merge(order["config"], order["out"], **order.get("options", {}))
    except click.ClickException as problem:
        error = [problem.exit_code, problem.message]
    report = json.dumps({"calls": calls, "written": written, "error": error})
    os.set_blocking(answer, True)
    sys.stdout.flush()
    os.write(answer, report.encode())


def main() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            status = 1
            try:
                child(json.loads(line), write)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as answer:
            report = answer.read()
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": status, **json.loads(report or "{}")}), flush=True)


if __name__ == "__main__":
    main()

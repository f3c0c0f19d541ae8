"""Parts of the demo: folders that a command makes, again only if its inputs have changed."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from rich.console import Console

_log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Parts:
    """The folders below `out`; the inputs of each are recorded in `out/.made`."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def are_foreign(self) -> bool:
        """Whether `out` has content that is not from a `Parts`."""
        if not self.out.is_dir():
            return self.out.exists()
        return any(self.out.iterdir()) and not (self.out / ".made").is_dir()

    def make(
        self, name: str, made_from: Iterable[object], *words: str | Path, resumes: bool = False
    ) -> Path:
        """Have a command make the folder `name`, unless it did so before, from the same.

        What a command that was stopped left there is removed first, or with `resumes` gone on from.
        """
        folder, key_file = self.out / name, self.out / ".made" / f"{name}.key"
        key = sha256(repr([*made_from, *map(str, words)]).encode()).hexdigest()
        found = key_file.read_text() if key_file.exists() else ""
        if folder.exists() and found == key:
            _log.print(f"{folder}: there already")
            return folder
        unfinished = f"{key} unfinished"
        if not (resumes and found == unfinished):
            shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        key_file.parent.mkdir(parents=True, exist_ok=True)
        key_file.write_text(unfinished)
        begun = time.monotonic()
        command(name, *words)
        key_file.write_text(key)  # the last step: a folder with its key is finished
        _log.print(f"{folder}: finished in {time.monotonic() - begun:.0f} s")
        return folder


def together(*jobs: Callable[[], Path]) -> list[Path]:
    """Run jobs at the same time, two at most, and return their results in order."""
    with ThreadPoolExecutor(2) as pool:
        return [running.result() for running in [pool.submit(job) for job in jobs]]


def export(**variables: str) -> None:
    """Print and set environment variables for the commands that follow."""
    _log.print("$ export", *(f"{name}={value}" for name, value in variables.items()), style="bold")
    os.environ |= variables


def command(label: str | None, *words: str | Path) -> None:
    """Print and run a console command that is installed, or a Python script.

    All that it says goes to stderr, each line behind the label; without one, as it is.
    """
    line = [*_program(str(words[0])), *map(str, words[1:])]
    _log.print(f"$ {shlex.join(line)}", style="bold")
    running = subprocess.Popen(
        line,
        stdout=subprocess.PIPE if label else None,
        stderr=subprocess.STDOUT if label else None,
        encoding="utf-8",
        errors="replace",
    )
    for said in running.stdout or ():
        if said.strip():
            _log.print(f"{label} | {said.rstrip()}")
    if status := running.wait():
        raise SystemExit(f"Error: {words[0]} ended with status {status}")


def digest(files: Iterable[Path]) -> str:
    """A digest of the files' bytes, to tell whether code has changed."""
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _program(name: str) -> list[str]:
    """A command as it is typed in a shell, in the working directory."""
    if name.endswith(".py"):
        return [_here(sys.executable), _here(name)]
    scripts = sysconfig.get_path("scripts")
    if (program := shutil.which(name, path=scripts)) is None:
        raise SystemExit(f"Error: {name} is not in {scripts}; install fusechat there first")
    return [_here(program)]


def _here(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path

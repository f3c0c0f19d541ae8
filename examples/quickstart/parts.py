"""A part of the demo is a folder that appears complete or not at all, and is made once."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from rich.console import Console

_log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Parts:
    """The folders below `out`; what each was made from is kept in `out/.made`."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def are_foreign(self) -> bool:
        """Whether `out` holds something that no `Parts` made."""
        if not self.out.is_dir():
            return self.out.exists()
        return any(self.out.iterdir()) and not (self.out / ".made").is_dir()

    def make(self, name: str, made_from: Iterable[object], build: Callable[[Path], None]) -> Path:
        """Have `build` fill the folder `name`, unless it is there and was made from the same."""
        folder, partial = self.out / name, self.out / ".made" / "partial" / name
        key_file = self.out / ".made" / f"{name}.key"
        key = sha256(repr(list(made_from)).encode()).hexdigest()
        if folder.exists() and key_file.exists() and key_file.read_text() == key:
            _log.print(f"{folder}: there already")
            return folder
        _log.print(f"{folder}: {'what it is made from has changed' if folder.exists() else 'new'}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        key_file.parent.mkdir(parents=True, exist_ok=True)
        key_file.write_text(key)
        partial.rename(folder)  # the last step: a folder with its key beside it is finished
        _log.print(f"{folder}: finished")
        return folder


def command(name: str, *arguments: str | Path) -> None:
    """Print and run an installed console command; what it prints goes to stderr."""
    scripts = Path(sysconfig.get_path("scripts"))
    program = shutil.which(name, path=scripts)
    if program is None:
        raise SystemExit(f"Error: {name} is not in {scripts}; install fusechat there first")
    line = [os.path.relpath(program) if scripts.is_relative_to(Path.cwd()) else program]
    line += map(str, arguments)
    _log.print(f"$ {shlex.join(line)}", style="bold")
    status = subprocess.run(line, stdout=sys.__stderr__).returncode
    if status:
        raise SystemExit(f"Error: {name} ended with status {status}")


def digest(files: Iterable[Path]) -> str:
    """A digest of the files' bytes, to tell whether code has changed."""
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

"""An editable install whose folder is gone: torch can still be imported, and pip can still uninstall."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import fusechat_autoload

ROOT = Path(__file__).parents[2]
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
KNOWN = "import torch; from mergekit.merge_methods import registered_methods as methods; print('varm' in {m.spec.name for m in methods()})"


class Environment:
    """A virtual environment that has all packages of this one but ours."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("-c", SITE).strip())
        here = subprocess.run(
            [sys.executable, "-c", SITE], capture_output=True, text=True, check=True
        )
        (self.site / "more.pth").write_text(here.stdout)

    def run(self, *words: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": "1"
        }
        done = subprocess.run(
            [self.python, *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.python.parent,
        )
        assert done.returncode == 0, done.stderr
        assert "fusechat" not in done.stderr
        return done.stdout


def test_an_editable_install_whose_folder_is_gone(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fusechat_autoload.py"):
        shutil.copy(ROOT / name, tree)
    for folder in ROOT.glob("fusechat_*/"):
        shutil.copytree(folder, tree / folder.name)
    there = Environment(tmp_path / "venv")
    pip = ["-m", "pip", "--no-cache-dir", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(tree)]
    there.run(*install)
    there.run(*install)  # over itself
    copy = there.site / "fusechat_autoload.py"
    assert copy.read_bytes() == (ROOT / "fusechat_autoload.py").read_bytes()
    where = "import fusechat_merge; print(fusechat_merge.__file__)"
    assert there.run("-c", where).strip() == str(tree / "fusechat_merge" / "__init__.py")
    assert there.run("-c", KNOWN) == "True\n"
    tree.rename(tmp_path / "moved")
    assert there.run("-c", KNOWN) == "False\n"
    there.run(*pip, "uninstall", "--quiet", "--yes", "fusechat")
    assert not copy.exists()
    assert not list(there.site.glob("*fusechat*"))


def test_what_is_broken_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusal:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "fusechat_merge":
                raise error

    monkeypatch.delitem(sys.modules, "fusechat_merge")
    monkeypatch.setattr(sys, "meta_path", [Refusal(), *sys.meta_path])
    error: Exception = SyntaxError("half edited")
    fusechat_autoload.install()
    assert capsys.readouterr().err == (
        "fusechat: mergekit won't know varm and fusechat_sce: SyntaxError('half edited')\n"
    )
    monkeypatch.setattr(sys, "stderr", None)
    fusechat_autoload.install()
    error = ModuleNotFoundError("gone")
    fusechat_autoload.install()

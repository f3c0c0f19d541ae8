"""Builds sdist and wheel, installs the wheel into a new environment, and runs every command there.

    python -m qa.dist_check

Nothing of the checkout is importable in that environment; the models are a few thousand parameters.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKE_MODELS = """
import pathlib
from tests.support import chain
here = pathlib.Path.cwd()
chain.save_models(here)
chain.recipe(here, here, count=40, output="out", sources=["neox", "twin"])
"""
SAME_TENSORS = """
import sys, torch
from safetensors.torch import load_file
one, other = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:])
assert one.keys() == other.keys(), one.keys() ^ other.keys()
assert all(torch.equal(one[name], other[name]) for name in one)
print(len(one), "tensors, the same bits")
"""
DISTILL = [
    *("init new", "schema", "validate recipe.yaml", "validate recipe.yaml --estimate"),
    *("score recipe.yaml", "align recipe.yaml", "train recipe.yaml", "run recipe.yaml"),
    *("status recipe.yaml", "report recipe.yaml", "evaluate recipe.yaml --model merged=merged"),
]
MERGE = [
    *("plan out/merge.yml", "analyze out/merge.yml --out analysis"),
    *("run out/merge.yml merged", "verify out/merge.yml merged"),
]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder / "dist")
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"
        (folder / "work").mkdir()
        here = Here(folder / "work", programs)
        constraints = shlex.quote(str(ROOT / "constraints.txt"))
        here.run(f"python -m pip install --quiet -c {constraints} {wheel}[report]")
        here.run(f"python -c {shlex.quote(MAKE_MODELS)}", PYTHONPATH=str(ROOT))
        run_all(here)
        for program, lines, module, group in (
            ("fusechat-distill", DISTILL, "fusechat_distill.cli", "commands"),
            ("fusechat-merge", MERGE, "fusechat_merge.cli", "main"),
        ):
            used, known = {line.split()[0] for line in lines}, here.names(module, group)
            assert used == known, used ^ known
            for name in sorted(known):
                here.run(f"{program} {name} --help")
        print(f"{here.count} commands, all with exit status 0")


def build(folder: Path) -> str:
    """The wheel, made from the sdist; both hold all that git has of the packages."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    listed = ["git", "-C", str(ROOT), "ls-files", "fusechat_*"]
    tracked = set(subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split())
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert inside == tracked, inside ^ tracked
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        missing = (tracked | {"pyproject.toml", "setup.py", "README.md", "LICENSE"}) - packed
        assert not missing, missing
    print(f"built {sdist.name} and {wheel.name}, {len(tracked)} files of the packages")
    return str(wheel)


class Here:
    """Runs commands in a folder, with the programs of the new environment only."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.count = 0
        self._folder = folder
        own = {"PATH": f"{programs}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        self._environment = {**os.environ, **own}
        self._environment.pop("PYTHONPATH", None)

    def run(self, line: str, **more: str) -> str:
        self.count += 1
        done = subprocess.run(
            shlex.split(line), cwd=self._folder, env=self._environment | more,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{line}\n{done.stdout}{done.stderr}exit status {done.returncode}")
        print(line if len(line) < 90 else f"{line[:80]} …".replace("\n", " "))
        return done.stdout

    def names(self, module: str, group: str) -> set[str]:
        program = f"import json, {module} as m; print(json.dumps(list(m.{group}.commands)))"
        return set(json.loads(self.run(f"python -c {shlex.quote(program)}")))


def run_all(here: Here) -> None:
    for program in ("fusechat-distill", "fusechat-merge", "python -m fusechat_distill"):
        here.run(f"{program} --version")
        here.run(f"{program} --help")
    for line in DISTILL[:-1]:
        here.run(f"fusechat-distill {line}")
    for line in MERGE:
        here.run(f"fusechat-merge {line}")
    here.run(f"fusechat-distill {DISTILL[-1]}")
    here.run("mergekit-yaml out/merge.yml with_mergekit")
    here.run(f"python -c {shlex.quote(SAME_TENSORS)} merged with_mergekit")


if __name__ == "__main__":
    main()

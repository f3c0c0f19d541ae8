"""`make demo`, much reduced: the same code on a twentieth of the text, with a smaller model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
DOMAINS = ["networking", "formats", "numbers_and_files"]
REDUCED = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(QUICKSTART)!r})
import demo, training
small = training.Settings(every=20, vocabulary=512, hidden=32, layers=2, length=64)
demo.run(Path("runs/quickstart"), small)
"""


def run_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REDUCED], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "quickstart", done


def test_targets_specialise_and_the_merge_gains(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = demo
    losses = json.loads((out / "evaluation" / "losses.json").read_text())
    assert list(losses) == ["pivot", *DOMAINS, "linear", "varm"]
    for domain in DOMAINS:
        models = {name: losses[name][domain] for name in ["pivot", *DOMAINS]}
        assert min(models, key=models.__getitem__) == domain
    assert fmean(losses["varm"].values()) < fmean(losses["pivot"].values())
    for name, values in losses.items():
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"│ {name} "))
        for value in [*values.values(), fmean(values.values())]:
            assert f"{value:.4f}" in row
    assert "varm against pivot: lower in 3 of 3 domains" in done.stdout


def test_what_is_merged_is_varm(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo
    base = load_file(out / "pivot" / "model.safetensors")
    targets = [load_file(out / "targets" / domain / "model.safetensors") for domain in DOMAINS]
    merged = load_file(out / "merged" / "varm" / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, pivot in base.items():
        deltas = torch.stack([target[name].double() - pivot.double() for target in targets])
        shares = deltas.square().flatten(1).mean(1)
        shares /= shares.sum()
        expected = pivot.double() + torch.einsum("k,k...->...", shares, deltas)
        # One rounding to bfloat16, of a float32 result.
        bound = expected.abs() * 2.0**-8 + 1e-6
        assert ((merged[name].double() - expected).abs() <= bound).all(), name


def test_leaves_pictures_and_prints_commands_to_repeat(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = demo
    for picture in ("analysis/analysis.png", "evaluation/losses.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert f"runs/quickstart/{picture}" in done.stdout
    printed = [line.split() for line in done.stderr.splitlines() if line.startswith("$ ")]
    assert [[Path(words[1]).name, *words[2:4]] for words in printed] == [
        ["mergekit-yaml", "runs/quickstart/linear.yml", printed[0][3]],
        ["mergekit-yaml", "runs/quickstart/varm.yml", printed[1][3]],
        ["fusechat-merge", "analyze", "runs/quickstart/varm.yml"],
    ]


def test_second_run_uses_what_is_finished(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, first = demo
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = run_demo(out.parents[1])
    assert second.returncode == 0
    assert second.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files


def test_refuses_a_folder_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("demo").main()
    assert ended.value.code == 2
    message = f"{tmp_path} was not made by this demo; name another folder with --out"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("parts")


def test_a_part_is_made_once_and_again_when_what_it_is_made_from_changes(
    parts: ModuleType, tmp_path: Path
) -> None:
    made = []

    def build(folder: Path) -> None:
        made.append(folder.name)
        (folder / "content").write_text(str(len(made)))

    make = parts.Parts(tmp_path / "out").make
    for made_from in (["a"], ["a"], ["b"]):
        folder = make("merged/varm", made_from, build)
    assert made == ["varm", "varm"]  # mergekit takes the folder's name for the model card
    assert folder == tmp_path / "out" / "merged" / "varm"
    assert (folder / "content").read_text() == "2"


def test_a_part_that_breaks_leaves_the_old_one(parts: ModuleType, tmp_path: Path) -> None:
    out = parts.Parts(tmp_path / "out")
    out.make("text", [1], lambda folder: (folder / "content").write_text("old"))

    def breaks(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        out.make("text", [2], breaks)
    assert (out.out / "text" / "content").read_text() == "old"
    again = out.make("text", [2], lambda folder: (folder / "more").write_text("new"))
    assert [path.name for path in again.iterdir()] == ["more"]

"""What the README shows is what the programs take."""

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration

from fusechat_distill.cli import commands
from fusechat_distill.recipe import load_recipe
from fusechat_merge.cli import main
from fusechat_merge.parameters import parameter_problems

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_merge_configuration() -> None:
    config = MergeConfiguration.model_validate(yaml.safe_load(_blocks("yaml")[0]))
    assert parameter_problems(config) == []


def test_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(_blocks("yaml")[1], encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yml").fusion.strategy == "pairwise"


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = _blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    first, second = map(float, re.findall(r"0\.\d+", capsys.readouterr().out)[:2])
    assert first == pytest.approx(0.2, abs=0.02)
    assert second == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("line", re.findall(r"^    (fusechat-\w+ .*)$", README, re.MULTILINE))
def test_commands_and_options_exist(line: str) -> None:
    program, command, *words = line.partition("#")[0].split()
    group = commands if program == "fusechat-distill" else main
    shown = CliRunner().invoke(group, [command, "--help"])
    assert shown.exit_code == 0, shown.output
    for word in words:
        assert not word.startswith("--") or word in shown.output


def test_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target

"""Every section of the reliability page, at its smallest: the page can still be made."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_can_be_made(tmp_path: Path) -> None:
    arguments = ["--scale", "0.001", "--docs", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "qa.reliability.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads((tmp_path / "reliability.json").read_text())["figures"]
    page = (tmp_path / "reliability.md").read_text()
    for figure in figures:
        assert 0 < figure["tried"] == figure["as_expected"]
        assert figure["what"] in page
        assert figure["command"] in page

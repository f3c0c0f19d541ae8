"""The reliability page can be made, every section at its smallest; cases that go wrong are counted."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from qa.reliability import cases, page

ROOT = Path(__file__).parents[2]


def test_the_page_can_be_made(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "qa.reliability.run"]
    ended = subprocess.run(
        [*program, "--scale", "0.001", "--docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = (tmp_path / "reliability.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| ([\d,]+) \| \d+ \|$", made, re.MULTILINE)
    assert len(rows) == len(ended.stdout.splitlines())
    assert all(tried == as_expected != "0" for _, tried, as_expected in rows)
    kept = (ROOT / "docs" / "reliability.md").read_text()
    commands = re.findall(r"^    (python -m .* --only [\w-]+)", kept, re.MULTILINE)
    assert re.findall(r"^    (python -m .* --only [\w-]+)", made, re.MULTILINE) == commands


def test_crashes_hangs_and_exceptions_are_counted() -> None:
    def case(number: int, chance: random.Random) -> str:
        if number == 3:
            os._exit(7)
        if number == 4:
            time.sleep(60)
        if number == 5:
            raise cases.Wrong("it is wrong")
        if number == 6:
            raise ValueError(number)
        return f"{chance.random():.3f}" if number == 8 else "fine"

    figure = cases.Figure("Title", "what").try_all(case, 12, 0, limit=1)
    assert (figure.tried, figure.as_expected) == (12, 8)
    assert figure.kinds == {"fine": 7, f"{random.Random('0 8').random():.3f}": 1}
    assert [text.partition(": ")[2] for text in figure.unexpected] == [
        "ended with 7",
        "ended with -14",
        "it is wrong",
        "ValueError: 6",
    ]
    shown = page.section("Title", [figure])
    assert "| what<br>1 0." in shown
    assert "| 12 | 8 |" in shown
    assert "- `seed 0, case 5: it is wrong`" in shown


def test_cpu_time_is_limited() -> None:
    def case(number: int, chance: random.Random) -> str:
        end = time.process_time() + 0.3 * (number == 1)
        while time.process_time() < end:
            pass
        return "fine"

    figure = cases.Figure("Title", "what").try_all(case, 3, 0, cpu_limit=0.2)
    assert figure.kinds == {"fine": 2}
    assert re.fullmatch(r"seed 0, case 1: took 0\.\d s of CPU time", figure.unexpected[0])

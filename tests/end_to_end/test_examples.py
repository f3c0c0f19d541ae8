"""The examples that stand alone run as their users run them."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_fusion_trainer(tmp_path):
    program = [sys.executable, str(EXAMPLES / "fusion_trainer.py")]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sft, fusion = map(float, re.findall(r"\d\.\d{3}", done.stdout)[-2:])
    assert fusion < sft  # the source knows what the fused pivot is asked for

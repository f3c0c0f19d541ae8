"""`make demo` with a fiftieth of the text and models that learn for seconds, below runs/quickstart.

    python reduced_demo.py [PART:NUMBER ...]

For each PART:NUMBER the demo is begun and killed, with the command that it runs, when that command
is about to write its n-th file with PART in its path. Then it is run to its end. With any of these
a command is no new program but a fork of this one, which has imported everything already.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "quickstart"), str(ROOT)]
os.environ["OMP_NUM_THREADS"] = "2"  # as the demo's commands have it, and forks from here

import demo  # noqa: E402
import parts  # noqa: E402

from tests.support.killing import in_child, kill_at  # noqa: E402

OUT = Path("runs/quickstart")
SETTINGS = demo.Settings(
    text=("--target-bytes", "12000", "--pivot-bytes", "20000", "--source-bytes", "30000"),
    models=("--hidden", "32", "--layers", "1", "--vocabulary", "600", "--epochs", "1"),
    training={"num_train_epochs": 1, "save_steps": 2, "logging_steps": 2},
)


def main() -> None:
    moments = [moment.rpartition(":") for moment in sys.argv[1:]]
    if not moments:
        demo.run(OUT, SETTINGS)
        return
    import accelerate  # noqa: F401
    import mergekit.scripts.run_yaml  # noqa: F401
    import trl  # noqa: F401
    from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, Phi3ForCausalLM  # noqa: F401

    for part, _, number in moments:
        status = in_child(
            lambda part=part, n=int(number): run_in_forks(kill_at(part, n, parent=True))
        )
        if status != -signal.SIGKILL:
            raise SystemExit(f"{part}:{number}: the demo ended with status {status}")
    raise SystemExit(in_child(lambda: run_in_forks(lambda: None)))


def run_in_forks(armed: Callable[[], None]) -> None:
    """The demo, with each command in a fork of this process that `armed` was called in."""

    def command(label: str | None, *words: str | Path) -> None:
        name, *arguments = map(str, words)

        def work() -> None:
            sys.argv = [name, *arguments]
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
                entry.load()()

        if status := in_child(work, armed, threads=2, quiet=label is not None):
            raise SystemExit(f"Error: {name} ended with status {status}")

    parts.command = demo.command = command
    demo.together = lambda *jobs: [job() for job in jobs]  # forks of one thread
    demo.run(OUT, SETTINGS)


if __name__ == "__main__":
    main()

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
import traceback
from collections.abc import Callable
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
os.environ["OMP_NUM_THREADS"] = "2"  # as the demo's commands have it, and forks from here

import demo  # noqa: E402
import parts  # noqa: E402

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
        status = in_fork(lambda part=part, n=int(number): run_in_forks(kill_at(part, n)))
        if status != -signal.SIGKILL:
            raise SystemExit(f"{part}:{number}: the demo ended with status {status}")
    raise SystemExit(in_fork(lambda: run_in_forks(lambda: None)))


def run_in_forks(armed: Callable[[], None]) -> None:
    """The demo, with each command in a fork of this process that `armed` was called in."""

    def command(label: str | None, *words: str | Path) -> None:
        name, *arguments = map(str, words)

        def work() -> None:
            armed()
            sys.argv = [name, *arguments]
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
                entry.load()()

        if status := in_fork(work, quiet=label is not None):
            raise SystemExit(f"Error: {name} ended with status {status}")

    parts.command = demo.command = command
    demo.together = lambda *jobs: [job() for job in jobs]  # forks of one thread
    demo.run(OUT, SETTINGS)


def in_fork(work: Callable[[], None], *, quiet: bool = False) -> int:
    """`work` in a forked process: its exit status, or minus the signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: object = 1
    try:
        if quiet:
            os.dup2(2, 1)
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def kill_at(part: str, number: int) -> Callable[[], None]:
    """Arm a command: end it and the demo when the n-th file with `part` in its path is written."""

    def arm() -> None:
        left = number

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            written = event in ("os.rename", "os.mkdir") or (
                event == "open" and str(arguments[1]).startswith(("w", "a", "x"))
            )
            if written and any(part in str(argument) for argument in arguments[:2]):
                left -= 1
                if left == 0:
                    os.kill(os.getppid(), signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


if __name__ == "__main__":
    main()

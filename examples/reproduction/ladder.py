"""Do the papers' claims hold at small scale? Trains, merges, measures and reports it.

    python examples/reproduction/ladder.py --scale cpu

writes everything to runs/ladder-cpu, including RESULTS.md and its pictures. It can be stopped at
any moment; the same command resumes and reuses finished work. The RESULTS.md beside this file was
written with `--results examples/reproduction`. `--scale gpu` has not been run yet.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from results import write_results
from steps import PIVOT, Ladder
from variants import CONTROL, CORE, DEFAULT, SCALES, VARM, Scale, Variant

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A part that one process makes: `make` of a `Ladder`, then the checkpoints are measured."""

    name: str
    make: str
    arguments: tuple[Any, ...] = ()
    checkpoints: tuple[Path, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", choices=[s for s in SCALES if s != "pico"], default="cpu")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: runs/ladder-SCALE")
    parser.add_argument("--results", metavar="DIR", type=Path, help="default: the same folder")
    options = parser.parse_args()
    out = options.out or Path("runs") / f"ladder-{options.scale}"
    command = f"python examples/reproduction/ladder.py --scale {options.scale}"
    run(out, SCALES[options.scale], options.results or out, command=command)


def run(out: Path, scale: Scale, results: Path, *, command: str) -> None:
    """Make everything that isn't there below `out`, and the results in the folder `results`."""
    # One thread per process: more would change the last digits, and not save time.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not any(scale.models.values()):
        os.environ["HF_HUB_OFFLINE"] = "1"
    ladder = Ladder(out.resolve(), scale)
    _claim(ladder)
    before = max((entry["wall"] for entry in _done(ladder).values()), default=0.0)
    begun = time.monotonic() - before
    with ProcessPoolExecutor(scale.processes, mp_context=get_context("spawn")) as pool:
        for phase in phases(ladder):
            _carry_out(ladder, pool, phase, begun)
    write_results(ladder, _done(ladder), results, command=command)


def _claim(ladder: Ladder) -> None:
    """The folder's own mark: what everything in it was made from.

    Raises:
        SystemExit: it was made from something else.
    """
    from importlib.metadata import version

    code = [HERE / name for name in ("steps.py", "variants.py")]
    code += [HERE.parent / "quickstart" / name for name in ("corpus.py", "models.py")]
    made_from = {
        "scale": sha256(repr(ladder.scale).encode()).hexdigest(),
        "code": sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
        "python": sys.version,
        **{name: version(name) for name in ("torch", "transformers", "trl", "mergekit")},
    }
    path = ladder.out / "made_from.json"
    if path.exists() and json.loads(path.read_text("utf-8")) != made_from:
        raise SystemExit(
            f"Error: {ladder.out} was made by another version of this; move it away, or name "
            "another folder with --out"
        )
    if not path.exists():
        ladder.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made_from), encoding="utf-8")


def phases(ladder: Ladder) -> list[list[Job]]:
    """All jobs; those of a phase are independent of each other."""
    scale = ladder.scale
    leaders = ladder.leaders()
    first = [_train(ladder, v, 0) for v in CORE]
    core = [_train(ladder, v, s) for s in range(1, scale.seeds) for v in CORE]
    factors = [v for v in scale.variants if v not in CORE]
    # Those that others depend on first, then seed by seed, so that an interrupted run is useful.
    single = [_train(ladder, v, 0) for v in factors if v in leaders]
    rest = [
        [_train(ladder, v, s) for v in factors if s or v not in leaders]
        for s in range(scale.factor_seeds)
    ]
    sft = next(v for v in scale.variants if v.name == "sft")
    merged = [
        Job(
            f"merge {variant.name} {merge.name} {seed}",
            "merge",
            (variant, merge, seed),
            (ladder.merged(variant.name, merge.name, seed),),
        )
        for variant in scale.variants
        if scale.targets(variant) == scale.sources
        for merge in scale.merges
        if merge.name == VARM or variant.name == DEFAULT
        for seed in range(scale.seeds_of(variant))
    ]
    merged += [
        Job(
            f"merge {CONTROL} {seed}",
            "merge_control",
            (sft, CONTROL, seed),
            (ladder.merged(DEFAULT, CONTROL, seed),),
        )
        for seed in range(scale.seeds)
    ]
    return [
        [Job("text", "make_text")],
        [
            Job(f"model {name}", "make_model", (name,))
            for name in (*scale.sources, PIVOT)
            if not scale.models[name]
        ],
        [*first[:1], *single[:1]],
        first[1:],
        core,
        [*(job for job in merged if DEFAULT in job.name or CONTROL in job.name), *single[1:]],
        *rest,
        merged,
    ]


def _train(ladder: Ladder, variant: Variant, seed: int) -> Job:
    targets = ladder.scale.targets(variant)
    checkpoints = tuple(ladder.target(variant, name, seed) for name in targets)
    return Job(f"train {variant.name} {seed}", "train", (variant, seed), checkpoints)


def _carry_out(ladder: Ladder, pool: ProcessPoolExecutor, jobs: list[Job], begun: float) -> None:
    done = _done(ladder)
    left = [job for job in jobs if job.name not in done]
    running = {pool.submit(work, ladder, job): job for job in left}
    try:
        for number, finished in enumerate(as_completed(running), 1):
            entry = finished.result() | {"wall": time.monotonic() - begun}
            with open(ladder.out / "jobs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            passed = datetime.timedelta(seconds=round(time.monotonic() - begun))
            print(
                f"[{passed}] {entry['name']}: {entry['seconds']:.0f} s ({number} of {len(left)})",
                file=sys.stderr,
                flush=True,
            )
    except BaseException:
        for future in running:
            future.cancel()
        raise


def work(ladder: Ladder, job: Job) -> dict[str, Any]:
    """Do a job in this process, with its output in a log file."""
    import torch

    torch.set_num_threads(1)
    log = ladder.out / "log" / f"{job.name.replace(' ', '-')}.txt"
    log.parent.mkdir(exist_ok=True)
    begun, cpu = time.monotonic(), time.process_time()
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            getattr(ladder, job.make)(*job.arguments)
            if job.checkpoints:
                ladder.measure({"checkpoint": list(job.checkpoints)})
        except Exception as error:
            traceback.print_exc()
            raise RuntimeError(f"{job.name}: {error} (see {log})") from error
    return {
        "name": job.name,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - cpu,
    }


def _done(ladder: Ladder) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        lines = (ladder.out / "jobs.jsonl").read_text("utf-8").splitlines()
        return {entry["name"]: entry for entry in map(json.loads, lines)}
    return {}


if __name__ == "__main__":
    main()

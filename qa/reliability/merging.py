"""Crashes, races, peak memory and determinism of merges."""

import errno
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors

from fusechat_merge.cli import main
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.passes import divide
from fusechat_merge.planning.planner import plan
from qa.reliability.cases import Figure, Section, Wrong, own_copy, scaled
from qa.reliability.models import BF16, F16, F32, adapter, with_tokenizer
from tests.support import crashing
from tests.support.checkpoints import llama_family as family
from tests.support.killing import exit_status, forked, start_child, wait_for_child
from tests.support.merging import cli, configuration, content, work_of

CRASHES = "Crashes of a merge, injected and recovered"
SHAPE = {"vocab_size": 700, "hidden_size": 32}
SAFE = {"memory": 8_000_000, "shard_size": 40_000, "threads": 2}


def settings_for(folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations of every kind of work: each granularity, SCE, mergekit's methods, LoRA."""
    paths = family(folder, (BF16,) * 3, shards=3, changes=SHAPE)
    with_tokenizer(paths[0])
    lora = [adapter(folder / f"lora{seed}", paths[0], seed) for seed in (1, 2)]
    found = {
        f"varm, {granularity}": configuration(paths, parameters={"granularity": granularity})
        for granularity in ("matrix", "module", "layer", "model", "element")
    }
    half = {"weight": 0.5}
    return found | {
        "fusechat_sce": configuration(paths, "fusechat_sce", parameters={"select_topk": 0.3}),
        "linear": configuration(paths, "linear", parameters=half),
        "ties": configuration(paths, "ties", parameters={**half, "density": 0.5}),
        "varm with LoRA": configuration([paths[0], *lora]),
        "varm in float32": configuration(paths, dtype="float32", out_dtype="bfloat16"),
    }


@dataclass
class Calm:
    """What a configuration makes when nothing happens, in how many calls and seconds."""

    name: str
    config: dict[str, Any]
    files: dict[str, bytes]
    calls: int
    seconds: float


def undisturbed(work: Path, names: list[str] | None = None) -> list[Calm]:
    every = settings_for(work / "in")
    found = []
    for name in names or every:
        out = work / "whole" / name
        merge(every[name], out, **SAFE)  # here, so that the children have everything compiled
        files = content(out)
        shutil.rmtree(out)
        begun = time.monotonic()
        calls = must_merge(every[name], out, files)["calls"]
        found.append(Calm(name, every[name], files, calls, time.monotonic() - begun))
        shutil.rmtree(out)
    return found


def attempt(config: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    options = SAFE | more.pop("options", {})
    order = {"config": config, "out": str(out), "kill_at": 0, "options": options}
    return crashing.attempt(order | more)


def must_not_look_whole(out: Path, *whole: dict[str, bytes] | None) -> None:
    found = content(out) if out.exists() else None
    if found is not None and found not in whole:
        raise Wrong(f"OUT is there and not whole: {sorted(found)}")


def must_merge(config: Any, out: Path, files: dict[str, bytes], **options: Any) -> dict[str, Any]:
    """Carry a merge out, or resume it: it has to make these files."""
    ended = attempt(config, out, options=options)
    if ended["status"] or ended["error"]:
        raise Wrong(f"the command isn't carried out: {ended}")
    if content(out) != files:
        differing = [name for name in files if files[name] != content(out).get(name)]
        raise Wrong(f"these differ: {differing}")
    if work_of(out).exists():
        raise Wrong("the work folder was left behind")
    return ended


def must_resume(calm: Calm, out: Path, chance: random.Random, **options: Any) -> None:
    options |= {"threads": chance.choice([1, 2, 3]), "memory": chance.choice([8_000_000, 64 << 20])}
    must_merge(calm.config, out, calm.files, **options)
    shutil.rmtree(out)


def crashes(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """kill -9, a failing disk, sources that change: at every kind of call and at any time."""
    every = undisturbed(work, None if scale >= 0.1 else ["varm, layer", "ties"])
    old = {"config.json": b"{}", "precious": b"x"}

    def start(number: int) -> tuple[Calm, Path]:
        return every[number % len(every)], work / f"out-{os.getpid()}-{number}"

    def killed(number: int, chance: random.Random) -> str:
        calm, out = start(number)
        over = chance.random() < 0.25
        if over:
            out.mkdir()
            for file, raw in old.items():
                (out / file).write_bytes(raw)
        for _ in range(chance.choice([1, 1, 2, 3])):
            ended = attempt(calm.config, out, options={"overwrite": over}, **moment(chance, calm))
            must_not_look_whole(out, calm.files, old if over else None)
            if ended["status"] not in (0, signal.SIGKILL):
                raise Wrong(f"{calm.name}: {ended}")
        must_resume(calm, out, chance, overwrite=over)
        return "of " + calm.name.split(",")[0]

    def moment(chance: random.Random, calm: Calm) -> dict[str, Any]:
        kind = chance.randrange(3)
        if kind == 0:
            return {"kill_at": chance.randrange(1, calm.calls + 1)}
        if kind == 1:
            _, call = chance.choice(crashing.CALLS)
            return {"kill_at": f"{chance.choice(['before', 'after'])} {call}"}
        return {"kill_after_seconds": chance.random() * calm.seconds * 1.1}

    what = "kill -9 at a call that changes the disk or at any time, once to thrice"
    figure = Figure(CRASHES, what, "resumed to the same bytes: {kinds}")
    yield figure.try_all(killed, scaled(300, scale), seed)

    def failed(number: int, chance: random.Random) -> str:
        calm, out = start(number)
        code = chance.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO])
        more: dict[str, Any] = {
            "at": chance.randrange(1, calm.calls + 1),
            "fail": {"errno": code, "lasting": chance.random() < 0.6},
        }
        if chance.random() < 0.2:
            more = {"file_limit": chance.randrange(1, 60_000)}
        ended = attempt(calm.config, out, **more)
        must_not_look_whole(out, calm.files)
        what = f"{calm.name} {more}: {ended}"
        if ended["status"]:
            raise Wrong(what)
        if not ended["error"] and content(out) != calm.files:
            raise Wrong(f"{what}: no error, and something is missing")
        status, message = ended["error"] or (1, "the same command resumes")
        if status != 1 or "the same command resumes" not in message:
            raise Wrong(what)
        must_resume(calm, out, chance)
        return "told and resumed" if ended["error"] else "harmless (in tidying up, say)"

    figure = Figure(CRASHES, "a disk that is full or fails, at any call, once or from then on")
    yield figure.try_all(failed, scaled(150, scale), seed)

    def meddled(number: int, chance: random.Random) -> str:
        calm, out = start(number)
        here = own_copy(work / "in")
        config = json.loads(json.dumps(calm.config).replace(str(work / "in"), str(here)))
        target = chance.choice([config["base_model"], *(m["model"] for m in config["models"])])
        file = chance.choice(sorted(Path(target).glob("*.safetensors")))
        how, at = chance.choice(["vanish", "truncate", "rewrite"]), chance.randrange(1, calm.calls)
        original, times_of = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        ended = attempt(config, out, at=at, meddle={"how": how, "file": str(file)})
        there = out.exists()
        Path(f"{file}.gone").unlink(missing_ok=True)
        file.write_bytes(original)
        os.utime(file, ns=times_of)  # as it was, from a backup say
        what = f"{calm.name} {how} {file.name} at call {at} of {calm.calls}: {ended}"
        if ended["status"] or (ended["error"] and ended["error"][0] == 2):
            raise Wrong(what)
        if there and ended["error"] is not None:
            raise Wrong(f"OUT is there all the same: {what}")
        again = attempt(config, out)
        if again["status"] or again["error"]:
            raise Wrong(f"{what}; then {again}")
        found = content(out)
        weights = [name for name in calm.files if name.endswith(".safetensors")]
        if any(found.get(name) != calm.files[name] for name in weights):
            raise Wrong(f"{what}; then other weights")
        shutil.rmtree(out)
        return "told and made right" if ended["error"] else "too late to matter"

    what = "a source's shard that vanishes, shrinks or changes while it is merged"
    yield Figure(CRASHES, what).try_all(meddled, scaled(100, scale), seed)


RACES = "Races of merges"


def together(commands: list[list[str]], chance: random.Random) -> list[tuple[int, str]]:
    """Run commands in children that start at about one moment: each one's exit status and output."""
    moment = time.monotonic() + 0.1  # by then all are forked

    def one(command: list[str], delay: float) -> None:
        time.sleep(max(0.0, moment + delay - time.monotonic()))
        main(command)

    delays = [chance.choice([0, 0, 0.02, 0.1]) * chance.random() for _ in commands]
    started = [start_child(partial(one, *case)) for case in zip(commands, delays, strict=True)]
    return [wait_for_child(*child) for child in started]


def races(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Several runs in one folder; readers and ``verify`` beside ``run --overwrite``."""
    every = settings_for(work / "in")
    ymls = [work / "merge0.yml", work / "merge1.yml"]
    for yml, name in zip(ymls, ("varm, matrix", "varm, layer"), strict=True):
        yml.write_text(json.dumps(every[name]))
    options = ["--memory", "8MB", "--shard-size", "40KB", "--threads", "2"]
    for number, yml in enumerate(ymls):
        result = cli("run", yml, work / f"whole{number}", *options)
        assert result.exit_code == 0, result.output
    files = [content(work / f"whole{number}") for number in range(len(ymls))]

    def one_folder(number: int, chance: random.Random) -> str:
        out = work / f"out-{number}"
        which = chance.choice([[0, 0], [0, 0, 0], [0, 1], [0, 1]])
        ends = together([["run", str(ymls[n]), str(out), *options] for n in which], chance)
        codes = [code for code, _ in ends]
        if 0 not in codes or set(codes) - {0, 2} or any("Traceback" in text for _, text in ends):
            raise Wrong(ends)
        won = {n for n, code in zip(which, codes, strict=True) if code == 0}
        if len(won) > 1:
            raise Wrong(f"two different merges say that they wrote {out.name}: {ends}")
        if content(out) != files[won.pop()]:
            raise Wrong("OUT is not what the winner makes")
        if work_of(out).exists():
            raise Wrong("the work folder was left behind")
        shutil.rmtree(out)
        same = "the same" if len(set(which)) == 1 else "different"
        return f"pairs or triples of {same} merges"

    what = "runs in one folder at one moment: one wins, the others say so or find it done"
    yield Figure(RACES, what).try_all(one_folder, scaled(90, scale), seed)

    def beside(number: int, chance: random.Random) -> str:
        out = work / f"read-{number}"
        shutil.copytree(work / "whole0", out)
        shard = min(name for name in files[0] if name.endswith(".safetensors"))
        allowed = [f[shard] for f in files]

        def read() -> None:
            while not (work / f"stop-{number}").exists():
                if (out / shard).read_bytes() not in allowed:
                    sys.exit(3)

        reader = forked(read)
        commands = [["run", str(ymls[1]), str(out), *options, "--overwrite"]]
        commands += [["verify", str(ymls[chance.randrange(2)]), str(out)]]
        end, other = together(commands, chance)
        (work / f"stop-{number}").touch()
        if code := exit_status(reader):
            raise Wrong("a reader saw a torn file" if code == 3 else "a reader found the file gone")
        if end[0] or content(out) != files[1]:
            raise Wrong(end)
        if other[0] not in (0, 1, 2) or "Traceback" in other[1] or "shows where" in other[1]:
            raise Wrong(other)
        shutil.rmtree(out)
        return ["verify found nothing", "verify found differences", "verify was refused"][other[0]]

    figure = Figure(RACES, "run --overwrite beside a reader of OUT and beside verify")
    yield figure.try_all(beside, scaled(30, scale), seed)


def determinism(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """The same bytes whatever the threads, the memory, the shards and the interruptions."""
    shard_sizes = {"one shard": 5_000_000_000, "many shards": 40_000}
    every = {}
    for calm in undisturbed(work, None if scale >= 0.1 else ["varm, layer", "ties"]):
        for shards, size in shard_sizes.items():
            out = work / f"{calm.name} {shards}"
            merge(calm.config, out, shard_size=size)
            every[calm.name, shards] = calm, size, content(out)
    budgets = (8_000_000, 13_000_000, 40_000_000, 256 << 20)
    choices = list(itertools.product(every, (1, 2, 3, 5), budgets, (0, 1, 2)))
    random.Random(seed).shuffle(choices)

    def case(number: int, chance: random.Random) -> str:
        which, threads, memory, kills = choices[number % len(choices)]
        (calm, size, files), out = every[which], work / f"out-{number}"
        options = {"threads": threads, "memory": memory, "shard_size": size}
        for _ in range(kills):
            attempt(calm.config, out, options=options, kill_at=chance.randrange(1, calm.calls))
        must_merge(calm.config, out, files, **options)
        shutil.rmtree(out)
        tensors_only = json.dumps(sorted((k, v.hex()) for k, v in tensors(files).items()))
        return f"{calm.name}: {sha256(tensors_only.encode()).hexdigest()}"

    what = "threads 1, 2, 3, 5; four budgets; one shard or many; none, one or two kills"
    figure = Figure("Determinism of a merge", f"every file the same bytes: {what}")
    figure.try_all(case, scaled(200, scale), seed)
    configurations = len({kind.split(":")[0] for kind in figure.kinds})
    figure.note = f"{configurations} configurations, {len(figure.kinds)} distinct sets of tensors"
    yield figure


def tensors(files: dict[str, bytes]) -> dict[str, bytes]:
    """Every tensor of a model's files, wherever it lies."""
    found = {}
    for name, raw in files.items():
        if name.endswith(".safetensors"):
            found |= {key: bytes(value["data"]) for key, value in safetensors.deserialize(raw)}
    return found


MARGIN = 40 << 20
"""What a merge takes besides --memory: its plan, the interpreter's own objects, torch's scratch."""


def memory(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """The peak of random merges above a trivial one, against --memory."""
    paths = family(work / "in", (BF16,) * 6, changes=SHAPE)
    for count in range(2, 7):  # everything is imported, and compiled for so many targets
        merge(configuration(paths[:count]), work / f"warm{count}")
    if not Path("/proc/self/clear_refs").exists():
        return

    def case(number: int, chance: random.Random) -> str:
        folder = work / f"plan-{number}"
        config = random_merge(folder, chance)
        budget = int(2 ** chance.uniform(22, 28))
        threads = chance.choice([1, 2, 3, 5, 8])
        try:
            divide(plan(config).outputs, budget, threads)
        except ValueError as error:  # the least that it names has to do
            budget = int(re.search(r"(\d+)MiB", str(error))[1]) << 20
        merged = folder / "out"
        answer = folder / "grown"

        def measured() -> None:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before = status("VmRSS")
            merge(config, merged, memory=budget, threads=threads)
            answer.write_text(str(status("VmHWM") - before))

        if exit_status(forked(measured)):
            raise Wrong("the merge failed")
        grown = int(answer.read_text())
        shutil.rmtree(folder)
        if grown > budget + MARGIN:
            raise Wrong(f"{grown >> 20} MiB with --memory {budget >> 20}MiB: {config}")
        return f"{budget} {grown}"

    figure = Figure(
        "Peak memory against the budget",
        f"random merges: peak above a trivial merge's, at most --memory + {MARGIN >> 20} MiB",
    )
    figure.try_all(case, scaled(50, scale), seed, limit=120)
    figure.points = tuple(sorted(tuple(map(int, kind.split())) for kind in figure.kinds))
    worst = max((grown - budget for budget, grown in figure.points), default=0)
    figure.note = f"at the worst {worst / (1 << 20):+.0f} MiB off --memory"
    yield figure


def status(key: str) -> int:
    """A line of this process's status, bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) << 10


def random_merge(folder: Path, chance: random.Random) -> dict[str, Any]:
    """Models of a random shape and a random merge of them by one of our methods."""
    hidden = chance.choice([16, 64, 128, 256])
    changes = {
        "vocab_size": chance.choice([50, 1000, 2_000_000 // hidden, 4_000_000 // hidden]),
        "hidden_size": hidden,
        "head_dim": hidden // 4,
        "intermediate_size": hidden * chance.randrange(1, 5),
        "num_hidden_layers": chance.choice([1, 2, 6]),
    }
    dtypes = chance.choices([BF16, BF16, F16, F32], k=chance.randrange(2, 6))
    if chance.random() < 0.5:
        dtypes = [dtypes[0]] * len(dtypes)
    base, *targets = family(folder / "in", dtypes, changes=changes, shards=chance.randrange(1, 3))
    if chance.random() < 0.25:
        targets[0] = adapter(folder / "adapter", base, rank=chance.choice([2, 16]))
    settings: dict[str, Any] = {}
    if chance.random() < 0.3:
        settings["out_dtype"] = chance.choice(["float32", "float16"])
    if chance.random() < 0.3:
        parameters: dict[str, Any] = {"select_topk": chance.choice([0.1, 0.5, 1.0])}
        return configuration([base, *targets], "fusechat_sce", parameters=parameters, **settings)
    parameters = {
        "granularity": chance.choice(["matrix", "module", "layer", "model", "element"]),
        "statistic": chance.choice(["square", "absolute"]),
    }
    return configuration([base, *targets], parameters=parameters, **settings)


SECTIONS: dict[str, Section] = {
    "crashes-merge": crashes,
    "races-merge": races,
    "memory-merge": memory,
    "determinism-merge": determinism,
}

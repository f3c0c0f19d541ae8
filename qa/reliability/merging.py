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
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
from click.testing import CliRunner

from fusechat_merge.cli import main
from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.passes import divide
from fusechat_merge.planning.planner import plan
from qa.reliability.cases import Figure, Section, Wrong, exit_status, forked, own_copy, scaled
from qa.reliability.models import (
    BF16,
    F16,
    F32,
    adapter,
    configuration,
    content,
    with_tokenizer,
    work_of,
)
from tests.support import crashing
from tests.support.checkpoints import llama_family as family

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


class Undisturbed:
    """What every configuration makes when nothing happens, and how many calls and seconds it takes."""

    def __init__(self, work: Path, names: list[str] | None = None) -> None:
        every = settings_for(work / "in")
        self.settings = {name: every[name] for name in names or every}
        self.names = list(self.settings)
        self.files: dict[str, dict[str, bytes]] = {}
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for name, config in self.settings.items():
            out = work / "whole" / name
            merge(config, out, **SAFE)  # here, so that the children have everything compiled
            self.files[name] = content(out)
            shutil.rmtree(out)
            started = time.monotonic()
            ended = attempt(config, out)
            if ended["status"] or ended["error"] or content(out) != self.files[name]:
                raise RuntimeError(f"{name} doesn't merge undisturbed: {ended}")
            self.calls[name], self.seconds[name] = ended["calls"], time.monotonic() - started
            shutil.rmtree(out)


def attempt(config: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    options = SAFE | more.pop("options", {})
    order = {"config": config, "out": str(out), "kill_at": 0, "options": options}
    return crashing.attempt(order | more)


def must_not_look_whole(out: Path, *whole: dict[str, bytes] | None) -> None:
    found = content(out) if out.exists() else None
    if found is not None and found not in whole:
        raise Wrong(f"OUT is there and not whole: {sorted(found)}")


def must_resume(
    config: Any, out: Path, files: dict[str, bytes], chance: random.Random, **options: Any
) -> None:
    options |= {"threads": chance.choice([1, 2, 3]), "memory": chance.choice([8_000_000, 64 << 20])}
    ended = attempt(config, out, options=options)
    if ended["status"] or ended["error"]:
        raise Wrong(f"the same command didn't go on: {ended}")
    if content(out) != files:
        differing = [name for name in files if files[name] != content(out).get(name)]
        raise Wrong(f"after going on these differ: {differing}")
    if work_of(out).exists():
        raise Wrong("the work folder was left behind")


def crashes(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """kill -9, a failing disk, sources that change: at every kind of call and at any time."""
    calm = Undisturbed(work, None if scale >= 0.1 else ["varm, layer", "ties"])
    old = {"config.json": b"{}", "precious": b"x"}

    def start(number: int) -> tuple[str, dict[str, Any], Path]:
        name = calm.names[number % len(calm.names)]
        return name, calm.settings[name], work / f"out-{os.getpid()}-{number}"

    def killed(number: int, chance: random.Random) -> str:
        name, config, out = start(number)
        over = chance.random() < 0.25
        if over:
            out.mkdir()
            for file, raw in old.items():
                (out / file).write_bytes(raw)
        for _ in range(chance.choice([1, 1, 2, 3])):
            ended = attempt(config, out, options={"overwrite": over}, **moment(chance, name))
            must_not_look_whole(out, calm.files[name], old if over else None)
            if ended["status"] not in (0, signal.SIGKILL):
                raise Wrong(f"{name}: {ended}")
        must_resume(config, out, calm.files[name], chance, overwrite=over)
        shutil.rmtree(out)
        return "of " + name.split(",")[0]

    def moment(chance: random.Random, name: str) -> dict[str, Any]:
        kind = chance.randrange(3)
        if kind == 0:
            return {"kill_at": chance.randrange(1, calm.calls[name] + 1)}
        if kind == 1:
            _, call = chance.choice(crashing.CALLS)
            return {"kill_at": f"{chance.choice(['before', 'after'])} {call}"}
        return {"kill_after_seconds": chance.random() * calm.seconds[name] * 1.1}

    what = "kill -9 at a call that changes the disk or at any time, once to thrice"
    figure = Figure(CRASHES, what, "resumed to the same bytes: {kinds}")
    yield figure.try_all(killed, scaled(300, scale), seed)

    def failed(number: int, chance: random.Random) -> str:
        name, config, out = start(number)
        code = chance.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO])
        more: dict[str, Any] = {
            "at": chance.randrange(1, calm.calls[name] + 1),
            "fail": {"errno": code, "lasting": chance.random() < 0.6},
        }
        if chance.random() < 0.2:
            more = {"file_limit": chance.randrange(1, 60_000)}
        ended = attempt(config, out, **more)
        must_not_look_whole(out, calm.files[name])
        if ended["status"] or (ended["error"] and ended["error"][0] != 1):
            raise Wrong(f"{name} {more}: {ended}")
        if ended["error"] and "the same command resumes" not in ended["error"][1]:
            raise Wrong(f"{name} {more}: {ended}")
        if not ended["error"] and content(out) != calm.files[name]:
            raise Wrong(f"{name} {more}: no error, and something is missing")
        must_resume(config, out, calm.files[name], chance)
        shutil.rmtree(out)
        return "told and resumed" if ended["error"] else "harmless (in tidying up, say)"

    figure = Figure(CRASHES, "a disk that is full or fails, at any call, once or from then on")
    yield figure.try_all(failed, scaled(150, scale), seed)

    def meddled(number: int, chance: random.Random) -> str:
        name, config, out = start(number)
        here = own_copy(work / "in")
        config = json.loads(json.dumps(config).replace(str(work / "in"), str(here)))
        target = chance.choice([config["base_model"], *(m["model"] for m in config["models"])])
        file = chance.choice(sorted(Path(target).glob("*.safetensors")))
        how = chance.choice(["vanish", "truncate", "rewrite"])
        more = {
            "at": chance.randrange(1, calm.calls[name]),
            "meddle": {"how": how, "file": str(file)},
        }
        original, times_of = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        ended = attempt(config, out, **more)
        there = out.exists()
        Path(f"{file}.gone").unlink(missing_ok=True)
        file.write_bytes(original)
        os.utime(file, ns=times_of)  # as it was, from a backup say
        what = f"{name} {how} {file.name} at call {more['at']} of {calm.calls[name]}: {ended}"
        if ended["status"] or (ended["error"] and ended["error"][0] == 2):
            raise Wrong(what)
        if there and ended["error"] is not None:
            raise Wrong(f"OUT is there all the same: {what}")
        again = attempt(config, out)
        if again["status"] or again["error"]:
            raise Wrong(f"{what}; then {again}")
        weights = {n: raw for n, raw in calm.files[name].items() if n.endswith(".safetensors")}
        found = content(out)
        if any(found.get(n) != raw for n, raw in weights.items()):
            raise Wrong(f"{what}; then other weights")
        shutil.rmtree(out)
        return "told and made right" if ended["error"] else "too late to matter"

    what = "a source's shard that vanishes, shrinks or changes while it is merged"
    yield Figure(CRASHES, what).try_all(meddled, scaled(100, scale), seed)


RACES = "Races of merges"


def together(
    commands: list[list[str]], chance: random.Random, folder: Path
) -> list[tuple[int, str]]:
    """Run commands in children that all start at one moment; exit status and stderr of each."""
    folder.mkdir(exist_ok=True)
    gate, opening = os.pipe()

    def one(command: list[str], told: Path, delay: float) -> None:
        os.close(opening)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.read(gate, 1)
        time.sleep(delay)
        main(command)

    children = {}
    for number, command in enumerate(commands):
        told = folder / f"stderr-{number}"
        delay = chance.choice([0, 0, 0.02, 0.1]) * chance.random()
        children[told] = forked(partial(one, command, told, delay))
    os.close(gate)
    os.close(opening)
    codes = [exit_status(pid) for pid in children.values()]
    return list(zip(codes, [told.read_text() for told in children], strict=True))


def races(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Several runs in one folder; readers and ``verify`` beside ``run --overwrite``."""
    calm = Undisturbed(work, ["varm, matrix", "varm, layer"])
    ymls = []
    for number, name in enumerate(calm.names):
        ymls.append(work / f"merge{number}.yml")
        ymls[-1].write_text(json.dumps(calm.settings[name]))
    options = ["--memory", "8MB", "--shard-size", "40KB", "--threads", "2"]
    files = [merged_files(yml, work / f"whole{n}", options) for n, yml in enumerate(ymls)]

    def one_folder(number: int, chance: random.Random) -> str:
        out = work / f"out-{number}"
        which = chance.choice([[0, 0], [0, 0, 0], [0, 1], [0, 1]])
        ends = together(
            [["run", str(ymls[n]), str(out), *options] for n in which], chance, work / f"e{number}"
        )
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
        (end, other) = together(commands, chance, work / f"e{number}")
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


def merged_files(yml: Path, out: Path, options: list[str]) -> dict[str, bytes]:
    result = CliRunner().invoke(main, ["run", str(yml), str(out), *options])
    if result.exit_code:
        raise RuntimeError(result.output)
    return content(out)


def determinism(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """The same bytes whatever the threads, the memory, the shards and the interruptions."""
    calm = Undisturbed(work, None if scale >= 0.1 else ["varm, layer", "ties"])
    shard_sizes = {"one shard": 5_000_000_000, "many shards": 40_000}
    reference = {}
    for name, config in calm.settings.items():
        for shards, size in shard_sizes.items():
            out = work / f"{name} {shards}"
            merge(config, out, shard_size=size)
            reference[name, shards] = content(out)
    cases = list(
        itertools.product(
            calm.names, (1, 2, 3, 5), (8_000_000, 13_000_000, 40_000_000, 256 << 20),
            shard_sizes, (0, 1, 2),
        )
    )  # fmt: skip
    random.Random(seed).shuffle(cases)

    def case(number: int, chance: random.Random) -> str:
        name, threads, memory, shards, kills = cases[number % len(cases)]
        config, out = calm.settings[name], work / f"out-{number}"
        options = {"threads": threads, "memory": memory, "shard_size": shard_sizes[shards]}
        for _ in range(kills):
            attempt(config, out, options=options, kill_at=chance.randrange(1, calm.calls[name]))
        ended = attempt(config, out, options=options)
        found = content(out) if out.exists() else {}
        if found != reference[name, shards]:
            raise Wrong(f"{cases[number % len(cases)]}: {ended}: other bytes")
        shutil.rmtree(out)
        tensors_only = json.dumps(sorted((k, v.hex()) for k, v in tensors(found).items()))
        return f"{name}: {sha256(tensors_only.encode()).hexdigest()}"

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

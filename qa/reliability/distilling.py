"""Crashes, races, determinism and security of distillations."""

import atexit
import errno
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import datasets
import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fusechat_distill.cli import commands
from fusechat_distill.storage.shards import ScoreStore
from qa.reliability.cases import Figure, Section, Wrong, scaled
from qa.reliability.models import Trap
from tests.support import chain
from tests.support.killing import start_child, wait_for_child
from tests.support.merging import change_json, content

CRASHES = "Crashes of a distillation"
RACES = "Races of distillations"
SAME = "The same distillation again"
SECURITY = "Security of a distillation"

T = TypeVar("T")

STAGES = ("score", "align", "train", "evaluate")
"""`train` fuses, trains and writes merge.yml."""
NAMES = ("pivot", "neox")
TIMED = ("trainer_state.json", "log.jsonl", "digests.json")
"""Files that say how long something took, or when a file was changed."""


@dataclass
class World:
    """Small models, a recipe, and what its output holds after each stage."""

    folder: Path
    recipe: Path
    out: Path
    made: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def before(self, stage: str) -> Path:
        """A copy of the output as it is when a stage begins."""
        if number := STAGES.index(stage):
            self.after(STAGES[number - 1])
        return self.folder / f"before-{stage}"

    def after(self, stage: str) -> dict[str, bytes]:
        """Files that a stage, and those before it, make when nothing happens."""
        if stage not in self.made:
            self.restore(stage)
            chain.printed(stage, self.recipe)
            self.made[stage] = files(self.out)
            for following in STAGES[STAGES.index(stage) + 1 :][:1]:
                shutil.copytree(self.out, self.folder / f"before-{following}")
        return self.made[stage]

    def restore(self, stage: str) -> None:
        before = self.before(stage)
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(before, self.out)

    def start(
        self, *arguments: str, before: Callable[[], object] = int, recipe: Path | None = None
    ) -> tuple[int, IO[bytes]]:
        """A command in a process of its own, in which `before` is done first."""

        def work() -> None:
            torch.set_num_threads(1)
            before()
            commands.main([*arguments, str(recipe or self.recipe)])

        return start_child(work)

    def run(self, *arguments: str, **more: Any) -> tuple[int, str]:
        """The same to its end: its status (or minus the signal), and what it said."""
        return wait_for_child(*self.start(*arguments, **more))

    def done(self, *arguments: str, **more: Any) -> None:
        """The same, which has to succeed."""
        status, said = self.run(*arguments, **more)
        if status != 0:
            raise Wrong(f"{arguments}: status {status}: {said[-300:]}")


def files(out: Path) -> dict[str, bytes]:
    """Everything under a name that is not a temporary one's and not of an unfinished training."""
    return {
        name: raw
        for name, raw in content(out).items()
        if Path(name).name not in (*TIMED, ".lock")
        and not name.startswith("training/")
        and not any(part.endswith(".part") for part in Path(name).parts)
    }


@cache
def world() -> World:
    """Made once, for all sections."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-distill-")).resolve()
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    logging.disable_progress_bar()
    chain.save_models(folder / "models")
    recipe = chain.recipe(folder, folder / "models", count=270)
    (folder / f"before-{STAGES[0]}").mkdir()
    return World(folder, recipe, folder / "out")


def some(every: Iterable[T], scale: float) -> list[T]:
    """All of them, or, far below scale 0.1, the first ones."""
    listed = list(every)
    return listed[: scaled(len(listed), min(1.0, 10 * scale))]


REMOVALS = ("os.remove", "os.rmdir")


def changed_by(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that an audit event says are about to be made, changed or removed."""
    if event in ("os.rename", "os.link", "os.symlink"):
        return [os.fsdecode(path) for path in arguments[:2]]
    if event in ("os.mkdir", *REMOVALS):
        return [os.fsdecode(arguments[0])]
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    return [os.fsdecode(arguments[0])] if writing and not isinstance(arguments[0], int) else []


def at_disk_calls(out: Path, do: Callable[[int, str], object]) -> Callable[[], None]:
    """`do` is told of each call that changes the disk below `out`, just before: number and kind."""

    def arm() -> None:
        calls = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if any(str(out) in path for path in changed_by(event, arguments)):
                do(next(calls), event)

        def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
            do(next(calls), "os.fsync")
            real(handle)

        os.fsync = fsync
        sys.addaudithook(hook)

    return arm


def kill_at(number: int) -> Callable[[int, str], None]:
    def do(call: int, kind: str) -> None:
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return do


def full_from(number: int) -> Callable[[int, str], None]:
    """What is written from the n-th call on fails; files may still be renamed and removed."""

    def do(call: int, kind: str) -> None:
        if call >= number and kind in ("open", "os.mkdir", "os.fsync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return do


def after_seconds(seconds: float) -> Callable[[], None]:
    def arm() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, with no clean-up
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return arm


def clean_end(status: int, said: str, allowed: tuple[int, ...] = (0, 1, 2)) -> bool:
    """Done, or one line that says why not."""
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    return status in allowed and len(errors) == (status != 0) and "Traceback" not in said


def partial_files(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Files under their final names that are not what they will be."""
    return [name for name in found if found[name] != expected.get(name)]


def crashed(made: World, stage: str, arm: Callable[[], None], *, dies: bool) -> None:
    """Disturb a stage, then run it again.

    Raises:
        Wrong: it leaves what looks whole and is not, or the second run makes something else.
    """
    made.restore(stage)
    status, said = made.run(stage, before=arm)
    fine = status in (0, -signal.SIGKILL, -signal.SIGALRM)
    if not (fine if dies else clean_end(status, said, (0, 1))):
        raise Wrong(f"status {status}: {said[-600:]}")
    made.done("status", "--json")
    expected = made.after(stage)
    if torn := partial_files(files(made.out), expected):
        raise Wrong(f"partial under its final name: {torn}")
    target = made.out / "targets" / "neox"
    if target.exists():
        AutoModelForCausalLM.from_pretrained(target)
    made.done(stage)
    found = files(made.out)
    if found != expected:
        names = sorted(found.keys() ^ expected.keys()) or partial_files(found, expected)
        raise Wrong(f"another result: {names}")
    # Of shards and targets nothing stays; of small files a killed process's hidden part may.
    folders = [f"{kind}/{name}/" for kind in ("scores", "aligned", "fused") for name in NAMES]
    left = [str(path.relative_to(made.out)) for path in made.out.rglob("*.part")]
    left = [name for name in left if name.startswith((*folders, "targets/"))]
    left += [str(path) for path in (made.out / "training").glob("*")] if stage == "train" else []
    if left:
        raise Wrong(f"left behind: {left}")


@cache
def undisturbed(stage: str) -> tuple[int, float]:
    """How many calls that change the disk a stage makes, and how many seconds it takes."""
    made = world()
    made.after(stage)
    made.restore(stage)
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=made.folder) as counter:
        count = at_disk_calls(made.out, lambda call, kind: os.write(counter.fileno(), b"."))
        made.done(stage, before=count)
        return os.fstat(counter.fileno()).st_size, time.monotonic() - began


CASES = {"score": 10, "align": 10, "train": 8, "evaluate": 4}
"""Of each kind of crash."""


def disturbances(out: Path, calls: int, seconds: float, chance: random.Random) -> dict[str, Any]:
    """What is done to a stage of so many calls and seconds, by name; applied in its process."""
    call, size = chance.randint(1, calls), chance.randrange(1, 70_000)
    return {
        "kill -9 at a call that changes the disk": at_disk_calls(out, kill_at(call)),
        "kill at any moment": after_seconds(chance.uniform(0.01, seconds)),
        "no space left from a call on": at_disk_calls(out, full_from(call)),
        "no file larger than a limit": partial(
            resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)
        ),
    }


KINDS = list(disturbances(Path(), 1, 1.0, random.Random()))


def crashes(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    made = world()
    for stage, kind in some(itertools.product(STAGES, KINDS), scale):
        calls, seconds = undisturbed(stage)

        def case(number: int, _: random.Random) -> str:
            chance = random.Random(f"{seed}/{stage}/{kind}/{number}")
            arm = disturbances(made.out, calls, seconds, chance)[kind]
            crashed(made, stage, arm, dies="kill" in kind)
            return ""

        note = "nothing partial looks whole; the same command again: the same bytes"
        figure = Figure(CRASHES, f"`{stage}`: {kind}", note)
        yield figure.try_all(case, scaled(CASES[stage], scale), seed, 600, 600.0, workers=1)


PAIRS = [
    *(("run", "run", "score"), ("score", "score", "score"), ("score", "align", "score")),
    *(("score", "status", "score"), ("align", "align", "align"), ("train", "train", "train")),
    *(("train", "evaluate", "train"), ("evaluate", "evaluate", "evaluate")),
]
"""Two commands, and the stage that the output is at when both start."""


def raced(made: World, pair: list[str], stage: str, apart: float) -> str:
    """How many of the two end with an error; their result has to be the undisturbed one."""
    made.restore(stage)
    second = partial(time.sleep, apart)
    started = [made.start(pair[0]), made.start(pair[1], before=second)]
    ended = [wait_for_child(*one) for one in started]
    for status, said in ended:
        if not clean_end(status, said):
            raise Wrong(f"status {status}: {said[-500:]}")
    # What evaluate says depends on which models were there.
    found = {n: c for n, c in files(made.out).items() if not n.startswith(("evaluation", "report"))}
    if torn := partial_files(found, made.after("evaluate")):
        raise Wrong(f"partial under its final name: {torn}")
    made.done("run")
    made.done("evaluate")
    found = {n: c for n, c in files(made.out).items() if not n.startswith("evaluation/")}
    if torn := partial_files(found, made.after("evaluate")):
        raise Wrong(f"another result: {torn}")
    refused = sum(status != 0 for status, _ in ended)
    return ("with both done", "with one refused", "with both refused")[refused]


def races(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    made = world()
    made.after(STAGES[-1])
    for *pair, stage in some(PAIRS, scale):

        def case(number: int, _: random.Random) -> str:
            chance = random.Random(f"{seed}/{pair}/{number}")
            return raced(made, pair, stage, chance.choice((0.0, 0.0, 0.2, 0.6)))

        what = f"`{pair[0]}` beside `{pair[1]}` in one output folder"
        figure = Figure(RACES, what, "{kinds}; the result is the undisturbed one's")
        yield figure.try_all(case, scaled(3, scale), seed, 600, 600.0, workers=1)


def determinism(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    made = world()
    chance = random.Random(seed)
    figure = Figure(SAME, "`align`, `fuse` with 2 to 4 threads")
    for case in range(scaled(3, scale)):
        made.restore("align")
        threads = partial(torch.set_num_threads, chance.choice((2, 3, 4)))
        made.done("align", before=threads)
        made.done("train", before=threads)
        found, expected = files(made.out), made.after("train")
        ours = [name for name in expected if name.startswith(("aligned/", "fused/"))]
        differing = [name for name in ours if found.get(name) != expected[name]]
        figure.count(not differing, f"seed {seed}, case {case}: {differing}")
    yield figure.noted("the same bytes")

    if not some([True, False], scale)[1:]:
        return
    figure = Figure(SAME, "`score` with other `batch_tokens`, 1 to 4 threads")
    scoring = yaml.safe_load(made.recipe.read_text("utf-8"))["scoring"]
    identical, widest = 0, 0.0
    for case in range(scaled(10, scale)):
        made.restore("score")
        scoring["batch_tokens"] = chance.choice((1, 50, 64, 200, 500, 1000, 4096))
        recipe = recipe_with(made, work, output=str(made.out), scoring=scoring)
        threads = partial(torch.set_num_threads, chance.randint(1, 4))
        made.done("score", before=threads, recipe=recipe)
        identical += files(made.out) == made.after("score")
        far = max(distance(made, name) for name in NAMES)
        widest = max(widest, far)
        figure.count(far < 1e-3, f"seed {seed}, case {case}: {far} apart")
    yield figure.noted(
        f"{identical} the same bytes; log-probabilities at most {widest:.1e} apart, since a matrix "
        "product's sums depend on its shape"
    )


def distance(made: World, name: str) -> float:
    """The largest difference of a log-probability, the k best as float16, from the undisturbed."""
    stores = [ScoreStore(folder / "scores" / name) for folder in (made.out, made.before("align"))]
    assert list(stores[0]) == list(stores[1])
    far = 0.0
    for key in stores[0]:
        for one, other in zip(*(store[key].responses for store in stores), strict=True):
            assert np.array_equal(one.tokens, other.tokens)
            far = max(far, float(np.abs(one.gold_logprobs - other.gold_logprobs).max(initial=0)))
            # Float16 has steps of 2**-8 at 4; what is a step apart is as near as it can be.
            steps = np.spacing(np.abs(other.logprobs)).astype(np.float64)
            apart = np.abs(one.logprobs.astype(np.float64) - other.logprobs)
            far = max(far, float(np.where(apart <= steps, 0.0, apart).max(initial=0)))
    return far


EVIL = """
import pathlib; pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): model_type = "evil"
class EvilModel(LlamaForCausalLM): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


def recipe_with(made: World, work: Path, **changes: Any) -> Path:
    content = yaml.safe_load(made.recipe.read_text("utf-8")) | {"output": str(work / "out")}
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes), "utf-8")
    return path


def code(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    made = world()
    marker = work / "HARMED"
    evil = EVIL.format(marker=str(marker))
    auto = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    }

    def model(name: str, file: str = "config.json", **changes: Any) -> Path:
        folder = chain.copied(made.folder / "models" / "twin", work / name, {"evil.py": evil})
        change_json(folder / file, auto_map=auto, **changes)
        return folder

    figure = Figure(SECURITY, "code that a model's or dataset's folder brings along")
    own = model("own-kind", model_type="evil", architectures=["EvilModel"])
    known = model("known-kind")
    tokenizer = model("tokenizer", "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    script = work / "dataset"
    script.mkdir()
    (script / "dataset.py").write_text(evil)
    shutil.copy(made.folder / "chats.jsonl", script / "data.jsonl")
    changed = {
        "a model of a kind of its own": {"sources": [str(own)]},
        "a model of a known kind": {"sources": [str(known)]},
        "a tokenizer": {"sources": [str(tokenizer)]},
        "a pivot": {"pivot": str(own)},
        "a dataset's script": {"dataset": {"path": str(script)}},
        "a dataset that is a script": {"dataset": {"path": str(script / "dataset.py")}},
    }
    for name, changes in some(changed.items(), scale):
        for command in some(("validate", "score"), scale):
            status, said = made.run(command, recipe=recipe_with(made, work, **changes))
            fine = clean_end(status, said) and not marker.exists()
            if "its own" in name:
                fine = fine and status == 2 and "--trust-remote-code" in said
            figure.count(fine, f"{name}, {command}: status {status}: {said[-300:]}")
            marker.unlink(missing_ok=True)
    yield figure.noted("not run without --trust-remote-code")
    yield pickles(made, work, marker, scale)


def pickles(made: World, work: Path, marker: Path, scale: float) -> Figure:
    figure = Figure(SECURITY, "pickles that run code, where weights, states and caches are read")

    def count(what: str, status: int, said: str, expected: tuple[int, ...]) -> None:
        fine = clean_end(status, said, expected) and not marker.exists()
        figure.count(fine, f"{what}: status {status}: {said[-400:]}")
        shutil.rmtree(marker, ignore_errors=True)

    only, beside = work / "only-pickle", work / "beside"
    for folder in (only, beside):
        shutil.copytree(made.folder / "models" / "twin", folder)
        torch.save({"lm_head.weight": Trap(marker)}, folder / "pytorch_model.bin")
    (only / "model.safetensors").unlink()
    weights = [
        ("weights only as pickle", only, (2,)),
        ("weights as pickle beside safetensors", beside, (0,)),
    ]
    for what, folder, expected in some(weights, scale):
        shutil.rmtree(work / "out", ignore_errors=True)
        ended = made.run("score", recipe=recipe_with(made, work, sources=[str(folder)]))
        count(what, *ended, expected)

    if scale < 0.1:
        return figure.noted("never unpickled")
    checkpoint = made.out / "training/neox/checkpoint-2"

    def at_the_second_checkpoint(call: int, kind: str) -> None:
        if (checkpoint / "trainer_state.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        made.restore("train")
        status, _ = made.run("train", before=at_disk_calls(made.out, at_the_second_checkpoint))
        assert status == -signal.SIGKILL
        assert (checkpoint / "optimizer.pt").exists()
        torch.save(Trap(marker), checkpoint / name)
        count(f"{name} of a checkpoint", *made.run("train"), (0, 1))

    made.restore("train")
    (vocabulary,) = (made.out / "aligned" / ".vocabularies").glob("*.npz")
    harm = np.array([Trap(marker)], dtype=object)
    np.savez(vocabulary, ids=harm, kinds=harm, allow_pickle=True)
    for shard in (made.out / "aligned" / "neox").glob("*.parquet"):
        shard.unlink()
    count("a vocabulary map", *made.run("align"), (0, 1))
    (work / "data.jsonl").write_bytes(pickle.dumps(Trap(marker)))
    ended = made.run("validate", recipe=recipe_with(made, work, dataset=str(work / "data.jsonl")))
    count("a dataset", *ended, (2,))
    return figure.noted("never unpickled: safetensors only, and torch.load with weights_only")


def places(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Where files are written, through which links, and who may read them."""
    made = world()
    what = "links in a brought output folder, to a file and a folder of the user's"
    figure = Figure(SECURITY, what)
    victim, precious = work / "victim", work / "precious"
    links = [
        *("digests.json", "merge.yml", "evaluation.json", "report/evaluation.png"),
        *(f"scores/{n}/{f}" for n in NAMES for f in (".lock", "log.jsonl", "manifest.json")),
        *("scores/pivot/00000000-00000256.parquet", "aligned/neox/.lock", "fused/neox/.lock"),
        *("fused/neox/decisions.json", "training/neox/trainer_state.json"),
        *("training/neox/processes.json", "training/neox/checkpoint-2/model.safetensors"),
        *("targets/.neox.part/", "targets/neox/", "training/neox/data/", "evaluation/"),
    ]
    for link in some(links, scale):
        shutil.rmtree(made.out, ignore_errors=True)
        victim.write_text("mine")
        shutil.rmtree(precious, ignore_errors=True)
        precious.mkdir()
        (precious / "file").write_text("mine")
        path = made.out / link.rstrip("/")
        path.parent.mkdir(parents=True)
        path.symlink_to(precious if link.endswith("/") else victim)
        commands = ("run", "evaluate") if "evaluation" in link else ("run",)
        ended = [made.run(command) for command in commands]
        fine = victim.read_text() == "mine" and (precious / "file").read_text() == "mine"
        fine = fine and all(clean_end(*one) for one in ended)
        figure.count(fine, f"{link}: {victim.read_text()[:60]!r} {ended}")
    yield figure.noted("what they point to stays as it is")

    if scale < 0.1:
        return
    made.restore("score")
    kept = work / "paths"
    with open(kept, "ab") as log:

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            for path in changed_by(event, arguments) if event not in REMOVALS else []:
                os.write(log.fileno(), os.fsencode(os.path.realpath(path)) + b"\0")

        for command in ("validate", "run", "evaluate", "report", "status"):
            made.done(command, before=lambda: sys.addaudithook(note))
    figure = Figure(SECURITY, "files written in a whole run, with evaluation and report")
    cached = 0
    for path in sorted({os.fsdecode(name) for name in kept.read_bytes().split(b"\0") if name}):
        cached += path.startswith(f"{made.folder}/cache")
        fine = path.startswith((f"{made.out}", f"{made.folder}/cache", "/dev/"))
        figure.count(fine, path)
    yield figure.noted(
        f"below `output`, but for {cached} in the datasets library's own cache (HF_DATASETS_CACHE)"
    )

    figure = Figure(SECURITY, "files of a run under umask 077")
    made.restore("score")
    for command in ("run", "evaluate"):
        made.done(command, before=lambda: os.umask(0o077))
    for path in made.out.rglob("*"):
        mode = path.stat().st_mode & 0o777
        figure.count(not mode & 0o077, f"{path.relative_to(made.out)} {mode:o}")
    yield figure.noted("for the user alone")

    figure = Figure(SECURITY, "`output` that is a model's folder, or lies in one")
    for output in ("twin", "twin/out", "twin/targets"):
        shutil.rmtree(work / "twin", ignore_errors=True)
        before = files(chain.copied(made.folder / "models" / "twin", work / "twin"))
        path = recipe_with(made, work, output=str(work / output), sources=[str(work / "twin")])
        status, said = made.run("run", recipe=path)
        after = files(work / "twin")
        changed = [name for name in before if after.get(name) != before[name]]
        figure.count(clean_end(status, said) and not changed, f"{output}: {changed} {said[-300:]}")
    yield figure.noted("the model's own files stay as they are")


SECTIONS: dict[str, Section] = {
    "crashes-distill": crashes,
    "races-distill": races,
    "determinism-distill": determinism,
    "code-distill": code,
    "places-distill": places,
}

"""Damaged inputs of a merge: a clear error, or what the reference makes of them."""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import yaml
from click.testing import CliRunner

from fusechat_merge.cli import main
from fusechat_merge.inputs.checkpoint import CheckpointError
from qa.reliability.figure import Figure, Section, Tally, times
from qa.reliability.models import BF16, adapter, configuration, with_tokenizer
from qa.reliability.mutation import JSON_LITERALS, Pairs, damage_text, damage_tree, dump, parsed
from qa.reliability.trying import Wrong, in_words, sweep
from tests.merge.inputs.test_fuzz_headers import built, check, damage, locations
from tests.support.checkpoints import llama_family as family

INPUTS = "Bad inputs of a merge"
ROOT = Path(__file__).parents[2]
YAML_LITERALS = [
    *JSON_LITERALS, "!!python/object/apply:os.system ['touch /tmp/pwned']", "!!python/name:os.system",
    "!!python/object/new:os.system [touch x]", "!!int x", "!!float x", "!!bool x", "!!timestamp x",
    "!!binary '*'", "!!set {a}", "!!omap [a]", "!!pairs [[a]]", "!!null x", "!x y", "2024-13-45",
    "2024-01-01", "2001-12-14t21:59:43.10-25:00", "1:60:70", "0o9", "0b2", "1_000", ".inf", "-.inf",
    ".nan", "~", "yes", "&a [*a]", "*missing", "<<: 3", "{<<: [1]}", "{? [a] : b}", "{? {a: b} : c}",
    "|", "@", "`", "%", "--- a", "...",
    "[&x0 [a,a,a,a,a,a,a,a,a], &x1 [*x0,*x0,*x0,*x0,*x0,*x0,*x0,*x0,*x0],"
    " &x2 [*x1,*x1,*x1,*x1,*x1,*x1,*x1,*x1,*x1], &x3 [*x2,*x2,*x2,*x2,*x2,*x2,*x2,*x2,*x2],"
    " &x4 [*x3,*x3,*x3,*x3,*x3,*x3,*x3,*x3,*x3], &x5 [*x4,*x4,*x4,*x4,*x4,*x4,*x4,*x4,*x4],"
    " &x6 [*x5,*x5,*x5,*x5,*x5,*x5,*x5,*x5,*x5], &x7 [*x6,*x6,*x6,*x6,*x6,*x6,*x6,*x6,*x6],"
    " &x8 [*x7,*x7,*x7,*x7,*x7,*x7,*x7,*x7,*x7], *x8]",
    "varm", "fusechat_sce", "linear", "ties", "sce", "passthrough", "element", "layer", "model",
    "square", "absolute", "paper", "fork", "bfloat16", "float32", "int8", "union", "base",
    "{source: union}", "[{filter: mlp, value: 1}, {value: 0}]", "[0, 1]", "[[0, 1]]",
]  # fmt: skip


def chance_of(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {number}")


def told(*arguments: str) -> str:
    """How a command ended: done, refused or broken, in the ways that a user may be told so.

    Raises:
        Wrong: a traceback, an error that nobody foresaw, another exit status.
    """
    result = CliRunner().invoke(main, list(arguments))
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    fine = result.exception is None or isinstance(result.exception, SystemExit)
    foreseen = "shows where)" not in result.stderr and "Traceback" not in result.output
    if fine and foreseen and result.exit_code == 0:
        return "carried out"
    if fine and foreseen and len(errors) == 1 and len(errors[0]) > 10:
        if result.exit_code == 2:
            return "refused"
        if result.exit_code == 1:
            return "broken off with a reason"
    end = result.stderr.strip().splitlines()[-1:] or [repr(result.exception)]
    raise Wrong(f"exit {result.exit_code}: {end[0]}")


def headers(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Files whose bytes are damaged, then headers whose JSON is."""

    def bytes_case(number: int) -> str:
        chance, ends = chance_of(seed, number), Counter[bool]()
        for _ in range(1000):
            tensors = [
                (f"t{i}", chance.choice(["BF16", "F32", "U8"]), [chance.randrange(4)] * i)
                for i in range(chance.randrange(4))
            ]
            raw = bytearray(built(tensors, chance.randrange(3)))
            for _ in range(chance.randrange(6)):
                damage(raw, chance)
            ends[compared(bytes(raw))] += 1
        return f"{ends[True]} {ends[False]}"

    tally = Tally(INPUTS, "safetensors files with damaged bytes, against safetensors itself")
    yield thousands(tally, sweep(bytes_case, times(400, scale), tally))

    def json_case(number: int) -> str:
        chance, ends = chance_of(seed, number), Counter[bool]()
        for _ in range(1000):
            ends[compared(damaged_header(chance))] += 1
        return f"{ends[True]} {ends[False]}"

    tally = Tally(INPUTS, "safetensors headers with damaged JSON, against safetensors itself")
    yield thousands(tally, sweep(json_case, times(150, scale), tally))


def thousands(tally: Tally, kinds: Counter[str]) -> Figure:
    """A tally of batches of a thousand as one of files."""
    read = sum(int(kind.split()[0]) * count for kind, count in kinds.items())
    refused = sum(int(kind.split()[1]) * count for kind, count in kinds.items())
    tally.tried *= 1000
    tally.as_expected = tally.tried - (tally.tried // 1000 - sum(kinds.values()))
    return tally.figure(f"{read:,} read as safetensors reads them, {refused:,} refused by both")


def damaged_header(chance: random.Random) -> bytes:
    position, entries = 0, []
    for i in range(chance.randrange(1, 4)):
        shape = [chance.randrange(4) for _ in range(chance.randrange(3))]
        dtype, size = chance.choice([("BF16", 2), ("F32", 4), ("U8", 1), ("F8_E4M3", 1), ("F4", 1)])
        for n in shape:
            size *= n
        offsets = [position, position + size]
        entries.append((f"t{i}", {"dtype": dtype, "shape": shape, "data_offsets": offsets}))
        position += size
    if chance.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    tree = Pairs([(name, parsed(entry)) for name, entry in entries])
    text = dump(damage_tree(tree, chance, SHORT, chance.randrange(1, 3)))
    raw = text.encode("utf-8", "surrogatepass") + b" " * chance.choice([0, 0, 1, 7])
    return len(raw).to_bytes(8, "little") + raw + bytes(position)


SHORT = [text for text in JSON_LITERALS if len(text) < 10_000]


def compared(raw: bytes) -> bool:
    """Whether a file is read, as safetensors reads it; refused by us alone only for a known reason.

    Raises:
        Wrong: otherwise.
    """
    started = time.process_time()
    try:
        accepted = check(raw)  # compares tensors where it is
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}: {raw[:300]!r}") from error
    if time.process_time() - started > 5:
        raise Wrong(f"took {time.process_time() - started:.0f} s: {raw[:300]!r}")
    if not accepted:
        try:
            safetensors.deserialize(raw)
        except Exception:
            return False
        try:
            locations(raw)
        except CheckpointError as error:
            if not any(reason in str(error) for reason in STRICTER):
                raise Wrong(f"safetensors reads it: {error}: {raw[:300]!r}") from error
    return accepted


STRICTER = ("occurs twice",)
"""Where we refuse what safetensors reads: two tensors of one name, one of which it drops."""


SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}


def damaged(text: str, chance: random.Random, literals: list[str] = JSON_LITERALS) -> bytes:
    """A JSON document damaged as a tree or, one time in five, byte by byte."""
    if chance.random() < 0.2:
        return damage_text(text.encode(), chance)
    tree = damage_tree(parsed(json.loads(text)), chance, literals, chance.choice([1, 1, 1, 2, 3]))
    return dump(tree).encode("utf-8", "surrogatepass")


def planned_and_run(yml: Path, *options: str) -> str:
    """``plan``, and where nothing is in the way, ``run``."""
    out = yml.parent / f"out-{os.getpid()}"
    ended = told("plan", str(yml), *options)
    if ended == "carried out":
        ended = told("run", str(yml), str(out), "--threads", "1", *options)
        if ended != "carried out" and out.exists():
            raise Wrong(f"{ended}, yet {out.name} is there")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
    return ended


def documents(
    work: Path,
    seed: int,
    settings: Callable[[Path], dict[str, Any]],
    files: list[tuple[str, str]],
    *options: str,
) -> Callable[[int], str]:
    """Cases in each of which one of a few JSON documents of the models is damaged.

    Args:
        settings: the folder of the models -> a configuration.
        files: (model, name) of each document.
    """

    def case(number: int) -> str:
        here = work / str(os.getpid())
        if not here.exists():  # one copy of the models a process
            shutil.copytree(work / "in", here)
            (here / "merge.yml").write_text(json.dumps(settings(here)))
        chance = chance_of(seed, number)
        model, name = chance.choice(files)
        whole = (work / "in" / model / name).read_text()
        raw = damaged(whole, chance)
        (here / model / name).write_bytes(raw)
        try:
            return planned_and_run(here / "merge.yml", *options)
        except Wrong as error:
            raise Wrong(f"{error} with {model}/{name}: {raw[:600]!r}") from None
        finally:
            (here / model / name).write_text(whole)

    return case


def model_files(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Index, config.json, adapter_config.json and tokenizer files of otherwise whole models."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    paths = family(work / "in", (BF16,) * 3, shards=3, changes=SMALL)
    for path in paths:
        with_tokenizer(path)
    adapter(work / "in" / "adapter", paths[0])
    warm = configuration(paths, tokenizer_source="base")
    (work / "warm.yml").write_text(json.dumps(warm))
    if planned_and_run(work / "warm.yml") != "carried out":
        raise RuntimeError("the undamaged models can't be merged")

    def plain(here: Path) -> dict[str, Any]:
        return configuration([here / "base", here / "t0", here / "t1"])

    def adapted(here: Path) -> dict[str, Any]:
        return configuration([here / "base", here / "adapter", here / "t1"])

    def union(here: Path) -> dict[str, Any]:
        return {**plain(here), "tokenizer_source": "union"}

    index = "model.safetensors.index.json"
    tokenizers = ["tokenizer.json", "tokenizer_config.json"]
    for what, count, settings, files in (
        ("model.safetensors.index.json", 600, plain, [("base", index), ("t0", index)]),
        ("config.json", 600, plain, [("base", "config.json"), ("t0", "config.json")]),
        ("adapter_config.json", 400, adapted, [("adapter", "adapter_config.json")]),
        ("tokenizer files", 250, union, [(m, n) for m in ("base", "t0") for n in tokenizers]),
    ):
        tally = Tally(INPUTS, f"damaged {what}: plan, and run where nothing is in the way")
        kinds = sweep(documents(work, seed, settings, files), times(count, scale), tally)
        yield tally.figure(in_words(kinds))


def yamls(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """The README's and the examples' configurations, damaged."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    paths = family(work / "in", (BF16,) * 6, changes=SMALL)
    with_tokenizer(paths[0])
    adapter(work / "in" / "adapter", paths[0])
    texts = merge_yamls(paths)
    for text in texts:
        (work / "warm.yml").write_text(text)
        if planned_and_run(work / "warm.yml") != "carried out":
            raise RuntimeError(f"the undamaged configuration can't be carried out: {text}")

    def case(number: int) -> str:
        chance = chance_of(seed, number)
        text = chance.choice(texts)
        if chance.random() < 0.3:
            raw = damage_text(text.encode(), chance)
        else:
            tree = parsed(yaml.safe_load(text))
            tree = damage_tree(tree, chance, YAML_LITERALS, chance.choice([1, 1, 1, 2, 3]))
            raw = dump(tree).encode("utf-8", "surrogatepass")
        yml = work / f"merge-{os.getpid()}.yml"
        yml.write_bytes(raw)
        try:
            return planned_and_run(yml)
        except Wrong as error:
            raise Wrong(f"{error} with {raw.decode(errors='replace')}") from None

    tally = Tally(INPUTS, "damaged merge YAMLs: plan, and run where nothing is in the way")
    yield tally.figure(in_words(sweep(case, times(1500, scale), tally)))


def merge_yamls(paths: list[Path]) -> list[str]:
    """Every merge YAML of the README and the examples, with our models in the place of theirs."""
    readme = (ROOT / "README.md").read_text()
    texts = [block.split("```")[0] for block in readme.split("```yaml\n")[1:]]
    texts += [path.read_text() for path in sorted((ROOT / "examples" / "merge").glob("*.yml"))]
    found = []
    for text in texts:
        if "merge_method" not in text:
            continue
        settings = yaml.safe_load(text)
        names = [settings["base_model"], *(entry["model"] for entry in settings["models"])]
        for name, path in zip(dict.fromkeys(names), paths, strict=False):
            text = text.replace(name, str(path))
        found.append(text)
    own = configuration([paths[0], paths[1], paths[0].parent / "adapter"])
    sliced = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(path), "layer_range": [0, 2]}]} for path in paths[:2]
        ],
    }
    settings = [
        own, sliced,
        configuration(paths[:3], "ties", parameters={"weight": 0.5, "density": [0.5, 1]}),
        {**configuration(paths[:3]), "tokenizer": {"source": "base"}, "chat_template": "chatml"},
    ]  # fmt: skip
    return found + [yaml.safe_dump(setting) for setting in settings]


SECTIONS: list[tuple[str, Section]] = [
    ("fuzz-headers", headers),
    ("fuzz-model-files", model_files),
    ("fuzz-merge-yaml", yamls),
]

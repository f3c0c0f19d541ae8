"""Damaged inputs of a merge: a clear error, or what the reference makes of them."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import yaml

from fusechat_merge.inputs.checkpoint import CheckpointError
from qa.reliability.cases import Case, Figure, Section, Wrong, own_copy, scaled
from qa.reliability.models import BF16, SMALL, adapter, with_tokenizer
from tests.merge.inputs.test_fuzz_headers import built, check, locations
from tests.support import damage
from tests.support.checkpoints import llama_family as family
from tests.support.merging import cli, configuration, piece, work_of

INPUTS = "Bad inputs of a merge"
ROOT = Path(__file__).parents[2]
# Names and values of merge YAMLs, beside those of any YAML.
MERGE_LITERALS = [
    *damage.YAML_LITERALS,
    *("varm", "fusechat_sce", "linear", "ties", "sce", "passthrough", "element", "layer", "model"),
    *("square", "absolute", "paper", "fork", "bfloat16", "float32", "int8", "union", "base"),
    *("{source: union}", "[{filter: mlp, value: 1}, {value: 0}]", "[0, 1]", "[[0, 1]]"),
]


def told(*arguments: str) -> str:
    """How a command ended: done, refused or broken, in the ways that a user may be told so.

    Raises:
        Wrong: a traceback, an error that nobody foresaw, another exit status.
    """
    result = cli(*arguments)
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
    """safetensors files whose bytes are damaged, then those whose header's JSON is."""

    def bytes_case(number: int, chance: random.Random) -> str:
        tensors = [
            (f"t{i}", chance.choice(["BF16", "F32", "U8"]), [chance.randrange(4)] * i)
            for i in range(chance.randrange(4))
        ]
        raw = built(tensors, chance.randrange(3))
        return compared(damage.changed_safetensors(raw, chance, chance.randrange(6)))

    def json_case(number: int, chance: random.Random) -> str:
        return compared(damaged_header(chance))

    for what, case, count in (
        ("files with damaged bytes", bytes_case, 400_000),
        ("headers with damaged JSON", json_case, 150_000),
    ):
        figure = Figure(INPUTS, f"safetensors {what}, against safetensors itself")
        yield figure.try_all(case, scaled(count, scale), seed, cpu_limit=5)


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
    raw = damage.dumped(
        damage.changed_tree(damage.Pairs(entries), chance, SHORT, chance.randrange(1, 3))
    )
    raw += b" " * chance.choice([0, 0, 1, 7])
    return len(raw).to_bytes(8, "little") + raw + bytes(position)


SHORT = [damage.Literal(text) for text in damage.JSON_LITERALS if len(text) < 10_000]
ANY_JSON = [damage.Literal(text) for text in damage.JSON_LITERALS]


def compared(raw: bytes) -> str:
    """Whether a file is read, as safetensors reads it; refused by us alone only for a known reason.

    Raises:
        Wrong: otherwise.
    """
    try:
        if check(raw):  # compares the tensors
            return "read as safetensors reads them"
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}: {raw[:300]!r}") from error
    try:
        safetensors.deserialize(raw)
    except Exception:
        return "refused by both"
    try:
        locations(raw)
    except CheckpointError as error:
        if not any(reason in str(error) for reason in STRICTER):
            raise Wrong(f"safetensors reads it: {error}: {raw[:300]!r}") from error
    return "refused by us alone, for a name that occurs twice"


STRICTER = ("occurs twice",)
"""Where we refuse what safetensors reads: two tensors of one name, one of which it drops."""


def damaged(text: str, chance: random.Random) -> bytes:
    """A JSON document damaged as a tree or, one time in five, byte by byte."""
    if chance.random() < 0.2:
        return damage.changed_bytes(text.encode(), chance, damage.JSON_FRAGMENTS)
    return damage.dumped(damage.changed_tree(json.loads(text), chance, ANY_JSON))


def planned_and_run(yml: Path) -> str:
    """``plan``, and where nothing is in the way, ``run``."""
    out = yml.parent / f"out-{os.getpid()}"
    ended = told("plan", str(yml))
    if ended == "carried out":
        ended = told("run", str(yml), str(out), "--threads", "1")
        if ended != "carried out" and out.exists():
            raise Wrong(f"{ended}, yet {out.name} is there")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(work_of(out), ignore_errors=True)
    return ended


def documents(
    work: Path, models: list[str], settings: dict[str, Any], files: list[tuple[str, str]]
) -> Case:
    """Merges of these models in which one of their documents, (model, name), is damaged."""

    def case(number: int, chance: random.Random) -> str:
        here = own_copy(work / "in")
        config = configuration([here / model for model in models], **settings)
        (here / "merge.yml").write_text(json.dumps(config))
        model, name = chance.choice(files)
        whole = (work / "in" / model / name).read_text()
        raw = damaged(whole, chance)
        (here / model / name).write_bytes(raw)
        try:
            return planned_and_run(here / "merge.yml")
        except Wrong as error:
            raise Wrong(f"{error} with {model}/{name}: {raw[:600]!r}") from None
        finally:
            (here / model / name).write_text(whole)

    return case


def model_files(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Index, config.json, adapter_config.json and tokenizer files of otherwise whole models."""
    paths = family(work / "in", (BF16,) * 3, shards=3, changes=SMALL)
    for path in paths:
        with_tokenizer(path)
    adapter(work / "in" / "adapter", paths[0])
    warm = configuration(paths, tokenizer_source="base")
    (work / "warm.yml").write_text(json.dumps(warm))
    if planned_and_run(work / "warm.yml") != "carried out":
        raise RuntimeError("the undamaged models can't be merged")

    index = "model.safetensors.index.json"
    tokenizers = [
        (m, n) for m in ("base", "t0") for n in ("tokenizer.json", "tokenizer_config.json")
    ]
    union = {"tokenizer_source": "union"}
    for what, count, target, settings, files in (
        (index, 600, "t0", {}, [("base", index), ("t0", index)]),
        ("config.json", 600, "t0", {}, [("base", "config.json"), ("t0", "config.json")]),
        ("adapter_config.json", 400, "adapter", {}, [("adapter", "adapter_config.json")]),
        ("tokenizer files", 250, "t0", union, tokenizers),
    ):
        figure = Figure(INPUTS, f"damaged {what}: plan, and run where nothing is in the way")
        case = documents(work, ["base", target, "t1"], settings, files)
        yield figure.try_all(case, scaled(count, scale), seed)


def yamls(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """The README's and the examples' configurations, damaged."""
    paths = family(work / "in", (BF16,) * 6, changes=SMALL)
    with_tokenizer(paths[0])
    adapter(work / "in" / "adapter", paths[0])
    texts = merge_yamls(paths)
    for text in texts:
        (work / "warm.yml").write_text(text)
        if planned_and_run(work / "warm.yml") != "carried out":
            raise RuntimeError(f"the undamaged configuration can't be carried out: {text}")
    literals = [damage.Literal(text) for text in MERGE_LITERALS]

    def case(number: int, chance: random.Random) -> str:
        text = chance.choice(texts)
        if chance.random() < 0.3:
            raw = damage.changed_bytes(text.encode(), chance, damage.YAML_FRAGMENTS)
        else:
            raw = damage.dumped(damage.changed_tree(yaml.safe_load(text), chance, literals))
        yml = work / f"merge-{os.getpid()}.yml"
        yml.write_bytes(raw)
        try:
            return planned_and_run(yml)
        except Wrong as error:
            raise Wrong(f"{error} with {raw.decode(errors='replace')}") from None

    figure = Figure(INPUTS, "damaged merge YAMLs: plan, and run where nothing is in the way")
    yield figure.try_all(case, scaled(1500, scale), seed)


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
    settings = [
        configuration([paths[0], paths[1], paths[0].parent / "adapter"]),
        {"merge_method": "passthrough", "slices": [piece([path], 0, 2) for path in paths[:2]]},
        configuration(paths[:3], "ties", parameters={"weight": 0.5, "density": [0.5, 1]}),
        {**configuration(paths[:3]), "tokenizer": {"source": "base"}, "chat_template": "chatml"},
    ]  # fmt: skip
    return found + [yaml.safe_dump(setting) for setting in settings]


SECTIONS: dict[str, Section] = {
    "fuzz-headers": headers,
    "fuzz-model-files": model_files,
    "fuzz-merge-yaml": yamls,
}

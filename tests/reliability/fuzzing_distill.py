"""Damaged inputs of a distillation: a clear error, or what the reference makes of them."""

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from figure import Figure, Section, Tally, times

ROOT = Path(__file__).parents[2]
TITLE = "Bad inputs of a distillation"
SLOWEST = 1.0
"""Seconds of CPU that a recipe, however odd, may take to be refused."""

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**64, 10**30, -0.0, 0.5, 1.5, 1e308),
    *(float("inf"), float("nan"), "", " ", "x", "null", "1", "0.5", "1e-5", "no", "../../x", "/"),
    *("a/b/c", "~", "\0", "\ud800", "é\u0301", "\u202e", "a" * 5000, "{{ 1 }}", "${HOME}", b"\xff"),
    *([], {}, [[]], {"": ""}, {"a": {"b": []}}, [None], ["x", 1, {}], {1: 2}, {None: None}),
]


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives (JSON) in a process of its own, or a text that says how that died."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            answer = json.dumps(work(), default=str)
        except BaseException as error:
            answer = json.dumps(f"raised {type(error).__name__}: {error}")
        with os.fdopen(write, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(answer) if answer else f"died with {status}"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything lies in nested lists and mappings."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield from places(part, (*path, key))


def mutated(value: Any, chance: random.Random, junk: list[Any]) -> Any:
    """A copy with a few places changed, removed, renamed, doubled or swapped."""
    import copy

    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        found = list(places(value))
        if not found:
            return chance.choice(junk)
        path = chance.choice(found)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], chance.randrange(6)
        if kind <= 2:
            holder[key] = copy.deepcopy(chance.choice(junk))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other = copy.deepcopy(holder[key])
            if isinstance(holder, list):
                holder.insert(chance.randrange(len(holder) + 1), other)
            else:
                holder[chance.choice([f"{key}s", str(key)[:-1], str(key).upper(), 3, ""])] = other
        else:
            from_path = chance.choice(found)
            part = value
            for k in from_path:
                part = part[k]
            holder[key] = copy.deepcopy(part)
    return value


def damaged(raw: bytes, chance: random.Random, fragments: list[bytes]) -> bytes:
    """Bytes with some flipped, cut out, doubled, or fragments put in."""
    found = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[at : at + chance.choice((1, 2, 8, 100))]
        elif kind == 2:
            found[at:at] = chance.choice(fragments)
        elif kind == 3:
            found[at:at] = found[at : at + chance.randrange(200)]
        elif kind == 4:
            other = chance.randrange(len(found) + 1)
            part = bytes(found[other : other + chance.randrange(40)])
            found[at : at + len(part)] = part
        elif chance.random() < 0.2:
            del found[at:]
    return bytes(found)


# ---------------------------------------------------------------------------------------- recipes

YAML_FRAGMENTS = [
    *(b":", b": ", b"- ", b"\n", b"\t", b"  ", b"#", b"'", b'"', b"{", b"}", b"[", b"]", b",", b"&a "),
    *(b"*a", b"<<: *a", b"!!python/object/apply:os.system [exit 1]", b"!!int x", b"!!float .", b"|\n"),
    *(b"!!binary '='", b"!!timestamp x", b"2024-99-99", b"? [a, b] : c", b"? {a: b}\n: c", b"=", b"%YAML 9.9\n"),
    *(b"---\n", b"...\n", b"\xff", b"\x00", b"\xef\xbb\xbf", b"1e999", b".inf", b".nan", b"0b12", b"1:99:99"),
    *(b"!!set {a}", b"!!omap [a: b]", b"!!pairs [a]", b"!!null x", b"!!bool x", b"9" * 5000, b">\n", b"@", b"`"),
    *(b"lambda", b"output", b"sources", b"name: ../../x", b"name: ''", b"lora: {r: 0}", b"\xed\xa0\x80"),
]  # fmt: skip

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)
BASE = "output: x\npivot: p\nsources: [a/b]\ndataset: d\n"
HOSTILE = {
    "python/object/apply": BASE + "merge: !!python/object/apply:os.system ['touch HARMED']\n",
    "python/object/new": "!!python/object/new:os.system ['touch HARMED']\n",
    "python/name": BASE + "merge: !!python/name:os.system\n",
    "python/module": BASE + "merge: !!python/module:antigravity\n",
    "aliases that grow exponentially": BOMB,
    "aliases that grow exponentially, in a free mapping": BASE + "merge:\n  parameters:\n" + "".join(f"    {line}\n" for line in BOMB.splitlines()),
    "an alias of itself": BASE + "merge: {parameters: &a {b: *a}}\n",
    "an alias of itself, a wrong value beside it": BASE + "max_length: x\nmerge: {parameters: &a {b: *a}}\n",
    "an alias of itself as section": BASE + "merge: &a {parameters: *a, merge_method: [*a]}\n",
    "a merge key of itself": "a: &a\n  <<: *a\n",
    "10,000 brackets": BASE + "merge: " + "[" * 10_000 + "]" * 10_000,
    "10,000 braces": "{a: " * 10_000,
    "10,000 dashes": "- " * 10_000,
    "900 brackets": BASE + "max_length: x\nmerge: {parameters: {a: " + "[" * 200 + "]" * 200 + "}}",
    "a list as key": "? [a]\n: b\n" + BASE,
    "a mapping as key": "{{a: b}: c}\n",
    "no such day": "output: 2024-99-99\n",
    "an integer of 10,000 digits": BASE + "max_length: " + "9" * 10_000,
    "3,000 keys": BASE + "".join(f"k{i}: 1\n" for i in range(3000)),
    "no int": BASE + "max_length: !!int seven\n",
    "a NUL in a name": 'output: "a\\0b"\npivot: p\nsources: [a/b]\ndataset: d\n',
    "a NUL in a source": 'output: x\npivot: p\nsources: ["a\\0b"]\ndataset: d\n',
    "half a surrogate pair": 'output: "\\ud800"\npivot: p\nsources: [a/b]\ndataset: d\n',
    "a source that climbs": BASE.replace("[a/b]", "[{model: a/b, name: ../../x}]"),
    "a source named by dots": BASE.replace("[a/b]", "['a/..']"),
    "a source named pivot": BASE.replace("[a/b]", "[a/PIVOT]"),
    "an output name that is too long": BASE.replace("x", "y" * 5000, 1),
    "nothing": "",
    "a number": "7",
    "UTF-16": "\ufeff" + BASE,
}  # fmt: skip


def recipe_texts() -> list[str]:
    from fusechat_distill.recipe import TEMPLATE

    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "pivot:" in b]
    files = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    return [TEMPLATE, *blocks, *(path.read_text("utf-8") for path in files)]


def recipe_outcome(path: Path) -> str | None:
    """None where `status` shows the recipe or refuses it clearly and soon; else what it did."""
    from click.testing import CliRunner

    from fusechat_distill.cli import commands

    started = time.process_time()
    result = CliRunner().invoke(commands, ["status", str(path)])
    seconds = time.process_time() - started
    if seconds > SLOWEST:
        return f"took {seconds:.1f} s"
    if result.exit_code == 0:
        return None
    if result.exit_code != 2 or not result.stderr.startswith("Error: "):
        return f"status {result.exit_code}: {result.stderr[:300]} {result.exception!r}"
    return None


def fuzz_recipes(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    import yaml

    os.chdir(work)
    texts = recipe_texts()
    path = work / "recipe.yaml"
    path.write_text(texts[-1])
    recipe_outcome(path)  # TRL and PEFT are imported once
    tally = Tally(TITLE, "recipes made to hurt: tags that run code, aliases that explode, nesting")
    for name, text in HOSTILE.items():
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        problem = recipe_outcome(path)
        tally.count(problem is None and not (work / "HARMED").exists(), f"{name}: {problem}")
    yield tally.figure("refused by a line that names the place, within a second; nothing is run")

    count = times(4000, scale)
    for what, mutate in (("values and keys", changed_recipe), ("bytes", damaged_recipe)):
        tally = Tally(TITLE, f"recipes of the README and the examples with {what} changed")
        accepted = 0
        for case in range(count):
            chance = random.Random(f"{seed}/{what}/{case}")
            raw = mutate(chance.choice(texts), chance, yaml)
            path.write_bytes(raw)
            problem = recipe_outcome(path)
            accepted += problem is None
            tally.count(problem is None, f"seed {seed}, case {case}: {problem}")
            if problem:
                keep(work, f"recipe-{case}.yaml", raw)
        yield tally.figure("shown by `status` or refused clearly within a second")


def changed_recipe(text: str, chance: random.Random, yaml: Any) -> bytes:
    changed = mutated(yaml.safe_load(text), chance, JUNK)
    made: str = yaml.dump(changed, Dumper=yaml.SafeDumper, allow_unicode=chance.random() < 0.5)
    return made.encode("utf-8", "surrogatepass")


def damaged_recipe(text: str, chance: random.Random, yaml: Any) -> bytes:
    return damaged(text.encode(), chance, YAML_FRAGMENTS)


def keep(work: Path, name: str, raw: bytes) -> None:
    """Where FUSECHAT_KEEP names a folder, what went wrong is kept there."""
    if folder := os.environ.get("FUSECHAT_KEEP"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(raw)


# ----------------------------------------------------------------------------------------- shards


def scored_store(folder: Path, chance: random.Random) -> Any:
    """A store of two shards with eight samples each, as a scorer could have made it."""
    import numpy as np

    from fusechat_distill.store import (
        Manifest,
        ScoredResponse,
        ScoredSample,
        Shards,
        scores_table,
    )

    random_numbers = np.random.default_rng(chance.randrange(2**32))

    def sample(row: int) -> ScoredSample:
        responses = []
        for turn in range(chance.randint(1, 3)):
            n, k = chance.randint(1, 12), 4
            responses.append(
                ScoredResponse(
                    turn=turn,
                    begin=0,
                    end=3 * n,
                    first=turn + 1,
                    pending=b" " * (turn % 2),
                    stop="special",
                    tokens=random_numbers.integers(0, 300, n, np.uint32),
                    ends=np.arange(3, 3 * n + 1, 3, dtype=np.int32),
                    ids=random_numbers.integers(0, 300, (n, k), np.uint32),
                    logprobs=-random_numbers.random((n, k)).astype(np.float16),
                    gold_logprobs=-random_numbers.random(n).astype(np.float32),
                )
            )
        return ScoredSample(f"{chance.getrandbits(128):032x}", row, tuple(responses))

    shards = Shards.create(folder, Manifest("scores", 16, {"model": "m"}, 8))
    for samples in shards.manifest.ranges():
        rows = [sample(row) for row in range(samples.start, samples.stop)]
        summary = {"samples": len(rows), "input_tokens": 1234, "left_out": [[3, "too long"]]}
        shards.write(samples, scores_table(rows), summary)
    return shards


def rewritten(table: Any, other: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A shard that another program could have written over the one it read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = table.schema.metadata
    names = table.column_names
    kind = chance.choice(
        ["rows out of order", "a row twice", "a row less", "a column less", "columns renamed"]
        + [
            "another type",
            "numbers shifted",
            "footer edited",
            "no footer",
            "the other shard",
            "no rows",
        ]
    )
    if kind == "rows out of order":
        table = table.take(chance.sample(range(8), 8)[::-1])
    elif kind == "a row twice":
        table = pa.concat_tables([table, table.slice(chance.randrange(8), 1)])
    elif kind == "a row less":
        table = table.slice(chance.randint(0, 1), 7)
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "a column less":
        table = table.drop_columns([chance.choice(names)])
    elif kind == "columns renamed":
        i, j = chance.sample(range(3, 8), 2)
        swapped = list(names)
        swapped[i], swapped[j] = names[j], names[i]
        table = table.rename_columns(swapped)
    elif kind == "another type":
        table = table.set_column(1, "row", table["row"].cast(pa.int64()))
    elif kind == "numbers shifted":
        table = table.set_column(5, "ids", pa.chunked_array([table["ids"].combine_chunks()[::-1]]))
    elif kind == "footer edited":
        key = next(iter(metadata))
        metadata = {key: metadata[key].replace(b"1234", b"1%d34" % chance.randrange(10))}
    elif kind == "no footer":
        metadata = {}
    else:
        return kind, other
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return kind, sink.getvalue().to_pybytes()


def fuzz_shards(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    from fusechat_distill.errors import DistillError
    from fusechat_distill.store import scored_samples

    shards = scored_store(work / "scores", random.Random(seed))
    samples = shards.manifest.ranges()[0]
    path = shards.path(samples)
    other = shards.path(shards.manifest.ranges()[1]).read_bytes()
    raw, table, summary = path.read_bytes(), shards.read(samples), shards.summary(samples)

    def outcome(found: bytes) -> tuple[str, str]:
        """refused, the same, or another value; and the error's text."""
        path.write_bytes(found)
        same = True
        said = ""
        for read, expected in ((shards.read, table), (shards.summary, summary)):
            try:
                value = read(samples)
                if value is not expected and not (
                    value.equals(expected) if read == shards.read else value == expected
                ):
                    return "another value", f"of {read.__name__}"
                if read == shards.read:
                    scored_samples(value)
            except DistillError as error:
                same, said = False, str(error)
        return ("the same", "") if same else ("refused", said)

    def batch(cases: list[int], make: Callable[[random.Random], tuple[str, bytes]]) -> list[Any]:
        found = []
        for case in cases:
            kind, made = make(random.Random(f"{seed}/{case}"))
            if made == raw:
                continue
            try:
                result, said = outcome(made)
            except BaseException as error:
                result, said = "raised", repr(error)[:200]
            fine = result == "the same" or (result == "refused" and path.name in said)
            found.append([case, kind, result, said, fine])
        return found

    def one_bit(chance: random.Random) -> tuple[str, bytes]:
        found = bytearray(raw)
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        return "a bit", bytes(found)

    def cut(chance: random.Random) -> tuple[str, bytes]:
        return "cut", raw[: chance.randrange(len(raw))]

    def any_damage(chance: random.Random) -> tuple[str, bytes]:
        return "bytes", damaged(
            raw, chance, [b"PAR1", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x15\x02"]
        )

    for what, make, count in (
        ("a bit of a shard's flipped", one_bit, 20_000),
        ("a shard cut short", cut, 1000),
        ("bytes of a shard changed, removed, put in, moved", any_damage, 10_000),
        (
            "a shard rewritten: rows, columns, types, numbers, footer changed",
            partial(rewritten, table, other),
            500,
        ),
    ):
        tally = Tally(TITLE, what)
        refused = same = 0
        cases = list(range(times(count, scale)))
        for start in range(0, len(cases), 500):
            found = forked(lambda: batch(cases[start : start + 500], make))
            if isinstance(found, str):  # pyarrow itself died
                tally.count(False, f"seed {seed}, cases from {start}: {found}")
                continue
            for case, kind, result, said, fine in found:
                refused += result == "refused"
                same += result == "the same"
                tally.count(fine, f"seed {seed}, case {case}: {kind}: {result} {said}")
        path.write_bytes(raw)
        yield tally.figure(f"{refused:,} refused by name, {same:,} read the same values")


SECTIONS: list[tuple[str, Section]] = [
    ("fuzz-recipes", fuzz_recipes),
    ("fuzz-shards", fuzz_shards),
]

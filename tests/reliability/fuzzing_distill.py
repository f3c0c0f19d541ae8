"""Damaged inputs of a distillation: a clear error, or what the reference makes of them."""

import json
import os
import random
import re
import sys
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
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
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


SECTIONS: list[tuple[str, Section]] = [("fuzz-recipes", fuzz_recipes)]

"""Damaged inputs of a distillation: a clear error, or what the reference makes of them."""

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qa.reliability.figure import Figure, Section, Tally, times

ROOT = Path(__file__).parents[2]
TITLE = "Bad inputs of a distillation"
SLOWEST = 1.0
"""Seconds of CPU that a recipe, however odd, may take to be refused."""

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**64, 10**30, -0.0, 0.5, 1.5, 1e308),
    *(float("inf"), float("nan"), "", " ", "x", "null", "1", "0.5", "1e-5", "no", "../../x", "/"),
    *("a/b/c", "~", "\0", "é\u0301", "\u202e", "a" * 5000, "{{ 1 }}", "${HOME}", b"\xff"),
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
    *(b"!!int ''", b"!!float ''", b"!!bool x", b"!!null 1", b"!!seq x", b"!!map x", b"!!str [a]"),
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
    "no bool": BASE + "max_length: !!bool x\n",
    "an empty int": BASE + "max_length: !!int ''\n",
    "no timestamp": BASE + "max_length: !!timestamp x\n",
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
    from fusechat_distill.recipe.reference import commented_recipe

    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "pivot:" in b]
    files = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    return [commented_recipe(), *blocks, *(path.read_text("utf-8") for path in files)]


def recipe_outcome(path: Path) -> str | None:
    """None where `status` shows the recipe or refuses it clearly and soon; else what it did."""
    from click.testing import CliRunner

    from fusechat_distill.cli import commands

    started = time.process_time()
    with contextlib.chdir(path.parent):  # a relative output is looked for there
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

    from fusechat_distill.storage.shards import (
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
        [
            "rows out of order",
            "a row twice",
            "a row less",
            "a column less",
            "columns renamed",
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
    from fusechat_common.errors import FusechatError
    from fusechat_distill.storage.shards import scored_samples

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
            except FusechatError as error:
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


# ------------------------------------------------------------------------- rows and dataset files

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief — 短く."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": " Yes 🙂\n"},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"prompt": "Hi", "completion": "Hello."},
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello."}],
    },
    {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}},
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ]
    },
]
TEXTS = ["", " ", "\n", "\0", "<|im_end|>", "<|im_start|>", "</s>", "\ue000\ue001\ue000",
         "x" * 20_000, "é" * 300, "🙂👩🏽‍🚀", "e\u0301", "{{ 1 / 0 }}", "{% raise %}", "human", "gpt", "tool", "system",
         "assistant", "developer", "\u202eabc", "\ufeff", "\r\n\t ", "a\u2028b", "Ġ▁"]  # fmt: skip


def turns_found(row: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Read again, in another way, from the documentation: (role, text) of a row, None if unusable."""
    roles = {"human": "user", "gpt": "assistant"} | {
        role: role for role in ("system", "user", "assistant", "tool")
    }
    if "messages" in row or "conversations" in row:
        turns = row["messages"] if "messages" in row else row["conversations"]
        if isinstance(turns, dict):
            if not all(isinstance(part, list) for part in turns.values()):
                return None
            if len({len(part) for part in turns.values()}) > 1:
                return None
            turns = [
                dict(zip(turns, part, strict=True)) for part in zip(*turns.values(), strict=True)
            ]
    else:
        turns = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            part = row.get(name)
            turns += part if isinstance(part, list) else [{"role": role, "content": part}]
    if not isinstance(turns, list):
        return None
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("tool_calls"):
            return None
        role = turn["role"] if "role" in turn else turn.get("from")
        text = turn["content"] if "content" in turn else turn.get("value")
        if not isinstance(role, str) or role not in roles or not isinstance(text, str):
            return None
        if roles[role] == "assistant" and not text.strip():
            return None
        found.append((roles[role], text))
    return found if "assistant" in dict(found) else None


def spaceless(text: bytes) -> bytes:
    """Some pre-tokenizers and added tokens add or swallow spaces, as these are said to."""
    return text.replace(b" ", b"").replace(b"\n", b"").replace(b"\t", b"").replace(b"\r", b"")


def lost(tokenizer: Any, text: bytes) -> bool:
    """Whether the tokenizer drops one of the text's characters without a trace."""
    from fusechat_distill.text.tokens import token_bytes

    for c in set(text.decode()) - set(" \n\r\t"):
        ids = tokenizer(c, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id not in ids and c.encode() not in b"".join(
            token_bytes(tokenizer, ids)
        ):
            return True
    return False


def check_renderings(renderer: Any, conversations: list[Any]) -> str | None:
    """What is wrong with how conversations are rendered, by the texts and the tokens' bytes."""
    from fusechat_distill.text.tokens import token_bytes

    for conversation, rendering in zip(conversations, renderer(conversations), strict=True):
        for response in rendering.responses:
            message = conversation.messages[response.turn]
            if message.role != "assistant":
                return f"turn {response.turn} of {conversation.messages!r} is no answer"
            answer = message.content.encode()
            if answer[: response.begin].strip() or answer[response.end :].strip():
                return f"more than white space is cut from {answer!r}"
            ids = rendering.input_ids[response.tokens()]
            ends = response.ends
            known = [int(i) for i in (ends >= 0).nonzero()[0]]
            if list(ends[known]) != sorted(ends[known]) or any(ends[known] > response.end):
                return f"ends {ends} of {answer!r}"
            if renderer.tokenizer.backend_tokenizer.normalizer is not None:
                continue
            if response.begin < response.end and (not known or ends[known[-1]] != response.end):
                continue  # its end is not known, as documented
            joined = b"".join(token_bytes(renderer.tokenizer, ids[: known[-1] + 1].tolist()))
            expected = response.pending + answer[response.begin : response.end]
            if spaceless(joined) != spaceless(expected) and not lost(renderer.tokenizer, expected):
                return f"tokens {joined!r} of {response.pending!r} + {answer!r}"
    return None


def fuzz_rows(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    from fusechat_distill.text.conversations import (
        Conversation,
        Renderer,
        _key,
        _layout,
        _messages,
        _turns,
        _UnusableError,
    )
    from tests.support import chain

    renderers = [
        Renderer(chain.tokenizer(300, ["<|im_end|>", "<|im_start|>"], chain.CHATML)),
        Renderer(chain.tokenizer(340, ["</s>", "<s>"], chain.PLAIN)),
    ]
    tally = Tally(TITLE, "rows of conversations with values, keys, turns, roles and types changed")
    usable = 0
    for case in range(times(30_000, scale)):
        chance = random.Random(f"{seed}/{case}")
        row = mutated(chance.choice(CHATS), chance, [*JUNK, *TEXTS, *CHATS])
        try:
            if not isinstance(row, dict) or not {"messages", "conversations"} & set(row):
                row = {"prompt": None, "completion": None} | (row if isinstance(row, dict) else {})
            expected = turns_found(row)
            try:
                found = _messages(_turns(row, _layout(list(map(str, row)), None)[1]))
            except (_UnusableError, ValueError) as error:
                found, problem = None, None if str(error).strip() else "no reason is given"
            else:
                usable += 1
                problem = check_renderings(
                    chance.choice(renderers), [Conversation(_key(found), 0, found)]
                )
            if (found and [tuple(m) for m in found]) != expected:
                problem = f"read as {found!r}, expected {expected!r}"
        except Exception as error:
            problem = repr(error)
        tally.count(problem is None, f"seed {seed}, case {case}: {problem}")
    yield tally.figure(
        f"{usable:,} usable ones rendered, their tokens' bytes compared with the text"
    )


def dataset_files(work: Path, chance: random.Random) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**chance.choice(CHATS[:2]), "domain": "x"} for _ in range(6)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    arrow = pa.BufferOutputStream()
    with pa.ipc.new_stream(arrow, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {
        "jsonl": lines.encode(),
        "json": json.dumps(rows).encode(),
        "parquet": sink.getvalue().to_pybytes(),
        "arrow": arrow.getvalue().to_pybytes(),
        "csv": b"prompt,completion\nHi,Hello.\n",
    }


JSON_FRAGMENTS = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"1e999", b"NaN", b"\\ud800", b"\\u0000", b"\xff"),
    *(b"\n", b"\n\n", b"\0", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 600, b'"role"', b'"assistant"', b"9" * 400),
]  # fmt: skip


def fuzz_datasets(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    import datasets

    from fusechat_common.errors import RequestError
    from fusechat_distill.text.conversations import open_conversations

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = work / "cache"
    files = dataset_files(work, random.Random(seed))

    def batch(cases: list[int]) -> list[Any]:
        import logging

        logging.disable(logging.CRITICAL)
        found = []
        for case in cases:
            chance = random.Random(f"{seed}/{case}")
            kind = chance.choice(list(files))
            raw = damaged(files[kind], chance, JSON_FRAGMENTS)
            path = work / f"case-{case}.{kind}"
            path.write_bytes(raw)
            try:
                conversations = open_conversations(str(path))
                read = conversations[:]
                fine = bool(read) and all(
                    m.content.encode() is not None for c in read for m in c.messages
                )
                result = "read"
            except RequestError as error:
                fine = str(path) in str(error) and "\n" not in str(error)
                result = "refused" if fine else f"refused: {error}"
            except BaseException as error:
                fine, result = False, repr(error)[:200]
            if not fine:
                keep(work, path.name, raw)
            path.unlink()
            found.append([case, kind, result, fine])
        return found

    tally = Tally(TITLE, "dataset files (JSONL, JSON, Parquet, Arrow, CSV) with bytes changed")
    read = 0
    cases = list(range(times(1500, scale)))
    for start in range(0, len(cases), 100):
        found = forked(lambda start=start: batch(cases[start : start + 100]))
        if isinstance(found, str):  # the process died
            tally.count(False, f"seed {seed}, cases from {start}: {found}")
            continue
        for case, kind, result, fine in found:
            read += result == "read"
            tally.count(fine, f"seed {seed}, case {case}, {kind}: {result}")
    yield tally.figure(f"{read:,} read, the others refused by a line that names the file")


# ------------------------------------------------------------------------ templates and tokenizers

TEMPLATES = {
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}",
    "drops the system prompt": "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}",
    "refuses a system prompt": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}</s>{% endfor %}",
    "merges the system prompt": "{% set s = namespace(t='') %}{% for m in messages %}{% if m.role == 'system' %}{% set s.t = m.content + '\n\n' %}{% else %}<{{ m.role }}>{{ (s.t if m.role == 'user' else '') + m.content }}</s>{% set s.t = '' %}{% endif %}{% endfor %}",
    "last turn first": "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}",
    "every answer twice": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.content }}</s>{% endfor %}",
    "capitals": "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}</s>{% endfor %}",
    "cuts": "{% for m in messages %}[{{ m.role }}]{{ m.content[:3] }}</s>{% endfor %}",
    "only the last turn": "{{ messages[-1].role }}: {{ messages[-1].content }}</s>",
    "escapes": "{% for m in messages %}[{{ m.role }}]{{ m.content | e }}</s>{% endfor %}",
    "JSON": "{% for m in messages %}{{ m | tojson }}</s>{% endfor %}",
    "strips thoughts": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].lstrip() }}</s>{% endfor %}",
    "depends on lengths": "{% for m in messages %}[{{ m.content | length }}]{{ m.content }}</s>{% endfor %}",
    "strict turns": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}",
    "starts with the answer": "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
    "no end": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "nothing": "",
    "divides by zero": "{{ 1 // 0 }}",
    "unknown attribute": "{{ messages.foo.bar }}",
    "undefined filter": "{{ messages | nonsense }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much too long": "{{ 'x' * 10 ** 30 }}",
    "more than may be looped": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "leaves the sandbox by a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "leaves the sandbox by format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "leaves the sandbox by a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "leaves the sandbox by attr": "{{ (raise_exception | attr('__globals__'))['os'].system('touch HARMED') }}",
    "leaves the sandbox by cycler": "{{ cycler.__init__.__globals__.os.system('touch HARMED') }}",
    "changes the messages": "{{ messages.append(1) }}",
    "changes a message": "{{ messages[0].update({'content': 'x'}) }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "imports a file": "{% import '/etc/passwd' as x %}",
    "breaks off": "{% for m in messages %}{{ m.content }}",
    "no template": "{{ } %}",
    "a tag of no kind": "{% nonsense %}",
    "deeply nested": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "today": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    "an integer": "{{ 3 + messages }}",
}  # fmt: skip

CHATS_TO_RENDER = [
    [("user", "Hi"), ("assistant", "Hello.")],
    [("system", "Be brief."), ("user", " 2+2? "), ("assistant", "4"), ("user", "Hm"), ("assistant", " Yes 🙂\n")],
    [("assistant", "I begin, naïve"), ("user", "x"), ("assistant", "<think>é</think> y")],
    [("user", "a"), ("user", "b"), ("assistant", "</s> spelt"), ("tool", "t"), ("assistant", "x" * 300)],
    [("system", "only"), ("assistant", "4")],
]  # fmt: skip


def conversations_to_render() -> list[Any]:
    from fusechat_distill.text.conversations import Conversation, Message

    return [
        Conversation(f"{i:032x}", i, tuple(Message(*turn) for turn in chat))
        for i, chat in enumerate(CHATS_TO_RENDER)
    ]


def fuzz_templates(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    from fusechat_common.errors import RequestError
    from fusechat_distill.text.conversations import Renderer
    from tests.support import chain

    tokenizer = chain.tokenizer(340, ["</s>", "<s>"], chain.PLAIN)
    conversations = conversations_to_render()

    def outcome(template: str) -> str | None:
        started = time.process_time()
        try:
            with contextlib.chdir(work):
                problem = check_renderings(Renderer(tokenizer, template), conversations)
        except RequestError:
            problem = None
        except Exception as error:
            problem = repr(error)
        if (work / "HARMED").exists():
            return "it ran a command"
        if (seconds := time.process_time() - started) > SLOWEST:
            return f"took {seconds:.1f} s"
        return problem

    tally = Tally(
        TITLE, "chat templates that trim, reorder, merge, raise, or try to leave their sandbox"
    )
    for name, template in TEMPLATES.items():
        problem = outcome(template)
        tally.count(problem is None, f"{name}: {problem}")
    yield tally.figure("answers found byte for byte or left out, with a reason; nothing is run")

    tally = Tally(TITLE, "chat templates with bytes changed")
    fragments = [
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b" | trim",
        b"{% endfor %}",
        b"{{ 1/0 }}",
        b"-%}",
        b"</s>",
        b"[-1]",
    ]
    known = [t for t in (*TEMPLATES.values(), chain.CHATML, chain.PLAIN) if "10 **" not in t]
    for case in range(times(3000, scale)):
        chance = random.Random(f"{seed}/{case}")
        raw = damaged(chance.choice(known).encode(), chance, fragments)
        problem = outcome(raw.decode(errors="replace"))
        tally.count(problem is None, f"seed {seed}, case {case}: {problem}")
    yield tally.figure("rendered byte for byte, or refused with a reason")


def random_tokenizer(chance: random.Random) -> Any:
    """A tokenizer put together from parts that may or may not fit."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    specials = [AddedToken(t, special=True) for t in ("</s>", "<s>", "<unk>")]
    pre = chance.choice(
        [
            None,
            *(
                pre_tokenizers.ByteLevel(add_prefix_space=p, use_regex=r)
                for p in (False, True)
                for r in (False, True)
            ),
            *(
                pre_tokenizers.Metaspace(prepend_scheme=s, split=p)
                for s in ("first", "always", "never")
                for p in (False, True)
            ),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]),
        ]
    )
    space = normalizers.Replace(" ", "▁")
    normalizer = chance.choice(
        [
            None,
            None,
            None,
            normalizers.NFC(),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            space,
            normalizers.Strip(),
            normalizers.StripAccents(),
            normalizers.Sequence([normalizers.Prepend("▁"), space]),
            normalizers.ByteLevel(),
            normalizers.Replace("\n", " "),
            normalizers.Prepend("x"),
        ]
    )
    replace = decoders.Replace("▁", " ")
    fitting: list[Any] = (
        [decoders.ByteLevel()]
        if "ByteLevel" in repr(pre)
        else [
            decoders.Metaspace(),
            decoders.Sequence(
                [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
        ]
    )
    decoder = chance.choice(
        fitting * 4
        + [
            None,
            decoders.ByteLevel(),
            decoders.Metaspace(),
            decoders.WordPiece(),
            decoders.BPEDecoder(),
            decoders.Fuse(),
            replace,
            decoders.CTC(),
        ]
    )
    kind = chance.choice(["BPE", "BPE", "BPE", "Unigram", "WordPiece", "WordLevel"])
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(pre) + repr(normalizer) else []
    )
    model, trainer = {
        "BPE": lambda: (
            models.BPE(unk_token=chance.choice([None, "<unk>"]), byte_fallback=chance.random() < 0.3, fuse_unk=chance.random() < 0.5),
            trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
        ),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False)),
        "WordPiece": lambda: (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)),
        "WordLevel": lambda: (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=300, special_tokens=specials, show_progress=False)),
    }[kind]()  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    corpus = [text for text in TEXTS if len(text) < 400]
    backend.train_from_iterator(
        [*(t for c in CHATS_TO_RENDER for _, t in c), *corpus, "the cat the mat"] * 2, trainer
    )
    for _ in range(chance.randint(0, 4)):
        text = chance.choice(
            [
                "  ",
                "\n\n",
                "Hello",
                " the",
                "<|x|>",
                "▁▁",
                "2+2",
                "<0x41>",
                "cat sat",
                "[user]",
                "🙂",
            ]
        )
        flags = {
            name: chance.random() < 0.3
            for name in ("lstrip", "rstrip", "single_word", "normalized")
        }
        token = AddedToken(text, special=chance.random() < 0.3, **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def check_tokens(tokenizer: Any, texts: list[str]) -> str | None:
    """What is wrong with the tokens' bytes and ends, by the text and the library's own offsets."""
    from fusechat_distill.text.tokens import byte_offsets, token_bytes, tokenize

    plain = tokenizer.backend_tokenizer.normalizer is None
    for text, found in zip(texts, tokenize(tokenizer, texts), strict=True):
        raw, at = text.encode(), byte_offsets(text)
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        pieces = token_bytes(tokenizer, found.ids.tolist())
        known = [i for i in range(len(found.ids)) if found.ends[i] >= 0]
        ends = [int(found.ends[i]) for i in known]
        if ends != sorted(ends) or any(end > len(raw) for end in ends):
            return f"{text!r}: ends {ends}"
        for i in known:
            following = [a for a, b in spans[i + 1 :] if a > spans[i][0]]
            last = at[following[0]] if following else len(raw)
            if not at[spans[i][0]] <= found.ends[i] <= max(last, at[spans[i][1]]):
                return f"{text!r}: token {i} ends at {found.ends[i]}, its characters are {spans[i]}"
        if not plain or "▁" in text:  # which these tokenizers write for a space
            continue
        if not any(found.special) and known == list(range(len(found.ids))):
            if lost(tokenizer, raw):
                continue
            for i, end in enumerate(found.ends):
                before = b"".join(pieces[: i + 1])
                if spaceless(before) != spaceless(raw[:end]):
                    return f"{text!r}: up to byte {end} are the tokens {before!r}"
    return None


def fuzz_tokenizers(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    from transformers import PreTrainedTokenizerFast

    from fusechat_common.errors import RequestError
    from fusechat_distill.text.conversations import Renderer
    from tests.support import chain

    conversations = conversations_to_render()
    usable = [t for t in TEXTS if len(t) < 400 and t]
    texts = [
        *usable,
        *(t for chat in CHATS_TO_RENDER for _, t in chat),
        "the cat </s> the  mat<s>",
        "<0x41>",
    ]

    def outcome(backend: Any) -> tuple[str, str | None]:
        try:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
            )
            renderer = Renderer(tokenizer, chain.PLAIN)
            return "read", check_tokens(tokenizer, texts) or check_renderings(
                renderer, conversations
            )
        except RequestError:
            return "refused", None
        except BaseException as error:
            return "raised", repr(error)

    tally = Tally(TITLE, "tokenizers of parts put together by chance")
    read = 0
    for case in range(times(1000, scale)):
        chance = random.Random(f"{seed}/{case}")
        try:
            backend = random_tokenizer(chance)
        except BaseException:  # the library itself won't have it
            continue
        result, problem = outcome(backend)
        read += result == "read"
        tally.count(problem is None, f"seed {seed}, case {case}: {problem}")
    yield tally.figure(f"{read:,} read, bytes and ends of all tokens checked; the others refused")

    from fusechat_distill.inputs.models import open_model
    from fusechat_distill.recipe.schema import Model

    chain.save_models(work)
    folder = work / "pivot"
    whole = json.loads((folder / "tokenizer.json").read_text())
    tally = Tally(TITLE, "tokenizer.json with values, keys and bytes changed")
    read = 0
    for case in range(times(600, scale)):
        chance = random.Random(f"{seed}/json/{case}")
        if chance.random() < 0.7:
            shallow = {k: v for k, v in whole.items() if k != "model"} | {
                "model": whole["model"] | {"vocab": {}, "merges": []}
            }
            changed = mutated(shallow, chance, JUNK)
            if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
                for name in ("vocab", "merges"):
                    if changed["model"].get(name) in ({}, []):
                        changed["model"][name] = whole["model"][name]
            raw = json.dumps(changed, default=str).encode()
        else:
            raw = damaged((json.dumps(whole)).encode(), chance, JSON_FRAGMENTS)
        (folder / "tokenizer.json").write_bytes(raw)
        try:
            files = open_model(Model(model=str(folder)))
            Renderer(files.tokenizer)(conversations)
            problem = check_tokens(files.tokenizer, texts)
            read += 1
        except RequestError:
            problem = None
        except BaseException as error:
            problem = repr(error)
        if problem:
            keep(work, f"tokenizer-{case}.json", raw)
        tally.count(problem is None, f"seed {seed}, case {case}: {problem}")
    yield tally.figure(f"{read:,} read, the others refused")


SECTIONS: list[tuple[str, Section]] = [
    ("fuzz-recipes", fuzz_recipes),
    ("fuzz-rows", fuzz_rows),
    ("fuzz-datasets", fuzz_datasets),
    ("fuzz-shards", fuzz_shards),
    ("fuzz-templates", fuzz_templates),
    ("fuzz-tokenizers", fuzz_tokenizers),
]

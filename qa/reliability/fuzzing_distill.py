"""Damaged inputs of a distillation: a clear error, or what the reference makes of them."""

import contextlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import yaml
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.inputs.models import open_model
from fusechat_distill.recipe.reference import commented_recipe
from fusechat_distill.recipe.schema import Model
from fusechat_distill.storage.shards import Manifest, Shards, scored_samples, scores_table
from fusechat_distill.text.conversations import (
    Conversation,
    Message,
    Renderer,
    _key,
    _layout,
    _messages,
    _turns,
    _UnusableError,
    open_conversations,
)
from fusechat_distill.text.tokens import byte_offsets, token_bytes, tokenize
from qa.reliability.cases import Figure, Section, Wrong, own_copy, scaled
from tests.distill.storage.test_shards import sample
from tests.support import chain, damage

ROOT = Path(__file__).parents[2]
TITLE = "Bad inputs of a distillation"
SLOWEST = 1.0
"""Seconds of CPU time that a recipe, however odd, may take to be refused."""

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**64, 10**30, -0.0, 0.5, 1.5, 1e308),
    *(float("inf"), float("nan"), "", " ", "x", "null", "1", "0.5", "1e-5", "no", "../../x", "/"),
    *("a/b/c", "~", "\0", "é\u0301", "\u202e", "a" * 5000, "{{ 1 }}", "${HOME}", b"\xff"),
    *([], {}, [[]], {"": ""}, {"a": {"b": []}}, [None], ["x", 1, {}], {1: 2}, {None: None}),
]


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
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "pivot:" in b]
    files = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    return [commented_recipe(), *blocks, *(path.read_text("utf-8") for path in files)]


def shown_or_refused(path: Path) -> str:
    """How `status` treats a recipe.

    Raises:
        Wrong: it neither shows it nor refuses it clearly.
    """
    with contextlib.chdir(path.parent):  # a relative output is looked for there
        result = chain.run("status", path)
    if result.exit_code == 0:
        return "shown by `status`"
    if result.exit_code != 2 or not result.stderr.startswith("Error: "):
        raise Wrong(f"status {result.exit_code}: {result.stderr[:300]} {result.exception!r}")
    return "refused"


def fuzz_recipes(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    texts = recipe_texts()
    literals = [damage.Literal(text) for text in damage.YAML_LITERALS if len(text) < 10_000]
    path = work / "recipe.yaml"
    path.write_text(texts[-1])
    shown_or_refused(path)  # TRL and PEFT are imported once
    hostile = list(HOSTILE.items())

    def tried(raw: bytes) -> str:
        here = work / str(os.getpid())
        here.mkdir(exist_ok=True)
        (here / "recipe.yaml").write_bytes(raw)
        try:
            return shown_or_refused(here / "recipe.yaml")
        except Wrong as error:
            raise Wrong(f"{error} with {raw[:600]!r}") from None

    def hurting(number: int, chance: random.Random) -> str:
        name, text = hostile[number]
        ended = tried(text.encode("utf-8", "surrogatepass"))
        if list(work.rglob("HARMED")):
            raise Wrong(f"{name}: it ran a command")
        return ended

    def changed(number: int, chance: random.Random) -> str:
        recipe = yaml.safe_load(chance.choice(texts))
        if chance.random() < 0.5:
            return tried(damage.dumped(damage.changed_tree(recipe, chance, literals)))
        data = damage.plain(damage.changed_tree(recipe, chance, JUNK))
        text: str = yaml.dump(data, Dumper=yaml.SafeDumper, allow_unicode=chance.random() < 0.5)
        return tried(text.encode("utf-8", "surrogatepass"))

    def damaged(number: int, chance: random.Random) -> str:
        return tried(
            damage.changed_bytes(chance.choice(texts).encode(), chance, damage.YAML_FRAGMENTS)
        )

    of_ours = "recipes of the README and the examples with"
    made_to_hurt = "recipes made to hurt: tags that run code, aliases that explode, nesting"
    for what, case, count in (
        (made_to_hurt, hurting, len(hostile)),
        (f"{of_ours} values and keys changed", changed, scaled(4000, scale)),
        (f"{of_ours} bytes changed", damaged, scaled(4000, scale)),
    ):
        note = "{kinds}, by a line that says what is wrong, within a second; nothing is run"
        yield Figure(TITLE, what, note).try_all(case, count, seed, cpu_limit=SLOWEST)


def scored_store(folder: Path, chance: random.Random) -> Any:
    """A store of two shards with eight samples each, as a scorer could have made it."""
    rng = np.random.default_rng(chance.randrange(2**32))
    shards = Shards.create(folder, Manifest("scores", 16, {"model": "m"}, 8))
    for samples in shards.manifest.ranges():
        lengths = [[chance.randint(1, 12) for _ in range(chance.randint(1, 3))] for _ in range(8)]
        rows = [sample(rng, samples.start + i, turns, 4) for i, turns in enumerate(lengths)]
        summary = {"samples": len(rows), "input_tokens": 1234, "left_out": [[3, "too long"]]}
        shards.write(samples, scores_table(rows), summary)
    return shards


def rewritten(table: Any, other: bytes, chance: random.Random) -> bytes:
    """A shard that another program could have written over the one it read."""
    kept, names = table.schema.metadata, table.column_names
    key = next(iter(kept))
    edited = kept[key].replace(b"1234", b"1%d34" % chance.randrange(10))
    i, j = chance.sample(range(3, 8), 2)
    swapped = {names[i]: names[j], names[j]: names[i]}
    reversed_ids = pa.chunked_array([table["ids"].combine_chunks()[::-1]])
    found, metadata = chance.choice([
        (table.take(chance.sample(range(8), 8)[::-1]), kept),
        (pa.concat_tables([table, table.slice(chance.randrange(8), 1)]), kept),
        (table.slice(chance.randint(0, 1), 7), kept),
        (table.slice(0, 0), kept),
        (table.drop_columns([chance.choice(names)]), kept),
        (table.rename_columns([swapped.get(name, name) for name in names]), kept),
        (table.set_column(1, "row", table["row"].cast(pa.int64())), kept),
        (table.set_column(5, "ids", reversed_ids), kept),
        (table, {key: edited}),
        (table, {}),
        (None, None),
    ])  # fmt: skip
    if found is None:
        return other
    sink = pa.BufferOutputStream()
    found = found.replace_schema_metadata(metadata)
    pq.write_table(found, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def fuzz_shards(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    shards = scored_store(work / "scores", random.Random(seed))
    samples, others = shards.manifest.ranges()
    path = shards.path(samples)
    raw, table, summary = path.read_bytes(), shards.read(samples), shards.summary(samples)
    other = shards.path(others).read_bytes()

    def outcome(found: bytes) -> str:
        here = Shards.open(own_copy(work / "scores"))
        here.path(samples).write_bytes(found)
        ended = "read the same values"
        for read, same in ((here.read, table.equals), (here.summary, summary.__eq__)):
            try:
                value = read(samples)
                if not same(value):
                    raise Wrong(f"another value of {read.__name__}")
                if read == here.read:
                    scored_samples(value)
            except FusechatError as error:
                if path.name not in str(error):
                    raise Wrong(f"refused without its name: {error}") from error
                ended = "refused by name"
        return ended

    def case(make: Callable[[random.Random], bytes]) -> Callable[[int, random.Random], str]:
        def one(number: int, chance: random.Random) -> str:
            while (found := make(chance)) == raw:
                pass
            return outcome(found)

        return one

    def one_bit(chance: random.Random) -> bytes:
        found = bytearray(raw)
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        return bytes(found)

    tokens = [b"PAR1", bytes(4), b"\xff\xff\xff\x7f", b"\x15\x02"]
    made: list[tuple[str, Callable[[random.Random], bytes], int]] = [
        ("a bit of a shard's flipped", one_bit, 20_000),
        ("a shard cut short", lambda chance: raw[: chance.randrange(len(raw))], 1000),
        ("bytes of a shard changed, removed, put in, moved",
         lambda chance: damage.changed_bytes(raw, chance, tokens), 10_000),
        ("a shard rewritten: rows, columns, types, numbers, footer changed",
         lambda chance: rewritten(table, other, chance), 500),
    ]  # fmt: skip
    for what, make, count in made:
        yield Figure(TITLE, what).try_all(case(make), scaled(count, scale), seed)


def turns(*pairs: tuple[str, Any], role: str = "role", text: str = "content") -> list[Any]:
    return [{role: speaker, text: said} for speaker, said in pairs]


HI = (("user", "Hi"), ("assistant", "Hello."))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
CHATS: list[dict[str, Any]] = [
    {"messages": turns(*HI)},
    {"messages": turns(("system", "Be brief — 短く."), ("user", "2+2?"), ("assistant", "4"),
                       ("user", "Sure?"), ("assistant", " Yes 🙂\n"))},
    {"conversations": turns(("human", "Hi"), ("gpt", "Hello."), role="from", text="value")},
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": turns(HI[0]), "completion": turns(HI[1])},
    {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}},
    {"messages": [*turns(("user", "Weather?")), CALL, *turns(("tool", "sunny"), ("assistant", "Sunny."))]},
]  # fmt: skip
TEXTS = ["", " ", "\n", "\0", "<|im_end|>", "<|im_start|>", "</s>", "\ue000\ue001\ue000",
         "x" * 20_000, "é" * 300, "🙂👩🏽‍🚀", "e\u0301", "{{ 1 / 0 }}", "{% raise %}", "human", "gpt", "tool", "system",
         "assistant", "developer", "\u202eabc", "\ufeff", "\r\n\t ", "a\u2028b", "Ġ▁"]  # fmt: skip


def turns_found(row: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Read again, in another way, from the documentation: (role, text) of a row, None if unusable."""
    roles = {role: role for role in ("system", "user", "assistant", "tool")}
    roles |= {"human": "user", "gpt": "assistant"}
    if "messages" in row or "conversations" in row:
        turns = row["messages"] if "messages" in row else row["conversations"]
        if isinstance(turns, dict):
            if not all(isinstance(part, list) for part in turns.values()):
                return None
            if len({len(part) for part in turns.values()}) > 1:
                return None
            columns = zip(*turns.values(), strict=True)
            turns = [dict(zip(turns, part, strict=True)) for part in columns]
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
    return text.translate(None, b" \n\t\r")


def lost(tokenizer: Any, text: bytes) -> bool:
    """Whether the tokenizer drops one of the text's characters without a trace."""
    for c in set(text.decode()) - set(" \n\r\t"):
        ids = tokenizer(c, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id in ids
        if not unknown and c.encode() not in b"".join(token_bytes(tokenizer, ids)):
            return True
    return False


def check_renderings(renderer: Any, conversations: list[Any]) -> None:
    """Compare how conversations are rendered with the texts and the tokens' bytes."""
    for conversation, rendering in zip(conversations, renderer(conversations), strict=True):
        for response in rendering.responses:
            message = conversation.messages[response.turn]
            if message.role != "assistant":
                raise Wrong(f"turn {response.turn} of {conversation.messages!r} is no answer")
            answer = message.content.encode()
            if answer[: response.begin].strip() or answer[response.end :].strip():
                raise Wrong(f"more than white space is cut from {answer!r}")
            ids = rendering.input_ids[response.token_slice()]
            ends = response.ends
            known = [int(i) for i in (ends >= 0).nonzero()[0]]
            if list(ends[known]) != sorted(ends[known]) or any(ends[known] > response.end):
                raise Wrong(f"ends {ends} of {answer!r}")
            if renderer.tokenizer.backend_tokenizer.normalizer is not None:
                continue
            if response.begin < response.end and (not known or ends[known[-1]] != response.end):
                continue  # its end is not known, as documented
            joined = b"".join(token_bytes(renderer.tokenizer, ids[: known[-1] + 1].tolist()))
            expected = response.pending + answer[response.begin : response.end]
            if spaceless(joined) != spaceless(expected) and not lost(renderer.tokenizer, expected):
                raise Wrong(f"tokens {joined!r} of {response.pending!r} + {answer!r}")


def fuzz_rows(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    renderers = [
        Renderer(chain.tokenizer(300, ["<|im_end|>", "<|im_start|>"], chain.CHATML)),
        Renderer(chain.tokenizer(340, ["</s>", "<s>"], chain.PLAIN)),
    ]
    junk = [*JUNK, *TEXTS, *CHATS]

    def case(number: int, chance: random.Random) -> str:
        row = damage.plain(damage.changed_tree(chance.choice(CHATS), chance, junk))
        if not isinstance(row, dict) or not {"messages", "conversations"} & set(row):
            row = {"prompt": None, "completion": None} | (row if isinstance(row, dict) else {})
        expected = turns_found(row)
        try:
            found = _messages(_turns(row, _layout(list(map(str, row)), None)[1]))
        except (_UnusableError, ValueError) as error:
            if not str(error).strip() or expected is not None:
                raise Wrong(f"refused with {str(error)!r}, expected {expected!r}") from error
            return "refused"
        if [tuple(message) for message in found] != expected:
            raise Wrong(f"read as {found!r}, expected {expected!r}")
        check_renderings(chance.choice(renderers), [Conversation(_key(found), 0, found)])
        return "rendered, their tokens' bytes compared with the text"

    what = "rows of conversations with values, keys, turns, roles and types changed"
    yield Figure(TITLE, what).try_all(case, scaled(40_000, scale), seed)


def dataset_files(work: Path, chance: random.Random) -> dict[str, bytes]:
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


def fuzz_datasets(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = work / "cache"
    files = dataset_files(work, random.Random(seed))

    def case(number: int, chance: random.Random) -> str:
        logging.disable(logging.CRITICAL)
        kind = chance.choice(list(files))
        path = work / f"case-{number}.{kind}"
        path.write_bytes(damage.changed_bytes(files[kind], chance, damage.JSON_FRAGMENTS))
        try:
            conversations = open_conversations(str(path))[:]
        except RequestError as error:
            if str(path) not in str(error) or "\n" in str(error):
                raise Wrong(f"refused: {error}") from error
            return "refused by a line that names the file"
        finally:
            path.unlink()
        if not conversations:
            raise Wrong("read without a conversation")
        for conversation in conversations:
            for message in conversation.messages:
                message.content.encode()
        return "read"

    what = "dataset files (JSONL, JSON, Parquet, Arrow, CSV) with bytes changed"
    yield Figure(TITLE, what).try_all(case, scaled(1500, scale), seed)


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


CONVERSATIONS = [
    Conversation(f"{i:032x}", i, tuple(Message(*turn) for turn in chat))
    for i, chat in enumerate(CHATS_TO_RENDER)
]
RENDERED = [text for chat in CHATS_TO_RENDER for _, text in chat]
SHORT_TEXTS = [text for text in TEXTS if len(text) < 400]


def fuzz_templates(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    tokenizer = chain.tokenizer(340, ["</s>", "<s>"], chain.PLAIN)

    def tried(template: str) -> str:
        try:
            with contextlib.chdir(work):
                check_renderings(Renderer(tokenizer, template), CONVERSATIONS)
        except RequestError:
            ended = "refused with a reason"
        else:
            ended = "rendered, answers found byte for byte or left out"
        if (work / "HARMED").exists():
            raise Wrong("it ran a command")
        return ended

    named = list(TEMPLATES.items())
    fragments = [b"{{", b"}}", b"{%", b"%}", b" | trim", b"{% endfor %}", b"{{ 1/0 }}", b"-%}"]
    fragments += [b"</s>", b"[-1]"]
    known = [t for t in (*TEMPLATES.values(), chain.CHATML, chain.PLAIN) if "10 **" not in t]

    def by_name(number: int, chance: random.Random) -> str:
        name, template = named[number]
        try:
            return tried(template)
        except Exception as error:
            raise Wrong(f"{name}: {error!r}") from error

    def changed(number: int, chance: random.Random) -> str:
        raw = damage.changed_bytes(chance.choice(known).encode(), chance, fragments)
        return tried(raw.decode(errors="replace"))

    what = "chat templates that trim, reorder, merge, raise, or try to leave their sandbox"
    figure = Figure(TITLE, what, "{kinds}; nothing is run")
    yield figure.try_all(by_name, len(named), seed, cpu_limit=SLOWEST)
    figure = Figure(TITLE, "chat templates with bytes changed")
    yield figure.try_all(changed, scaled(3000, scale), seed, cpu_limit=SLOWEST)


def random_tokenizer(chance: random.Random) -> Any:
    """A tokenizer put together from parts that may or may not fit."""
    specials = [AddedToken(t, special=True) for t in ("</s>", "<s>", "<unk>")]
    both = (False, True)
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pre = chance.choice([
        None, pre_tokenizers.Whitespace(),
        *(pre_tokenizers.ByteLevel(add_prefix_space=p, use_regex=r) for p in both for r in both),
        *(pre_tokenizers.Metaspace(prepend_scheme=s, split=p) for s in ("first", "always", "never") for p in both),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain_bytes]),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]),
    ])  # fmt: skip
    space = normalizers.Replace(" ", "▁")
    normalizer = chance.choice([
        None, None, None, space, normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase(),
        normalizers.Strip(), normalizers.StripAccents(), normalizers.ByteLevel(),
        normalizers.Sequence([normalizers.Prepend("▁"), space]),
        normalizers.Replace("\n", " "), normalizers.Prepend("x"),
    ])  # fmt: skip
    replace = decoders.Replace("▁", " ")
    fallback = [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fitting: list[Any] = [decoders.Metaspace(), decoders.Sequence(fallback)]
    if "ByteLevel" in repr(pre):
        fitting = [decoders.ByteLevel()]
    decoder = chance.choice([
        *fitting * 4, None, decoders.ByteLevel(), decoders.Metaspace(), decoders.WordPiece(),
        decoders.BPEDecoder(), decoders.Fuse(), replace, decoders.CTC(),
    ])  # fmt: skip
    kind = chance.choice(["BPE", "BPE", "BPE", "Unigram", "WordPiece", "WordLevel"])
    alphabet = []
    if "ByteLevel" in repr(pre) + repr(normalizer):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    shared: dict[str, Any] = {"special_tokens": specials, "show_progress": False}
    merging = {"byte_fallback": chance.random() < 0.3, "fuse_unk": chance.random() < 0.5}
    unknown = chance.choice([None, "<unk>"])
    model, trainer = {
        "BPE": (models.BPE(unk_token=unknown, **merging), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **shared)),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", initial_alphabet=alphabet, **shared)),
        "WordPiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=300, **shared)),
        "WordLevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=300, **shared)),
    }[kind]  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator([*RENDERED, *SHORT_TEXTS, "the cat the mat"] * 2, trainer)
    texts = ["  ", "\n\n", "Hello", " the", "<|x|>", "▁▁", "2+2", "<0x41>", "cat sat", "[user]", "🙂"]  # fmt: skip
    for _ in range(chance.randint(0, 4)):
        names = ("lstrip", "rstrip", "single_word", "normalized")
        flags = {name: chance.random() < 0.3 for name in names}
        token = AddedToken(chance.choice(texts), special=chance.random() < 0.3, **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def check_tokens(tokenizer: Any, texts: list[str]) -> None:
    """Compare the tokens' bytes and ends with the text and the library's own offsets."""
    unchanged = tokenizer.backend_tokenizer.normalizer is None
    for text, found in zip(texts, tokenize(tokenizer, texts), strict=True):
        raw, at = text.encode(), byte_offsets(text)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        pieces = token_bytes(tokenizer, found.ids.tolist())
        known = [i for i in range(len(found.ids)) if found.ends[i] >= 0]
        ends = [int(found.ends[i]) for i in known]
        if ends != sorted(ends) or any(end > len(raw) for end in ends):
            raise Wrong(f"{text!r}: ends {ends}")
        for i in known:
            following = [a for a, b in spans[i + 1 :] if a > spans[i][0]]
            last = at[following[0]] if following else len(raw)
            if not at[spans[i][0]] <= found.ends[i] <= max(last, at[spans[i][1]]):
                raise Wrong(f"{text!r}: token {i} of {spans[i]} ends at {found.ends[i]}")
        if not unchanged or "▁" in text:  # which these tokenizers write for a space
            continue
        if not any(found.special) and known == list(range(len(found.ids))):
            if lost(tokenizer, raw):
                continue
            for i, end in enumerate(found.ends):
                before = b"".join(pieces[: i + 1])
                if spaceless(before) != spaceless(raw[:end]):
                    raise Wrong(f"{text!r}: up to byte {end} are the tokens {before!r}")


def fuzz_tokenizers(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    texts = [*filter(None, SHORT_TEXTS), *RENDERED, "the cat </s> the  mat<s>", "<0x41>"]

    def put_together(number: int, chance: random.Random) -> str:
        try:
            backend = random_tokenizer(chance)
        except BaseException:  # some parts the library itself refuses, some make it panic
            return "refused by the tokenizers library"
        try:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
            )
            renderer = Renderer(tokenizer, chain.PLAIN)
            check_tokens(tokenizer, texts)
            check_renderings(renderer, CONVERSATIONS)
        except RequestError:
            return "refused"
        return "read, bytes and ends of all tokens checked"

    figure = Figure(TITLE, "tokenizers of parts put together by chance")
    yield figure.try_all(put_together, scaled(1000, scale), seed)

    chain.save_models(work)
    whole = json.loads((work / "pivot" / "tokenizer.json").read_text())
    shallow = whole | {"model": whole["model"] | {"vocab": {}, "merges": []}}

    def changed(number: int, chance: random.Random) -> str:
        folder = own_copy(work / "pivot")
        if chance.random() < 0.7:
            data = damage.plain(damage.changed_tree(shallow, chance, JUNK))
            if isinstance(data, dict) and isinstance(data.get("model"), dict):
                for name in ("vocab", "merges"):
                    if data["model"].get(name) in ({}, []):
                        data["model"][name] = whole["model"][name]
            raw = json.dumps(data, default=str).encode()
        else:
            raw = damage.changed_bytes(json.dumps(whole).encode(), chance, damage.JSON_FRAGMENTS)
        (folder / "tokenizer.json").write_bytes(raw)
        try:
            files = open_model(Model(model=str(folder)))
            Renderer(files.tokenizer)(CONVERSATIONS)
            check_tokens(files.tokenizer, texts)
        except RequestError:
            return "refused"
        return "read"

    figure = Figure(TITLE, "tokenizer.json with values, keys and bytes changed")
    yield figure.try_all(changed, scaled(600, scale), seed)


SECTIONS: dict[str, Section] = {
    "fuzz-recipes": fuzz_recipes,
    "fuzz-rows": fuzz_rows,
    "fuzz-datasets": fuzz_datasets,
    "fuzz-shards": fuzz_shards,
    "fuzz-templates": fuzz_templates,
    "fuzz-tokenizers": fuzz_tokenizers,
}

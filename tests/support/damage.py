"""Damages files at random: their bytes, or the values, names and nesting of JSON and YAML documents.

Every function takes its random numbers from `chance`, so that a seed gives the same damage again.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HEADER_TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"0", b"1e9", b"NaN", b"null", b"\\ud800",
                 b"99999999999999999999", b'"dtype"', b'"U8"', b'"shape"', b'"data_offsets"', b"\0"]  # fmt: skip
JSON_FRAGMENTS = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"1e999", b"NaN", b"\\ud800", b"\\u0000", b"\xff", b"\xc3"),
    *(b"\n", b"\n\n", b"\0", b"\t", b"\r", b"\x1b", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 2000),
    *(b'{"a":' * 600, b'"role"', b'"assistant"', b"9" * 400, b"- ", b"#", b"&", b"*"),
]  # fmt: skip
YAML_FRAGMENTS = [
    *(b":", b": ", b"- ", b"\n", b"\t", b"  ", b"#", b"'", b'"', b"{", b"}", b"[", b"]", b",", b"&a ", b"\r"),
    *(b"*a", b"<<: *a", b"!!python/object/apply:os.system [exit 1]", b"!!int x", b"!!float .", b"|\n", b"\x1b"),
    *(b"!!binary '='", b"!!timestamp x", b"2024-99-99", b"? [a, b] : c", b"? {a: b}\n: c", b"=", b"%YAML 9.9\n"),
    *(b"---\n", b"...\n", b"\xff", b"\xc3", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"1e999", b".inf", b".nan", b"0b12"),
    *(b"!!int ''", b"!!float ''", b"!!bool x", b"!!null 1", b"!!seq x", b"!!map x", b"!!str [a]", b"1:99:99"),
    *(b"!!set {a}", b"!!omap [a: b]", b"!!pairs [a]", b"!!null x", b"9" * 5000, b">\n", b"@", b"`"),
    *(b"lambda", b"output", b"sources", b"name: ../../x", b"name: ''", b"lora: {r: 0}", b"\xed\xa0\x80"),
]  # fmt: skip


def changed_bytes(
    raw: bytes, chance: random.Random, fragments: Sequence[bytes], times: int = 0
) -> bytes:
    """Flip bits, replace, insert, delete, repeat and move bytes.

    Args:
        fragments: what is put in, such as tokens of the file's format.
        times: how many places are damaged; 0 for one to four.
    """
    found = bytearray(raw)
    for _ in range(times or chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[at : at + chance.choice((0, 0, 1, 3, 5))] = chance.choice(fragments)
        elif kind == 2:
            del found[at : at + chance.choice((1, 2, 5, 8, 100, 10_000))]
        elif kind == 3:
            found[at:at] = found[at : at + chance.choice((2, 10, 60, 200))]
        elif kind == 4:
            other = chance.randrange(len(found) + 1)
            part = bytes(found[other : other + chance.randrange(40)])
            found[at : at + len(part)] = part
        elif chance.random() < 0.2:
            del found[at:]
        else:
            found[:0] = chance.choice(fragments)
    return bytes(found)


def changed_safetensors(raw: bytes, chance: random.Random, times: int) -> bytes:
    """Damage a safetensors file: also its header's length and the file's end."""
    for _ in range(times):
        kind = chance.randrange(5)
        if kind == 0:
            raw = raw[: chance.randrange(len(raw) + 1)]
        elif kind == 1 and len(raw) >= 8:
            lengths = [0, 1, len(raw) - 8, len(raw), 1 << 31, (1 << 64) - 1]
            raw = chance.choice(lengths).to_bytes(8, "little") + raw[8:]
        else:
            raw = changed_bytes(raw, chance, HEADER_TOKENS, 1)
    return raw


@dataclass(frozen=True)
class Literal:
    """Text that is written into a document as it is."""

    text: str


@dataclass
class Pairs:
    """A JSON object in which a name can occur twice."""

    items: list[tuple[Any, Any]]


JSON_LITERALS = [
    "null", "true", "false", "0", "-0", "1", "-1", "1.0", "-0.0", "1.5", "1e2", "1e400", "-1e400",
    "1e-400", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615",
    "18446744073709551616", "1" + "0" * 400, "9" * 5000, "01", "+1", ".5", "1.", "0x10", "NaN",
    "Infinity", "-Infinity", "nan", "None", "True", "{}", "[]", "[[]]", '""', '"0"', '" "',
    '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\x"', '"\x01"', '"a\tb"', "'a'", '"é"',
    '"\\u202e"', "[" * 3000 + "]" * 3000, "[" * 200_000, '{"a":' * 3000 + "0" + "}" * 3000,
    '"' + "x" * 70_000 + '"', "[0,]", "{,}", "// x\n0", "/* x */ 0", "",
]  # fmt: skip
STRINGS = [
    "", " ", ".", "..", "../x", "/etc/passwd", "/", "~", "a/b", "a\\b", "C:\\x", "file:///etc/passwd",
    "http://localhost:1/x", "s3://x/y", "x\0y", "x\ny", "\x1b[31m", "\ud800", "\u202e", "é", "é",
    "x" * 300, "x" * 5000, "model.safetensors", "pytorch_model.bin", "__metadata__", "F32", "BF16",
    "F8_E4M3", "I4", "f32", "bf16", "auto", "float8", "None", "null", "-1", "${HOME}", "{0}", "%s",
    "a+b", "+", "a@b", "(?:", "(a+)+$", "1e-5", "no", "{{ 1 }}",
]  # fmt: skip
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
]  # fmt: skip
KINDS = ("literal", "literal", "string", "number", "drop", "double", "rename", "swap", "wrap", "grow")  # fmt: skip


def changed_tree(value: Any, chance: random.Random, junk: Sequence[Any], times: int = 0) -> Any:
    """Change values, names, numbers and nesting in a few places of a document.

    Args:
        value: plain data: dictionaries, lists, strings, numbers; it is not changed.
        junk: what takes the place of values and names; a `Literal` is written as it is.
        times: how many places are damaged; 0 for one to three, mostly one.

    Returns:
        A tree for `dump` or `plain`.
    """
    holder = [_tree(value)]
    for _ in range(times or chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        if not places:
            break
        _damage(*chance.choice(places), chance, junk, places)
    return holder[0] if holder else Literal("")


def dump(tree: Any) -> str:
    """The tree as JSON, which is YAML as well."""
    if isinstance(tree, Literal):
        return tree.text
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{dump(key)}: {dump(item)}" for key, item in tree.items) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    return json.dumps(tree, ensure_ascii=isinstance(tree, str) and not tree.isprintable())


def dumped(tree: Any) -> bytes:
    """The bytes of `dump`; half a surrogate pair is written as it is."""
    return dump(tree).encode("utf-8", "surrogatepass")


def plain(tree: Any) -> Any:
    """The tree as Python's own data; of a name that occurs twice the last value."""
    if isinstance(tree, Pairs):
        names = [plain(key) for key, _ in tree.items]
        names = [str(name) if isinstance(name, list | dict | bytes) else name for name in names]
        return dict(zip(names, [plain(item) for _, item in tree.items], strict=True))
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    return tree.text if isinstance(tree, Literal) else tree


def _tree(value: Any) -> Any:
    """A copy in which objects are `Pairs`."""
    if isinstance(value, dict | Pairs):
        items = value.items if isinstance(value, Pairs) else value.items()
        return Pairs([(key, _tree(item)) for key, item in items])
    return [_tree(item) for item in value] if isinstance(value, list) else value


def _places(owner: Any) -> Iterator[tuple[Any, int]]:
    """(list or object, number) of every value, those in objects included."""
    for at, item in enumerate(owner.items if isinstance(owner, Pairs) else owner):
        yield owner, at
        value = item[1] if isinstance(owner, Pairs) else item
        if isinstance(value, Pairs | list):
            yield from _places(value)


def _damage(owner: Any, at: int, chance: random.Random, junk: Sequence[Any], places: Any) -> None:
    items = owner.items if isinstance(owner, Pairs) else owner
    key, value = items[at] if isinstance(owner, Pairs) else (None, items[at])
    kind = chance.choice(KINDS)
    if kind == "drop":
        del items[at]
        return
    if kind == "double":
        items.insert(chance.randrange(len(items) + 1), items[at])
        return
    if kind == "rename" and isinstance(owner, Pairs):
        names = [k for o, _ in places if isinstance(o, Pairs) for k, _ in o.items]
        variants = [f"{key}s", str(key)[:-1], str(key).upper()]
        items[at] = (_tree(chance.choice([*STRINGS, *variants, *junk, *names])), value)
        return
    if kind == "swap":
        other, where = chance.choice(places)
        found = (other.items if isinstance(other, Pairs) else other)[where]
        value = _tree(found[1] if isinstance(other, Pairs) else found)
    elif kind == "wrap":
        value = [value] if chance.random() < 0.5 else Pairs([(chance.choice(STRINGS), value)])
    elif kind == "grow":
        value = [_tree(value) for _ in range(chance.choice([2, 3, 50]))]
    elif kind == "string":
        part = chance.choice(STRINGS)
        value = chance.choice([part, f"{part}{value}", f"{value}{part}"])[:6000]
    elif kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        value = chance.choice([value + 1, value - 1, -value, value * 1000, value / 2, float(value)])
    else:
        value = _tree(chance.choice(junk))
    items[at] = (key, value) if isinstance(owner, Pairs) else value

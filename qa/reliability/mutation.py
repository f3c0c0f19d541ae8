"""JSON and YAML damaged where it hurts: values, names, numbers and nesting before single bytes."""

import json
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Literal:
    """Text that goes into the document as it is."""

    text: str


@dataclass
class Pairs:
    """An object whose names may occur twice."""

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
    "a+b", "+", "a@b", "(?:", "(a+)+$",
]  # fmt: skip

KINDS = (
    "literal",
    "literal",
    "string",
    "number",
    "drop",
    "double",
    "rename",
    "swap",
    "wrap",
    "grow",
)


def parsed(value: Any) -> Any:
    """Plain data as a tree that can be damaged."""
    if isinstance(value, dict):
        return Pairs([(key, parsed(item)) for key, item in value.items()])
    return [parsed(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> str:
    """As JSON, which is YAML as well."""
    if isinstance(value, Literal):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{dump(key)}: {dump(item)}" for key, item in value.items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def damage_tree(
    tree: Any, chance: random.Random, literals: list[str] | None = None, times: int = 1
) -> Any:
    """The tree with so many of its places damaged."""
    holder = [tree]
    for _ in range(times):
        places = list(_places(holder))
        if not places:
            break
        owner, at = chance.choice(places)
        _damage(owner, at, chance, literals or JSON_LITERALS, places)
    return holder[0] if holder else Literal("")


def _places(owner: Any) -> Any:
    """(list, number) of every value, those in objects included."""
    items = owner.items if isinstance(owner, Pairs) else owner
    for at, item in enumerate(items):
        yield owner, at
        value = item[1] if isinstance(owner, Pairs) else item
        if isinstance(value, (Pairs, list)):
            yield from _places(value)


def _damage(owner: Any, at: int, chance: random.Random, literals: list[str], places: Any) -> None:
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
        new = chance.choice([*STRINGS, *map(Literal, literals), *names])
        items[at] = (new, value)
        return
    if kind == "swap":
        other, where = chance.choice(places)
        found = (other.items if isinstance(other, Pairs) else other)[where]
        value = _copy(found[1] if isinstance(other, Pairs) else found)
    elif kind == "wrap":
        value = [value] if chance.random() < 0.5 else Pairs([(chance.choice(STRINGS), value)])
    elif kind == "grow":
        value = [_copy(value) for _ in range(chance.choice([2, 3, 50]))]
    elif kind == "string":
        part = chance.choice(STRINGS)
        value = chance.choice([part, f"{part}{value}", f"{value}{part}"])[:6000]
    elif kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = chance.choice([value + 1, value - 1, -value, value * 1000, value / 2, float(value)])
    else:
        value = Literal(chance.choice(literals))
    items[at] = (key, value) if isinstance(owner, Pairs) else value


def _copy(value: Any) -> Any:
    if isinstance(value, Pairs):
        return Pairs([(key, _copy(item)) for key, item in value.items])
    return [_copy(item) for item in value] if isinstance(value, list) else value


def damage_text(text: bytes, chance: random.Random) -> bytes:
    """A document with bytes changed, taken away, doubled or put in."""
    raw = bytearray(text)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(raw) + 1)
        kind = chance.randrange(6)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            raw[at : at + chance.randrange(4)] = chance.choice(
                [
                    b"\0",
                    b"\xff",
                    b"\xc3",
                    b"\xef\xbb\xbf",
                    b"\xed\xa0\x80",
                    b"\t",
                    b"\r",
                    b"\x1b",
                    b'"',
                ]
            )
        elif kind == 2:
            del raw[at : at + chance.choice([1, 5, 10_000])]
        elif kind == 3:
            raw[at:at] = raw[at : at + chance.randrange(60)]
        elif kind == 4:
            raw[at:at] = chance.choice(
                [b"{", b"}", b"[", b"]", b",", b":", b"- ", b"\n", b"#", b"&", b"*"]
            )
        elif raw[:2] != b"\xff\xfe":
            raw = bytearray(chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\n"]) + raw)
    return bytes(raw)

"""Chats about the standard library, whose source is on every machine.

    python examples/quickstart/corpus.py OUT

writes datasets of chats, with columns `domain` and `messages`, into the folder OUT: `target.jsonl`
to fuse on, and for training `pivot.jsonl`, `documentation.jsonl` and `code.jsonl`, one a model.

From Python: `split(chats(), seed=1, target_bytes=500_000)`, then `chat.row()` for each chat of it.
"""

import argparse
import ast
import json
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

DOMAINS = ("documentation", "code")
SHORTEST, LONGEST = 60, 900  # characters of an answer

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.Module | ast.ClassDef | _Function


class Chat(NamedTuple):
    """A question about `name`, such as `json.dumps`, and its answer."""

    domain: str
    name: str
    question: str
    answer: str

    def row(self) -> dict[str, Any]:
        """The chat as a row of a dataset."""
        turns = (("user", self.question), ("assistant", self.answer))
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"domain": self.domain, "messages": messages}


class Split(NamedTuple):
    """The chats that each model is trained on; those of `target` are in no other part."""

    target: list[Chat]
    pivot: list[Chat]
    sources: dict[str, list[Chat]]  # by the domain that the source is good at


def chats() -> Iterator[Chat]:
    """Yield a chat for every docstring and every short function of the standard library.

    In the order of its files; of equal answers the first counts.
    """
    seen = set()
    for name, node, lines in _definitions():
        for chat in _about(name, node, lines):
            if len(chat.answer) >= SHORTEST and chat.answer not in seen:
                seen.add(chat.answer)
                yield chat


def split(
    chats: Iterable[Chat],
    *,
    seed: int = 0,
    target_bytes: int = 200_000,
    pivot_bytes: int = 300_000,
    source_bytes: int = 1_500_000,
) -> Split:
    """Deal the chats out by a hash of the seed and their names.

    First `target` gets `target_bytes` of answers, each domain the same share. Of the others the
    source of a domain gets at most `source_bytes`, and the pivot `pivot_bytes` of what the sources
    get. Definitions of the same name stay together: in another module they are often copies.
    """
    left = sorted(chats, key=lambda chat: (_hash(seed, _leaf(chat)), _hash(seed, chat.name)))
    target: list[Chat] = []
    for domain in DOMAINS:
        target += _first(left, domain, target_bytes // len(DOMAINS))
    taken = {_leaf(chat) for chat in target}
    left = [chat for chat in left if _leaf(chat) not in taken]
    sources = {domain: _first(left, domain, source_bytes) for domain in DOMAINS}
    pivot = [
        chat
        for domain in DOMAINS
        for chat in _first(sources[domain], domain, pivot_bytes // len(DOMAINS))
    ]
    return Split(target, pivot, sources)


def write(folder: Path, parts: Split) -> None:
    """Write each part as JSON Lines: target.jsonl, pivot.jsonl, and <domain>.jsonl for sources."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"target": parts.target, "pivot": parts.pivot, **parts.sources}.items():
        rows = (json.dumps(chat.row()) + "\n" for chat in part)
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def _first(chats: Iterable[Chat], domain: str, size: int) -> list[Chat]:
    """The first chats of a domain, until their answers have so many bytes."""
    found = []
    for chat in chats:
        if size <= 0:
            break
        if chat.domain == domain:
            size -= len(chat.answer.encode())
            found.append(chat)
    return found


def _leaf(chat: Chat) -> str:
    """The last part of a name; the whole of one like `__init__`, which nearly every class has."""
    leaf = chat.name.rpartition(".")[2]
    return chat.name if leaf.startswith("__") else leaf


def _hash(seed: int, text: str) -> bytes:
    return sha256(f"{seed} {text}".encode()).digest()


def _about(name: str, node: _Definition, lines: list[str]) -> Iterator[Chat]:
    asked = f"{name}({ast.unparse(node.args)})" if isinstance(node, _Function) else name
    if docstring := ast.get_docstring(node):
        yield Chat("documentation", name, f"What is {asked}?", _shortened(docstring.strip()))
    if isinstance(node, _Function) and len(code := _code(node, lines)) <= LONGEST:
        yield Chat("code", name, f"Write {name}.", code)


def _shortened(text: str) -> str:
    """The first paragraphs of a long text, or its first lines."""
    if len(text) <= LONGEST:
        return text
    ends = (text.rfind(end, SHORTEST, LONGEST) for end in ("\n\n", "\n", " "))
    return text[: next((end for end in ends if end > 0), LONGEST)].rstrip()


def _code(node: _Function, lines: list[str]) -> str:
    """The function without its docstring and decorators; none if it has no more than these."""
    code = lines[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node):
        first = node.body[0]
        del code[first.lineno - node.lineno : (first.end_lineno or first.lineno) - node.lineno + 1]
        if len(node.body) == 1:
            return ""
    return textwrap.dedent("".join(code)).strip()


def _definitions() -> Iterator[tuple[str, _Definition, list[str]]]:
    """Yield (dotted name, node, the file's lines) of every module, class, function and method."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code
                text = file.read()
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # templates and samples, not modules
            continue
        for name, node in _inside(".".join(parts).removesuffix(".__init__"), tree):
            yield name, node, text.splitlines(keepends=True)


def _inside(name: str, node: _Definition) -> Iterator[tuple[str, _Definition]]:
    yield name, node
    if not isinstance(node, _Function):  # nested functions are part of the outer one
        for child in node.body:
            if isinstance(child, _Definition):
                yield from _inside(f"{name}.{child.name}", child)


def main() -> None:
    """Read the command line and write the datasets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path)
    for option, value in (split.__kwdefaults__ or {}).items():
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="N", type=int, default=value)
    options = vars(parser.parse_args())
    out = options.pop("out")
    parts = split(chats(), **options)
    if not all([parts.target, parts.pivot, *parts.sources.values()]):
        parser.error(
            f"too little text in {sysconfig.get_path('stdlib')}; this Python seems to come "
            "without the source of its standard library, so use another one"
        )
    write(out, parts)


if __name__ == "__main__":
    main()

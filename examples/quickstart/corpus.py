"""Text that lies on every machine: the standard library's docstrings, in three domains."""

import ast
import hashlib
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

# The top-level modules of each domain; one that this Python doesn't have is left out.
DOMAINS = {
    "networking": """
        asynchat asyncio asyncore concurrent ftplib http imaplib ipaddress multiprocessing nntplib
        poplib queue sched select selectors signal smtpd smtplib socket socketserver ssl subprocess
        telnetlib threading urllib wsgiref xmlrpc
    """,
    "formats": """
        _markupbase base64 binhex cgi codecs configparser csv difflib email encodings html json
        mailbox mimetypes pickle pickletools plistlib quopri re shelve string stringprep textwrap
        tokenize tomllib uu uuid wave xdrlib xml
    """,
    "numbers_and_files": """
        _pydatetime _pydecimal _pylong _strptime bisect calendar colorsys datetime decimal fractions
        heapq numbers random secrets statistics timeit zoneinfo
        _pyio bz2 filecmp fileinput fnmatch genericpath glob gzip io lzma ntpath os pathlib
        posixpath shutil stat tarfile tempfile zipfile
    """,
}
GENERAL = "general"  # every other module, and the language topics of `help()`

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"}
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write(vocabulary: int, every: int, folder: Path) -> None:
    """Write every `every`-th document into train.json and held_out.json, and a tokenizer beside.

    The files hold {domain: [text, ...]}. About one document in eight is held out, chosen by the
    text alone.
    """
    train: dict[str, list[str]] = {domain: [] for domain in (*DOMAINS, GENERAL)}
    held_out: dict[str, list[str]] = {domain: [] for domain in (*DOMAINS, GENERAL)}
    for domain, text in islice(documents(), 0, None, every):
        part = held_out if hashlib.sha256(text.encode()).digest()[0] < 32 else train
        part[domain].append(text)
    if not all([*train.values(), *held_out.values()]):
        raise SystemExit(
            f"Error: too few docstrings in {_library()}; this Python seems to come without the "
            "source of its standard library, so use another one"
        )
    (folder / "train.json").write_text(json.dumps(train), encoding="utf-8")
    (folder / "held_out.json").write_text(json.dumps(held_out), encoding="utf-8")
    every_text = (text for texts in train.values() for text in texts)
    train_tokenizer(every_text, vocabulary).save_pretrained(folder / "tokenizer")


def documents() -> Iterator[tuple[str, str]]:
    """Yield (domain, text) of every docstring of the standard library, in the order of its files.

    A text is the signature and the docstring below it; of equal docstrings the first counts.
    """
    seen = set()
    domain_of = {
        module: domain for domain, modules in DOMAINS.items() for module in modules.split()
    }
    for module, name, node in _definitions():
        docstring = ast.get_docstring(node)
        if docstring and docstring not in seen:
            seen.add(docstring)
            arguments = "" if isinstance(node, (ast.Module, ast.ClassDef)) else _arguments(node)
            yield domain_of.get(module, GENERAL), f"{name}{arguments}\n\n{docstring}\n"
    for topic in _topics():
        yield GENERAL, topic


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; `</s>` ends a document."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocabulary, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="</s>", pad_token="</s>"
    )


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _definitions() -> Iterator[tuple[str, str, _Definition]]:
    """Yield (top-level module, dotted name, node) of every module, class and function."""
    for path in sorted(_library().rglob("*.py")):
        parts = path.relative_to(_library()).with_suffix("").parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):  # templates and samples, not modules
            continue
        dotted = ".".join(parts).removesuffix(".__init__")
        for name, node in _inside(dotted, tree):
            yield parts[0], name, node


def _inside(name: str, node: _Definition) -> Iterator[tuple[str, _Definition]]:
    yield name, node
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _inside(f"{name}.{child.name}", child)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"({ast.unparse(node.args)})"


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]

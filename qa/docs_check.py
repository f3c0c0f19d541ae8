"""Runs every command and code block of the README and the docs, and follows their links.

    python -m qa.docs_check [PAGE ...]

Each page is run in a folder of its own that looks like a clone, with tiny models and data under the
names that the pages use (`docs_hub`). A block's language says what is checked:

- shell (indented, or `sh`): run line by line; the exit status is 0 unless the line ends in
  `# exit status N`; `cd` and `export` hold until the end of the block;
- `python`: run in order, with the page's earlier blocks' names, or written to a file where the
  paragraph before names one;
- `yaml`, `json`, `jsonl`, `toml`: parsed, and written to a file where the paragraph before names one;
- `text` or `json` directly after one of the first two: lines, or keys, of its output, in order;
  `…` stands for anything.

A comment `<!-- hidden: COMMAND -->` runs a command that readers don't see, `<!-- not run: REASON -->`
leaves out the next block. What a page's commands need and this machine lacks is in `NOT_RUN`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import yaml
from markdown_it import MarkdownIt

from fusechat_distill.cli import commands as distill_group
from fusechat_merge.cli import main as merge_group

ROOT = Path(__file__).parents[1]
PROGRAMS = {"fusechat-merge": merge_group, "fusechat-distill": distill_group}
PAGES = ("README.md", "docs/*.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/**/*.md")

NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"^make (?!help)", "takes long, or is this check: the target exists"),
    (r"^(pip|python -m pip) install", "installs from an index"),
    (r"^git clone", "needs the network"),
    (r"^(ssh|scp|rsync) ", "needs a second machine"),
    (r"^(sbatch|srun|squeue) ", "needs a cluster"),
    (r"accelerate launch", "several processes or devices; tests/distill runs two processes"),
    (r"\bvllm\b", "needs vLLM and a GPU"),
    (r"--device cuda|CUDA_VISIBLE_DEVICES", "needs a GPU"),
    (r"^lm-eval", "another project's program"),
    (r"ladder\.py|examples/quickstart/demo\.py", "takes ten minutes or more; tested when reduced"),
    (r"^python benchmarks/", "measures, with gigabytes"),
    (r"^python -m (qa|tests)\.", "takes long; the tests run the quickest of it"),
    (r"^mergekit-evolve", "needs ray and an evaluation harness"),
)
"""(what a command contains, why it is not run); its program, target and options are checked."""

GENERATED = "docs/*.py"
"""Scripts that write pages; with `--check` they fail where a page is not what they would write."""

_WRITTEN = {"yaml": "ya?ml", "json": "json", "jsonl": "jsonl", "toml": "toml", "python": "py"}
"""{language of what may be written to a file: how the file's name ends}."""
_OUTPUT = {"text", "json"}
_LANGUAGES = _WRITTEN.keys() | _OUTPUT | {"sh", "mermaid"}
_LIMIT = 900  # seconds a command, on a machine that is busy


@dataclass
class Block:
    """A code block of a page.

    Attributes:
        line: of its first line of code in the page, from 1.
        language: `sh` for indented blocks; `hidden` for a command that readers don't see.
        lines: the code.
        file: named in the paragraph before, where it is to be written.
        reason: why it is not run, where the page says so.
        output: what the next block shows of its output.
    """

    line: int
    language: str
    lines: list[str]
    file: str | None = None
    reason: str | None = None
    output: Block | None = None

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def blocks(text: str) -> list[Block]:
    """The code blocks of a page, each output joined to what makes it."""
    found: list[Block] = []
    paragraph, reason = "", None
    adjacent = False  # no text since the last block
    for token in MarkdownIt().parse(text):
        if token.type == "inline":
            paragraph, adjacent = token.content, False
        elif token.type == "html_block":
            comment = re.match(r"<!-- (hidden|not run): (.*) -->$", token.content.strip())
            if comment and comment[1] == "hidden":
                found.append(Block(token.map[0] + 1, "hidden", [comment[2]]))
            elif comment:
                reason = comment[2]
        elif token.type in ("fence", "code_block"):
            fenced = token.type == "fence"
            language = token.info.strip() if fenced else "sh"
            ending = _WRITTEN.get(language, r"\n")  # a name has no line break
            file = re.findall(rf"`([\w./-]+\.{ending})`", paragraph)[-1:] or [None]
            lines = token.content.splitlines()
            block = Block(token.map[0] + 1 + fenced, language, lines, file[0], reason)
            if adjacent and language in _OUTPUT and found[-1].language in ("sh", "python"):
                found[-1].output = block
            else:
                found.append(block)
            paragraph, reason, adjacent = "", None, True
    return found


def prose(text: str) -> list[tuple[int, str]]:
    """(number, text) of the lines outside of code blocks."""
    code = [t.map for t in MarkdownIt().parse(text) if t.type in ("fence", "code_block")]
    inside = {number + 1 for first, end in code for number in range(first, end)}
    lines = enumerate(text.splitlines(), 1)
    return [(number, line) for number, line in lines if number not in inside]


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line, command) of a shell block, continued lines joined."""
    for found in re.finditer(r"(.*\\\n)*.*\n", block.text):
        command = found[0].replace("\\\n", " ").strip()
        if command and not command.startswith("#"):
            yield block.line + block.text.count("\n", 0, found.start()), command


def missing_line(shown: Sequence[str], output: str) -> str | None:
    """The first line shown that the output doesn't have after those before; None if all are there."""
    there = iter([" ".join(line.split()) for line in re.split(r"[\r\n]+", output)])
    for line in shown:
        line = " ".join(line.split())
        if line in ("", "…"):
            continue
        pattern = re.compile(".*".join(map(re.escape, line.split("…"))))
        if not any(pattern.fullmatch(candidate) for candidate in there):
            return line
    return None


def lacks(shown: Any, there: Any) -> bool:
    """Whether JSON that is shown has something that the other lacks."""
    if shown == "…":
        return False
    if isinstance(shown, dict) and isinstance(there, dict):
        return any(key not in there or lacks(value, there[key]) for key, value in shown.items())
    if isinstance(shown, list) and isinstance(there, list):
        known = [item for item in shown if item != "…"]
        pairs = zip(known, there, strict=False)
        return len(known) > len(there) or any(lacks(*pair) for pair in pairs)
    return bool(shown != there)


def not_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, command)), None)


def unknown_in(command: str) -> str | None:
    """The first make target, file or option in a command that doesn't exist."""
    with suppress(ValueError):
        words = shlex.split(command, comments=True)
        program, *targets = [word for word in words if "=" not in word] or [""]
        patterns = re.findall(r"^([\w%-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.M)
        for target in targets if program == "make" else []:
            if not any(re.fullmatch(p.replace("%", ".+"), target) for p in patterns):
                return f"the Makefile has no target {target}"
        for at, word in enumerate(words):
            name = word.replace("_", "-")  # of a program, or of the module that is run as one
            if name in PROGRAMS:
                return unknown_option(name, words[at + 1 :])
            if word.endswith(".py") and not word.startswith("-") and not (ROOT / word).exists():
                return f"there is no {word}"
    return None


def unknown_option(program: str, words: Sequence[str]) -> str | None:
    """The command or option that one of our programs doesn't know."""
    known: click.Command = PROGRAMS[program]
    for word in words:
        if isinstance(known, click.Group) and re.fullmatch(r"[a-z]+", word):
            if word not in known.commands:
                return f"{program} has no command {word}"
            known = known.commands[word]
        elif re.match(r"--?[a-z]", word):
            option = word.partition("=")[0]
            options = {o for p in known.params for o in (*p.opts, *p.secondary_opts)}
            if option not in options | {"--help", "-h"}:
                return f"{program} … {known.name} has no option {option}"
    return None


def prose_problems(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Links lead somewhere, and what is named in passing exists."""
    for number, line in prose(text):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if problem := _link_problem(path, target):
                yield number, problem
        for program, rest in re.findall(r"`(fusechat-merge|fusechat-distill) ([^`]+)`", line):
            if problem := unknown_option(program, rest.split()):
                yield number, problem


def _link_problem(path: Path, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    file, _, anchor = target.partition("#")
    page = path.parent / file if file else path
    if not page.exists():
        return f"there is no {target}"
    if anchor and anchor not in anchors(page.read_text(encoding="utf-8")):
        return f"{file or 'this page'} has no heading for #{anchor}"
    return None


def anchors(text: str) -> set[str]:
    """The headings' names in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", "\n".join(line for _, line in prose(text)), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


_NAMES: dict[str, Any] = {"__name__": "__main__"}
"""What a page's Python blocks have defined, in the process that runs them."""


def _enter(folder: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, "")


def run_python(code: str, page: str) -> tuple[int, str]:
    """Run a block: its exit status and its output."""
    with tempfile.TemporaryFile() as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        status = 0
        try:
            exec(compile(code, page, "exec"), _NAMES)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        output.seek(0)
        return status, output.read().decode("utf-8", "replace")


class PageRun:
    """Runs one page's blocks in a folder of its own, and notes what it finds."""

    def __init__(self, path: Path, folder: Path, environment: dict[str, str]) -> None:
        self._path, self._folder, self._environment = path, folder, environment
        # A process that runs the Python blocks, one after the other.
        enter = _enter, (folder, environment)
        self._python = ProcessPoolExecutor(1, get_context("spawn"), *enter)
        self.page = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)
        self.problems: list[str] = []
        self.not_run: list[str] = []
        self.count = 0

    def run(self) -> PageRun:
        text = self._path.read_text(encoding="utf-8")
        for line, problem in prose_problems(self._path, text):
            self._add(line, problem)
        try:
            for block in blocks(text):
                self._block(block)
        finally:
            self._python.shutdown()
        return self

    def _add(self, line: int, problem: str) -> None:
        self.problems.append(f"{self.page}:{line}: {problem}")

    def _block(self, block: Block) -> None:
        if block.language not in _LANGUAGES | {"hidden"}:
            self._add(
                block.line, f"a block in {block.language or 'no language'!r} can't be checked"
            )
            return
        if block.reason is not None:
            self.not_run.append(f"{self.page}:{block.line}: {block.reason}")
            return
        output = ""
        if block.language in _WRITTEN:
            if problem := unparsable(block):
                self._add(block.line, problem)
            if block.file:
                path = self._folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                self.count += 1
                code = "\n" * (block.line - 1) + block.text
                try:
                    running = self._python.submit(run_python, code, self.page)
                    status, output = running.result(_LIMIT)
                except (BrokenExecutor, TimeoutError) as error:
                    status, output = 1, repr(error)
                if status:
                    self._add(block.line, f"Python fails\n{_tail(output)}")
        elif block.language in ("sh", "hidden"):
            output = self._shell(block)
        if block.output is not None and (problem := differs(block.output, output)):
            self._add(block.output.line, f"{problem}; the output was\n{_tail(output)}")

    def _shell(self, block: Block) -> str:
        outputs, before = [], ""
        for line, command in commands(block):
            reason = not_run(command)
            if reason is not None:
                self.not_run.append(f"{self.page}:{line}: {command} ({reason})")
                if problem := unknown_in(command):
                    self._add(line, problem)
                continue
            self.count += 1
            if re.match(r"(cd|export) ", command):
                before += command + "\n"
            status, output = self._run(before + command)
            expected = re.search(r"#.*exit status (\d+)", command)
            if status != (int(expected[1]) if expected else 0):
                self._add(line, f"{command}\n  exit status {status}\n{_tail(output)}")
            outputs.append(output)
        return "".join(outputs)

    def _run(self, command: str) -> tuple[int, str]:
        try:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self._folder, env=self._environment, timeout=_LIMIT,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return -1, f"not done after {_LIMIT} s"
        return done.returncode, done.stdout.decode("utf-8", "replace")


def unparsable(block: Block) -> str | None:
    """Why a block is not what its language says, if so."""
    parsers: dict[str, Callable[[str], object]] = {
        "yaml": lambda text: list(yaml.safe_load_all(text)),
        "json": json.loads,
        "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
        "toml": tomllib.loads,
        "python": lambda text: compile(text, "block", "exec"),
    }
    try:
        parsers[block.language](block.text)
    except Exception as error:
        return f"is no {block.language}: {' '.join(str(error).split())}"
    return None


def differs(shown: Block, output: str) -> str | None:
    """How an output isn't what the page shows, if so."""
    if shown.language == "json":
        with suppress(ValueError):
            # What comes before the first brace are notes on stderr.
            start = min(i for i in (output.find("{"), output.find("[")) if i >= 0)
            there, _ = json.JSONDecoder().raw_decode(output[start:])
            missing = lacks(json.loads(shown.text), there)
            return "the JSON shown has what the output lacks" if missing else None
        return "JSON is shown, the output is none"
    line = missing_line(shown.lines, output)
    return None if line is None else f"the output has no line {line!r} there"


def _tail(output: str) -> str:
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    return "".join(f"  | {line}\n" for line in lines[-12:]).rstrip("\n")


class EmptyHub(BaseHTTPRequestHandler):
    """A hub without any repository: a page finds only what is in its folder."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        return


def look_like_a_clone(folder: Path, models: Path) -> None:
    """Links to what a clone has, and to the models and data that the pages name."""
    folder.mkdir(parents=True)
    for name in ("README.md", "Makefile", "constraints.txt", "examples", "benchmarks", "docs"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)


def environment(scratch: Path, endpoint: str) -> dict[str, str]:
    (scratch / "home").mkdir()
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(scratch / "home"), "COLUMNS": "120"}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(scratch / "hf")}
    return kept | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}


def every_page() -> list[Path]:
    return [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]


def check(pages: Sequence[Path], scratch: Path) -> list[PageRun]:
    """Check the pages, two at a time."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = environment(scratch, f"http://127.0.0.1:{hub.server_port}")
    making = [sys.executable, "-m", "qa.docs_hub", scratch / "models"]
    subprocess.run(making, env=env, check=True, stderr=subprocess.DEVNULL)

    def run(path: Path) -> PageRun:
        begun = time.monotonic()
        folder = scratch / str(path.relative_to(ROOT)).replace("/", "-").removesuffix(".md")
        look_like_a_clone(folder, scratch / "models")
        found = PageRun(path, folder, env).run()
        print(f"{found.page}: {found.count} run, {time.monotonic() - begun:.0f} s", flush=True)
        return found

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, pages))
    finally:
        hub.shutdown()


def main(names: Sequence[str]) -> int:
    pages = [ROOT / name for name in names] or every_page()
    with tempfile.TemporaryDirectory() as scratch:
        found = check(pages, Path(scratch))
    problems = [problem for page in found for problem in page.problems]
    for script in [] if names else sorted(ROOT.glob(GENERATED)):
        checking = [sys.executable, script, "--check"]
        done = subprocess.run(checking, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{script.name} --check\n{_tail(done.stdout + done.stderr)}")
    print("\nnot run:", *(line for page in found for line in page.not_run), sep="\n  ")
    times = os.times()
    cost = f"{times.children_user + times.children_system:.0f} s of processor time"
    print("\n".join(["", *problems, f"{len(problems)} problems in {len(found)} pages, {cost}"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

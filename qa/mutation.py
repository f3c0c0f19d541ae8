"""Mutation run: changes the arithmetic one place at a time; for each change a test should fail.

    python -m qa.mutation [PATTERN ...] [--jobs N] [--write]

PATTERN is part of `module.py:function`. The changes are mutmut's. Its own runner passes over
whatever is decorated, here the compiled loops and every property; this one imports the tests once
and forks a process for each mutant, in which the mutant's functions take the original's place. A
test is run where it reaches the changed function, the quickest first. Survivors are printed. The
exit status is 1 if a module has more of them than the table of docs/mutation.md says; otherwise a
run of everything brings the table up to date. With --write it does so in any case.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutation.md"
METHODS = "merge/methods/test"
TESTS = {
    "fusechat_merge/methods/varm.py": [f"{METHODS}_{x}.py" for x in ("varm", "both", "compiled")],
    "fusechat_merge/methods/sce.py": [f"{METHODS}_{x}.py" for x in ("sce", "both")],
    "fusechat_merge/methods/blocks.py": [f"{METHODS}_{x}.py" for x in ("varm", "sce", "both")],
    "fusechat_merge/methods/compiled.py": [f"{METHODS}_compiled.py"],
    "fusechat_distill/alignment/positions.py": ["distill/alignment/test_positions.py"],
    "fusechat_distill/alignment/vocabularies.py": ["distill/alignment/test_positions.py"],
    "fusechat_distill/fusion/fuse.py": ["distill/fusion/test_fuse.py"],
    "fusechat_distill/trainer/loss.py": ["distill/trainer/test_loss.py"],
}
MEMORY = 12 << 30
CASES = 32
"""Of a parametrised test so many cases are run, at most."""

FORK = get_context("fork")

Measured = tuple[dict[int, set[str]], dict[str, float]]
"""The tests that reach each line, and the processor seconds of each test."""


@dataclass(frozen=True)
class Mutant:
    """A module's source with one change, in a function that takes these lines ("": in none)."""

    path: str
    function: str
    lines: range
    source: str
    change: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def name(self) -> str:
        return f"{Path(self.path).name}:{self.function}"


def mutants(path: str, patterns: Sequence[str]) -> Iterator[Mutant]:
    """Every mutant of a module: mutmut's of all functions, and of the numbers beside them."""
    import libcst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation import mutators
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.pragma_handling import IgnoredCode

    def without_one_keyword(node: libcst.Call) -> Iterator[libcst.Call]:
        for i, argument in enumerate(node.args):
            if argument.keyword and argument.keyword.value != "strict":
                yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])

    def another_string(node: libcst.BaseString) -> Iterator[libcst.CSTNode]:
        yield from islice(mutators.operator_string(node), 1)  # the rest change the case

    # What puts None somewhere or leaves out an argument that must be there is a TypeError.
    others = {mutators.operator_string, mutators.operator_arg_removal, mutators.operator_assignment}
    operators = [
        *((kind, change) for kind, change in mutators.mutation_operators if change not in others),
        (libcst.BaseString, another_string),
        (libcst.Call, without_one_keyword),
    ]

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
            if isinstance(node, libcst.FunctionDef):
                return False  # mutmut: True if it is decorated
            # `strict` of zip says what holds anyway.
            if isinstance(node, libcst.Arg) and node.keyword and node.keyword.value == "strict":
                return True
            return isinstance(node, libcst.Decorator) or super()._skip_node_and_children(node)

    source = (ROOT / path).read_text()
    bodies = list(_functions(ast.parse(source)))
    wrapper = MetadataWrapper(libcst.parse_module(source))
    visitor = Visitor(operators, IgnoredCode(set(), set(), set()))
    tree = wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    for mutation in visitor.mutations:
        line = positions[mutation.original_node].start.line
        inside = [(name, lines) for name, lines in bodies if line in lines]
        number = isinstance(mutation.original_node, libcst.BaseNumber | libcst.BinaryOperation)
        if not inside and not number:
            continue  # types, and the names of what is public
        name, lines = inside[-1] if inside else ("", range(0))
        if not any(p in f"{Path(path).name}:{name}" for p in patterns):
            continue
        mutated = tree.deep_replace(mutation.original_node, mutation.mutated_node).code
        yield Mutant(path, name, lines, mutated, _change(source, mutated))


def _change(old: str, new: str) -> str:
    """The lines in which two texts differ, white space aside."""
    both = [text.split("\n") for text in (old, new)]
    for _ in range(2):
        while all(both) and both[0][-1] == both[1][-1]:
            both[0].pop(), both[1].pop()
        both = [lines[::-1] for lines in both]
    return " → ".join(f"`{' '.join(map(str.strip, lines))}`" for lines in both)


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, range]]:
    """Qualified names of functions and the lines they take, the outer before the inner ones."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            if isinstance(child, ast.FunctionDef):
                yield inner[:-1], range(child.lineno, child.end_lineno + 1)
        yield from _functions(child, inner)


def install(mutant: Mutant, scratch: Path) -> None:
    """Let the mutant's functions, defaults and numbers take the place of the original's.

    In place, for other modules hold the functions and constants that they imported.
    """
    file = scratch / Path(mutant.path).name  # its own, so that numba takes nothing from a cache
    file.write_text(mutant.source)
    old = _function_objects(mutant.module)
    fresh = {"__name__": mutant.module, "__file__": str(file)}
    exec(compile(mutant.source, str(file), "exec"), fresh)
    new = _function_objects(mutant.module, but=set(map(id, old.values())))
    for name in old.keys() & new.keys():
        ours, theirs = old[name], new[name]
        for cell, changed in zip(ours.__closure__ or (), theirs.__closure__ or (), strict=True):
            cell.cell_contents = changed.cell_contents
        ours.__code__ = theirs.__code__
        ours.__defaults__, ours.__kwdefaults__ = theirs.__defaults__, theirs.__kwdefaults__
    original = vars(sys.modules[mutant.module])
    for name, value in fresh.items():
        if isinstance(value, int) and value != original[name]:
            for module in list(sys.modules.values()):
                if vars(module).get(name) is original[name] and module.__name__ != mutant.module:
                    setattr(module, name, value)
            original[name] = value


def _function_objects(
    module: str, but: Collection[int] = ()
) -> dict[tuple[str, int], FunctionType]:
    """A module's functions by qualified name, and by number where several share it."""
    found = {}
    seen: Counter[str] = Counter()
    every = [f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__module__ == module]
    for function in sorted(every, key=lambda f: f.__code__.co_firstlineno):
        if id(function) not in but:
            found[function.__qualname__, seen[function.__qualname__]] = function
            seen[function.__qualname__] += 1
    return found


class Runner:
    """Takes over from pytest once it has collected the tests of one package."""

    def __init__(self, wanted: list[Mutant], jobs: int) -> None:
        self.wanted, self.jobs = wanted, jobs
        self.survivors: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session = session
        for path in dict.fromkeys(mutant.path for mutant in self.wanted):
            files = {ROOT / "tests" / file for file in TESTS[path]}
            items = [item for item in session.items if item.path in files]
            # Torch's threads would not outlive a fork; the tokenizers' caches are worth keeping.
            here = path.startswith("fusechat_distill")
            measured = (self.measure if here else self.measure_apart)(path, items)
            self.run([m for m in self.wanted if m.path == path], items, measured)
        return True

    def measure(self, path: str, items: list[pytest.Item]) -> Measured:
        from coverage import Coverage

        # Without pyproject.toml's settings, which would have every fork measured.
        coverage = Coverage(None, config_file=False, include=[str(ROOT / path)])
        coverage.start()
        seconds = {}
        for item in items:
            coverage.switch_context(item.nodeid)
            before = time.process_time()
            self.one(item, None)
            seconds[item.nodeid] = time.process_time() - before
            if self.session.testsfailed:
                sys.exit(f"{item.nodeid} fails without a mutant")
        coverage.stop()
        lines = coverage.get_data().contexts_by_lineno(str(ROOT / path))
        return {line: set(contexts) for line, contexts in lines.items()}, seconds

    def measure_apart(self, path: str, items: list[pytest.Item]) -> Measured:
        """The same in a process of its own."""
        answer, telling = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda: telling.send(self.measure(path, items)))
        process.start()
        telling.close()
        measured = answer.recv()
        process.join()
        return measured

    def one(self, item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def run(self, wanted: list[Mutant], items: list[pytest.Item], measured: Measured) -> None:
        """Try the mutants of one module."""
        reached, seconds = measured
        running: dict[int, tuple[Mutant, Path]] = {}
        survived = len(self.survivors)
        anything = set().union(*reached.values())
        waiting = wanted[::-1]
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                tests = set().union(*(reached.get(line, set()) for line in mutant.lines[1:]))
                chosen = _some_of_each([i for i in items if i.nodeid in (tests or anything)])
                chosen.sort(key=lambda item: seconds[item.nodeid])
                scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
                pid = os.fork()
                if not pid:
                    self.attempt(mutant, chosen, seconds, scratch)
                running[pid] = mutant, scratch
            pid, status = os.waitpid(-1, 0)
            mutant, scratch = running.pop(pid)
            shutil.rmtree(scratch)
            if not status:
                self.survivors.append(mutant)
                print(f"\n{mutant.name}: {mutant.change}", flush=True)
        killed = len(wanted) - len(self.survivors) + survived
        print(f"\n{wanted[0].path}: {len(wanted)} mutants, {killed} killed", flush=True)

    def attempt(
        self, mutant: Mutant, chosen: list[pytest.Item], seconds: dict[str, float], scratch: Path
    ) -> None:
        """In a process of its own: exits 0 if every test passes."""
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(scratch)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            install(mutant, scratch)
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                # Processor time: an endless loop ends by SIGPROF, a busy machine does no harm.
                signal.setitimer(signal.ITIMER_PROF, 5 + 10 * seconds[item.nodeid])
                self.one(item, following)
                if self.session.testsfailed:
                    os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(0)


def _some_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of every parametrised test at most ``CASES``."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    chance = random.Random(0)
    return [x for group in cases.values() for x in chance.sample(group, min(len(group), CASES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="*", help="part of module.py:function; default: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the table, whatever survived")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wanted = {path: list(mutants(path, arguments.pattern or [""])) for path in TESTS}
    runners = []
    for package in ("fusechat_merge", "fusechat_distill"):
        ours = [m for path in TESTS if path.startswith(package) for m in wanted[path]]
        runner = Runner(ours, arguments.jobs)
        if ours:
            files = dict.fromkeys(file for m in ours for file in TESTS[m.path])
            options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
            pytest.main([*options, *(f"tests/{file}" for file in files)], plugins=[runner])
        runners.append(runner)
    survived = Counter(mutant.path for runner in runners for mutant in runner.survivors)
    counts = {path: (len(wanted[path]), survived[path]) for path in TESTS if wanted[path]}
    page = PAGE.read_text(encoding="utf-8")
    worse = more_survive(page, counts)
    if arguments.write or not (worse or arguments.pattern):
        PAGE.write_text(with_table(page, counts), encoding="utf-8")
    sys.exit("\n".join(worse) or None)


_ROW = re.compile(r"^\| `([\w/.]+)` \| (\d+) \| (\d+) \| (\d+) \|\n", re.MULTILINE)


def more_survive(page: str, counts: dict[str, tuple[int, int]]) -> list[str]:
    """A line for each module of which more mutants survive than the page's table says.

    Args:
        counts: {module's path: (mutants, survivors)}.
    """
    known = Counter({path: int(survived) for path, _, _, survived in _ROW.findall(page)})
    more = {path: survived for path, (_, survived) in counts.items() if survived > known[path]}
    where = PAGE.relative_to(ROOT)
    return [f"{path}: {n} survive, {known[path]} in {where}" for path, n in more.items()]


def with_table(page: str, counts: dict[str, tuple[int, int]]) -> str:
    """The page with these counts, {module's path: (mutants, survivors)}, in its table."""
    rows = {path: (int(all_), int(left)) for path, all_, _, left in _ROW.findall(page)} | counts
    rows = {path: rows[path] for path in TESTS if path in rows}
    total = tuple(map(sum, zip(*rows.values(), strict=True)))
    lines = [f"| `{path}` | {n} | {n - left} | {left} |\n" for path, (n, left) in rows.items()]
    lines.append(f"| together | {total[0]} | {total[0] - total[1]} | {total[1]} |\n")
    head, _, rest = page.partition("|---|---|---|---|\n")
    rest = re.sub(r"\A(\|.*\n)*", "", rest)
    return f"{head}|---|---|---|---|\n{''.join(lines)}{rest}"


if __name__ == "__main__":
    main()

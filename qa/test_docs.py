"""The docs' checker finds what is wrong in a page; what is cheap of the pages is checked here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration

from fusechat_distill.recipe.schema import load_recipe
from fusechat_merge.mergekit_bridge.parameters import parameter_problems
from qa import docs_check

ROOT = Path(__file__).parents[1]

PAGE = """\
# A page

Write `one.yml`:

```yaml
a: 1
```

    cat one.yml       # a comment
    echo no; exit 3   # exit status 3

```text
a: …
no
```

Then, beside `one.yml`:

```python
x = 1
```

More.

```python
print(x + 1)
```

```text
2
```
"""


def checked(text: str, folder: Path) -> docs_check.PageRun:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    (folder / "home").mkdir()
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return docs_check.PageRun(path, folder / "home", environment).run()


def test_blocks() -> None:
    config, shell, first, second = docs_check.blocks(PAGE)
    assert (config.language, config.file, config.line) == ("yaml", "one.yml", 6)
    assert (shell.language, len(shell.lines), shell.line) == ("sh", 2, 9)
    assert [shell.output and shell.output.lines, first.output] == [["a: …", "no"], None]
    assert first.file is None  # a file of another language
    assert second.output is not None
    assert PAGE.splitlines()[second.line - 1] == "print(x + 1)"


def test_a_page_that_is_right(tmp_path: Path) -> None:
    found = checked(PAGE, tmp_path)
    assert found.problems == []
    assert found.count == 4
    assert (tmp_path / "home" / "one.yml").read_text() == "a: 1\n"


@pytest.mark.parametrize(
    ("was", "made", "line", "problem"),
    [
        ("a comment", "exit status 1", 9, "exit status 0"),
        ("exit 3  ", "exit 4  ", 10, "exit status 4"),
        ("a: 1\n", "a: [1\n", 6, "is no yaml"),
        ("a: …", "b: …", 13, "no line 'b: …'"),
        ("a: …\nno", "no\na: …", 13, "no line 'a: …'"),
        ("x + 1", "y + 1", 26, "NameError"),
        ("\n2\n", "\n3\n", 30, "no line '3'"),
        ("```yaml", "```yml", 6, "'yml' can't be checked"),
        ("More.", "[More](none.md).", 23, "there is no none.md"),
        ("More.", "[More](#a-pag).", 23, "no heading for #a-pag"),
        ("More.", "`fusechat-merge rnu x`", 23, "no command rnu"),
        ("More.", "`fusechat-distill run --resum`", 23, "no option --resum"),
    ],
)
def test_a_page_that_is_wrong(tmp_path: Path, was: str, made: str, line: int, problem: str) -> None:
    assert PAGE.count(was) == 1
    found = checked(PAGE.replace(was, made), tmp_path).problems
    assert any(f"page.md:{line}: " in text and problem in text for text in found), found


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make no-such-target", "no target no-such-target"),
        ("make bench-merge PYTHON=python3", None),
        ("accelerate launch -m fusechat_distill run r.yml --trust-remote-cod", "no option"),
        ("accelerate launch --num_processes 2 -m fusechat_distill run recipe.yml", None),
        ("python examples/reproduction/lader.py --scale cpu", "no examples/reproduction/lader.py"),
    ],
)
def test_what_is_not_run_is_looked_at(command: str, problem: str | None) -> None:
    found = docs_check.unknown_in(command)
    assert found is None if problem is None else problem in str(found)


def test_json_that_is_shown() -> None:
    there = {"a": [{"b": 1, "c": 2}], "d": 3}
    assert not docs_check.lacks({"a": [{"b": 1}], "d": "…"}, there)
    assert docs_check.lacks({"a": [{"b": 2}]}, there)
    assert docs_check.lacks({"e": "…"}, there)
    assert docs_check.lacks({"a": ["…", {"b": 1}, {"b": 1}]}, there)


@pytest.mark.parametrize(
    "page", docs_check.every_page(), ids=lambda page: str(page.relative_to(ROOT))
)
def test_pages_cheaply(page: Path, tmp_path: Path) -> None:
    """All of a page but running it: links, languages, what blocks parse as, options."""
    text = page.read_text(encoding="utf-8")
    assert list(docs_check.prose_problems(page, text)) == []
    for block in docs_check.blocks(text):
        assert block.language in docs_check._LANGUAGES | {"hidden"}, (page, block.line)
        if block.language in docs_check._WRITTEN:
            assert docs_check.unparsable(block) is None
        if block.language == "yaml":
            _check_configurations(block, tmp_path)
        if block.language == "sh":
            for line, command in docs_check.commands(block):
                problem = docs_check.unknown_in(command)
                assert problem is None, f"{page}:{line}: {problem}"


def _check_configurations(block: docs_check.Block, folder: Path) -> None:
    for made in yaml.safe_load_all(block.text):
        if isinstance(made, dict) and "merge_method" in made and block.file != "wrong.yml":
            config = {key: value for key, value in made.items() if key != "name"}
            assert parameter_problems(MergeConfiguration.model_validate(config)) == []
        if isinstance(made, dict) and {"pivot", "output"} <= made.keys():
            (folder / "recipe.yml").write_text(block.text, encoding="utf-8")
            load_recipe(folder / "recipe.yml")


@pytest.mark.parametrize(("program", "group"), docs_check.PROGRAMS.items())
def test_help(program: str, group: click.Group) -> None:
    """Nothing is cut short, everything has an example, --debug counts in both places."""
    shown = CliRunner().invoke(group, ["--help"]).output
    assert "..." not in shown.replace("[ARGS]...", "")
    for name, command in group.commands.items():
        assert f"Example: {program} {name}" in CliRunner().invoke(group, [name, "--help"]).output
        assert any("--debug" in parameter.opts for parameter in command.params)
    assert f"Example: {program}" in shown
    assert "--debug" in shown
    assert CliRunner().invoke(group, ["--version"]).output.startswith(f"{program}, version ")


def _figure(package: str) -> dict[str, dict[str, int]]:
    """design.md's figure: folders from top to bottom, and the level of each of their modules."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    figure = re.search(rf"^```text\n{package}\n(.*?)^```", design, re.DOTALL | re.MULTILINE)
    assert figure is not None
    folders: dict[str, dict[str, int]] = {}
    for line in figure[1].splitlines():
        name, _, modules = re.match(r"  (\w+)(?:  +([^:]*)(?:: )?(.*))?$", line).groups()  # type: ignore[union-attr]
        levels = (modules or "").split("→")
        folders[name] = {m: level for level, names in enumerate(levels) for m in names.split()}
    return folders


def _imports(path: Path, package: str) -> Iterator[list[str]]:
    """What a module imports of its package, at its top, in a function or for annotations."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            _, *parts = str(node.module).split(".")
            for name in (alias.name for alias in node.names):
                whole = (ROOT / package).joinpath(*parts, name)
                yield [*parts, name] if whole.with_suffix(".py").exists() else parts


@pytest.mark.parametrize("package", ["fusechat_common", "fusechat_merge", "fusechat_distill"])
def test_imports_go_down_the_figure(package: str) -> None:
    figure = _figure(package)
    height = {name: -line for line, name in enumerate(figure)}
    modules: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        *folder, name = path.relative_to(ROOT / package).with_suffix("").parts
        if name == "__init__":
            assert not folder or not list(_imports(path, package))
            continue
        place = folder[0] if folder else name
        modules.setdefault(place, set()).update([name] if folder else [])
        for other in filter(None, _imports(path, package)):
            if other[0] != place:
                assert height[other[0]] < height[place], f"{path.name} imports {other}"
            else:
                levels = figure[place]
                assert levels[other[1]] > levels[name], f"{path.name} imports {other}"
    assert {name: set(levels) for name, levels in figure.items()} == modules

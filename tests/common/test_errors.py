"""One hierarchy of errors, and how each ends a command."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fusechat_common.cli import Commands
from fusechat_common.errors import FusechatError, RequestError, nearest, one_line


@pytest.mark.parametrize(
    ("problems", "where", "message"),
    [
        (["a\nb"], None, "a b"),
        (["a"], "file", "file: a"),
        (["a", "b\rc"], None, "2 problems:\n  a\n  b c"),
        (["a", "b"], "file", "file has 2 problems:\n  a\n  b"),
    ],
)
def test_every_problem_is_one_line(problems: list[str], where: str | None, message: str) -> None:
    error = RequestError(problems, where)
    assert str(error) == message
    assert isinstance(error, ValueError)
    assert error.where == where


def test_one_line_of_an_exception() -> None:
    assert one_line(OSError(" a\n  b ")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 400))) == 300


def test_the_nearest_name() -> None:
    assert nearest("Evrybody", ["everybody"]) == " (did you mean 'everybody'?)"
    assert nearest("tabel", ["label", "table"]) == " (did you mean 'table'?)"
    assert nearest("x", ["table"]) == ""


@click.group(cls=Commands)
def program() -> None:
    pass


@program.command()
@click.argument("kind")
def fail(kind: str) -> None:
    errors = {
        "broken": FusechatError("it broke"),
        "request": RequestError(["a", "b"], "file"),
        "interrupt": KeyboardInterrupt(),
        "other": LookupError("where\nis it"),
        "usage": click.UsageError("no such thing"),
        "exit": click.exceptions.Exit(3),
        "system": SystemExit(4),
        "abort": click.Abort(),
    }
    raise errors[kind]


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("broken", 1, "Error: it broke"),
        ("request", 2, "Error: file has 2 problems:\n  a\n  b"),
        ("interrupt", 1,
         "Error: interrupted; completed work is kept, and the same command resumes"),
        ("other", 1, "Error: LookupError: where is it (--debug shows where)"),
        ("usage", 2, "Error: no such thing"),
        ("exit", 3, ""),
        ("system", 4, ""),
        ("abort", 1, "Aborted!"),
    ],
)  # fmt: skip
def test_how_a_command_ends(kind: str, code: int, message: str) -> None:
    plain = CliRunner().invoke(program, ["fail", kind])
    assert plain.exit_code == code
    assert plain.stderr.rpartition("help.\n\n")[2].strip() == message
    for words in (["--debug", "fail", kind], ["fail", kind, "--debug"]):
        debugged = CliRunner().invoke(program, words)
        assert debugged.exit_code == code
        assert debugged.stderr.endswith(plain.stderr)
        assert ("Traceback" in debugged.stderr) == message.startswith("Error")

"""A command that fails ends in one `Error: ...` line; `--debug` shows the traceback before it."""

from __future__ import annotations

import traceback
from typing import Any

import click

from fusechat_common.errors import FusechatError, one_line

_DEBUG = "fusechat.debug"


def _remember_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_DEBUG] = True  # one mapping for the group and its commands


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)


class Commands(click.Group):
    """A group that takes `--debug`, and whose commands take it too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"]}
        super().__init__(*args, context_settings=settings, **kwargs)
        debug_option(self)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(debug_option(cmd), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, SystemExit):
            raise
        except BaseException as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            raise _told(error) from error


def _told(error: BaseException) -> click.ClickException:
    """The error that is shown for any other."""
    if isinstance(error, click.ClickException):
        return error
    if isinstance(error, KeyboardInterrupt):
        again = "what was done is kept, the same command goes on from there"
        return FusechatError(f"interrupted; {again}")
    return FusechatError(f"{type(error).__name__}: {one_line(error)} (--debug shows where)")

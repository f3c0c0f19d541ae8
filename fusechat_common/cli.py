"""A command that fails ends in one `Error: ...` line; `--debug` shows the traceback before it."""

from __future__ import annotations

import traceback
from typing import Any

import click

from fusechat_common.errors import KEPT, FusechatError, one_line

_DEBUG = "fusechat.debug"


def _remember_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_DEBUG] = True  # the group and its commands share this mapping


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)


class Commands(click.Group):
    """A group that has the option `--debug`, as have its commands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True}
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
            if isinstance(error, click.ClickException):
                raise
            if isinstance(error, KeyboardInterrupt):
                raise FusechatError(f"interrupted; {KEPT}") from error
            message = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
            raise FusechatError(message) from error

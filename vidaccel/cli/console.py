"""The one way to the terminal: texts are shown as they are.

Rich reads square brackets as markup and :words: as emoji, wherever a text comes from; plans, models, prompts, paths and
help texts have both. So no command makes a console or a command class of its own (a test asks their sources).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PlainCommand", "console", "show"]


def console(*, stderr: bool = False) -> Console:
    """A console that takes every text literally, in tables as well."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


def show(*parts: Any) -> None:
    """Prints tables and texts to stdout."""
    console().print(*parts)


#: Options count frames, steps, seconds and the like; those of a wider range, such as seeds, say so themselves.
_MOST = 1_000_000


class PlainCommand(TyperCommand):
    """A command whose help shows "[default: ...]", and whose numbers are numbers."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Help as it is written; rich is told so once it is needed."""
        from rich.markup import escape

        parts: list[Any] = [self, *self.params]
        before = [part.help for part in parts]
        for part, text in zip(parts, before, strict=True):
            part.help = None if text is None else escape(text)
        try:
            super().format_help(ctx, formatter)
        finally:
            for part, text in zip(parts, before, strict=True):
                part.help = text

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses what no option means: "nan", which Python reads as a number and a minimum lets through, and 1e30."""
        rest = super().parse_args(ctx, args)
        for param in self.params:
            _check_number(ctx, param, ctx.params.get(param.name))
        return rest


def _most(param: Any) -> float | None:
    """The greatest value that an option says it takes; typer keeps it in one place, click in another."""
    most = getattr(param, "max", None)
    return getattr(getattr(param, "type", None), "max", None) if most is None else most


def _check_number(ctx: Any, param: Any, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number; give one", ctx=ctx, param=param)
    if abs(value) > _MOST and _most(param) is None:
        raise typer.BadParameter(f"that is too large; give at most {_MOST:,}", ctx=ctx, param=param)

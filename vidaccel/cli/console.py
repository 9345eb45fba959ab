"""Where the commands print tables, and how their help is shown: every text as it is.

rich reads square brackets as markup, so that "[default: sta]" vanishes and a plan named "a [/bold] b" is an error.
Names of plans, models, prompts and files are the user's, and none of our texts uses markup.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "plain_help"]


def console(*, stderr: bool = False) -> Console:
    """A console that takes neither markup nor emoji codes out of texts, table cells and titles included."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


def plain_help(commands: Iterable[Any]) -> None:
    """Makes the help of these click commands say what was written: typer gives it to rich as markup."""
    from rich.markup import escape

    for command in commands:
        for owner in (command, *command.params):
            if getattr(owner, "help", None):
                owner.help = escape(owner.help)

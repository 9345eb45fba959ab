"""The command line: which commands there are, and how every one of them ends.

Exit codes: 0 done; 1 a bug (with its traceback); 2 something the user can mend, said in one sentence; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..device import cache_dir
from ..errors import VidaccelError, VidaccelWarning
from ..files import finished_files
from ..version import __version__
from .calibrate import calibrate
from .check import check
from .compare import compare
from .console import PlainCommand
from .demo import demo
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .interrupt import outcome
from .models import models
from .solve import solve

__all__ = ["app", "main"]


#: Key of a context's meta: what was typed behind the program's name.
_WORDS = "vidaccel.words"

# typer carries its own copy of click in newer versions, so the class is found by way of one that it exports
_USAGE_ERROR: Any = typer.BadParameter.__base__


class _OneSentence(TyperGroup):
    """Turns expected errors of any command into one sentence on stderr and an exit code."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any) -> Any:
        """Read the options before the command; what is wrong there ends as in :meth:`invoke`."""
        words = list(args)  # the parser takes them out one by one
        try:
            context = super().make_context(info_name, args, *more, **kwargs)
            context.meta[_WORDS] = words
            return context
        except _USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help
                raise
            _say_usage_error(error, words)
            raise typer.Exit(2) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command; expected errors end here."""
        try:
            with warnings.catch_warnings(), finished_files() as written:
                warnings.showwarning = _shown
                return super().invoke(ctx)
        except VidaccelError as error:
            typer.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except _USAGE_ERROR as error:
            _say_usage_error(error, ctx.meta[_WORDS])
            ctx.exit(2)
        except KeyboardInterrupt as error:
            typer.echo(outcome(error, _outputs(written)), err=True)
            ctx.exit(130)
        except RuntimeError as error:
            # torch's class for it exists only once torch is imported; nothing else in here imports torch
            if type(error).__name__ != "OutOfMemoryError":
                raise
            typer.echo(
                "error: the device has too little memory; try --cpu-offload, or fewer or smaller frames", err=True
            )
            ctx.exit(2)


def _say_usage_error(error: Any, words: Sequence[str]) -> None:
    where = getattr(error.ctx, "command_path", "vidaccel")
    told, found = error.format_message().rstrip("."), _found(error, words)
    told += f" (found {found!r})" if found is not None and found not in told else ""
    typer.echo(f"error: {told}; see {where} --help", err=True)


def _found(error: Any, words: Sequence[str]) -> str | None:
    """The value of the option that an error is about, as it was typed; newer versions of typer do not tell it."""
    names = getattr(getattr(error, "param", None), "opts", None) or ()
    found = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            found = value if equals else next(iter(words[place + 1 :]), None)
    return found


def _shown(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Our own warnings without the line of code they come from; those of others as usual."""
    if issubclass(category, VidaccelWarning):
        typer.echo(f"warning: {message}", err=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _outputs(written: Sequence[Path]) -> list[Path]:
    """Without what was measured of this machine, which is no command's output."""
    return [path for path in written if cache_dir() not in path.parents]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vidaccel {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="vidaccel",
    cls=_OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # --num_frames is --num-frames: diffusers users know the former, command lines the latter
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Makes diffusers video pipelines faster, and says how much faster and at what cost in quality."""


for command in (generate, compare, calibrate, solve, check, inspect, models, doctor, demo):
    app.command(cls=PlainCommand)(command)


def main() -> None:
    """The entry point of the ``vidaccel`` command."""
    app()


if __name__ == "__main__":
    main()

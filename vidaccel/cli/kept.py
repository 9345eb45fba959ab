"""What is on disk when a command is interrupted, and the command that goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from .command import command_line

__all__ = ["expect", "expecting", "say_interrupted"]

#: Says what there is to go on with, or "" if there is nothing.
Goes = Callable[[], str]


class _Expected:
    """Files that a command writes, as they were when it began, and what it goes on with."""

    def __init__(self) -> None:
        self.before: dict[Path, tuple[int, int] | None] = {}
        self.goes_on: list[Goes] = []

    def written(self) -> list[Path]:
        return [path for path, was in self.before.items() if (now := _state(path)) is not None and now != was]


_EXPECTED: ContextVar[_Expected | None] = ContextVar("expected", default=None)


@contextmanager
def expecting() -> Iterator[None]:
    """One command, from its begin to its end."""
    token = _EXPECTED.set(_Expected())
    try:
        yield
    finally:
        _EXPECTED.reset(token)


def expect(*paths: Path | None, goes_on: Goes | None = None) -> None:
    """The running command will write these files.

    Args:
        paths: files; ``None`` for one that was not asked for.
        goes_on: says, when the command is interrupted, what the same command goes on with.
    """
    expected = _EXPECTED.get()
    if expected is None:  # a command's function called from Python, where no one is told
        return
    expected.before |= {path: _state(path) for path in paths if path is not None}
    expected.goes_on += [] if goes_on is None else [goes_on]


def say_interrupted() -> str:
    """What an interrupted command left: files written whole, and what the same command goes on with."""
    expected = _EXPECTED.get() or _Expected()
    written = ", ".join(map(str, expected.written()))
    there = [text for goes_on in expected.goes_on if (text := goes_on())]
    told = f"interrupted; written: {written}" if written else "interrupted; no output was written"
    if not there:
        return told
    told = f"interrupted; written: {written}; kept: " if written else "interrupted; kept: "
    return f"{told}{', '.join(there)}\ngo on with: {command_line()}"


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns

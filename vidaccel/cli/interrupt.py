"""What an interrupt leaves behind, and how to go on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Interrupted", "outcome", "resumable"]


class Interrupted(KeyboardInterrupt):
    """An interrupt of a command that knows what is kept; its text says so."""


@contextmanager
def resumable(kept: Callable[[], str | None]) -> Iterator[None]:
    """Within it an interrupt says what is kept.

    Args:
        kept: asked once interrupted: what is kept and how to go on, or ``None`` if nothing is yet.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        told = kept()
        if told is None:
            raise
        raise Interrupted(told) from error


def outcome(error: KeyboardInterrupt, written: Sequence[Path]) -> str:
    """What an interrupted command left, in words.

    Args:
        written: the files that it had finished.
    """
    if isinstance(error, Interrupted):
        return f"interrupted; {error}"
    if not written:
        return "interrupted; no output was written"
    verb = "was" if len(written) == 1 else "were"
    return f"interrupted; {', '.join(map(str, written))} {verb} written before that, whole"

"""How a result came about: the exact command, and when."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone

__all__ = ["command_line", "now"]


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as one line that a shell takes again.

    Args:
        argv: its words, the program's path first; by default those of this process.
    """
    words = list(sys.argv if argv is None else argv)
    # the program's own path differs from machine to machine; its arguments are what counts
    return shlex.join(["vidaccel", *words[1:]])


def now() -> str:
    """Date and time in UTC, as "2026-01-31 12:00 UTC"."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

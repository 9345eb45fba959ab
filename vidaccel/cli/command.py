"""How a result came about: the exact command, and when."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone

__all__ = ["command_line", "now"]


#: Options whose values are prompts.
_PROMPTS = ("--prompt", "--negative-prompt")


def command_line(argv: Sequence[str] | None = None, *, prompts: bool = True) -> str:
    """The command as one line that a shell takes again.

    Args:
        argv: its words, the program's path first; by default those of this process.
        prompts: whether prompts stay in it. Else fingerprints stand for them, as in files that go from hand to hand.
    """
    words = list(sys.argv if argv is None else argv)
    words = words if prompts else _without_prompts(words)
    # the program's own path differs from machine to machine; its arguments are what counts
    return shlex.join(["vidaccel", *words[1:]])


def _without_prompts(words: Sequence[str]) -> list[str]:
    from ..calibration.fingerprints import text_fingerprint

    def hidden(option: str, value: str) -> str:
        if option in _PROMPTS:
            return text_fingerprint(value)
        name, equals, text = value.partition("=")  # of --arg
        return f"{name}={text_fingerprint(text)}" if equals and "prompt" in name.lower() else value

    found: list[str] = []
    waiting = ""  # an option whose value is the next word
    for word in words:
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        takes = option in (*_PROMPTS, "--arg")
        if waiting:
            found.append(hidden(waiting, word))
            waiting = ""
        elif takes and equals:
            found.append(f"{option}={hidden(option, value)}")
        else:
            found.append(word)
            waiting = option if takes else ""
    return found


def now() -> str:
    """Date and time in UTC, as "2026-01-31 12:00 UTC"."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

"""Prompts from options and files."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ConfigError

__all__ = ["read_prompts"]


def read_prompts(file: Path | None, given: list[str] | tuple[str, ...], limit: int | None) -> list[str]:
    """The prompts of the options, then those of the file; empty lines and lines that start with # do not count.

    Raises:
        ConfigError: the file cannot be read, or there is no prompt at all.
    """
    found = [text.strip() for text in given if text.strip()]
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise ConfigError(f"the prompts in {file} cannot be read: {reason}; give a text file") from error
        lines = (line.strip() for line in text.splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError("there are no prompts; give --prompts FILE with one a line, or --prompt TEXT")
    return found[:limit]

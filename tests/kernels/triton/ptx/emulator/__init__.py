"""Executes the PTX that Triton compiles, on a CPU, one CTA at a time, and finds faults of the compiled program.

A claim that rests on it is: this PTX was executed and is right under the rules of the PTX ISA as they are written here.
It says nothing about the assembler, timing, or races between CTAs. ``execute`` runs a program without Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .faults import Deadlock, Fault
from .text import PtxError

if TYPE_CHECKING:
    from .launch import Emulator, emulating

__all__ = ["Deadlock", "Emulator", "Fault", "PtxError", "emulating"]


def __getattr__(name: str) -> Any:
    """What needs Triton is imported when it is first used."""
    if name in ("Emulator", "emulating"):
        from . import launch

        return getattr(launch, name)
    raise AttributeError(name)

"""The instructions, a module for each group. Importing it fills the table of opcodes."""

from __future__ import annotations

from types import ModuleType

from . import (
    compare,
    control,
    convert,
    copies,
    floating,
    half,
    integer,
    matrix,
    mbarrier,
    memory,
    moves,
    registers,
    tensormaps,
    warp,
    wgmma,
)

__all__ = ["MODULES"]

#: What generated code calls, by the name it uses. Functions are looked up when they are called.
MODULES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(compare, control, convert, copies, floating, half, integer, matrix, mbarrier, memory),
        *(moves, registers, tensormaps, warp, wgmma),
    )
}

"""Where a compiled kernel's tile copies begin, read from Triton's own intermediate code (TTGIR).

Triton's automatic warp specialisation splits a tile's rows over two consumers by adding to the value of the row
coordinate. If the column coordinate is the same value, as both zeros of ``[0, 0]`` are, it moves as well, and the
second consumer reads or writes the wrong channels. The machine code shows no trace of it::

    ttng.async_tma_copy_global_to_local %q_tile_17[%c64_i32, %c64_i32] ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["TileCopy", "tile_copies"]

_CONSTANT = re.compile(r"(%\w+) = arith\.constant (?:\{[^}]*\} )?(-?\d+) : i\d+")
_COPY = re.compile(r"\bttng\.async_tma_copy_(global_to_local|local_to_global) %(\w+)\[([^\]]*)\]")


@dataclass(frozen=True)
class TileCopy:
    """One copy of a tile by the copy engine.

    Args:
        tile: name of the descriptor's variable in the kernel's source.
        store: whether it writes to global memory.
        at: where the tile begins, one coordinate a dimension: a constant, or the name of a value in the TTGIR.
    """

    tile: str
    store: bool
    at: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.tile} is {'stored' if self.store else 'loaded'} at [{', '.join(map(str, self.at))}]"


def tile_copies(ttgir: str) -> tuple[TileCopy, ...]:
    """Every copy in the text of a module, in program order."""
    constants: dict[str, int] = {}
    copies = []
    for line in ttgir.splitlines():
        # partitions are functions of their own and may use a name again: the last definition before a use is its own
        if constant := _CONSTANT.search(line):
            constants[constant[1]] = int(constant[2])
        if copy := _COPY.search(line):
            names = [name.strip() for name in copy[3].split(",")]
            at = tuple(constants.get(name, name) for name in names)
            copies.append(TileCopy(re.sub(r"_\d+$", "", copy[2]), copy[1] == "local_to_global", at))
    return tuple(copies)

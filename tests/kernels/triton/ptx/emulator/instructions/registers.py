"""The number of registers of a warp (PTX ISA 9.7.19.5 setmaxnreg)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..code import Code
from ..table import opcode
from ..text import Instruction

if TYPE_CHECKING:
    from ..cta import Cta, Warp

__all__ = ["give", "take"]


@opcode("setmaxnreg.<what:inc|dec>.sync.aligned.u32", "n", "9.7.19.5 setmaxnreg", waits=True)
def setmaxnreg(c: Code) -> None:
    n = c.number(c.operands[0])
    if n % 8 or not 24 <= n <= 256:
        raise c.error("a warp has 24 to 256 registers, a multiple of 8")
    if c.program.kernel.maxnreg is None:
        raise c.error("setmaxnreg in a kernel without .maxnreg, where it does nothing")
    c.whole_warp()
    if c.part["what"] == "inc":
        c.add(f"if not registers.take(C, w, {c.at}, {n}): return -2")
    else:
        c.add(f"registers.give(C, w, {c.at}, {n})")


def give(C: Cta, w: Warp, at: Instruction, n: int) -> None:
    """Gives registers back to the CTA."""
    w.at = at
    if n > w.registers:
        w.report("registers", f"setmaxnreg.dec to {n} from {w.registers}")
        return
    C.free += 32 * (w.registers - n)
    w.registers = n


def take(C: Cta, w: Warp, at: Instruction, n: int) -> bool:
    """Takes registers; whether there are enough.

    There are those that other warps gave back, and those of the register file that the launch left over. A program must
    not count on the latter, since another CTA may have them: that it did is reported when it ends.
    """
    w.at = at
    if n < w.registers:
        w.report("registers", f"setmaxnreg.inc to {n} from {w.registers}")
        return True
    wanted = 32 * (n - w.registers)
    if wanted > C.free:
        w.block(
            f"wants {wanted} more registers, {C.free} are free",
            lambda: wanted <= C.free,
        )
        return False
    C.free -= wanted
    w.registers = n
    return True

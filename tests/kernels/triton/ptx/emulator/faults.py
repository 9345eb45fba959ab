"""What is wrong with a program that was executed."""

from __future__ import annotations

KINDS = (
    "race",  # two accesses to a byte, one of them a write, that nothing orders
    "uninitialised",  # a byte or register nobody wrote is read
    "bounds",  # outside of every allocation
    "alignment",
    "barrier",  # misuse of a barrier: counts, transactions, lifetime
    "proxy",  # a fence between the generic and the asynchronous proxy is missing
    "fence",  # a fence, commit or wait of wgmma or cp.async is missing
    "registers",  # setmaxnreg, and registers of work in flight
    "unfinished",  # asynchronous work that nobody waited for when the program ended
    "lanes",  # lanes of a warp disagree where they must not
    "deadlock",
)


class Fault(Exception):
    """One fault: its ``kind`` (of :data:`KINDS`) and a ``text`` with the warp, the line of the PTX and the source line.

    Faults after which execution can go on are collected in ``Emulator.faults``; the others are raised as well.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    __repr__ = __str__


class Deadlock(Fault):
    """Every warp waits; the text says for what, and where in the source."""

    def __init__(self, text: str) -> None:
        super().__init__("deadlock", text)

"""What is wrong with a program that was executed."""

from __future__ import annotations

__all__ = ["KINDS", "Deadlock", "Fault"]

#: Kinds of faults, and what each is about.
KINDS = {
    "race": "two accesses to a byte, one of them a write, that nothing orders",
    "uninitialised": "memory is read that nobody wrote",
    "bounds": "an access outside of every allocation",
    "alignment": "an address that is not a multiple of what the access needs",
    "barrier": "misuse of a barrier: its lifetime, counts, transactions",
    "proxy": "a fence between the generic and the asynchronous proxy is missing",
    "fence": "a fence, commit or wait of asynchronous work is missing",
    "registers": "registers of work in flight are touched, or setmaxnreg is wrong",
    "unfinished": "asynchronous work that nobody waited for when the program ended",
    "lanes": "lanes of a warp disagree where they must not",
    "descriptor": "a tensormap or a matrix descriptor that no hardware takes",
    "deadlock": "every warp waits",
    "trap": "the program gave up, or never ends",
}


class Fault(Exception):
    """One fault: its ``kind`` (a key of :data:`KINDS`) and a ``text`` with the warp, the PTX line and the source line.

    All are collected in ``Emulator.faults``; those after which execution cannot go on are raised as well.
    """

    def __init__(self, kind: str, text: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; valid are {', '.join(KINDS)}")
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

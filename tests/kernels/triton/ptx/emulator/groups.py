"""Asynchronous operations that a warp issues, commits in groups and waits for: wgmma, cp.async and bulk stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .text import Instruction

__all__ = ["Groups", "Operation"]


@dataclass
class Operation:
    """One operation in flight; ``run(clock)`` does it, its memory accesses at that clock of its agent."""

    instruction: Instruction
    run: Callable[[int], None]
    done: bool = False


class Groups:
    """The operations of one kind of one warp.

    Args:
        early: whether operations are done as they are issued; otherwise when waited for, or by :meth:`advance`.
    """

    def __init__(self, early: bool) -> None:
        self.early = early
        self.open: list[Operation] = []
        self.groups: list[tuple[int, list[Operation]]] = []
        self.committed = 0
        self.complete = 0

    def issue(self, operation: Operation) -> None:
        """Puts an operation into the open group."""
        self.open.append(operation)
        if self.early:
            self._do(operation, self.committed + 1)

    def commit(self) -> None:
        """Closes the open group, which may be empty."""
        self.committed += 1
        self.groups.append((self.committed, self.open))
        self.open = []

    def wait(self, pending: int) -> None:
        """Completes all but the last ``pending`` groups."""
        while len(self.groups) > pending:
            number, operations = self.groups.pop(0)
            for operation in operations:
                self._do(operation, number)
            self.complete = number

    def advance(self) -> bool:
        """Does the oldest operation that is not done; whether there was one."""
        for number, operations in [*self.groups, (self.committed + 1, self.open)]:
            for operation in operations:
                if not operation.done:
                    self._do(operation, number)
                    return True
        return False

    @property
    def unfinished(self) -> list[Operation]:
        """Operations that nobody has waited for."""
        return [o for _, group in self.groups for o in group] + self.open

    @staticmethod
    def _do(operation: Operation, clock: int) -> None:
        if not operation.done:
            operation.done = True
            operation.run(clock)

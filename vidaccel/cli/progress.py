"""Progress of long commands: bars with the time that is left, and what is known so far, while there is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .console import console

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

__all__ = ["Progress"]

#: (noise levels, prompts, least error at each density)
Standing = Sequence[tuple[str, int, Sequence[float]]]


class Progress:
    """Bars on stderr, one a stage; nothing but remarks without a terminal.

    Args:
        densities: heads of the columns of what is known so far.
    """

    def __init__(self, densities: Sequence[float] = ()) -> None:
        self._console = console(stderr=True)
        self._standing: Callable[[], Standing] = tuple
        self._rows: Standing = ()
        self._bars = _bars(self._console, self._known)
        self._densities = densities
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def tell(self, stage: str, done: int, total: int) -> None:
        """Shows how far a stage is, and what is known by then."""
        if not self._bars.disable:
            self._rows = self._standing()  # here, not in the thread that draws: what it reads is being written to
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def watch(self, standing: Callable[[], Standing]) -> None:
        """From now on shows what is known so far below the bars."""
        self._standing = standing

    def _known(self) -> Iterable[Any]:
        from rich.table import Table

        if not (rows := self._rows):
            return []
        table = Table(title="least relative error of one candidate for all heads, by noise level and density")
        for name in ("noise level", "prompts", *(f"density {density:g}" for density in self._densities)):
            table.add_column(name, justify="right")
        for noise, prompts, errors in rows:
            table.add_row(noise, str(prompts), *(f"{error:.3f}" for error in errors))
        return [table]


def _bars(console: Any, below: Callable[[], Iterable[Any]]) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Plain

    class Bars(Plain):
        def get_renderables(self) -> Iterable[Any]:
            yield from super().get_renderables()
            yield from below()

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
    return Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal)

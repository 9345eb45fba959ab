"""Validation runs of a calibration: plans against dense on other seeds, as far as the time allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..pipelines.generate import Request
    from ..quality import Pair

__all__ = ["NOT_HEARD", "Validation"]

#: A note where a model's sound takes no part.
NOT_HEARD = "the model makes sound, too; it is neither compared nor in the page"

_T = TypeVar("_T")


class Validation:
    """Runs plans on the same requests. Every request runs dense once, however many plans there are.

    Args:
        pipe: an unpatched pipeline.
        requests: what to generate.
        seconds: what one generation takes.
        left: seconds that are left; nothing is begun that would not end within them.
        tell: is told about the progress.
    """

    def __init__(
        self,
        pipe: Any,
        requests: Sequence[Request],
        *,
        seconds: float,
        left: Callable[[], float],
        tell: Callable[[str, int, int], None],
    ) -> None:
        self._pipe, self._requests, self._seconds, self._left, self._tell = pipe, requests, seconds, left, tell
        self._pairs: list[Pair] = []
        self.notes: list[str] = []

    def time_for(self, generations: int) -> bool:
        """Whether so many generations end in time."""
        return self._left() >= generations * self._seconds

    @property
    def another(self) -> bool:
        """Whether there is time to run another plan on every request."""
        return self.time_for(len(self._pairs) or 2 * len(self._requests))

    def run(self, plan: Plan) -> list[Pair]:
        """The plan's pairs; the first plan's are with dense runs, and with the controls of one request."""
        if not self._pairs:
            self._pairs = list(self._first(plan))
            return self._pairs
        found = []
        for number, pair in enumerate(self._pairs):
            found.append(self._again(plan, pair))
            self._tell("validate", number + 1, len(self._pairs))
        return found

    def bounded(self, each: Iterable[_T], what: str, count: int) -> list[_T]:
        """Items that take one generation each, as many as there is time for, and a note if that is not all."""
        found: list[_T] = []
        items = iter(each)
        while len(found) < count:
            if not self.time_for(1):
                self.notes.append(f"the time was up after {len(found)} of {count} {what}")
                break
            try:
                found.append(next(items))
            except StopIteration:
                break
            self._tell(what, len(found), count)
        return found

    def _first(self, plan: Plan) -> Iterator[Pair]:
        from ..quality import measure_pairs

        count = len(self._requests)
        if not count or not self.time_for(2):
            if count:
                self.notes.append("the time was up before validation, so the plan was not run on other seeds")
            return
        controls = int(self.time_for(4))
        if not controls:
            self.notes.append("there was no time for the control runs of the validation")
        for done, pair in enumerate(measure_pairs(self._pipe, plan, self._requests, controls=controls), 1):
            self._tell("validate", done, count)
            if done == 1 and "sound" in pair.dense.settings:
                self.notes.append(NOT_HEARD)
            yield pair
            if done < count and not self.time_for(2):
                self.notes.append(f"the time was up after validating {done} of {count} prompts")
                return

    def _again(self, plan: Plan, pair: Pair) -> Pair:
        """The same request by another plan, against the dense run that is there already."""
        from ..pipelines.generate import generate
        from ..pipelines.patch import patch
        from ..quality import quality_figures

        session = patch(self._pipe, plan)
        try:
            planned = generate(self._pipe, pair.request)
            report = session.report()
        finally:
            session.close()
        return replace(pair, planned=planned, quality=quality_figures(planned, pair.dense), report=report)

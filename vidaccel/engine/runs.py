"""One denoising run: where it stands, and what patterns and compensations remember of it.

Plans are keyed on the normalized noise level, because step count, flow shift and distillation change what a step index
means. The step is for reports, and for rules that act every so many steps. Calls are never counted to learn the step:
caches skip calls, chunked pipelines rerun schedules, and gradient checkpointing repeats them.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .curvature import OutputCurvature

if TYPE_CHECKING:
    from ..kernels.contract import KernelRequest
    from .guard import HeadWatch
    from .pipeline_call import PipelineCall
    from .site import AttentionSite

__all__ = ["Branch", "DenoisingRun", "Moment", "RunBook"]

Branch = Literal["cond", "uncond"]

_BRANCHES: dict[str, Branch] = {"cond": "cond", "uncond": "uncond"}
_IN_ORDER: tuple[Branch, ...] = ("cond", "uncond")
_SLACK = 1e-6  # rounding of a noise level


@dataclass(frozen=True)
class Moment:
    """Where a forward pass stands in its run.

    Args:
        noise_level: 1 is pure noise, 0 is clean.
        step: denoising step, counted from 0.
        branch: ``"cond"`` or ``"uncond"`` when guidance takes separate passes; ``None`` when both are one batch or
            nothing tells them apart.
        stream: the name of the pass, and how many passes of that name the step had before it. Passes of one stream
            follow each other from step to step, and share memories.
    """

    noise_level: float
    step: int
    branch: Branch | None
    stream: tuple[str | None, int] = (None, 0)


class DenoisingRun:
    """What one denoising run has seen and remembers.

    It begins with a pipeline's call or with :meth:`.Session.new_run`; in a block ``with run:`` the passes of this
    thread belong to it. Within a run, a schedule that is set anew or a noise level that rises begins the next chunk of
    a video, which remembers nothing of the one before.
    """

    #: Passes of one name in a step that can be told apart: the two of guidance. Where a pipeline's own loop runs them,
    #: their order is the same in every step, however many they are.
    _MAX_STREAMS = 2

    def __init__(self, book: RunBook | None = None) -> None:
        self._book = book
        #: What the guard found in each layer; all chunks share it.
        self.head_watches: dict[AttentionSite, HeadWatch] = {}
        #: For each request of a kernel, those that ran out of memory, and how a report says it.
        self.kernel_failures: dict[KernelRequest, dict[str, str]] = {}
        self._schedule: object = None
        self._begin()

    def _begin(self) -> None:
        self._level: float | None = None
        self._step = 0
        self._known: int | None = None
        self._passes: Counter[tuple[str, str | None]] = Counter()
        self._memories: dict[AttentionSite, dict[Any, dict[str, Any]]] = {}
        self._curvatures: dict[tuple[str, Any], OutputCurvature] = {}
        #: Whether its passes cannot be told apart, so that none remembers anything.
        self.crowded = False

    def __enter__(self) -> DenoisingRun:
        if self._book is not None:
            self._book.chosen.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._book is not None:
            self._book.chosen.pop()

    def observe(
        self,
        level: float,
        transformer: str,
        *,
        name: str | None = None,
        step: int | None = None,
        scheduler: Any = None,
        in_order: bool = False,
        own_loop: bool = True,
    ) -> Moment:
        """Where the forward pass stands that starts now.

        Args:
            level: its noise level.
            transformer: the pipeline's name for the model.
            name: given to diffusers' ``cache_context``, if one is open.
            step: the ``step_index`` given there.
            scheduler: that of the loop, or ``None`` if it is not known.
            in_order: whether the passes of a step without a name are the conditional and then the unconditional one.
            own_loop: whether no pipeline's call runs the loop. Its scheduler may then be left from another run, and its
                order is not known.
        """
        if self._level is not None and (level > self._level + _SLACK or _was_set_anew(scheduler, self._schedule)):
            self._begin()
        self._schedule = getattr(scheduler, "timesteps", None)
        if step is None and not own_loop:
            index = getattr(scheduler, "_step_index", None)
            step = index if isinstance(index, int) else None
        falls = self._level is not None and level < self._level - _SLACK
        if falls or (step is not None and self._known is not None and step != self._known):
            self._step += 1
            self._passes.clear()
        self._level, self._known = level, step
        before = self._passes[transformer, name]
        self._passes[transformer, name] += 1
        if own_loop and before >= self._MAX_STREAMS:
            self.crowded = True
            self._memories.clear()
            self._curvatures.clear()
        branch: Branch | None = None
        if name is not None:  # pred_cond is cond; cond_uncond is a batch of both, uncond_stg another pass
            branch = _BRANCHES.get(name.removeprefix("pred_"))
        elif in_order and not own_loop and before < len(_IN_ORDER):
            branch = _IN_ORDER[before]
        return Moment(level, self._step if step is None else step, branch, (name, before))

    def memory(self, site: AttentionSite, of: Any) -> dict[str, Any]:
        """What earlier calls of a layer left behind under this key; empty in the first."""
        if self.crowded:
            return {}
        return self._memories.setdefault(site, {}).setdefault(of, {})

    def forget(self, site: AttentionSite) -> None:
        """Drops what all calls of a layer left behind."""
        self._memories.pop(site, None)

    def curvature(self, transformer: str, moment: Moment) -> OutputCurvature:
        """How the outputs of a transformer turn, in the stream of passes that ``moment`` is of."""
        if self.crowded:
            return OutputCurvature()
        return self._curvatures.setdefault((transformer, moment.stream), OutputCurvature())


def _was_set_anew(scheduler: Any, schedule: object) -> bool:
    """Whether the timesteps were set since; a scheduler that makes them at each look does not tell."""
    now = getattr(scheduler, "timesteps", None)
    return now is not None and schedule is not None and now is not schedule and now is scheduler.timesteps


class RunBook:
    """Which run the passes of a thread belong to: that of the pipeline's call, or one that the user began."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def chosen(self) -> list[DenoisingRun]:
        """The runs whose ``with`` blocks are open in this thread, the innermost last."""
        return self._thread.__dict__.setdefault("chosen", [])  # type: ignore[no-any-return]

    def current(self, call: PipelineCall | None) -> DenoisingRun:
        """The run of a pass in this thread.

        Args:
            call: the pipeline's call that the pass is in, if it is in one.
        """
        if self.chosen:
            return self.chosen[-1]
        if call is None:
            return self._thread.__dict__.setdefault("run", DenoisingRun(self))  # type: ignore[no-any-return]
        return call.runs.setdefault(self, DenoisingRun(self))  # type: ignore[no-any-return]

    def begin(self, call: PipelineCall | None) -> DenoisingRun:
        """A new run, which the passes of this thread belong to from here on."""
        run = DenoisingRun(self)
        if call is None:
            self._thread.run = run
        else:
            call.runs[self] = run
        return run

"""What the model is doing right now: noise level, step, and which guidance branch.

Plans are keyed on the normalised noise level, because step count, flow shift and distillation change what a step
index means. The step index is only for reports. Calls are never counted to learn the step: caches skip calls, chunked
pipelines rerun schedules, and gradient checkpointing repeats them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .noise_level import noise_level

__all__ = ["Branch", "Clock", "Moment"]

Branch = Literal["cond", "uncond"]


@dataclass(frozen=True)
class Moment:
    """One forward pass of a transformer, placed in its denoising run.

    Args:
        noise_level: 1 is pure noise, 0 is clean.
        step: denoising step, counted from 0.
        branch: ``"cond"`` or ``"uncond"`` when guidance takes separate passes; ``None`` when both are one batch or
            nothing tells them apart.
        run: how many runs (or chunks of one) the pipeline started before this one.
    """

    noise_level: float
    step: int
    branch: Branch | None
    run: int


class Clock:
    """Turns what a pipeline reveals into a :class:`Moment`; one clock serves both transformers of a pipeline.

    Args:
        scheduler: returns the pipeline's scheduler, or ``None`` for a bare transformer; asked at every tick, because
            users swap schedulers.
    """

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler
        self._last: float | None = None
        self._step = 0
        self._run = 0
        self._calls = 0

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler as it is now, or ``None``."""
        return self._scheduler()

    def tick(
        self,
        timestep: torch.Tensor | float,
        *,
        context: str | None = None,
        context_step: int | None = None,
        separate_guidance: bool = False,
    ) -> Moment:
        """The moment of a forward pass that starts now.

        Args:
            timestep: as the model got it, any shape; the largest entry counts (frames or tokens that condition the
                video sit at 0). Reading it is one 4-byte copy from the device a forward pass.
            context: name given to diffusers' ``cache_context``, if the pipeline opens one.
            context_step: its ``step_index``, if given; preferred over the scheduler's.
            separate_guidance: whether this pipeline's second pass at one noise level is the unconditional one, for
                pipelines that open no context.
        """
        level = self.noise_level(timestep)
        if self._last is None or level > self._last + 1e-6:  # a rise: a new run, or the next chunk of one
            self._run += self._last is not None
            self._step, self._calls = 0, 0
        elif level < self._last - 1e-6:
            self._step, self._calls = self._step + 1, 0
        else:
            self._calls += 1
        self._last = level
        step = self._step if context_step is None else context_step
        if context_step is None:
            known = getattr(self.scheduler, "_step_index", None)
            step = known if isinstance(known, int) else step
        return Moment(level, step, self._branch(context, separate_guidance), self._run)

    def noise_level(self, timestep: torch.Tensor | float) -> float:
        """That of the noisiest timestep by the pipeline's scheduler, in [0, 1], see :mod:`.noise_level`."""
        return noise_level(timestep, self.scheduler)

    def _branch(self, context: str | None, separate_guidance: bool) -> Branch | None:
        if context is not None:
            # cond and uncond, or pred_cond and pred_uncond; cond_uncond is a batch of both, uncond_stg another pass
            names: dict[str, Branch] = {"cond": "cond", "uncond": "uncond"}
            return names.get(context.removeprefix("pred_"))
        if separate_guidance:
            return "cond" if self._calls % 2 == 0 else "uncond"
        return None

"""How much a transformer's output turns from step to step, for patterns whose budget follows it (PASA)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .clock import Branch, Moment

__all__ = ["Trajectory"]


@dataclass(eq=False)
class Trajectory:
    """The last output of one transformer in each guidance branch, and how far it was from the one before.

    Outputs are noted only if a plan asks for it: it keeps one latent a branch and reads one number from the device a
    forward pass.
    """

    _last: dict[Branch | None, tuple[int, torch.Tensor, float | None]] = field(default_factory=dict)

    def note(self, moment: Moment, output: torch.Tensor) -> None:
        """Takes in the output of the forward pass at this moment."""
        run, before, _ = self._last.get(moment.branch, (moment.run, None, None))
        change = None
        if before is not None and run == moment.run and before.shape == output.shape:
            past = before.float()
            size = past.norm().clamp(min=torch.finfo(past.dtype).tiny)
            change = float((output.detach().float() - past).norm() / size)
        # a copy: pipelines may go on computing in the output
        self._last[moment.branch] = moment.run, output.detach().clone(), change

    def curvature(self, moment: Moment) -> float | None:
        """norm(v - v') / norm(v') of the last two outputs v', v before this moment; ``None`` before there are two."""
        run, _, change = self._last.get(moment.branch, (-1, None, None))
        return change if run == moment.run else None

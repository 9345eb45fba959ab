"""How much a transformer's output turns from step to step, for patterns whose budget follows it (PASA)."""

from __future__ import annotations

import torch

__all__ = ["OutputCurvature"]


class OutputCurvature:
    """The last output of one stream of passes, and how far it was from the one before.

    Outputs are noted only if a plan asks for it: it keeps one latent a stream and reads one number from the device a
    forward pass.

    Attributes:
        value: norm(v - v') / norm(v') of the last two outputs v', v; ``None`` before there are two of one shape.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._last: torch.Tensor | None = None

    def note(self, output: torch.Tensor) -> None:
        """Takes in the output of a forward pass."""
        before, self.value = self._last, None
        if before is not None and before.shape == output.shape:
            past = before.float()
            size = past.norm().clamp(min=torch.finfo(past.dtype).tiny)
            self.value = float((output.detach().float() - past).norm() / size)
        # a copy: pipelines may go on computing in the output
        self._last = output.detach().clone()

"""Muon for many small matrices: batched, and in the precision that the device is fast at.

Muon replaces the momentum of a weight matrix by the nearest orthogonal matrix, found with a few matrix products
(Newton-Schulz). ``torch.optim.Muon`` does that one matrix at a time and in bfloat16, which most CPUs emulate: on an
AVX2 machine it took longer than the backward pass. Here all matrices of one shape go through in one batched product.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration x -> a x + b (x x^T) x + c (x x^T)^2 x, which drives all singular values
# near 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly: all but tiny singular values end between 0.7 and 1.2.

    ``matrices`` is (batch, rows, columns); so is the result.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay.

    The step is scaled by ``0.2 * sqrt(max(rows, columns))``, which gives it the size of an AdamW step: one learning
    rate serves both.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon is for matrices; give vectors and convolutions to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(shape, parameters, group)
        return loss

    def _step_shape(self, shape: torch.Size, parameters: list[Tensor], group: dict[str, Any]) -> None:
        nesterov = []
        for parameter in parameters:
            assert parameter.grad is not None
            buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            nesterov.append(parameter.grad.lerp(buffer, group["momentum"]))
        updates = orthogonalise(torch.stack(nesterov)) * (0.2 * max(shape) ** 0.5 * group["lr"])
        for parameter, update in zip(parameters, updates.unbind(0), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)

"""Where sparse attention has no gradient yet: asking for it is an error, where the answer would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ..errors import KernelError

__all__ = ["NO_GRADIENT", "forward_only", "without_gradient"]

NO_GRADIENT = (
    "vidaccel's attention has no gradient yet; run it under torch.no_grad(), and call vidaccel.unpatch(pipe) before"
    " training"
)

_F = TypeVar("_F", bound=Callable[..., Any])


class _ForwardOnly(torch.autograd.Function):
    """The identity, which refuses to go back."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise KernelError(NO_GRADIENT)


def without_gradient(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """``out``, through which no gradient reaches what it was computed from: asking for one is an error.

    Computing it is none. Weights that no optimizer will touch ask for gradients, too.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return out
    return cast(torch.Tensor, _ForwardOnly.apply(out.detach(), *inputs))


def forward_only(kernel: _F) -> _F:
    """A kernel ``f(q, k, v, ...)`` that raises :class:`KernelError` when a gradient is asked through its outputs."""

    @wraps(kernel)
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            found = kernel(q, k, v, *args, **kwargs)
        if isinstance(found, tuple):
            return tuple(without_gradient(out, q, k, v) for out in found)
        return without_gradient(found, q, k, v)

    return cast(_F, run)

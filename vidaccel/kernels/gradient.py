"""Sparse attention has no gradient yet: asking for one is an error, where some kernels would give a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ..errors import KernelError

__all__ = ["NO_GRADIENT", "forward_only"]

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


def forward_only(kernel: _F) -> _F:
    """A kernel ``f(q, k, v, ...)`` that raises :class:`KernelError` when a gradient is asked through its outputs.

    Running it forward is no error: weights that no optimizer will touch ask for gradients, too.
    """

    @wraps(kernel)
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = [x for x in (q, k, v) if isinstance(x, torch.Tensor) and x.requires_grad]
        if not inputs or not torch.is_grad_enabled():
            return kernel(q, k, v, *args, **kwargs)
        with torch.no_grad():
            found = kernel(q, k, v, *args, **kwargs)
        if isinstance(found, tuple):
            return tuple(_ForwardOnly.apply(out, *inputs) for out in found)
        return _ForwardOnly.apply(found, *inputs)

    return cast(_F, run)

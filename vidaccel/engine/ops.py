"""The opaque operators that a compiled graph sees.

A patched processor calls ``vidaccel::attention`` with a per-layer handle, a one-element CPU tensor. Noise level, policy
and kernel choice happen inside, so that ``torch.compile`` traces one graph for all layers and steps: an int in the
processor, or a schedule read in Python, would recompile for each layer or step.

Where the whole transformer is compiled, the hooks around its blocks are part of the graph too. What they do at run time
is in three more operators, ``vidaccel::enter``, ``vidaccel::reorder`` and ``vidaccel::leave``. A graph knows no order
but that of its data, so entering returns a token that all the others take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import PatchError
from ..kernels.gradient import NO_GRADIENT
from ..types import VideoGrid
from . import attend
from .capture import OPERATOR_TAGS, refuse_capture
from .handles import GATES, SITES
from .parallel import attend_across

__all__ = ["attention", "attention_of", "enter", "leave", "passed_by", "reorder"]


def passed_by(handle: torch.Tensor, reason: str) -> None:
    """Counts a call that goes to the model's own attention, with the reason. Not inside a compiled graph."""
    site = SITES.find(handle)
    if site is not None:
        attend.passed_by(site, reason)


def attention_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention [B, S, H, D] by the plan of the session behind ``handle``; ``hidden`` [B, S, C] is its input.

    ``after`` is the token of the pass, where one graph holds both.

    Raises:
        PatchError: if that session is gone, or while a CUDA graph is being captured.
    """
    site = SITES.get(handle)
    refuse_capture(q)
    context = site.transformer.context
    if context is not None and context.ranks is not None:
        return attend_across(site, context, context.ranks, q, k, v, mask, hidden).contiguous()
    return attend.attend(site, q, k, v, mask, hidden).contiguous()


#: The operator a graph sees; :func:`attention_of` is what it runs.
attention = torch.library.custom_op("vidaccel::attention", mutates_args=(), **OPERATOR_TAGS)(attention_of)


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _no_gradient(ctx: Any, grad: torch.Tensor) -> None:
    raise PatchError(NO_GRADIENT)


attention.register_autograd(_no_gradient)


@torch.library.custom_op("vidaccel::enter", mutates_args=(), **OPERATOR_TAGS)
def enter(
    level: torch.Tensor, handle: torch.Tensor, grid: Sequence[int], reason: str, tiled: bool, before: int | None
) -> torch.Tensor:
    """Starts a forward pass; the token that comes back goes to whatever follows."""
    GATES.get(handle).entered(level, VideoGrid(*grid) if grid else reason, tiled, before)
    return handle.clone()


@enter.register_fake
def _(
    level: torch.Tensor, handle: torch.Tensor, grid: Sequence[int], reason: str, tiled: bool, before: int | None
) -> torch.Tensor:
    return torch.empty_like(handle)


@torch.library.custom_op("vidaccel::leave", mutates_args=(), **OPERATOR_TAGS)
def leave(output: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    """Ends a forward pass."""
    GATES.get(handle).left(output)
    return handle.clone()


@leave.register_fake
def _(output: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(handle)


@torch.library.custom_op("vidaccel::reorder", mutates_args=(), **OPERATOR_TAGS)
def reorder(
    x: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None, dim: int, back: bool = False
) -> torch.Tensor:
    """A copy of x with its tokens along ``dim`` in layout order (``back``: in raster order), if the pass wants that."""
    context = GATES.get(handle).context
    if context is None or not context.tiled:
        return x.clone(memory_format=torch.contiguous_format)
    layout = context.layout(x.device)
    return layout.untile(x, dim) if back else layout.tile(x, dim)


@reorder.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None, dim: int, back: bool = False) -> torch.Tensor:
    return x.new_empty(x.shape)


reorder.register_autograd(_no_gradient)

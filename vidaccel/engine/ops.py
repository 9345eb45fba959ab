"""The one opaque operator that a compiled graph sees.

A patched processor calls ``vidaccel::attention`` with a per-layer handle, a one-element CPU tensor. Noise level, policy
and kernel choice happen inside, so that ``torch.compile`` traces one graph for all layers and steps: an int in the
processor, or a schedule read in Python, would recompile for each layer or step.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from ..errors import PatchError
from . import attend
from .site import AttentionSite

__all__ = ["attention", "handle_for", "passed_by"]

_sites: weakref.WeakValueDictionary[int, AttentionSite] = weakref.WeakValueDictionary()
_next = itertools.count()


def handle_for(site: AttentionSite) -> torch.Tensor:
    """A new int64 [1] CPU tensor that stands for ``site`` as long as its session lives."""
    number = next(_next)
    _sites[number] = site
    return torch.tensor([number], dtype=torch.int64)


def passed_by(handle: torch.Tensor, reason: str) -> None:
    """Counts a call that goes to the model's own attention, with the reason. Not inside a compiled graph."""
    site = _sites.get(int(handle))
    if site is not None:
        attend.passed_by(site, reason)


@torch.library.custom_op("vidaccel::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention [B, S, H, D] by the plan of the session behind ``handle``; ``hidden`` [B, S, C] is its input."""
    site = _sites.get(int(handle))
    if site is None:
        raise PatchError("this attention layer's session is gone; unpatch the pipeline and patch it again")
    return attend.attend(site, q, k, v, mask, hidden).contiguous()


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)

"""One group of heads, from q, k and v to their output: blocks, kernel, compensation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..blockmask import BlockMask
from ..compensation import Call
from ..kernels.contract import AttentionResult, Skips
from ..patterns.dynamic import Heads
from ..variablemask import VariableBlockMask
from .prepare import HeadGroup

__all__ = ["run_heads"]

#: A kernel, or what stands for one: called as :class:`..kernels.contract.Kernel` is.
RunsAttention = Callable[..., AttentionResult]


def run_heads(
    kernel: RunsAttention, group: HeadGroup, heads: Heads, memory: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """Attention of a group's heads as its policy says.

    Args:
        kernel: one that can run ``group.request(heads.q)``.
        heads: those of the group alone; their own memory is not used.
        memory: what pattern and compensation remember of the run, for this layer, group and guidance branch.

    Returns:
        The output [B,S,H,D] in layout order, and the token pairs computed over all.
    """
    heads = replace(heads, memory=memory.setdefault("pattern", {}))
    mask: BlockMask | VariableBlockMask | None = group.mask
    share, order = group.density, None
    if mask is None or share is None:
        assert group.pattern is not None
        order = group.pattern.order(heads)
        heads = heads if order is None else heads.reordered(order)
        mask = group.pattern.mask(heads)
        share = mask.density(heads.layout)
    # a factor above the number of tokens, as a short video may have it, passes over all that is not the largest
    skips = Skips.of(math.log(min(1.0, group.skip / heads.layout.tokens)), heads.q) if group.skip else None
    run = partial(_run, kernel, group, heads, skips)
    call = Call(heads, mask, share, run, memory.setdefault("compensation", {}))
    nothing_to_do = mask.is_full() and not group.compensation.always
    out = call.sparse() if nothing_to_do else group.compensation.attend(call)
    density = call.density
    if skips is not None:
        density -= float(skips.skipped.double().mean()) / heads.layout.tokens**2
    return out if order is None else order.restore(out), density


def _run(
    kernel: RunsAttention,
    group: HeadGroup,
    heads: Heads,
    skips: Skips | None,
    mask: BlockMask | VariableBlockMask,
    *,
    tail: bool = False,
    return_lse: bool = False,
) -> Any:
    tail = tail and not mask.is_full()
    return kernel(
        heads.q, heads.k, heads.v, heads.layout, mask, scale=heads.scale, precision=group.precision, tail=tail,
        return_lse=return_lse, skips=skips,
    )  # fmt: skip

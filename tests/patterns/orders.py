"""Oracle and promises for patterns with an order of their own: everything at token level, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, HeadOrder, Heads, choose_blocks

__all__ = ["attends_what_it_keeps", "check_order", "choose"]


def choose(pattern: DynamicPattern, call: Heads) -> tuple[HeadOrder, torch.Tensor]:
    """The order of a call and its blocks of all tokens, as the engine asks for them."""
    order = pattern.order(call)
    assert order is not None
    return order, choose_blocks(pattern, call.reordered(order))


def check_order(order: HeadOrder, layout: TokenLayout) -> None:
    """Permutations, in which text stays where it is."""
    for index in (order.q, order.k):
        everything = torch.arange(layout.tokens).expand(index.shape)
        assert torch.equal(index.sort(-1).values, everything)
        video = layout.video_tokens
        text = torch.ones(layout.tokens, dtype=torch.bool)
        text[video] = False
        assert torch.equal(index[..., text], everything[..., text])


def attends_what_it_keeps(pattern: DynamicPattern, call: Heads, kept: torch.Tensor) -> None:
    """The reference kernel in the new order, and back, is softmax attention over the kept tokens in the old one.

    Args:
        kept: bool [B,H,S,S], what an oracle says, in layout order.
    """
    order, blocks = choose(pattern, replace(call, memory={}))
    moved = call.reordered(order)
    out = reference.block_sparse_attention(moved.q, moved.k, moved.v, call.layout, BlockMask.from_dense(blocks))
    assert isinstance(out, torch.Tensor)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(order.restore(out), expected, rtol=1e-10, atol=1e-10)

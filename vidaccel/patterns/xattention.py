"""XAttention: sums over antidiagonals of small squares of the score matrix, cheap and seldom blind to a structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .params import check_share
from .ranking import keep_mass, split_text
from .registry import register

__all__ = ["XAttention"]

#: Most scores in memory at a time, and never more than the keys have numbers.
_AT_A_TIME = 1 << 26


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class XAttention(DynamicPattern):
    """Each row keeps the fewest blocks that hold ``mass`` of the attention estimated from antidiagonals.

    The tokens of each block are cut into groups of ``stride``, S. The score of query group a and key group b is the
    mean of their S x S logits along the antidiagonal, (1/S) sum_r scale * q_a[S-1-r] . k_b[r]. A softmax over the key
    groups of the whole sequence follows, and its sums over the groups of key block j, averaged over the query groups
    of block i, are the attention of i to j. The video's first block is kept in any case, as the published code does.
    Source: XAttention, without its causal mask.

    Different here: blocks are tiles whose tokens need not be a multiple of S, so a last group is filled up with its
    block's first tokens, and each group weighs by the tokens it has of its own. Text's mass counts as kept.

    Args:
        mass: share of the attention to hold (published: .9 to .95).
        stride: 4, 8 or 16 tokens of a group; the estimate costs 1/stride of all scores.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "xattention"
    places = "nothing"

    mass: float = 0.9
    stride: Literal[4, 8, 16] = 8

    def __post_init__(self) -> None:
        check_share(self.name, "mass", self.mass)
        if self.stride not in (4, 8, 16) or not isinstance(self.stride, int):
            raise ConfigError(f"{self.name}: stride is {self.stride!r}; valid are 4, 8 and 16")

    def choose(self, heads: Heads) -> torch.Tensor:
        """The smallest sets and the first block, bool [B,H,NV,NV]."""
        probability, text = split_text(heads, self.estimate(heads))
        kept = keep_mass(probability, self.mass, held=text)
        kept[..., 0] = True
        return kept

    def estimate(self, heads: Heads) -> torch.Tensor:
        """Estimated attention of each video block to all blocks, float32 [B,H,NV,NB]; rows add up to 1."""
        layout = heads.layout
        groups = _groups(layout, self.stride, heads.q.device)
        video = groups.video
        q = _gather(heads.q, groups.tokens[video].flip(-1)).float() * (heads.scale / self.stride)
        k = _gather(heads.k, groups.tokens).float()
        b, h = q.shape[:2]
        found = q.new_zeros(b, h, layout.num_blocks, layout.num_blocks)
        step = max(1, min(_AT_A_TIME, k.numel()) // (b * h * len(groups.block)))
        for begin in range(0, len(video), step):
            rows = video[begin : begin + step]
            p = (q[:, :, begin : begin + step] @ k.mT + groups.weight.log()).softmax(-1)
            sums = p.new_zeros(b, h, len(rows), layout.num_blocks).index_add_(-1, groups.block, p)
            found.index_add_(2, groups.block[rows], sums * groups.weight[rows, None])
        return found[:, :, layout.video_blocks] / heads.sizes[layout.video_blocks, None]

    def resolved(self, layout: TokenLayout) -> str:
        """Mass and stride."""
        return f"{self.mass:g} of the attention estimated from antidiagonals of stride {self.stride} + first block"


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of S tokens of one block: their tokens [G,S], their block [G], how many tokens are their own [G]."""

    tokens: torch.Tensor
    block: torch.Tensor
    weight: torch.Tensor
    video: torch.Tensor


@lru_cache(maxsize=32)
def _groups(layout: TokenLayout, stride: int, device: torch.device) -> _Groups:
    sizes, offsets = layout.block_sizes, layout.block_offsets[:-1]
    counts = (sizes + stride - 1) // stride
    block = torch.repeat_interleave(torch.arange(layout.num_blocks), counts)
    within = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    position = within[:, None] * stride + torch.arange(stride)
    tokens = offsets[block, None] + position % sizes[block, None]
    weight = (sizes[block] - within * stride).clamp(max=stride).float()
    first, end = layout.video_blocks.start, layout.video_blocks.stop
    video = ((block >= first) & (block < end)).nonzero().squeeze(-1)
    return _Groups(*(x.to(device) for x in (tokens, block, weight, video)))


def _gather(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The groups' tokens side by side, [B,H,G,S*D] of [B,S,H,D]."""
    b, _, h, d = x.shape
    picked = x.index_select(1, tokens.flatten()).view(b, len(tokens), -1, h, d)
    return picked.permute(0, 3, 1, 2, 4).reshape(b, h, len(tokens), -1)

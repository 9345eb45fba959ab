"""Rectified SpaAttn's compensation: outputs scaled to the kept share of the attention, and means for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..patterns.dynamic import Heads
from ..patterns.params import check_flag
from ..pooling import block_means
from .base import Call, Compensation
from .registry import register
from .rows import wide

__all__ = ["Rectification"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Rectification(Compensation):
    """O = O_sparse * (share of the attention in E) + sum over blocks j not in E of P_ij vmean_j.

    P_ij is the estimated attention of query block i: softmax over blocks j of scale * mean query . mean key + log n_j
    jointly with every text key on its own. E are the kept blocks and text. With ``gain_aware`` also the skipped blocks
    whose mean would tell less than its error: |qmean.kmean| <= ||mean|dq|.kmean| + |qmean.mean|dk|||, where dq and dk
    are the distances of a block's tokens from their mean; their share then goes to the kept blocks. All tokens of a
    block get the same share and the same means, unlike those of the pooled tail. Source: Rectified SpaAttn; n_j there
    is the block size of 128.

    Args:
        gain_aware: whether skipped blocks are left out where their means would mislead (published: yes).

    Raises:
        ConfigError: if that is not true or false.
    """

    name: ClassVar[str] = "rectification"

    gain_aware: bool = True

    def __post_init__(self) -> None:
        check_flag(self.name, "gain_aware", self.gain_aware)

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output, its video rows rectified."""
        heads, layout = call.heads, call.heads.layout
        out = call.sparse()
        video = layout.video_blocks
        left = ~call.kept[:, :, video, video]
        if self.gain_aware:
            left = left & _worth(heads)
        rest = _probability(heads) * left
        share = 1 - rest.sum(-1, keepdim=True)  # exactly 1 where nothing is left
        added = rest @ heads.v_means[:, :, video]
        tokens = layout.video_tokens
        block = layout.block_of_token[tokens].to(out.device) - video.start
        share, added = (x[:, :, block].transpose(1, 2) for x in (share, added))
        out[:, tokens] = (wide(out[:, tokens]) * share + added).to(out.dtype)
        return out


def _probability(heads: Heads) -> torch.Tensor:
    """Estimated attention of each video block to each video block, float32 [B,H,NV,NV]; text takes its part."""
    layout, video = heads.layout, heads.layout.video_blocks
    logits = heads.pooled_logits[:, :, video, video] + heads.sizes[video].log()
    if not layout.text_tokens:
        return logits.softmax(-1)
    first = 0 if layout.text_first else layout.grid.tokens
    text = heads.k[:, first : first + layout.text_tokens].float()
    text_logits = torch.einsum("bhid,bthd->bhit", heads.q_means[:, :, video] * heads.scale, text)
    total = torch.logaddexp(logits.logsumexp(-1), text_logits.logsumexp(-1))
    return (logits - total.unsqueeze(-1)).exp()


def _worth(heads: Heads) -> torch.Tensor:
    """Pairs of video blocks whose means tell more than they hide: gain > error, bool [B,H,NV,NV]."""
    video = heads.layout.video_blocks
    q, k = heads.q_means[:, :, video], heads.k_means[:, :, video]
    q_spread, k_spread = (
        _spread(x, means, heads)[:, :, video] for x, means in ((heads.q, heads.q_means), (heads.k, heads.k_means))
    )
    return (q @ k.mT).abs() > (q_spread @ k.mT).abs() + (q @ k_spread.mT).abs()


def _spread(x: torch.Tensor, means: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Mean distance of the tokens of each block from their mean, by channel, float32 [B,H,NB,D]."""
    b, s, h, d = x.shape
    block = heads.layout.block_of_token.to(x.device)
    apart = (x.transpose(1, 2).float() - means[:, :, block]).abs_()
    return block_means(apart.reshape(b * h, s, d), heads.layout).view(b, h, -1, d)

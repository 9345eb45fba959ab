"""AnchorAttention: keys are judged against the largest score of a few places that matter anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .rectangles import largest_per_block
from .registry import register

__all__ = ["Anchor"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor(DynamicPattern):
    """Each row keeps the blocks with a key whose score comes within ``margin`` of the row's anchor.

    The score of key t in row i is scale * mean query_i . k_t, and the anchor the largest score among the row's own
    block, the first block of the video and text; these are kept too. Source: AnchorAttention. Different here: it keeps
    single keys (stripes), here whole blocks that hold one; its anchor is the mean over the row's queries of each one's
    exact maximum, here the maximum of their mean; and nothing is causal.

    Args:
        margin: in units of the scaled logits (published for language models: 12; scores of means differ less).

    Raises:
        ConfigError: unless margin is a number of at least 0.
    """

    name: ClassVar[str] = "anchor"
    places = "order"

    margin: float = 2.0

    def __post_init__(self) -> None:
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if not number or self.margin < 0:
            raise ConfigError(f"{self.name}: margin is {self.margin!r}; give a number of at least 0")

    def choose(self, heads: Heads) -> torch.Tensor:
        """Blocks near the anchor or above it, the first block and the own one, bool [B,H,NV,NV]."""
        layout = heads.layout
        video = layout.video_blocks
        best = largest_per_block(heads.q_means[:, :, video] * heads.scale, heads.k, layout)
        always = anchor_blocks(layout, heads.q.device)
        anchor = best.masked_fill(~always, -torch.inf).amax(-1, keepdim=True)
        return ((best >= anchor - self.margin) | always)[..., video]

    def resolved(self, layout: TokenLayout) -> str:
        """The margin."""
        return f"keys within {self.margin:g} of the largest logit of the own block, the first block and text"


def anchor_blocks(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """For each video block itself, the first video block and text, bool [NV,NB] on ``device``."""
    always = torch.zeros(layout.num_video_blocks, layout.num_blocks, dtype=torch.bool)
    video = always[:, layout.video_blocks]
    video.fill_diagonal_(True)
    video[:, 0] = True
    always[:, layout.text_blocks] = True
    return always.to(device)

"""SpargeAttn, first stage: pooled attention, but only where a block's tokens are alike enough to go by their mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..errors import ConfigError
from ..layout import TokenLayout
from ..pooling import block_means
from .dynamic import DynamicPattern, Heads
from .params import check_share
from .ranking import keep_largest, keep_mass, split_text
from .registry import register

__all__ = ["Sparge", "self_similarity"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Sparge(DynamicPattern):
    """Pooled attention among self-similar blocks; the others keep everything.

    K is smoothed (its mean over the sequence subtracted). A block is self-similar if the mean of its tokens' pairwise
    cosines is above ``similarity``. P = softmax over all blocks of scale * mean query_i . mean key_j + log n_j, with
    dissimilar key blocks at -inf; each row keeps as many of the largest as hold at most ``mass`` of P together, or
    int(density * NV) of them, and at least one. Rows of dissimilar query blocks and columns of dissimilar key blocks
    are kept whole.

    Source: SpargeAttn. Different here: square blocks (tiles) instead of 128x64, log n_j for smaller edge blocks, one
    setting for all heads of the pattern (a plan may give each head its own), and text's mass counts as kept. Its second
    stage, skipping inside the kernel, is not part of the pattern.

    Args:
        similarity: least mean cosine of a self-similar block, in [-1, 1]; published default .6 with ``mass``, -.1 with
            ``density``. -1 keeps nothing by force.
        mass: share of P to stay within, or ``None``.
        aim: share of the video blocks to keep, or ``None``; plans call it ``density``.

    Raises:
        ConfigError: if a number is out of range, or not exactly one of mass and density is given.
    """

    name: ClassVar[str] = "sparge"
    places = "nothing"

    similarity: float = 0.6
    mass: float | None = None
    aim: float | None = field(default=None, metadata={"parameter": "density"})

    def __post_init__(self) -> None:
        number = isinstance(self.similarity, int | float) and not isinstance(self.similarity, bool)
        if not number or not -1 <= self.similarity <= 1:
            raise ConfigError(f"{self.name}: similarity is {self.similarity!r}; give a cosine from -1 to 1")
        if (self.mass is None) == (self.aim is None):
            found = "neither is given" if self.mass is None else "both are given"
            raise ConfigError(f"{self.name}: of mass and density {found}; give one of them")
        if self.mass is not None:
            check_share(self.name, "mass", self.mass)
        if self.aim is not None:
            check_share(self.name, "density", self.aim)

    def choose(self, heads: Heads) -> torch.Tensor:
        """Blocks kept by mass or number, and by force: bool [B,H,NV,NV]."""
        layout = heads.layout
        odd_q, odd_k = (~self._alike(x, heads) for x in (heads.q, _smooth(heads.k)))
        # smoothing K shifts every logit of a row alike, so the softmax does not see it
        logits = heads.pooled_logits[:, :, layout.video_blocks] + heads.sizes.log()
        # a row without any similar key has no softmax; all its columns are forced anyway
        logits = logits.masked_fill(odd_k[:, :, None], torch.finfo(logits.dtype).min)
        probability, text = split_text(heads, logits.softmax(-1))
        if self.mass is not None:
            kept = keep_mass(probability, self.mass, held=text, count="within")
        else:
            kept = keep_largest(probability, self._count(layout))
        video = layout.video_blocks
        return kept | odd_q[:, :, video, None] | odd_k[:, :, None, video]

    def _alike(self, x: torch.Tensor, heads: Heads) -> torch.Tensor:
        return self_similarity(x, heads.layout) > self.similarity

    def _count(self, layout: TokenLayout) -> int:
        assert self.aim is not None
        return max(1, int(self.aim * layout.num_video_blocks + 1e-9))

    def density(self, layout: TokenLayout) -> float | None:
        """Share of the video blocks kept by number, without the forced ones; ``None`` if kept by mass."""
        return None if self.aim is None else self._count(layout) / layout.num_video_blocks

    def resolved(self, layout: TokenLayout) -> str:
        """What a row keeps and which blocks are kept whole."""
        if self.aim is None:
            text = f"within {self.mass:g} of the estimated attention"
        else:
            text = f"{self._count(layout)} of {layout.num_video_blocks} blocks a row"
        return f"{text} + whole rows and columns of blocks with a mean cosine up to {self.similarity:g}"


def self_similarity(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Mean cosine of all pairs of tokens within each block, themselves included, float32 [B,H,NB] of [B,S,H,D].

    The mean of all products of unit vectors is the squared norm of their mean, so no Gram matrix is formed.
    """
    b, s, h, d = x.shape
    unit = F.normalize(x.float(), dim=-1).transpose(1, 2).reshape(b * h, s, d)
    return block_means(unit, layout).square().sum(-1).view(b, h, -1)


def _smooth(k: torch.Tensor) -> torch.Tensor:
    return k - k.mean(1, keepdim=True, dtype=torch.float32)

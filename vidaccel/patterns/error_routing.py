"""Blocks chosen by the error they would cause if their means stood in for them, instead of by their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from ..pooling import block_means
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .ranking import block_probabilities, keep_largest, split_text
from .registry import register

__all__ = ["ErrorRouting", "block_spread"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorRouting(BudgetedPattern):
    """Each row keeps the blocks of largest estimated error per cost. Meant for the pooled tail.

    If block j is represented by its means, row i is wrong by about P_ij * (value spread_j + key spread_j): P as in
    ``pooled_top_k``, a spread being the root mean square distance of the block's tokens to their mean. The error counts
    every query of the row, and so does the cost, n_i * n_j token pairs; so blocks are ranked by error / n_j.
    Source: the error-aware routing of SVG-EAR, there on clusters of tokens, here on tiles.
    """

    name: ClassVar[str] = "error_routing"

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k largest of each row, bool [B,H,NV,NV]."""
        video = heads.layout.video_blocks
        probability, _ = split_text(heads, block_probabilities(heads))
        spread = block_spread(heads.v, heads.v_means, heads.layout) + block_spread(heads.k, heads.k_means, heads.layout)
        score = probability * (spread / heads.sizes)[:, :, None, video]
        return keep_largest(score, self.count(heads.layout))


def block_spread(x: torch.Tensor, means: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Root mean square distance of each block's tokens to their mean, float32 [B,H,NB] of [B,S,H,D]."""
    b, s, h, _ = x.shape
    rest = x - means.transpose(1, 2)[:, layout.block_of_token.to(x.device)]
    squares = rest.square().sum(-1).transpose(1, 2).reshape(b * h, s, 1)
    return block_means(squares, layout).view(b, h, -1).sqrt()

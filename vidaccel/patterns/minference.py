"""MInference: per head a sink with a window, verticals with slashes, or the largest blocks, whichever holds most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .params import check_count
from .ranking import block_probabilities, keep_largest, split_text
from .registry import register
from .sampled import SampledRows, sample_rows

__all__ = ["MInference"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class MInference(BudgetedPattern):
    """Each head takes the kind of sparsity that holds most of the attention of a few sampled queries.

    With k = ceil(density * NV) blocks a row, the kinds are

    * A-shape: the first ceil(k/2) blocks of the video, and the nearest others up to k;
    * vertical-slash: the ceil(k/2) key blocks and the k - ceil(k/2) displacements between tiles that hold most of the
      sampled attention;
    * block: the k blocks of largest estimated attention in each row, as ``pooled_top_k``.

    A row has at most k blocks: a displacement may lead out of the video, or meet a vertical. Source: MInference, which
    fixes the kind of each head in an offline search at equal FLOPs and samples the last 64 queries. Different here: the
    choice is made in each call; queries are drawn from all over the video, because nothing is causal; slashes are
    displacements in three dimensions; both are whole blocks.

    Args:
        rows: queries that are drawn in each call.
        seed: of the drawing.
    """

    name: ClassVar[str] = "minference"

    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "rows", self.rows)
        check_count(self.name, "seed", self.seed, 0)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The blocks of each head's best kind, bool [B,H,NV,NV]."""
        drawn = sample_rows(heads, self.rows, self.seed)
        mass = _block_mass(heads, drawn)
        kinds = torch.stack([part.expand(*mass.shape[:2], -1, -1) for part in self.kinds(heads, drawn, mass)])
        held = (kinds[:, :, :, drawn.blocks] * mass).sum((-1, -2))
        best = held.argmax(0)
        return kinds.gather(0, best[None, ..., None, None].expand_as(kinds[:1]))[0]

    def kinds(self, heads: Heads, drawn: SampledRows, mass: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The masks to choose from, each bool [B or 1, H or 1, NV, NV], given the mass of sampled rows [B,H,R,NV]."""
        layout = heads.layout
        k = self.count(layout)
        half = -(-k // 2)
        probability, _ = split_text(heads, block_probabilities(heads))
        return (
            _a_shape(layout, half, k, heads.q.device)[None, None],
            _vertical_slash(layout, drawn, mass, half, k - half),
            keep_largest(probability, k),
        )


def _block_mass(heads: Heads, drawn: SampledRows) -> torch.Tensor:
    """Attention of each sampled query to each video block, float32 [B,H,R,NV]."""
    layout = heads.layout
    p = drawn.logits.softmax(-1)
    sums = p.new_zeros(*p.shape[:3], layout.num_blocks)
    return sums.index_add_(-1, layout.block_of_token.to(p.device), p)[..., layout.video_blocks]


@lru_cache(maxsize=32)
def _a_shape(layout: TokenLayout, sinks: int, count: int, device: torch.device) -> torch.Tensor:
    tile = layout.block_coords.double()
    blocks = layout.num_video_blocks
    near = -(tile[:, None] - tile[None]).square().sum(-1)
    near[:, :sinks] = 1.0  # before anything near
    return keep_largest(near, min(count, blocks)).to(device)


@lru_cache(maxsize=32)
def _displacements(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """A number for the displacement between each pair of tiles, int64 [NV,NV]."""
    t, h, w = layout.tile_counts
    apart = layout.block_coords[:, None] - layout.block_coords[None]
    steps = torch.tensor([(2 * h - 1) * (2 * w - 1), 2 * w - 1, 1])
    return ((apart + torch.tensor([t - 1, h - 1, w - 1])) * steps).sum(-1).to(device)


def _vertical_slash(
    layout: TokenLayout, drawn: SampledRows, mass: torch.Tensor, verticals: int, slashes: int
) -> torch.Tensor:
    number = _displacements(layout, mass.device)
    columns = keep_largest(mass.sum(2), verticals)
    t, h, w = layout.tile_counts
    along = mass.new_zeros(*mass.shape[:2], (2 * t - 1) * (2 * h - 1) * (2 * w - 1))
    along.index_add_(-1, number[drawn.blocks].flatten(), mass.flatten(2))
    return columns[:, :, None] | keep_largest(along, slashes)[:, :, number]

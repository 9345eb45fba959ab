"""Patterns that keep pairs of clusters: as blocks of the clusters' own sizes, or rounded out to blocks of one size."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from ..blockmask import BlockMask
from ..layout import TokenLayout
from ..variablemask import VariableBlockMask
from .cluster_order import ClusterOrder, Sorted
from .dynamic import Heads
from .params import check_flag

__all__ = ["ClusterPairs", "cluster_logits", "cover_blocks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterPairs(ClusterOrder):
    """A rule for which clusters of keys each cluster of queries keeps. A subclass gives :meth:`pairs`.

    Args:
        exact: whether blocks are the clusters themselves, of whatever size; text keeps the layout's blocks. Without,
            tokens are sorted the same way but blocks keep the layout's size, and a pair of blocks is kept as soon as it
            holds tokens of a kept pair of clusters: so it runs in every precision and with every compensation, and
            computes more.
        queries, keys, first, later, lined_up: see :class:`ClusterOrder`.

    Raises:
        ConfigError: if a number is out of range.
    """

    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.name, "exact", self.exact)

    @property
    def variable(self) -> bool:
        """With ``exact``."""
        return self.exact

    @abstractmethod
    def pairs(self, heads: Heads, queries: Sorted, keys: Sorted) -> torch.Tensor:
        """Kept pairs of clusters, bool [B,H,Cq,Ck]; ``heads`` are in the order of the clusters."""

    def mask(self, heads: Heads) -> BlockMask | VariableBlockMask:
        """Kept pairs of clusters if ``exact``, else of the layout's blocks."""
        if not self.exact:
            return super().mask(heads)
        queries, keys = self.clusters(heads)
        return _cluster_mask(self.pairs(heads, queries, keys), queries, keys, heads.layout)

    def choose(self, heads: Heads) -> torch.Tensor:
        """Blocks that hold tokens of kept pairs of clusters, bool [B,H,NV,NV]."""
        queries, keys = self.clusters(heads)
        return cover_blocks(self.pairs(heads, queries, keys), queries, keys, heads.layout)

    def blocks(self, layout: TokenLayout) -> str:
        """What the blocks are, for reports."""
        return "as blocks of their own" if self.exact else f"rounded out to {layout.num_video_blocks} blocks"


def cluster_logits(queries: Sorted, keys: Sorted, scale: float) -> torch.Tensor:
    """scale * c_i . c_j + log n_j of centroids c, [...,Cq,Ck]: a softmax over j estimates the attention of clusters."""
    return queries.centroids * scale @ keys.centroids.mT + keys.counts.log()[..., None, :]


def cover_blocks(kept: torch.Tensor, queries: Sorted, keys: Sorted, layout: TokenLayout) -> torch.Tensor:
    """Pairs of blocks that hold tokens of a kept pair of clusters, bool [B,H,NV,NV], from bool [B,H,Cq,Ck]."""
    # kept pairs in any rectangle of clusters, from sums over all that begin in the corner
    sums = torch.zeros(*kept.shape[:2], kept.shape[2] + 1, kept.shape[3] + 1, dtype=torch.int32, device=kept.device)
    held = kept & (queries.counts > 0)[..., None] & (keys.counts > 0)[..., None, :]
    sums[:, :, 1:, 1:] = held.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)
    for axis, side in ((2, queries), (3, keys)):
        first, end = _spans(side, layout)
        shape = list(sums.shape)
        shape[axis] = first.shape[-1]
        first, end = (x.unsqueeze(5 - axis).expand(shape) for x in (first, end))
        sums = sums.gather(axis, end) - sums.gather(axis, first)
    return sums > 0


def _cluster_mask(kept: torch.Tensor, queries: Sorted, keys: Sorted, layout: TokenLayout) -> VariableBlockMask:
    """Clusters as blocks, from kept pairs of them, bool [B,H,Cq,Ck]; text, in the layout's blocks, attends all and is
    attended by all."""
    before, behind = (layout.num_text_blocks, 0) if layout.text_first else (0, layout.num_text_blocks)
    text = layout.block_sizes[layout.text_blocks].to(kept.device).expand(*kept.shape[:2], -1)
    with_text = torch.nn.functional.pad(kept, (before, behind, before, behind), value=True)
    sizes = (torch.cat((text, x.counts) if before else (x.counts, text), dim=-1) for x in (queries, keys))
    return VariableBlockMask(with_text, *sizes)


def _spans(side: Sorted, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The first cluster of each video block and the one behind its last, int64 [B,H,NV] both."""
    ends = side.counts.cumsum(-1)
    start = layout.video_start
    edges = (layout.block_offsets[layout.video_blocks.start : layout.video_blocks.stop + 1] - start).to(ends.device)
    first, last = (x.expand(*ends.shape[:2], -1).contiguous() for x in (edges[:-1], edges[1:] - 1))
    return torch.searchsorted(ends, first, right=True), torch.searchsorted(ends, last, right=True) + 1

"""SVG-EAR on clusters as blocks: pairs of clusters by the error that means would cause, for what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..kernels.variable import variable_means
from ..layout import TokenLayout
from .cluster_order import Sorted, fastest
from .cluster_pairs import ClusterPairs, cluster_logits
from .dynamic import Heads
from .params import check_share
from .ranking import keep_tokens
from .registry import register
from .spread import Groups, spreads

__all__ = ["SvgEar"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class SvgEar(ClusterPairs):
    """Each query cluster keeps the key clusters of largest estimated error per cost. Meant for the pooled tail.

    The error is that of ``error_routing`` (its formula is there), over clusters instead of tiles: what means of keys
    and values would miss if they stood in for a pair, to first order. Clusters are taken by error over tokens, as many
    as come nearest to the share ``density`` of the video's tokens, at least one. Source: SVG-EAR, there with another
    estimate and an exponent that trades area against error; here an exponent of 0, .5 or 1 on the tokens made no
    difference. With ``exact`` blocks are the clusters, as published.

    Measured: relative L2 error of the output with the pooled tail, mean over heads, at .11, .25 and .50 of the token
    pairs, on q, k, v of the shipped small model (one clip, noise .9, .6 and .3, three layers, 2,304 tokens, 20
    iterations):

    - ``error_routing`` on tiles of 64 tokens .234, .152, .075, and on runs of 64 sorted tokens (``clustered``) .158,
      .095, .044;
    - on clusters, exactly: .149, .101, .042 with the published shares, 9 of queries and 30 of keys; .094, .056, .023
      with 36 and 36; .072, .043, .018 with 36 and 72; .065, .039, .016 with 72 and 72.

    So the blocks' borders matter as much as their choice: a run of one length holds the ends of two clusters, whose
    mean serves neither. What it costs: k-means of both sides, as in ``clustered``, and a mean for each key cluster.

    Args:
        aim: share of the video's tokens that a query cluster keeps. Plans call it ``density``.
        exact, queries, keys, first, later, lined_up: see :class:`~.cluster_pairs.ClusterPairs`.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "svg_ear"

    aim: float = field(metadata={"parameter": "density"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "density", self.aim)

    def pairs(self, heads: Heads, queries: Sorted, keys: Sorted) -> torch.Tensor:
        """Kept pairs of clusters, bool [B,H,Cq,Ck]."""
        video, budget = heads.layout.video_tokens, self.aim * heads.layout.grid.tokens
        _, means = fastest(heads.v)
        v_means = variable_means(heads.v[:, video], keys.counts, means)
        queries, keys = (Sorted(*(x.flatten(0, 1) for x in side)) for side in (queries, keys))
        shape = (*v_means.shape[:2], queries.counts.shape[1], keys.counts.shape[1])
        groups = (Groups.sized(side.counts, video) for side in (queries, keys))
        kept = []
        for part, found in spreads(heads, (keys.centroids.view(v_means.shape), v_means), *groups):
            own, others = (Sorted(*(x[part] for x in side)) for side in (queries, keys))
            # text would take the same share of every pair in a row, which changes no order
            probability = cluster_logits(own, others, heads.scale).float().softmax(-1)
            sizes = others.counts[:, None].int()
            worth = found.errors(probability) / sizes.clamp(min=1)
            # nothing is worth less than a cluster without tokens, which must not be the only one of a row
            kept.append(keep_tokens(worth.masked_fill(sizes == 0, -1.0), sizes, budget))
        return torch.cat(kept).view(shape)

    def density(self, layout: TokenLayout) -> float | None:
        """The share aimed at; without ``exact`` it depends on how clusters lie in blocks."""
        return self.aim if self.exact else None

    def resolved(self, layout: TokenLayout) -> str:
        """Clusters and what is kept of them."""
        return f"{self.sizes(layout)}, {self.aim:.1%} of the tokens for each, {self.blocks(layout)}"

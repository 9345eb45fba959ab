"""SVG2: pairs of clusters of queries and keys, instead of pairs of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .cluster_order import Sorted
from .cluster_pairs import ClusterPairs, cluster_logits
from .dynamic import Heads
from .params import check_share
from .ranking import keep_mass
from .registry import register

__all__ = ["Svg2"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Svg2(ClusterPairs):
    """Each query cluster keeps the key clusters that hold a share of its estimated attention.

    P_ij = n_j exp(scale * c_i . c_j) / sum, with centroids c and n_j tokens of key cluster j. Sorted by P, those are
    kept before which less than or exactly ``mass`` has been held, and in any case the first int(``least`` * Ck).
    Source: SVG2 (Sparse VideoGen2), which is ``exact``.

    Measured: relative L2 error of the output with the pooled tail, mean over heads, on q, k, v of the shipped small
    model (one clip, noise .9, .6 and .3, three layers, 2,304 tokens in blocks of 64, 20 iterations). With the published
    shares, 9 and 30 clusters, kept pairs of clusters hold .54 of the token pairs, and their blocks .65 (.71 as
    numbered); the error is .096 over clusters and .092 over blocks, where as many pairs in tiles have .090 by
    ``pooled_top_k`` and .063 by ``error_routing``. With a cluster to each block it is .51 of the pairs, .69 in blocks
    (.78 as numbered); .058 over clusters, where tiles have .097 and .068, and .038 over blocks. So many small clusters,
    exactly, are better than tiles; chosen by error instead of mass they are better still, .023 at .50: see
    :class:`~.svg_ear.SvgEar`.

    Args:
        mass: share of the attention to hold before no more is added.
        least: share of the key clusters that are always kept, rounded down.
        exact, queries, keys, first, later, lined_up: see :class:`~.cluster_pairs.ClusterPairs`.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "svg2"

    mass: float = 0.9
    least: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "mass", self.mass)
        check_share(self.name, "least", self.least, zero=True)

    def pairs(self, heads: Heads, queries: Sorted, keys: Sorted) -> torch.Tensor:
        """Kept pairs of clusters, bool [B,H,Cq,Ck]."""
        probability = cluster_logits(queries, keys, heads.scale).softmax(-1)
        least = int(self.least * keys.counts.shape[-1] + 1e-9)  # .1 * 30 is 2.999 in floats
        return keep_mass(probability, self.mass, least=least, count="beyond")

    def resolved(self, layout: TokenLayout) -> str:
        """Clusters and what is kept of them."""
        kept = f"{self.mass:g} of the attention between them, at least {self.least:.0%} of the keys'"
        return f"{self.sizes(layout)}, {kept}, {self.blocks(layout)}"

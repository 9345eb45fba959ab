"""Any pattern that goes by queries and keys alone, over blocks of tokens sorted by clusters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .cluster_order import ClusterOrder
from .dynamic import DynamicPattern, Heads
from .registry import register

__all__ = ["Clustered"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Clustered(ClusterOrder):
    """Another pattern's blocks, where a block is not a tile but a run of tokens sorted by cluster.

    With ``error_routing`` and the pooled tail this is near SVG-EAR, whose blocks are the clusters themselves, of any
    size. That is :class:`~.svg_ear.SvgEar`, which has .6 of the error or less with as many clusters; this runs in every
    precision and with every compensation.

    Measured: relative L2 error of the output with the pooled tail, mean over heads, at .11, .25 and .50 of the blocks,
    on q, k, v of the shipped small model (one clip, noise .9, .6 and .3, three layers, 2,304 tokens in blocks of 64,
    20 iterations):

    - ``error_routing`` over tiles .234, .152, .075; over a cluster to each block .158, .095, .044 (.195 at .11 as
      numbered); over 9 and 30 clusters, the published shares, .173, .116, .051;
    - ``pooled_top_k`` over tiles .269, .183, .110; over a cluster to each block .212, .155, .093.

    A smaller error of attention made no better video: in two generations of 12 steps with ``error_routing`` and 8 of 36
    blocks, latent errors are .291 and .350 over clusters, .194 and .341 over tiles. Clusters serve heads where tiles
    have up to five times their error, and harm those that tiles serve well. With each head on whichever of the two has
    the smaller error in the first sparse step, the first clip's is .192. So choose head by head, by measurement.

    What it costs: two iterations with a cluster to each block of n tokens take 4/n of the products of dense attention
    (2/n by the Triton kernels), and q, k, v and the output are each copied once. On a CPU that is .7 of the time of
    dense attention over these 2,304 tokens, more than sparsity saves there. It has not been timed on a GPU.

    Args:
        pattern: what chooses the blocks, by queries and keys alone and without remembering: blocks hold other tokens in
            the next step.
        queries, keys, first, later, lined_up: see :class:`ClusterOrder`.

    Raises:
        ConfigError: if a number is out of range, or the pattern goes by places or remembers.
    """

    name: ClassVar[str] = "clustered"

    pattern: DynamicPattern

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.pattern
        if not isinstance(inner, DynamicPattern) or inner.places != "nothing" or inner.stateful:
            raise ConfigError(
                f"{self.name}: pattern is {inner!r}; give one that goes by queries and keys alone and remembers"
                " nothing, such as pooled_top_k or error_routing"
            )

    def choose(self, heads: Heads) -> torch.Tensor:
        """The inner pattern's blocks, bool [B,H,NV,NV]."""
        self.clusters(heads)  # refuses heads that are not sorted
        return self.pattern.choose(replace(heads, memory={}))

    def density(self, layout: TokenLayout) -> float | None:
        """That of the inner pattern."""
        return self.pattern.density(layout)

    def resolved(self, layout: TokenLayout) -> str:
        """Clusters and the pattern inside."""
        return f"tokens sorted by {self.sizes(layout)}, {self.pattern.name} ({self.pattern.resolved(layout)})"

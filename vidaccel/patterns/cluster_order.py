"""Tokens of each head sorted by k-means clusters of its queries and of its keys: the order that SVG2 computes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..errors import LayoutError
from ..kernels import kmeans
from ..kernels import triton as triton_kernels
from ..kernels.contract import KernelRequest
from ..kernels.failures import or_else
from ..layout import TokenLayout
from ..types import PRECISIONS
from .dynamic import DynamicPattern, HeadOrder, Heads
from .params import Extent, check_count, check_extent, check_flag, resolve

__all__ = ["ClusterOrder", "Sorted", "fastest"]

_Cluster = Callable[[torch.Tensor, torch.Tensor | int, int], kmeans.Clusters]

#: Power iterations for the axis along which clusters are lined up; only neighbourhoods need to come out.
_TURNS = 12


class Sorted(NamedTuple):
    """The clusters of one side, queries or keys, in the order in which their tokens stand.

    Attributes:
        centroids: [B,H,K,D].
        counts: int64 [B,H,K], tokens of each, possibly none.
    """

    centroids: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterOrder(DynamicPattern):
    """A pattern over tokens sorted by clusters: what SVG2 and its kin share.

    Queries and keys of each head and sample, after norms and RoPE, go into clusters of their own by Euclidean k-means.
    The first call of a generation begins with evenly spaced tokens and takes ``first`` iterations, each later one
    begins with the centroids of the call before and takes ``later``. Text is left out and stays where it is. Blocks are
    the layout's, so their borders need not be those of clusters, unless a pattern says otherwise.

    Args:
        queries, keys: clusters of each head; whole numbers, fractions of the video's tokens, so that a plan carries to
            other grids, or ``None`` for one to each block. Published: 300 and 1000 on Wan, of 75600 tokens at 720p.
        first, later: iterations of k-means.
        lined_up: whether clusters are put in the order of their centroids along the axis of largest variance, so that
            a block which holds parts of several holds similar ones; else they stand as k-means numbered them.

    Raises:
        ConfigError: if a number is out of range.
    """

    stateful: ClassVar[bool] = True
    sorts_by_content: ClassVar[bool] = True

    queries: Extent | None = None
    keys: Extent | None = None
    first: int = 50
    later: int = 2
    lined_up: bool = True

    def __post_init__(self) -> None:
        for field in ("queries", "keys"):
            if getattr(self, field) is not None:
                check_extent(self.name, field, getattr(self, field))
        check_count(self.name, "first", self.first)
        check_count(self.name, "later", self.later)
        check_flag(self.name, "lined_up", self.lined_up)

    def order(self, heads: Heads) -> HeadOrder:
        """Queries by query cluster, keys and values by key cluster; leaves both for :meth:`clusters`."""
        layout = heads.layout
        video = layout.video_tokens
        sides = []
        for name, x, count in (("q", heads.q, self.queries), ("k", heads.k, self.keys)):
            found = _cluster(x[:, video], _count(count, layout), heads.memory, name, self.first, self.later)
            sides.append(_line_up(found) if self.lined_up else _as_numbered(found))
        # for choose(), which follows in the same call and takes it out again
        heads.memory["sorted"] = tuple(side for side, _ in sides)
        return HeadOrder(*(_with_text(tokens, layout) for _, tokens in sides))

    def clusters(self, heads: Heads) -> tuple[Sorted, Sorted]:
        """Those of queries and of keys that :meth:`order` has just found, once.

        Raises:
            LayoutError: if it has not been asked in this call.
        """
        if "sorted" not in heads.memory:
            raise LayoutError(
                f"{self.name} was asked for blocks before its order; call order() on the same heads first"
            )
        found: tuple[Sorted, Sorted] = heads.memory.pop("sorted")
        return found

    def sizes(self, layout: TokenLayout) -> str:
        """The numbers of clusters, for reports."""
        queries, keys = (_count(count, layout) for count in (self.queries, self.keys))
        return f"{queries} query and {keys} key clusters"


def _count(clusters: Extent | None, layout: TokenLayout) -> int:
    return layout.num_video_blocks if clusters is None else resolve(clusters, layout.grid.tokens)


def _cluster(x: torch.Tensor, count: int, memory: dict[str, Any], name: str, first: int, later: int) -> kmeans.Clusters:
    """K-means from the centroids in memory, where they fit, with what runs fastest here."""
    before = memory.get(name)
    fits = before is not None and before.shape == (x.shape[0], x.shape[2], count, x.shape[3])
    warm = before.to(x.device) if before is not None and fits else None
    cluster, _ = fastest(x)
    found = cluster(x, count, first) if warm is None else cluster(x, warm, later)
    memory[name] = found.centroids.to(x.dtype)  # k-means rounds them to it anyway, and every layer keeps its own
    return found


def fastest(x: torch.Tensor) -> tuple[_Cluster, kmeans.Means]:
    """The k-means and the means of clusters that run fastest where x is."""
    if triton_kernels.why_not(KernelRequest.of(x, PRECISIONS["native"])) is not None:
        return kmeans.cluster, kmeans.means
    from ..kernels.triton.kmeans import cluster, means

    key = (x.device, x.dtype, x.shape[-1])
    return or_else("k-means", key, cluster, kmeans.cluster), or_else("means", key, means, kmeans.means)


def _as_numbered(found: kmeans.Clusters) -> tuple[Sorted, torch.Tensor]:
    """Clusters as k-means numbered them, and the video token at each place, int64 [B,H,V]."""
    return Sorted(found.centroids, found.counts.long()), found.order


def _line_up(found: kmeans.Clusters) -> tuple[Sorted, torch.Tensor]:
    """The same with clusters in the order of their centroids along the axis in which those of all tokens vary most."""
    counts = found.counts.to(found.centroids.dtype).unsqueeze(-1)
    mean = (found.centroids * counts).sum(-2, keepdim=True) / counts.sum(-2, keepdim=True)
    centred = (found.centroids - mean) * counts.sqrt()
    spread = centred.mT @ centred
    widest = spread.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    axis = spread.gather(-1, widest.expand(*spread.shape[:-1], 1))
    for _ in range(_TURNS):
        axis = torch.nn.functional.normalize(spread @ axis, dim=-2)
    rank = (found.centroids @ axis).squeeze(-1).argsort(dim=-1, stable=True)
    place = torch.empty_like(rank).scatter_(-1, rank, torch.arange(rank.shape[-1], device=rank.device).expand_as(rank))
    tokens = place.gather(-1, found.labels.long()).argsort(dim=-1, stable=True)
    centroids = found.centroids.gather(2, rank[..., None].expand_as(found.centroids))
    return Sorted(centroids, found.counts.long().gather(-1, rank)), tokens


def _with_text(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Places of the whole sequence, int64 [B,H,S], from those of video tokens among themselves."""
    index = torch.arange(layout.tokens, device=tokens.device).repeat(*tokens.shape[:2], 1)
    index[..., layout.video_tokens] = tokens + layout.video_start
    return index

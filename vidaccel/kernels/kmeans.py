"""Batched k-means over the tokens of each head, in torch operations: any device, any floating dtype, deterministic.

SVG2 (Sparse VideoGen2) clusters q and k of each head after RoPE, so that tokens that attend alike become blocks; it
starts each denoising step from the centroids of the step before. As in its flash-kmeans, one iteration is Lloyd's, in
the form that needs no distances::

    label_s = argmax over k of  x_s . c_k - |c_k|^2 / 2      the nearest centroid: the same as argmin of |x_s - c_k|^2
    c_k     = mean of the x_s whose label is k               a cluster without tokens keeps its centroid

:func:`cluster` takes the two halves as arguments, so that kernels for them share everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import ConfigError, LayoutError

__all__ = ["Assign", "Clusters", "Means", "assign", "cluster", "evenly_spaced", "means", "sort_by_label"]

#: Most scores held at once, over batch, heads, tokens and centroids; longer sequences are cut.
_MAX_SCORES = 1 << 24


class Clusters(NamedTuple):
    """The tokens of each head in K clusters.

    Attributes:
        labels: int32 [B,H,S], cluster of each token, 0 to K - 1.
        centroids: [B,H,K,D], mean of each cluster's tokens, or where it has none its centroid of before; float32,
            float64 for float64 tokens.
        counts: int32 [B,H,K], tokens of each cluster, possibly none.
        order: int64 [B,H,S], the tokens cluster by cluster, ascending within each: row ``order[..., i]`` of the
            sequence is row i of the clustered one, and cluster k has ``counts[..., k]`` rows there.
    """

    labels: torch.Tensor
    centroids: torch.Tensor
    counts: torch.Tensor
    order: torch.Tensor


#: x [B,S,H,D] and centroids [B,H,K,D] to labels; see :func:`assign`.
Assign = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: x, order, offsets and centroids to new centroids; see :func:`means`.
Means = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def evenly_spaced(x: torch.Tensor, clusters: int) -> torch.Tensor:
    """Initial centroids: tokens at even distances, the middle of each K-th of the sequence.

    Args:
        x: [B,S,H,D], any strides.
        clusters: K, 1 to S.

    Returns:
        [B,H,K,D], float32 or float64 as :class:`Clusters` has it.

    Raises:
        LayoutError: if ``x`` is not [B,S,H,D].
        ConfigError: if there are fewer tokens than clusters.
    """
    _check(x)
    tokens = x.shape[1]
    if not 1 <= clusters <= tokens:
        raise ConfigError(f"{clusters} clusters were asked of {tokens} tokens; ask for 1 to {tokens}")
    at = (2 * torch.arange(clusters, device=x.device) + 1) * tokens // (2 * clusters)
    return x[:, at].transpose(1, 2).to(_wide(x)).contiguous()


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each token, the first where scores are equal.

    Args:
        x: [B,S,H,D], any strides, finite.
        centroids: [B,H,K,D]. Distances are to centroids rounded to x's dtype, for that is what tensor cores multiply.

    Returns:
        int32 [B,H,S].
    """
    wide = _wide(x)
    centres = centroids.to(x.dtype).to(wide)
    half = centres.square().sum(-1, keepdim=True).mT / 2
    batch, tokens, heads, _ = x.shape
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    for rows in _chunks(x, centroids):
        scores = x[:, rows].transpose(1, 2).to(wide) @ centres.mT - half
        labels[..., rows] = scores.argmax(-1).int()
    return labels


def sort_by_label(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens cluster by cluster: ``order`` as :class:`Clusters` has it, and ``offsets`` int32 [B,H,K+1], the first row
    of each cluster and, last, S."""
    ordered, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(clusters + 1, dtype=labels.dtype, device=labels.device)
    edges = edges.expand(*labels.shape[:2], -1).contiguous()
    return order, torch.searchsorted(ordered, edges, out_int32=True)


def means(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Mean of each cluster's tokens, and the old centroid where it has none.

    As products with matrices of zeros and ones, which unlike scattered additions always add in one order.

    Args:
        x: [B,S,H,D], any strides, finite.
        order, offsets: from :func:`sort_by_label`.
        centroids: [B,H,K,D].

    Returns:
        [B,H,K,D] like ``centroids``.
    """
    wide = _wide(x)
    sums = torch.zeros(centroids.shape, dtype=wide, device=x.device)
    position = torch.arange(x.shape[1], device=x.device)
    for rows in _chunks(x, centroids):
        index = order[..., rows].transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        member = (position[rows] >= offsets[..., :-1, None]) & (position[rows] < offsets[..., 1:, None])
        sums += member.to(wide) @ x.gather(1, index).transpose(1, 2).to(wide)
    counts = offsets.diff(dim=-1).unsqueeze(-1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids).to(centroids.dtype)


@torch.no_grad()
def cluster(
    x: torch.Tensor,
    centroids: torch.Tensor | int,
    iterations: int,
    *,
    assign: Assign = assign,
    means: Means = means,
) -> Clusters:
    """K-means over the tokens of each head (SVG2; flash-kmeans), a fixed number of iterations without waiting for
    the device.

    Every result belongs to the last assignment: centroids are the means of the clusters that ``labels`` describe. No
    gradient goes through it.

    Args:
        x: [B,S,H,D], any strides, finite.
        centroids: where to start: [B,H,K,D], the centroids of the step before (SVG2's warm start), or K for
            :func:`evenly_spaced` tokens. It is not changed.
        iterations: assignments, each followed by new means; at least 1.
        assign, means: what computes them.

    Raises:
        LayoutError: if ``x`` is not [B,S,H,D] with some tokens, or centroids do not fit it.
        ConfigError: if there are fewer tokens than clusters, or no iterations.
    """
    _check(x)
    if iterations < 1:
        raise ConfigError(f"k-means was asked for {iterations} iterations; it needs at least 1")
    if isinstance(centroids, int):
        centroids = evenly_spaced(x, centroids)
    batch, _, heads, channels = x.shape
    fits = centroids.dim() == 4 and (*centroids.shape[:2], centroids.shape[3]) == (batch, heads, channels)
    if not fits or not centroids.shape[2]:
        raise LayoutError(
            f"centroids are {tuple(centroids.shape)}, but tokens {tuple(x.shape)} want"
            f" [{batch},{heads},K,{channels}]; start anew with a number of clusters"
        )
    if centroids.device != x.device:
        raise ConfigError(f"centroids are on {centroids.device} and tokens on {x.device}; move them to one device")
    centroids = centroids.to(_wide(x))
    for _ in range(iterations):
        labels = assign(x, centroids)
        order, offsets = sort_by_label(labels, centroids.shape[2])
        centroids = means(x, order, offsets, centroids)
    return Clusters(labels, centroids, offsets.diff(dim=-1), order)


def _check(x: torch.Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point() or not x.numel():
        raise LayoutError(f"x is {x.dtype} {tuple(x.shape)}; k-means wants floating [B,S,H,D] with none of them zero")


def _wide(x: torch.Tensor) -> torch.dtype:
    """What sums are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: torch.Tensor, centroids: torch.Tensor) -> list[slice]:
    """Ranges of tokens whose scores against all centroids may be held at once."""
    step = max(1, min(_MAX_SCORES, x.numel()) // centroids[..., 0].numel())
    return [slice(first, min(first + step, x.shape[1])) for first in range(0, x.shape[1], step)]

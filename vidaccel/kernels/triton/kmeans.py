"""Batched k-means over the tokens of each head: the two halves of an iteration as kernels.

Clusters of q and k are what SVG2 (Sparse VideoGen2) makes blocks of, and its flash-kmeans is where the two ideas come
from: the assignment walks the centroids with a running maximum instead of a matrix of all distances, and the means are
sums over runs of tokens sorted by label. Here each cluster is summed by one program in one order, so there are no
atomics and results repeat to the last bit. The torch version is :mod:`vidaccel.kernels.kmeans`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import KernelError
from .. import kmeans
from ..kmeans import Clusters
from .launch import FLOAT32_PRODUCT

__all__ = ["assign", "assignment_sizes", "cluster", "cluster_means", "means", "nearest_centroid"]

#: Channels that the product takes at a time where a token's do not all fit into registers.
_CHANNELS = 32
#: Rows of a cluster that are read at a time.
_ROWS = 32

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def nearest_centroid(
    # x [B,S,H,D]; centroids [B,H,K,D] in x's dtype and half their squared lengths float32 [B,H,K], contiguous;
    # labels int32 [B,H,S], contiguous
    x,
    centroids,
    half,
    labels,
    # strides in elements
    x_batch,
    x_row,
    x_head,
    x_channel,
    tokens,
    heads,
    clusters,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    FLOAT32_PRODUCT: tl.constexpr,
):
    """``TOKENS`` tokens of one head against all its centroids."""
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, CENTROIDS)
    x_rows = x + b * x_batch + h * x_head + row * x_row
    of_head = centroids + head * clusters * D
    half_of_head = half + head * clusters
    if CHANNELS == BLOCK_D:
        queries = _channels(x_rows, row < tokens, x_channel, 0, D, CHANNELS)

    # One maximum for each column of a step, and only at the end one for the row: a comparison for each score is all
    # that the loop adds to the product.
    best = tl.full([TOKENS, CENTROIDS], float("-inf"), tl.float32)
    found = tl.zeros([TOKENS, CENTROIDS], tl.int32)
    for first in range(0, clusters, CENTROIDS):
        here = first + column
        real = here < clusters
        rows = of_head + here * D
        if CHANNELS == BLOCK_D:
            scores = tl.dot(queries, _channels(rows, real, 1, 0, D, CHANNELS).T, input_precision=FLOAT32_PRODUCT)
        else:
            scores = tl.zeros([TOKENS, CENTROIDS], tl.float32)
            for channel in range(0, D, CHANNELS):
                part = _channels(x_rows, row < tokens, x_channel, channel, D, CHANNELS)
                tile = _channels(rows, real, 1, channel, D, CHANNELS)
                scores = tl.dot(part, tile.T, scores, input_precision=FLOAT32_PRODUCT)
        # past the last centroid the score is -inf
        scores -= tl.load(half_of_head + here, mask=real, other=float("inf"))[None, :]
        better = scores > best  # not where equal: the first of equals stays
        best = tl.where(better, scores, best)
        found = tl.where(better, first, found)

    top = tl.max(best, 1)
    # a row of NaN is never better, so its maxima stay -inf and its label is 0: labels are addresses later on
    label = tl.min(tl.where(best == top[:, None], found + column[None, :], 2147483647), 1)
    tl.store(labels + head * tokens + row, label, mask=row < tokens)


@triton.jit
def _channels(rows, real, stride, first, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels ``first`` to ``first + CHANNELS`` of the rows at pointers ``rows`` [R], with zeros where there are none:
    [R, CHANNELS]."""
    channel = first + tl.arange(0, CHANNELS)
    wide = channel.to(tl.int64)  # channels may be the outermost axis in memory
    return tl.load(rows[:, None] + wide[None, :] * stride, mask=real[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def cluster_means(
    # x [B,S,H,D]; old and new centroids float32 [B,H,K,D], contiguous
    x,
    old,
    new,
    # tokens by cluster int64 [B,H,S], and the first row of each cluster int32 [B,H,K+1], contiguous
    order,
    offsets,
    # strides in elements
    x_batch,
    x_row,
    x_head,
    x_channel,
    tokens,
    heads,
    clusters,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One cluster of one head."""
    cluster = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    edges = offsets + head * (clusters + 1) + cluster
    first = tl.load(edges)
    last = tl.load(edges + 1)
    channel = tl.arange(0, BLOCK_D)
    real = channel < D
    x_of_head = x + b * x_batch + h * x_head + channel[None, :].to(tl.int64) * x_channel

    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < last
        token = tl.load(order + head * tokens + row, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & real[None, :]
        total += tl.load(x_of_head + token[:, None] * x_row, mask=mask, other=0.0).to(tl.float32)

    at = (head * clusters + cluster) * D + channel
    kept = tl.load(old + at, mask=real, other=0.0)
    mean = tl.where(first == last, kept, tl.sum(total, 0) / tl.maximum(last - first, 1))
    tl.store(new + at, mean, mask=real)


def assignment_sizes(dtype: torch.dtype, channels: int) -> dict[str, int]:
    """How to launch :func:`nearest_centroid`: what passes the gate on every architecture, never timed.

    Three tf32 products hold each operand twice, so float32 takes less at a time.
    """
    wide = dtype == torch.float32
    block = max(16, triton.next_power_of_2(channels))
    whole = block <= (64 if wide else 128)
    return {
        "BLOCK_D": block,
        "CHANNELS": block if whole else _CHANNELS,
        "TOKENS": 64 if wide else 128,
        "CENTROIDS": 32 if wide else 64,
        "num_warps": 8,
        "num_stages": 2 if wide else 3,
    }


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each token, the first where scores are equal.

    Args:
        x: [B,S,H,D] in bf16, fp16 or float32, any strides; tokens with NaN get label 0.
        centroids: [B,H,K,D]. Distances are to centroids rounded to x's dtype, for that is what tensor cores multiply;
            the products are added in float32, and float32 inputs are three tf32 products.

    Returns:
        int32 [B,H,S].

    Raises:
        KernelError: for another dtype.
    """
    _check(x)
    batch, tokens, heads, channels = x.shape
    centres = centroids.to(x.dtype).contiguous()
    half = centres.float().square().sum(-1) / 2
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    sizes = assignment_sizes(x.dtype, channels)
    nearest_centroid[(triton.cdiv(tokens, sizes["TOKENS"]), batch * heads)](
        x,
        centres,
        half,
        labels,
        *x.stride(),
        tokens,
        heads,
        centroids.shape[2],
        D=channels,
        FLOAT32_PRODUCT=FLOAT32_PRODUCT,
        **sizes,
    )
    return labels


def means(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Mean of each cluster's tokens in float32, and the old centroid where it has none.

    One program sums one cluster, so the largest cluster decides how long it takes.

    Args:
        x: [B,S,H,D] in bf16, fp16 or float32, any strides.
        order, offsets: from :func:`vidaccel.kernels.kmeans.sort_by_label`.
        centroids: float32 [B,H,K,D].

    Returns:
        float32 [B,H,K,D].

    Raises:
        KernelError: for another dtype.
    """
    _check(x)
    batch, tokens, heads, channels = x.shape
    clusters = centroids.shape[2]
    new = torch.empty(batch, heads, clusters, channels, dtype=torch.float32, device=x.device)
    cluster_means[(clusters, batch * heads)](
        x,
        centroids.contiguous(),
        new,
        order.contiguous(),
        offsets.contiguous(),
        *x.stride(),
        tokens,
        heads,
        clusters,
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        ROWS=_ROWS,
        num_warps=4,
    )
    return new


def cluster(x: torch.Tensor, centroids: torch.Tensor | int, iterations: int) -> Clusters:
    """K-means over the tokens of each head by the kernels (SVG2; flash-kmeans).

    Arguments, result and errors as :func:`vidaccel.kernels.kmeans.cluster` has them, for bf16, fp16 and float32.

    Raises:
        KernelError: for another dtype.
    """
    return kmeans.cluster(x, centroids, iterations, assign=assign, means=means)


def _check(x: torch.Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise KernelError(
            f"k-means kernels do not run in {x.dtype}, only in {', '.join(map(str, _DTYPES))}; use"
            " vidaccel.kernels.kmeans"
        )

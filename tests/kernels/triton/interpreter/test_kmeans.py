"""The k-means kernels on the interpreter, against distances and means in float64."""

from __future__ import annotations

import pytest
import torch

from vidaccel.errors import KernelError
from vidaccel.kernels import kmeans as oracle
from vidaccel.kernels.kmeans import evenly_spaced, sort_by_label
from vidaccel.kernels.triton.kmeans import assign, cluster, means

EPS = torch.finfo(torch.float32).eps

#: batch, tokens, heads, channels, clusters, dtype: less than a tile of each, and more than one.
CASES = [
    (2, 157, 3, 64, 70, torch.bfloat16),
    (1, 64, 1, 128, 64, torch.float16),
    (1, 200, 1, 96, 5, torch.float32),
    (2, 33, 3, 20, 1, torch.float32),
    (1, 130, 2, 8, 129, torch.bfloat16),
    (1, 40, 1, 160, 9, torch.bfloat16),
]


def tokens(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[B,S,H,D] with a mean, as keys have one, and no contiguous axis."""
    return (torch.randn(dim, heads, batch, length, 2)[..., 0] + 0.7).to(dtype).permute(2, 3, 1, 0)


def scores(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """x.c - |c|^2 / 2, largest where the distance is smallest; float64 [B,H,S,K]."""
    centres = centroids.to(x.dtype).double()
    return x.double().transpose(1, 2) @ centres.mT - centres.square().sum(-1).unsqueeze(-2) / 2


def slack(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """How far a float32 score may be off, [B,H,S,1].

    D products are added, D squares are added, and their difference is rounded: each addition is off by at most EPS of
    a partial sum, which |x| |c| and |c|^2 / 2 bound.
    """
    longest = centroids.to(x.dtype).double().norm(dim=-1).amax(-1)[..., None, None]
    length = x.double().norm(dim=-1).transpose(1, 2).unsqueeze(-1)
    return (x.shape[-1] + 1) * EPS * (length * longest + longest**2 / 2)


def assert_nearest(labels: torch.Tensor, x: torch.Tensor, centroids: torch.Tensor) -> None:
    """The token's centroid is the nearest, but for what rounding both scores may hide."""
    exact = scores(x, centroids)
    assert labels.dtype == torch.int32 and labels.shape == exact.shape[:-1]
    chosen = exact.gather(-1, labels.long().unsqueeze(-1))
    assert (exact.amax(-1, keepdim=True) - chosen <= 2 * slack(x, centroids)).all()


@pytest.mark.parametrize(("batch", "length", "heads", "dim", "clusters", "dtype"), CASES)
def test_nearest_centroid(batch: int, length: int, heads: int, dim: int, clusters: int, dtype: torch.dtype) -> None:
    x = tokens(batch, length, heads, dim, dtype)
    centroids = torch.randn(batch, heads, clusters, dim) + 0.7
    labels = assign(x, centroids)
    assert_nearest(labels, x, centroids)
    theirs = oracle.assign(x, centroids)
    assert_nearest(theirs, x, centroids)
    # random tokens are rarely between two centroids, so a wrong kernel cannot hide behind the slack
    assert (labels == theirs).double().mean() > 0.99


@pytest.mark.representative
def test_the_first_of_equals_is_taken() -> None:
    """Within a step of the kernel and between steps; scores are small whole numbers, so nothing is rounded."""
    x = torch.randint(-4, 5, (1, 90, 2, 16)).bfloat16()
    few = torch.randint(-4, 5, (1, 2, 7, 16)).float()
    for repeats in (2, 30):
        centroids = few.repeat(1, 1, repeats, 1)
        labels = assign(x, centroids)
        assert torch.equal(labels, scores(x, centroids).argmax(-1).int())
        assert labels.max() < 7


def test_nan_has_a_label_too() -> None:
    """Labels are addresses later on, so they are in range whatever the tokens hold."""
    x = tokens(1, 70, 1, 16, torch.float32)
    x[0, 3] = torch.nan
    centroids = torch.randn(1, 1, 3, 16)
    labels = assign(x, centroids)
    assert labels[0, 0, 3] == 0
    rest = torch.arange(70) != 3
    assert_nearest(labels[..., rest], x[:, rest], centroids)


@pytest.mark.parametrize(("batch", "length", "heads", "dim", "clusters", "dtype"), CASES)
def test_means(batch: int, length: int, heads: int, dim: int, clusters: int, dtype: torch.dtype) -> None:
    clusters = min(clusters, 7)  # a program each, whatever their number
    x = tokens(batch, length, heads, dim, dtype)
    labels = torch.randint(0, clusters, (batch, heads, length), dtype=torch.int32)
    labels[labels == clusters // 2] = 0  # an empty cluster, and a large one
    old = torch.randn(batch, heads, clusters, dim)
    order, offsets = sort_by_label(labels, clusters)
    new = means(x, order, offsets, old)
    exact = oracle.means(x.double(), order, offsets, old.double())
    # n roundings of sums of at most n times the largest, divided by n
    assert new.dtype == torch.float32
    assert (new - exact).abs().max() <= (int(offsets.diff().max()) + 1) * EPS * float(x.abs().max())
    if clusters > 1:
        assert torch.equal(new[:, :, clusters // 2], old[:, :, clusters // 2])


@pytest.mark.representative
def test_clusters() -> None:
    """Every assignment is right for the centroids it saw, every mean for the labels it saw."""
    x = tokens(2, 100, 2, 32, torch.bfloat16)
    before = evenly_spaced(x, 9)
    for n in range(1, 4):
        labels, centroids, counts, order = cluster(x, 9, n)
        assert_nearest(labels, x, before)
        same = sort_by_label(labels, 9)
        assert torch.equal(order, same[0]) and torch.equal(counts, same[1].diff())
        exact = oracle.means(x.double(), *same, before.double())
        assert (centroids - exact).abs().max() <= 101 * EPS * float(x.abs().max())
        before = centroids
    again = cluster(x, cluster(x, 9, 1).centroids, 2)
    assert torch.equal(again.labels, labels) and torch.equal(again.centroids, centroids)


def test_centroids_of_any_strides_and_part_of_the_tokens() -> None:
    """Video tokens of a sequence with text in front, one head after the other in memory."""
    whole = tokens(1, 80, 2, 64, torch.float16)
    x = whole[:, 13:]
    start = torch.randn(64, 2, 1, 6).permute(2, 1, 3, 0)
    found, same = cluster(x, start, 2), cluster(x.contiguous(), start.contiguous(), 2)
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(KernelError, match="do not run in torch.float64"):
        cluster(torch.zeros(1, 4, 1, 16, dtype=torch.float64), 2, 1)

"""K-means in torch, against distances and means written out."""

from __future__ import annotations

import pytest
import torch

from vidaccel.errors import ConfigError, LayoutError
from vidaccel.kernels import kmeans
from vidaccel.kernels.kmeans import Clusters, assign, cluster, evenly_spaced, means, sort_by_label

#: Two batches, three heads, 37 tokens: nothing divides anything.
SHAPE = (2, 37, 3, 8)


def tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[B,S,H,D] with no contiguous axis."""
    batch, length, heads, dim = SHAPE
    return torch.randn(dim, heads, batch, length, 2).to(dtype)[..., 0].permute(2, 3, 1, 0)


def distances(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Squared, float64 [B,H,S,K]."""
    return (x.double().transpose(1, 2).unsqueeze(-2) - centroids.double().unsqueeze(2)).square().sum(-1)


def mean_of(x: torch.Tensor, labels: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Cluster by cluster."""
    new = old.clone()
    for b, h, k in torch.cartesian_prod(*map(torch.arange, old.shape[:3])).tolist():
        members = x[b, labels[b, h] == k, h]
        if len(members):
            new[b, h, k] = members.to(old.dtype).mean(0)
    return new


@pytest.fixture(params=[1 << 24, 1, 2 * 3 * 5 * 10], ids=["at once", "one by one", "ten by ten"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_MAX_SCORES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("count", [1, 5])
def test_each_token_goes_to_the_nearest(count: int) -> None:
    x, centroids = tokens(), torch.randn(2, 3, count, 8, dtype=torch.float64)
    labels = assign(x, centroids)
    assert labels.dtype == torch.int32
    assert torch.equal(labels.long(), distances(x, centroids).argmin(-1))


def test_the_first_of_equals_is_taken() -> None:
    """Small whole numbers, so that equal scores are equal to the last bit."""
    x = tokens().round()
    centroids = torch.randn(2, 3, 2, 8, dtype=torch.float64).round().repeat(1, 1, 3, 1)
    assert assign(x, centroids).max() == 1


def test_distances_are_to_the_rounded_centroids() -> None:
    """1 + 2^-10 is 1 in bf16, so both centroids are the same there, and the first is taken."""
    x = torch.ones(1, 4, 1, 16)
    centroids = torch.ones(1, 1, 2, 16)
    centroids[:, :, 0] += 2**-10
    assert assign(x, centroids).unique().tolist() == [1]
    assert assign(x.bfloat16(), centroids).unique().tolist() == [0]


@pytest.mark.usefixtures("_chunks")
def test_means_of_sorted_tokens() -> None:
    x = tokens()
    labels = torch.randint(0, 4, (2, 3, 37), dtype=torch.int32)
    labels[labels == 2] = 4  # cluster 2 is empty
    old = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    order, offsets = sort_by_label(labels, 5)
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets.diff().long(), torch.nn.functional.one_hot(labels.long(), 5).sum(-2))
    new = means(x, order, offsets, old)
    torch.testing.assert_close(new, mean_of(x, labels, old))
    assert torch.equal(new[:, :, 2], old[:, :, 2])


def check(x: torch.Tensor, result: Clusters) -> None:
    """The parts of a result belong together."""
    labels, centroids, counts, order = result
    assert torch.equal(order.sort(-1).values, torch.arange(x.shape[1]).expand_as(order))
    ordered = labels.gather(-1, order)
    assert (ordered.diff() >= 0).all()
    ascending = order.diff() > 0
    assert (ascending | (ordered.diff() > 0)).all(), "within a cluster tokens keep their order"
    runs = torch.stack(
        [torch.repeat_interleave(torch.arange(counts.shape[-1]), n) for n in counts.flatten(0, 1)]
    ).view_as(ordered)
    assert torch.equal(ordered.long(), runs)
    filled = counts > 0
    eps = torch.finfo(centroids.dtype).eps
    close = (centroids - mean_of(x, labels, centroids)).abs() <= x.shape[1] * eps * x.abs().max()
    assert close[filled].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iterations", [1, 4])
def test_clusters_belong_together(dtype: torch.dtype, iterations: int) -> None:
    x = tokens(dtype)
    result = cluster(x, 6, iterations)
    assert result.centroids.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert result.counts.dtype == result.labels.dtype == torch.int32
    check(x, result)
    again = cluster(x, 6, iterations)
    assert all(torch.equal(one, other) for one, other in zip(result, again, strict=True))


def test_clusters_far_apart_are_found() -> None:
    """Three tight groups, in turn along the sequence; even spacing starts with one token of each."""
    group = torch.arange(36) % 3
    x = (100.0 * torch.eye(3))[group].view(1, 36, 1, 3) + 0.1 * torch.randn(1, 36, 1, 3)
    start = x[0, :3, 0].view(1, 1, 3, 3).clone()
    found = cluster(x, start, 3)
    assert torch.equal(found.labels[0, 0].long(), group) and found.counts.flatten().tolist() == [12, 12, 12]
    torch.testing.assert_close(found.centroids[0, 0], torch.stack([x[0, i::3, 0].mean(0) for i in range(3)]))
    assert torch.equal(start[0, 0], x[0, :3, 0]), "what it was given is as it was"


def test_iterations_bring_centroids_nearer() -> None:
    x = tokens()
    spread = [
        float(distances(x, found.centroids).gather(-1, found.labels.long().unsqueeze(-1)).sum())
        for found in (cluster(x, 5, n) for n in (1, 2, 3, 8))
    ]
    assert spread == sorted(spread, reverse=True) and spread[-1] < spread[0]


def test_a_warm_start_goes_on() -> None:
    x = tokens()
    first = cluster(x, 5, 2)
    for one, other in zip(cluster(x, first.centroids, 3), cluster(x, 5, 5), strict=True):
        assert torch.equal(one, other)


def test_even_spacing() -> None:
    x = torch.arange(20.0).view(1, 20, 1, 1)
    assert evenly_spaced(x, 2).flatten().tolist() == [5, 15]
    assert evenly_spaced(x, 20).flatten().tolist() == list(range(20))
    assert evenly_spaced(x.half(), 3).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 5, 2, 16)
    with pytest.raises(ConfigError, match="6 clusters were asked of 5 tokens; ask for 1 to 5"):
        cluster(x, 6, 1)
    with pytest.raises(ConfigError, match="0 clusters"):
        cluster(x, 0, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        cluster(x, 2, 0)
    with pytest.raises(LayoutError, match=r"want \[1,2,K,16\]"):
        cluster(x, torch.zeros(1, 1, 3, 16), 1)
    with pytest.raises(LayoutError, match=r"\[B,S,H,D\]"):
        cluster(x[0], 2, 1)
    with pytest.raises(LayoutError, match=r"torch.int32"):
        cluster(x.int(), 2, 1)
    with pytest.raises(ConfigError, match="one device"):
        cluster(x, torch.zeros(1, 2, 3, 16, device="meta"), 1)

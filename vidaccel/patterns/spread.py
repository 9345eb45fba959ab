"""What a group's means leave out of its attention: how its logits and values spread around them, to first order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..layout import TokenLayout
from .dynamic import Heads
from .rectangles import block_rows

__all__ = ["Groups", "Spreads", "spreads"]

#: Half a variance above this is not believed: e^2 times the mass already puts a block first.
_MOST = 2.0
#: Entries of D x D matrices, or of tables over pairs of groups, in memory at a time.
_AT_A_TIME = 1 << 26
#: Devices whose index_add_ always adds in the same order; on a CPU it takes a tenth of the time of segments.
_ADDS_IN_ORDER = ("cpu",)
#: Tokens of a run that groups of any size are cut into.
_RUN = 64


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of consecutive tokens, listed in runs of one length.

    Args:
        rows: int64 [1 or N, R, C], the tokens of each run in each of N heads; some again where a run has fewer.
        weight: float32 like ``rows``: 1 / sqrt(tokens of the group), 0 where a token only fills a run up.
        of: int64 [N, R], the group of each run, ascending, M where it has none; ``None`` where run i is all of group i.
        count: M, the groups.
        start: the first token, where the runs list each token from there on once; ``None`` where they do not.
    """

    rows: torch.Tensor
    weight: torch.Tensor
    count: int
    of: torch.Tensor | None = None
    start: int | None = None

    @staticmethod
    def blocks(layout: TokenLayout, device: torch.device) -> Groups:
        """The layout's video blocks, each one run."""
        rows = block_rows(layout, None, device)[layout.video_blocks]
        sizes = layout.block_sizes.to(device)[layout.video_blocks, None]
        weight = (torch.arange(rows.shape[1], device=device) < sizes) / sizes.sqrt()
        return Groups(rows[None], weight[None], len(rows), start=layout.video_start if layout.uniform else None)

    @staticmethod
    def sized(sizes: torch.Tensor, tokens: slice) -> Groups:
        """Groups of ``sizes``, int64 [N,M], one behind the other, which fill ``tokens`` in every head.

        The number of runs is the most that so many groups can need, so that nothing waits for the device.
        """
        count = sizes.shape[1]
        runs = (sizes + _RUN - 1) // _RUN
        ends = runs.cumsum(-1)
        number = torch.arange((tokens.stop - tokens.start) // _RUN + count, device=sizes.device)
        number = number.expand(len(sizes), -1).contiguous()
        of = torch.searchsorted(ends, number, right=True)
        group = of.clamp(max=count - 1)
        rank = (number - (ends - runs).gather(1, group)) * _RUN
        rank = rank[..., None] + torch.arange(_RUN, device=sizes.device)
        size = sizes.gather(1, group)[..., None]
        real = (of < count)[..., None] & (rank < size)
        first = (sizes.cumsum(-1) - sizes).gather(1, group)[..., None]
        rows = torch.where(real, first + rank, 0) + tokens.start
        return Groups(rows, real / size.clamp(min=1).sqrt(), count, of)

    def part(self, heads: slice) -> Groups:
        """The same for some of the heads."""
        if self.of is None:
            return self
        return Groups(self.rows[heads], self.weight[heads], self.count, self.of[heads])

    def listed(self, x: torch.Tensor, means: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Tokens x [N,S,D] without the means [N,M,D] of their groups, weighted: [N,R,C,D] in ``dtype``."""
        if self.start is not None:
            end = self.start + self.rows[0].numel()
            found = x[:, self.start : end].unflatten(1, self.rows.shape[1:]).float()
        elif self.of is None:
            found = x[:, self.rows[0]].float()
        else:
            index = self.rows.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
            found = x.gather(1, index).unflatten(1, self.rows.shape[1:]).float()
        if means is not None:
            if self.of is not None:
                index = self.of.clamp(max=self.count - 1)[..., None].expand(-1, -1, means.shape[-1])
                means = means.gather(1, index)
            found = found - means.unsqueeze(2)
        return (found * self.weight.unsqueeze(-1)).to(dtype)

    def summed(self, products: torch.Tensor) -> torch.Tensor:
        """Sums over the runs of each group, [N,M,D,D] of [N,R,D,D], always added in the same order."""
        if self.of is None:
            return products
        heads, groups = len(products), self.count + 1  # the last takes runs without a group
        flat = products.flatten(0, 1).flatten(1)
        target = (self.of + groups * torch.arange(heads, device=flat.device)[:, None]).flatten()
        sums = _sums(flat, target, heads * groups).to(products.dtype)
        return sums.view(heads, groups, *products.shape[2:])[:, :-1]


class Spreads(NamedTuple):
    """What means miss for each pair of a query and a key group, float32 [N,MQ,MK] both.

    Attributes:
        variance: sigma_ij^2 = scale^2 <Q_i, C_j>, where Q_i is the mean of q q' over group i and C_j the covariance of
            keys over group j.
        missed: scale^2 <Q_i, M_j>, M_j = cov_j(k, v) cov_j(v, k).
    """

    variance: torch.Tensor
    missed: torch.Tensor

    def errors(self, probability: torch.Tensor) -> torch.Tensor:
        """Root mean square over a query group of what it misses if means stand in for a key group: P e^(sigma^2 / 2)
        times the root of ``missed``."""
        return probability * (self.variance / 2).clamp(max=_MOST).exp() * self.missed.clamp(min=0).sqrt()


def spreads(
    heads: Heads, means: tuple[torch.Tensor, torch.Tensor], queries: Groups, keys: Groups
) -> Iterator[tuple[slice, Spreads]]:
    """Those of some heads at a time, all at once unless the video is long, and which of the N = B * H heads they are.

    Args:
        means: those of keys and of values, [B,H,MK,D].
        queries, keys: the groups.
    """
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (heads.q, heads.k, heads.v))
    k_means, v_means = (x.flatten(0, 1).float() for x in means)
    runs = max(x.rows.shape[1] for x in (queries, keys))
    step = max(1, _AT_A_TIME // max(runs * q.shape[-1] ** 2, queries.count * keys.count))
    for begin in range(0, len(q), step):
        part = slice(begin, min(begin + step, len(q)))
        of_part = (k_means[part], v_means[part])
        variance, missed = _products(q[part], k[part], v[part], of_part, queries.part(part), keys.part(part))
        yield part, Spreads(variance * heads.scale**2, missed * heads.scale**2)


def _products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    means: tuple[torch.Tensor, torch.Tensor],
    queries: Groups,
    keys: Groups,
) -> tuple[torch.Tensor, torch.Tensor]:
    # a ranking needs few digits, and only 16-bit products run on tensor cores
    dtype = torch.bfloat16 if q.element_size() == 2 else torch.float32
    q = queries.listed(q, None, dtype)
    k, v = keys.listed(k, means[0], dtype), keys.listed(v, means[1], dtype)
    second = queries.summed(q.mT @ q).flatten(2)
    covariance, cross = keys.summed(k.mT @ k), keys.summed(k.mT @ v)
    variance = second @ covariance.flatten(2).mT
    missed = second @ (cross @ cross.mT).flatten(2).mT
    return variance.float(), missed.float()


def _sums(rows: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of the ``rows`` [R,C] of one ``target``, int64 [R], ascending: float32 [count,C], 0 where there is none."""
    if rows.device.type in _ADDS_IN_ORDER:
        return torch.zeros(count, rows.shape[1]).index_add_(0, target, rows.float())
    ends = torch.searchsorted(target, torch.arange(count + 1, device=rows.device))
    # in 16 bits the sum of many rows would stop growing
    return torch.segment_reduce(rows.float(), "sum", lengths=ends.diff(), axis=0, initial=0, unsafe=True)

"""Rules over tokens, rounded out to blocks whatever tokens fill them: for orders that are not a layout's tiles.

:mod:`.pairs` counts by the three axes, which only works where a block is a tile. Here blocks are runs of any order, so
token pairs are looked at one by one, for one block of queries at a time.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import CoveragePattern, StaticPattern
from .dynamic import HeadOrder
from .pairs import TokenRule
from .union import Union

__all__ = ["check_placeable", "first_frame", "near_blocks", "placed_blocks"]


def check_placeable(owner: str, pattern: StaticPattern) -> None:
    """Raises :class:`ConfigError` unless :func:`placed_blocks` knows how the pattern rounds to blocks."""
    if isinstance(pattern, Union):
        for member in pattern.patterns:
            check_placeable(owner, member)
        return
    if pattern.cuts_blocks:
        raise ConfigError(
            f"{owner}: {pattern!r} masks tokens inside tiles, and an order of its own has none; set exact=false there"
        )
    if type(pattern).select not in (StaticPattern.select, CoveragePattern.select):
        raise ConfigError(
            f"{owner}: {pattern.name} rounds to tiles in a way of its own, and an order of its own has none; give a"
            " pattern that keeps what its token rules touch"
        )


@lru_cache(maxsize=64)
def placed_blocks(pattern: StaticPattern, layout: TokenLayout, order: HeadOrder, device: torch.device) -> torch.Tensor:
    """A static pattern's pairs of video blocks in another order, bool [NV,NV] on ``device``; the diagonal is kept.

    A pair is kept as soon as the rules keep one of its token pairs, or more than ``min_coverage`` of them, or by
    ``min_columns``. It takes tokens^2 steps once. Cached, do not write into it.
    """
    if isinstance(pattern, Union):
        return torch.stack([placed_blocks(member, layout, order, device) for member in pattern.patterns]).any(0)
    coords = _coords(order).to(device)
    sizes = layout.block_sizes[layout.video_blocks]
    block = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)
    rules = [_on(rule, device) for rule in pattern.rules(layout)]
    share = pattern.min_coverage if isinstance(pattern, CoveragePattern) else 0.0

    def by_block(keys: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(sizes), dtype=torch.int64, device=device).index_add_(0, block, keys.long())

    rows = []
    for queries in coords.split(sizes.tolist()):
        column = torch.stack([_pairs(rule, queries, coords) for rule in rules]).any(0).sum(0)
        if isinstance(pattern, CoveragePattern) and pattern.min_columns:
            rows.append(pattern.enough_columns(by_block(column > 0), by_block(3 * column > len(queries))))
        else:
            rows.append(by_block(column).double() > share * len(queries) * sizes.to(device).double())
    return torch.stack(rows).fill_diagonal_(True)


@lru_cache(maxsize=64)
def near_blocks(layout: TokenLayout, order: HeadOrder, reach: int, device: torch.device) -> torch.Tensor:
    """Pairs of video blocks at most ``reach`` steps apart, bool [NV,NV] on ``device``; cached.

    A step leads to every block that holds a token next to one of this block's, along any axes at once: where blocks
    are tiles, to the tiles around it.
    """
    coords = _coords(order).cpu()
    sizes = layout.block_sizes[layout.video_blocks]
    # a border of one token around the grid belongs to no block
    place = torch.full([n + 2 for n in layout.grid], -1)
    at = coords + 1
    block = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    place[at[:, 0], at[:, 1], at[:, 2]] = block
    step = torch.eye(len(sizes), dtype=torch.bool)
    for shift in torch.cartesian_prod(*[torch.arange(-1, 2)] * 3):
        other = place[tuple((at + shift).T)]
        step[block[other >= 0], other[other >= 0]] = True
    near = torch.eye(len(sizes))
    for _ in range(min(reach, len(sizes))):
        near = (near @ step.float()).clamp(max=1)
    return near.bool().to(device)


@lru_cache(maxsize=64)
def first_frame(layout: TokenLayout, order: HeadOrder, device: torch.device) -> torch.Tensor:
    """Video blocks that hold tokens of the first frame, bool [NV] on ``device``; cached."""
    sizes = layout.block_sizes[layout.video_blocks].tolist()
    return torch.stack([(part[:, 0] == 0).any() for part in _coords(order).cpu().split(sizes)]).to(device)


def _coords(order: HeadOrder) -> torch.Tensor:
    """Where the video tokens of an order lie, int64 [V,3]."""
    if order.coords is None:
        raise ConfigError(
            "a pattern that goes by places was given an order in which each head's tokens lie elsewhere; put one inside"
            " that goes by queries and keys alone, such as pooled_top_k or error_routing"
        )
    return order.coords


def _on(rule: TokenRule, device: torch.device) -> TokenRule:
    frames, rows, columns, kind, table = (None if part is None else part.to(device) for part in rule._parts())
    assert frames is not None and rows is not None and columns is not None
    return TokenRule(frames, rows, columns, kind, table)


def _pairs(rule: TokenRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Which of the token pairs a rule keeps, bool [Q,K] of coordinates [Q,3] and [K,3]."""
    (qf, qh, qw), (kf, kh, kw) = (x.T for x in (queries, keys))
    kept = rule.frames[qf][:, kf] & rule.rows[qh][:, kh] & rule.columns[qw][:, kw]
    if rule.kind is None or rule.table is None:
        return kept
    down, right = (qh[:, None] - kh) + len(rule.rows) - 1, (qw[:, None] - kw) + len(rule.columns) - 1
    return kept & rule.table[rule.kind[qf][:, kf], down, right]

"""Exact counts of kept token pairs per pair of blocks, without ever forming a tokens x tokens mask.

Every static rule of the published systems is a union of :class:`TokenRule`: a boolean matrix per axis and, where the
rule needs it, a table over the displacement (rows, columns) that depends on the pair of frames::

    keep(q, k) = frames[fq, fk] & rows[hq, hk] & columns[wq, wk] & table[kind[fq, fk], hq - hk, wq - wk]

Such a rule factors over the axes, so counting it over the tile pairs is three small matrix products, and the
intersection of two rules is again a rule, so a union is counted by inclusion and exclusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from ..types import VideoGrid

__all__ = ["TokenRule", "block_pair_sizes", "count_pairs", "count_union"]


@dataclass(frozen=True, eq=False)
class TokenRule:
    """Which (query, key) tokens of a video a rule keeps, factored over the axes. All tensors are on the CPU.

    Args:
        frames: bool [F, F], query frame by key frame.
        rows: bool [H, H], query row by key row.
        columns: bool [W, W], query column by key column.
        kind: int64 [F, F], which slice of ``table`` a pair of frames uses; ``None`` without a table.
        table: bool [kinds, 2H-1, 2W-1], kept displacements (query row - key row + H-1, query column - key column +
            W-1); ``None`` keeps every displacement.
    """

    frames: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    kind: torch.Tensor | None = None
    table: torch.Tensor | None = None

    @staticmethod
    def axes(
        grid: VideoGrid,
        frames: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> TokenRule:
        """A rule that is one boolean matrix per axis; an axis left out keeps every pair."""
        given = zip((frames, rows, columns), grid, strict=True)
        f, h, w = (torch.ones(n, n, dtype=torch.bool) if m is None else m for m, n in given)
        return TokenRule(f, h, w)

    @staticmethod
    def displacement(grid: VideoGrid, keep: torch.Tensor) -> TokenRule:
        """A rule of the displacement alone: bool [2F-1, 2H-1, 2W-1] over query minus key, each plus extent - 1."""
        frame = torch.arange(grid.frames)
        kind = frame[:, None] - frame[None, :] + grid.frames - 1
        full = TokenRule.axes(grid)
        return TokenRule(full.frames, full.rows, full.columns, kind, keep)

    @property
    def empty(self) -> bool:
        """Whether the rule surely keeps nothing."""
        parts = [self.frames, self.rows, self.columns, *([] if self.table is None else [self.table])]
        return not all(bool(p.any()) for p in parts)

    def intersect(self, other: TokenRule) -> TokenRule:
        """The pairs that both rules keep."""
        frames, rows, columns = self.frames & other.frames, self.rows & other.rows, self.columns & other.columns
        mine, theirs = self._table(), other._table()
        if mine is None or theirs is None:
            kind, table = mine or theirs or (None, None)
            return TokenRule(frames, rows, columns, kind, table)
        # only the combinations that occur get a slice, else two displacement rules would need (2F-1)^2 of them
        both, kind = torch.unique(mine[0] * len(theirs[1]) + theirs[0], return_inverse=True)
        table = mine[1][both // len(theirs[1])] & theirs[1][both % len(theirs[1])]
        return TokenRule(frames, rows, columns, kind, table)

    def same(self, other: TokenRule) -> bool:
        """Whether both rules are written with equal tensors."""

        def alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
            return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

        pairs = zip(self._parts(), other._parts(), strict=True)
        return all(alike(a, b) for a, b in pairs)

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.frames, self.rows, self.columns, self.kind, self.table

    def _table(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.kind is None or self.table is None else (self.kind, self.table)


def block_pair_sizes(layout: TokenLayout) -> torch.Tensor:
    """Token pairs in every pair of video blocks, int64 [NV, NV]."""
    sizes = layout.block_sizes[layout.video_blocks]
    return sizes[:, None] * sizes[None, :]


def count_pairs(layout: TokenLayout, rule: TokenRule) -> torch.Tensor:
    """Token pairs that the rule keeps in every pair of video blocks, exact, int64 [NV, NV]."""
    table = rule._table()
    kind, keep = table if table is not None else (torch.zeros_like(rule.frames, dtype=torch.int64), None)
    _, height, width = layout.grid
    t, h, w = layout.axis_sizes
    by_frame = _histogram(rule.frames, t, kind, int(kind.max()) + 1)
    if keep is None:
        by_row, by_column = _histogram(rule.rows, h, None, 1), _histogram(rule.columns, w, None, 1)
        counts = by_frame[:, None, None, 0] * by_row[None, :, None, 0] * by_column[None, None, :, 0]
    else:
        by_row = _histogram(rule.rows, h, _difference(height), 2 * height - 1)
        by_column = _histogram(rule.columns, w, _difference(width), 2 * width - 1)
        # frames first: there are fewest of them, so the largest axis is contracted on the smallest tensor
        counts = (by_frame @ keep.double().flatten(1)).unflatten(1, keep.shape[1:])
        counts = torch.einsum("fyx,hy->fhx", counts, by_row) @ by_column.T
    nt, nh, nw = layout.tile_counts
    counts = counts.reshape(nt, nt, nh, nh, nw, nw).permute(0, 2, 4, 1, 3, 5)
    return counts.reshape(layout.num_video_blocks, layout.num_video_blocks).round().to(torch.int64)


def count_union(layout: TokenLayout, rules: tuple[TokenRule, ...]) -> torch.Tensor:
    """Token pairs that any of the rules keeps in every pair of video blocks, exact, int64 [NV, NV].

    Inclusion and exclusion: the work doubles with every rule, less the intersections that are empty.
    """
    distinct: list[TokenRule] = []
    for rule in rules:
        if not rule.empty and not any(rule.same(seen) for seen in distinct):
            distinct.append(rule)
    counts = torch.zeros(layout.num_video_blocks, layout.num_video_blocks, dtype=torch.int64)
    pending = [(i + 1, 1, rule) for i, rule in enumerate(distinct)]
    while pending:
        after, sign, rule = pending.pop()
        counts += sign * count_pairs(layout, rule)
        met = ((i + 1, -sign, rule.intersect(distinct[i])) for i in range(after, len(distinct)))
        pending.extend(item for item in met if not item[2].empty)
    return counts


def _difference(extent: int) -> torch.Tensor:
    """Query minus key position plus ``extent - 1`` along one axis, int64 [extent, extent], from 0 to 2*extent-2."""
    position = torch.arange(extent)
    return position[:, None] - position[None, :] + extent - 1


def _histogram(keep: torch.Tensor, sizes: torch.Tensor, label: torch.Tensor | None, labels: int) -> torch.Tensor:
    """Kept position pairs of one axis by (tile pair, label): float64 [tiles * tiles, labels].

    float64 holds the exact integers and takes the fast matrix product, which int64 does not have on the CPU.
    """
    tiles = len(sizes)
    tile = torch.repeat_interleave(torch.arange(tiles), sizes)
    slot = (tile[:, None] * tiles + tile[None, :]) * labels
    if label is not None:
        slot = slot + label
    return torch.bincount(slot[keep], minlength=math.prod((tiles, tiles, labels))).double().reshape(-1, labels)

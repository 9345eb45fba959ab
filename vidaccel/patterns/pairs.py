"""Exact counts of kept token pairs per pair of blocks, without ever forming a tokens x tokens mask.

Every static rule of the published systems is a union of :class:`TokenRule`: a boolean matrix per axis and, where the
rule needs it, a table over the displacement (rows, columns) that depends on the pair of frames::

    keep(q, k) = frames[fq, fk] & rows[hq, hk] & columns[wq, wk] & table[kind[fq, fk], hq - hk, wq - wk]

Such a rule factors over the axes, so counting it over the tile pairs is three small matrix products, and the
intersection of two rules is again a rule, so a union is counted by inclusion and exclusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from ..types import VideoGrid

__all__ = ["TokenRule", "block_pair_sizes", "count_columns", "count_pairs", "count_union"]


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
    kind, keep = _kinds(rule)
    t, h, w = layout.axis_sizes
    by_frame = _histogram(rule.frames, t, t, kind, int(kind.max()) + 1)
    rows, columns = _spatial(rule, (h, w), (h, w))
    if keep is None:
        counts = by_frame[:, None, None, 0] * rows[None, :, None, 0] * columns[None, None, :, 0]
    else:
        # frames first: there are fewest of them, so the largest axis is contracted on the smallest tensor
        counts = (by_frame @ keep.double().flatten(1)).unflatten(1, keep.shape[1:])
        counts = torch.einsum("fyx,hy->fhx", counts, rows) @ columns.T
    nt, nh, nw = layout.tile_counts
    counts = counts.reshape(nt, nt, nh, nh, nw, nw).permute(0, 2, 4, 1, 3, 5)
    return counts.reshape(layout.num_video_blocks, layout.num_video_blocks).round().to(torch.int64)


def count_union(layout: TokenLayout, rules: tuple[TokenRule, ...]) -> torch.Tensor:
    """Token pairs that any of the rules keeps in every pair of video blocks, exact, int64 [NV, NV].

    Inclusion and exclusion: the work doubles with every rule, less the intersections that are empty.
    """
    counts = torch.zeros(layout.num_video_blocks, layout.num_video_blocks, dtype=torch.int64)
    for sign, rule in _union(rules):
        counts += sign * count_pairs(layout, rule)
    return counts


def count_columns(layout: TokenLayout, rules: tuple[TokenRule, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of every pair of video blocks, as columns of their part of the mask: two int64 [NV, NV].

    Returns:
        The keys that any of the rules keeps for at least one query of the block of queries, and those that it keeps for
        more than a third of them.
    """
    grid, (t, h, w), (nt, nh, nw) = layout.grid, layout.axis_sizes, layout.tile_counts
    single = tuple(torch.ones(extent, dtype=torch.int64) for extent in grid)
    # all that a pair of (query tile, key frame) contributes follows from its counts by kind: few of them differ
    terms = []
    parts = [t.repeat_interleave(grid.frames)[:, None].double()]
    for sign, rule in _union(rules):
        kind, keep = _kinds(rule)
        parts.append(_histogram(rule.frames, t, single[0], kind, int(kind.max()) + 1))
        terms.append((sign, keep, *_spatial(rule, (h, w), single[1:])))
    unique, which = torch.unique(torch.cat(parts, dim=1), dim=0, return_inverse=True)
    queries = (h[:, None] * w[None, :]).flatten().double()
    block = torch.arange(nh).repeat_interleave(h)[:, None] * nw + torch.arange(nw).repeat_interleave(w)
    tables = torch.zeros(2, len(unique), nh * nw, nh * nw, dtype=torch.int64)
    for number, row in enumerate(unique):
        counts = torch.zeros(nh, grid.height, nw, grid.width, dtype=torch.float64)
        splits = row[1:].split([part.shape[1] for part in parts[1:]])
        for (sign, keep, rows, columns), weights in zip(terms, splits, strict=True):
            if keep is None:
                found = weights * rows[:, :1] * columns[:, 0]
            else:
                plane = (weights @ keep.double().flatten(1)).view(keep.shape[1:])
                found = rows @ plane @ columns.T
            counts += sign * found.view(counts.shape)
        kept = counts.round().permute(0, 2, 1, 3).reshape(nh * nw, -1)
        full = 3 * kept > row[0] * queries[:, None]
        tables[:, number].index_add_(-1, block.flatten(), torch.stack([kept > 0, full]).long())
    chosen = tables[:, which.view(nt, grid.frames)]  # [2, query tile, key frame, block, block]
    by_tile = torch.zeros(2, nt, nt, nh * nw, nh * nw, dtype=torch.int64)
    by_tile.index_add_(2, torch.arange(nt).repeat_interleave(t), chosen)
    touched, filled = by_tile.transpose(2, 3).reshape(2, layout.num_video_blocks, layout.num_video_blocks)
    return touched, filled


def _union(rules: tuple[TokenRule, ...]) -> list[tuple[int, TokenRule]]:
    """Rules with signs, whose sum counts what any of ``rules`` keeps once."""
    distinct: list[TokenRule] = []
    for rule in rules:
        if not rule.empty and not any(rule.same(seen) for seen in distinct):
            distinct.append(rule)
    found = []
    pending = [(i + 1, 1, rule) for i, rule in enumerate(distinct)]
    while pending:
        after, sign, rule = pending.pop()
        found.append((sign, rule))
        met = ((i + 1, -sign, rule.intersect(distinct[i])) for i in range(after, len(distinct)))
        pending.extend(item for item in met if not item[2].empty)
    return found


def _kinds(rule: TokenRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slice of its table that each pair of frames uses, int64 [F, F], and the table, if the rule has one."""
    table = rule._table()
    return table if table is not None else (torch.zeros_like(rule.frames, dtype=torch.int64), None)


def _spatial(
    rule: TokenRule, queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept pairs of rows and of columns by (tile of queries, tile of keys) and, with a table, by displacement."""
    axes = zip((rule.rows, rule.columns), queries, keys, strict=True)
    if rule.table is None:
        rows, columns = (_histogram(keep, q, k, None, 1) for keep, q, k in axes)
    else:
        rows, columns = (_histogram(keep, q, k, _difference(len(keep)), 2 * len(keep) - 1) for keep, q, k in axes)
    return rows, columns


def _difference(extent: int) -> torch.Tensor:
    """Query minus key position plus ``extent - 1`` along one axis, int64 [extent, extent], from 0 to 2*extent-2."""
    position = torch.arange(extent)
    return position[:, None] - position[None, :] + extent - 1


def _histogram(
    keep: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, label: torch.Tensor | None, labels: int
) -> torch.Tensor:
    """Kept position pairs of one axis by (tile of queries, tile of keys, label): float64 [tiles * tiles, labels].

    Tiles are given by their sizes. float64 holds the exact integers and takes the fast matrix product, which int64 does
    not have on the CPU.
    """
    q, k = (torch.repeat_interleave(torch.arange(len(sizes)), sizes) for sizes in (queries, keys))
    slot = (q[:, None] * len(keys) + k[None, :]) * labels
    if label is not None:
        slot = slot + label
    length = len(queries) * len(keys) * labels
    return torch.bincount(slot[keep], minlength=length).double().reshape(-1, labels)

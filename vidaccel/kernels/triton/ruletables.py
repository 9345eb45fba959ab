"""A rule over tokens as tables that the forward kernel reads for the key pieces that the rule cuts.

A key's place in its tile is a word with three bits, one for each axis. What a query keeps of a tile is a word with a
bit for each frame, row and column of the tile. So one query keeps one key if all bits of the key are in its word::

    word(q, tile) = frames[fq, tile] | rows[hq, tile] | columns[wq, tile]
    keep(q, k)    = (word(q, tile of k) & bits(k)) == bits(k)

The three parts are looked up by position along an axis, so the tables have some thousand entries whatever the length of
the video, and any rule that factors over the axes fits, windows with stride and dilation among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...axisrule import AxisRule
from ...errors import KernelError

__all__ = ["RuleTables", "rule_tables"]


@dataclass(frozen=True, eq=False)
class RuleTables:
    """The tables of one rule; text has zeros, because it is never cut.

    Args:
        words: int32, or int64 for tiles with long edges, [R, N]: parts of words, of each axis by tile and query
            position.
        query_place: int32 [3,S], where the query's position is in the part of each axis.
        tile_place: int32 [3,NB], what the key block's tile adds to that.
        key_bits: like ``words``, [S].
    """

    words: torch.Tensor
    query_place: torch.Tensor
    tile_place: torch.Tensor
    key_bits: torch.Tensor


def rule_tables(rule: AxisRule, device: torch.device) -> RuleTables:
    """The tables on ``device``.

    Raises:
        KernelError: if the edges of a tile together are longer than a word has bits.
    """
    layout = rule.layout
    edges = sum(layout.tile_shape)
    if edges > 63:
        raise KernelError(
            f"tile {layout.tile_shape} has edges of {edges} tokens in all; to mask tokens inside blocks the Triton"
            " kernel takes at most 63, so choose a more compact tile or kernel torch-sparse"
        )
    words, query_place, tile_place = [], [], []
    bits = torch.zeros(layout.tokens, dtype=torch.int64)
    video = layout.video_tokens
    shift = before = 0
    axes = zip(
        rule.axes,
        layout.tile_shape,
        layout.tile_counts,
        layout.token_coords.cpu().unbind(-1),
        layout.block_coords.unbind(-1),
        strict=True,
    )
    for matrix, tile, count, position, coord in axes:
        extent = matrix.shape[-1]
        padded = torch.nn.functional.pad(matrix, (0, tile * count - extent)).view(rule.heads, extent, count, tile)
        weights = 1 << (torch.arange(tile) + shift)
        words.append((padded * weights).sum(-1).transpose(1, 2).reshape(rule.heads, -1))  # [R, tile, query position]
        bits[video] |= 1 << (position % tile + shift)
        query_place.append(_embedded(position + before, layout.tokens, video))
        tile_place.append(_embedded(coord * extent, layout.num_blocks, layout.video_blocks))
        shift += tile
        before += count * extent
    dtype = torch.int32 if edges < 32 else torch.int64
    return RuleTables(
        torch.cat(words, dim=-1).to(device, dtype),
        torch.stack(query_place).to(device, torch.int32),
        torch.stack(tile_place).to(device, torch.int32),
        bits.to(device, dtype),
    )


def _embedded(values: torch.Tensor, length: int, where: slice) -> torch.Tensor:
    whole = torch.zeros(length, dtype=torch.int64)
    whole[where] = values
    return whole

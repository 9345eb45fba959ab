"""Which tokens of partly covered blocks attend each other: one boolean matrix per axis of the token grid.

A block mask keeps or drops whole blocks. A rule over tokens whose edges do not fall on block edges cuts some blocks::

    keep(q, k) = frames[fq, fk] & rows[hq, hk] & columns[wq, wk]

so that a block pair is covered fully, partly or not at all. Partly covered pairs are FlexAttention's partial blocks.
Text is never cut: it attends everything and everything attends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .errors import LayoutError
from .layout import TokenLayout

__all__ = ["AxisRule"]


@dataclass(frozen=True, eq=False)
class AxisRule:
    """A rule over the video's tokens that factors over the axes, for one head or for each. Tensors are on the CPU.

    Args:
        layout: the order and blocks of the sequence.
        frames: bool [R, F, F], query frame by key frame; R is 1 for all heads, or the number of heads.
        rows: bool [R, H, H], query row by key row.
        columns: bool [R, W, W], query column by key column.

    Raises:
        LayoutError: if shapes or dtypes do not fit the layout's grid, or a position keeps nothing along an axis.
    """

    layout: TokenLayout
    frames: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def __post_init__(self) -> None:
        heads = self.frames.shape[0]
        for name, matrix, extent in zip(("frames", "rows", "columns"), self.axes, self.layout.grid, strict=True):
            if matrix.dtype != torch.bool or matrix.shape != (heads, extent, extent):
                raise LayoutError(
                    f"{name} of a rule over tokens is {matrix.dtype} {tuple(matrix.shape)}; the grid"
                    f" {self.layout.grid} and {heads} heads need a boolean [{heads}, {extent}, {extent}]"
                )
            if not bool(matrix.any(-1).all()):
                head, position = (~matrix.any(-1)).nonzero()[0].tolist()
                raise LayoutError(
                    f"{name} of a rule over tokens keeps nothing for position {position} of head {head}; every"
                    " position keeps a key"
                )

    @property
    def axes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The matrices in (frames, rows, columns) order."""
        return self.frames, self.rows, self.columns

    @property
    def heads(self) -> int:
        """R, heads with matrices of their own; 1 serves all."""
        return self.frames.shape[0]

    @staticmethod
    def stack(rules: Sequence[AxisRule | None], layout: TokenLayout) -> AxisRule:
        """Rules of one head each, one per head; ``None`` cuts nothing."""
        parts = []
        for axis, extent in enumerate(layout.grid):
            everything = torch.ones(1, extent, extent, dtype=torch.bool)
            parts.append(torch.cat([everything if rule is None else rule.axes[axis] for rule in rules]))
        return AxisRule(layout, *parts)

    def of_heads(self, heads: slice) -> AxisRule:
        """The rule of some heads; itself if one serves all."""
        return self if self.heads == 1 else AxisRule(self.layout, *(matrix[heads] for matrix in self.axes))

    @cached_property
    def counts(self) -> torch.Tensor:
        """Token pairs that the rule keeps in every pair of blocks, int64 [R, NB, NB]; all of them where text is."""
        layout = self.layout
        f, h, w = (_by_tile(matrix, sizes) for matrix, sizes in zip(self.axes, layout.axis_sizes, strict=True))
        video = torch.einsum("rab,rcd,ref->racebdf", f, h, w).reshape(self.heads, *(layout.num_video_blocks,) * 2)
        counts = self._sizes.expand(self.heads, -1, -1).clone()
        counts[:, layout.video_blocks, layout.video_blocks] = video.round().to(torch.int64)
        return counts

    @cached_property
    def touched(self) -> torch.Tensor:
        """Block pairs in which the rule keeps a token pair, bool [R, NB, NB]."""
        return self.counts > 0

    @cached_property
    def cut(self) -> torch.Tensor:
        """Block pairs of which the rule keeps some token pairs and drops others, bool [R, NB, NB]."""
        return self.touched & (self.counts < self._sizes)

    def token_mask(self) -> torch.Tensor:
        """Boolean [R,S,S] in layout order: for oracles and small sequences only."""
        layout = self.layout
        keep = torch.ones(self.heads, layout.tokens, layout.tokens, dtype=torch.bool)
        places = layout.token_coords.cpu().unbind(-1)
        video = layout.video_tokens
        for matrix, place in zip(self.axes, places, strict=True):
            keep[:, video, video] &= matrix[:, place][:, :, place]
        return keep

    def fits(self, layout: TokenLayout) -> bool:
        """Whether the rule is over this layout's tokens and blocks, wherever its index tensors live."""
        mine = self.layout
        return (mine.grid, mine.tile_shape, mine.text_tokens, mine.text_first) == (
            layout.grid,
            layout.tile_shape,
            layout.text_tokens,
            layout.text_first,
        )

    @property
    def _sizes(self) -> torch.Tensor:
        sizes = self.layout.block_sizes
        return sizes[:, None] * sizes[None, :]


def _by_tile(matrix: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Kept position pairs of one axis in every pair of tiles, float64 [R, T, T]: exact integers."""
    tile = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    member = torch.nn.functional.one_hot(tile, len(sizes)).double()
    return member.T @ matrix.double() @ member

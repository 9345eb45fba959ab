"""Another order of the tokens than the layout's tiles, the same for all heads, around a pattern that can live in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch

from ..errors import ConfigError, LayoutError
from ..layout import TokenLayout
from ..types import TileShape, VideoGrid
from .base import Pattern, StaticPattern
from .dynamic import DynamicPattern, HeadOrder, Heads
from .hilbert import hilbert_order
from .placed import check_placeable, placed_blocks
from .registry import register
from .reuse import Reuse

__all__ = ["Ordered", "TokenSequence", "token_sequence"]

TokenSequence = Literal["hilbert", "frame_major", "token_major", "frame_patches"]

#: Published for DraftAttention.
_PATCH = (8, 16)


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Ordered(DynamicPattern):
    """A pattern in another order of the video's tokens; blocks are runs of it, as long as the layout's.

    - ``hilbert``: along a space-filling curve (Rectified SpaAttn), see :func:`~.hilbert.hilbert_order`;
    - ``frame_major``: frame by frame, row by row, the model's own (SVG's spatial heads);
    - ``token_major``: position by position, all frames of one together (SVG's temporal heads);
    - ``frame_patches``: frame by frame in patches of 8 x 16 tokens (DraftAttention). A tile of [1, 8, 16] in the plan
      is the same and costs nothing; this is for layers that share a plan with other tiles.

    A pattern fixed by the token grid keeps a block as soon as its rule keeps one token pair there, counted over the
    tokens that the block really holds: tokens^2 steps, once for each layout. Heads of a layer may differ in order. Each
    call sorts q, k and v and restores the output, four more passes over them; the systems named sort once for all
    layers where they can. To keep masks from step to step put ``reuse`` inside. Tiles cut at the grid's edge make
    uneven runs; pick a tile that divides the grid.

    Measured: relative L2 error of the output with the pooled tail, mean over heads, at .11, .25 and .50 of the blocks,
    on q, k, v of the shipped small model (one clip, noise .9, .6 and .3, three layers, blocks of 64): ``pooled_top_k``
    over tiles of [4, 4, 4] .269, .183, .110; hilbert .323, .236, .138; token_major .256, .187, .110; frame_major and
    frame_patches .376, .260, .140. ``error_routing`` over tiles .234, .152, .075; hilbert .241, .159, .084. So compact
    tiles are as good as any order that heads share. Static bands are another matter: SVG's temporal one, a frame wide
    and .12 of all pairs, takes .19 of them in token_major blocks and .57 in tiles.

    Args:
        by: the order; plans call it ``order``, which is a method here.
        pattern: what chooses the blocks.

    Raises:
        ConfigError: if the order is unknown, or the pattern needs tiles or has an order of its own.
    """

    name: ClassVar[str] = "ordered"

    by: TokenSequence = field(default="hilbert", metadata={"parameter": "order"})
    pattern: Pattern

    def __post_init__(self) -> None:
        if self.by not in get_args(TokenSequence):
            raise ConfigError(f"{self.name}: order is {self.by!r}; valid are {', '.join(get_args(TokenSequence))}")
        if isinstance(self.pattern, StaticPattern):
            check_placeable(self.name, self.pattern)
            return
        chooses = self.pattern.pattern if isinstance(self.pattern, Reuse) else self.pattern
        if not isinstance(self.pattern, DynamicPattern) or chooses.places == "tiles":  # type: ignore[attr-defined]
            raise ConfigError(
                f"{self.name}: pattern is {self.pattern!r}; give one that is fixed by the token grid, or one that does"
                " not need blocks to be tiles, such as pooled_top_k or rectified"
            )
        object.__setattr__(self, "stateful", self.pattern.stateful)
        object.__setattr__(self, "needs_curvature", self.pattern.needs_curvature)

    def order(self, heads: Heads) -> HeadOrder:
        """The order on this layout; cached."""
        return _order(self.by, heads.layout, heads.q.device)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The inner pattern's blocks, bool [B,H,NV,NV]."""
        if heads.order is None:
            raise LayoutError(
                f"{self.name} was asked for blocks of heads in layout order; call order() and show it heads.reordered()"
            )
        if isinstance(self.pattern, DynamicPattern):
            return self.pattern.choose(heads)
        assert isinstance(self.pattern, StaticPattern)
        kept = placed_blocks(self.pattern, heads.layout, heads.order, heads.q.device)
        return kept.expand(heads.q.shape[0], heads.q.shape[2], -1, -1).clone()

    def density(self, layout: TokenLayout) -> float | None:
        """That of the inner pattern: of a static one as it comes out here, of a dynamic one what it aims at."""
        if isinstance(self.pattern, StaticPattern):
            cpu = torch.device("cpu")
            kept = placed_blocks(self.pattern, layout, _order(self.by, layout, cpu), cpu)
            sizes = layout.block_sizes[layout.video_blocks].double()
            return float(sizes @ kept.double() @ sizes) / layout.grid.tokens**2
        return self.pattern.density(layout)

    def resolved(self, layout: TokenLayout) -> str:
        """The order and the pattern inside."""
        return f"{self.by} order, {self.pattern.name} ({self.pattern.resolved(layout)})"


def token_sequence(by: TokenSequence, grid: VideoGrid) -> torch.Tensor:
    """Raster position of each token in an order, int64 [tokens] on the CPU."""
    raster = torch.arange(grid.tokens)
    if by == "hilbert":
        return hilbert_order(grid)
    if by == "token_major":
        return raster.view(grid.frames, -1).T.flatten()
    if by == "frame_patches":
        return TokenLayout.of(grid, TileShape(1, *_PATCH)).order
    return raster


@lru_cache(maxsize=64)
def _order(by: TokenSequence, layout: TokenLayout, device: torch.device) -> HeadOrder:
    raster = token_sequence(by, layout.grid)
    index = torch.arange(layout.tokens)
    index[layout.video_tokens] = layout.inverse.cpu()[raster + layout.video_start]
    index = index.to(device)[None, None]
    _, height, width = layout.grid
    coords = torch.stack([raster // (height * width), raster // width % height, raster % width], dim=-1)
    return HeadOrder(index, index, coords.to(device))

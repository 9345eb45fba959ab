"""In which order the tokens of a video sit, and where one block of them ends and the next begins.

A layout cuts the (frames, height, width) grid into 3D tiles and orders the tokens tile by tile. One tile is one
block. Tiles at the far edges are simply shorter: blocks are ranges of the sequence with offsets, so no padding token
ever exists. Text tokens, when a model joins them to the video, stay where they are, before or after it, cut into
blocks of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from .errors import LayoutError
from .types import TileShape, VideoGrid

__all__ = ["TokenLayout", "choose_tile"]


@dataclass(frozen=True)
class TokenLayout:
    """The order and the blocks of one sequence. Make it with :meth:`TokenLayout.of`, which caches.

    Layouts of the same arguments are equal; threads that ask at once, and a cache that is full, may make two of them.

    Args:
        grid: the video's token grid.
        tile: the extent of a full tile.
        text_tokens: text tokens in the same sequence, 0 for none.
        text_first: whether the text sits before the video (CogVideoX) or after it (HunyuanVideo).
        device: where the index tensors live.
    """

    grid: VideoGrid
    tile_shape: TileShape
    text_tokens: int = 0
    text_first: bool = False
    device: torch.device = torch.device("cpu")

    @staticmethod
    def of(
        grid: VideoGrid,
        tile: TileShape | None = None,
        *,
        text_tokens: int = 0,
        text_first: bool = False,
        device: torch.device | str = "cpu",
        block_tokens: int | None = None,
    ) -> TokenLayout:
        """The cached layout for these arguments.

        Args:
            tile: tile shape, or ``None`` for the one that wastes least (:func:`choose_tile`). A tile larger than the
                grid along an axis is cut to the grid.
            block_tokens: with ``tile=None``, the most tokens a tile may have; ``None`` for 64 or 128, by the grid.

        Raises:
            LayoutError: if ``text_tokens`` is negative, or both ``tile`` and ``block_tokens`` are given.
        """
        if text_tokens < 0:
            raise LayoutError(f"text_tokens is {text_tokens}; give 0 or more")
        if tile is None:
            tile = choose_tile(grid, default_block_tokens(grid.tokens) if block_tokens is None else block_tokens)
        elif block_tokens is not None:
            raise LayoutError(f"tile {tile} and block_tokens {block_tokens} both say how large a block is; give one")
        tile = TileShape(*(min(t, g) for t, g in zip(tile, grid, strict=True)))
        return _cached(grid, tile, text_tokens, text_first and text_tokens > 0, torch.device(device))

    def __repr__(self) -> str:
        text = f", text={self.text_tokens} {'first' if self.text_first else 'last'}" if self.text_tokens else ""
        return f"TokenLayout({self.grid}, tile={self.tile_shape}, blocks={self.num_blocks}{text})"

    # -- counts -------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Length of the whole sequence, S."""
        return self.grid.tokens + self.text_tokens

    @cached_property
    def tile_counts(self) -> tuple[int, int, int]:
        """Tiles along frames, height and width."""
        nt, nh, nw = (math.ceil(g / t) for g, t in zip(self.grid, self.tile_shape, strict=True))
        return nt, nh, nw

    @property
    def num_video_blocks(self) -> int:
        """Blocks that hold video tokens; always one tile each."""
        return math.prod(self.tile_counts)

    @cached_property
    def num_text_blocks(self) -> int:
        """Blocks that hold text tokens."""
        return math.ceil(self.text_tokens / self.tile_shape.tokens)

    @property
    def num_blocks(self) -> int:
        """All blocks of the sequence."""
        return self.num_video_blocks + self.num_text_blocks

    @property
    def video_blocks(self) -> slice:
        """Which blocks are video, as a slice of the block axis."""
        start = self.num_text_blocks if self.text_first else 0
        return slice(start, start + self.num_video_blocks)

    @property
    def text_blocks(self) -> slice:
        """Which blocks are text, as a slice of the block axis; empty without text."""
        start = 0 if self.text_first else self.num_video_blocks
        return slice(start, start + self.num_text_blocks)

    @property
    def video_start(self) -> int:
        """Position of the first video token in the sequence."""
        return self.text_tokens if self.text_first else 0

    @property
    def video_tokens(self) -> slice:
        """The video's part of the sequence."""
        return slice(self.video_start, self.video_start + self.grid.tokens)

    # -- blocks -------------------------------------------------------------------------------------------------

    @cached_property
    def axis_sizes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of each tile along each axis, three int64 CPU tensors; only the last entry may be smaller."""

        def sizes(extent: int, tile: int) -> torch.Tensor:
            starts = torch.arange(0, extent, tile)
            return torch.clamp(extent - starts, max=tile)

        t, h, w = (sizes(g, s) for g, s in zip(self.grid, self.tile_shape, strict=True))
        return t, h, w

    @cached_property
    def block_sizes(self) -> torch.Tensor:
        """Tokens in each block, int64 [num_blocks] on the CPU."""
        t, h, w = self.axis_sizes
        video = (t[:, None, None] * h[None, :, None] * w[None, None, :]).reshape(-1)
        full, rest = divmod(self.text_tokens, self.tile_shape.tokens)
        text = torch.tensor([self.tile_shape.tokens] * full + ([rest] if rest else []), dtype=torch.int64)
        return torch.cat([text, video] if self.text_first else [video, text])

    @cached_property
    def block_offsets(self) -> torch.Tensor:
        """First token of each block and, last, the sequence length: int64 [num_blocks + 1] on the CPU."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.block_sizes.cumsum(0)])

    @cached_property
    def uniform(self) -> bool:
        """Whether all blocks have one size, so that kernels may index whole blocks."""
        return bool((self.block_sizes == self.block_sizes[0]).all())

    @cached_property
    def block_coords(self) -> torch.Tensor:
        """Tile index (t, h, w) of each video block, int64 [num_video_blocks, 3] on the CPU."""
        return torch.cartesian_prod(*(torch.arange(n) for n in self.tile_counts)).reshape(-1, 3)

    @property
    def block_area(self) -> float:
        """Block area over tokens, at least 1: what a kernel with fixed blocks of a full tile computes per token."""
        return self.num_video_blocks * self.tile_shape.tokens / self.grid.tokens

    # -- order --------------------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> torch.Tensor:
        """Raster position of each token in layout order, int64 [S] on ``device``; text stays in place."""
        _, tiles_h, tiles_w = self.tile_counts
        t, h, w = (torch.arange(g) // s for g, s in zip(self.grid, self.tile_shape, strict=True))
        block = (t[:, None, None] * tiles_h + h[:, None]) * tiles_w + w
        video = torch.argsort(block.reshape(-1), stable=True)  # stable: within a tile the raster order stays
        video = video + self.video_start
        text = torch.arange(self.text_tokens) + (0 if self.text_first else self.grid.tokens)
        return torch.cat([text, video] if self.text_first else [video, text]).to(self.device)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """Layout position of each token in raster order, int64 [S] on ``device``."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.tokens, device=self.device)
        return inverse

    @cached_property
    def block_of_token(self) -> torch.Tensor:
        """Block of each token in layout order, int64 [S] on ``device``."""
        return torch.repeat_interleave(torch.arange(self.num_blocks), self.block_sizes).to(self.device)

    @cached_property
    def token_coords(self) -> torch.Tensor:
        """(frame, row, column) of each *video* token in layout order, int64 [grid.tokens, 3] on ``device``."""
        raster = self.order[self.video_tokens] - self.video_start
        _, height, width = self.grid
        return torch.stack([raster // (height * width), raster // width % height, raster % width], dim=-1)

    def tile(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Raster order to layout order along ``dim``: for [B,S,H,D], [B,S,C] and RoPE tables alike.

        Raises:
            LayoutError: if ``x`` does not have S tokens along ``dim``.
        """
        return self._reorder(x, dim, self.order)

    def untile(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Layout order back to raster order; exact inverse of :meth:`tile`."""
        return self._reorder(x, dim, self.inverse)

    def _reorder(self, x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        if x.shape[dim] != self.tokens:
            raise LayoutError(
                f"axis {dim} of a {tuple(x.shape)} tensor has {x.shape[dim]} tokens, but the layout of {self.grid}"
                f" with {self.text_tokens} text tokens has {self.tokens}; use the layout of this video's grid"
            )
        return x.index_select(dim, index if index.device == x.device else index.to(x.device))


@lru_cache(maxsize=64)
def _cached(grid: VideoGrid, tile: TileShape, text_tokens: int, text_first: bool, device: torch.device) -> TokenLayout:
    return TokenLayout(grid, tile, text_tokens, text_first, device)


def default_block_tokens(tokens: int) -> int:
    """Largest tile for a sequence: 64 tokens for short ones, where 128 leaves too few blocks to choose from."""
    return 64 if tokens < 8192 else 128


@lru_cache(maxsize=256)
def choose_tile(grid: VideoGrid, block_tokens: int = 128) -> TileShape:
    """The tile of at most ``block_tokens`` tokens that wastes least on this grid.

    A kernel pays for whole blocks of ``block_tokens`` rows, so the waste is blocks * block_tokens / tokens. Among
    tiles within 2% of the least waste those near the most compact (by surface, within 10%) stay, because neighbours in
    a tile share their window. Of these the one of fewest frames wins: most rules depend on the frame distance, and
    deep tiles round it out the most. Long thin tiles (an edge over three times another that the grid would allow to
    be longer) are not considered.

    Raises:
        LayoutError: if ``block_tokens`` is less than 1.
    """
    if block_tokens < 1:
        raise LayoutError(f"block_tokens is {block_tokens}; give at least 1")
    found: list[tuple[float, float, TileShape]] = []
    frames, height, width = grid
    for t in range(1, min(frames, block_tokens) + 1):
        for h in range(1, min(height, block_tokens // t) + 1):
            for w in range(1, min(width, block_tokens // (t * h)) + 1):
                free = [e for e, g in ((t, frames), (h, height), (w, width)) if e < g]
                if free and max(t, h, w) > 3 * min(free):
                    continue
                blocks = math.ceil(frames / t) * math.ceil(height / h) * math.ceil(width / w)
                surface = (t * h + h * w + t * w) / (t * h * w) ** (2 / 3)
                found.append((blocks * block_tokens / grid.tokens, surface, TileShape(t, h, w)))
    # never empty: a tile of one token is always considered
    least = min(waste for waste, _, _ in found)
    found = [f for f in found if f[0] <= least * 1.02]
    compact = min(surface for _, surface, _ in found)
    found = [f for f in found if f[1] <= compact * 1.10]
    # a wide tile before a high one: rows of the raster are longer runs of memory
    return min(found, key=lambda f: (f[2].frames, f[1], f[0], f[2].height))[2]

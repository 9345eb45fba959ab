"""The shapes and masks of the GPU benchmarks: what the video models really ask of attention."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.layout import TokenLayout
from vidaccel.patterns import SlidingTile
from vidaccel.types import VideoGrid

__all__ = ["DENSITIES", "FORMATS", "MASKS", "SHAPES", "Shape", "make_mask", "random_mask", "sliding_mask"]

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
#: ``random``: scattered blocks, another choice for every head; ``sta``: one window of tiles for all heads.
MASKS = ("random", "sta")
#: One precision for each pair of number formats that the kernels multiply.
FORMATS = ("native", "int8", "int8-fp8", "fp8-tile")


@dataclass(frozen=True)
class Shape:
    """Self-attention of one model at one resolution.

    Args:
        name: how results call it.
        grid: token grid of the video.
        heads: attention heads.
        head_dim: channels of one head.
        text: text tokens in the same sequence.
        text_first: whether they come before the video.
    """

    name: str
    grid: VideoGrid
    heads: int
    head_dim: int
    text: int = 0
    text_first: bool = False

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.grid.tokens + self.text

    def layout(self, device: torch.device | str = "cpu") -> TokenLayout:
        """Its layout with the tile that vidaccel chooses."""
        return TokenLayout.of(self.grid, text_tokens=self.text, text_first=self.text_first, device=device)

    def operations(self, density: float = 1.0) -> float:
        """Multiplications and additions of one forward: 4 H L^2 D x density."""
        return 4.0 * self.heads * self.tokens**2 * self.head_dim * density

    def least_bytes(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bytes that must cross the memory bus at least: q, k and v once in, the output once out."""
        return 4.0 * self.heads * self.tokens * self.head_dim * dtype.itemsize


#: Token grids are those of 81 frames in Wan, 117 in HunyuanVideo and 49 in CogVideoX at their own resolutions.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("wan-480p-1.3b", VideoGrid(21, 30, 52), 12, 128),
        Shape("wan-480p-14b", VideoGrid(21, 30, 52), 40, 128),
        Shape("wan-720p-1.3b", VideoGrid(21, 45, 80), 12, 128),
        Shape("wan-720p-14b", VideoGrid(21, 45, 80), 40, 128),
        Shape("hunyuan", VideoGrid(30, 48, 80), 24, 128, text=256),
        Shape("cogvideox", VideoGrid(13, 30, 45), 48, 64, text=226, text_first=True),
    )
}


def random_mask(layout: TokenLayout, density: float, heads: int, seed: int = 0) -> BlockMask:
    """A mask per head with the same number of kept blocks in each row, its own block among them."""
    generator = torch.Generator().manual_seed(seed)
    n = layout.num_blocks
    keep = torch.zeros(heads, n, n, dtype=torch.bool)
    count = max(1, round(density * n))
    for head in keep:
        score = torch.rand(n, n, generator=generator)
        score.fill_diagonal_(2.0)
        head.scatter_(-1, score.topk(count).indices, True)
    return BlockMask.from_dense(keep)


def sliding_mask(layout: TokenLayout, density: float) -> BlockMask:
    """The sliding-tile window whose density is nearest; of equally near ones the most cubic. Text is always kept."""
    counts = layout.tile_counts
    choices = [[*range(1, n, 2), n] for n in counts]

    def badness(window: tuple[int, ...]) -> tuple[float, float]:
        shares = [k / n for k, n in zip(window, counts, strict=True)]
        return abs(math.log(math.prod(shares) / density)), max(shares) / min(shares)

    near = sorted(itertools.product(*choices), key=badness)[:12]
    # among windows within a tenth of the density asked for, the one of the most even shares
    fits = [window for window in near if badness(window)[0] < 0.1] or near[:1]
    t, h, w = min(fits, key=lambda window: badness(window)[1])
    return BlockMask.from_dense(SlidingTile(window=(t, h, w)).blocks(layout))


def make_mask(kind: str, layout: TokenLayout, density: float, heads: int) -> BlockMask:
    """A mask of :data:`MASKS`, on the CPU; the full one at density 1."""
    if density >= 1:
        n = layout.num_blocks
        return BlockMask.from_dense(torch.ones(n, n, dtype=torch.bool))
    return sliding_mask(layout, density) if kind == "sta" else random_mask(layout, density, heads)

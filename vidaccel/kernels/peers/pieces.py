"""A layout's blocks in pieces of one size, which is what other projects' kernels take.

A block of n tokens becomes ceil(n / size) pieces, of which the last is padded; who attends a block attends its pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...blockmask import BlockMask, block_lists
from ...layout import TokenLayout

__all__ = ["Pieces", "pieces_of"]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Where a layout's tokens lie once its blocks are cut.

    Args:
        size: tokens of a piece.
        lengths: int32 [P], tokens of each piece that are none of the padding.
        block: int64 [P], the block each is of.
        source: int64 [P * size], the token at each padded place, 0 for padding.
        place: int64 [S], the padded place of each token.
    """

    size: int
    lengths: torch.Tensor
    block: torch.Tensor
    source: torch.Tensor
    place: torch.Tensor

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[B,S,H,D] to [B,P * size,H,D], contiguous; padding repeats the first token, so that it is finite."""
        return x.index_select(1, self.source)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        return x.index_select(1, self.place)

    def lists(self, mask: BlockMask, batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts [B,H,P] and ascending lists [B,H,P,P] of the kept pieces, int32, for all heads and samples."""
        keep = mask.dense[:, :, self.block][:, :, :, self.block]
        counts, index = block_lists(keep)
        return (
            counts.expand(batch, heads, -1).contiguous(),
            index.expand(batch, heads, -1, -1).contiguous(),
        )


@lru_cache(maxsize=16)
def pieces_of(layout: TokenLayout, size: int, device: torch.device) -> Pieces:
    """The pieces of a layout's blocks, with their index tensors on ``device``."""
    block_sizes = layout.block_sizes.cpu()
    count = torch.ceil(block_sizes / size).long()
    block = torch.arange(layout.num_blocks).repeat_interleave(count)
    number = torch.cat([torch.arange(int(n)) for n in count])
    lengths = (block_sizes[block] - number * size).clamp(max=size)
    inside = torch.arange(size) < lengths[:, None]
    source = torch.zeros(len(block), size, dtype=torch.int64)
    source[inside] = torch.arange(layout.tokens)
    place = inside.flatten().nonzero().squeeze(-1)
    assert len(place) == layout.tokens and math.prod(source.shape) == len(block) * size
    return Pieces(size, *(x.to(device) for x in (lengths.int(), block, source.flatten(), place)))

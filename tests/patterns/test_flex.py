"""FlexAttention as a second oracle: the token formulas as mask functions, on layouts of uniform blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vidaccel.blockmask import BlockMask
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.kernels import reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern
from vidaccel.types import TileShape, VideoGrid

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LAYOUT = TokenLayout.of(VideoGrid(8, 6, 12), TileShape(2, 2, 4))
FRAME, ROW, COLUMN = LAYOUT.token_coords.unbind(-1)


def _clamp(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return torch.clamp(x, low, high)


def _sta(window: tuple[int, int, int]) -> MaskMod:
    """Window in tiles; every axis here has more tiles than the window, or an even number as many."""

    def keep(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kept = q >= 0
        axes = zip((FRAME, ROW, COLUMN), (2, 2, 4), (4, 3, 3), window, strict=True)
        for position, tile, count, size in axes:
            if size < count:
                centre = _clamp(position[q] // tile, size // 2, count - 1 - size // 2)
                kept = kept & ((centre - position[k] // tile).abs() <= size // 2)
        return kept

    return keep


def _gna(window: tuple[int, int, int], stride: tuple[int, int, int]) -> MaskMod:
    def keep(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kept = q >= 0
        for position, extent, w, s in zip((FRAME, ROW, COLUMN), (8, 6, 12), window, stride, strict=True):
            leader = _clamp(position[q] // s * s + s // 2, 0, extent - 1)
            centre = _clamp(leader, w // 2, extent - 1 - (w // 2 + w % 2 - 1))
            kept = kept & (position[k] >= centre - w // 2) & (position[k] <= centre + w // 2 + w % 2 - 1)
        return kept

    return keep


def _radial(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """72 tokens a frame, so 2^7; decay .1, floor 4: widths 6.4 -> 4 at d = 2, 3 and 4 at d = 4..7; frame 0 whole."""
    apart = ((ROW[q] - ROW[k]) * 12 + COLUMN[q] - COLUMN[k]).abs()
    distance = (FRAME[q] - FRAME[k]).abs()
    reach = torch.where(distance <= 1, 72.0, torch.where(distance <= 3, 32 * 0.1, 16 * 0.1).clamp(min=4.0))
    return (apart <= reach) | (FRAME[k] == 0)


def _spatial(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return ((FRAME[q] * 72 + ROW[q] * 12 + COLUMN[q]) - (FRAME[k] * 72 + ROW[k] * 12 + COLUMN[k])).abs() < 108


def _temporal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return ((ROW[q] * 12 + COLUMN[q]) * 8 + FRAME[q] - (ROW[k] * 12 + COLUMN[k]) * 8 - FRAME[k]).abs() < 57.6


CASES = [
    (PatternSpec.make("sliding_tile", window=(3, 1, 3)), _sta((3, 1, 3)), True),
    (PatternSpec.make("sliding_tile", window=(4, 2, 1)), _sta((4, 2, 1)), True),
    (PatternSpec.make("neighborhood", window=(4, 2, 8), stride=(4, 2, 4)), _gna((4, 2, 8), (4, 2, 4)), False),
    (PatternSpec.make("neighborhood", window=(4, 2, 4), stride=(4, 2, 4)), _gna((4, 2, 4), (4, 2, 4)), True),
    (PatternSpec.make("neighborhood", window=(3, 4, 5)), _gna((3, 4, 5), (1, 1, 1)), False),
    (PatternSpec.make("radial", decay=0.1, floor=4), _radial, False),
    (PatternSpec.make("spatial_band", width=1.5), _spatial, False),
    (PatternSpec.make("temporal_band", width=0.1, unit="video"), _temporal, False),
]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_of_the_formula() -> None:
    """FlexAttention rounds each formula out to the same blocks, and where it fits the tiles attends the same."""
    size, tokens = LAYOUT.tile_shape.tokens, LAYOUT.tokens
    q, k, v = (torch.randn(1, tokens, 2, 16, dtype=torch.float64) for _ in range(3))
    for spec, formula, aligned in CASES:
        pattern = build_pattern(spec)
        mask = BlockMask.from_dense(pattern.blocks(LAYOUT))
        flex = create_block_mask(formula, 1, 1, tokens, tokens, device="cpu", BLOCK_SIZE=size)
        assert torch.equal(BlockMask.from_flex(flex).dense, mask.dense), spec
        assert (pattern.rounding(LAYOUT) == 1.0) == aligned, spec
        if not aligned:
            continue
        expected = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=flex)
        found = reference.block_sparse_attention(q, k, v, LAYOUT, mask)
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-10, atol=1e-10)

"""The cost of clusters in a kernel of tiles, by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.clusters import DENSITIES, computed, patterns
from benchmarks.precision import GRID
from benchmarks.system_knobs import TILE
from vidaccel.blockmask import BlockMask
from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid
from vidaccel.variablemask import VariableBlockMask


def test_what_a_kernel_of_tiles_computes() -> None:
    own = torch.eye(2, dtype=torch.bool)[None, None]
    sizes = torch.tensor([[[10, 90]]])
    layout = TokenLayout.of(VideoGrid(1, 10, 10), TileShape(1, 10, 10))
    # 10 tokens take one tile of 64, and 90 take two
    found = computed(VariableBlockMask(own, sizes, sizes), layout)
    assert found == pytest.approx((64**2 + 128**2) / (10**2 + 90**2))
    # clusters of nothing but whole tiles, of keys more than of queries, and none of no tokens
    sizes = torch.tensor([[[64, 128]]]), torch.tensor([[[192, 0]]])
    assert computed(VariableBlockMask(torch.ones_like(own), *sizes), layout) == 1.0
    tiles = TokenLayout.of(GRID, TILE)
    assert computed(BlockMask.full(tiles), tiles) == 1.0


def test_all_rows_keep_as_many_pairs() -> None:
    layout = TokenLayout.of(GRID, TILE)
    for density in DENSITIES:
        for name, pattern in patterns(density).items():
            assert pattern.density(layout) == pytest.approx(density, abs=0.01), name

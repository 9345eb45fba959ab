"""Random grids, tiles and layouts for the property tests, and how many cases each of them runs.

The budget sums to over 2,000 random (grid, tile, text length, heads, batch) cases, which ``test_layout.py`` asserts;
every property test asserts that it really ran its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid

BUDGET = {
    "tile_untile": 600,
    "blocks": 150,
    "choose_tile": 300,
    "blockmask": 300,
    "dense": 30,
    "sliding_tile": 300,
    "neighborhood": 300,
    "radial": 300,
    "spatial_band": 150,
    "temporal_band": 150,
    "first_frame_sink": 100,
    "first_places_sink": 150,
    "union": 150,
}


#: Of a pattern with a file of its own.
OWN = 150


def run_cases(name: str, check: Callable[..., None], /, **strategies: st.SearchStrategy[Any]) -> None:
    """Runs ``check`` on as many random cases as the budget of ``name`` says, or ``OWN``, and makes sure of it."""
    ran, budget = 0, BUDGET.get(name, OWN)

    @settings(max_examples=budget)
    @given(**strategies)
    def case(**values: Any) -> None:
        nonlocal ran
        check(**values)
        ran += 1

    case()
    assert ran >= budget, f"only {ran} of {budget} cases of {name}"


@st.composite
def grids(draw: st.DrawFn, most: int = 280) -> VideoGrid:
    """A grid of at most ``most`` tokens, often flat along some axis."""
    frames = draw(st.integers(1, 9))
    height = draw(st.integers(1, max(1, min(12, most // frames))))
    width = draw(st.integers(1, max(1, min(15, most // (frames * height)))))
    return VideoGrid(frames, height, width)


#: Edges beyond most grids' extents are meant: a tile is cut to the grid.
tiles = st.builds(TileShape, st.integers(1, 5), st.integers(1, 6), st.integers(1, 8))


@st.composite
def layouts(draw: st.DrawFn, most: int = 280, text: tuple[int, ...] = (0, 1, 7, 77)) -> TokenLayout:
    """A layout of a random grid, mostly ragged, with text before, after or not at all."""
    return TokenLayout.of(
        draw(grids(most)), draw(tiles), text_tokens=draw(st.sampled_from(text)), text_first=draw(st.booleans())
    )


def tile_members(grid: VideoGrid, tile: TileShape) -> list[list[int]]:
    """Raster positions of each tile's tokens, tile by tile: the definition, written as loops."""
    blocks = []
    starts = (range(0, extent, step) for extent, step in zip(grid, tile, strict=True))
    for t, h, w in itertools.product(*starts):
        blocks.append(
            [
                (f * grid.height + y) * grid.width + x
                for f in range(t, min(t + tile.frames, grid.frames))
                for y in range(h, min(h + tile.height, grid.height))
                for x in range(w, min(w + tile.width, grid.width))
            ]
        )
    return blocks


def block_tokens(layout: TokenLayout) -> list[list[int]]:
    """Positions in raster order of each block's tokens, text blocks included, in block order."""
    video = tile_members(layout.grid, layout.tile_shape)
    shift = layout.text_tokens if layout.text_first else 0
    video = [[position + shift for position in block] for block in video]
    first = 0 if layout.text_first else layout.grid.tokens
    positions = list(range(first, first + layout.text_tokens))
    size = layout.tile_shape.tokens
    text = [positions[i : i + size] for i in range(0, len(positions), size)]
    return text + video if layout.text_first else video + text


def token_mask(layout: TokenLayout, blocks: torch.Tensor) -> torch.Tensor:
    """A block mask [..., NB, NB] at every pair of tokens in layout order, by loops over block pairs."""
    sizes = [len(block) for block in block_tokens(layout)]
    rows = torch.cat([blocks[..., i : i + 1, :].expand(*blocks.shape[:-2], n, -1) for i, n in enumerate(sizes)], -2)
    return torch.cat([rows[..., j : j + 1].expand(*rows.shape[:-1], n) for j, n in enumerate(sizes)], -1)

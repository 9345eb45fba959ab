"""Neighborhood attention to the token: NATTEN's window rule written out for every query, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.configs.presets import load_preset
from vidaccel.errors import ConfigError
from vidaccel.kernels import reference, torch_sparse
from vidaccel.layout import TokenLayout
from vidaccel.patterns import FirstFrameSink, Neighborhood, SlidingTile, Union, build_pattern
from vidaccel.patterns.windows import check_window
from vidaccel.types import TileShape, VideoGrid

GRID, TILE = VideoGrid(5, 7, 9), TileShape(2, 4, 4)


def window_of(query: int, extent: int, window: int, stride: int, dilation: int) -> list[int]:
    """Key positions of one query along one axis."""
    same = [position for position in range(extent) if position % dilation == query % dilation]
    length = len(same)
    window = min(window, length)
    stride = min(stride, window)
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = min((query // dilation // stride) * stride + stride // 2, length - 1)
    centre = min(max(leader, left), length - 1 - right)
    return [same[i] for i in range(centre - left, centre + right + 1)]


def natten(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: TokenLayout, rule: tuple[tuple[int, int, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Output and LSE of one head, tokens in raster order with text where the layout has it; q, k, v [S,D]."""
    _, height, width = layout.grid
    start = layout.video_start
    text = [i for i in range(layout.tokens) if not start <= i < start + layout.grid.tokens]
    out, lse = np.empty_like(q), np.empty(len(q))
    for token in range(layout.tokens):
        keys = list(range(layout.tokens))
        if token not in text:
            place = token - start
            at = (place // (height * width), place // width % height, place % width)
            axes = [window_of(i, n, *axis) for i, n, axis in zip(at, layout.grid, zip(*rule, strict=True), strict=True)]
            keys = text + [start + (f * height + y) * width + x for f, y, x in itertools.product(*axes)]
        scores = k[keys] @ q[token] / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[token] = weights @ v[keys] / weights.sum()
        lse[token] = scores.max() + math.log(weights.sum())
    return out, lse


CASES = {
    "every query its own window": ((3, 3, 5), (1, 1, 1), (1, 1, 1)),
    "even window and stride": ((4, 4, 6), (2, 3, 4), (1, 1, 1)),
    "dilated": ((2, 3, 2), (1, 1, 1), (2, 1, 3)),
    "strided and dilated": ((3, 3, 4), (2, 2, 3), (1, 2, 2)),
    "blocked": ((3, 4, 4), (3, 4, 4), (1, 1, 1)),
}
TEXT: dict[str, dict[str, Any]] = {
    "no text": {},
    "text after": {"text_tokens": 11},
    "text before": {"text_tokens": 40, "text_first": True},
}


@pytest.mark.parametrize("rule", CASES.values(), ids=CASES)
@pytest.mark.parametrize("text", TEXT.values(), ids=TEXT)
def test_attention_is_that_of_the_formula(rule: tuple[tuple[int, int, int], ...], text: dict[str, Any]) -> None:
    layout = TokenLayout.of(GRID, TILE, **text)
    window, stride, dilation = rule
    mask = Neighborhood(window=window, stride=stride, dilation=dilation, exact=True).mask(layout)
    assert mask.rule is not None and mask.partial.any()
    # batch 2, two heads, slices of one tensor with the channels apart
    fused = torch.randn(2, 3, 8, layout.tokens, 2, dtype=torch.float64).permute(1, 0, 3, 4, 2)
    expected = [[natten(*(x[b, :, h].numpy() for x in fused), layout, rule) for h in range(2)] for b in range(2)]
    out = torch.tensor(np.array([[one[0] for one in heads] for heads in expected])).transpose(1, 2)
    lse = torch.tensor(np.array([[one[1] for one in heads] for heads in expected]))
    q, k, v = (layout.tile(x) for x in fused)
    exact, exact_lse = reference.block_sparse_attention(q, k, v, layout, mask, return_lse=True, out_dtype=torch.float64)
    torch.testing.assert_close(layout.untile(exact), out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layout.untile(exact_lse, dim=2), lse, rtol=1e-10, atol=1e-10)
    found, found_lse = torch_sparse.block_sparse_attention(
        q.float(), k.float(), v.float(), layout, mask, return_lse=True
    )
    bound = rounding(q.float(), k.float(), v.float())
    assert_rounded(layout.untile(found), out, bound.out)
    assert_rounded(layout.untile(found_lse, dim=2), lse, bound.lse)


@pytest.mark.parametrize("rule", CASES.values(), ids=CASES)
def test_density_counts_the_formula(rule: tuple[tuple[int, int, int], ...]) -> None:
    layout = TokenLayout.of(GRID, TILE)
    window, stride, dilation = rule
    pattern = Neighborhood(window=window, stride=stride, dilation=dilation, exact=True)
    kept = 1.0
    for extent, axis in zip(GRID, zip(*rule, strict=True), strict=True):
        kept *= sum(len(window_of(i, extent, *axis)) for i in range(extent))
    assert pattern.density(layout) == pattern.exact_density(layout) == kept / GRID.tokens**2
    assert pattern.mask(layout).density(layout) == pytest.approx(kept / GRID.tokens**2, rel=1e-12)
    rounded = Neighborhood(window=window, stride=stride, dilation=dilation)
    assert rounded.density(layout) > pattern.density(layout) and pattern.rounding(layout) == 1.0
    assert torch.equal(rounded.blocks(layout), pattern.blocks(layout))
    assert "keeps exactly" in pattern.describe(layout) and "of them partial" in pattern.describe(layout)


def test_published_windows_fit_the_tiles() -> None:
    """30x48x80, window (18,24,24), stride (16,8,8): tiles of 2x8x8 lie in one stride group and on window edges."""
    layout = TokenLayout.of(VideoGrid(30, 48, 80), TileShape(2, 8, 8))
    head = load_preset("gna").lookup(0.5, "transformer", 3, "cond").for_head(0, 12)
    pattern = build_pattern(head.pattern)
    assert isinstance(pattern, Neighborhood) and pattern.exact
    mask = pattern.mask(layout)
    assert mask.rule is None and not mask.partial.any()
    assert mask.density(layout) == pytest.approx(18 * 24 * 24 / (30 * 48 * 80))
    assert pattern.mask(TokenLayout.of(VideoGrid(30, 48, 80), TileShape(3, 8, 8))).partial.any()


def test_stride_and_window_of_tiles_are_sliding_tiles() -> None:
    """STA is GNA with the tile as stride: no partial blocks, and the same ones kept."""
    layout = TokenLayout.of(VideoGrid(6, 12, 12), TileShape(2, 4, 4))
    mask = Neighborhood(window=(6, 12, 4), stride="tile", exact=True).mask(layout)
    assert mask.rule is None
    assert torch.equal(mask.dense, BlockMask.from_dense(SlidingTile(window=(3, 3, 1)).blocks(layout)).dense)


def test_patterns_of_whole_blocks_refuse_it() -> None:
    exact = Neighborhood(window=(3, 3, 3), exact=True)
    with pytest.raises(ConfigError, match="exact keeps every pair .* min_coverage 0.1"):
        Neighborhood(window=(3, 3, 3), exact=True, min_coverage=0.1)
    with pytest.raises(ConfigError, match="exact is 1; give true or false"):
        Neighborhood(window=(3, 3, 3), exact=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a union is of whole blocks; set exact=false"):
        Union(patterns=(FirstFrameSink(), exact))
    with pytest.raises(ConfigError, match="window .* a dynamic pattern keeps whole blocks"):
        check_window("nabla", "window", exact)
    check_window("nabla", "window", Neighborhood(window=(3, 3, 3)))

"""Rules over tokens: their counts against loops, and what a block mask makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vidaccel.axisrule import AxisRule
from vidaccel.blockmask import BlockMask
from vidaccel.errors import LayoutError
from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid


def make_layout(text: int = 0, text_first: bool = False) -> TokenLayout:
    """2x3x3 tiles, ragged at every far edge."""
    return TokenLayout.of(VideoGrid(3, 7, 8), TileShape(2, 3, 3), text_tokens=text, text_first=text_first)


def random_rule(layout: TokenLayout, heads: int = 1, share: float = 0.6) -> AxisRule:
    """Random matrices in which every position keeps itself, and whole tiles of some."""
    matrices = []
    for extent, tile in zip(layout.grid, layout.tile_shape, strict=True):
        count = -(-extent // tile)
        keep = torch.rand(heads, extent, extent) < share
        coarse = torch.rand(heads, count, count) < share
        coarse = coarse.repeat_interleave(tile, 1).repeat_interleave(tile, 2)[:, :extent, :extent]
        matrices.append((keep & coarse) | coarse.roll(1, -1) | torch.eye(extent, dtype=torch.bool))
    return AxisRule(layout, *matrices)


def kept_pairs(layout: TokenLayout, rule: AxisRule, head: int) -> torch.Tensor:
    """Bool [S,S] in layout order by loops over raster positions."""
    frames, height, width = layout.grid
    n, start = layout.grid.tokens, layout.video_start
    keep = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    f, h, w = (matrix[head].tolist() for matrix in rule.axes)
    places = [(i, j, k) for i in range(frames) for j in range(height) for k in range(width)]
    video = torch.tensor([[f[a][x] and h[b][y] and w[c][z] for x, y, z in places] for a, b, c in places])
    keep[start : start + n, start : start + n] = video
    return layout.tile(layout.tile(keep, 0), 1)


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (20, False), (20, True)])
def test_counts_and_tokens_are_those_of_loops(text: int, text_first: bool) -> None:
    layout = make_layout(text, text_first)
    rule = random_rule(layout, heads=2)
    block = torch.nn.functional.one_hot(layout.block_of_token, layout.num_blocks).double()
    sizes = layout.block_sizes[:, None] * layout.block_sizes
    for head in range(2):
        keep = kept_pairs(layout, rule, head)
        assert torch.equal(rule.token_mask()[head], keep)
        counts = (block.T @ keep.double() @ block).long()
        assert torch.equal(rule.counts[head], counts)
        assert torch.equal(rule.cut[head], (counts > 0) & (counts < sizes))
        assert rule.cut[head].any() and (counts == 0).any() and (counts == sizes).any()


def test_masks_of_rules() -> None:
    layout = make_layout(20)
    rule = random_rule(layout, heads=2)
    everything = torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(everything, rule)
    assert mask.shape[:2] == (1, 2) and torch.equal(mask.dense[0], rule.touched)
    assert torch.equal(mask.partial[0], rule.cut)
    tokens = torch.stack([kept_pairs(layout, rule, head) for head in range(2)])[None]
    assert torch.equal(mask.token_mask(layout), tokens)
    torch.testing.assert_close(mask.head_density(layout), tokens.double().mean((-1, -2)))
    assert not mask.is_full() and "of them partial" in repr(mask)
    second = mask.of_heads(slice(1, 2))
    assert torch.equal(second.token_mask(layout), tokens[:, 1:]) and second.of_heads(slice(0, 1)) is second
    again = BlockMask.stack([mask.of_heads(slice(h, h + 1)) for h in range(2)], layout)
    assert torch.equal(again.token_mask(layout), tokens)
    with_plain = BlockMask.stack([second, BlockMask.full(layout)], layout)
    assert torch.equal(with_plain.token_mask(layout)[0, 0], tokens[0, 1]) and with_plain.dense[0, 1].all()
    assert not with_plain.partial[0, 1].any()


def test_a_rule_that_cuts_nothing_is_no_rule() -> None:
    layout = make_layout()
    everything = torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
    mask = BlockMask.from_dense(everything, AxisRule.stack([None], layout))
    assert mask.rule is None and mask.is_full() and not mask.partial.any()
    assert BlockMask.stack([mask, mask], layout).rule is None


def test_mistakes_are_named() -> None:
    layout = make_layout()
    rule = random_rule(layout, heads=2)
    eye = torch.eye(layout.num_blocks, dtype=torch.bool)
    with pytest.raises(LayoutError, match=r"the rule keeps token pairs of blocks \(\d+, \d+\), which .* drops"):
        BlockMask.from_dense(eye, rule)
    with pytest.raises(LayoutError, match="do not fit a rule for 2 heads"):
        BlockMask.from_dense(torch.ones(3, *eye.shape, dtype=torch.bool), rule)
    whole = torch.ones_like(eye)
    mask = BlockMask.from_dense(whole, rule)
    with pytest.raises(LayoutError, match="cannot be united"):
        mask.union(BlockMask.from_dense(whole))
    with pytest.raises(LayoutError, match="2 heads does not fit a block mask of 1"):
        BlockMask(mask.kv_num_blocks[:, :1], mask.kv_indices[:, :1], rule)
    with pytest.raises(LayoutError, match="cannot be stacked"):
        BlockMask.stack([mask], layout)
    other = TokenLayout.of(VideoGrid(3, 8, 7), TileShape(2, 3, 3))
    assert other.num_blocks == layout.num_blocks
    with pytest.raises(LayoutError, match="rule over the tokens of .* build the mask from this layout"):
        mask.check(other)
    frames, rows, columns = rule.axes
    with pytest.raises(LayoutError, match="rows of a rule over tokens is torch.int64"):
        AxisRule(layout, frames, rows.long(), columns)
    empty = columns.clone()
    empty[1, 5] = False
    with pytest.raises(LayoutError, match="columns .* keeps nothing for position 5 of head 1"):
        AxisRule(layout, frames, rows, empty)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_masks_the_same_tokens() -> None:
    layout = TokenLayout.of(VideoGrid(4, 6, 6), TileShape(2, 3, 3), text_tokens=18)
    rule = random_rule(layout, heads=2)
    mask = BlockMask.from_dense(torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool), rule)
    flex = mask.to_flex(layout)
    assert torch.equal(flex.kv_num_blocks.long(), mask.partial.sum(-1))
    assert flex.full_kv_num_blocks is not None
    assert torch.equal(flex.full_kv_num_blocks.long(), (mask.dense & ~mask.partial).sum(-1))
    q, k, v = (torch.randn(1, 2, layout.tokens, 8, dtype=torch.float64) for _ in range(3))
    found = flex_attention(q, k, v, block_mask=flex)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.token_mask(layout))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

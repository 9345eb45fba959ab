"""Block lists against boolean masks: 300 random cases (layout, heads, batch, density), and FlexAttention's own type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.cases import layouts, run_cases, token_mask
from vidaccel.blockmask import BlockMask
from vidaccel.errors import LayoutError
from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid


def random_blocks(layout: TokenLayout, batch: int, heads: int, share: float) -> torch.Tensor:
    """Random kept pairs [batch, heads, NB, NB], every row with at least one."""
    n = layout.num_blocks
    keep = torch.rand(batch, heads, n, n) < share
    return keep.scatter(-1, torch.randint(n, (batch, heads, n, 1)), True)


def test_lists_densities_and_unions() -> None:
    def check(layout: TokenLayout, batch: int, heads: int, share: float) -> None:
        n = layout.num_blocks
        keep = random_blocks(layout, batch, heads, share)
        mask = BlockMask.from_dense(keep)
        assert mask.shape == (batch, heads, n, n)
        assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
        # the lists as FlexAttention wants them: ascending, and nothing but 0 behind them
        for row, count, indices in zip(
            keep.flatten(0, 2), mask.kv_num_blocks.flatten().tolist(), mask.kv_indices.flatten(0, 2), strict=True
        ):
            kept = row.nonzero().flatten().tolist()
            assert count == len(kept) and indices.tolist() == kept + [0] * (n - count)
        assert torch.equal(mask.dense, keep)
        again = BlockMask(mask.kv_num_blocks, mask.kv_indices)
        assert torch.equal(again.dense, keep)
        assert mask.is_full() == bool(keep.all())
        assert mask.block_density == pytest.approx(float(keep.double().mean()))

        tokens = token_mask(layout, keep)
        assert torch.equal(mask.token_mask(layout), tokens)
        assert torch.allclose(mask.head_density(layout), tokens.double().mean((-1, -2)), rtol=1e-12)
        assert mask.density(layout) == pytest.approx(float(tokens.double().mean()), rel=1e-12)

        other = random_blocks(layout, 1, 1, 0.2)
        union = mask.union(BlockMask.from_dense(other))
        assert torch.equal(union.dense, keep | other)
        assert torch.equal(BlockMask.from_dense(other).union(mask).dense, keep | other)

    run_cases(
        "blockmask",
        check,
        layout=layouts(most=120, text=(0, 1, 7, 33)),
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        share=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
    )


@pytest.fixture
def layout() -> TokenLayout:
    """18 ragged blocks and 2 of text."""
    return TokenLayout.of(VideoGrid(5, 5, 5), TileShape(2, 2, 3), text_tokens=15)


def test_axes_left_out_are_broadcast(layout: TokenLayout) -> None:
    keep = random_blocks(layout, 2, 3, 0.3)
    assert BlockMask.from_dense(keep[0, 0]).shape[:2] == (1, 1)
    assert BlockMask.from_dense(keep[0]).shape[:2] == (1, 3)
    heads = BlockMask.from_dense(keep[:1])
    batches = BlockMask.from_dense(keep[:, :1])
    assert torch.equal(heads.union(batches).dense, keep[:1] | keep[:, :1])
    assert heads.union(batches).shape[:2] == (2, 3)


def test_dense_does_not_follow_later_writes(layout: TokenLayout) -> None:
    keep = random_blocks(layout, 1, 1, 0.3)
    mask = BlockMask.from_dense(keep)
    before = keep.clone()
    keep.fill_(True)
    assert torch.equal(mask.dense, before)


def test_a_strided_mask_is_read_in_its_order(layout: TokenLayout) -> None:
    """Kept columns and list slots are matched by their order in memory, which a transposed mask must not upset."""
    keep = random_blocks(layout, 1, 2, 0.5) | torch.eye(layout.num_blocks, dtype=torch.bool)
    assert torch.equal(BlockMask.from_dense(keep.mT).dense, keep.mT)
    shared = keep[:, :1].expand(2, 3, -1, -1)
    assert torch.equal(BlockMask.from_dense(shared).dense, shared)


def test_full_keeps_everything(layout: TokenLayout) -> None:
    mask = BlockMask.full(layout)
    assert mask.is_full() and mask.density(layout) == 1.0 and mask.block_density == 1.0
    assert repr(mask) == "BlockMask(1x1 heads, 20x20 blocks, 100.0% kept)"
    assert mask.device == torch.device("cpu") and torch.equal(mask.to("cpu").dense, mask.dense)


def test_density_counts_tokens_not_blocks() -> None:
    """Five tokens in blocks of 4 and 1: the diagonal is half of the blocks, but 17 of 25 token pairs."""
    layout = TokenLayout.of(VideoGrid(1, 1, 5), TileShape(1, 1, 4))
    mask = BlockMask.from_dense(torch.eye(2, dtype=torch.bool))
    assert mask.block_density == 0.5
    assert mask.density(layout) == pytest.approx(17 / 25)


def test_an_empty_row_is_refused(layout: TokenLayout) -> None:
    keep = torch.ones(1, 2, layout.num_blocks, layout.num_blocks, dtype=torch.bool)
    keep[0, 1, 3] = False
    with pytest.raises(LayoutError, match=r"\[0, 1, 3\].*empty; every row keeps a block"):
        BlockMask.from_dense(keep)


def test_bad_tensors_are_refused(layout: TokenLayout) -> None:
    mask = BlockMask.full(layout)
    with pytest.raises(LayoutError, match="boolean tensor of 2 to 4 axes, found torch.float32"):
        BlockMask.from_dense(torch.ones(4, 4))
    with pytest.raises(LayoutError, match="2 to 4 axes"):
        BlockMask.from_dense(torch.ones(4, dtype=torch.bool))
    with pytest.raises(LayoutError, match="do not fit together"):
        BlockMask(mask.kv_num_blocks[:, :, 1:], mask.kv_indices)
    with pytest.raises(LayoutError, match="int32"):
        BlockMask(mask.kv_num_blocks.long(), mask.kv_indices)
    with pytest.raises(LayoutError, match="lists 21 key blocks, but there are 20"):
        BlockMask(mask.kv_num_blocks + 1, mask.kv_indices)


def test_a_mask_of_another_layout_is_refused(layout: TokenLayout) -> None:
    mask = BlockMask.full(layout)
    other = TokenLayout.of(VideoGrid(5, 5, 5), TileShape(2, 2, 2))
    for use in (mask.density, mask.token_mask, mask.check, mask.to_flex):
        with pytest.raises(LayoutError, match="has 20x20 blocks.*build the mask from this layout"):
            use(other)
    with pytest.raises(LayoutError, match="cannot unite"):
        mask.union(BlockMask.full(other))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_round_trip_and_attention() -> None:
    """FlexAttention reads our lists as we do: same blocks back, and the attention of the token mask.

    Uncompiled FlexAttention reads the mask function only and compiled FlexAttention the lists only; a mask without
    the function once ran dense when uncompiled.
    """
    for text, shape in ((0, (2, 3)), (24, (2, 1)), (12, (1, 3))):  # per batch and head, per batch, per head
        layout = TokenLayout.of(VideoGrid(4, 4, 6), TileShape(2, 2, 3), text_tokens=text)
        keep = random_blocks(layout, *shape, 0.3)
        flex = BlockMask.from_dense(keep).to_flex(layout)
        assert isinstance(flex, FlexBlockMask)
        assert torch.equal(BlockMask.from_flex(flex).dense, keep)
        q, k, v = (torch.randn(2, 3, layout.tokens, 16, dtype=torch.float64) for _ in range(3))
        found = flex_attention(q, k, v, block_mask=flex)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(layout, keep))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_partial_flex_blocks_are_rounded_out() -> None:
    """A causal mask of 3 blocks has partial blocks on its diagonal; a whole-block mask keeps them whole."""
    flex = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 48, 48, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(BlockMask.from_flex(flex).dense[0, 0], torch.ones(3, 3).tril().bool())


def test_ragged_layouts_have_no_flex_form(layout: TokenLayout) -> None:
    with pytest.raises(LayoutError, match="blocks of one size.*sizes \\[.*choose a tile that divides the grid"):
        BlockMask.full(layout).to_flex(layout)

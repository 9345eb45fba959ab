"""Partial blocks of the gather path against the oracle, which masks every token pair; and the tables for Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts
from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.axisrule import AxisRule
from vidaccel.blockmask import BlockMask
from vidaccel.errors import KernelError
from vidaccel.kernels import reference, torch_sparse
from vidaccel.kernels.contract import Skips
from vidaccel.kernels.triton.ruletables import rule_tables
from vidaccel.kernels.triton.worklist import worklist
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Neighborhood

RAGGED = {"grid": (5, 7, 9), "tile": (2, 4, 4)}
WINDOWS = [
    Neighborhood(window=(3, 3, 5), exact=True),
    Neighborhood(window=(2, 4, 6), stride=(2, 3, 4), exact=True),
    Neighborhood(window=(5, 3, 3), dilation=(1, 2, 2), exact=True),
]


def stacked(layout: TokenLayout, heads: int = 3) -> BlockMask:
    """A window of its own for each head, and a last head that keeps everything."""
    masks = [pattern.mask(layout) for pattern in WINDOWS[: heads - 1]]
    return BlockMask.stack([*masks, BlockMask.full(layout)], layout)


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in float64."""
    result = reference.block_sparse_attention(
        q, k, v, layout, mask, return_lse=True, out_dtype=torch.float64, **options
    )
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize("tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("text", [{}, {"text": 13}, {"text": 13, "text_first": True}], ids=["none", "after", "before"])
def test_a_rule_for_each_head(text: dict[str, int], tail: bool) -> None:
    layout = make_layout(**RAGGED, **text)
    mask = stacked(layout)
    q, k, v = random_qkv(layout, batch=2, heads=3)
    out, lse = torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=tail, return_lse=True)
    exact, exact_lse = oracle(q, k, v, layout, mask, tail=tail)
    assert_as_good_as_eager(out, eager(q, k, v, layout, mask, tail), exact)
    assert_rounded(lse, exact_lse, rounding(q, k, v).lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rule_for_all_heads(dtype: torch.dtype) -> None:
    layout = make_layout((4, 8, 12), (2, 4, 4))
    mask = WINDOWS[0].mask(layout)
    tensors = random_qkv(layout, batch=2, heads=2, dtype=dtype)
    for tail in (False, True):
        out = torch_sparse.block_sparse_attention(*tensors, layout, mask, tail=tail)
        assert isinstance(out, torch.Tensor)
        assert_as_good_as_eager(out, eager(*tensors, layout, mask, tail), oracle(*tensors, layout, mask, tail=tail)[0])


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout(**RAGGED)
    mask = stacked(layout)
    q, k, v = random_qkv(layout, heads=3)
    whole = torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=True)
    monkeypatch.setitem(torch_sparse._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(torch_sparse._SLAB_BYTES, "cpu", 1)
    torch.testing.assert_close(torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=True), whole)


def test_a_mask_for_each_sample() -> None:
    layout = make_layout(**RAGGED)
    masks = [WINDOWS[0].mask(layout), BlockMask.full(layout)]
    keep = torch.cat([mask.dense for mask in masks])
    mask = BlockMask.from_dense(keep, WINDOWS[0].token_rule(layout))
    q, k, v = random_qkv(layout, batch=2)
    out = torch_sparse.block_sparse_attention(q, k, v, layout, mask)
    assert_as_good_as_eager(out, eager(q, k, v, layout, mask), oracle(q, k, v, layout, mask)[0])


def test_the_tail_does_not_stand_in_for_masked_tokens() -> None:
    """Tokens that a partial block drops are gone: a rule that touches every block has nothing to summarise."""
    layout = make_layout((2, 4, 8), (2, 4, 4))
    columns = torch.ones(1, 8, 8, dtype=torch.bool)
    columns[:, :, ::2] = False
    full = AxisRule.stack([None], layout)
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), AxisRule(layout, full.frames, full.rows, columns))
    assert mask.partial.all()
    q, k, v = random_qkv(layout)
    for kernel in (reference, torch_sparse):
        with_tail, without = (kernel.block_sparse_attention(q, k, v, layout, mask, tail=tail) for tail in (True, False))
        torch.testing.assert_close(with_tail, without, rtol=0, atol=0)


def test_skipping_decides_by_the_kept_scores() -> None:
    """The largest key of a block is masked: what is left of it is far below, so the block is passed over."""
    layout = make_layout((1, 4, 8), (1, 4, 4))
    columns = torch.ones(1, 8, 8, dtype=torch.bool)
    columns[:, :, 5] = False
    full = AxisRule.stack([None], layout)
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), AxisRule(layout, full.frames, full.rows, columns))
    q = torch.ones(1, layout.tokens, 1, 4)
    k = torch.zeros_like(q)
    k[:, layout.token_coords[:, 2] >= 4] = -20.0
    k[:, layout.token_coords[:, 2] == 5] = 20.0
    v = torch.randn_like(q)
    skips = replace(Skips.of(-5.0, q), pieces=None)
    out = reference.block_sparse_attention(q, k, v, layout, mask, skips=skips)
    assert skips.skipped.tolist() == [[32 * 16]]
    first = (layout.token_coords[:, 2] < 4).nonzero().squeeze(-1)
    torch.testing.assert_close(out, v[:, first].mean(1, keepdim=True).expand_as(v))


@given(layouts(most=150, text=(0, 7)), st.integers(1, 2), st.floats(0.2, 1.0), st.integers(0, 1 << 16))
@settings(max_examples=40)
def test_words_and_bits_are_the_rule(layout: TokenLayout, heads: int, share: float, seed: int) -> None:
    """(word of a query for a tile & bits of a key) == bits, for every pair of video tokens."""
    torch.manual_seed(seed)
    matrices = [(torch.rand(heads, n, n) < share) | torch.eye(n, dtype=torch.bool) for n in layout.grid]
    rule = AxisRule(layout, *matrices)
    tables = rule_tables(rule, torch.device("cpu"))
    place = tables.query_place.long()[:, :, None] + tables.tile_place.long()[:, layout.block_of_token][:, None]
    video = layout.video_tokens
    for head in range(heads):
        word = torch.zeros((), dtype=tables.words.dtype)
        for axis in range(3):
            word = word | tables.words[head][place[axis]]
        kept = (word & tables.key_bits) == tables.key_bits
        assert torch.equal(kept[video, video], rule.token_mask()[head, video, video])


def test_long_tiles_need_longer_words() -> None:
    def tables_of(tile: tuple[int, int, int]) -> torch.dtype:
        layout = make_layout((1, 2, 70), tile)
        return rule_tables(AxisRule.stack([None], layout), torch.device("cpu")).words.dtype

    assert tables_of((1, 2, 28)) == torch.int32 and tables_of((1, 2, 29)) == torch.int64
    with pytest.raises(KernelError, match="edges of 64 tokens .* at most 63"):
        tables_of((1, 2, 61))


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 32), (16, 8), (64, 64)])
def test_partial_pieces_are_marked(block_m: int, block_n: int) -> None:
    layout = make_layout(**RAGGED, text=9)
    mask = stacked(layout)
    work = worklist(mask, layout, 2, 3, block_m, block_n, tail=True)
    assert work.rule is not None
    for head in range(3):
        for piece, count in enumerate(work.kv_num[0, head].tolist()):
            listed = work.kv_index[0, head, piece, :count].tolist()
            pieces = [-1 - i if i < 0 else i for i in listed]
            assert pieces == sorted(pieces)
            for one, index in zip(listed, pieces, strict=True):
                block = int(work.k.block[index])
                partial = block < layout.num_blocks and bool(mask.partial[0, head, work.q.block[piece], block])
                assert (one < 0) == partial
    assert worklist(BlockMask.full(layout), layout, 1, 1, 32, 32, tail=False).rule is None

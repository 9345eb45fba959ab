"""Work lists against the block mask they come from: every kept pair once, nothing else, heavy rows first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.helpers import make_layout, random_mask
from vidaccel.kernels.triton.worklist import ALIGNMENT, WorkList, aligned_offsets, worklist

RAGGED = {"grid": (3, 7, 9), "tile": (2, 4, 4)}


def kept_pairs(work: WorkList, tokens: int, keys: int, b: int, h: int) -> torch.Tensor:
    """How often each (query, row of keys and means) pair is on a list: int [S, keys]."""
    seen = torch.zeros(tokens, keys, dtype=torch.int32)
    for i in range(len(work.q)):
        q = slice(int(work.q.start[i]), int(work.q.start[i] + work.q.length[i]))
        for piece in work.kv_index[b, h, i, : work.kv_num[b, h, i]].tolist():
            seen[q, work.k.start[piece] : work.k.start[piece] + work.k.length[piece]] += 1
    return seen


@pytest.mark.parametrize("text", [0, 13])
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 32), (16, 32), (32, 16), (64, 8)])
def test_lists_hold_every_kept_pair_once(text: int, block_m: int, block_n: int) -> None:
    layout = make_layout(**RAGGED, text=text)
    mask = random_mask(layout, 2, [0.2, 0.7])
    work = worklist(mask, layout, 2, 2, block_m, block_n, tail=False)
    assert int(work.q.length.max()) <= block_m and int(work.k.length.max()) <= block_n
    assert int(work.q.length.sum()) == int(work.k.length.sum()) == layout.tokens
    expected = mask.token_mask(layout).int()
    for b in range(2):
        for h in range(2):
            assert torch.equal(kept_pairs(work, layout.tokens, layout.tokens, b, h), expected[b, h])


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(0, 20),
    st.sampled_from([4, 16, 64]),
    st.sampled_from([4, 16, 64]),
    st.floats(0.0, 1.0),
)
def test_tail_lists_hold_the_means_of_what_is_skipped(
    grid: tuple[int, int, int], tile: tuple[int, int, int], text: int, block_m: int, block_n: int, density: float
) -> None:
    layout = make_layout(grid, tile, text=text)
    mask = random_mask(layout, 1, [density])
    work = worklist(mask, layout, 1, 1, block_m, block_n, tail=True)
    n, tokens = layout.num_blocks, layout.tokens
    seen = kept_pairs(work, tokens, tokens + n, 0, 0)
    assert torch.equal(seen[:, :tokens], mask.token_mask(layout).int()[0, 0])
    assert work.bias is not None
    skipped = ~mask.dense[0, 0]
    logs = layout.block_sizes.float().log2().expand(n, n)
    assert torch.equal(work.bias[:-1, :n], torch.where(skipped, logs, torch.tensor(-math.inf)))
    assert torch.isneginf(work.bias[:-1, n:]).all() and not work.bias[-1].any()
    # a skipped block's mean is on the list of every query that skips it
    assert (seen[:, tokens:].bool() | ~skipped[layout.block_of_token]).all()
    # and rows that skip nothing walk no means at all
    full = ~skipped.any(-1)[layout.block_of_token]
    assert not seen[full, tokens:].any()


def test_exact_pieces_come_before_means() -> None:
    layout = make_layout(**RAGGED)
    work = worklist(random_mask(layout, 1, [0.4]), layout, 1, 1, 32, 8, tail=True)
    for i in range(len(work.q)):
        pieces = work.kv_index[0, 0, i, : work.kv_num[0, 0, i]]
        assert torch.equal(pieces, pieces.sort().values) and int(pieces[0]) < work.exact


@pytest.mark.parametrize("heads_in_mask", [1, 3])
def test_long_lists_come_first_and_every_program_once(heads_in_mask: int) -> None:
    layout = make_layout(**RAGGED)
    mask = random_mask(layout, 1, [0.1, 0.9, 0.5][:heads_in_mask])
    work = worklist(mask, layout, 2, 3, 16, 32, tail=False)
    assert torch.equal(work.order.sort().values, torch.arange(work.order.numel(), dtype=torch.int32))
    lengths = work.kv_num.expand(2, 3, -1).flatten()[work.order.long()]
    assert (lengths.diff() <= 0).all()


def test_aligned_offsets_leave_room_for_every_block() -> None:
    layout = make_layout(**RAGGED, text=5)
    offsets = aligned_offsets(layout)
    assert not (offsets % ALIGNMENT).any()
    assert (offsets.diff()[:-1] >= layout.block_sizes).all()
    assert offsets.diff()[-1] >= layout.num_blocks
    work = worklist(random_mask(layout, 1, [1.0]), layout, 1, 1, 32, 16, tail=True)
    assert not (work.k_aligned % ALIGNMENT).any()
    ends = (work.k_aligned + work.k.length).sort().values
    assert (ends[:-1] <= work.k_aligned.sort().values[1:]).all()  # pieces do not overlap


def test_a_mask_is_cut_once() -> None:
    layout = make_layout()
    mask = random_mask(layout, 1, [0.5])
    first = worklist(mask, layout, 1, 2, 32, 32, tail=False)
    assert worklist(mask, layout, 1, 2, 32, 32, tail=False) is first
    assert worklist(mask, layout, 1, 2, 32, 16, tail=False) is not first

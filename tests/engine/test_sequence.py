"""Sequences with other tokens around the video, and padding behind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidaccel import TileShape, TokenLayout, VideoGrid
from vidaccel.engine.sequence import Sequence, padding_of, parts_of

GRID, TILE = VideoGrid(3, 3, 5), TileShape(2, 2, 2)
CPU = torch.device("cpu")


@given(before=st.integers(0, 9), behind=st.integers(0, 9), tiled=st.booleans())
def test_there_and_back(before: int, behind: int, tiled: bool) -> None:
    """In layout order the video is in tiles and the others are together; the way back is exact."""
    tokens = before + GRID.tokens + behind
    sequence = Sequence(GRID, TILE, tokens, before, tiled)
    layout = sequence.layout(CPU)
    assert layout.tokens == tokens and layout.text_tokens == before + behind

    video = TokenLayout.of(GRID, TILE).order if tiled else torch.arange(GRID.tokens)  # what the model's order holds
    others = 1000 + torch.arange(before + behind)
    x = torch.cat([others[:before], video, others[before:]])[None, :, None, None].double()
    there = sequence.to_layout(x)
    start = layout.video_start
    found = there[0, start : start + GRID.tokens, 0, 0].long()
    assert torch.equal(found, TokenLayout.of(GRID, TILE).order)
    rest = torch.cat([there[0, :start, 0, 0], there[0, start + GRID.tokens :, 0, 0]]).long()
    assert torch.equal(rest, others)
    assert torch.equal(sequence.from_layout(there), x)


def test_nothing_moves_where_nothing_has_to() -> None:
    x = torch.randn(2, GRID.tokens + 4, 1, 8)
    for before in (0, 4):
        assert Sequence(GRID, TILE, GRID.tokens + 4, before, tiled=True).to_layout(x) is x


def test_padding_of_every_form_of_mask() -> None:
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole = torch.cat([torch.ones(2, 7, dtype=torch.long), valid], dim=1)
    assert padding_of(whole.bool()[:, None, None], 2, 12) == (10, 12)  # [B, 1, 1, S]
    assert padding_of(whole, 2, 12) == (10, 12)  # [B, S], integers
    assert padding_of(valid, 2, 12) == (10, 12)  # of the last tokens
    assert padding_of(valid[:1], 2, 12) == (10, 10)  # one row for the batch


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.zeros(2, 1, 1, 12), "float32 weights"),
        (torch.ones(2, 1, 12, 12, dtype=torch.bool), "rules of its own for each query"),
        (torch.ones(2, 3, 1, 12, dtype=torch.bool), "rules of its own"),
        (torch.tensor([[1, 0, 1]]).bool(), "not at the end"),
        (torch.ones(3, 12, dtype=torch.bool), "shape"),
    ],
)
def test_a_mask_that_is_more_than_padding_says_so(mask: torch.Tensor, why: str) -> None:
    found = padding_of(mask, 2, 12)
    assert isinstance(found, str) and why in found


def test_parts_cover_the_batch_once() -> None:
    parts = parts_of((10, 12, 10), CPU)
    x = torch.arange(3 * 12).reshape(3, 12, 1, 1)
    taken = [part.take(x) for part in parts]
    assert [tuple(t.shape[:2]) for t in taken] == [(2, 10), (1, 12)]
    assert torch.equal(taken[0][1], x[2, :10]) and torch.equal(taken[1][0], x[1])
    assert sum(part.share for part in parts) == pytest.approx(1)
    (only,) = parts_of((5, 5), CPU)
    assert only.samples is None and only.valid == 5

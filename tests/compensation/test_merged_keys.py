"""Merged keys with a bias of +log(count) against the formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cases import tile_members
from tests.compensation.calls import (
    LAYOUTS,
    Array,
    Head,
    allowed_of,
    call_of,
    keeps_its_promises,
    random_blocks,
    sparse_row,
)
from tests.patterns.calls import make_call
from tests.rounding import assert_rounded
from vidaccel.compensation import MergedKeys, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid


def _groups(head: Head, block: int, parts: int) -> list[list[int]]:
    """Tokens of a video block by their place in the frame, runs of places together."""
    grid = head.layout.grid
    members = tile_members(grid, head.layout.tile_shape)[head.video.index(block)]
    places = sorted({position % (grid.height * grid.width) for position in members})
    count = min(parts, len(places))
    groups: list[list[int]] = [[] for _ in range(count)]
    for token, position in zip(head.blocks[block], members, strict=True):
        place = places.index(position % (grid.height * grid.width))
        groups[place * count // len(places)].append(token)
    return groups


def _oracle(head: Head, kept: Array, parts: int) -> Array:
    out = np.zeros_like(head.q)
    groups = {j: _groups(head, j, parts) for j in head.video}
    for i, tokens in enumerate(head.blocks):
        merged = [
            (head.k[group].mean(0), math.log(len(group)), head.v[group].mean(0))
            for j in head.video
            if not kept[i, j]
            for group in groups[j]
        ]
        keys = np.array([key for key, _, _ in merged]).reshape(len(merged), head.k.shape[1])
        for t in tokens:
            logits = keys @ head.q[t] * head.scale
            extra = [(logit + bias, value) for logit, (_, bias, value) in zip(logits, merged, strict=True)]
            out[t] = sparse_row(head, t, kept[i], extra)
    return out


@pytest.mark.parametrize("parts", [4, 7])
def test_it_is_its_formula(parts: int) -> None:
    keeps_its_promises(MergedKeys(parts=parts), lambda head, kept: _oracle(head, kept, parts))


def test_one_part_is_the_pooled_tail() -> None:
    for layout in LAYOUTS:
        heads, blocks = make_call(layout), random_blocks(layout)
        tail = call_of(heads, blocks).sparse(tail=True)
        assert_rounded(MergedKeys(parts=1).attend(call_of(heads, blocks)), tail, allowed_of(heads))


def test_it_is_exact_where_a_place_stays_the_same_over_the_frames_of_a_block() -> None:
    """With a part for every place, whatever the values; merging places is not."""
    for layout in LAYOUTS:
        heads, blocks = make_call(layout), random_blocks(layout)
        keys = heads.k.clone()
        offsets = layout.block_offsets.tolist()
        for number, members in enumerate(tile_members(layout.grid, layout.tile_shape)):
            first: dict[int, int] = {}
            start = offsets[number + layout.video_blocks.start]
            for t, position in enumerate(members):
                place = position % (layout.grid.height * layout.grid.width)
                keys[:, start + t] = keys[:, start + first.setdefault(place, t)]
        heads = replace(heads, k=keys, memory={})
        call = call_of(heads, blocks)
        dense = call.full_with_lse()[0]
        assert_rounded(MergedKeys(parts=16).attend(call), dense, allowed_of(heads))
        assert not torch.allclose(MergedKeys(parts=2).attend(call), dense, atol=1e-3)


def test_no_more_parts_are_computed_than_blocks_have_places() -> None:
    for text in (0, 21):
        layout = TokenLayout.of(VideoGrid(6, 3, 6), TileShape(3, 1, 2), text_tokens=text)
        calls = [call_of(make_call(layout), random_blocks(layout)) for _ in range(2)]
        outs = [MergedKeys(parts=parts).attend(call) for parts, call in zip((2, 6), calls, strict=True)]
        assert torch.equal(*outs) and calls[0].density == calls[1].density < 2


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="parts is 0; give a whole number of at least 1"):
        build_compensation(CompensationSpec.make("merged_keys", parts=0))

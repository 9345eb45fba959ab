"""Sparse VideoGen's online choice between static patterns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, expected, make_call, softmax
from tests.rounding import assert_rounded, rounding
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import (
    FirstFrameSink,
    Heads,
    Ordered,
    SpatialBand,
    StaticPattern,
    Svg,
    TemporalBand,
    Union,
    build_pattern,
)
from vidaccel.patterns.sampled import sample_rows

BANDS: tuple[StaticPattern, ...] = (SpatialBand(width=0.5), TemporalBand(width=0.3))


def _attend(head: Head, row: int, keys: list[int]) -> Array:
    return np.asarray(softmax(head.k[keys] @ head.q[row] * head.scale) @ head.v[keys])


def _errors(head: Head, rows: list[int]) -> list[float]:
    found = []
    for pattern in BANDS:
        kept = pattern.blocks(head.layout)
        total = 0.0
        for row in rows:
            own = next(i for i, tokens in enumerate(head.blocks) if row in tokens)
            keys = [t for j, tokens in enumerate(head.blocks) if kept[own, j] for t in tokens]
            everything = list(range(len(head.k)))
            total += float(np.mean((_attend(head, row, keys) - _attend(head, row, everything)) ** 2))
        found.append(total)
    return found


def _choosable(seed: int, layout_number: int) -> Heads:
    """A call whose samples and heads are spatial and temporal in turn: tokens near in one order share a direction."""
    layout = LAYOUTS[layout_number]
    call = make_call(layout, seed=seed)
    _, height, width = layout.grid
    frame, row, column = layout.token_coords.unbind(-1)
    video = layout.video_tokens
    directions = torch.randn(height * width, 16, generator=torch.Generator().manual_seed(seed)).double() * 2
    for b in range(2):
        for h in range(3):
            label = frame if (b + h) % 2 == 0 else row * width + column
            for x in (call.q, call.k):
                x[b, video, h] = 0.3 * x[b, video, h] + directions[label]
    return call


@pytest.mark.parametrize("number", range(3))
def test_each_head_of_each_sample_takes_the_better_band(number: int) -> None:
    call = _choosable(1, number)
    pattern = Svg(patterns=BANDS, rows=20, seed=5)
    rows = sample_rows(call, 20, 5).tokens.tolist()

    def oracle(head: Head) -> list[list[bool]]:
        errors = _errors(head, rows)
        kept: list[list[bool]] = BANDS[errors.index(min(errors))].video_blocks(head.layout).tolist()
        return kept

    kept = pattern.choose(call)
    assert torch.equal(kept, expected(oracle, call))
    masks = [band.video_blocks(call.layout) for band in BANDS]
    taken = [[[torch.equal(kept[b, h], m) for m in masks].index(True) for h in range(3)] for b in range(2)]
    assert taken == [[0, 1, 0], [1, 0, 1]]
    contiguous = replace(call, q=call.q.contiguous(), k=call.k.contiguous(), v=call.v.contiguous())
    assert torch.equal(pattern.choose(contiguous), kept)


def test_a_sink_is_kept_under_every_choice() -> None:
    call = _choosable(1, 1)
    sink = FirstFrameSink()
    kept = Svg(patterns=BANDS, sink=sink, rows=20).choose(call)
    united = [Union(patterns=(band, sink)).video_blocks(call.layout) for band in BANDS]
    for head in kept.flatten(0, 1):
        assert any(torch.equal(head, mask) for mask in united)


def test_drawn_queries_are_video_and_change_with_the_step_and_the_seed() -> None:
    layout = LAYOUTS[2]  # text first
    call = make_call(layout)
    drawn = sample_rows(call, 64, 0)
    assert len(set(drawn.tokens.tolist())) == 64
    assert int(drawn.tokens.min()) >= layout.text_tokens
    assert torch.equal(layout.block_of_token[drawn.tokens] - layout.num_text_blocks, drawn.blocks)
    scores = torch.einsum("brhd,bshd->bhrs", call.q[:, drawn.tokens], call.k) * call.scale
    assert_rounded(drawn.logits, scores, rounding(*(x.float() for x in (call.q, call.k, call.v)), call.scale).lse)
    assert torch.equal(sample_rows(make_call(layout, seed=3), 64, 0).tokens, drawn.tokens)
    for other in (sample_rows(replace(call, step=4), 64, 0), sample_rows(call, 64, 1)):
        assert not torch.equal(other.tokens, drawn.tokens)
    assert len(sample_rows(call, 10**6, 0).tokens) == layout.grid.tokens


@pytest.mark.parametrize("number", range(3))
def test_what_is_compared_may_differ_from_what_runs(number: int) -> None:
    """As published: bands of one width are compared, bands of another run."""
    call = _choosable(1, number)
    compared = Svg(patterns=BANDS, rows=20).choose(call)
    wide: tuple[StaticPattern, ...] = (SpatialBand(width=1.1), TemporalBand(width=0.7))
    kept = Svg(patterns=wide, profiles=BANDS, rows=20).choose(call)
    narrow, run = ([band.video_blocks(call.layout) for band in bands] for bands in (BANDS, wide))
    for b in range(2):
        for h in range(3):
            taken = [torch.equal(compared[b, h], mask) for mask in narrow].index(True)
            assert torch.equal(kept[b, h], run[taken])
    # and where the comparison is turned round, so is the choice
    turned = Svg(patterns=wide, profiles=BANDS[::-1], rows=20).choose(call)
    assert not any(torch.equal(turned[b, h], kept[b, h]) for b in range(2) for h in range(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_may_be_drawn_among_the_first_of_the_frames(layout: TokenLayout) -> None:
    call = make_call(layout)
    _, height, width = layout.grid
    first = height * width + 5

    def raster(coords: torch.Tensor) -> list[int]:
        frame, row, column = coords.unbind(-1)
        return sorted(((frame * height + row) * width + column).tolist())

    drawn = sample_rows(call, 10**6, 0, first)
    assert raster(layout.token_coords[drawn.tokens - layout.video_start]) == list(range(first))
    assert torch.equal(layout.block_of_token[drawn.tokens] - layout.video_blocks.start, drawn.blocks)
    few = sample_rows(call, 20, 0, first)
    assert len(few.tokens) == 20 and {*few.tokens.tolist()} < {*drawn.tokens.tolist()}
    assert len(sample_rows(call, 10**6, 0, 10**6).tokens) == layout.grid.tokens
    order = Ordered(by="token_major", pattern=SpatialBand()).order(call)
    moved = sample_rows(call.reordered(order), 10**6, 0, first)
    assert order.coords is not None
    assert raster(order.coords[moved.tokens - layout.video_start]) == list(range(first))


def test_specs_words_and_mistakes() -> None:
    data: dict[str, object] = {"name": "svg", "rows": 32, "sink": {"name": "first_frame_sink"}}
    data["patterns"] = [{"name": "spatial_band", "width": 2.0}, {"name": "temporal_band"}]
    members = (SpatialBand(width=2.0), TemporalBand())
    assert build_pattern(PatternSpec.from_data(data)) == Svg(patterns=members, sink=FirstFrameSink(), rows=32)
    assert Svg().resolved(LAYOUTS[0]).startswith("spatial_band (within 1.5 frames (94.5 of 315 tokens)")
    assert Svg().density(LAYOUTS[0]) is None
    for params, message in (
        ({"patterns": (PatternSpec("dense"),)}, "give a list of two or more patterns"),
        ({"patterns": (PatternSpec("dense"), PatternSpec.make("draft", density=0.1))}, "fixed by the token grid"),
        ({"patterns": (PatternSpec("dense"), None)}, "a pattern of patterns is null"),
        ({"profiles": (PatternSpec("dense"),)}, "give one for each of the 2 patterns, or null"),
        ({"profiles": (PatternSpec("dense"), 3)}, "a member of profiles is 3"),
        ({"first": 0}, "first is 0; give a whole number of at least 1"),
        ({"sink": 1}, "sink is 1; give a pattern that is fixed by the token grid"),
        ({"rows": 0}, "rows is 0; give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_pattern(PatternSpec.make("svg", **params))

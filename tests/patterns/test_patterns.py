"""What patterns promise besides their formula: borders, rounding, words for reports, caching, names and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import (
    Dense,
    FirstFrameSink,
    Neighborhood,
    Radial,
    SlidingTile,
    SpatialBand,
    TemporalBand,
    Union,
    build_pattern,
    pattern_names,
    register,
)
from vidaccel.patterns.base import Pattern
from vidaccel.types import TileShape, VideoGrid

SMALL = TokenLayout.of(VideoGrid(4, 6, 10), TileShape(2, 2, 2))


def test_windows_move_inward_at_the_borders() -> None:
    """Constant work: each of five tiles keeps three, at the border the first three."""
    layout = TokenLayout.of(VideoGrid(1, 1, 10), TileShape(1, 1, 2))
    kept = SlidingTile(window=(1, 1, 3)).video_blocks(layout).int().tolist()
    assert kept == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("window", [4, 5, 9, 1.0], ids=str)
def test_windows_of_the_axis_and_more_are_the_whole_axis(window: float) -> None:
    layout = TokenLayout.of(VideoGrid(1, 1, 8), TileShape(1, 1, 2))
    assert bool(SlidingTile(window=(1, 1, window)).video_blocks(layout).all())


def test_one_and_all_are_different_windows() -> None:
    """1 is one tile and 1.0 the whole axis, but Python calls them equal: a shared cache entry would mix them up."""
    one, whole = SlidingTile(window=(1, 1, 1)), SlidingTile(window=(1.0, 1.0, 1.0))
    assert one != whole and one == SlidingTile(window=(1, 1, 1))
    assert hash(one) == hash(SlidingTile(window=(1, 1, 1)))
    assert bool(whole.video_blocks(SMALL).all())
    assert torch.equal(one.video_blocks(SMALL), torch.eye(SMALL.num_blocks, dtype=torch.bool))
    assert one.exact_density(SMALL) == pytest.approx(1 / SMALL.num_blocks) and whole.exact_density(SMALL) == 1.0


def test_fractions_carry_to_another_resolution() -> None:
    pattern = SlidingTile(window=(1.0, 0.5, 0.3))
    for grid, tiles in (((6, 12, 20), "3x3x3 of 3x6x10"), ((2, 8, 40), "1x3x7 of 1x4x20")):
        layout = TokenLayout.of(VideoGrid(*grid), TileShape(2, 2, 2))
        assert pattern.resolved(layout) == f"window {tiles} tiles"


def test_stride_of_a_tile_needs_no_rounding_where_the_window_fits() -> None:
    plain = Neighborhood(window=(2, 6, 6))
    blocked = Neighborhood(window=(2, 6, 6), stride="tile")
    assert plain.exact_density(SMALL) == blocked.exact_density(SMALL)
    assert plain.rounding(SMALL) > 1.5
    assert blocked.rounding(SMALL) == 1.0
    # a window of an even number of tiles hangs over by half a tile on either side
    assert Neighborhood(window=(2, 4, 6), stride="tile").rounding(SMALL) > 1.0


def test_coverage_drops_blocks_but_never_the_diagonal() -> None:
    every = TemporalBand(width=0.05, min_coverage=0.0).video_blocks(SMALL)
    some = TemporalBand(width=0.05, min_coverage=0.2).video_blocks(SMALL)
    none = TemporalBand(width=0.05, min_coverage=0.99).video_blocks(SMALL)
    assert bool((every | ~some).all()) and some.sum() < every.sum()
    assert torch.equal(none, torch.eye(SMALL.num_blocks, dtype=torch.bool))


def test_the_first_frame_is_kept_by_all() -> None:
    keep = FirstFrameSink().video_blocks(SMALL)
    first = SMALL.block_coords[:, 0] == 0
    assert bool(keep[:, first].all()) and not bool(keep[~first][:, ~first].all())
    both = FirstFrameSink(queries=True).video_blocks(SMALL)
    assert bool(both[first].all()) and bool((both | ~keep).all())


def test_text_is_dense_on_both_sides() -> None:
    for text_first in (False, True):
        layout = TokenLayout.of(VideoGrid(4, 6, 10), TileShape(2, 2, 2), text_tokens=9, text_first=text_first)
        keep = SlidingTile(window=(1, 1, 1)).blocks(layout)
        assert int(keep.sum()) == layout.num_blocks**2 - layout.num_video_blocks**2 + layout.num_video_blocks
        assert bool(keep[layout.text_blocks].all()) and bool(keep[:, layout.text_blocks].all())


def test_unions_keep_what_a_member_keeps() -> None:
    members = (SpatialBand(width=0.5), TemporalBand(width=0.5), FirstFrameSink())
    union = Union(patterns=members)
    expected = torch.stack([m.video_blocks(SMALL) for m in members]).any(0)
    assert torch.equal(union.video_blocks(SMALL), expected)
    densities = [m.exact_density(SMALL) for m in members]
    assert max(densities) < union.exact_density(SMALL) < sum(densities)
    # a member twice, or a union in a union, changes nothing
    assert Union(patterns=(union, *members)).exact_density(SMALL) == union.exact_density(SMALL)
    assert Union(patterns=(union, Dense())).exact_density(SMALL) == 1.0


def test_masks_are_cached_per_pattern_and_layout() -> None:
    layout = TokenLayout.of(VideoGrid(4, 6, 10), TileShape(2, 2, 2))
    keep = SlidingTile(window=(1, 3, 3)).blocks(layout)
    assert SlidingTile(window=(1, 3, 3)).blocks(TokenLayout.of(layout.grid, layout.tile_shape)) is keep
    assert SlidingTile(window=(1, 3, 5)).blocks(layout) is not keep


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Dense(), "dense, all of 4x6x10: keeps 100.0% of the video's token pairs, 100.0% after"),
        (SlidingTile(window=(1, 2, 0.6)), "sliding_tile, window 1x3x3 of 2x3x5 tiles: keeps 30.0% of"),
        (
            Neighborhood(window=(1.0, 3, 0.3), stride="tile"),
            "neighborhood, window 4x3x3 of 4x6x10 tokens, stride 2x2x2: keeps 15.0%",
        ),
        (
            Neighborhood(window=(9, 2, 2), dilation=(1, 3, 1)),
            "neighborhood, window 4x2x2 of 4x6x10 tokens, stride 1x1x1, dilation 1x3x1: keeps 6.7%",
        ),
        (
            Radial(floor=3),
            "radial, decay 0.2, frames up to 1 apart whole, further ones within 3.2 of 60 tokens, first frame kept",
        ),
        (
            Radial(floor=32, near=0),
            "up to 0 apart whole, further ones within 32 of 60 tokens, 1 of 3 distances skipped",
        ),
        (Radial(near=3, first_frame=False), "radial, decay 0.2, frames up to 3 apart whole: keeps 100.0%"),
        (SpatialBand(width=1.5), "spatial_band, within 1.5 frames (90 of 240 tokens) in frame-major order: keeps"),
        (TemporalBand(width=0.25, unit="video"), "temporal_band, within 1 frames (60 of 240 tokens) in token-major"),
        (FirstFrameSink(frames=0.5), "first_frame_sink, first 2 of 4 frames as keys: keeps 50.0%"),
        (FirstFrameSink(queries=True), "first 1 of 4 frames as keys, and all keys by its queries: keeps 43.8%"),
        (Union(patterns=(Dense(), FirstFrameSink())), "union, dense (all of 4x6x10) + first_frame_sink (first 1 of"),
    ],
    ids=lambda value: value.name if isinstance(value, Pattern) else "",
)
def test_descriptions_say_the_window_as_it_came_out(pattern: Pattern, text: str) -> None:
    found = pattern.describe(SMALL)
    assert text in found
    rounding = f"{pattern.density(SMALL):.1%} after rounding to 2x2x2 blocks (x{pattern.rounding(SMALL):.2f})"
    assert found.endswith(rounding)


def test_specs_are_built_with_their_nested_specs() -> None:
    spec = PatternSpec.from_data(
        {"name": "union", "patterns": [{"name": "spatial_band", "width": 2.0}, {"name": "first_frame_sink"}]}
    )
    assert build_pattern(spec) == Union(patterns=(SpatialBand(width=2.0), FirstFrameSink()))
    assert build_pattern(PatternSpec.make("sliding_tile", window=[1, 0.5, 1.0])) == SlidingTile(window=(1, 0.5, 1.0))


def test_unions_are_counted_with_the_unions_inside() -> None:
    """Counting exactly takes 2^members steps, so nesting must not lift the limit."""
    three = Union(patterns=(Dense(), Radial(), FirstFrameSink()))
    assert len(Union(patterns=(three, three)).rules(SMALL)) == 8
    with pytest.raises(ConfigError, match="9 patterns in all are united; give 2 to 6"):
        Union(patterns=(three, three, three))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sta", {}, f"no pattern is called 'sta'; valid are {', '.join(pattern_names())}"),
        ("dense", {"window": 1}, "'dense' has no parameter window; its parameters are none"),
        (
            "radial",
            {"width": 1, "decay": 1},
            "no parameter width; its parameters are min_coverage, min_columns, decay,",
        ),
        ("sliding_tile", {}, "'sliding_tile' needs window; its parameters are window"),
        ("sliding_tile", {"window": 3}, "window is 3; give three numbers in \\(frames, height, width\\) order"),
        ("sliding_tile", {"window": "333"}, "window is '333'; give three numbers"),
        ("sliding_tile", {"window": (1, 2)}, "give three numbers"),
        ("sliding_tile", {"window": (1, 0, 2)}, "window along height is 0; give a whole number of at least 1, or a"),
        ("sliding_tile", {"window": (1, 1, 1.5)}, "window along width is 1.5;.*fraction of the axis above 0.0 and up"),
        ("sliding_tile", {"window": (True, 1, 1)}, "window along frames is True"),
        ("neighborhood", {"window": (3, 3, 3), "stride": (1, 4, 1)}, "stride 1x4x1 is larger than window 3x3x3"),
        ("neighborhood", {"window": (3, 3, 3), "stride": (1, 0.5, 1)}, "stride is .*; give three whole numbers"),
        ("neighborhood", {"window": (3, 3, 3), "stride": "block"}, "stride is 'block'; give three"),
        ("neighborhood", {"window": (3, 3, 3), "dilation": (0, 1, 1)}, "dilation along frames is 0"),
        ("neighborhood", {"window": (3, 3, 3), "min_coverage": 1.0}, "min_coverage is 1.0; give a share"),
        ("radial", {"decay": 0}, "decay is 0; give a number above 0"),
        ("radial", {"near": 0.5}, "near is 0.5; give a frame distance of 0 or more"),
        ("radial", {"first_frame": 1}, "first_frame is 1; give true or false"),
        ("radial", {"floor": 1.5}, "floor is 1.5"),
        ("radial", {"min_coverage": -0.1}, "min_coverage is -0.1"),
        ("radial", {"min_columns": 1}, "min_columns is 1; give a share of a block"),
        ("radial", {"min_columns": 0.6, "min_coverage": 0.2}, "kept by one of them, so leave the other out"),
        ("sliding_tile", {"window": (1, 1, 1), "inward": 1}, "inward is 1; give true or false"),
        ("spatial_band", {"unit": "tokens"}, "unit is 'tokens'; valid are 'frames' and 'video'"),
        ("spatial_band", {"width": -1}, "width is -1 frames; give a number above 0"),
        ("temporal_band", {"width": 1.5, "unit": "video"}, "width is 1.5 video; give a number above 0 and up to 1"),
        ("first_frame_sink", {"frames": 0}, "frames is 0"),
        ("first_frame_sink", {"queries": "yes"}, "queries is 'yes'; give true or false"),
        ("union", {"patterns": (PatternSpec("dense"),)}, "give a list of 2 to 6 patterns"),
        ("union", {"patterns": ("dense", "radial")}, "'dense' is not a static pattern; give each as a mapping"),
        ("union", {"patterns": (PatternSpec("dense"), PatternSpec("nope"))}, "no pattern is called 'nope'"),
    ],
)
def test_bad_specs_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pattern(PatternSpec.make(name, **params))


def test_a_name_belongs_to_one_class() -> None:
    class Other(Dense):
        """Another class under a name that is taken."""

    with pytest.raises(ConfigError, match="two patterns are called 'dense'; give Other a name of its own"):
        register(Other)
    assert type(build_pattern(PatternSpec("dense"))) is Dense
    assert register(Dense) is Dense

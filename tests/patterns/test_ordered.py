"""Other orders of the tokens: the curves themselves, and patterns inside of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidaccel
from tests.patterns.calls import LAYOUTS, heads_of, make_call
from tests.patterns.orders import attends_what_it_keeps, check_order, choose
from tests.rounding import bound_of_case, distance
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.errors import ConfigError, LayoutError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import (
    CoveragePattern,
    ErrorRouting,
    FirstFrameSink,
    Neighborhood,
    Ordered,
    Pasa,
    PooledTopK,
    PooledTopP,
    Radial,
    Rectified,
    Reuse,
    SlidingTile,
    SpatialBand,
    StaticPattern,
    Svg,
    Svg2,
    TemporalBand,
    Union,
    build_pattern,
)
from vidaccel.patterns.hilbert import hilbert_order
from vidaccel.patterns.ordered import TokenSequence, token_sequence
from vidaccel.patterns.placed import near_blocks
from vidaccel.types import VideoGrid

ORDERS: tuple[TokenSequence, ...] = ("hilbert", "frame_major", "token_major", "frame_patches")
IDS = ["no text", "text last", "text first"]
Place = tuple[int, int, int]


def _places(by: TokenSequence, grid: VideoGrid) -> list[Place]:
    """(frame, row, column) of each token in an order, by loops; the curve from its own test."""
    frames, height, width = grid
    if by == "frame_major":
        return [(f, h, w) for f in range(frames) for h in range(height) for w in range(width)]
    if by == "token_major":
        return [(f, h, w) for h in range(height) for w in range(width) for f in range(frames)]
    if by == "frame_patches":
        every = [(f, h, w) for f in range(frames) for h in range(height) for w in range(width)]
        return sorted(every, key=lambda at: (at[0], at[1] // 8, at[2] // 16, at[1], at[2]))
    return [(n // (height * width), n // width % height, n % width) for n in hilbert_order(grid).tolist()]


def _steps(grid: VideoGrid) -> np.ndarray[Any, Any]:
    """Steps of the curve along all axes together."""
    places = np.array(_places("hilbert", grid))
    return np.asarray(np.abs(np.diff(places, axis=0)).sum(1))


@given(st.tuples(*[st.integers(1, 12)] * 3))
def test_the_curve_visits_every_token_once_and_never_jumps(sides: Place) -> None:
    grid = VideoGrid(*sides)
    assert hilbert_order(grid).sort().values.equal(torch.arange(grid.tokens))
    assert grid.tokens == 1 or _steps(grid).max() <= 2
    if all(side % 2 == 0 for side in sides):
        assert _steps(grid).max() == 1


@pytest.mark.parametrize("grid", [VideoGrid(4, 4, 4), VideoGrid(2, 8, 16), VideoGrid(16, 4, 8), VideoGrid(1, 8, 8)])
def test_with_powers_of_two_every_step_is_to_a_neighbour(grid: VideoGrid) -> None:
    assert (_steps(grid) == 1).all()


@pytest.mark.parametrize("grid", [VideoGrid(16, 12, 12), VideoGrid(9, 15, 26), VideoGrid(8, 16, 16)])
def test_runs_of_the_curve_are_more_compact_than_rows(grid: VideoGrid) -> None:
    def spread(by: TokenSequence) -> float:
        places = np.array(_places(by, grid), dtype=np.float64)
        runs = [places[i : i + 64] for i in range(0, len(places) - 63, 64)]
        return float(np.mean([run.var(0).sum() for run in runs]))

    assert spread("hilbert") < 0.7 * min(spread("frame_major"), spread("token_major"))


@pytest.mark.parametrize("by", ORDERS)
def test_orders_are_what_they_are_called(by: TokenSequence) -> None:
    for grid in (VideoGrid(5, 7, 9), VideoGrid(2, 9, 18)):
        _, height, width = grid
        raster = [(f * height + h) * width + w for f, h, w in _places(by, grid)]
        assert token_sequence(by, grid).tolist() == raster


def _keeps(pattern: StaticPattern, layout: TokenLayout) -> torch.Tensor:
    """The rule itself: token pairs in raster order, bool [V,V], from blocks of one token."""
    if isinstance(pattern, SlidingTile):  # its rule is about the layout's tiles
        tile = [
            (np.array(_places("frame_major", layout.grid)) // np.array(tuple(layout.tile_shape)))[:, a]
            for a in range(3)
        ]
        kept = torch.ones(layout.grid.tokens, layout.grid.tokens, dtype=torch.bool)
        for axis, window, count in zip(tile, pattern.window, layout.tile_counts, strict=True):
            reach = int(window) // 2
            centre = np.clip(axis, reach, count - 1 - reach) if window < count else axis
            near = np.abs(centre[:, None] - axis) <= (reach if window < count else count)
            kept &= torch.from_numpy(near)
        return kept
    single = TokenLayout.of(layout.grid, TileShape(1, 1, 1))
    exact = replace(pattern, min_coverage=0.0, min_columns=0.0) if isinstance(pattern, CoveragePattern) else pattern
    return exact.select(single)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize(
    "pattern",
    [
        SpatialBand(width=1.0, min_coverage=0.3),
        TemporalBand(width=0.6),
        SlidingTile(window=(1, 3, 1)),
        Neighborhood(window=(3, 3, 5), dilation=(1, 2, 1)),
        FirstFrameSink(),
        Radial(decay=0.2, near=1, floor=6, min_coverage=0.1),
        Radial(decay=0.2, near=1, floor=6, min_columns=0.6),
    ],
    ids=lambda pattern: pattern.name,
)
def test_static_rules_are_rounded_to_the_blocks_of_the_order(
    layout: TokenLayout, by: TokenSequence, pattern: StaticPattern
) -> None:
    wrapped = Ordered(by=by, pattern=pattern)
    order = wrapped.order(make_call(layout, batch=1, heads=1))
    check_order(order, layout)
    grid, start = layout.grid, layout.video_start
    _, height, width = grid
    raster = torch.tensor([(f * height + h) * width + w for f, h, w in _places(by, grid)])
    rule = _keeps(pattern, layout)
    sizes = layout.block_sizes[layout.video_blocks].tolist()
    share, columns = getattr(pattern, "min_coverage", 0.0), getattr(pattern, "min_columns", 0.0)

    def enough(block: torch.Tensor) -> bool:
        keys = block.double().mean(0)
        if columns and bool((keys > 0).any()):
            return float((keys[keys > 0] > 1 / 3).double().mean()) > columns
        return float(block.double().mean()) > share

    wanted = torch.tensor(
        [
            [enough(rule[i][:, j]) or a == b for b, j in enumerate(raster.split(sizes))]
            for a, i in enumerate(raster.split(sizes))
        ]
    )
    call = make_call(layout)
    _, blocks = choose(wrapped, call)
    video = layout.video_blocks
    assert torch.equal(blocks[:, :, video, video], wanted.expand(2, 3, -1, -1))
    pairs = torch.tensor(sizes).double()
    assert wrapped.density(layout) == pytest.approx(float(pairs @ wanted.double() @ pairs) / grid.tokens**2)
    kept = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    place = layout.order[order.q[0, 0]][start : start + grid.tokens] - start
    assert torch.equal(place, raster)
    blocked = wanted.repeat_interleave(torch.tensor(sizes), 0).repeat_interleave(torch.tensor(sizes), 1)
    at = order.q[0, 0][start : start + grid.tokens]
    kept[at[:, None], at] = blocked
    attends_what_it_keeps(wrapped, call, kept)


def test_a_union_rounds_each_member_by_its_own_rule() -> None:
    layout = LAYOUTS[0]
    members = (SpatialBand(width=1.0, min_coverage=0.3), FirstFrameSink())
    call = make_call(layout)
    united = choose(Ordered(by="token_major", pattern=Union(patterns=members)), call)[1]
    alone = [choose(Ordered(by="token_major", pattern=member), call)[1] for member in members]
    assert torch.equal(united, alone[0] | alone[1]) and not torch.equal(united, alone[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_rectified_knows_its_neighbours_and_the_first_frame_on_the_curve(layout: TokenLayout) -> None:
    """Its published blocks: runs of the curve; the union written out over tokens."""
    pattern = Rectified(drop=0.9, mass=0.1, neighbours=1, first_frame=True)
    wrapped = Ordered(by="hilbert", pattern=pattern)
    call = make_call(layout)
    order = wrapped.order(call)
    moved = call.reordered(order)
    sizes = layout.block_sizes[layout.video_blocks].tolist()
    places = np.array(_places("hilbert", layout.grid))
    runs = np.split(places, np.cumsum(sizes)[:-1])
    near = [[bool((np.abs(a[:, None] - b).max(-1) <= 1).any()) for b in runs] for a in runs]
    first = [bool((run[:, 0] == 0).any()) for run in runs]
    found = wrapped.choose(moved)
    for sample, rows in enumerate(heads_of(moved)):
        for number, head in enumerate(rows):
            wanted = []
            for i in head.video:
                p = head.pooled(i)
                ranked = sorted(head.video, key=lambda j: -p[j])
                held, count = sum(p[j] for j in head.text), 0
                for j in ranked:
                    held += p[j]
                    count += 1
                    if held > 0.1:
                        break
                best = ranked[: max(count, int(0.1 * len(ranked)), 1)]
                a = i - head.video[0]
                wanted.append([j in best or near[a][b] or (first[a] and first[b]) for b, j in enumerate(head.video)])
            assert found[sample, number].tolist() == wanted


def test_steps_between_blocks_add_up_and_are_tiles_where_blocks_are_tiles() -> None:
    layout = TokenLayout.of(VideoGrid(5, 8, 18), TileShape(1, 8, 16))
    order = Ordered(by="frame_patches", pattern=PooledTopK(aim=0.5)).order(make_call(layout, batch=1, heads=1))
    tile = layout.block_coords
    for reach in (0, 1, 3):
        apart = (tile[:, None] - tile[None]).abs().amax(-1)
        assert torch.equal(near_blocks(layout, order, reach, torch.device("cpu")), apart <= reach)


def test_dynamic_patterns_see_the_heads_in_that_order() -> None:
    layout = LAYOUTS[2]
    call = make_call(layout)
    bands = Svg(patterns=(SpatialBand(width=0.5), TemporalBand(width=0.05)))
    for inner in (PooledTopK(aim=0.3), ErrorRouting(aim=0.3), PooledTopP(mass=0.5, window=FirstFrameSink()), bands):
        wrapped = Ordered(by="token_major", pattern=inner)
        moved = call.reordered(wrapped.order(call))
        assert torch.equal(wrapped.choose(moved), inner.choose(moved))
    kept = wrapped.choose(moved)
    assert not torch.equal(kept, inner.choose(call)), "the bands lie elsewhere"


def test_masks_may_be_kept_inside_an_order() -> None:
    layout = LAYOUTS[0]
    inner = PooledTopK(aim=0.3)
    wrapped = Ordered(by="hilbert", pattern=Reuse(pattern=inner, drift=0.1))
    memory: dict[str, Any] = {}
    call = replace(make_call(layout), memory=memory)
    first = choose(wrapped, call)[1]
    other = make_call(layout, seed=9)
    near = replace(call, k=0.93 * call.k + 0.03 * other.k)
    assert torch.equal(choose(wrapped, near)[1], first)
    assert not torch.equal(choose(Ordered(by="hilbert", pattern=inner), near)[1], first), "or it would show nothing"
    assert wrapped.stateful and not Ordered(by="hilbert", pattern=inner).stateful


@pytest.mark.parametrize("by", ORDERS)
def test_everything_kept_is_dense_in_a_pipeline(by: str) -> None:
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    for inner, same in (
        ({"name": "pooled_top_k", "density": 1.0}, True),
        ({"name": "temporal_band", "width": 0.4}, False),
    ):
        spec = PatternSpec.from_data({"name": "ordered", "order": by, "pattern": inner})
        plan = Plan(
            "test", (Rule(LayerPolicy((HeadPolicy(spec), HeadPolicy(spec), HeadPolicy()))),), tile=TileShape(1, 1, 2)
        )
        session = vidaccel.patch(pipe, plan, strict=True)
        found = CASES[0].run(pipe)
        assert session.report().sparse_calls == session.report().calls
        assert (distance(found, dense) <= bound_of_case(CASES[0])) == same
        assert bool(found.isfinite().all())
        vidaccel.unpatch(pipe)


def test_words_and_mistakes() -> None:
    layout = LAYOUTS[0]
    spec = PatternSpec.from_data({"name": "ordered", "order": "token_major", "pattern": {"name": "temporal_band"}})
    pattern = build_pattern(spec)
    assert pattern == Ordered(by="token_major", pattern=TemporalBand())
    assert pattern.resolved(layout).startswith("token_major order, temporal_band (")
    assert Ordered(pattern=PooledTopK(aim=0.3)).density(layout) == 6 / 18
    assert math.isclose(Ordered(by="frame_major", pattern=FirstFrameSink(frames=1.0)).density(layout) or 0, 1.0)
    assert Ordered(pattern=Pasa(aim=0.3)).needs_curvature and not Ordered(pattern=TemporalBand()).needs_curvature
    for make, message in (
        (lambda: Ordered(by="raster", pattern=PooledTopK(aim=0.3)), "order is 'raster'; valid are hilbert"),  # type: ignore[arg-type]
        (lambda: Ordered(pattern=Svg2()), "does not need blocks to be tiles"),
        (lambda: Ordered(pattern=Ordered(pattern=PooledTopK(aim=0.3))), "does not need blocks to be tiles"),
        (lambda: Ordered(pattern=None), "pattern is None"),  # type: ignore[arg-type]
        (lambda: Ordered(pattern=Neighborhood(window=(3, 3, 3), exact=True)), "set exact=false there"),
        (lambda: Reuse(pattern=Ordered(pattern=PooledTopK(aim=0.3))), "put reuse inside of ordered"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    call = make_call(layout)
    with pytest.raises(LayoutError, match="heads in layout order"):
        Ordered(pattern=PooledTopK(aim=0.3)).choose(call)
    clustered = call.reordered(Svg2(queries=4, keys=4, first=1).order(call))
    with pytest.raises(ConfigError, match="each head's tokens lie elsewhere"):
        Rectified().choose(clustered)

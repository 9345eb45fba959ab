"""Every static pattern against its formula at every pair of tokens: 1,480 random cases on small grids.

The oracle (``formulas.py``) is written independently and pooled to blocks by counting; then large grids on sampled
blocks, where counting every pair would take too long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.cases import tile_members
from tests.patterns.formulas import FORMULAS, Triple, coordinates, kept_tokens, round_row
from tests.patterns.rounded import keeps_its_formula, plain, spec_of
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern, pattern_names
from vidaccel.patterns.registry import pattern_class
from vidaccel.types import TileShape, VideoGrid

extents = st.one_of(st.integers(1, 9), st.floats(0.05, 1.0), st.just(1.0))
windows = st.tuples(extents, extents, extents)
#: Ways to round to blocks: by any pair, by pairs, by whole keys.
roundings = st.sampled_from(
    [
        {},
        {},
        *({"min_coverage": x} for x in (0.1, 0.2, 1 / 3, 0.5, 0.9)),
        *({"min_columns": x} for x in (0.2, 0.6, 0.9)),
    ]
)
bands = {
    "width": st.one_of(st.floats(0.01, 1.0), st.sampled_from((0.5, 1.0))),
    "unit": st.sampled_from(("frames", "video")),
}


def _rounded(params: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda values, rounding: {**values, **rounding}, st.fixed_dictionaries(params), roundings)


@st.composite
def _neighborhoods(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(windows)
    # a stride over a whole-number window is an error, so draw below it
    steps = st.tuples(*(st.integers(1, w if isinstance(w, int) else 5) for w in window))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.one_of(steps, st.just("tile")))
    return {"window": window, "stride": stride, "dilation": dilation, **draw(roundings)}


PARAMS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "dense": st.just({}),
    "sliding_tile": st.fixed_dictionaries({"window": windows, "odd": st.booleans(), "inward": st.booleans()}),
    "neighborhood": _neighborhoods(),
    "radial": _rounded(
        {
            "decay": st.floats(0.05, 4.0),
            "near": st.integers(0, 3),
            "first_frame": st.booleans(),
            "floor": st.one_of(st.integers(1, 40), st.floats(0.02, 1.0)),
        }
    ),
    "spatial_band": _rounded(bands),
    "temporal_band": _rounded(bands),
    "first_frame_sink": st.fixed_dictionaries({"frames": extents, "queries": st.booleans()}),
    "first_places_sink": _rounded({"frames": extents}),
}
_member = st.sampled_from(sorted(PARAMS)).flatmap(lambda name: st.tuples(st.just(name), PARAMS[name]))
PARAMS["union"] = st.fixed_dictionaries({"patterns": st.lists(_member, min_size=2, max_size=4).map(tuple)})


def test_every_static_pattern_has_a_formula() -> None:
    assert {*FORMULAS, "union"} == set(PARAMS)
    for cls in (pattern_class(PatternSpec(name)) for name in pattern_names()):
        if not cls.dynamic and cls.name not in PARAMS:
            own = Path(__file__).with_name(f"test_{cls.__module__.rpartition('.')[2]}.py")
            assert own.exists() and "keeps_its_formula(" in own.read_text(encoding="utf-8"), (
                f"no formula of the pattern {cls.name}; call keeps_its_formula in tests/patterns/{own.name}"
            )


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_blocks_are_the_formula_rounded_out(name: str) -> None:
    keeps_its_formula(name, PARAMS[name])


#: Parameters as plans have them, on grids as models have them.
KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("sliding_tile", {"window": (1.0, 0.5, 0.3)}),
    ("sliding_tile", {"window": (3, 4, 3)}),
    ("sliding_tile", {"window": (1.0, 0.5, 0.3), "odd": True}),
    ("sliding_tile", {"window": (11, 3, 3), "inward": False}),
    ("neighborhood", {"window": (0.6, 0.5, 0.3), "stride": "tile"}),
    ("neighborhood", {"window": (9, 15, 20), "stride": (1, 2, 4), "dilation": (2, 1, 3)}),
    ("radial", {}),
    ("radial", {"min_columns": 0.6}),
    ("radial", {"decay": 0.95, "floor": 0.035, "first_frame": False, "min_coverage": 0.2}),
    ("spatial_band", {"width": 2.0, "min_coverage": 0.33}),
    ("temporal_band", {"width": 2.0}),
    ("first_frame_sink", {}),
    ("first_places_sink", {}),
    ("union", {"patterns": (("spatial_band", {}), ("temporal_band", {}), ("first_frame_sink", {}))}),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("grid", "tile"),
    [((21, 30, 52), None), ((21, 45, 80), None), ((21, 45, 80), (1, 8, 16)), ((16, 12, 12), None)],
    ids=["480p", "720p", "720p-flat-tiles", "small-model"],
)
@pytest.mark.parametrize(("name", "params"), KNOWN, ids=[f"{n}-{i}" for i, (n, _) in enumerate(KNOWN)])
def test_blocks_of_large_grids(name: str, params: dict[str, Any], grid: Triple, tile: Triple | None) -> None:
    """Two query blocks, one of them at a ragged corner, against all keys."""
    layout = TokenLayout.of(VideoGrid(*grid), tile and TileShape(*tile))
    found = build_pattern(spec_of(name, params)).video_blocks(layout)
    blocks = tile_members(layout.grid, layout.tile_shape)
    owner = np.empty(layout.grid.tokens, dtype=np.int64)
    for number, members in enumerate(blocks):
        owner[members] = number
    keys = coordinates(grid)

    def row(number: int, name: str, params: dict[str, Any]) -> Any:
        if name == "union":
            return np.logical_or.reduce([row(number, n, p) for n, p in params["patterns"]])
        mask = kept_tokens(name, params, *plain(layout), keys[blocks[number]], keys)
        return round_row(mask, owner, len(blocks), params)

    for number in (len(blocks) // 2 - 3, len(blocks) - 1):
        expected = row(number, name, params)
        expected[number] = True
        assert found[number].tolist() == expected.tolist()

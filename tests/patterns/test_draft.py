"""DraftAttention: one threshold a head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts
from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Draft


def _oracle(head: Head, density: float) -> list[list[bool]]:
    maps = {i: head.pooled(i) for i in head.video}
    entries = sorted(((float(maps[i][j]), i, j) for i in head.video for j in head.video), reverse=True)
    kept = {(i, j) for _, i, j in entries[: math.ceil(density * len(entries))]}
    for i in head.video:
        if not any((i, j) in kept for j in head.video):
            kept.add((i, max(head.video, key=lambda j: float(maps[i][j]))))
    return [[(i, j) in kept for j in head.video] for i in head.video]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_it_is_its_formula(density: float) -> None:
    """At .02 there are fewer entries than rows, so some come out empty and are filled."""
    keeps_its_promises(Draft(aim=density), lambda head: _oracle(head, density))


@settings(max_examples=40)
@given(layout=layouts(most=120), density=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_density_is_that_of_the_whole_map(layout: TokenLayout, density: float, seed: int) -> None:
    pattern = Draft(aim=density)
    kept = pattern.choose(make_call(layout, batch=1, heads=2, dim=4, seed=seed))
    wanted = round(pattern.density(layout) * layout.num_video_blocks**2)
    assert bool(kept.any(-1).all())
    filled = kept.sum((-1, -2)) - wanted
    assert bool(((filled >= 0) & (filled < layout.num_video_blocks)).all())


def test_rows_differ_and_words() -> None:
    counts = Draft(aim=0.2).choose(make_call(LAYOUTS[0])).sum(-1)
    assert counts.min() < counts.max()
    assert Draft(aim=0.1).resolved(LAYOUTS[0]) == "33 of 324 pairs of blocks a head"
    assert torch.equal(Draft(aim=1.0).choose(make_call(LAYOUTS[0])).sum(-1), torch.full((2, 3, 18), 18))

"""DraftAttention: one threshold a head."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts
from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call, softmax
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Draft


def _oracle(head: Head, density: float) -> list[list[bool]]:
    maps: dict[tuple[int, int], float] = {}
    for i in head.video:  # text is no part of the softmax
        query = head.mean(head.q, i)
        logits = [head.scale * float(query @ head.k_means[j]) + math.log(len(head.blocks[j])) for j in head.video]
        maps |= {(i, j): float(p) for j, p in zip(head.video, softmax(np.array(logits)), strict=True)}
    smallest = sorted(maps.values())[: math.floor((1 - Fraction(str(density))) * len(maps))]
    kept = {pair for pair, p in maps.items() if p >= max(smallest)}
    for i in head.video:
        if not any((i, j) in kept for j in head.video):
            kept.add((i, max(head.video, key=lambda j: maps[i, j])))
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


def test_text_changes_nothing() -> None:
    """Text that takes nearly all attention leaves the map as it is."""
    layout = LAYOUTS[1]
    call = make_call(layout)
    kept = Draft(aim=0.2).choose(call)
    call.k[:, layout.grid.tokens :] += 5 * call.q[:, : layout.grid.tokens].mean(1, keepdim=True)
    assert torch.equal(Draft(aim=0.2).choose(replace(call, memory={})), kept)


def test_rows_differ_and_words() -> None:
    counts = Draft(aim=0.2).choose(make_call(LAYOUTS[0])).sum(-1)
    assert counts.min() < counts.max()
    assert Draft(aim=0.1).resolved(LAYOUTS[0]) == "34 of 324 pairs of blocks a head"
    assert torch.equal(Draft(aim=1.0).choose(make_call(LAYOUTS[0])).sum(-1), torch.full((2, 3, 18), 18))

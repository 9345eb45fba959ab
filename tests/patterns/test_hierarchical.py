"""Coarse to fine search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts
from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Hierarchical, PooledTopK


def _oracle(head: Head, density: float, group: tuple[int, int, int], wide: float) -> list[list[bool]]:
    k = math.ceil(density * len(head.video))
    groups: dict[tuple[int, ...], list[int]] = {}
    for j, tile in zip(head.video, head.tiles, strict=True):
        groups.setdefault(tuple(x // g for x, g in zip(tile, group, strict=True)), []).append(j)
    tokens = {g: [t for j in members for t in head.blocks[j]] for g, members in groups.items()}
    rows = []
    for i in head.video:
        query = head.mean(head.q, i) * head.scale
        score = {g: float(query @ np.mean(head.k[tokens[g]], axis=0)) + math.log(len(tokens[g])) for g in groups}
        tiles: list[int] = []
        for g in sorted(groups, key=lambda g: -score[g]):
            if len(tiles) >= wide * k:
                break
            tiles += groups[g]
        fine = {j: float(query @ head.mean(head.k, j)) + math.log(len(head.blocks[j])) for j in tiles}
        best = sorted(tiles, key=lambda j: -fine[j])[:k]
        rows.append([j in best for j in head.video])
    return rows


@pytest.mark.parametrize(
    ("density", "group", "wide"), [(0.2, (2, 2, 2), 1.0), (0.3, (1, 2, 2), 2.0), (0.1, (3, 1, 1), 1.5)]
)
def test_it_is_its_formula(density: float, group: tuple[int, int, int], wide: float) -> None:
    pattern = Hierarchical(aim=density, group=group, wide=wide)
    keeps_its_promises(pattern, lambda head: _oracle(head, density, group, wide))


@settings(max_examples=40)
@given(
    layout=layouts(most=150),
    density=st.floats(0.01, 1.0),
    wide=st.floats(1.0, 4.0),
    group=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 99),
)
def test_density_as_promised(
    layout: TokenLayout, density: float, wide: float, group: tuple[int, int, int], seed: int
) -> None:
    pattern = Hierarchical(aim=density, group=group, wide=wide)
    kept = pattern.choose(make_call(layout, batch=1, heads=2, dim=4, seed=seed))
    assert bool((kept.sum(-1) == pattern.count(layout)).all())


def test_a_search_of_everything_is_top_k() -> None:
    call = make_call(LAYOUTS[0])
    everything = PooledTopK(aim=0.2).choose(call)
    assert torch.equal(Hierarchical(aim=0.2, wide=100).choose(call), everything)
    assert torch.equal(Hierarchical(aim=0.2, wide=1, group=(1, 1, 1)).choose(call), everything)
    assert not torch.equal(Hierarchical(aim=0.2, wide=1).choose(call), everything)


def test_words_and_mistakes() -> None:
    assert Hierarchical(aim=0.25).resolved(LAYOUTS[0]) == "5 of 18 blocks a row by way of 4 groups"
    for params, message in (
        ({"group": (2, 2)}, "group is \\(2, 2\\); give three numbers"),
        ({"group": (2, 0, 2)}, "an extent of group is 0"),
        ({"wide": 0.5}, "wide is 0.5; give a number of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Hierarchical(aim=0.3, **params)  # type: ignore[arg-type]

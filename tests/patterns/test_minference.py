"""MInference's kinds of heads, and the choice between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call, softmax
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import MInference
from vidaccel.patterns.minference import _block_mass
from vidaccel.patterns.sampled import sample_rows
from vidaccel.types import TileShape, VideoGrid

Rows = list[list[bool]]


def _kinds(head: Head, density: float, rows: list[int]) -> tuple[list[Rows], list[float]]:
    """The three masks, and the sampled attention that each keeps."""
    n = len(head.video)
    k = math.ceil(density * n)
    half = math.ceil(k / 2)
    owner = {t: j for j, tokens in enumerate(head.blocks) for t in tokens}
    mass = np.zeros((len(rows), n))
    for r, row in enumerate(rows):
        p = softmax(head.k @ head.q[row] * head.scale)
        for column, j in enumerate(head.video):
            mass[r, column] = sum(p[t] for t in head.blocks[j])
    place = [head.video.index(owner[row]) for row in rows]

    def apart(a: int, b: int) -> tuple[int, ...]:
        return tuple(x - y for x, y in zip(head.tiles[a], head.tiles[b], strict=True))

    a_shape = []
    for i in range(n):
        near = sorted(range(half, n), key=lambda j, i=i: sum(x * x for x in apart(i, j)))  # type: ignore[misc]
        a_shape.append([j < half or j in near[: k - half] for j in range(n)])
    columns = sorted(range(n), key=lambda j: -mass[:, j].sum())[:half]
    along: dict[tuple[int, ...], float] = {}
    for r, i in enumerate(place):
        for j in range(n):
            along[apart(i, j)] = along.get(apart(i, j), 0.0) + mass[r, j]
    slashes = sorted(along, key=lambda d: -along[d])[: k - half]
    vertical_slash = [[j in columns or apart(i, j) in slashes for j in range(n)] for i in range(n)]
    block = []
    for i in head.video:
        p = head.pooled(i)
        best = sorted(head.video, key=lambda j: -p[j])[:k]
        block.append([j in best for j in head.video])
    masks = [a_shape, vertical_slash, block]
    return masks, [sum(float(mass[r, j]) for r, i in enumerate(place) for j in range(n) if m[i][j]) for m in masks]


@pytest.mark.parametrize("density", [0.2, 0.45])
def test_it_is_its_formula(density: float) -> None:
    pattern = MInference(aim=density, rows=24, seed=2)
    drawn = {layout: sample_rows(make_call(layout), 24, 2).tokens.tolist() for layout in LAYOUTS}

    def oracle(head: Head) -> Rows:
        masks, held = _kinds(head, density, drawn[head.layout])
        return masks[held.index(max(held))]

    keeps_its_promises(pattern, oracle)


def test_a_head_takes_the_kind_it_is_made_for() -> None:
    """Pairs of tiles in no order are seen by their means. Tiles that look one row down, with random signs so that the
    means are near zero, only by sampled queries."""
    layout = TokenLayout.of(VideoGrid(4, 8, 8), TileShape(2, 2, 2))
    call = make_call(layout, batch=1, heads=2)
    call.q[:], call.k[:] = 0.05 * call.q, 0.05 * call.k
    block = layout.block_of_token
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(32, 16, generator=generator).double() * 3
    signs = torch.randint(0, 2, (2, 256, 1), generator=generator).double() * 2 - 1
    tiles = layout.block_coords.tolist()
    down = torch.tensor([tiles.index([t, min(h + 1, 3), w]) for t, h, w in tiles])
    call.q[0, :, 0] += signs[0] * wide[down[block]]
    call.k[0, :, 0] += signs[1] * wide[block]
    call.q[0, :, 1] += wide[torch.randperm(32, generator=generator)[block]]
    call.k[0, :, 1] += wide[block]
    pattern = MInference(aim=0.25)
    drawn = sample_rows(call, 64, 0)
    _, vertical_slash, block_top_k = pattern.kinds(call, drawn, _block_mass(call, drawn))
    kept = pattern.choose(call)
    assert torch.equal(kept[0, 0], vertical_slash[0, 0]) and not torch.equal(kept[0, 0], block_top_k[0, 0])
    assert torch.equal(kept[0, 1], block_top_k[0, 1]) and not torch.equal(kept[0, 1], vertical_slash[0, 1])


def test_no_row_has_more_than_its_share() -> None:
    for layout in LAYOUTS:
        call = make_call(layout, seed=4)
        pattern = MInference(aim=0.3)
        drawn = sample_rows(call, 64, 0)
        k = pattern.count(layout)
        for kind in pattern.kinds(call, drawn, _block_mass(call, drawn)):
            assert int(kind.sum(-1).max()) <= k
        assert int(pattern.choose(call).sum(-1).min()) >= 1


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="rows is 0"):
        MInference(aim=0.3, rows=0)
    with pytest.raises(ConfigError, match="density is 3"):
        MInference(aim=3)

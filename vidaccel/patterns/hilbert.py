"""A space-filling curve through a box of any size: a 3D Hilbert curve where the sides are powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from ..types import VideoGrid

__all__ = ["hilbert_order"]

_Vector = tuple[int, int, int]
#: A corner, and three edges along the axes: the walk goes from the corner to the far end of the first edge.
_Box = tuple[_Vector, _Vector, _Vector, _Vector]


@lru_cache(maxsize=16)
def hilbert_order(grid: VideoGrid) -> torch.Tensor:
    """Raster position of each token along the curve, int64 [tokens] on the CPU; cached, do not write into it.

    A box is cut into smaller ones that are walked one after the other, each beginning next to where the one before
    ended: a long box in two along its length, one with two long sides in three (the U of the 2D curve), any other in
    five (the eight octants of the 3D curve, where three pairs of them stay together). Halves are even where they can
    be, because a box with an even edge has a way through that ends at the corner. With even sides every step is to a
    neighbour; with odd ones a few steps are diagonal. Source: the generalised Hilbert curve that Rectified SpaAttn
    orders its tokens by, which goes back to gilbert (J. Cerveny), written anew.
    """
    sides: list[tuple[int, _Vector]] = [
        (grid.frames, (grid.frames, 0, 0)),
        (grid.height, (0, grid.height, 0)),
        (grid.width, (0, 0, grid.width)),
    ]
    a, b, c = (edge for _, edge in sorted(sides, key=lambda side: -side[0]))
    step = (grid.height * grid.width, grid.width, 1)
    tokens = torch.tensor(list(_walk(((0, 0, 0), a, b, c))), dtype=torch.int64)
    return (tokens * torch.tensor(step)).sum(-1)


def _walk(whole: _Box) -> Iterator[_Vector]:
    """The points of a box in order."""
    pending = [whole]
    while pending:
        box = pending.pop()
        corner, *edges = box
        lengths = [_length(edge) for edge in edges]
        if not all(lengths):
            continue
        long = [edge for edge, length in zip(edges, lengths, strict=True) if length > 1]
        if len(long) > 1:
            pending.extend(reversed(_parts(box)))
            continue
        along = long[0] if long else edges[0]
        unit = _unit(along)
        for i in range(_length(along)):
            yield _add(corner, _times(unit, i))


def _parts(box: _Box) -> list[_Box]:
    """The boxes that a box is cut into, in the order of the walk; empty ones among them where an edge is 1."""
    p, a, b, c = box
    w, h, d = _length(a), _length(b), _length(c)
    if w == 1:  # nowhere to go along the first edge
        first, second = (b, c) if h >= d else (c, b)
        return [(p, first, second, a)]
    a2, b2, c2 = _half(a), _half(b), _half(c)
    a_rest, b_rest, c_rest = _less(a, a2), _less(b, b2), _less(c, c2)
    a_end = _less(a, _unit(a))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [(p, a2, b, c), (_add(p, a2), a_rest, b, c)]
    if 3 * h > 4 * d or d == 1:
        down = _add(p, a_end, _less(b2, _unit(b)))
        return [(p, b2, c, a2), (_add(p, b2), a, b_rest, c), (down, _back(b2), c, _back(a_rest))]
    if 3 * d > 4 * h or h == 1:
        down = _add(p, a_end, _less(c2, _unit(c)))
        return [(p, c2, a2, b), (_add(p, c2), a, b, c_rest), (down, _back(c2), _back(a_rest), b)]
    b_last, c_last = _less(b2, _unit(b)), _less(c, _unit(c))
    return [
        (p, b2, c2, a2),
        (_add(p, b2), c, a2, b_rest),
        (_add(p, b_last, c_last), a, _back(b2), _back(c_rest)),
        (_add(p, a_end, b2, c_last), _back(c), _back(a_rest), b_rest),
        (_add(p, a_end, b_last), _back(b2), c2, _back(a_rest)),
    ]


def _length(edge: _Vector) -> int:
    return abs(sum(edge))  # two of the three are 0


def _unit(edge: _Vector) -> _Vector:
    x, y, z = ((n > 0) - (n < 0) for n in edge)
    return x, y, z


def _half(edge: _Vector) -> _Vector:
    """Half of an edge, rounded to an even number of points where there are more than two."""
    length = _length(edge)
    half = length // 2
    return _times(_unit(edge), half + (half % 2 if length > 2 else 0))


def _times(edge: _Vector, factor: int) -> _Vector:
    x, y, z = edge
    return x * factor, y * factor, z * factor


def _back(edge: _Vector) -> _Vector:
    return _times(edge, -1)


def _add(*edges: _Vector) -> _Vector:
    x, y, z = (sum(parts) for parts in zip(*edges, strict=True))
    return x, y, z


def _less(edge: _Vector, other: _Vector) -> _Vector:
    return _add(edge, _back(other))

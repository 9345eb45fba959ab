"""The formulas of ALGORITHMS, token by token, written without any of the library's code: the patterns' oracle.

Each function takes the parameters, the grid and tile as plain tuples, and the (frame, row, column) coordinates of
queries [Q, 3] and keys [K, 3]; it returns the kept pairs as a boolean [Q, K] array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Coords = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Triple = tuple[int, int, int]

__all__ = ["FORMULAS", "coordinates", "kept_tokens", "round_out", "round_row"]


def coordinates(grid: Sequence[int]) -> Coords:
    """Coordinates of every token in raster order, [N, 3]."""
    frames, height, width = grid
    return np.array([(f, y, x) for f in range(frames) for y in range(height) for x in range(width)])


def _along(q: Coords, k: Coords, axis: int, keep: Callable[[int, int], bool], extent: int) -> Mask:
    """``keep(query position, key position)`` of one axis, looked up for every pair."""
    table = np.array([[keep(i, j) for j in range(extent)] for i in range(extent)])
    return table[q[:, None, axis], k[None, :, axis]]


def _number(value: float, axis: int) -> int:
    """A window as a count: fractions of the axis rounded half up, at least 1."""
    return max(1, math.floor(value * axis + 0.5)) if isinstance(value, float) else value


def dense(grid: Triple, tile: Triple, q: Coords, k: Coords) -> Mask:
    return np.ones((len(q), len(k)), dtype=bool)


def sliding_tile(
    grid: Triple,
    tile: Triple,
    q: Coords,
    k: Coords,
    *,
    window: Sequence[float],
    odd: bool = False,
    inward: bool = True,
) -> Mask:
    """STA: c = clamp(q_tile, k//2, N-1-k//2), or q_tile itself as in NABLA; keep iff |c - kv_tile| <= k//2.

    With clamping k >= N is the whole axis, and so is a fraction that comes to it. ``odd`` takes the odd number, or the
    whole axis, that is nearest to a fraction, of two the larger.
    """
    kept = dense(grid, tile, q, k)
    for axis in range(3):
        step = min(tile[axis], grid[axis])
        n = math.ceil(grid[axis] / step)
        share = window[axis]
        size = _number(share, n)
        if odd and isinstance(share, float):
            distances = {w: abs(w - share * n) for w in range(1, n + 1) if w % 2 or w == n}
            size = max(w for w, apart in distances.items() if apart == min(distances.values()))
        whole = size >= n and (inward or isinstance(share, float))

        def keep(i: int, j: int, n: int = n, size: int = size, step: int = step, whole: bool = whole) -> bool:
            half = size // 2
            center = min(max(i // step, half), n - 1 - half) if inward else i // step
            return whole or abs(center - j // step) <= half

        kept &= _along(q, k, axis, keep, grid[axis])
    return kept


def neighborhood(
    grid: Triple,
    tile: Triple,
    q: Coords,
    k: Coords,
    *,
    window: Sequence[float],
    stride: Sequence[int] | str = (1, 1, 1),
    dilation: Sequence[int] = (1, 1, 1),
    **rounding: float,
) -> Mask:
    """GNA: leader = min((q//s)s + s//2, X-1), centre clamped, keep [c - w//2, c + w//2 + w%2 - 1] of one residue."""
    kept = dense(grid, tile, q, k)
    for axis in range(3):
        d = dilation[axis]

        def keep(i: int, j: int, axis: int = axis, d: int = d) -> bool:
            if i % d != j % d:
                return False
            x = len(range(i % d, grid[axis], d))
            w = min(_number(window[axis], x), x)
            s = min(min(tile[axis], grid[axis]) if stride == "tile" else int(stride[axis]), w)
            leader = min((i // d // s) * s + s // 2, x - 1)
            centre = min(max(leader, w // 2), x - 1 - (w // 2 + w % 2 - 1))
            return centre - w // 2 <= j // d <= centre + w // 2 + w % 2 - 1

        kept &= _along(q, k, axis, keep, grid[axis])
    return kept


def radial(
    grid: Triple,
    tile: Triple,
    q: Coords,
    k: Coords,
    *,
    decay: float = 0.2,
    near: int = 1,
    first_frame: bool = True,
    floor: float = 128,
    **rounding: float,
) -> Mask:
    """Radial: len = 2^bit_length(tpf) / 2^bit_length(d) * decay, |col - row| <= max(len, floor), far frames thinned."""
    _, height, width = grid
    area = height * width
    least = min(_number(floor, area), area) if isinstance(floor, float) else floor
    place = [c[:, 1] * width + c[:, 2] for c in (q, k)]
    apart = np.abs(place[0][:, None] - place[1][None, :])
    distance = np.abs(q[:, None, 0] - k[None, :, 0])
    kept = distance <= near
    for d in range(near + 1, grid[0]):
        length = 2 ** len(f"{area:b}") / 2 ** len(f"{d:b}")
        if length < least and d % int(least / length) != 0:
            continue
        kept |= (distance == d) & (apart <= max(length * decay, least))
    return kept | (k[None, :, 0] == 0) if first_frame else kept


def _band(index_q: Coords, index_k: Coords, grid: Triple, width: float, unit: str) -> Mask:
    tokens = width * (grid[1] * grid[2] * grid[0] if unit == "video" else grid[1] * grid[2])
    return np.abs(index_q[:, None] - index_k[None, :]) < tokens


def spatial_band(
    grid: Triple,
    tile: Triple,
    q: Coords,
    k: Coords,
    *,
    width: float = 1.5,
    unit: str = "frames",
    **rounding: float,
) -> Mask:
    """SVG, spatial head: |i - j| < thr in frame-major order."""
    i, j = ((c[:, 0] * grid[1] + c[:, 1]) * grid[2] + c[:, 2] for c in (q, k))
    return _band(i, j, grid, width, unit)


def temporal_band(
    grid: Triple,
    tile: Triple,
    q: Coords,
    k: Coords,
    *,
    width: float = 1.5,
    unit: str = "frames",
    **rounding: float,
) -> Mask:
    """SVG, temporal head: |i - j| < thr in token-major order."""
    i, j = ((c[:, 1] * grid[2] + c[:, 2]) * grid[0] + c[:, 0] for c in (q, k))
    return _band(i, j, grid, width, unit)


def first_frame_sink(
    grid: Triple, tile: Triple, q: Coords, k: Coords, *, frames: float = 1, queries: bool = False
) -> Mask:
    """Keys of the first frames for all; with ``queries`` their queries keep everything too."""
    count = _number(frames, grid[0])
    kept = np.broadcast_to(k[None, :, 0] < count, (len(q), len(k)))
    return kept | (q[:, None, 0] < count) if queries else kept


def first_places_sink(
    grid: Triple, tile: Triple, q: Coords, k: Coords, *, frames: float = 1, **rounding: float
) -> Mask:
    """SVG's temporal heads on Wan: the first H * W keys in token-major order, for each of the first frames."""
    count = min(_number(frames, grid[0]), grid[0]) * grid[1] * grid[2]
    place = (k[:, 1] * grid[2] + k[:, 2]) * grid[0] + k[:, 0]
    return np.broadcast_to(place[None, :] < count, (len(q), len(k)))


FORMULAS: dict[str, Callable[..., Mask]] = {
    f.__name__: f
    for f in (
        dense,
        sliding_tile,
        neighborhood,
        radial,
        spatial_band,
        temporal_band,
        first_frame_sink,
        first_places_sink,
    )
}


def kept_tokens(name: str, params: dict[str, Any], grid: Triple, tile: Triple, q: Coords, k: Coords) -> Mask:
    """The mask of any pattern by name; a union's members are (name, params) pairs."""
    if name == "union":
        members = [kept_tokens(n, p, grid, tile, q, k) for n, p in params["patterns"]]
        return np.logical_or.reduce(members)
    return FORMULAS[name](grid, tile, q, k, **params)


def round_out(mask: Mask, blocks: list[list[int]], params: dict[str, Any]) -> Mask:
    """Kept pairs of blocks, [blocks, blocks], of token pairs in raster order; see :func:`round_row`."""
    owner = np.empty(mask.shape[1], dtype=np.int64)
    for number, members in enumerate(blocks):
        owner[members] = number
    return np.stack([round_row(mask[members], owner, len(blocks), params) for members in blocks])


def round_row(mask: Mask, owner: Coords, blocks: int, params: dict[str, Any]) -> Mask:
    """Which key blocks one block of queries keeps.

    Args:
        mask: its token pairs, [queries, keys].
        owner: the block of each key.
        blocks: how many there are.
        params: ``min_coverage``, the share of pairs to exceed, or ``min_columns``: of the keys that any query keeps,
            the share to exceed by those that over a third of the queries keep. Without, one pair is enough.
    """

    def per_block(of_keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return np.array([int(of_keys[owner == block].sum()) for block in range(blocks)])

    queries = len(mask)
    column = mask.sum(0)
    if params.get("min_columns"):
        touched, filled = per_block(column > 0), per_block(column > queries / 3)
        share = np.array([Fraction(int(f), int(t)) if t else Fraction(0) for f, t in zip(filled, touched, strict=True)])
        return share > Fraction(str(params["min_columns"]))
    pairs = queries * per_block(np.ones_like(owner))
    return per_block(column) > params.get("min_coverage", 0.0) * pairs.astype(float)

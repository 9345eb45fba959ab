"""What is left of a budget between two vertices of the front, spent on single heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .solve import Unit

__all__ = ["per_cost", "spend"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: A budget is dealt out in this many cells: costs are rounded up to them, so it is never overdrawn.
_CELLS = 512
_MOST_OPTIONS = 256


def spend(units: Sequence[Unit], choices: list[Ints], gap: float, room: float) -> None:
    """Spends what is left on single heads, within their units' families; changes ``choices``.

    A multiple-choice knapsack over the most promising options. Which these are depends on the vertex, not on the
    budget, so more room never makes it worse.

    Args:
        gap: cost from this vertex to the next.
        room: cost that is left, less than ``gap``.
    """
    unit_of, head_of, to, cost, saved = _options(units, choices, gap)
    cells = min(_CELLS, int(room / gap * _CELLS)) if gap > 0 else 0
    if not len(cost) or cells < 1:
        return
    width = np.maximum(1, np.ceil(cost / gap * _CELLS)).astype(np.int64).tolist()
    best = np.zeros(_CELLS + 1)
    picks: list[Ints] = []
    for group in np.split(np.arange(len(cost)), np.flatnonzero(np.diff(unit_of) | np.diff(head_of)) + 1):
        before, picked = best, np.full(_CELLS + 1, -1, dtype=np.int64)
        best = before.copy()
        for option in group.tolist():
            reached = before[: _CELLS + 1 - width[option]] + saved[option]
            better = reached > best[width[option] :]
            best[width[option] :][better] = reached[better]
            picked[width[option] :][better] = option
        picks.append(picked)
    for picked in reversed(picks):
        option = int(picked[cells])
        if option >= 0:
            choices[unit_of[option]][head_of[option]] = to[option]
            cells -= width[option]


def _options(units: Sequence[Unit], choices: list[Ints], gap: float) -> tuple[Ints, Ints, Ints, Floats, Floats]:
    """Changes of one head that cost at most ``gap`` and save error: unit, head, candidate, cost and error saved.

    Sorted by unit and head. Of very many, those that save most and those that save most per cost.
    """
    parts: list[tuple[Ints, Ints, Ints, Floats, Floats]] = []
    for number, (unit, chosen) in enumerate(zip(units, choices, strict=True)):
        heads = np.arange(len(chosen))
        more = unit.cost - unit.cost[heads, chosen][:, None]
        saved = unit.error[heads, chosen][:, None] - unit.error
        same = unit.family == unit.family[chosen[0]]
        head, to = np.nonzero(same & unit.allowed & (more > 0) & (more <= gap) & (saved > 0))
        parts.append((np.full(len(head), number), head, to, more[head, to], saved[head, to]))
    unit_of, head_of, to, cost, saved = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(cost) > _MOST_OPTIONS:
        most, worth = np.argsort(-saved, kind="stable"), np.argsort(-per_cost(saved, cost), kind="stable")
        keep = np.unique(np.concatenate([most[: _MOST_OPTIONS // 2], worth[: _MOST_OPTIONS // 2]]))
        return unit_of[keep], head_of[keep], to[keep], cost[keep], saved[keep]
    return unit_of, head_of, to, cost, saved


def per_cost(saved: Floats, cost: Floats) -> Floats:
    """Error saved per cost; a cost too small to see is infinitely worth its while."""
    with np.errstate(over="ignore"):
        return np.divide(saved, cost, out=np.full_like(saved, np.inf), where=cost > 0)

"""Little error within a budget, over separable choices: the least at the vertices of a convex front, in numpy.

Every head of every unit gets one candidate. Errors and costs add up, so for a price λ on cost each head takes the
candidate with the least ``error + λ cost`` on its own, and all answers for all λ are one convex front::

    head    lower convex hull of its candidates, for each family
    unit    Minkowski sum of its heads' hulls (their steps merged by slope), then the hull over its families
    whole   Minkowski sum of the units' hulls: their steps merged by slope

A vertex of the front is the optimum for its cost. Between two vertices the linear relaxation would take part of the
next step; here the rest of the budget goes to single heads, by dynamic programming. So the error is at most that of
the vertex below the budget, and its distance from the optimum less than the error of one step: of one head, or of one
unit that changes its family. It is not the optimum: in drawn problems of two units the error is above the least
possible, with 8 heads each: 0.76% in the mean, 13% at worst; with 16 heads each: 0.46% in the mean, 8% at worst; with
16 heads each and two families: 0.98% in the mean, 38% at worst. The more heads and units there are, the less.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .remainder import per_cost, spend

__all__ = ["Frontier", "Solution", "Unit", "frontier", "solve"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: A budget counts as kept if it is exceeded by no more than this share, which is rounding of the sums.
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Unit:
    """Heads that are chosen together: one layer in one noise bin of one transformer.

    Args:
        key: what the caller calls it, for messages.
        error: float64 [H, C], weighted error of each head under each candidate, at least 0; inf is not allowed there.
        cost: float64 [H, C], in seconds or as density, at least 0.
        family: int64 [C]; all heads of a unit take candidates of one family, such as one precision.

    Raises:
        ConfigError: if the shapes disagree, a number is negative or NaN, or no family serves every head.
    """

    key: Hashable
    error: Floats
    cost: Floats
    family: Ints

    def __post_init__(self) -> None:
        for field, kind in (("error", np.float64), ("cost", np.float64), ("family", np.int64)):
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=kind))
        if self.error.ndim != 2 or self.cost.shape != self.error.shape or self.family.shape != self.error.shape[1:]:
            raise ConfigError(
                f"unit {self.key!r} has error {self.error.shape}, cost {self.cost.shape} and family"
                f" {self.family.shape}; valid are [H, C], [H, C] and [C]"
            )
        cost = self.cost[self.allowed]
        if np.isnan(self.error).any() or (self.error < 0).any() or not (np.isfinite(cost) & (cost >= 0)).all():
            raise ConfigError(
                f"unit {self.key!r} has an error or cost that is negative or NaN, or an infinite cost of an allowed"
                " candidate; give numbers of at least 0, and error inf for what is not allowed"
            )
        if not any(self.allowed[:, self.family == one].any(axis=1).all() for one in np.unique(self.family)):
            raise ConfigError(
                f"no family of candidates of unit {self.key!r} has an allowed one for every head; allow dense, which"
                " always runs"
            )

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """Bool [H, C]."""
        return np.isfinite(self.error)


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice for every head.

    Args:
        choices: for each unit, in order, int64 [H]: the candidate of each head.
        error: summed over all heads.
        cost: likewise; within the budget but for rounding (1e-9 of it).
        apart: the candidates of the units that the caller wants apart, see :func:`frontier`.
    """

    choices: tuple[Ints, ...]
    error: float
    cost: float
    apart: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Frontier:
    """The whole convex front of cost against error. Make it with :func:`frontier`.

    Args:
        units: what was solved.
        cost: float64 [n], of the front's vertices, ascending.
        error: float64 [n], descending.
        slope: float64 [n - 1], error saved per cost from each vertex to the next, descending.
        step_unit: int64 [n - 1], which unit takes a step of its own front there.
        paths: the units' own fronts.
        apart: how many of the last units are told apart.
    """

    units: tuple[Unit, ...]
    cost: Floats
    error: Floats
    slope: Floats
    step_unit: Ints
    paths: tuple[_Path, ...]
    apart: int = 0

    def __len__(self) -> int:
        return len(self.cost)

    def points(self) -> list[tuple[float, float]]:
        """(cost, error) of every vertex, in order."""
        return list(zip(self.cost.tolist(), self.error.tolist(), strict=True))

    def at(self, budget: float) -> Solution:
        """A choice whose cost is at most ``budget``; a larger budget never gives more error.

        At a vertex no choice has less error; between two of them some may, see the module's text.

        Raises:
            ConfigError: if the budget is NaN or below the least possible cost.
        """
        if math.isnan(budget):
            raise ConfigError("the budget is NaN; give a number")
        limit = budget + abs(budget) * _SLACK
        vertex = int(np.searchsorted(self.cost, limit, side="right")) - 1
        if vertex < 0:
            raise ConfigError(
                f"the budget is {budget:.6g}, but the cheapest choice costs {self.cost[0]:.6g}; give at least that, or"
                " cheaper candidates"
            )
        choices = self._choices(vertex)
        if vertex + 1 < len(self):
            gap = float(self.cost[vertex + 1] - self.cost[vertex])
            spend(self.units, choices, gap, limit - float(self.cost[vertex]))
        return self._solution(choices)

    def within(self, error: float) -> Solution:
        """The cheapest vertex whose error is at most ``error``.

        Raises:
            ConfigError: if no choice has so little error.
        """
        enough = np.flatnonzero(self.error <= error + abs(error) * _SLACK)
        if not len(enough):
            raise ConfigError(f"the error may be {error:.6g}, but the least possible is {self.error[-1]:.6g}; allow it")
        return self._solution(self._choices(int(enough[0])))

    def _choices(self, vertex: int) -> list[Ints]:
        taken = np.bincount(self.step_unit[:vertex], minlength=len(self.units))
        return [path.choices(int(steps)) for path, steps in zip(self.paths, taken, strict=True)]

    def _solution(self, choices: list[Ints]) -> Solution:
        error = cost = 0.0
        for unit, chosen in zip(self.units, choices, strict=True):
            heads = np.arange(len(chosen))
            error += float(unit.error[heads, chosen].sum())
            cost += float(unit.cost[heads, chosen].sum())
        last = len(choices) - self.apart
        return Solution(tuple(choices[:last]), error, cost, tuple(int(chosen[0]) for chosen in choices[last:]))


def frontier(units: Sequence[Unit], apart: Sequence[Unit] = ()) -> Frontier:
    """The front of all units together.

    Args:
        apart: more units, of one head each, that are chosen with the others and told apart from them.

    Raises:
        ConfigError: if there are none.
    """
    if not units:
        raise ConfigError("there is nothing to choose: no unit was given; observe at least one layer")
    units = (*units, *apart)
    paths = tuple(_path(unit) for unit in units)
    slope = np.concatenate([path.slope for path in paths])
    # stable: of equal slopes each unit's own steps stay in their order
    order = np.argsort(-slope, kind="stable")
    step_unit = np.repeat(np.arange(len(paths)), [len(path.slope) for path in paths])[order]
    cost = np.concatenate([np.diff(path.cost) for path in paths])[order]
    saved = np.concatenate([-np.diff(path.error) for path in paths])[order]
    return Frontier(
        units=tuple(units),
        cost=_rising(sum(float(path.cost[0]) for path in paths), cost),
        error=_falling(sum(float(path.error[-1]) for path in paths), saved),
        slope=slope[order],
        step_unit=step_unit.astype(np.int64),
        paths=paths,
        apart=len(apart),
    )


def solve(units: Sequence[Unit], budget: float) -> Solution:
    """A choice with little error whose cost is at most ``budget``; see :meth:`Frontier.at`."""
    return frontier(units).at(budget)


@dataclass(frozen=True, eq=False)
class _Walk:
    """The front of a unit within one family: the cheapest choice, then one head after the other changes.

    Args:
        start: int64 [H], the cheapest candidate of each head.
        head, to: int64 [n], which head takes which candidate in each step.
        cost, error: float64 [n + 1], of the unit after each step.
    """

    start: Ints
    head: Ints
    to: Ints
    cost: Floats
    error: Floats


@dataclass(frozen=True, eq=False)
class _Path:
    """The front of a unit over its families: vertex i is ``walks[walk[i]]`` after ``taken[i]`` steps."""

    walks: tuple[_Walk, ...]
    walk: Ints
    taken: Ints
    cost: Floats
    error: Floats

    @cached_property
    def slope(self) -> Floats:
        """Error saved per cost of each step, float64 [n - 1], descending even where rounding says otherwise."""
        return np.minimum.accumulate(per_cost(-np.diff(self.error), np.diff(self.cost)))

    def choices(self, vertex: int) -> Ints:
        """Candidate of each head, int64 [H]."""
        walk, taken = self.walks[self.walk[vertex]], int(self.taken[vertex])
        chosen = walk.start.copy()
        chosen[walk.head[:taken]] = walk.to[:taken]  # a head that moved twice ends where it moved last
        return chosen


def _rising(first: float, steps: Floats) -> Floats:
    """Running sums up from ``first``."""
    return first + np.concatenate([[0.0], np.cumsum(steps)])


def _falling(last: float, steps: Floats) -> Floats:
    """Running sums down to ``last``, which comes out exactly, as small errors must not drown in rounding."""
    return last + np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])


def _path(unit: Unit) -> _Path:
    found = [_walk(unit, unit.family == one) for one in np.unique(unit.family)]
    walks = tuple(walk for walk in found if walk is not None)
    cost = np.concatenate([walk.cost for walk in walks])
    error = np.concatenate([walk.error for walk in walks])
    index = np.repeat(np.arange(len(walks)), [len(walk.cost) for walk in walks])
    taken = np.concatenate([np.arange(len(walk.cost)) for walk in walks])
    if len(walks) > 1:
        keep = _lower_hull(cost, error)
        cost, error, index, taken = cost[keep], error[keep], index[keep], taken[keep]
    return _Path(walks, index, taken, cost, error)


def _walk(unit: Unit, members: NDArray[np.bool_]) -> _Walk | None:
    """The front within the candidates ``members``, bool [C]; ``None`` if they do not serve every head.

    All heads walk along their hulls at once: from where it is, a head goes to the candidate that saves most per cost.
    """
    columns = np.flatnonzero(members)
    allowed, error = unit.allowed[:, columns], unit.error[:, columns]
    if not allowed.any(axis=1).all():
        return None
    cost = np.where(allowed, unit.cost[:, columns], np.inf)
    heads = np.arange(len(cost))
    cheapest = cost == cost.min(axis=1, keepdims=True)
    start = np.argmin(np.where(cheapest, error, np.inf), axis=1)
    at, end = start, start.copy()
    steps: list[tuple[Ints, Ints, Floats, Floats, Floats]] = []
    last = np.full(len(heads), np.inf)
    while len(heads):
        more = cost[heads] - cost[heads, at][:, None]
        saved = error[heads, at][:, None] - error[heads]
        good = (more > 0) & (saved > 0) & allowed[heads]
        worth = np.full(more.shape, -1.0)
        worth[good] = per_cost(saved[good], more[good])
        to = np.argmax(worth, axis=1)
        row = np.arange(len(heads))
        goes = worth[row, to] >= 0
        row, to, heads = row[goes], to[goes], heads[goes]
        last = np.minimum(last[goes], worth[row, to])
        steps.append((heads, to, last, more[row, to], saved[row, to]))
        at = end[heads] = to
    head, to, slope, more, saved = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(-slope, kind="stable")
    every = np.arange(len(cost))
    return _Walk(
        start=columns[start],
        head=head[order],
        to=columns[to[order]],
        cost=_rising(float(cost[every, start].sum()), more[order]),
        error=_falling(float(error[every, end].sum()), saved[order]),
    )


def _lower_hull(cost: Floats, error: Floats) -> Ints:
    """Points of the lower convex hull that goes down, from the cheapest to the one of least error."""
    kept: list[int] = []
    x, y = cost.tolist(), error.tolist()
    for i in np.lexsort((error, cost)).tolist():
        if kept and y[i] >= y[kept[-1]]:
            continue
        # the point before goes if it lies on or above the line from the one before it to this one
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[a] - y[b]) * (x[i] - x[a]) > (y[a] - y[i]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.array(kept, dtype=np.int64)

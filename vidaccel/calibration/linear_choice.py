"""Linears as choices of the solver: the error and the seconds of each precision, and the plan of what was chosen.

The squared change of the latent was measured with all Linears of one kind (self-attention, feed-forward) quantised. It
is shared among them as their squared relative errors are, each noise bin with the energy and the weight that the
attention layer of the same block has there. So what is assumed is that a relative error of a Linear moves the latent
from one layer and noise bin to the next as one of the attention beside it does; how much it moves it is measured.
Bins are added and not compared, because the squares of all steps end up in one latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..configs.linear import LinearPlan, LinearRule
from ..linear.measure import LinearErrors
from .linear_table import LinearTable, cost_key
from .observations import Observations
from .solve import Unit

__all__ = ["LinearChoice", "linear_choices", "linear_plan_of", "linear_rows", "linear_saved"]


@dataclass(frozen=True, eq=False)
class LinearChoice:
    """One Linear.

    Args:
        item: what was seen of it.
        precisions: what it may be, ``native`` first.
        error: for each, squared relative change of the latent.
        seconds: for each, in one generation.
    """

    item: LinearErrors
    precisions: tuple[str, ...]
    error: tuple[float, ...]
    seconds: tuple[float, ...]

    def unit(self) -> Unit:
        """The same for the solver: one head, a candidate for each precision."""
        key = f"{self.item.transformer}.{self.item.module}, layer {self.item.layer}"
        return Unit(key, np.array([self.error]), np.array([self.seconds]), np.zeros(len(self.error), np.int64))


def linear_choices(seen: Observations) -> list[LinearChoice]:
    """The choices, in the order of the table; empty if Linears were not watched and timed."""
    table = seen.linears
    if table is None or not table.generations or not table.seconds:
        return []
    moves = {
        place: weight * float(seen.total(place, "energy").sum())
        for place, weight in seen.weight.items()
        if seen.at(*place)
    }
    shares = {precision: _shares(table, precision, moves, seen.bins) for precision in table.precisions}
    found = []
    for number, item in enumerate(table.items):
        times = table.seconds[cost_key(item)]
        names = ("native", *(precision for precision in item.error if precision in times))
        calls = item.calls / table.generations
        found.append(
            LinearChoice(
                item,
                names,
                (0.0, *(shares[precision][number] for precision in names[1:])),
                tuple(calls * times[precision] for precision in names),
            )
        )
    return found


def _shares(
    table: LinearTable, precision: str, moves: Mapping[tuple[int, str, int], float], bins: int
) -> dict[int, float]:
    """Squared change of the latent that each Linear of this precision makes, by its number.

    Args:
        moves: (bin, transformer, attention layer) -> what a relative error of 1 there does to the latent, squared.
    """
    base = {
        number: _base(item, precision, moves, bins)
        for number, item in enumerate(table.items)
        if precision in item.error
    }
    totals: dict[str, float] = {}
    for number, value in base.items():
        kind = table.items[number].kind
        totals[kind] = totals.get(kind, 0.0) + value
    changes = table.changes.get(precision, {})
    found = {}
    for number, value in base.items():
        kind = table.items[number].kind
        measured = changes.get(kind)
        scale = 1.0 if measured is None else measured**2 / max(totals[kind], 1e-30)
        found[number] = value * scale
    return found


def _base(item: LinearErrors, precision: str, moves: Mapping[tuple[int, str, int], float], bins: int) -> float:
    worst = item.worst(precision) or 0.0
    total = 0.0
    for bin in range(bins):
        own = moves.get((bin, item.transformer, -1 if item.site is None else item.site))
        if own is None:  # a block without observed attention takes the mean
            beside = [move for place, move in moves.items() if place[:2] == (bin, item.transformer)]
            own = float(np.mean(beside)) if beside else 0.0
        error = item.relative(precision, bin)
        total += own * (worst if error is None else error) ** 2
    return total


def linear_saved(choices: Sequence[LinearChoice], picks: Sequence[int]) -> float:
    """Seconds that a generation is shorter by."""
    return sum(choice.seconds[0] - choice.seconds[pick] for choice, pick in zip(choices, picks, strict=True))


def linear_plan_of(choices: Sequence[LinearChoice], picks: Sequence[int]) -> LinearPlan | None:
    """The plan of what was chosen, modules with the same layers in one rule; ``None`` if all stay native."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for choice, pick in zip(choices, picks, strict=True):
        if pick:
            item = choice.item
            layers.setdefault((choice.precisions[pick], item.transformer, item.module), []).append(item.layer)
    modules: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for (precision, transformer, module), numbers in layers.items():
        modules.setdefault((precision, transformer, tuple(sorted(numbers))), []).append(module)
    rules = [
        LinearRule(precision, tuple(names), numbers, transformer)
        for (precision, transformer, numbers), names in modules.items()
    ]
    return LinearPlan(tuple(rules)) if rules else None


def linear_rows(choices: Sequence[LinearChoice], picks: Sequence[int]) -> list[dict[str, Any]]:
    """For the report: by kind and precision, how many there are and were chosen, errors, and seconds."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for choice, pick in zip(choices, picks, strict=True):
        for number, precision in enumerate(choice.precisions[1:], 1):
            empty = {"kind": choice.item.kind, "precision": precision, "count": 0, "chosen": 0, "relative_error": 0.0}
            row = rows.setdefault(
                (choice.item.kind, precision), {**empty, "latent_error": 0.0, "native_seconds": 0.0, "seconds": 0.0}
            )
            row["count"] += 1
            row["chosen"] += int(pick == number)
            row["relative_error"] = max(row["relative_error"], choice.item.worst(precision) or 0.0)
            row["latent_error"] += choice.error[number]
            row["native_seconds"] += choice.seconds[0]
            row["seconds"] += choice.seconds[number]
    for row in rows.values():
        row["latent_error"] **= 0.5
    return list(rows.values())

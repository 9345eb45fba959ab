"""From observations to a plan: units to solve for, the front of all choices, and the plan of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ..configs.plan import LayerPolicy, Plan, Rule
from ..errors import ConfigError
from .cost import Costs
from .linear_choice import LinearChoice, linear_choices, linear_plan_of, linear_saved
from .observations import Observations
from .solve import Frontier, Solution, Unit, frontier
from .transfer import Transfer, transfer_of

__all__ = ["Choices", "Prediction"]

_BY = Literal["seconds", "density"]
_POINTS = 129
_SLACK = 1e-6


@dataclass(frozen=True)
class Prediction:
    """What a plan should do.

    Args:
        error: relative L2 error of the final latent, mean over prompts.
        density: kept token pairs over all, mean over all attention calls.
        attention: seconds of self-attention in one generation; ``None`` without costs.
        total: seconds of one generation; ``None`` without costs. With predicted costs those of self-attention alone.
    """

    error: float
    density: float
    attention: float | None
    total: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return {"error": self.error, "density": self.density, "attention": self.attention, "seconds": self.total}


class Choices:
    """All plans that observations and costs allow, by cost.

    Predicted costs are of another device, of which nothing but self-attention is known. So seconds, dense ones too, are
    of self-attention alone then.

    Args:
        seen: observations with weights.
        costs: seconds by policy, or ``None`` to choose by density alone; candidates without are not chosen.
        by: what the budget limits. Linears are chosen with the heads where that is seconds that were measured, and stay
            as they are by density, which does not count them.
        linear: whether Linears are chosen at all, where the observations hold them.

    Raises:
        ConfigError: if something is missing: weights of a layer, or costs to choose by.
    """

    def __init__(self, seen: Observations, costs: Costs | None, *, by: _BY = "density", linear: bool = True) -> None:
        if not seen.cells:
            raise ConfigError("there are no observations to solve from; run vidaccel calibrate first")
        missing = [place for place in seen.places() if place not in seen.weight]
        if missing:
            raise ConfigError(f"the weight of {missing[0]} is not known; run vidaccel calibrate again to the end")
        if by == "seconds" and costs is None:
            raise ConfigError("there are no costs on this device to choose by; run vidaccel calibrate here")
        self.seen, self.costs, self.by = seen, costs, by
        self.transfer: Transfer = transfer_of(seen)
        self.places = seen.places()
        branches: dict[tuple[int, str, int], int] = {}
        for place in seen.cells:
            where = (place.bin, place.transformer, place.layer)
            branches[where] = branches.get(where, 0) + 1
        # every step of a bin belongs to one transformer, see noise_edges
        self._calls = {place: float(seen.steps[place[0]] * branches[place]) for place in self.places}
        self._all_calls = sum(self._calls.values())
        names = sorted({policy.precision for policy in seen.candidates})
        family = np.array([names.index(policy.precision) for policy in seen.candidates], np.int64)
        self._error = [self._errors(place) for place in self.places]
        self._density = [self._densities(place) for place in self.places]
        self._predicted = costs is not None and costs.origin == "predicted"
        self._scale = 1.0
        if costs is not None and not self._predicted:
            self._scale = seen.times["attention"] / (self._all_calls * costs.dense)
        self._seconds = None if costs is None else self._times(costs)
        cost = self._density if by == "density" else self._seconds
        assert cost is not None
        measured = by == "seconds" and not self._predicted
        self.linears: list[LinearChoice] = linear_choices(seen) if linear and measured else []
        self.frontier: Frontier = frontier(
            [Unit(*parts, family) for parts in zip(self.places, self._error, cost, strict=True)],
            [choice.unit() for choice in self.linears],
        )

    def _errors(self, place: tuple[int, str, int]) -> np.ndarray:
        """Squared relative error of the final latent that each choice adds, [H,C]."""
        error = self.seen.weight[place] * self.seen.total(place, "error").T.astype(np.float64)
        error[:, 0] = 0.0  # plain dense attention is what everything is measured against
        error = np.maximum(error, 0.0)
        if self.costs is not None:
            error[:, [not self.costs.knows(policy) for policy in self.seen.candidates]] = np.inf
        return error

    def _densities(self, place: tuple[int, str, int]) -> np.ndarray:
        """Share of all calls' token pairs that each choice keeps, [H,C]; dense everywhere sums to 1."""
        cells = self.seen.at(*place)
        kept = np.mean([cell.density for cell in cells], axis=0).T.astype(np.float64)
        kept[:, 0] = 1.0
        return np.asarray(kept * self._calls[place] / self._all_calls / kept.shape[0])

    def _times(self, costs: Costs) -> list[np.ndarray]:
        """Seconds that each choice takes in one generation, [H,C] for each place.

        Calls were timed by themselves. In a real run they take somewhat longer, dense ones alike, so all are scaled by
        what dense attention took in the dense generation.
        """
        known = [costs.seconds(policy) if costs.knows(policy) else np.inf for policy in self.seen.candidates]
        each = np.array(known) * self._scale
        tables = []
        for place in self.places:
            heads = self.seen.at(*place)[0].error.shape[1]
            tables.append(np.tile(each * self._calls[place] / heads, (heads, 1)))
        return tables

    # -- budgets --------------------------------------------------------------------------------------------------

    def at(self, budget: float) -> Solution:
        """The solver's choice within a budget of density or attention seconds, as ``by`` says."""
        return self.frontier.at(budget)

    def for_seconds(self, total: float) -> Solution:
        """The solver's choice with which a generation takes at most ``total`` seconds.

        Of many points of the front, because a layer of several policies takes longer than their mean.

        Raises:
            ConfigError: if no plan is that fast.
        """
        fits = [solution for solution, seconds in self._timed if seconds <= total * (1 + _SLACK)]
        if not fits:
            fastest = min(seconds for _, seconds in self._timed)
            raise ConfigError(
                f"no plan takes {total:.3g} s: the fastest takes {fastest:.3g} s of {self.dense_seconds:.3g} s dense;"
                " allow that, or choose by --density"
            )
        return min(fits, key=lambda solution: solution.error)

    @cached_property
    def _timed(self) -> list[tuple[Solution, float]]:
        """Solutions along the front with their predicted seconds of a generation."""
        cost = self.frontier.cost
        found = []
        for budget in np.linspace(cost[0], cost[-1], _POINTS):
            solution = self.at(float(budget))
            seconds = self.predict(solution).total
            assert seconds is not None  # a choice by seconds has costs
            found.append((solution, seconds))
        return found

    def for_speedup(self, speedup: float) -> Solution:
        """The solver's choice at ``speedup`` times the speed of the dense generation."""
        return self.for_seconds(self.dense_seconds / speedup)

    def for_error(self, error: float) -> Solution:
        """The least cost with a predicted relative latent error of at most ``error``."""
        return self.frontier.within(self.transfer.squares(error))

    @property
    def all_calls(self) -> float:
        """Self-attention calls of a dense generation."""
        return self._all_calls

    @property
    def dense_seconds(self) -> float:
        """Seconds of a dense generation."""
        if self._predicted:
            assert self.costs is not None
            return self._all_calls * self.costs.dense
        return self.seen.times["total"]

    @property
    def other_seconds(self) -> float:
        """Seconds of a generation outside self-attention, where they are known."""
        return 0.0 if self._predicted else self.seen.times["total"] - self.seen.times["attention"]

    @property
    def costs_told(self) -> dict[str, str | None]:
        """Where the seconds come from: ``device``, ``origin``, and in words what ``seconds`` are."""
        if self.costs is None:
            return {"device": None, "origin": None, "seconds": "seconds"}
        told = f"seconds of self-attention, predicted for {self.costs.device}"
        told = told if self._predicted else "seconds of a generation"
        return {"device": self.costs.device, "origin": self.costs.origin, "seconds": told}

    # -- what a solution is ---------------------------------------------------------------------------------------

    def predict(self, solution: Solution) -> Prediction:
        """What a solution should do."""
        attention = None
        if self.costs is not None:
            attention = self._scale * sum(
                self._calls[place] * self.costs.layer([self.seen.candidates[number] for number in choice])
                for place, choice in zip(self.places, solution.choices, strict=True)
            )
        return Prediction(
            error=self.transfer.error(self.squares(solution)),
            density=self._sum(self._density, solution),
            attention=attention,
            # seconds saved come from timings of their own, and there is no more to save than there was
            total=None if attention is None else max(0.0, self.other_seconds - self._saved(solution)) + attention,
        )

    def squares(self, solution: Solution) -> float:
        """Squared errors of a solution, weighted and added: what is minimised."""
        linears = sum(choice.error[pick] for choice, pick in zip(self.linears, solution.apart, strict=False))
        return self._sum(self._error, solution) + linears

    def _saved(self, solution: Solution) -> float:
        """Seconds that 8-bit Linears save, of what a generation takes outside self-attention."""
        return linear_saved(self.linears, solution.apart) if solution.apart else 0.0

    @staticmethod
    def _sum(tables: list[np.ndarray], solution: Solution) -> float:
        return float(sum(table[np.arange(len(c)), c].sum() for table, c in zip(tables, solution.choices, strict=True)))

    def plan(self, solution: Solution, name: str, provenance: Mapping[str, str]) -> Plan:
        """The plan file's content: one rule for each bin, transformer and layer that is not dense."""
        rules = []
        for (bin, transformer, layer), choice in zip(self.places, solution.choices, strict=True):
            heads = [self.seen.candidates[number] for number in choice]
            policy = LayerPolicy(tuple(heads[:1] if len(set(heads)) == 1 else heads))
            if not policy.is_dense:
                rules.append(Rule(policy, self.seen.bounds(bin), transformer, (layer,)))
        return Plan(
            name,
            tuple(rules),
            tile=self.seen.tile,
            fingerprint=self.seen.fingerprint,
            provenance=tuple({**self.seen.provenance, **provenance}.items()),
            linear=linear_plan_of(self.linears, solution.apart) if solution.apart else None,
        )

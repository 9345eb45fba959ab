"""A step cache and a plan, chosen together: each cache is run alone, and the plan is solved for what it leaves.

Beside a cache with relative error e that runs a share c of the self-attention calls, a plan with error p and attention
seconds a is predicted to have

    error = sqrt(e^2 + p^2)        seconds = rest of the cached generation + c a        density = c * that of the plan

as if errors were independent, and a cache skipped calls of all layers and noise levels alike. Neither is quite so.
Therefore the best pairs are run, and the measured figures choose among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..configs.plan import Plan
from ..errors import ConfigError
from .cache_runs import NO_CACHE, CacheFigures
from .plans import Choices, Prediction
from .solve import Solution

__all__ = ["Pair", "Pairing", "best_pairs", "choose", "told"]

#: A measured figure may be so much over the budget and still count as within: timings and prompts differ by more.
SLACK = 0.02


@dataclass(frozen=True, eq=False)
class Pairing:
    """The choices of a calibration beside one cache.

    Args:
        choices: without a cache.
        figures: of the cache.
    """

    choices: Choices
    figures: CacheFigures

    @property
    def dense_seconds(self) -> float:
        """Seconds of a generation with the cache and dense attention."""
        return self._other + self.figures.calls * self._attention

    @property
    def _attention(self) -> float:
        return self.choices.dense_seconds - self.choices.other_seconds

    @property
    def _other(self) -> float:
        """Seconds outside self-attention. Of a device that is not here these are not known, nor counted."""
        if not self.choices.other_seconds:
            return 0.0
        whole = self.choices.dense_seconds * self.figures.seconds
        return max(0.0, whole - self.figures.calls * self._attention)

    def solve(self, kind: str, value: float) -> Solution:
        """The best plan for what the cache leaves of a budget.

        Args:
            kind: ``"speedup"``, ``"seconds"``, ``"density"`` or ``"max-error"``.

        Raises:
            ConfigError: if no plan keeps the budget beside this cache.
        """
        choices, figures = self.choices, self.figures
        if kind == "max-error":
            if figures.cache is None:
                return choices.for_error(value)
            if figures.error > value:
                raise ConfigError(f"its error alone is {figures.error:.3g}, more than {value:.3g}")
            return choices.for_error(math.sqrt(value**2 - figures.error**2))
        if kind == "density":
            return choices.at(min(1.0, value / figures.calls) if figures.calls else 1.0)
        seconds = choices.dense_seconds / value if kind == "speedup" else value
        if figures.cache is None:
            return choices.for_seconds(seconds)
        if not figures.calls:
            raise ConfigError("it leaves no self-attention to plan")
        return choices.for_seconds(choices.other_seconds + (seconds - self._other) / figures.calls)

    def predict(self, solution: Solution) -> Prediction:
        """What a plan should do beside the cache; its density is of the token pairs of a dense generation."""
        plan, figures = self.choices.predict(solution), self.figures
        if figures.cache is None:
            return plan
        attention = None if plan.attention is None else figures.calls * plan.attention
        return Prediction(
            error=math.hypot(plan.error, figures.error),
            density=figures.calls * plan.density,
            attention=attention,
            total=None if attention is None else self._other + attention,
        )

    def plan(self, solution: Solution, name: str, provenance: Mapping[str, str]) -> Plan:
        """The plan, with the cache in it."""
        figures = self.figures
        if figures.cache is None:
            return self.choices.plan(solution, name, provenance)
        about = {
            "cache_alone": f"error {figures.error:.6g}, seconds {figures.seconds:.6g} and calls {figures.calls:.6g} of"
            f" those without, {figures.prompts} prompts"
        }
        return replace(self.choices.plan(solution, name, {**provenance, **about}), cache=figures.cache)


@dataclass(frozen=True, eq=False)
class Pair:
    """A cache, a plan, and what is known of both together.

    Args:
        pairing, solution: cache and plan.
        predicted: before it was run.
        measured: means of validation runs: ``error``, ``density``, and where they are of the plan's device ``seconds``
            and ``speedup``; ``None`` if it was not run.
    """

    pairing: Pairing
    solution: Solution
    predicted: Prediction
    measured: Mapping[str, Any] | None = None


def best_pairs(
    choices: Choices, figures: Sequence[CacheFigures], kind: str, value: float
) -> tuple[list[Pair], dict[str, str]]:
    """The best plan beside each cache, best prediction first, and why there is none beside others.

    Best is the least error; for ``max-error`` the fewest seconds, or where these are not known the least density.

    Raises:
        ConfigError: if no cache leaves room for a plan; the reasons are in the message.
    """
    found, reasons = [], {}
    for one in figures:
        pairing = Pairing(choices, one)
        try:
            solution = pairing.solve(kind, value)
        except ConfigError as error:
            reasons[one.name] = str(error)
            continue
        found.append(Pair(pairing, solution, pairing.predict(solution)))
    if not found:
        if len(figures) == 1:
            raise ConfigError(next(iter(reasons.values())))
        raise ConfigError(f"no plan keeps the budget: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    return sorted(found, key=lambda pair: _rank(pair.predicted.to_dict(), kind)), reasons


def choose(pairs: Sequence[Pair], kind: str, value: float) -> tuple[Pair, str | None]:
    """The best measured pair within the budget, and a sentence where that is not what could be chosen.

    Without any measurement it is the first, so give the best prediction first.
    """
    run = [pair for pair in pairs if pair.measured is not None]
    if not run:
        return pairs[0], "no pair of cache and plan was run, so the choice rests on the predictions alone"
    within = [pair for pair in run if _excess(pair, kind, value) <= SLACK]
    if within:
        return min(within, key=lambda pair: _rank(pair.measured or {}, kind)), None
    nearest = min(run, key=lambda pair: _excess(pair, kind, value))
    over = _excess(nearest, kind, value)
    return nearest, f"no pair of cache and plan was measured within the budget; the one chosen is {over:.0%} over it"


def _rank(figures: Mapping[str, Any], kind: str) -> float:
    if kind not in ("max-error", "psnr"):
        return float(figures["error"])
    seconds = figures.get("seconds")
    return float(figures["density"] if seconds is None else seconds)


def _excess(pair: Pair, kind: str, value: float) -> float:
    """By which share of the budget a measured pair is over it, 0 where the figure is not known here."""
    measured = pair.measured or {}
    if kind == "psnr":
        return 0.0  # it was found by running
    if kind == "speedup":
        found = measured.get("speedup")
        return 0.0 if found is None else value / max(found, 1e-12) - 1
    found = measured.get({"max-error": "error"}.get(kind, kind))
    return 0.0 if found is None else found / max(value, 1e-12) - 1


def told(
    figures: Sequence[CacheFigures], pairs: Sequence[Pair], chosen: Pair, reasons: Mapping[str, str]
) -> dict[str, Any]:
    """Plain values for JSON, the page and the terminal.

    ``measured_over_predicted`` is the geometric mean over pairs with a cache of measured over predicted error: what the
    assumption that errors are independent was off by.
    """
    ratios = [
        math.log(pair.measured["error"] / pair.predicted.error)
        for pair in pairs
        if pair.measured is not None and pair.pairing.figures.cache is not None
        if pair.measured["error"] > 0 and pair.predicted.error > 0
    ]
    return {
        "alone": [one.to_dict() for one in figures if one != NO_CACHE],
        "pairs": [
            {
                "cache": pair.pairing.figures.name,
                "predicted": pair.predicted.to_dict(),
                "measured": None if pair.measured is None else dict(pair.measured),
                "chosen": pair is chosen,
            }
            for pair in pairs
        ],
        "left_out": dict(reasons),
        "measured_over_predicted": math.exp(sum(ratios) / len(ratios)) if ratios else None,
    }

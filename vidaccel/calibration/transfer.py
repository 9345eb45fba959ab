"""From added squares to the error of a whole plan on any prompt: a factor and an exponent, fitted to whole-plan runs.

The weights of single layers come from one prompt, and their squared errors are added as if errors were independent.
Neither holds quite: prompts differ in how much the same error moves them, errors of one generation are somewhat alike,
and large ones saturate. So a few generations of other prompts run sparse in every layer at once, with more and with
fewer blocks, and

    change of the final latent = factor * sqrt(summed squares) ^ power

is fitted to them. The power comes from comparing runs of one prompt, the factor is a mean over prompts. The order of
plans does not change by it, so neither does any choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .observations import Observations

__all__ = ["Point", "Transfer", "fit", "points_of", "summed_squares", "transfer_of"]

_POWERS = (0.25, 1.5)
#: How firmly the power is held at 1, in squared logarithms of the sizes that were compared.
_FIRMNESS = 0.3


@dataclass(frozen=True)
class Point:
    """One run of a plan.

    Args:
        prompt: a text that names prompt and seed.
        squares: what the weights and observations sum up to for this plan.
        change: measured relative L2 change of the final latent.
    """

    prompt: str
    squares: float
    change: float


@dataclass(frozen=True)
class Transfer:
    """``error = factor * sqrt(squares) ** power``.

    Args:
        factor, power: see there.
        prompts: how many prompts and seeds it was fitted to; 0 is no fit.
        spread: standard deviation over prompts of the logarithm of their own factors, 0 for fewer than two.
    """

    factor: float = 1.0
    power: float = 1.0
    prompts: int = 0
    spread: float = 0.0

    def error(self, squares: float) -> float:
        """Predicted relative L2 change of the final latent, for the mean over prompts."""
        return self.factor * max(squares, 0.0) ** (self.power / 2)

    def squares(self, error: float) -> float:
        """The inverse of :meth:`error`."""
        return (max(error, 0.0) / self.factor) ** (2 / self.power)

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"factor": self.factor, "power": self.power, "prompts": self.prompts, "spread": self.spread}


def fit(points: Sequence[Point]) -> Transfer:
    """The fit; points without any error say nothing and are left out."""
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.squares > 0 and point.change > 0:
            by_prompt.setdefault(point.prompt, []).append((0.5 * math.log(point.squares), math.log(point.change)))
    if not by_prompt:
        return Transfer()
    means = {prompt: np.mean(pairs, axis=0) for prompt, pairs in by_prompt.items()}
    apart = np.concatenate([np.array(pairs) - means[prompt] for prompt, pairs in by_prompt.items()])
    # how far the slope is from 1, held back where the sizes compared hardly differ
    steeper = float(apart[:, 0] @ (apart[:, 1] - apart[:, 0])) / (float(apart[:, 0] @ apart[:, 0]) + _FIRMNESS)
    power = min(max(1.0 + steeper, _POWERS[0]), _POWERS[1])
    own = np.array([mean[1] - power * mean[0] for mean in means.values()])
    return Transfer(float(np.exp(own).mean()), power, len(own), float(own.std(ddof=1)) if len(own) > 1 else 0.0)


def summed_squares(seen: Observations, choices: Sequence[tuple[tuple[int, str, int], int]]) -> float:
    """What one candidate in each of these places sums up to: squared errors, weighted, added."""
    return sum(seen.weight[place] * float(seen.total(place, "error")[number].sum()) for place, number in choices)


def points_of(seen: Observations) -> list[Point]:
    """Whole-plan runs that are in the observations: probes of everything at once, and validation runs."""
    found = []
    for probe in seen.probes:
        if "squares" in probe:
            found.append(Point(str(probe["prompt"]), float(probe["squares"]), float(probe["change"])))
        elif "everywhere" in probe:
            by_stack = {(int(bin), str(name)): int(number) for bin, name, number in probe["everywhere"]}
            chosen = [(place, by_stack[place[:2]]) for place in seen.places() if place[:2] in by_stack]
            found.append(Point(str(probe["prompt"]), summed_squares(seen, chosen), float(probe["change"])))
    return found


def transfer_of(seen: Observations) -> Transfer:
    """The fit to all of :func:`points_of`."""
    return fit(points_of(seen))

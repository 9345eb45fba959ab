"""Choices that are made by looking at results: a plan for a PSNR, and the check of the predictions head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from ..errors import ConfigError
from ..pipelines.generate import Request
from .plans import Choices
from .sensitivity import latent_change
from .solve import Solution

__all__ = ["HeadCheck", "check_heads", "for_quality", "rank_correlation"]


def for_quality(
    choices: Choices,
    measure: Callable[[Solution], float],
    target: float,
    *,
    runs: int = 6,
    go_on: Callable[[], bool] = lambda: True,
) -> Solution:
    """The cheapest choice whose measured quality reaches ``target``, by bisection along the front.

    Args:
        measure: quality of a choice in a validation run, higher is better (PSNR in dB).
        runs: most validation runs.
        go_on: whether there is time for another; asked before each.

    Raises:
        ConfigError: if none of the choices that were tried reaches it.
    """
    front = choices.frontier
    low, high = 0, len(front.cost) - 1  # the last vertex has no error at all
    best: Solution | None = None
    for tried in range(runs):
        if not go_on():
            if not tried:
                raise ConfigError("there was no time to try any choice; allow more minutes")
            break
        if low > high:
            break
        middle = (low + high) // 2
        solution = choices.at(float(front.cost[middle]))
        if measure(solution) >= target:
            best, high = solution, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise ConfigError(
            f"no choice that was tried reaches {target:g}; ask for less, or add candidates that skip less"
        )
    return best


@dataclass(frozen=True)
class HeadCheck:
    """Predicted and measured relative change of the final latent if only this head runs as chosen."""

    transformer: str
    layer: int
    head: int
    predicted: float
    measured: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "transformer": self.transformer,
            "layer": self.layer,
            "head": self.head,
            "predicted": self.predicted,
            "measured": self.measured,
        }


def check_heads(
    pipe: Any,
    choices: Choices,
    solution: Solution,
    request: Request,
    reference: torch.Tensor,
    *,
    most: int | None = None,
    **patching: Any,
) -> Iterator[HeadCheck]:
    """Yields the check of each head that the solution makes sparse; one generation each.

    Args:
        reference: final latent of the dense generation of ``request``.
        most: how many heads, evenly spread; ``None`` for all.
    """
    seen = choices.seen
    heads = sorted(
        {
            (transformer, layer, head)
            for (_, transformer, layer), choice in zip(choices.places, solution.choices, strict=True)
            for head in np.flatnonzero(choice).tolist()
        }
    )
    if most is not None and len(heads) > most:
        heads = [heads[i] for i in np.linspace(0, len(heads) - 1, most).round().astype(int)]
    for transformer, layer, head in heads:
        rules, predicted = [], 0.0
        for place, choice in zip(choices.places, solution.choices, strict=True):
            if place[1:] != (transformer, layer) or not choice[head]:
                continue
            policies = [HeadPolicy()] * len(choice)
            policies[head] = seen.candidates[choice[head]]
            rules.append(Rule(LayerPolicy(tuple(policies)), seen.bounds(place[0]), transformer, (layer,)))
            predicted += seen.weight[place] * float(seen.total(place, "error")[choice[head], head])
        plan = Plan(f"{transformer} layer {layer} head {head}", tuple(rules), tile=seen.tile)
        measured = latent_change(pipe, plan, request, reference, **patching)
        yield HeadCheck(transformer, layer, head, predicted**0.5, measured)


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank. NaN for fewer than three pairs."""
    if len(first) < 3:
        return float("nan")
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    order = np.sort(values)
    return (np.searchsorted(order, values, side="left") + np.searchsorted(order, values, side="right") - 1) / 2

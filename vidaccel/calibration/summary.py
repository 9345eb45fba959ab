"""A calibration as plain values: what the page draws, the JSON file holds and the terminal prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .closed_loop import HeadCheck, rank_correlation
from .observations import Observations
from .plans import Choices
from .solve import Solution

__all__ = ["calibration_result", "front_points", "provenance"]

_FRONT_POINTS = 60


def calibration_result(
    choices: Choices, solution: Solution, *, heads: Sequence[HeadCheck] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about a solved calibration but its validation runs."""
    predicted = choices.predict(solution).to_dict()
    found: dict[str, Any] = {
        "predicted": predicted,
        "dense": {"seconds": choices.dense_seconds, "attention": choices.dense_seconds - choices.other_seconds},
        "front": front_points(choices),
        "chosen": predicted,
        "heatmaps": _heatmaps(choices, solution),
        "mass": _mass(choices.seen),
        "weights": [
            {"bin": bin, "noise": list(choices.seen.bounds(bin)), "transformer": t, "layer": layer, "weight": weight}
            for (bin, t, layer), weight in sorted(choices.seen.weight.items())
        ],
        "prompts": len(choices.seen.done),
        "candidates": [str(policy) for policy in choices.seen.candidates],
        "notes": list(notes),
    }
    if heads:
        found["prediction"] = [head.to_dict() for head in heads]
        rank = rank_correlation([head.predicted for head in heads], [head.measured for head in heads])
        found["rank_correlation"] = rank if np.isfinite(rank) else None
    return found


def front_points(choices: Choices) -> list[dict[str, float | None]]:
    """Predictions along the front, evenly spread over its cost, from the cheapest to plain dense."""
    cost = choices.frontier.cost
    budgets = np.linspace(cost[0], cost[-1], min(_FRONT_POINTS, len(cost)))
    return [choices.predict(choices.at(float(budget))).to_dict() for budget in budgets]


def provenance(choices: Choices, solution: Solution, budget: str, command: str) -> dict[str, str]:
    """Texts that go into the plan file."""
    predicted = choices.predict(solution)
    found = {
        "budget": budget,
        "command": command,
        "prompts": f"{len(choices.seen.done)}, fingerprints {', '.join(choices.seen.done)}",
        "predicted_error": f"{predicted.error:.6g}",
        "predicted_density": f"{predicted.density:.6g}",
    }
    if predicted.total is not None and choices.costs is not None:
        found["predicted_seconds"] = f"{predicted.total:.6g}"
        found["costs"] = f"{choices.costs.origin} on {choices.costs.device}"
    return found


def _heatmaps(choices: Choices, solution: Solution) -> dict[str, list[dict[str, Any]]]:
    """Density, precision and predicted error of every layer and head, one panel a noise bin and transformer."""
    seen = choices.seen
    panels: dict[tuple[int, str], dict[int, tuple[list[float], list[float], list[str]]]] = {}
    for place, choice in zip(choices.places, solution.choices, strict=True):
        bin, transformer, layer = place
        kept = np.mean([cell.density for cell in seen.at(*place)], axis=0)
        error = seen.weight[place] * seen.total(place, "error")
        rows = panels.setdefault((bin, transformer), {})
        heads = range(len(choice))
        rows[layer] = (
            [1.0 if not choice[h] else float(kept[choice[h], h]) for h in heads],
            [0.0 if not choice[h] else float(error[choice[h], h]) ** 0.5 for h in heads],
            [seen.candidates[choice[h]].precision for h in heads],
        )
    found: dict[str, list[dict[str, Any]]] = {"density": [], "error": [], "precision": []}
    several = len({transformer for _, transformer in panels}) > 1
    for (bin, transformer), rows in sorted(panels.items(), reverse=True):
        low, high = seen.bounds(bin)
        title = f"noise {low:.3g} to {high:.3g}" + (f", {transformer}" if several else "")
        for name, part in (("density", 0), ("error", 1), ("precision", 2)):
            found[name].append({"title": title, "values": [rows[layer][part] for layer in sorted(rows)]})
    return found


def _mass(seen: Observations) -> list[dict[str, Any]]:
    """Attention mass that each pattern keeps, mean and range over layers and heads, one entry a noise bin."""
    first: dict[str, int] = {}
    for number, policy in enumerate(seen.candidates):
        if policy.precision == "native" and policy.pattern.name != "dense":
            first.setdefault(str(policy.pattern), number)
    found = []
    for bin in reversed(range(seen.bins)):
        masses = [cell.mass for place, cell in seen.cells.items() if place.bin == bin]
        if not masses or not first:
            continue
        each = [np.concatenate([mass[number] for mass in masses]) for number in first.values()]
        low, high = seen.bounds(bin)
        found.append(
            {
                "title": f"noise {low:.3g} to {high:.3g}",
                "candidates": list(first),
                "mean": [float(values.mean()) for values in each],
                "low": [float(np.quantile(values, 0.1)) for values in each],
                "high": [float(np.quantile(values, 0.9)) for values in each],
            }
        )
    return found

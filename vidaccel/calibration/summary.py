"""A calibration as plain values: what the page draws, the JSON file holds and the terminal prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .closed_loop import HeadCheck, rank_correlation
from .linear_choice import linear_rows
from .observations import Observations
from .plans import Choices, Prediction
from .running import must_run
from .solve import Solution
from .transfer import Transfer, transfer_of

__all__ = ["add_measured", "calibration_result", "cost_notes", "front_points", "provenance"]

_FRONT_POINTS = 60


def calibration_result(
    choices: Choices, solution: Solution, *, heads: Sequence[HeadCheck] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about a solved calibration but its validation runs, see :func:`add_measured`."""
    predicted = choices.predict(solution).to_dict()
    found: dict[str, Any] = {
        "predicted": predicted,
        "dense": {"seconds": choices.dense_seconds, "attention": choices.dense_seconds - choices.other_seconds},
        "transfer": choices.transfer.to_dict(),
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
        "costs": choices.costs_told,
        "notes": [*notes, *_on_errors(choices.transfer), *cost_notes(choices, choices.predict(solution))],
    }
    if choices.linears and solution.apart:
        found["linears"] = linear_rows(choices.linears, solution.apart)
        found["notes"] += _on_linears(found["linears"])
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


def provenance(
    choices: Choices, solution: Solution, budget: str, command: str, predicted: Prediction | None = None
) -> dict[str, str]:
    """Texts that go into the plan file; ``predicted`` where it is not that of the plan alone."""
    predicted = choices.predict(solution) if predicted is None else predicted
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


def add_measured(
    found: dict[str, Any],
    choices: Choices,
    solution: Solution,
    measured: Mapping[str, Any],
    errors: Mapping[str, float],
) -> None:
    """Puts the validation runs of a solution beside its prediction, and into the observations.

    What was predicted before them stays as it is. Under ``after_validation`` stands what would be predicted now that
    they are known; later plans from the same observations are predicted so.

    Args:
        found: :func:`calibration_result` of the solution.
        measured: means of what the runs gave.
        errors: relative L2 error of the final latent, by a text that names prompt and seed.
    """
    squares = choices.squares(solution)
    for name, error in errors.items():
        key = f"validation/{squares:.6g}/{name}"
        probe = {"key": key, "prompt": name, "squares": squares, "change": error}
        if key not in {str(known["key"]) for known in choices.seen.probes}:
            choices.seen.probes.append(probe)
    after = transfer_of(choices.seen)
    found["measured"] = dict(measured)
    found["after_validation"] = {"error": after.error(squares), "transfer": after.to_dict()}


def _on_errors(transfer: Transfer) -> list[str]:
    """How far the predicted error may be trusted."""
    if not transfer.prompts:
        return [
            "the predicted error is that of the first prompt, with errors of different layers and steps added as if"
            " they were independent: no run of everything at once was made to compare it with"
        ]
    if transfer.prompts < 2:
        return ["the predicted error was compared with runs of one prompt only; others may be more sensitive"]
    factor = math.exp(transfer.spread)
    return [f"the predicted error is for the mean prompt; single ones differ by a factor of about {factor:.2f}"]


def cost_notes(choices: Choices, predicted: Prediction) -> list[str]:
    """What must be said about seconds that nobody measured, and about a plan that gains none."""
    slower = predicted.total is not None and predicted.total > choices.dense_seconds
    notes = (
        [
            f"predicted to be slower than dense, {predicted.total:.3g} s against {choices.dense_seconds:.3g} s: these"
            " candidates gain nothing on this device at this size; a choice by --speedup or --seconds leaves them out"
        ]
        if slower
        else []
    )
    if choices.costs is None or choices.costs.origin != "predicted":
        return notes
    return [
        *notes,
        f"no seconds were measured: they are predicted for {choices.costs.device} by the kernels' cost model, of"
        " self-attention alone, without choosing blocks and without making 8-bit copies; speed-ups likewise",
    ]


def _on_linears(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why Linears stay as they are where they do for their time."""
    slower: dict[str, list[str]] = {}
    for row in rows:
        if row["seconds"] >= row["native_seconds"]:
            slower.setdefault(row["precision"], []).append(
                f"{row['kind']} {row['seconds'] / max(row['native_seconds'], 1e-12):.3g} times"
            )
    return [
        f"{precision} Linears are slower than the model's own here ({', '.join(kinds)}), so those stay as they are"
        for precision, kinds in slower.items()
    ]


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
        if policy.precision == "native" and policy.pattern.name != "dense" and not must_run(policy):
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

"""What ``--caches`` adds to ``calibrate``: the best pairs of step cache and plan are run, and measurements choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .budget import Budget
from .validation import Validation

if TYPE_CHECKING:
    from ..calibration.cache_runs import CacheFigures
    from ..calibration.caching import Pair
    from ..calibration.plans import Choices
    from ..calibration.solve import Solution
    from ..quality import Pair as Runs

__all__ = ["CacheList", "Joint", "check_caches", "choose_jointly", "with_calls"]

CacheList = Annotated[
    str | None,
    typer.Option(
        "--caches",
        metavar="LIST",
        help="Choose a step cache together with the plan, among these: 'none,first-block:0.08,taylorseer:3', or auto.",
        rich_help_panel="Step caches",
    ),
]

#: Pairs that are run, at most.
_MOST_PAIRS = 3
#: Runs of the search for a PSNR, with one cache.
_SEARCH_RUNS = 4


@dataclass(frozen=True, eq=False)
class Joint:
    """What was chosen.

    Args:
        pair: cache and plan.
        runs: its validation runs.
        told: all pairs, see :func:`vidaccel.calibration.caching.told`.
        note: what has to be said about the choice, if anything.
    """

    pair: Pair
    runs: list[Runs]
    told: dict[str, Any]
    note: str | None


def check_caches(text: str | None) -> None:
    """Refuses names in ``--caches`` that no pipeline knows, before one is loaded.

    Raises:
        ConfigError: see there.
    """
    from ..calibration.cache_measure import named_caches

    if text is not None and text.strip() != "auto":
        named_caches(text)


def choose_jointly(
    choices: Choices,
    figures: Sequence[CacheFigures],
    budget: Budget,
    checks: Validation,
    summarise: Callable[[Sequence[Runs]], Mapping[str, Any]],
) -> Joint:
    """The best measured pair of cache and plan within the budget.

    Args:
        figures: of the caches.
        checks: runs plans.
        summarise: means of validation runs.

    Raises:
        ConfigError: if no pair keeps the budget.
    """
    from ..calibration.caching import best_pairs, choose, told

    runs: dict[int, list[Runs]] = {}
    if budget.kind == "psnr":
        pairs, reasons = _for_psnr(choices, figures, budget.value, checks, summarise, runs)
    else:
        pairs, reasons = best_pairs(choices, figures, budget.kind, budget.value)
        for number, pair in enumerate(pairs[:_MOST_PAIRS]):
            if number and not checks.another:
                checks.notes.append(f"the time was up after running {number} of {len(pairs)} pairs of cache and plan")
                break
            found = checks.run(pair.pairing.plan(pair.solution, "trial", {}))
            if not found:
                break
            runs[number] = found
            pairs[number] = replace(pair, measured=summarise(found))
    chosen, note = choose(pairs, budget.kind, budget.value)
    return Joint(chosen, runs.get(pairs.index(chosen), []), told(figures, pairs, chosen, reasons), note)


def _for_psnr(
    choices: Choices,
    figures: Sequence[CacheFigures],
    target: float,
    checks: Validation,
    summarise: Callable[[Sequence[Runs]], Mapping[str, Any]],
    runs: dict[int, list[Runs]],
) -> tuple[list[Pair], dict[str, str]]:
    """The cheapest plan of this PSNR beside each of the fastest caches, and why there is none beside others."""
    from ..calibration.caching import Pair, Pairing
    from ..calibration.closed_loop import for_quality

    reasons = {
        one.name: f"with dense attention its PSNR is {one.psnr:.1f} dB, less than {target:g}"
        for one in figures
        if one.psnr < target
    }
    able = sorted((one for one in figures if one.name not in reasons), key=lambda one: one.seconds)
    reasons |= {one.name: "others are faster" for one in able[_MOST_PAIRS:]}
    pairs: list[Pair] = []
    for one in able[:_MOST_PAIRS]:
        pairing, best = Pairing(choices, one), list[Any]()

        def measure(solution: Solution, pairing: Pairing = pairing, best: list[Any] = best) -> float:
            found = checks.run(pairing.plan(solution, "trial", {}))
            mean = sum(run.psnr for run in found) / max(1, len(found))
            if found and mean >= target:
                best[:] = found  # each success is cheaper than the one before
            return mean

        try:
            solution = for_quality(choices, measure, target, runs=_SEARCH_RUNS, go_on=lambda: checks.another)
        except ConfigError as error:
            reasons[one.name] = str(error)
            continue
        runs[len(pairs)] = best
        pairs.append(Pair(pairing, solution, pairing.predict(solution), summarise(best)))
    if not pairs:
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in reasons.items()))
    return pairs, reasons


def with_calls(measured: Mapping[str, Any], runs: Sequence[Runs], calls: float) -> dict[str, Any]:
    """The same, but with a density of the token pairs of all calls of a dense generation, skipped ones counted as 0.

    Args:
        calls: of a dense generation.
    """
    densities = [(run.report.density or 0.0) * run.report.calls / calls for run in runs]
    return {**measured, "density": sum(densities) / len(densities)}

"""What ``calibrate`` chose, and what its validation runs measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .joint import Joint, with_calls

if TYPE_CHECKING:
    from ..calibration.caching import Pairing
    from ..calibration.plans import Choices, Prediction
    from ..calibration.solve import Solution
    from ..configs.plan import Plan
    from ..quality import Pair

__all__ = ["Made", "compared", "measured"]


@dataclass(frozen=True, eq=False)
class Made:
    """What was chosen.

    Args:
        making: what makes a plan of the solution.
        pairs: its runs on other seeds, or ``None`` if they are still to be made.
        joint: the choice among step caches, if there was one.
    """

    making: Choices | Pairing
    solution: Solution
    pairs: list[Pair] | None
    joint: Joint | None = None

    @property
    def predicted(self) -> Prediction | None:
        """Of cache and plan together; ``None`` where it is the plan's alone."""
        return None if self.joint is None else self.joint.pair.predicted


def compared(
    found: dict[str, Any], made: Made, choices: Choices, plan: Plan, dense_seconds: float, *, predicted: bool
) -> dict[str, Any]:
    """The comparison of the validation runs; what they measured is added to ``found`` and to the observations.

    Args:
        dense_seconds: of the dense generation at the start.
        predicted: whether seconds are predicted for another device.
    """
    if made.joint is not None:
        told = made.joint.pair.predicted.to_dict()
        found |= {"predicted": told, "chosen": told, "caches": made.joint.told, "cache": plan.cache}
    if not made.pairs:
        return {}
    from ..calibration.summary import add_measured
    from ..quality import on_prediction, run_settings

    settings = run_settings(made.pairs[0].dense, plan)
    comparison, means, errors = measured(
        plan.name, settings, made.pairs, predicted=predicted, dense_runs=[dense_seconds]
    )
    if not predicted and found["predicted"]["seconds"] is not None:
        seconds = found["predicted"]["seconds"], means["seconds"], found["dense"]["seconds"]
        comparison["remarks"] += on_prediction(*seconds)
    if plan.cache is None:
        add_measured(found, choices, made.solution, means, errors)
    else:  # what these runs say is of both, so predictions of plans alone are not fitted to it
        found["measured"] = with_calls(means, made.pairs, choices.all_calls)
    return comparison


def measured(
    name: str,
    settings: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    predicted: bool,
    dense_runs: Sequence[float] = (),
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """The comparison of the validation runs, their means, and the latent error of each prompt.

    Args:
        predicted: whether the calibration's seconds are predicted for another device, so that these are not theirs.
        dense_runs: seconds of other dense runs in this command.
    """
    from .. import quality

    result = quality.summarise(name, settings, [pair.to_dict() for pair in pairs], dense_runs=dense_runs)
    means = result["summary"]
    figures = {"psnr": means["psnr"], "density": means["density"]["mean"], "error": means["latent_error"]["mean"]}
    if not predicted:
        figures["seconds"] = means["seconds"]["plan"]["total"]["mean"]
        figures["speedup"] = means["speedup"]["total"]["mean"]
    known = {pair.request.fingerprint: pair.quality["latent_error"] for pair in pairs}
    return result, figures, {key: error for key, error in known.items() if error is not None}

"""Whether a plan still does what it was calibrated for: at another resolution, step count, prompt or with a LoRA.

The policies of the plan are scored as in calibration, on dense generations with the new settings, and the relative
error of each head is set beside what was observed when the plan was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..configs.plan import HeadPolicy, Plan
from ..errors import ConfigError
from ..pipelines.generate import Request
from .calibrate import Calibrator, Effort, Tell
from .candidates import CandidateSet
from .closed_loop import rank_correlation
from .observations import Observations

__all__ = ["Drift", "Drifted", "measure_drift"]

#: A head whose error grew by more than this factor, and is worth a word at all, has drifted.
_FACTOR = 1.5
_WORTH_A_WORD = 0.05


@dataclass(frozen=True)
class Drifted:
    """One head in one noise bin.

    Args:
        noise: bounds of the bin.
        then: relative L2 error of its output when the plan was made; ``None`` if nothing is known.
        now: the same with the new settings.
    """

    noise: tuple[float, float]
    transformer: str
    layer: int
    head: int
    policy: str
    then: float | None
    now: float

    @property
    def worse(self) -> bool:
        """Whether it has drifted."""
        return self.then is not None and self.now > _WORTH_A_WORD and self.now > _FACTOR * self.then


@dataclass(frozen=True)
class Drift:
    """All heads that the plan makes sparse.

    Args:
        heads: one entry per noise bin, transformer, layer and head.
        then, now: mean relative error over them; ``then`` is ``None`` without observations.
        density: kept token pairs of these heads now, mean.
        notes: sentences on what could not be compared.
    """

    heads: tuple[Drifted, ...]
    then: float | None
    now: float
    density: float
    notes: tuple[str, ...]

    @property
    def drifted(self) -> list[Drifted]:
        """The heads that got worse, the worst first."""
        return sorted((head for head in self.heads if head.worse), key=lambda head: -head.now)

    @property
    def rank_correlation(self) -> float | None:
        """Of the heads' errors then and now; ``None`` where fewer than three are known or all are alike."""
        known = [(head.then, head.now) for head in self.heads if head.then is not None]
        found = rank_correlation([then for then, _ in known], [now for _, now in known])
        return found if found == found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        listed = [{**vars(head), "noise": list(head.noise), "drifted": head.worse} for head in self.heads]
        return {
            "then": self.then,
            "now": self.now,
            "rank_correlation": self.rank_correlation,
            "density": self.density,
            "drifted": len(self.drifted),
            "heads": listed,
            "notes": list(self.notes),
        }


def measure_drift(
    pipe: Any,
    plan: Plan,
    requests: Sequence[Request],
    made_from: Observations | None,
    *,
    effort: Effort | None = None,
    tell: Tell = lambda stage, done, total: None,
) -> Drift:
    """Scores the plan's own policies on dense generations of ``requests``.

    Args:
        made_from: the observations that the plan was solved from, or ``None``.

    Raises:
        ConfigError: if the plan is dense everywhere, or nothing could be observed.
    """
    policies = dict.fromkeys(head for rule in plan.rules for head in rule.policy.heads)
    policies = {HeadPolicy(): None} | policies
    if len(policies) == 1:
        raise ConfigError(f"the plan {plan.name!r} is dense everywhere, so there is nothing to check")
    candidates = CandidateSet("plan", f"policies of {plan.name}", plan.tile, tuple(policies))
    with TemporaryDirectory() as folder:
        state = Path(folder) / "observations.safetensors"
        found = Calibrator(
            pipe, requests, candidates, state, effort=effort or Effort(steps=1, tiles=8), tell=tell,
            edges=plan.noise_edges(), distinct=False,
        )  # fmt: skip
        found.observe()
    notes = [f"{policy}: {reason}" for policy, reason in found.dropped.items()]
    heads, densities = [], []
    for bin, transformer, layer in found.seen.places():
        errors = found.seen.relative_error((bin, transformer, layer))
        kept = np.mean([cell.density for cell in found.seen.at(bin, transformer, layer)], axis=0)
        noise = found.seen.bounds(bin)
        count = errors.shape[1]
        policy = plan.lookup(sum(noise) / 2, transformer, layer, None)
        for head in range(count):
            chosen = policy.for_head(head, count)
            if chosen.is_dense or chosen not in found.seen.candidates:
                continue
            number = found.seen.candidates.index(chosen)
            then = None if made_from is None else _error_then(made_from, noise, transformer, layer, head, chosen)
            now = float(errors[number, head])
            heads.append(Drifted(noise, transformer, layer, head, str(chosen), then, now))
            densities.append(float(kept[number, head]))
    if not heads:
        raise ConfigError(
            f"the plan {plan.name!r} makes nothing sparse at these settings, so there is nothing to check"
        )
    known = [head.then for head in heads if head.then is not None]
    if made_from is not None and len(known) < len(heads):
        notes.append(f"nothing was observed then of {len(heads) - len(known)} of {len(heads)} heads")
    return Drift(
        heads=tuple(heads),
        then=float(np.mean(known)) if known else None,
        now=float(np.mean([head.now for head in heads if not known or head.then is not None])),
        density=float(np.mean(densities)),
        notes=tuple(notes),
    )


def _error_then(
    seen: Observations, noise: tuple[float, float], transformer: str, layer: int, head: int, policy: HeadPolicy
) -> float | None:
    place = (seen.bin_of(sum(noise) / 2), transformer, layer)
    if policy not in seen.candidates or not seen.at(*place):
        return None
    return float(seen.relative_error(place)[seen.candidates.index(policy), head])

"""How much an error of one layer at one noise level moves the final latent: a handful of perturbed generations.

A probe runs one candidate in some layers of one noise bin and everything else dense, on the same prompt and seed as a
dense run. The squared relative change of the final latent, over the squared error that was observed for that candidate
in those layers, is their weight. So a weight holds all that lies between: the layer's gate, the layers after it, the
steps after it, the guidance scale, and how errors of the two guidance branches add up.

Probes of single layers all run on one prompt. Some more, on several prompts, perturb everything at once: by them
:mod:`.transfer` learns what the sum of all layers means on other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..configs.plan import LayerPolicy, Plan, Rule
from ..errors import ConfigError
from ..pipelines.generate import Request, generate
from ..pipelines.patch import patch
from .observations import Observations

__all__ = [
    "Probe",
    "choose_probes",
    "everywhere_key",
    "latent_change",
    "relative_change",
    "run_everywhere",
    "run_probe",
]


@dataclass(frozen=True)
class Probe:
    """One perturbed generation.

    Args:
        bin: noise bin.
        transformer: name in the pipeline.
        layers: layers that are perturbed together.
        candidate: number of the candidate that runs there.
    """

    bin: int
    transformer: str
    layers: tuple[int, ...]
    candidate: int

    @property
    def key(self) -> str:
        """A text that names it."""
        return f"{self.bin}/{self.transformer}/{self.layers[0]}-{self.layers[-1]}/{self.candidate}"


def choose_probes(
    seen: Observations, most: int, *, density: float = 0.35, apart: Collection[tuple[str, int]] = ()
) -> list[Probe]:
    """At most ``most`` probes that together cover every layer and bin, the layers of a bin in neighbouring groups.

    The candidate is the one with the least observed error among those near ``density``: close to what a plan will run,
    and with an effect well above rounding.

    Args:
        apart: (transformer, layer) of those whose errors are measured behind their projection; they are never in one
            group with others, whose errors are in other units.
    """
    stacks: dict[tuple[int, str, bool], list[int]] = {}
    for bin, transformer, layer in seen.places():
        stacks.setdefault((bin, transformer, (transformer, layer) in apart), []).append(layer)
    if not stacks:
        raise ConfigError("nothing was observed yet, so there is nothing to probe; observe a prompt first")
    groups = max(1, most // len(stacks))
    probes = []
    for (bin, transformer, _), layers in stacks.items():
        for part in np.array_split(layers, min(groups, len(layers))):
            chosen = tuple(int(layer) for layer in part)
            probes.append(Probe(bin, transformer, chosen, _near(seen, bin, transformer, chosen, density)))
    return probes


def _near(seen: Observations, bin: int, transformer: str, layers: Sequence[int], density: float) -> int:
    errors, densities = np.zeros(len(seen.candidates)), np.zeros(len(seen.candidates))
    for layer in layers:
        errors += seen.total((bin, transformer, layer), "error").sum(1)
        densities += np.mean([cell.density.mean(1) for cell in seen.at(bin, transformer, layer)], axis=0) / len(layers)
    native = np.array([policy.precision == "native" for policy in seen.candidates])
    fits = native & (densities < 0.999) & (errors > 0)
    if not fits.any():
        raise ConfigError("no candidate skips anything here, so nothing can be probed; give sparse candidates")
    distance = np.where(fits, np.abs(densities - density), np.inf)
    near = distance <= distance.min() + 0.1
    return int(np.where(near, errors, np.inf).argmin())


def run_probe(
    pipe: Any, seen: Observations, probe: Probe, request: Request, reference: torch.Tensor, **patching: Any
) -> dict[str, float]:
    """Runs a probe and stores the weight of its layers in ``seen``.

    Returns:
        ``change``, the relative L2 change of the final latent; ``error``, the summed squared error observed there; and
        the ``weight``.
    """
    policy = LayerPolicy((seen.candidates[probe.candidate],))
    rule = Rule(policy, noise=seen.bounds(probe.bin), transformer=probe.transformer, layers=probe.layers)
    plan = Plan(f"probe {probe.key}", (rule,), tile=seen.tile)
    change = latent_change(pipe, plan, request, reference, **patching)
    places = [(probe.bin, probe.transformer, layer) for layer in probe.layers]
    error = float(sum(seen.total(place, "error")[probe.candidate].sum() for place in places))
    weight = change**2 / max(error, 1e-20)
    for place in places:
        seen.weight[place] = weight
    found = {"change": change, "error": error, "weight": weight}
    seen.probes.append({"key": probe.key, "candidate": str(seen.candidates[probe.candidate]), **found})
    return found


def run_everywhere(
    pipe: Any, seen: Observations, density: float, request: Request, name: str, reference: torch.Tensor, **patching: Any
) -> float:
    """Runs one candidate of about this density in all layers of each noise bin, and stores what came of it.

    Args:
        name: of the request, such as its fingerprint.

    Returns:
        The relative L2 change of the final latent.
    """
    stacks: dict[tuple[int, str], list[int]] = {}
    for bin, transformer, layer in seen.places():
        stacks.setdefault((bin, transformer), []).append(layer)
    chosen = {where: _near(seen, *where, layers, density) for where, layers in stacks.items()}
    rules = [
        Rule(LayerPolicy((seen.candidates[number],)), seen.bounds(bin), transformer, tuple(stacks[bin, transformer]))
        for (bin, transformer), number in chosen.items()
    ]
    change = latent_change(pipe, Plan(f"density {density:g}", tuple(rules), seen.tile), request, reference, **patching)
    everywhere = [[*where, number] for where, number in chosen.items()]
    key = everywhere_key(density, name)
    seen.probes.append({"key": key, "prompt": name, "everywhere": everywhere, "change": change})
    return change


def everywhere_key(density: float, name: str) -> str:
    """What a probe of :func:`run_everywhere` is called among the probes."""
    return f"everywhere/{density:g}/{name}"


def latent_change(pipe: Any, plan: Plan, request: Request, reference: torch.Tensor, **patching: Any) -> float:
    """Relative L2 change of the final latent when ``request`` runs by ``plan`` instead of dense.

    Args:
        reference: the latent of the dense run.

    Raises:
        ConfigError: if the pipeline does not show its final latent.
    """
    session = patch(pipe, plan, **patching)
    try:
        latents = generate(pipe, request).latents
    finally:
        session.close()
    if latents is None:
        raise ConfigError(f"{type(pipe).__name__} does not decode one latent at the end, so changes cannot be measured")
    change = relative_change(latents, reference)
    if not math.isfinite(change):
        raise ConfigError(f"the generation by {plan.name} is not finite; try another dtype")
    return change


def relative_change(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """||a - b|| / ||b|| of two latents, in float64."""
    exact = reference.double()
    return float((latents.double() - exact).norm() / exact.norm().clamp_min(1e-20))

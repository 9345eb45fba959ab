"""Calibration from end to end: survey, observe, perturb, time. What is seen goes to one file after every step of it,
so a run that is killed goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.session import Session
from ..errors import ConfigError
from ..patchers.fingerprint import fingerprint_of
from ..pipelines.generate import Request, generate
from ..pipelines.patch import find_transformers
from ..version import __version__
from .candidates import CandidateSet, usable
from .cost import Costs, device_name, measure_costs
from .cost_store import cost_cache
from .fingerprints import run_settings
from .linear_stage import LinearStage
from .observations import Observations
from .observe import CandidateWatcher, noise_edges
from .predicted import costs_on, find_gpu, half_of
from .projections import projections
from .running import must_run
from .sensitivity import choose_probes, everywhere_key, run_everywhere, run_probe
from .shape import Shape
from .survey import take_survey, watching

__all__ = ["STANDING_DENSITIES", "Calibrator", "Effort"]

#: Densities for which :meth:`Calibrator.standing` tells the least error.
STANDING_DENSITIES = (0.1, 0.2, 0.35, 0.5)

#: Density at which everything is perturbed at once, and others that tell how smaller and larger errors add up.
_EVERYWHERE, _OTHER_SIZES = 0.35, (0.7, 0.1)

#: ``tell(stage, done, total)``: what is being done, and how far it is.
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How much to look at.

    Args:
        bins: noise bins, fewer if there are fewer steps.
        steps: denoising steps to look at in each bin and prompt.
        tiles: query tiles to sample in each call.
        probes: most perturbed generations; at least one for each noise bin and transformer is made.
        everywhere: most generations in which everything is perturbed at once, on several prompts.
        max_minutes: observing ends after half of it, and layers are perturbed in groups so that the rest is enough.
        kept_back: share of ``max_minutes`` that is left to what comes after perturbing.
    """

    bins: int = 5
    steps: int = 1
    tiles: int = 12
    probes: int = 15
    everywhere: int = 6
    max_minutes: float = math.inf
    kept_back: float = 0.0


class Calibrator:
    """Watches a pipeline and keeps what it sees in a file.

    Args:
        pipe: an unpatched pipeline.
        requests: what to generate; at least one.
        candidates: what may be chosen.
        state: the file of observations; if it exists, the run goes on with it.
        effort: how much to look at.
        tell: is told about the progress.
        edges: bounds of the noise bins, or ``None`` to divide the steps evenly.
        distinct: leave out candidates that come out as the same blocks as another.
        target: name of the GPU that the plan is for, if it is not this device; see :func:`.predicted.find_gpu`.
        linear: 8-bit precisions that Linears may have, see :func:`.linear_stage.precisions_for`.

    Raises:
        ConfigError: if there is no request, the GPU is unknown, or the file is of another run; what can be compared
            before anything runs is.
        PlanFileError: if the file is damaged.
    """

    def __init__(
        self,
        pipe: Any,
        requests: Sequence[Request],
        candidates: CandidateSet,
        state: str | Path,
        *,
        effort: Effort | None = None,
        tell: Tell = lambda stage, done, total: None,
        edges: tuple[float, ...] | None = None,
        distinct: bool = True,
        target: str | None = None,
        linear: Sequence[str] = (),
    ) -> None:
        if not requests:
            raise ConfigError("there is no prompt to calibrate on; give at least one")
        self.pipe, self.requests, self.state = pipe, list(requests), Path(state)
        self.effort, self.tell = effort or Effort(), tell
        self.target = None if target is None else find_gpu(target).name
        self._began = time.monotonic()
        self._settings = run_settings(pipe, self.requests[0], candidates, self.effort.bins)
        stored = Observations.load(self.state) if self.state.exists() else None
        if stored is not None:
            stored.check_settings(self._settings, self.state)
        self.tell("survey", 0, 1)
        self.survey = take_survey(pipe, self.requests[0], candidates.tile)
        self.tell("survey", 1, 1)
        self.seen, self.dropped = self._start(candidates, edges, distinct)
        if stored is not None:
            stored.check_same(self.seen, self.state)
            stored.times, stored.notes = self.seen.times, []  # of this machine, and of this run
            self.seen = stored
        device = self.survey.layout.device
        self.linears = LinearStage(pipe, self.seen, linear, device) if linear else None
        self._metrics = projections(pipe)
        self._latents = {self.requests[0].fingerprint: self.survey.generation.latents}

    # -- the stages -----------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Dense generations of all prompts that are not in the file yet, with every candidate scored on the way."""
        steps, before = self._steps_by_bin(), len(self.seen.done)
        for number, request in enumerate(self.requests):
            self.tell("observe", number, len(self.requests))
            key = request.fingerprint
            if key in self.seen.done:
                continue
            if self.seen.done and not self._time_for(0.5, len(self.seen.done) - before):
                self._note(f"the time was up after {len(self.seen.done)} of {len(self.requests)} prompts")
                break
            wanted = _spread(steps, self.effort.steps, number)
            watcher = CandidateWatcher(
                self.seen, wanted, tiles=self.effort.tiles, metrics=self._metrics, seed=int(key[:8], 16)
            )
            with watching(self.pipe, watcher, self.seen.tile) as session, self._linears_in(session, wanted):
                self._latents[key] = generate(self.pipe, request).latents
            samples = watcher.samples()
            if not samples:
                raise ConfigError("no attention call could be observed; vidaccel models tells what this model runs")
            self.seen.add(key, samples)
            self.seen.save(self.state)
        if self.linears is not None and not self.linears.table.generations:  # all prompts were observed without
            self.linears.watch_alone(self.requests[0], _spread(steps, self.effort.steps, 0))
            self.seen.save(self.state)
        self.tell("observe", len(self.requests), len(self.requests))

    def perturb(self) -> None:
        """The probes that are not in the file yet: of single layers on one prompt, then of everything on several."""
        probes = choose_probes(self.seen, self._affordable_probes(), apart=frozenset(self._metrics))
        done = {str(probe["key"]) for probe in self.seen.probes}
        request, reference = self.requests[0], self.survey.generation.latents
        if reference is None:
            raise ConfigError(
                f"{type(self.pipe).__name__} does not decode one latent at the end, so it cannot be probed"
            )
        wholes = self._everywhere()
        total = len(probes) + len(wholes)
        for number, probe in enumerate(probes):
            self.tell("perturb", number, total)
            if probe.key in done:
                continue
            run_probe(self.pipe, self.seen, probe, request, reference)
            self.seen.save(self.state)
        for number, (density, request) in enumerate(wholes):
            self.tell("perturb", len(probes) + number, total)
            key = request.fingerprint
            if everywhere_key(density, key) in done:
                continue
            latents = self._latents.get(key)
            if not self._time_to_perturb(2 if latents is None else 1):
                self._note(f"the time was up after {number} of {len(wholes)} generations with everything perturbed")
                break
            if latents is None:  # this prompt was observed before this run was killed and begun again
                latents = self._latents[key] = generate(self.pipe, request).latents
            assert latents is not None  # as above
            run_everywhere(self.pipe, self.seen, density, request, key, latents)
            self.seen.save(self.state)
        self._perturb_linears(reference)
        self.tell("perturb", total, total)

    def _linears_in(self, session: Session, steps: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext() if self.linears is None else self.linears.watching(session, steps)

    def _perturb_linears(self, reference: torch.Tensor) -> None:
        missing = [] if self.linears is None else self.linears.missing()
        for number, (precision, kind) in enumerate(missing):
            assert self.linears is not None
            self.tell("Linears", number, len(missing))
            if not self._time_to_perturb(1):
                self._note(
                    f"the time was up after {number} of {len(missing)} generations with quantised Linears; the error of"
                    " the others is taken for that of attention beside them"
                )
                break
            self.linears.run(precision, kind, self.requests[0], reference)
            self.seen.save(self.state)

    def _everywhere(self) -> list[tuple[float, Request]]:
        """Densities and prompts: as many prompts as possible, because they differ much, and other sizes on a few."""
        seen = [request for request in (*self.requests[1:], self.requests[0]) if request.fingerprint in self.seen.done]
        most = self.effort.everywhere
        prompts = seen[: most - most // 3]
        others = [(density, request) for request in prompts for density in _OTHER_SIZES]
        return [(_EVERYWHERE, request) for request in prompts] + others[: most // 3]

    def time(self, *, budget_seconds: float = 45.0, cache: Path | None = None) -> Costs:
        """Seconds of each candidate: measured on this machine, or predicted for the GPU that the plan is for."""
        self.tell("time", 0, 1)
        if self.target is not None:
            found = costs_on(self.target, self.seen)
        else:
            found = measure_costs(
                self.seen.candidates,
                self.survey.layout,
                heads=self.survey.heads,
                head_dim=self.survey.head_dim,
                batch=self.survey.batch,
                dtype=self.survey.dtype,
                device=self.survey.layout.device,
                budget_seconds=budget_seconds,
                cache=cost_cache() if cache is None else cache,
            )
        self.seen.costs = found.to_dict()
        self.seen.save(self.state)
        self.tell("time", 1, 1)
        return found

    def time_linears(self, *, budget_seconds: float = 45.0, cache: Path | None = None) -> None:
        """Seconds of each Linear, measured on this machine; after :meth:`observe`, which counts their tokens."""
        assert self.linears is not None
        self.linears.time(cost_cache() if cache is None else cache, budget_seconds)
        self.seen.save(self.state)

    def standing(self) -> list[tuple[str, int, list[float]]]:
        """What is known so far: noise levels, prompts, and the least relative error at each of `STANDING_DENSITIES`.

        The error is that of one candidate for all heads, in the mean over layers; infinite where none is so sparse.
        """
        found = []
        for bin in reversed(range(self.seen.bins)):
            cells = [cell for place, cell in self.seen.cells.items() if place.bin == bin]
            if not cells:
                continue
            error = np.mean(
                [np.sqrt(cell.error.sum(1) / max(float(cell.energy.sum()), 1e-20)) for cell in cells], axis=0
            )
            density = np.mean([cell.density.mean(1) for cell in cells], axis=0)
            low, high = self.seen.bounds(bin)
            least = [float(np.min(error, where=density <= most, initial=np.inf)) for most in STANDING_DENSITIES]
            found.append((f"{low:.3f} to {high:.3f}", max(cell.prompts for cell in cells), least))
        return found

    def advice(self) -> list[str]:
        """Sentences on what would make the figures better."""
        found = list(self.seen.notes)
        if len(self.seen.done) < 2:
            found.append("one prompt tells nothing about how much prompts differ; give more prompts")
            return found
        ratios = []
        for cell in self.seen.cells.values():
            mean = float(cell.error[1:].sum())
            if mean > 0:
                # candidates and heads of one prompt err together, so their uncertainties add up
                ratios.append(float(cell.standard_error()[1:].sum()) / mean)
        worst = max(ratios, default=0.0)
        if worst > 0.25:
            found.append(f"the observed errors of one layer are uncertain by {worst:.0%}; more prompts would help")
        return found

    def left(self) -> float:
        """Seconds of ``max_minutes`` that are left, less than 0 after them."""
        return self.effort.max_minutes * 60 - (time.monotonic() - self._began)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _start(
        self, candidates: CandidateSet, edges: tuple[float, ...] | None, distinct: bool
    ) -> tuple[Observations, dict[str, str]]:
        survey = self.survey
        layout = survey.layout
        here: dict[str, Any] = {"device": layout.device, "dtype": survey.dtype, "head_dim": survey.head_dim}
        there = here if self.target is None else {**here, "device": self.target, "dtype": half_of(survey.dtype)}
        policies, dropped = usable(candidates, layout, **there, distinct=distinct)
        if self.target is not None:
            ran = replace(candidates, policies=tuple(p for p in policies if p.is_dense or must_run(p)))
            _, cannot = usable(ran, layout, **here, distinct=False)
            dropped |= {policy: f"can only be judged by running it here: {why}" for policy, why in cannot.items()}
            policies = tuple(policy for policy in policies if policy not in cannot)
        _, model, family = find_transformers(self.pipe)[0]
        edges = edges or noise_edges(survey.levels, survey.owners, self.effort.bins)
        seen = Observations(
            candidates=policies,
            tile=survey.layout.tile_shape,
            fingerprint=fingerprint_of(family, model, getattr(self.pipe, "scheduler", None), survey.layout.grid),
            edges=edges,
            steps=(0,) * (len(edges) - 1),
            settings=self._settings,
            shape=Shape.of(survey.layout, survey.batch, survey.heads, survey.head_dim, survey.dtype),
            times={"total": survey.total, "attention": survey.attention},
            provenance={
                "vidaccel": __version__,
                "device": device_name(survey.layout.device),
                "candidates": candidates.name,
            },
        )
        counts = [0] * seen.bins
        for level in survey.levels.values():
            counts[seen.bin_of(level)] += 1
        seen.steps = tuple(counts)
        return seen, {str(policy): reason for policy, reason in dropped.items()}

    def _steps_by_bin(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.seen.bins)]
        for step, level in sorted(self.survey.levels.items()):
            found[self.seen.bin_of(level)].append(step)
        return found

    def _time_for(self, share: float, done: int) -> bool:
        """Whether one more of what was done ``done`` times ends within this share of the time."""
        used = time.monotonic() - self._began
        return used * (done + 1) / max(1, done) <= share * self.effort.max_minutes * 60

    def _affordable_probes(self) -> int:
        """As many as were asked for, or as the time allows; layers are perturbed in larger groups then."""
        wanted = self.effort.probes + self.effort.everywhere
        if self._time_to_perturb(wanted):
            return self.effort.probes
        affordable = max(1, int(self._left_to_perturb() / self.survey.total * self.effort.probes / wanted))
        self._note(f"the time was enough for about {affordable} of {self.effort.probes} perturbed generations")
        return affordable

    def _time_to_perturb(self, generations: int) -> bool:
        return self._left_to_perturb() >= generations * self.survey.total

    def _left_to_perturb(self) -> float:
        return (1 - self.effort.kept_back) * self.effort.max_minutes * 60 - (time.monotonic() - self._began)

    def _note(self, text: str) -> None:
        if text not in self.seen.notes:
            self.seen.notes.append(text)


def _spread(steps: Sequence[Sequence[int]], count: int, prompt: int) -> list[int]:
    """``count`` steps of each bin, others for each prompt, so that together they meet all."""
    found = []
    for inside in steps:
        most = min(count, len(inside))
        found += [inside[(prompt + i * len(inside) // most) % len(inside)] for i in range(most)]
    return sorted(set(found))

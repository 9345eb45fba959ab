"""Calibration from end to end: survey, observe, perturb, time. What is seen goes to one file after every step of it,
so a run that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.plan import Plan
from ..engine.attend import Observer
from ..engine.session import Session
from ..errors import ConfigError
from ..layout import TokenLayout
from ..patchers.fingerprint import fingerprint_of
from ..pipelines.generate import Generation, Request, accepted_arguments, generate
from ..pipelines.patch import find_transformers, patch
from ..version import __version__
from .candidates import CandidateSet, usable
from .cost import Costs, device_name, measure_costs
from .cost_store import cost_cache
from .observations import Observations
from .observe import CandidateWatcher, LevelWatcher, noise_edges
from .sensitivity import choose_probes, run_probe

__all__ = ["STANDING_DENSITIES", "Calibrator", "Effort", "Survey"]

#: Densities for which :meth:`Calibrator.standing` tells the least error.
STANDING_DENSITIES = (0.1, 0.2, 0.35, 0.5)

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
        max_minutes: observing ends after half of it, and layers are perturbed in groups so that the rest is enough.
    """

    bins: int = 5
    steps: int = 1
    tiles: int = 12
    probes: int = 15
    max_minutes: float = math.inf


@dataclass(frozen=True, eq=False)
class Survey:
    """One dense generation, looked at from outside.

    Args:
        levels, owners: noise level and transformer by step.
        layout: order and blocks of the tokens of a layer.
        batch, heads, head_dim: of q.
        dtype: of q.
        total, attention: seconds of the generation, and of self-attention in it.
        generation: what came out.
    """

    levels: dict[int, float]
    owners: dict[int, str]
    layout: TokenLayout
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    total: float
    attention: float
    generation: Generation


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

    Raises:
        ConfigError: if there is no request, or the file is of another run.
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
    ) -> None:
        if not requests:
            raise ConfigError("there is no prompt to calibrate on; give at least one")
        self.pipe, self.requests, self.state = pipe, list(requests), Path(state)
        self.effort, self.tell = effort or Effort(), tell
        self._began = time.monotonic()
        stored = Observations.load(self.state) if self.state.exists() else None
        self.tell("survey", 0, 1)
        self.survey = self._survey(candidates)
        self.tell("survey", 1, 1)
        self.seen, self.dropped = self._start(candidates, edges, distinct)
        if stored is not None:
            stored.check_same(self.seen, self.state)
            stored.times, stored.notes = self.seen.times, []  # of this machine, and of this run
            self.seen = stored
        self._metrics = _projections(pipe)

    # -- the stages -----------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Dense generations of all prompts that are not in the file yet, with every candidate scored on the way."""
        steps, before = self._steps_by_bin(), len(self.seen.done)
        for number, request in enumerate(self.requests):
            self.tell("observe", number, len(self.requests))
            key = _request_key(request)
            if key in self.seen.done:
                continue
            if self.seen.done and not self._time_for(0.5, len(self.seen.done) - before):
                self._note(f"the time was up after {len(self.seen.done)} of {len(self.requests)} prompts")
                break
            wanted = _spread(steps, self.effort.steps, number)
            watcher = CandidateWatcher(
                self.seen, wanted, tiles=self.effort.tiles, metrics=self._metrics, seed=int(key[:8], 16)
            )
            with _watching(self.pipe, watcher, self.seen.tile):
                generate(self.pipe, request)
            samples = watcher.samples()
            if not samples:
                raise ConfigError("no attention call could be observed; vidaccel models tells what this model runs")
            self.seen.add(key, samples)
            self.seen.save(self.state)
        self.tell("observe", len(self.requests), len(self.requests))

    def perturb(self) -> None:
        """The probes that are not in the file yet."""
        probes = choose_probes(self.seen, self._affordable_probes())
        done = {str(probe["key"]) for probe in self.seen.probes}
        request, reference = self.requests[0], self.survey.generation.latents
        if reference is None:
            raise ConfigError(
                f"{type(self.pipe).__name__} does not decode one latent at the end, so it cannot be probed"
            )
        for number, probe in enumerate(probes):
            self.tell("perturb", number, len(probes))
            if probe.key in done:
                continue
            run_probe(self.pipe, self.seen, probe, request, reference)
            self.seen.save(self.state)
        self.tell("perturb", len(probes), len(probes))

    def time(self, *, budget_seconds: float = 60.0, cache: Path | None = None) -> Costs:
        """Seconds of each candidate on this machine."""
        self.tell("time", 0, 1)
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

    # -- parts ------------------------------------------------------------------------------------------------------

    def _survey(self, candidates: CandidateSet) -> Survey:
        request = self.requests[0]
        watcher = LevelWatcher()  # a short run, which also does the first-time work that no generation costs
        with _watching(self.pipe, watcher, candidates.tile):
            generate(self.pipe, _short(self.pipe, request))
        session = patch(self.pipe, Plan.dense())
        try:
            session.observer = levels = LevelWatcher(layout=watcher.layout)
            generation = generate(self.pipe, request)
            report = session.report()
        finally:
            session.close()
        if watcher.layout is None:
            reasons = "; ".join(report.fallbacks) or "no attention layer was called"
            raise ConfigError(f"nothing can be calibrated: {reasons}")
        batch, _, heads, head_dim = watcher.shape
        assert watcher.dtype is not None
        seconds = generation.seconds["total"]
        return Survey(
            levels.levels, levels.owners, watcher.layout, batch, heads, head_dim, watcher.dtype, seconds,
            report.attention_seconds, generation,
        )  # fmt: skip

    def _start(
        self, candidates: CandidateSet, edges: tuple[float, ...] | None, distinct: bool
    ) -> tuple[Observations, dict[str, str]]:
        survey = self.survey
        policies, dropped = usable(
            candidates,
            survey.layout,
            device=survey.layout.device,
            dtype=survey.dtype,
            head_dim=survey.head_dim,
            distinct=distinct,
        )
        _, model, family = find_transformers(self.pipe)[0]
        edges = edges or noise_edges(survey.levels, survey.owners, self.effort.bins)
        settings = {key: value for key, value in survey.generation.settings.items() if key not in ("prompt", "seed")}
        settings["weights"] = _weights_digest(self.pipe)
        seen = Observations(
            candidates=policies,
            tile=survey.layout.tile_shape,
            fingerprint=fingerprint_of(family, model, getattr(self.pipe, "scheduler", None), survey.layout.grid),
            edges=edges,
            steps=(0,) * (len(edges) - 1),
            settings=settings,
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
        left = self.effort.max_minutes * 60 - (time.monotonic() - self._began)
        if left >= self.effort.probes * self.survey.total:
            return self.effort.probes
        affordable = max(1, int(left / self.survey.total))
        self._note(f"the time was enough for about {affordable} of {self.effort.probes} perturbed generations")
        return affordable

    def _note(self, text: str) -> None:
        if text not in self.seen.notes:
            self.seen.notes.append(text)


@contextmanager
def _watching(pipe: Any, watcher: Observer, tile: Any) -> Iterator[Session]:
    session = patch(pipe, Plan.dense())
    try:
        session.observer, session.observed_tile = watcher, tile
        yield session
    finally:
        session.close()


def _short(pipe: Any, request: Request) -> Request:
    """The same with two steps, where the pipeline has steps."""
    if "num_inference_steps" not in accepted_arguments(pipe) or {"timesteps", "sigmas"} & set(request.arguments):
        return request
    return replace(request, arguments={**request.arguments, "num_inference_steps": 2})


def _spread(steps: Sequence[Sequence[int]], count: int, prompt: int) -> list[int]:
    """``count`` steps of each bin, others for each prompt, so that together they meet all."""
    found = []
    for inside in steps:
        most = min(count, len(inside))
        found += [inside[(prompt + i * len(inside) // most) % len(inside)] for i in range(most)]
    return sorted(set(found))


def _request_key(request: Request) -> str:
    """A fingerprint of prompt, seed and arguments; prompts themselves are not stored."""
    arguments = {name: _content(value) for name, value in request.arguments.items()}
    text = json.dumps([request.prompt, request.seed, arguments], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _content(value: Any) -> str:
    """A text that is the same for equal values, pictures and tensors included, in every process."""
    value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return "[" + ", ".join(map(_content, value)) + "]" if isinstance(value, list | tuple) else str(value)


def _weights_digest(pipe: Any) -> str:
    """A fingerprint of some attention weights and the adapters, so that another checkpoint or LoRA is noticed."""
    digest = hashlib.sha256()
    for name, model, family in find_transformers(pipe):
        digest.update(f"{name} {sorted(getattr(model, 'peft_config', None) or {})}".encode())
        for layer, (_, module) in enumerate(family.attention_layers(model)):
            for key, weight in module.named_parameters():
                if not weight.is_meta and weight.is_floating_point():
                    digest.update(f"{layer} {key} {weight.detach().flatten()[:8].tolist()}".encode())
    return digest.hexdigest()[:16]


def _projections(pipe: Any) -> Mapping[tuple[str, int], torch.Tensor]:
    """W^T W of each head's part of the output projection, by transformer and layer; absent where there is none."""
    found = {}
    for name, model, family in find_transformers(pipe):
        for layer, (_, module) in enumerate(family.attention_layers(model)):
            out = getattr(module, "to_out", None)
            linear = out[0] if isinstance(out, torch.nn.ModuleList | torch.nn.Sequential) and len(out) else out
            weight = getattr(linear, "weight", None)
            heads = family.heads_of(module)
            if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
                continue
            if weight.dim() != 2 or weight.shape[1] % heads:
                continue
            parts = weight.detach().float().view(weight.shape[0], heads, -1).transpose(0, 1)
            found[(name, layer)] = parts.mT @ parts
    return found

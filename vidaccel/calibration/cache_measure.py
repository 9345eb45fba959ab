"""Step caches with dense attention: which a model takes, what each does to a generation, measured once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..configs.plan import Plan
from ..configs.step_cache import plan_cache
from ..engine.stats import Report
from ..errors import ConfigError
from ..pipelines.caches import AUTO, check_cache, read_cache, without
from ..pipelines.generate import Generation, Request, generate
from ..pipelines.patch import patch
from .cache_runs import CacheFigures, CacheRun, figures_of
from .observations import Observations
from .sensitivity import relative_change

__all__ = ["caches_for", "measure_caches", "measured_figures", "named_caches", "stored_figures"]


def caches_for(pipe: Any, text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The caches of ``--caches`` that this pipeline takes, and why it does not take others that ``auto`` would try.

    Raises:
        ConfigError: if one that is named is unknown, not supported here, or not one that a plan can hold.
    """
    if text.strip() == "auto":
        reasons = without(pipe, AUTO, None)
        return ("none", *(cache for cache in AUTO if cache not in reasons)), reasons
    named = named_caches(text)
    for cache in named:
        check_cache(pipe, read_cache(cache), None)
    return named, {}


def named_caches(text: str) -> tuple[str, ...]:
    """The caches of ``--caches``, in their one spelling; what a pipeline takes of them is not asked.

    Raises:
        ConfigError: if one is unknown or left out between commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--caches is {text!r}; give caches with commas between, such as none,first-block:0.08")
    return tuple(dict.fromkeys(plan_cache(part) or "none" for part in parts))


def stored_figures(seen: Observations, text: str) -> list[CacheFigures]:
    """Figures of caches that were measured before; ``auto`` for all of them and none.

    Raises:
        ConfigError: if there are none, or not of one that is named.
    """
    known = list(dict.fromkeys(run.cache for run in seen.caches))
    if not known:
        raise ConfigError("no step cache was measured for these observations; run vidaccel calibrate --caches")
    found = []
    for cache in ("none", *known) if text.strip() == "auto" else named_caches(text):
        if cache != "none" and cache not in known:
            raise ConfigError(f"the step cache {cache} was not measured; measured are {', '.join(known)}")
        found.append(figures_of(seen.caches, cache))
    return found


def measured_figures(seen: Observations, caches: Sequence[str]) -> tuple[list[CacheFigures], list[str]]:
    """Figures of those of the caches that were run, and a note on the others."""
    known = {run.cache for run in seen.caches} | {"none"}
    left = [cache for cache in caches if cache not in known]
    if len(left) == len(caches):
        raise ConfigError("there was no time to run any step cache; allow more minutes, or put none into --caches")
    notes = [f"not run, so not chosen: step caches {', '.join(left)}"] if left else []
    return [figures_of(seen.caches, cache) for cache in caches if cache in known], notes


def measure_caches(
    pipe: Any,
    seen: Observations,
    requests: Sequence[Request],
    caches: Sequence[str],
    *,
    save: Callable[[], None] = lambda: None,
    time_for: Callable[[int], bool] = lambda generations: True,
    tell: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[str]:
    """Runs each cache with dense attention on each request, unless that is in the observations already.

    Args:
        seen: gets a :class:`CacheRun` for each.
        save: called after each run.
        time_for: whether so many generations end in time.
        tell: is told about the progress.

    Returns:
        Sentences on what there was no time for, and on caches that failed: diffusers lets some be enabled on models
        whose blocks they then cannot handle.
    """
    wanted = [cache for cache in caches if cache != "none"]
    total, done, failed = len(wanted) * len(requests), 0, dict[str, str]()
    for request in requests:
        known = {run.cache for run in seen.caches if run.prompt == request.fingerprint}
        missing = [cache for cache in wanted if cache not in known and cache not in failed]
        done += len(wanted) - len(missing)
        tell("caches", done, total)
        dense: tuple[Generation, Report] | None = None
        for cache in missing:
            if not time_for(2 if dense is None else 1):
                return [*failed.values(), f"the time was up after {done} of {total} runs of step caches"]
            # beside its own dense run even if that was made before: seconds of two processes do not compare
            dense = _run(pipe, request, None) if dense is None else dense
            try:
                made = _run(pipe, request, cache)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else "no reason given"
                failed[cache] = f"the step cache {cache} failed on this model: {type(error).__name__}: {reason}"
                continue
            seen.caches.append(_figures(cache, request, made, dense))
            save()
            done += 1
            tell("caches", done, total)
    return list(failed.values())


def _run(pipe: Any, request: Request, cache: str | None) -> tuple[Generation, Report]:
    session = patch(pipe, replace(Plan.dense(), cache=cache))
    try:
        return generate(pipe, request), session.report()
    finally:
        session.close()


def _figures(
    cache: str, request: Request, made: tuple[Generation, Report], dense: tuple[Generation, Report]
) -> CacheRun:
    latents, exact = made[0].latents, dense[0].latents
    if latents is None or exact is None:
        raise ConfigError("this pipeline does not decode one latent at the end, so step caches cannot be judged")
    error = relative_change(latents, exact)
    if not math.isfinite(error):
        raise ConfigError(f"the generation with the step cache {cache} is not finite; leave it out of --caches")
    apart = torch.from_numpy(made[0].frames).double() - torch.from_numpy(dense[0].frames).double()
    square = float(apart.square().mean())
    return CacheRun(
        cache=cache,
        prompt=request.fingerprint,
        error=error,
        seconds=made[0].seconds["total"] / dense[0].seconds["total"],
        calls=made[1].calls / max(1, dense[1].calls),
        psnr=10 * math.log10(255**2 / square) if square > 0 else None,
    )

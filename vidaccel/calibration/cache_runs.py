"""What a step cache did in a generation, and in the mean over several: small figures that go into the observations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..configs.step_cache import plan_cache
from ..errors import PlanFileError

__all__ = ["NO_CACHE", "CacheFigures", "CacheRun", "figures_of"]

_NUMBERS = ("error", "seconds", "calls", "psnr")


@dataclass(frozen=True)
class CacheRun:
    """One generation with a cache and dense attention, against the same without the cache.

    Args:
        cache: as ``--cache`` takes it.
        prompt: fingerprint of the request.
        error: relative L2 error of the final latent.
        seconds: of the whole generation, over those of the one without.
        calls: self-attention calls that ran, over those of the one without.
        psnr: in dB; ``None`` where the videos are identical.
    """

    cache: str
    prompt: str
    error: float
    seconds: float
    calls: float
    psnr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: object) -> CacheRun:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanFileError: if a figure is missing, of the wrong kind or negative.
        """
        names = set(CacheRun.__dataclass_fields__)
        if not isinstance(data, Mapping) or set(data) != names:
            raise PlanFileError(
                f"an entry of its step caches has not the keys {', '.join(sorted(names))}; write it again"
            )
        numbers = [data[name] for name in _NUMBERS if data[name] is not None or name != "psnr"]
        good = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
        if not good or min(data["error"], data["seconds"], data["calls"]) < 0 or not isinstance(data["prompt"], str):
            raise PlanFileError(
                f"its figures of the step cache {str(data['cache'])[:80]!r} are no figures; write it again"
            )
        cache = plan_cache(data["cache"])
        if cache is None:
            raise PlanFileError("an entry of its step caches names none; write it again")
        return CacheRun(**{**data, "cache": cache})


@dataclass(frozen=True)
class CacheFigures:
    """A cache in the mean over prompts; see :class:`CacheRun`.

    Args:
        cache: ``None`` for no cache.
        error: root mean square over prompts, because squares are what is added.
        psnr: mean over the prompts whose videos are not identical, infinite where all are.
        prompts: how many; 0 for no cache, which needs no measuring.
    """

    cache: str | None
    error: float = 0.0
    seconds: float = 1.0
    calls: float = 1.0
    psnr: float = math.inf
    prompts: int = 0

    @property
    def name(self) -> str:
        """As ``--caches`` writes it."""
        return self.cache or "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "cache": self.name, "psnr": self.psnr if math.isfinite(self.psnr) else None}


#: Beside which a plan runs as without caches.
NO_CACHE = CacheFigures(None)


def figures_of(runs: Sequence[CacheRun], cache: str) -> CacheFigures:
    """The mean of a cache's runs; ``none`` for no cache.

    Raises:
        ConfigError: if the text is no cache of a plan.
        KeyError: if it was not run.
    """
    name = plan_cache(cache)
    if name is None:
        return NO_CACHE
    own = [run for run in runs if run.cache == name]
    if not own:
        raise KeyError(name)
    apart = [run.psnr for run in own if run.psnr is not None]
    return CacheFigures(
        cache=name,
        error=math.sqrt(statistics.fmean(run.error**2 for run in own)),
        seconds=statistics.fmean(run.seconds for run in own),
        calls=statistics.fmean(run.calls for run in own),
        psnr=statistics.fmean(apart) if apart else math.inf,
        prompts=len(own),
    )

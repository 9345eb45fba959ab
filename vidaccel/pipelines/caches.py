"""diffusers' step caches by one word, beside a plan: ``first-block:0.08``, ``taylorseer:5``, ``pab:2``, ``mag:FILE``.

A cache skips blocks or steps, a plan makes what still runs cheaper; neither knows of the other. The implementations are
diffusers'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["CACHES", "Cache", "enabled"]

#: name -> what the value after the colon is, and its default (``None``: it must be given).
CACHES: dict[str, tuple[str, float | None]] = {
    "first-block": ("largest relative change of the first block's output at which the others are skipped", 0.08),
    "taylorseer": ("steps from one full step to the next; between them outputs are extrapolated", 5),
    "pab": ("steps for which an attention output is used again", 2),
    "mag": ("JSON file with the model's list of magnitude ratios, as MagCacheConfig(calibrate=True) prints it", None),
}


# attention and feed-forward of every block; by default diffusers looks for names that end in "attn", which few have
_OUTPUTS = r"\w*(blocks|layers)\.\d+\.(attn\d?|ffn?|ff_context)"


@dataclass(frozen=True)
class Cache:
    """A cache and its setting. Make it with :meth:`parse`.

    Args:
        name: one of :data:`CACHES`.
        value: the number or path, as written.
    """

    name: str
    value: str

    @staticmethod
    def parse(text: str) -> Cache:
        """The cache of ``NAME`` or ``NAME:VALUE``.

        Raises:
            ConfigError: if there is no such cache, or the value is not one it takes.
        """
        name, _, value = text.partition(":")
        if name not in CACHES:
            raise ConfigError(f"the cache {text!r} is not known; valid are {', '.join(CACHES)}, each as NAME:VALUE")
        meaning, default = CACHES[name]
        if not value and default is None:
            raise ConfigError(f"the cache {name} needs a value, {name}:VALUE; it is the {meaning}")
        cache = Cache(name, value or f"{default:g}")
        cache._check(meaning)
        return cache

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def _check(self, meaning: str) -> None:
        if self.name == "mag":
            _ratios(self.value)
            return
        try:
            number = float(self.value)
        except ValueError:
            number = math.nan
        whole = self.name != "first-block"
        least = 2 if whole else 0
        if not math.isfinite(number) or number < least or (whole and number != int(number)) or number == 0:
            kind = f"a whole number of at least {least}" if whole else "a number above 0"
            raise ConfigError(f"the value of the cache {self.name} is {self.value!r}; give {kind}: {meaning}")


@contextmanager
def enabled(pipe: Any, cache: Cache | None, steps: int | None) -> Iterator[None]:
    """The cache in every transformer of the pipeline while the block runs; none with ``None``.

    Args:
        steps: denoising steps of the run, which MagCache must know.

    Raises:
        ConfigError: if a transformer or the pipeline does not support it, or has a cache already.
    """
    with ExitStack() as undo:
        for name, model in getattr(pipe, "components", {}).items() if cache is not None else ():
            if not name.startswith("transformer") or model is None:
                continue
            if not hasattr(model, "enable_cache"):
                raise ConfigError(f"{type(model).__name__} supports none of diffusers' caches; leave out --cache")
            if model.is_cache_enabled:
                raise ConfigError(f"{name} has a cache already; call {name}.disable_cache() first")
            assert cache is not None
            before = _hooks(model)
            try:
                model.enable_cache(_config(pipe, cache, steps))
            except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
                raise ConfigError(f"{type(model).__name__} does not take the cache {cache}: {error}") from error
            undo.callback(model.disable_cache)
            if _hooks(model) == before:
                raise ConfigError(f"the cache {cache} finds no layers in {type(model).__name__}; use another")
        yield


def _config(pipe: Any, cache: Cache, steps: int | None) -> Any:
    import diffusers

    makers: dict[str, Callable[[], Any]] = {
        "first-block": lambda: diffusers.FirstBlockCacheConfig(threshold=float(cache.value)),
        "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=int(float(cache.value)), cache_identifiers=[_OUTPUTS]
        ),
        "pab": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(float(cache.value)),
            current_timestep_callback=lambda: _timestep(pipe),
        ),
        "mag": lambda: diffusers.MagCacheConfig(mag_ratios=_ratios(cache.value), num_inference_steps=_known(steps)),
    }
    name = {"first-block": "FirstBlock", "taylorseer": "TaylorSeer", "pab": "PyramidAttentionBroadcast", "mag": "Mag"}
    if not hasattr(diffusers, f"{name[cache.name]}{'' if cache.name == 'pab' else 'Cache'}Config"):
        raise ConfigError(f"diffusers {diffusers.__version__} has no cache {cache.name}; update it")
    return makers[cache.name]()


def _hooks(model: Any) -> int:
    """How many of diffusers' hooks sit in the model."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def _timestep(pipe: Any) -> int:
    # pipelines keep it as a tensor, a number, or None between runs
    current = getattr(pipe, "_current_timestep", None)
    return 0 if current is None else int(current)


def _known(steps: int | None) -> int:
    if steps is None:
        raise ConfigError("the cache mag needs the number of steps, which this pipeline does not tell; use another")
    return steps


def _ratios(path: str) -> list[float]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the ratios for the cache mag in {path} cannot be read: {error}") from error
    good = isinstance(found, list) and found and all(isinstance(x, int | float) and math.isfinite(x) for x in found)
    if not good:
        raise ConfigError(
            f"{path} is no JSON list of numbers; give the ratios that MagCacheConfig(calibrate=True) prints"
        )
    return [float(x) for x in found]

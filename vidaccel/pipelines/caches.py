"""diffusers' step caches by one word, beside a plan: ``first-block:0.08``, ``taylorseer:5``, ``pab:2``, ``mag:FILE``.

A cache skips blocks or steps, a plan makes what still runs cheaper; neither knows of the other. The implementations are
diffusers'. Two of them, PAB and FasterCache, keep one state a layer, although most pipelines run the two passes of
guidance one after the other: each would find the other's outputs. So here they get a state for each pass.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configs.step_cache import CACHES, Cache
from ..engine.unwrap import unwrapped
from ..errors import ConfigError

__all__ = ["AUTO", "CACHES", "Cache", "check_cache", "enable", "enabled", "read_cache", "without"]

#: What ``--caches auto`` tries, where the model supports it.
AUTO = ("sea:0.25", "first-block:0.08", "first-block:0.15", "taylorseer:2", "taylorseer:3", "pab:2", "faster:2")

# attention and feed-forward of every block; by default diffusers looks for names that end in "attn", which few have
_OUTPUTS = r"\w*(blocks|layers)\.\d+\.(attn\d?|ffn?|ff_context)"

#: The first outputs that FasterCache extrapolates from must have been computed.
_COMPUTED_FIRST = 2

_CONFIGS = {
    "first-block": "FirstBlockCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "faster": "FasterCacheConfig",
    "sea": "SeaCacheConfig",
    "mag": "MagCacheConfig",
}


def read_cache(text: str) -> Cache | None:
    """The cache of ``NAME:VALUE``, its file readable; ``None`` for ``none``.

    Raises:
        ConfigError: if there is no such cache, or its value or file is not one it takes.
    """
    if text == "none":
        return None
    cache = Cache.parse(text)
    if cache.name == "mag":
        _ratios(cache.value)
    return cache


@contextmanager
def enabled(pipe: Any, cache: Cache | None, steps: int | None) -> Iterator[None]:
    """The cache in every transformer of the pipeline while the block runs; none with ``None``.

    Args:
        pipe: a pipeline, or a bare transformer for caches that do not ask for the timestep.
        steps: denoising steps of the run, which MagCache must know.

    Raises:
        ConfigError: if a transformer or the pipeline does not support it, or has a cache already.
    """
    undo = [] if cache is None else enable(pipe, cache, steps)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def enable(pipe: Any, cache: Cache, steps: int | None) -> list[Callable[[], Any]]:
    """Enables the cache in every transformer of the pipeline; arguments and errors as :func:`enabled` has them.

    Returns:
        what undoes it. Nothing happens by itself: a process may end with the cache enabled.
    """
    _check_pipeline(pipe, cache)
    undo: list[Callable[[], Any]] = []
    try:
        for name, model in _transformers(pipe):
            _enable(pipe, name, model, cache, steps, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return undo


def check_cache(pipe: Any, cache: Cache | None, steps: int | None) -> None:
    """Raises what :func:`enabled` would; nothing is left behind."""
    with enabled(pipe, cache, steps):
        pass


def without(pipe: Any, wanted: tuple[str, ...], steps: int | None) -> dict[str, str]:
    """Those of the caches that this pipeline does not take, and why."""
    reasons = {}
    for text in wanted:
        try:
            check_cache(pipe, read_cache(text), steps)
        except ConfigError as error:
            reasons[text] = str(error)
    return reasons


def _transformers(pipe: Any) -> list[tuple[str, Any]]:
    parts = {"transformer": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", {})
    found = {id(model): (name, model) for name, part in parts.items() if (model := unwrapped(part)) is not None}
    return [(name, model) for name, model in found.values() if name.startswith("transformer")]


def _enable(pipe: Any, name: str, model: Any, cache: Cache, steps: int | None, undo: list[Callable[[], Any]]) -> None:
    if not hasattr(model, "enable_cache"):
        raise ConfigError(f"{type(model).__name__} supports none of diffusers' caches; leave out the cache {cache}")
    if model.is_cache_enabled:
        raise ConfigError(f"{name} has a cache already; call {name}.disable_cache() first")
    before = _hooks(model)
    try:
        model.enable_cache(_config(pipe, cache, steps))
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        raise ConfigError(f"{type(model).__name__} does not take the cache {cache}: {error}") from error
    undo.append(partial(_disable, weakref.ref(model)))
    if _hooks(model) == before:
        raise ConfigError(f"the cache {cache} finds no layers in {type(model).__name__}; use another")
    if cache.name in ("pab", "faster"):
        from .by_branch import keep_branches_apart  # which imports diffusers

        keep_branches_apart(model)


def _disable(model: weakref.ref[Any]) -> None:
    """Disables the cache of a model that may be gone, or that somebody has disabled it for."""
    found = model()
    if found is not None and found.is_cache_enabled:
        found.disable_cache()


def _check_pipeline(pipe: Any, cache: Cache) -> None:
    """Refuses pipelines whose passes a cache could not tell apart, or that lack what it asks them for."""
    import diffusers

    config = _CONFIGS[cache.name]
    if not hasattr(diffusers, config):
        raise ConfigError(f"diffusers {diffusers.__version__} has no {config}, so no cache {cache.name}; update it")
    name = type(pipe).__name__
    if isinstance(pipe, nn.Module):
        if cache.name in ("pab", "faster"):
            raise ConfigError(
                f"the cache {cache.name} asks a pipeline for its timestep; patch the pipeline, not {name}"
            )
        return
    if isinstance(pipe, diffusers.DiffusionPipeline) and not _mentions(pipe, "cache_context"):
        raise ConfigError(
            f"{name} does not tell caches which pass of guidance is running, so their outputs could mix; leave out the"
            f" cache {cache}"
        )
    if cache.name in ("pab", "faster") and not _mentions(pipe, "_current_timestep"):
        raise ConfigError(f"{name} does not tell its timestep, which the cache {cache.name} needs; use another")
    if cache.name == "sea" and not _mentions(pipe, '"sigma"'):
        raise ConfigError(f"{name} does not tell caches the noise level, which the cache sea needs; use another")


def _mentions(pipe: Any, word: str) -> bool:
    """Whether a module that defines the pipeline's class, or one it builds on, has this word in its source."""
    for cls in type(pipe).__mro__:
        module = sys.modules.get(cls.__module__)
        try:
            if module is not None and word in inspect.getsource(module):
                return True
        except (OSError, TypeError):  # a class typed at a prompt has no source to look at
            continue
    return False


def _config(pipe: Any, cache: Cache, steps: int | None) -> Any:
    import diffusers

    owner = weakref.ref(pipe)  # the hooks of a forgotten pipeline must not keep it
    makers: dict[str, Callable[[], Any]] = {
        "first-block": lambda: diffusers.FirstBlockCacheConfig(threshold=float(cache.value)),
        "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=_steps(cache), cache_identifiers=[_OUTPUTS]
        ),
        "pab": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=_steps(cache),
            current_timestep_callback=lambda: _timestep(owner()),
        ),
        # without its other half, which guesses the unconditional pass: that takes both passes in one batch
        "faster": lambda: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=_steps(cache),
            is_guidance_distilled=True,
            attention_weight_callback=lambda module: 0.5,
            current_timestep_callback=_LateTimestep(owner),
        ),
        "sea": lambda: diffusers.SeaCacheConfig(threshold=float(cache.value)),
        "mag": lambda: diffusers.MagCacheConfig(mag_ratios=_ratios(cache.value), num_inference_steps=_known(steps)),
    }
    return makers[cache.name]()


def _steps(cache: Cache) -> int:
    return int(float(cache.value))


def _hooks(model: Any) -> int:
    """How many of diffusers' hooks sit in the model."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def _timestep(pipe: Any) -> int:
    # pipelines keep it as a number or a tensor, which diffusion forcing gives an entry for each frame, or None
    current = getattr(pipe, "_current_timestep", None)
    return 0 if current is None else int(current.max() if isinstance(current, torch.Tensor) else current)


class _LateTimestep:
    """The timestep, but one at which nothing is skipped in the first steps of a run, however late it begins."""

    def __init__(self, owner: Callable[[], Any]) -> None:
        self._owner = owner
        self._seen: list[int] = []

    def __call__(self) -> int:
        now = _timestep(self._owner())
        if self._seen and now > self._seen[-1]:
            self._seen = []  # another run
        if not self._seen or now != self._seen[-1]:
            self._seen = [*self._seen[:_COMPUTED_FIRST], now]
        return now if len(self._seen) > _COMPUTED_FIRST else sys.maxsize


def _known(steps: int | None) -> int:
    if steps is None:
        raise ConfigError("the cache mag needs the number of steps, which this pipeline does not tell; use another")
    return steps


def _ratios(path: str) -> list[float]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"the ratios for the cache mag in {path} cannot be read: {reason}; give a JSON list of numbers"
        ) from error
    good = isinstance(found, list) and found and all(isinstance(x, int | float) and math.isfinite(x) for x in found)
    if not good:
        raise ConfigError(
            f"{path} is no JSON list of numbers; give the ratios that MagCacheConfig(calibrate=True) prints"
        )
    return [float(x) for x in found]
